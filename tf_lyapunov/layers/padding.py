"""Padding of images by copies of their own pixels, which is no isometry."""

import keras
import numpy as np
from keras import ops

from tf_lyapunov.layers.axes import image_format, known_size, spatial_axes
from tf_lyapunov.theory.rounding import sqrt_up

# NumPy's words for them.
MODES = {"circular": "wrap", "reflect": "reflect", "symmetric": "symmetric", "edge": "edge"}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class Padding2D(keras.layers.Layer):
    """Pads images by copies of their own pixels.

        circular    c d | a b c d | a b        reflect   c b | a b c d | c b
        symmetric   b a | a b c d | d c        edge      a a | a b c d | d d

    A pixel that appears k times counts k times: the gain is √(largest k), more than 1, and that of
    every certificate; `gain_upper_bound` says it for a size. In front of a convolution with
    `padding="valid"` it gives any padding; `max_gain` of that convolution divided by this gain
    keeps both together below `max_gain`. Zero padding has gain 1 and is
    `keras.layers.ZeroPadding2D`, or `padding="same"`; a circular convolution of gain exactly 1 is
    `CayleyConv2D`.

    Args:
        padding: pixels on every side; or `(height, width)`; or `((top, bottom), (left, right))`.
        mode: `"circular"`, `"reflect"`, `"symmetric"` or `"edge"`.
        data_format: as in Keras.

    Raises:
        ValueError: if an argument is none of these, or a size of the input is unknown.

    Example:

    >>> import numpy as np
    >>> layer = Padding2D(((0, 0), (1, 1)), mode="reflect")
    >>> np.asarray(layer(np.array([[[[1.0], [2.0], [3.0]]]])))[0, 0, :, 0].tolist()
    [2.0, 1.0, 2.0, 3.0, 2.0]
    >>> round(layer.gain_upper_bound((None, 1, 3, 1)) ** 2, 9)  # 2.0 appears three times
    3.0
    """

    def __init__(self, padding=1, mode="circular", data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.padding = _pairs(padding)
        if mode not in MODES:
            raise ValueError(
                f"`mode` must be one of {tuple(MODES)}. Received: mode={mode!r}. Zeros are "
                "`keras.layers.ZeroPadding2D`."
            )
        self.mode = mode
        self.data_format = image_format(data_format)
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape):
        self.indices(input_shape)
        super().build(input_shape)

    def indices(self, input_shape):
        """`(axis, positions)` of the spatial axes: output i is input positions[i].

        Raises:
            ValueError: if a size is unknown.
        """
        found = []
        for axis, pads in zip(spatial_axes(self.data_format), self.padding, strict=True):
            positions = np.arange(known_size(input_shape, axis, self.name))
            found.append((axis, np.pad(positions, pads, mode=MODES[self.mode])))
        return found

    def gain_upper_bound(self, input_shape):
        """√(largest number of times that a pixel appears), rounded up, for an input shape."""
        counts = [int(np.bincount(index).max()) for _, index in self.indices(input_shape)]
        return sqrt_up(counts[0] * counts[1])

    def call(self, x):
        for axis, index in self.indices(x.shape):
            x = ops.take(x, index, axis=axis)
        return x

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        for axis, index in self.indices(input_shape):
            shape[axis] = len(index)
        return tuple(shape)

    def get_config(self):
        own = {
            "padding": [list(pads) for pads in self.padding],
            "mode": self.mode,
            "data_format": self.data_format,
        }
        return {**super().get_config(), **own}


def _pairs(padding):
    """`((top, bottom), (left, right))`."""
    sides = (padding, padding) if isinstance(padding, int) else padding
    try:
        pairs = tuple((n, n) if isinstance(n, int) else tuple(n) for n in sides)
    except TypeError:
        pairs = ()
    flat = [n for pair in pairs for n in pair]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in flat)
    if [len(pair) for pair in pairs] != [2, 2] or not whole:
        raise ValueError(
            "`padding` must be an integer ≥ 0, two of them, or two pairs of them. "
            f"Received: padding={padding!r}."
        )
    return pairs
