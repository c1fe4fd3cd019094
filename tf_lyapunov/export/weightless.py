"""Pooling, resizing, centering and normalization in plain Keras layers."""

import math

import keras
import numpy as np

from tf_lyapunov.layers import (
    centering,
    padding,
    pooling,
    position,
    residual,
    resizing,
    response,
    shifting,
)
from tf_lyapunov.program.weights import inference_value


def _window_mean(p, x):
    """Average over windows, zeros of 'same' padding counted."""
    layer = p.layer
    axes = pooling.spatial_axes(layer.data_format)
    if layer.padding == "same":
        pads = []
        for axis, q, s in zip(axes, layer.pool_size, layer.strides, strict=True):
            total = max((-(-x.shape[axis] // s) - 1) * s + q - x.shape[axis], 0)
            pads.append((total // 2, total - total // 2))
        padding = p.new(
            keras.layers.ZeroPadding2D, tuple(pads), data_format=layer.data_format
        )  # fmt: skip
        x = padding(x)
    pool = p.new(
        keras.layers.AveragePooling2D,
        layer.pool_size,
        layer.strides,
        data_format=layer.data_format,
    )
    return pool(x)


def _scaled_average(p, x):
    size, strides = p.layer.pool_size, p.layer.strides
    return p.scale(_window_mean(p, x), math.prod(size) / pooling.window_sum_bound(size, strides))


def _norm_pooling(p, x):
    layer, size = p.layer, p.layer.pool_size
    shared = math.prod(-(-q // s) for q, s in zip(size, layer.strides, strict=True))
    mean = _window_mean(p, keras.ops.square(x))
    return p.scale(keras.ops.sqrt(mean), math.sqrt(math.prod(size) / shared))


def _lp_pooling(p, x):
    layer, exponent, sizes = p.layer, p.layer.p, keras.ops.abs(x)
    if exponent == math.inf:
        pool = p.new(
            keras.layers.MaxPooling2D,
            layer.pool_size,
            layer.strides,
            layer.padding,
            data_format=layer.data_format,
        )
        return pool(sizes)
    powers = sizes if exponent == 1 else keras.ops.power(sizes, exponent)
    total = p.scale(_window_mean(p, powers), math.prod(layer.pool_size))
    return total if exponent == 1 else keras.ops.power(total, 1 / exponent)


def _global(p, x):
    layer, axes = p.layer, pooling.spatial_axes(p.layer.data_format)
    root = math.sqrt(math.prod(_known(x, axes, layer)))
    is_norm = type(layer) is pooling.GlobalL2NormPooling2D
    pool = p.new(
        keras.layers.GlobalAveragePooling2D,
        data_format=layer.data_format,
        keepdims=layer.keepdims,
    )
    y = pool(keras.ops.square(x) if is_norm else x)
    return p.scale(keras.ops.sqrt(y) if is_norm else y, root)


def _known(x, axes, layer):
    sizes = [x.shape[axis] for axis in axes]
    if None in sizes:
        raise ValueError(
            f"A size must be known to export layer {layer.name!r}. Received: input shape {x.shape}."
        )
    return sizes


def _depth_order(p, x):
    layer, (a, b) = p.layer, p.layer.pool_size
    last = layer.data_format == "channels_last"
    h, w, c = layer._sizes(x.shape)
    if type(layer) is resizing.InvertibleDownSampling:
        inner = (h // a, a, w // b, b, c) if last else (c, h // a, a, w // b, b)
        order = (1, 3, 2, 4, 5) if last else (3, 5, 1, 2, 4)
    else:
        c //= a * b
        inner = (h, w, a, b, c) if last else (a, b, c, h, w)
        order = (1, 3, 2, 4, 5) if last else (3, 4, 1, 5, 2)
    shape = layer.compute_output_shape(x.shape)[1:]
    return p.reshape(p.permute(p.reshape(x, inner), order), shape)


def _resized(p, x):
    def select(x):
        return p.dense(x, np.eye(x.shape[-1], p.layer.size))

    return p.on_last_axis(x, p.layer.axis, select)


def _padded(p, x):
    def copies(index):
        return lambda x: p.dense(x, np.eye(x.shape[-1])[:, index])

    for axis, index in p.layer.indices(x.shape):
        x = p.on_last_axis(x, axis, copies(index))
    return x


def _shifted(p, x):
    """Each group of channels by itself: cut out, and what leaves at one end put at the other."""
    layer = p.layer
    spatial, channel, size = layer._axes(x.shape)
    _known(x, spatial, layer)
    count = x.shape[channel]

    def shifted(x):
        parts = []
        for i, step in enumerate((1, -1) * len(spatial)):
            part, axis = p.dense(x, np.eye(count, size, -i * size)), i // 2 + 1
            n = x.shape[axis]
            first, last = ((n - 1, 0), (0, 1)) if step == 1 else ((1, 0), (0, n - 1))
            ends = [_cropped(p, part, axis, cut) for cut in (first, last)] if n > 1 else [part]
            parts.append(p.new(keras.layers.Concatenate, axis=axis)(ends) if n > 1 else part)
        left = count - size * len(parts)
        if left:
            parts.append(p.dense(x, np.eye(count, left, left - count)))
        return p.new(keras.layers.Concatenate, axis=-1)(parts)

    return p.on_last_axis(x, channel, shifted)


def _cropped(p, x, axis, cut):
    if len(x.shape) == 3:
        return p.new(keras.layers.Cropping1D, cut)(x)
    crops = tuple(cut if i == axis else (0, 0) for i in (1, 2))
    return p.new(keras.layers.Cropping2D, crops, data_format="channels_last")(x)


def _centering(p, x):
    layer = p.layer
    shift = inference_value(layer.moving_mean, layer.compute_dtype)
    if layer.bias is not None:
        shift = shift - inference_value(layer.bias, layer.compute_dtype)
    axis = layer.axis % len(x.shape)
    return p.new(keras.layers.Normalization, axis=axis, mean=shift, variance=np.ones_like(shift))(x)


def _positioned(p, x):
    bias = inference_value(p.layer.bias, p.layer.compute_dtype)
    axes = tuple(range(1, len(x.shape)))
    return p.new(keras.layers.Normalization, axis=axes, mean=-bias, variance=np.ones_like(bias))(x)


def _combination(p, inputs):
    x, f = inputs
    share = float(np.clip(inference_value(p.layer.mixture, p.layer.mixture.dtype)[0], 0, 1))
    parts = [p.new(keras.layers.Rescaling, t)(v) for t, v in ((share, f), (1 - share, x))]
    return p.new(keras.layers.Add)(parts)


def _response(p, x):
    layer = p.layer

    def normalize(x):
        size = x.shape[-1]
        distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
        window = layer.alpha * (distance <= layer.depth_radius)
        energy = p.dense(keras.ops.square(x), window, np.full(size, layer.bias))
        return p.new(keras.layers.Multiply)([x, keras.ops.power(energy, -layer.beta)])

    return p.on_last_axis(x, layer.axis, normalize)


RULES = {
    pooling.ScaledAveragePooling2D: _scaled_average,
    pooling.L2NormPooling2D: _norm_pooling,
    pooling.LpPooling2D: _lp_pooling,
    pooling.ScaledGlobalAveragePooling2D: _global,
    pooling.GlobalL2NormPooling2D: _global,
    resizing.InvertibleDownSampling: _depth_order,
    resizing.InvertibleUpSampling: _depth_order,
    resizing.ChannelPadding: _resized,
    resizing.Truncate: _resized,
    padding.Padding2D: _padded,
    shifting.ShiftMixing: _shifted,
    centering.BatchCentering: _centering,
    position.PositionBias: _positioned,
    residual.ConvexCombination: _combination,
    response.LocalResponseNormalization: _response,
}
