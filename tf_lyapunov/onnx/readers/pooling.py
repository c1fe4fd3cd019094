"""Maxima, means and norms over windows and over all positions."""

import functools
import itertools
import math

import keras
import numpy as np

from tf_lyapunov.layers.pooling import L2NormPooling2D, LpPooling2D
from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.linear import transposed
from tf_lyapunov.onnx.readers.placing import taken
from tf_lyapunov.onnx.readers.windows import fitted, padded, positions, window

_MAX = {1: keras.layers.MaxPooling1D, 2: keras.layers.MaxPooling2D, 3: keras.layers.MaxPooling3D}
_MEAN = {
    1: keras.layers.AveragePooling1D,
    2: keras.layers.AveragePooling2D,
    3: keras.layers.AveragePooling3D,
}
_GLOBAL_MAX = {
    1: keras.layers.GlobalMaxPooling1D,
    2: keras.layers.GlobalMaxPooling2D,
    3: keras.layers.GlobalMaxPooling3D,
}
_GLOBAL_MEAN = {
    1: keras.layers.GlobalAveragePooling1D,
    2: keras.layers.GlobalAveragePooling2D,
    3: keras.layers.GlobalAveragePooling3D,
}

# Taps of a window with gaps, each of which is a step.
_MOST_TAPS = 1024


def _window(build, node, values):
    """`(signal with its channels last, Window)`."""
    (signal,) = values
    rank = signal.rank - 2
    if rank not in _MAX:
        raise NotRead(f"it has {rank} axes of positions")
    kernel = node.get("kernel_shape")
    if kernel is None:
        raise BadGraph("it states no kernel_shape")
    if len([o for o in node.outputs if o]) > 1:
        raise NotRead("positions of maxima are discontinuous")
    found = window(node, positions(signal), kernel, ceil=bool(node.get("ceil_mode", 0)))
    if any(low >= q for low, q in zip(found.before, found.reach, strict=True)):
        raise NotRead("a window holds pads alone")
    cells = [sum(c) for c in zip(found.sizes, found.before, found.after, strict=True)]
    build.check_bytes(8 * math.prod(cells) * signal.sample[0])
    build.check_bytes(8 * max(m * k for m, k in zip(found.out, found.kernel, strict=True)))
    return build.channels_last(node, signal), found


def _pooled(build, node, signal, kinds, found, padding="valid", suffix=""):
    tensor = build.layer(
        node,
        kinds[len(found.kernel)],
        signal.tensor,
        suffix,
        pool_size=found.kernel,
        strides=found.strides,
        padding=padding,
        data_format="channels_last",
    )
    return signal.like(tensor, nonnegative=signal.nonnegative)


def _slices(build, node, signal, found):
    """The signal at each tap of a window with gaps, as tensors."""
    if math.prod(found.kernel) > _MOST_TAPS:
        raise NotRead(f"its window has gaps and more than {_MOST_TAPS} taps")
    parts = []
    for taps in itertools.product(*(range(k) for k in found.kernel)):
        key = [slice(None)]
        for t, d, s, m in zip(taps, found.dilations, found.strides, found.out, strict=True):
            key.append(slice(t * d, t * d + (m - 1) * s + 1, s))
        parts.append(build.operation(node, signal.tensor[(*key, slice(None))], "_tap"))
    return parts


def _max_pool(build, node, values):
    signal, found = _window(build, node, values)
    gaps = max(found.dilations) > 1

    def edges(x, before, after):
        if x.nonnegative or not (any(before) or any(after)):
            return padded(build, node, x, before, after)  # zeros change no maximum
        if gaps:
            raise NotRead("it pads a window with gaps, where negative values may come in")
        # A window that reaches beyond the edge holds the cell at the edge.
        for i, (low, high) in enumerate(zip(before, after, strict=True)):
            if low or high:
                cells = np.clip(np.arange(-low, found.sizes[i] + high), 0, found.sizes[i] - 1)
                x = taken(build, node, x, 1 + i, cells, "_edge")
        return x

    if gaps:
        signal = edges(signal, found.before, found.after)
        parts = _slices(build, node, signal, found)
        return signal.like(build.layer(node, keras.layers.Maximum, parts),
                           nonnegative=signal.nonnegative)  # fmt: skip
    if found.is_same and not found.is_valid:
        return _pooled(build, node, signal, _MAX, found, "same")
    signal = fitted(build, node, signal, found, edges)
    return _pooled(build, node, signal, _MAX, found)


