"""Batch normalization without its division: the part that keeps the gain at one."""

import keras
from keras import ops

from tf_lyapunov.layers.axes import at_least_float32, feature_axis, known_size, whole_axis
from tf_lyapunov.layers.keras_order import formerly
from tf_lyapunov.spectral.arguments import finite


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class BatchCentering(keras.layers.Layer):
    """Subtracts each channel's mean and adds a learned bias.

        inference:  y = x - m + b,   m the running mean: a translation, gain exactly 1
        training:   Y = X - mean(X) + b over the whole batch, an orthogonal projection of the
                    batch followed by a translation: gain 1 for the batch as one point

    In training it is m ← momentum·m + (1 - momentum)·mean(X), as in `BatchNormalization`; a layer
    with `trainable = False` behaves as at inference.

    Args:
        axis: the channel axis.
        momentum: float in [0, 1).
        use_bias: whether to learn b.

    Raises:
        ValueError: if the momentum is out of range, or `axis` is the batch axis.

    Example:

    >>> import keras, numpy as np
    >>> layer = BatchCentering()
    >>> keras.ops.convert_to_numpy(layer(np.array([[1.0], [3.0]]), training=True)).ravel().tolist()
    [-1.0, 1.0]

    Reference: Ioffe and Szegedy (2015) without the division; `BatchCentering` of deel-torchlip.
    """

    @formerly("axis", "momentum", "use_bias", kept=2)
    def __init__(self, axis=-1, momentum=0.99, *, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        self.axis, self.use_bias = whole_axis(axis), bool(use_bias)
        self.momentum = finite("momentum", momentum)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1). Received: momentum={momentum}.")

    def build(self, input_shape):
        axis = feature_axis(self.axis, input_shape, self.name)
        size = known_size(input_shape, axis, self.name)
        rank = len(input_shape)
        self._others = [i for i in range(rank) if i != axis]
        self._broadcast = [size if i == axis else 1 for i in range(rank)]
        # Autocast would let the running mean stall in half formats.
        self.moving_mean = self.add_weight(
            name="moving_mean",
            shape=(size,),
            initializer="zeros",
            trainable=False,
            autocast=False,
            aggregation="mean",
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(size,), initializer="zeros")
        super().build(input_shape)

    def call(self, x, training=None):
        if training and self.trainable:
            mean = ops.mean(at_least_float32(x), axis=self._others)
            old = ops.convert_to_tensor(self.moving_mean)
            new = ops.cast(ops.stop_gradient(mean), old.dtype)
            self.moving_mean.assign(self.momentum * old + (1 - self.momentum) * new)
        else:
            mean = self.moving_mean
        shift = -ops.cast(mean, x.dtype)
        if self.bias is not None:
            shift = ops.cast(self.bias, x.dtype) + shift
        return x + ops.reshape(shift, self._broadcast)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        own = {"axis": self.axis, "momentum": self.momentum, "use_bias": self.use_bias}
        return {**super().get_config(), **own}
