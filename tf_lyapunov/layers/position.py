"""A bias of its own at every position: what tells positions apart between shared layers."""

import keras

from tf_lyapunov.layers.axes import known_size


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class PositionBias(keras.layers.Layer):
    """Adds a learned number to every entry of a sample: a translation, gain exactly 1.

        y = x + p,   p of the shape of one sample

    Layers that treat all positions alike, such as `OrthogonalDense` on channels and `ShiftMixing`,
    cannot see where they are; this tells them at no cost in gain.

    Args:
        initializer: of p.

    Raises:
        ValueError: if a size of the input is unknown.

    Example:

    >>> import numpy as np
    >>> layer = PositionBias(initializer="ones")
    >>> np.asarray(layer(np.zeros((1, 2, 2), "float32")))[0].tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    Reference: the position embedding of LipNeXt (arXiv 2601.18513).
    """

    def __init__(self, initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape):
        shape = tuple(known_size(input_shape, i, self.name) for i in range(1, len(input_shape)))
        self.bias = self.add_weight(name="bias", shape=shape, initializer=self.initializer)
        super().build(input_shape)

    def call(self, x):
        return x + keras.ops.cast(self.bias, x.dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        own = {"initializer": keras.initializers.serialize(self.initializer)}
        return {**super().get_config(), **own}
