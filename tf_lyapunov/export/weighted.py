"""Layers with effective weights in plain Keras layers with these as their kernels."""

import math

import keras
import numpy as np

from tf_lyapunov.layers import potential, sdp
from tf_lyapunov.layers.attention import SoftmaxPotential
from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.linear import space_to_depth_shape
from tf_lyapunov.layers.orthogonal import CayleyConv2D
from tf_lyapunov.layers.orthogonal_convolution import (
    OrthogonalConv2D,
    OrthogonalConv2DTranspose,
)
from tf_lyapunov.layers.reflector import BlockReflectorConv2D
from tf_lyapunov.layers.sandwich import SandwichConv2D, SandwichDense
from tf_lyapunov.layers.skew import SkewOrthogonalConv2D
from tf_lyapunov.program.weights import OWN_CONVOLUTIONS, OWN_DENSE
from tf_lyapunov.theory.operators import convolution_matrix
from tf_lyapunov.theory.orthogonal import polyphase

# Maps of images with at most so many entries are written out as matrices (16 MB).
_MATERIALISED = 2**22


def _linear(p, x):
    layer, kernel = p.layer, p.layer.effective_values()["kernel"]
    activation, after = p.fused()
    if type(layer) in OWN_DENSE:
        return after(p.dense(x, kernel, p.bias(), activation))
    geometry = {
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
    }
    if type(layer) is OrthogonalConv2DTranspose:
        return after(p.conv_transpose(x, kernel, p.bias(), activation, **geometry))
    geometry["groups"] = layer.groups
    if layer.data_format == "channels_first":
        # The activation follows in the layer's own order of axes.
        y = p.on_last_axis(x, 1, lambda z: p.conv(z, kernel, p.bias(), **geometry))
        return after(y if activation is None else p.new(keras.layers.Activation, activation)(y))
    return after(p.conv(x, kernel, p.bias(), activation, **geometry))


def _orthogonal(p, x):
    layer = p.layer
    if layer.padding != "circular":
        return _linear(p, x)
    activation, after = p.fused()
    axis = 1 if layer.data_format == "channels_first" else -1
    y = p.on_last_axis(x, axis, lambda z: _wrapped(p, z))
    return after(y if activation is None else p.new(keras.layers.Activation, activation)(y))


