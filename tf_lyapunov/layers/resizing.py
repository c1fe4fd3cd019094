"""Layers of gain one that move, add or drop entries: space to depth, padding, truncation."""

import keras
from keras import ops

from tf_lyapunov.layers.axes import (
    divided,
    feature_axis,
    image_format,
    known_size,
    pair,
    spatial_axes,
    whole_axis,
)
from tf_lyapunov.spectral.arguments import count

_register = keras.saving.register_keras_serializable(package="tf_lyapunov")


class _Rearrangement(keras.layers.Layer):
    def __init__(self, pool_size=2, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.pool_size = pair("pool_size", pool_size)
        self.data_format = image_format(data_format)
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def _sizes(self, shape):
        """`(height, width, channels)` of a batch shape, all known."""
        channel = 1 if self.data_format == "channels_first" else 3
        axes = (*spatial_axes(self.data_format), channel)
        return tuple(known_size(shape, axis, self.name) for axis in axes)

    def _shape(self, height, width, channels):
        if self.data_format == "channels_first":
            return (channels, height, width)
        return (height, width, channels)

    def get_config(self):
        own = {"pool_size": list(self.pool_size), "data_format": self.data_format}
        return {**super().get_config(), **own}


@_register
class InvertibleDownSampling(_Rearrangement):
    """Moves every a×b block of pixels into channels (space to depth): an isometry.

    Channel (i·b + j)·C + c of the output is channel c of the pixel (i, j) of its block.

    Args:
        pool_size: a, or (a, b), which divide height and width.
        data_format: as in Keras.

    Raises:
        ValueError: if a size is unknown or not divisible.

    Example:

    >>> import numpy as np
    >>> x = np.arange(4.0).reshape(1, 2, 2, 1)
    >>> np.asarray(InvertibleDownSampling(2)(x)).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]

    Reference: Jacobsen, Smeulders and Oyallon, "i-RevNet" (ICLR 2018).
    """

    def compute_output_shape(self, input_shape):
        (h, w, c), (a, b) = self._sizes(input_shape), self.pool_size
        h = divided(h, a, "The height", self.name)
        return (input_shape[0], *self._shape(h, divided(w, b, "The width", self.name), a * b * c))

    def build(self, input_shape):
        self.compute_output_shape(input_shape)
        super().build(input_shape)

    def call(self, x):
        (h, w, c), (a, b) = self._sizes(x.shape), self.pool_size
        if self.data_format == "channels_first":
            blocks = ops.reshape(x, (-1, c, h // a, a, w // b, b))
            moved = ops.transpose(blocks, (0, 3, 5, 1, 2, 4))
        else:
            blocks = ops.reshape(x, (-1, h // a, a, w // b, b, c))
            moved = ops.transpose(blocks, (0, 1, 3, 2, 4, 5))
        return ops.reshape(moved, (-1, *self._shape(h // a, w // b, a * b * c)))


@_register
class InvertibleUpSampling(_Rearrangement):
    """Inverse of `InvertibleDownSampling`: moves channels into a×b blocks of pixels.

    Args:
        pool_size: a, or (a, b); a·b divides the number of channels.
        data_format: as in Keras.

    Raises:
        ValueError: if a size is unknown or not divisible.

    Example:

    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(1, 4, 4, 1)
    >>> back = InvertibleUpSampling(2)(InvertibleDownSampling(2)(x))
    >>> bool(np.all(np.asarray(back) == x))
    True

    Reference: Jacobsen, Smeulders and Oyallon, "i-RevNet" (ICLR 2018).
    """

    def compute_output_shape(self, input_shape):
        (h, w, c), (a, b) = self._sizes(input_shape), self.pool_size
        c = divided(c, a * b, "The number of channels", self.name)
        return (input_shape[0], *self._shape(a * h, b * w, c))

    def build(self, input_shape):
        self.compute_output_shape(input_shape)
        super().build(input_shape)

    def call(self, x):
        (h, w, c), (a, b) = self._sizes(x.shape), self.pool_size
        c //= a * b
        if self.data_format == "channels_first":
            blocks = ops.reshape(x, (-1, a, b, c, h, w))
            moved = ops.transpose(blocks, (0, 3, 4, 1, 5, 2))
        else:
            blocks = ops.reshape(x, (-1, h, w, a, b, c))
            moved = ops.transpose(blocks, (0, 1, 3, 2, 4, 5))
        return ops.reshape(moved, (-1, *self._shape(a * h, b * w, c)))


class _Resized(keras.layers.Layer):
    _larger = True

    def __init__(self, size, axis=-1, **kwargs):
        super().__init__(**kwargs)
        self.size, self.axis = count("size", size), whole_axis(axis)

    def _missing(self, shape):
        """`(axis, entries to add)`, negative where entries are dropped."""
        axis = feature_axis(self.axis, shape, self.name)
        missing = self.size - known_size(shape, axis, self.name)
        if missing < 0 if self._larger else missing > 0:
            side = "at least" if self._larger else "at most"
            raise ValueError(
                f"`size` must be {side} the input's. Received: size={self.size}, input shape "
                f"{tuple(shape)} in layer {self.name!r}."
            )
        return axis, missing

    def build(self, input_shape):
        self._missing(input_shape)
        super().build(input_shape)

    def compute_output_shape(self, input_shape):
        axis, _ = self._missing(input_shape)
        return tuple(self.size if i == axis else n for i, n in enumerate(input_shape))

    def get_config(self):
        return {**super().get_config(), "size": self.size, "axis": self.axis}


@_register
class ChannelPadding(_Resized):
    """Appends zero channels up to a given number: an isometry.

    Args:
        size: number of channels after it, at least that of the input.
        axis: the channel axis.

    Raises:
        ValueError: if the input has more channels, or `axis` is the batch axis.

    Example:

    >>> import numpy as np
    >>> np.asarray(ChannelPadding(3)(np.array([[1.0, 2.0]]))).tolist()
    [[1.0, 2.0, 0.0]]

    Reference: Meunier et al. (2022) (3 to C channels before the first layer).
    """

    def call(self, x):
        axis, missing = self._missing(x.shape)
        return ops.pad(x, [(0, missing if i == axis else 0) for i in range(len(x.shape))])


@_register
class Truncate(_Resized):
    """Keeps the first entries along an axis; gain exactly 1.

    Args:
        size: number of entries kept, at most that of the input.
        axis: the axis.

    Raises:
        ValueError: if the input has fewer entries, or `axis` is the batch axis.

    Example:

    >>> import numpy as np
    >>> np.asarray(Truncate(2)(np.array([[1.0, 2.0, 3.0]]))).tolist()
    [[1.0, 2.0]]

    Reference: Meunier et al. (2022) (d features to K logits).
    """

    _larger = False

    def call(self, x):
        axis, _ = self._missing(x.shape)
        return x[(*[slice(None)] * axis, slice(self.size))]
