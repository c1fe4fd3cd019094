"""Initializers that factorise a matrix, in layers of 16 bits."""

import keras
from keras import ops


class WideInitializers:
    """Of a `keras.layers.Layer`: orthogonal kernels of 16 bits are computed in 32 and rounded.

    No backend has a QR factorisation in bfloat16.
    """

    def add_weight(self, shape=None, initializer=None, dtype=None, **kwargs):
        """As of Keras."""
        if isinstance(initializer, keras.initializers.Orthogonal):
            initializer = in_float32(initializer)
        return super().add_weight(shape=shape, initializer=initializer, dtype=dtype, **kwargs)


def in_float32(initializer):
    """An initializer that computes in float32 at least, for any type of the variable."""

    def made(shape, dtype=None):
        wide = dtype if dtype == "float64" else "float32"
        return ops.cast(initializer(shape, dtype=wide), dtype or wide)

    return made
