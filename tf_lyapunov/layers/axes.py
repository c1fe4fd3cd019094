"""Axes, sizes and ranges that the layers without a kernel share."""

import keras
from keras import ops

from tf_lyapunov.spectral.arguments import count, finite


def feature_axis(axis, shape, name):
    """`axis` of a batch shape counted from the front; never the batch axis."""
    rank = len(shape)
    if not -rank <= axis < rank or axis % rank == 0:
        raise ValueError(
            f"`axis` must be an axis of the input other than the batch axis. Received: "
            f"axis={axis} in layer {name!r}, input shape {tuple(shape)}."
        )
    return axis % rank


def known_size(shape, axis, name):
    """Size of a batch shape along an axis, refused where it is unknown."""
    if shape[axis] is None:
        raise ValueError(
            f"The size of axis {axis} must be known. Received: input shape {tuple(shape)} in "
            f"layer {name!r}. Fix it in `keras.Input`."
        )
    return int(shape[axis])


def divided(size, parts, what, name):
    """`size // parts`, refused where there is a remainder."""
    if size % parts:
        raise ValueError(
            f"{what} must be divisible by {parts}. Received: {size} in layer {name!r}."
        )
    return size // parts


def whole_axis(axis):
    """`axis` as an integer, refused if it is none."""
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"`axis` must be an integer. Received: axis={axis!r}.")
    return axis


def pair(name, value):
    """A positive integer, or a pair of them, as a pair."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"`{name}` must be an integer or two. Received: {name}={value!r}.")
    return tuple(count(name, v) for v in values)


def image_format(value):
    """`"channels_first"` or `"channels_last"`; `None` is Keras's own setting."""
    value = keras.config.image_data_format() if value is None else value
    if value not in ("channels_first", "channels_last"):
        raise ValueError(
            "`data_format` must be 'channels_first' or 'channels_last'. "
            f"Received: data_format={value!r}."
        )
    return value


def spatial_axes(data_format):
    """Height and width axes of a batch of images."""
    return (2, 3) if data_format == "channels_first" else (1, 2)


def at_least_float32(x):
    """`x`, half formats widened: squares and long sums need the range and the digits."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.cast(x, "float32") if dtype in ("float16", "bfloat16") else x


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class Interval(keras.constraints.Constraint):
    """Nearest number in [low, high], entry by entry.

    Args:
        low, high: finite numbers, low < high.

    Example:

    >>> import keras, numpy as np
    >>> keras.ops.convert_to_numpy(Interval(0.0, 1.0)(np.array([-1.0, 0.25, 3.0]))).tolist()
    [0.0, 0.25, 1.0]
    """

    def __init__(self, low, high):
        self.low, self.high = finite("low", low), finite("high", high)
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`. Received: low={low}, high={high}.")

    def __call__(self, w):
        return ops.clip(w, self.low, self.high)

    def get_config(self):
        return {"low": self.low, "high": self.high}
