"""Convolutions and transposed convolutions, in channels-last layers."""

import math

import keras
import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.windows import (
    cropped,
    padded,
    positions,
    strides_and_dilations,
    window,
)

_CONVOLUTIONS = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}
_DEPTHWISE = {1: keras.layers.DepthwiseConv1D, 2: keras.layers.DepthwiseConv2D}
_TRANSPOSED = {
    1: keras.layers.Conv1DTranspose,
    2: keras.layers.Conv2DTranspose,
    3: keras.layers.Conv3DTranspose,
}


def spread(build, kernel, dilations):
    """The kernel with zeros between its taps, positions first."""
    rank = len(dilations)
    sizes = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:rank], dilations, strict=True)]
    build.check_bytes(8 * math.prod((*sizes, *kernel.shape[rank:])))
    wide = np.zeros((*sizes, *kernel.shape[rank:]), kernel.dtype)
    wide[tuple(slice(None, None, d) for d in dilations)] = kernel
    return wide


def _arguments(node, values):
    signal, kernel = values[:2]
    bias = values[2] if len(values) > 2 else None
    if not isinstance(kernel, np.ndarray) or not isinstance(bias, np.ndarray | None):
        raise NotRead("its weights are computed from inputs")
    rank = kernel.ndim - 2
    if rank not in _CONVOLUTIONS:
        raise NotRead(f"it has {rank} axes of positions")
    if signal.rank != kernel.ndim:
        raise BadGraph(f"its kernel of shape {kernel.shape} meets {signal.rank} axes")
    given = node.get("kernel_shape")
    if given is not None and tuple(given) != kernel.shape[2:]:
        raise BadGraph(f"its kernel has shape {kernel.shape}, and {tuple(given)} is declared")
    return signal, kernel, bias, rank


def _conv(build, node, values):
    signal, kernel, bias, rank = _arguments(node, values)
    groups, channels = node.get("group", 1), signal.sample[0] if signal.sample else 0
    if groups < 1 or kernel.shape[1] * groups != channels or kernel.shape[0] % groups:
        raise BadGraph(
            f"its kernel of shape {kernel.shape} in {groups} groups meets {channels} channels"
        )
    found = window(node, positions(signal), kernel.shape[2:])
    signal = build.channels_last(node, signal)
    # (out, in, …) to (…, in, out).
    taps = np.moveaxis(kernel, (0, 1), (-1, -2))
    dilations = found.dilations
    uneven = max(found.strides) > 1 and max(dilations) > 1
    depthwise = (
        groups == channels and rank in _DEPTHWISE and channels > 1
        and len(set(found.strides)) == 1 and not uneven
    )  # fmt: skip
    if uneven:  # Keras has no layer with both: the zeros between the taps are written out
        taps, dilations = spread(build, taps, dilations), (1,) * rank
    padding = "valid"
    if found.is_same and not found.is_valid:
        padding = "same"
    elif rank == 1 and found.after == (0,) and found.before == (found.reach[0] - 1,):
        padding = "valid" if found.is_valid or depthwise else "causal"
        if padding == "valid":
            signal = padded(build, node, signal, found.before, found.after)
    else:
        signal = padded(build, node, signal, found.before, found.after)
    settings = {
        "kernel_size": taps.shape[:rank],
        "strides": found.strides,
        "dilation_rate": dilations,
        "padding": padding,
        "use_bias": bias is not None,
        "data_format": "channels_last",
    }
    if depthwise:
        multiplier = kernel.shape[0] // channels
        # Output channels are grouped by input channel.
        taps = taps.reshape(*taps.shape[:rank], channels, multiplier)
        settings["depth_multiplier"], kind = multiplier, _DEPTHWISE[rank]
    else:
        kind = _CONVOLUTIONS[rank]
        settings.update(filters=kernel.shape[0], groups=groups)
    weights = [np.asarray(taps, signal.dtype)]
    if bias is not None:
        weights.append(np.asarray(bias, signal.dtype))
    return signal.like(build.layer(node, kind, signal.tensor, weights=weights, **settings))