def _counts(found, include):
    """Per axis, over how many cells each window is averaged."""
    axes = []
    for n, low, high, m, s, k, d in zip(
        found.sizes, found.before, found.behind, found.out, found.strides, found.kernel,
        found.dilations, strict=True,
    ):  # fmt: skip
        first, last = (-low, n + high) if include else (0, n)
        cells = np.arange(m)[:, None] * s - low + np.arange(k)[None, :] * d
        axes.append(np.sum((cells >= first) & (cells < last), axis=1))
    return axes


def _average_pool(build, node, values):
    signal, found = _window(build, node, values)
    counts = _counts(found, bool(node.get("count_include_pad", 0)))
    uniform = all(np.all(c == k) for c, k in zip(counts, found.kernel, strict=True))
    gaps = max(found.dilations) > 1

    def zeros(x, before, after):
        return padded(build, node, x, before, after)

    totals = [low + high for low, high in zip(found.before, found.after, strict=True)]
    excluded = _counts(found, False)
    alike = all(np.array_equal(a, b) for a, b in zip(counts, excluded, strict=True))
    if found.is_same and not found.is_valid and alike and not gaps:
        # Keras on PyTorch pads uneven ones otherwise.
        if not any(t % 2 for t in totals) or keras.backend.backend() != "torch":
            return _pooled(build, node, signal, _MEAN, found, "same")
    suffix = "" if uniform else "_mean"
    if gaps:
        signal = zeros(signal, found.before, found.after)
        parts = _slices(build, node, signal, found)
        result = signal.like(
            build.layer(node, keras.layers.Average, parts, suffix),
            nonnegative=signal.nonnegative,
        )
    else:
        signal = fitted(build, node, signal, found, zeros)
        result = _pooled(build, node, signal, _MEAN, found, "valid", suffix)
    if uniform:
        return result
    # A mean over all cells of the window, then over those that count.
    count = np.ones(())
    for i, c in enumerate(counts):
        count = count * c.reshape([-1 if i == j else 1 for j in range(len(counts))])
    whole = float(math.prod(found.kernel))
    factor = whole / count[..., None]
    exact = np.asarray(factor, result.dtype)
    if np.array_equal(exact * count[..., None], np.full(factor.shape, whole)) and np.array_equal(
        exact, factor
    ):
        return build.scaled(node, result, exact, 0.0)
    result = build.scaled(node, result, whole, 0.0, "_sum")
    tensor = keras.ops.divide(result.tensor, np.asarray(count[..., None], result.dtype))
    return result.like(build.operation(node, tensor), nonnegative=result.nonnegative)


def _global(kinds):
    def read(build, node, values):
        (signal,) = values
        rank = signal.rank - 2
        if rank not in kinds:
            raise NotRead(f"it has {rank} axes of positions")
        signal = build.channels_last(node, signal)
        tensor = build.layer(
            node, kinds[rank], signal.tensor, keepdims=True, data_format="channels_last"
        )
        return signal.like(tensor, nonnegative=signal.nonnegative)

    return read


def _norm_pool(kind, **settings):
    """A norm of windows, by one of this library's layers."""

    def read(build, node, values):
        signal, found = _window(build, node, values)
        if len(found.kernel) != 2 or max(found.dilations) > 1:
            raise NotRead("norms are read over windows of two axes without gaps")
        padding = "same" if found.is_same and not found.is_valid else "valid"
        if padding == "valid":
            signal = fitted(build, node, signal, found, functools.partial(padded, build, node))
        made = {name: float(node.get(given, 2)) for name, given in settings.items()}
        tensor = build.layer(
            node,
            kind,
            signal.tensor,
            pool_size=found.kernel,
            strides=found.strides,
            padding=padding,
            data_format="channels_last",
            **made,
        )
        return signal.like(tensor, nonnegative=True)

    return read


def _power_pool(build, node, values):
    """A norm of windows by powers, which `compositions` found; in other orders of axes within."""
    (signal,) = values
    signal = _turned(signal, node.get("before"))
    return _turned(_power_norm(build, node, [signal]), node.get("behind"))


def _turned(signal, axes):
    if axes is not None and sorted(axes) != list(range(signal.rank)):
        raise BadGraph(f"it permutes {signal.rank} axes by {axes}")
    return signal if axes is None else transposed(signal, axes)


_power_norm = _norm_pool(LpPooling2D, p="p")
READERS = {
    "MaxPool": (22, _max_pool),
    "AveragePool": (22, _average_pool),
    "GlobalMaxPool": (22, _global(_GLOBAL_MAX)),
    "GlobalAveragePool": (22, _global(_GLOBAL_MEAN)),
    "LpPool": (22, _norm_pool(LpPooling2D, p="p")),
    "tf_lyapunov.PowerPool": (0, _power_pool),
    "tf_lyapunov.NormPool": (0, _norm_pool(L2NormPooling2D)),
}
