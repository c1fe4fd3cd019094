"""Pooling of known gain: scaled sums and norms over windows and over whole images."""

import functools
import math

import keras
from keras import ops

from tf_lyapunov.layers.axes import at_least_float32, image_format, known_size, pair, spatial_axes
from tf_lyapunov.layers.keras_order import NUMBERS, formerly

_register = keras.saving.register_keras_serializable(package="tf_lyapunov")


def window_sum_bound(pool_size, strides):
    """Largest norm, over all image sizes, of the sum over windows: √Π_axes Σ_r c_r².

    c_r counts the cells i < q of a window with i ≡ r modulo the stride: the norm of each phase at
    frequency zero, where non-negative kernels are largest. It is √q per axis without overlap.

    Example:

    >>> window_sum_bound((2, 2), (2, 2)), round(window_sum_bound((3, 1), (2, 1)) ** 2, 9)
    (2.0, 5.0)
    """
    squares = [
        sum((q // s + (r < q % s)) ** 2 for r in range(s))
        for q, s in zip(pool_size, strides, strict=True)
    ]
    return math.sqrt(math.prod(squares))


def norm_of_terms(terms, p):
    """(Σ|t|^p)^(1/p) over a list of tensors, entry by entry.

    Scaled by the largest term, so that no power over- or underflows; its gradient at zero is 0.
    """
    sizes = [ops.abs(t) for t in terms]
    if p == 1:
        return sum(sizes)
    largest = functools.reduce(ops.maximum, sizes)
    if p == math.inf:
        return largest
    # The map is homogeneous: its derivative by the scale is 0 (Euler).
    largest = ops.stop_gradient(largest)
    # NaN is not zero, and so is passed on.
    vanishes = ops.equal(largest, 0)
    scale = ops.where(vanishes, ops.ones_like(largest), largest)
    total = sum(_power(s / scale, p) for s in sizes)
    root = _power(ops.where(vanishes, ops.ones_like(total), total), 1 / p)
    return ops.where(vanishes, ops.zeros_like(root), scale * root)


def _power(x, exponent):
    if exponent == 2:
        return ops.square(x)
    return ops.sqrt(x) if exponent == 0.5 else ops.power(x, exponent)


class _Pooling2D(keras.layers.Layer):
    """Geometry of windows on images; 'same' padding adds zeros as TensorFlow does."""

    def __init__(self, pool_size=2, strides=None, padding="valid", data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.pool_size = pair("pool_size", pool_size)
        self.strides = self.pool_size if strides is None else pair("strides", strides)
        if padding not in ("valid", "same"):
            raise ValueError(f"`padding` must be 'valid' or 'same'. Received: padding={padding!r}.")
        self.padding = padding
        self.data_format = image_format(data_format)
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape):
        self.compute_output_shape(input_shape)
        super().build(input_shape)

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        for axis, q, s in zip(
            spatial_axes(self.data_format), self.pool_size, self.strides, strict=True
        ):
            if self.padding == "same":
                shape[axis] = -(-known_size(shape, axis, self.name) // s)
            elif shape[axis] is not None:
                if shape[axis] < q:
                    raise ValueError(
                        f"A window must fit into the image. Received: input shape "
                        f"{tuple(input_shape)}, pool_size={self.pool_size} in layer {self.name!r}."
                    )
                shape[axis] = (shape[axis] - q) // s + 1
        return tuple(shape)

    def _padded(self, x):
        """`x` with the zeros of 'same' padding, in float32 at least."""
        x = at_least_float32(x)
        if self.padding == "valid":
            return x
        padding = [(0, 0)] * 4
        for axis, q, s in zip(
            spatial_axes(self.data_format), self.pool_size, self.strides, strict=True
        ):
            total = max((-(-x.shape[axis] // s) - 1) * s + q - x.shape[axis], 0)
            padding[axis] = (total // 2, total - total // 2)
        return ops.pad(x, padding)

    def _terms(self, x):
        """List of the windows' cells: entry k of every window, for each k."""
        x, first = self._padded(x), spatial_axes(self.data_format)[0]

        def cells(i, q, s):
            return slice(i, i + 1 - q or None, s)

        (qh, qw), (sh, sw) = self.pool_size, self.strides
        before = [slice(None)] * first
        return [
            x[(*before, cells(i, qh, sh), cells(j, qw, sw))] for i in range(qh) for j in range(qw)
        ]

    def get_config(self):
        own = {
            "pool_size": list(self.pool_size),
            "strides": list(self.strides),
            "padding": self.padding,
            "data_format": self.data_format,
        }
        return {**super().get_config(), **own}


@_register
class ScaledAveragePooling2D(_Pooling2D):
    """Average pooling scaled up to gain 1: the sum over each window, divided by its norm.

        y = (Σ_window x) / σ,   σ² = Π_axes Σ_{r<s} (#{i < q: i ≡ r mod s})²

    Without overlap σ = √(number of cells) and the gain is exactly 1. With overlap σ is the
    largest norm over all image sizes, so that the layer does not depend on the size; on a given
    image the gain is then at most 1, and nearer to it the larger the image.

    Args:
        pool_size: q, or one per axis.
        strides: s, or one per axis; `None` for q.
        padding: `"valid"`, or `"same"` (zeros are summed).
        data_format: as in Keras.

    Raises:
        ValueError: if no window fits, or 'same' padding meets an unknown size.

    Example:

    >>> import numpy as np
    >>> np.asarray(ScaledAveragePooling2D(2)(np.ones((1, 2, 2, 1)))).item()
    2.0

    Reference: Serrurier et al., "Achieving robustness in classification using optimal transport
    with hinge regularization" (CVPR 2021), for windows without overlap.
    """

    def call(self, x):
        scale = math.prod(self.pool_size) / window_sum_bound(self.pool_size, self.strides)
        mean = ops.average_pool(
            self._padded(x), self.pool_size, self.strides, "valid", self.data_format
        )
        return ops.cast(mean * scale, x.dtype)


@_register
class LpPooling2D(_Pooling2D):
    """The p-norm of every window.

        y = (Σ_window |x|^p)^(1/p)

    Without overlap its gain is 1 for p ≥ 2 and (number of cells)^(1/p - 1/2) for p < 2; with
    overlap see `lp_pooling_gain`.

    Args:
        pool_size: q, or one per axis.
        strides: s, or one per axis; `None` for q.
        padding: `"valid"`, or `"same"` (zeros are added).
        data_format: as in Keras.
        p: float of at least 1, or `float("inf")` for the largest magnitude.

    Raises:
        ValueError: if p is below 1 or NaN, no window fits, or 'same' meets an unknown size.

    Example:

    >>> import numpy as np
    >>> np.asarray(LpPooling2D(2, p=2)(np.full((1, 2, 2, 1), 3.0))).item()
    6.0

    Reference: Peck et al. (2017), section 4.4, as published; its gain in sound form.
    """

    @formerly("pool_size", "strides", "padding", "p", kept=3, mistaken=NUMBERS)
    def __init__(
        self, pool_size=2, strides=None, padding="valid", data_format=None, *, p=2.0, **kwargs
    ):
        super().__init__(pool_size, strides, padding, data_format, **kwargs)
        is_number = isinstance(p, (int, float)) and not isinstance(p, bool)
        if not is_number or not p >= 1:
            raise ValueError(f"`p` must be a number of at least 1. Received: p={p!r}.")
        self.p = float(p)

    def call(self, x):
        return ops.cast(norm_of_terms(self._terms(x), self.p), x.dtype)

    def get_config(self):
        # JSON has no infinity.
        return {**super().get_config(), "p": "inf" if self.p == math.inf else self.p}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "p": math.inf if config.get("p") == "inf" else config["p"]})


@_register
class L2NormPooling2D(_Pooling2D):
    """The Euclidean norm of every window, scaled to gain 1.

        y = √(Σ_window x²) / √w,   w = Π_axes ⌈q/s⌉, the windows that share a cell

    w = 1 without overlap. The gradient at a zero window is 0.

    Args:
        pool_size: q, or one per axis.
        strides: s, or one per axis; `None` for q.
        padding: `"valid"`, or `"same"` (zeros are added).
        data_format: as in Keras.

    Raises:
        ValueError: if no window fits, or 'same' padding meets an unknown size.

    Example:

    >>> import numpy as np
    >>> np.asarray(L2NormPooling2D(2)(np.full((1, 2, 2, 1), 3.0))).item()
    6.0

    Reference: Qian and Wegman, "L2-nonexpansive neural networks" (ICLR 2019), norm-pooling.
    """

    def call(self, x):
        shared = math.prod(-(-q // s) for q, s in zip(self.pool_size, self.strides, strict=True))
        return ops.cast(norm_of_terms(self._terms(x), 2) / math.sqrt(shared), x.dtype)


class _GlobalPooling2D(keras.layers.Layer):
    def __init__(self, data_format=None, keepdims=False, **kwargs):
        super().__init__(**kwargs)
        self.data_format, self.keepdims = image_format(data_format), bool(keepdims)
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def compute_output_shape(self, input_shape):
        axes = spatial_axes(self.data_format)
        kept = [1 if i in axes else n for i, n in enumerate(input_shape)]
        return tuple(kept if self.keepdims else (n for i, n in enumerate(kept) if i not in axes))

    def get_config(self):
        own = {"data_format": self.data_format, "keepdims": self.keepdims}
        return {**super().get_config(), **own}


@_register
class ScaledGlobalAveragePooling2D(_GlobalPooling2D):
    """The sum over all N positions of a channel, divided by √N: gain exactly 1.

    Args:
        data_format: as in Keras.
        keepdims: whether to keep the spatial axes, with size 1.

    Example:

    >>> import numpy as np
    >>> np.asarray(ScaledGlobalAveragePooling2D()(np.ones((1, 2, 2, 1)))).tolist()
    [[2.0]]

    Reference: Serrurier et al. (CVPR 2021).
    """

    def call(self, x):
        axes, shape = spatial_axes(self.data_format), ops.shape(x)
        mean = ops.mean(at_least_float32(x), axis=axes, keepdims=self.keepdims)
        positions = ops.cast(shape[axes[0]] * shape[axes[1]], mean.dtype)
        return ops.cast(mean * ops.sqrt(positions), x.dtype)


@_register
class GlobalL2NormPooling2D(_GlobalPooling2D):
    """The Euclidean norm of every channel over all positions: gain exactly 1.

    The gradient at a zero channel is 0.

    Args:
        data_format: as in Keras.
        keepdims: whether to keep the spatial axes, with size 1.

    Example:

    >>> import numpy as np
    >>> np.asarray(GlobalL2NormPooling2D()(np.full((1, 2, 2, 1), 3.0))).tolist()
    [[6.0]]

    Reference: Qian and Wegman (ICLR 2019), norm-pooling over a whole channel.
    """

    def call(self, x):
        axes, wide = spatial_axes(self.data_format), at_least_float32(x)
        largest = ops.stop_gradient(ops.max(ops.abs(wide), axis=axes, keepdims=True))
        # As in `norm_of_terms`.
        vanishes = ops.equal(largest, 0)
        scale = ops.where(vanishes, ops.ones_like(largest), largest)
        total = ops.sum(ops.square(wide / scale), axis=axes, keepdims=True)
        root = ops.sqrt(ops.where(vanishes, ops.ones_like(total), total))
        norm = ops.where(vanishes, ops.zeros_like(root), scale * root)
        return ops.cast(norm if self.keepdims else ops.squeeze(norm, axis=axes), x.dtype)