def _conv_transpose(build, node, values):
    signal, kernel, bias, rank = _arguments(node, values)
    groups, channels = node.get("group", 1), signal.sample[0]
    if groups < 1 or kernel.shape[0] != channels or channels % groups:
        raise BadGraph(
            f"its kernel of shape {kernel.shape} in {groups} groups meets {channels} channels"
        )
    strides, dilations = strides_and_dilations(node, rank)
    taps = np.moveaxis(kernel, (0, 1), (-1, -2))  # (…, out per group, in)
    if groups > 1:
        build.check_bytes(8 * taps.size * groups)
        taps = _ungrouped(taps, groups)
    taps = spread(build, taps, dilations)
    sizes, reach = positions(signal), taps.shape[:rank]
    before, out = _transposed_sizes(node, sizes, reach, strides)
    signal = build.channels_last(node, signal)
    settings = {
        "filters": taps.shape[-2],
        "strides": strides,
        "use_bias": bias is not None,
        "data_format": "channels_last",
    }
    is_same = all(
        m == n * s and k >= s and low == (k - s) // 2
        for m, n, s, k, low in zip(out, sizes, strides, reach, before, strict=True)
    )
    if is_same and any(k > s for k, s in zip(reach, strides, strict=True)):
        settings["padding"], cut = "same", None
    else:
        # Taps of zero reach the cells behind the last one, where the bias alone stands.
        grown = [
            max(k, s, low + m - (n - 1) * s)
            for m, n, s, k, low in zip(out, sizes, strides, reach, before, strict=True)
        ]
        build.check_bytes(8 * math.prod((*grown, *taps.shape[rank:])))
        pads = [(0, g - k) for g, k in zip(grown, reach, strict=True)]
        taps = np.pad(taps, [*pads, (0, 0), (0, 0)])
        whole = [(n - 1) * s + g for n, s, g in zip(sizes, strides, grown, strict=True)]
        cut = [w - m - low for w, m, low in zip(whole, out, before, strict=True)]
    settings["kernel_size"] = taps.shape[:rank]
    weights = [np.asarray(taps, signal.dtype)]
    if bias is not None:
        weights.append(np.asarray(bias, signal.dtype))
    tensor = build.layer(node, _TRANSPOSED[rank], signal.tensor, weights=weights, **settings)
    result = signal.like(tensor)
    return result if cut is None else cropped(build, node, result, before, cut)


def _ungrouped(taps, groups):
    """A kernel (…, out per group, in) with its groups written out as blocks, zeros elsewhere."""
    *sizes, per_group, channels = taps.shape
    width = channels // groups
    whole = np.zeros((*sizes, per_group * groups, channels), taps.dtype)
    for g in range(groups):
        rows, columns = slice(g * per_group, (g + 1) * per_group), slice(g * width, (g + 1) * width)
        whole[..., rows, columns] = taps[..., columns]
    return whole


def _transposed_sizes(node, sizes, reach, strides):
    """`(cells cut off before, sizes of the result)` of a transposed convolution."""
    rank = len(sizes)
    extra = node.get("output_padding") or [0] * rank
    asked, auto = node.get("output_shape"), node.get("auto_pad", "NOTSET")
    pads = node.get("pads") or [0] * (2 * rank)
    if len(extra) != rank or len(pads) != 2 * rank:
        raise BadGraph("its pads do not fit its axes")
    if asked is not None and len(asked) not in (rank, rank + 2):
        raise BadGraph("its output_shape does not fit its axes")
    before, out = [], []
    for i, (n, q, s) in enumerate(zip(sizes, reach, strides, strict=True)):
        whole = (n - 1) * s + q + int(extra[i])
        if asked is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
            m = int(asked[len(asked) - rank + i]) if asked is not None else n * s
            total = max(whole - m, 0)
            low = total // 2 if auto != "SAME_LOWER" else -(-total // 2)
            if asked is not None and auto not in ("SAME_UPPER", "SAME_LOWER"):
                low = total - total // 2
            if whole < m:
                raise NotRead("it asks for a larger result than its kernel reaches")
        elif auto == "VALID":
            low, m = 0, whole
        else:
            low, m = int(pads[i]), whole - int(pads[i]) - int(pads[rank + i])
        if low < 0 or m < 1 or (asked is None and min(pads) < 0):
            raise NotRead("its pads are negative or cut all off")
        before.append(low)
        out.append(m)
    return before, out


READERS = {"Conv": (22, _conv), "ConvTranspose": (22, _conv_transpose)}
