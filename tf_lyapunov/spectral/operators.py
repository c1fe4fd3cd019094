"""Linear maps of layers and their adjoints in `keras.ops`, on channels-last signals.

Padding is explicit, so that map and adjoint match on every backend.
"""

from keras import ops

from tf_lyapunov.theory.operators import LinearMap, convolution_axes


def apply(x, kernel, linear_map: LinearMap):
    """The map W x of a kernel, without bias or activation.

    Args:
        x: batch `(n, *spatial, channels)` (`(n, in)` for dense maps).
        kernel: tensor in Keras' layout for `linear_map.kind`, same dtype as `x`.
        linear_map: `LinearMap` of known input size.

    Returns:
        Tensor `(n, *spatial, channels)`.

    Example:

    >>> import numpy as np
    >>> kernel = np.ones((2, 1, 1), "float32")
    >>> y = apply(np.ones((1, 4, 1), "float32"), kernel, LinearMap("conv", (4, 1)))
    >>> tuple(y.shape), float(y[0, 0, 0])
    ((1, 3, 1), 2.0)
    """
    if linear_map.kind == "dense":
        return ops.matmul(x, kernel)
    convolve = _scatter if linear_map.kind == "conv_transpose" else _gather
    return convolve(x, kernel, linear_map)


def adjoint(y, kernel, linear_map: LinearMap):
    """The adjoint map Wᵀ y of a kernel: ⟨y, W x⟩ = ⟨Wᵀ y, x⟩.

    Args:
        y: batch `(n, *spatial, channels)` in the output space of the map.
        kernel: tensor in Keras' layout for `linear_map.kind`, same dtype as `y`.
        linear_map: `LinearMap` of known input size.

    Returns:
        Tensor `(n, *spatial, channels)` in the input space.

    Example:

    >>> import numpy as np
    >>> kernel = np.ones((2, 1, 1), "float32")
    >>> x = adjoint(np.ones((1, 3, 1), "float32"), kernel, LinearMap("conv", (4, 1)))
    >>> [float(v) for v in x[0, :, 0]]
    [1.0, 2.0, 2.0, 1.0]
    """
    if linear_map.kind == "dense":
        return ops.matmul(y, ops.transpose(kernel))
    convolve = _gather if linear_map.kind == "conv_transpose" else _scatter
    return convolve(y, kernel, linear_map)


def _geometry(axes):
    return {
        "strides": tuple(a.stride for a in axes),
        "dilation_rate": tuple(a.dilation for a in axes),
        "padding": "valid",
        "data_format": "channels_last",
    }


def _gather(x, kernel, linear_map):
    """Convolution with explicit zeros: y[i] = Σ_t K[t] x[i·s + t·d - left]."""
    axes = convolution_axes(kernel.shape, linear_map)
    pads, sizes = [[0, 0]], []
    for a in axes:
        needed = (a.output - 1) * a.stride + a.extent
        pads.append([a.left, max(needed - a.size - a.left, 0)])
        sizes.append(slice(0, needed))
    x = ops.pad(x, [*pads, [0, 0]])[(slice(None), *sizes)]
    if linear_map.kind == "depthwise":
        # Keras' depthwise convolution refuses strides with dilation on some backends.
        return ops.depthwise_conv(x, kernel, **_geometry(axes))
    return ops.conv(x, kernel, **_geometry(axes))


def _scatter(y, kernel, linear_map):
    """Adjoint of `_gather`: a full transposed convolution, cropped to the input grid."""
    axes = convolution_axes(kernel.shape, linear_map)
    if linear_map.kind == "depthwise":
        full = _full_depthwise(y, kernel, axes)
    else:
        width = kernel.shape[-1] // linear_map.groups
        # TensorFlow has transposed convolutions with dilation on some processors only.
        spread = any(a.dilation > 1 for a in axes)
        transposed = _full_spread if spread else _full
        parts = [
            transposed(y[..., g * width : (g + 1) * width], block, axes)
            for g, block in enumerate(ops.split(kernel, linear_map.groups, axis=-1))
        ]
        full = ops.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    pads = [[0, max(a.left + a.size - full.shape[1 + i], 0)] for i, a in enumerate(axes)]
    full = ops.pad(full, [[0, 0], *pads, [0, 0]])
    crop = tuple(slice(a.left, a.left + a.size) for a in axes)
    return full[(slice(None), *crop)]


def _full(y, kernel, axes):
    """x[j] = Σ_t K[t] y[(j - t·d)/s], on all positions that a tap reaches."""
    return ops.conv_transpose(y, kernel, **_geometry(axes))


def _full_spread(y, kernel, axes):
    """`_full` as a convolution of the signal with zeros between its neighbours."""
    turned = ops.swapaxes(_flipped(kernel), -1, -2)
    return ops.conv(_surrounded(y, axes), turned, **_geometry(axes) | {"strides": 1})


def _full_depthwise(y, kernel, axes):
    """x[j, c] = Σ_{t, m} K[t, c, m] y[(j - t·d)/s, c, m]: one convolution for all channels."""
    *taps, channels, multiplier = kernel.shape
    full = ops.depthwise_conv(
        _surrounded(y, axes),
        ops.reshape(_flipped(kernel), (*taps, channels * multiplier, 1)),
        **_geometry(axes) | {"strides": 1},
    )
    return ops.sum(ops.reshape(full, (*full.shape[:-1], channels, multiplier)), axis=-1)


def _flipped(kernel):
    return ops.flip(kernel, tuple(range(len(kernel.shape) - 2)))


def _surrounded(y, axes):
    """y with the zeros that strides leave between its entries, and taps meet around them."""
    for i, axis in enumerate(axes):
        y = _spread(y, i + 1, axis.stride)
    around = [[axis.extent - 1] * 2 for axis in axes]
    return ops.pad(y, [[0, 0], *around, [0, 0]])


def _spread(y, axis, stride):
    """y with `stride` - 1 zeros between its neighbours along an axis."""
    if stride == 1:
        return y
    before, size, after = y.shape[:axis], y.shape[axis], y.shape[axis + 1 :]
    zeros = [[0, 0]] * (axis + 1) + [[0, stride - 1]] + [[0, 0]] * len(after)
    y = ops.reshape(ops.pad(ops.expand_dims(y, axis + 1), zeros), (*before, size * stride, *after))
    return y[(slice(None),) * axis + (slice(0, (size - 1) * stride + 1),)]