def _wrapped(p, x):
    """The circular convolution between patches of pixels, moved into channels, and outputs."""
    layer = p.layer
    kernel = _joined_groups(layer.effective_values()["kernel"], layer.groups)
    # Pixels that no tap sees have zeros.
    unseen = [(0, s - b) for s, b in zip(layer.strides, layer.base, strict=True)]
    kernel = polyphase(np.pad(kernel, [*unseen, (0, 0), (0, 0)]), layer.strides)
    x = _space_to_depth(p, x, layer.strides)
    sizes = x.shape[1:3]
    circle = np.zeros((*sizes, *kernel.shape[2:]))
    for tap in np.ndindex(*kernel.shape[:2]):
        axes = zip(tap, kernel.shape, layer.dilation_rate, sizes, strict=False)
        circle[tuple(d * ((n - 1) // 2 - t) % size for t, n, d, size in axes)] += kernel[tap]
    symbol = np.fft.rfft2(circle, axes=(0, 1)).reshape(-1, *kernel.shape[2:])
    return _circular(p, x, symbol, p.bias())


def _joined_groups(kernel, groups):
    """The kernel of all channels, zero between groups."""
    *size, inputs, outputs = kernel.shape
    whole = np.zeros((*size, groups * inputs, outputs))
    for g in range(groups):
        mine = slice(g * outputs // groups, (g + 1) * outputs // groups)
        whole[..., g * inputs : (g + 1) * inputs, mine] = kernel[..., mine]
    return whole


def _potential(p, x):
    layer, values = p.layer, p.layer.effective_values()
    kernel, back = values["kernel"], -values["kernel"] * values["scale"]
    if layer.spatial_axes == 0:
        sharpness = layer.sharpness if type(layer) is SoftmaxPotential else 1.0
        bias = p.bias()
        bias = None if bias is None else sharpness * bias
        hidden = p.dense(x, sharpness * kernel, bias, p.activation())
        change = p.dense(hidden, back.T)
    else:
        back = np.swapaxes(np.flip(back, tuple(range(layer.spatial_axes))), -1, -2)
        pads, padding = [((k - 1) // 2, k // 2) for k in layer.kernel_size], "same"
        adjoint = [(b, a) for a, b in pads]
        if pads == adjoint:  # odd sides
            pads = adjoint = []
        else:
            padding = "valid"
        hidden = p.conv(p.pad(x, pads), kernel, p.bias(), p.activation(), padding=padding)
        change = p.conv(p.pad(hidden, adjoint), back, padding=padding)
    y = p.new(keras.layers.Add)([x, change])
    return p.scale(y, rounded_down(layer.max_gain, layer.compute_dtype))


def _sandwich(p, x):
    values = p.layer.effective_values()
    return p.dense(p.dense(x, values["inner"], p.bias(), p.activation()), values["outer"])


def _sandwich_convolution(p, x):
    x, values = _space_to_depth(p, x, p.layer.strides), p.layer.effective_values()
    x = _circular(p, x, _complex(values["inner"]), p.bias(), p.activation())
    return _circular(p, x, _complex(values["outer"]))


def _complex(blocks):
    """R + iJ of the real blocks [[R, J], [-J, R]]."""
    a, b = (n // 2 for n in blocks.shape[-2:])
    return blocks[:, :a, :b] + 1j * blocks[:, :a, b:]


def _cayley(p, x):
    values = p.layer.effective_values()
    activation, after = p.fused()
    x = _space_to_depth(p, x, p.layer.strides)
    return after(_circular(p, x, values["real"] + 1j * values["imag"], p.bias(), activation))


def _space_to_depth(p, x, strides):
    (s, t), (_, high, wide, channels) = strides, x.shape
    if s == t == 1:
        return x
    rows, columns, depth = space_to_depth_shape((high, wide, channels), strides)
    x = p.pad(x, ((0, -high % s), (0, -wide % t)))
    x = p.permute(p.reshape(x, (rows, s, columns, t, channels)), (1, 3, 2, 4, 5))
    return p.reshape(x, (rows, columns, depth))


def _circular(p, x, symbol, bias=None, activation=None):
    """Circular convolution with the given matrices at the frequencies of `fourier_bases`."""
    high, wide = x.shape[1:3]
    a, b = symbol.shape[-2:]
    symbol = symbol.reshape(high, wide // 2 + 1, a, b)
    kernel = np.fft.irfft2(symbol, s=(high, wide), axes=(0, 1))  # y[n] = Σ_m x[m]·kernel[n - m]
    if (high * wide) ** 2 * a * b <= _MATERIALISED:
        rows, columns = (np.subtract.outer(np.arange(n), np.arange(n)).T % n for n in (high, wide))
        matrix = kernel[rows[:, None, :, None], columns[None, :, None, :]]
        matrix = matrix.transpose(0, 1, 4, 2, 3, 5).reshape(high * wide * a, high * wide * b)
        return _as_matrix(p, x, matrix, (high, wide, b), bias, activation)
    for axis, size in ((1, high), (2, wide)):
        before, after = size // 2, size - 1 - size // 2
        parts = [_cropped(p, x, axis, (size - before, 0))] if before else []
        parts += [x, _cropped(p, x, axis, (0, size - after))] if after else [x]
        x = p.new(keras.layers.Concatenate, axis=axis)(parts) if len(parts) > 1 else x
        kernel = np.take(kernel, (before - np.arange(size)) % size, axis=axis - 1)
    return p.conv(x, kernel, bias, activation, padding="valid")


def _cropped(p, x, axis, crop):
    crops = tuple(crop if i == axis else (0, 0) for i in (1, 2))
    return p.new(keras.layers.Cropping2D, crops, data_format="channels_last")(x)


def _as_matrix(p, x, matrix, shape, bias=None, activation=None):
    """A map of images as a dense layer of their entries."""
    bias = None if bias is None else np.tile(bias, math.prod(shape[:-1]))
    return p.reshape(p.dense(p.reshape(x, (len(matrix),)), matrix, bias, activation), shape)


def _skew(p, x):
    layer, kernel = p.layer, p.layer.effective_values()["kernel"]
    terms, width = layer.inference_terms, kernel.shape[-1]
    activation, after = p.fused()
    x = _space_to_depth(p, x, layer.strides)
    inputs = x.shape[-1]
    scale = layer.output_scale(terms)
    scale = 1.0 if scale == 1.0 else rounded_down(scale, layer.compute_dtype)
    sizes = x.shape[1:3]
    if (math.prod(sizes) * width) ** 2 <= _MATERIALISED:
        skew = convolution_matrix(kernel, layer.linear_map).toarray()
        series = np.eye(len(skew))
        for k in range(terms - 1, 0, -1):
            series = np.eye(len(skew)) + skew @ series / k
        series = series.reshape(-1, width, math.prod(sizes), width)
        matrix = scale * series[:, : layer.filters, :, :inputs]
        matrix = matrix.reshape(-1, math.prod(sizes) * inputs).T
        y = _as_matrix(p, x, matrix, (*sizes, layer.filters), p.bias(), activation)
        return after(y)
    x = y = x if inputs == width else p.dense(x, np.eye(inputs, width))
    for k in range(terms - 1, 0, -1):  # Horner's rule
        y = p.new(keras.layers.Add)([x, p.conv(y, kernel / k, padding="same")])
    return after(p.dense(y, scale * np.eye(width, layer.filters), p.bias(), activation))


RULES = {
    **dict.fromkeys((*OWN_DENSE, *OWN_CONVOLUTIONS), _linear),
    **dict.fromkeys(
        (
            potential.ConvexPotentialDense,
            potential.ConvexPotentialConv1D,
            potential.ConvexPotentialConv2D,
            sdp.SDPLipschitzDense,
            sdp.SDPLipschitzConv1D,
            sdp.SDPLipschitzConv2D,
            SoftmaxPotential,
        ),
        _potential,
    ),
    SandwichDense: _sandwich,
    SandwichConv2D: _sandwich_convolution,
    CayleyConv2D: _cayley,
    BlockReflectorConv2D: _cayley,
    SkewOrthogonalConv2D: _skew,
    OrthogonalConv2D: _orthogonal,
}
