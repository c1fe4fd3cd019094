"""Local response normalization across channels, on every backend."""

import keras
from keras import ops

from tf_lyapunov.layers.axes import at_least_float32, feature_axis, known_size, whole_axis
from tf_lyapunov.spectral.arguments import GAIN_RANGE, finite, positive


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class LocalResponseNormalization(keras.layers.Layer):
    """Divides every entry by a power of the energy of its neighbouring channels.

        y_c = x_c / (bias + alpha·Σ_{|j-c| ≤ depth_radius} x_j²)^beta

    as in `tf.nn.local_response_normalization`: alpha is not divided by the width of the window
    (Caffe's and PyTorch's is). Its gain is at most 1.4·bias^-beta, whatever the input (`certify`
    uses a sharper bound).

    Args:
        depth_radius: non-negative integer r; windows hold up to 2r + 1 channels.
        bias: positive float k.
        alpha: non-negative float.
        beta: positive float.
        axis: the channel axis.

    Raises:
        ValueError: if an argument is out of range, or `axis` is the batch axis.

    Example:

    >>> import numpy as np
    >>> layer = LocalResponseNormalization(depth_radius=1, bias=1.0, alpha=1.0, beta=1.0)
    >>> np.asarray(layer(np.array([[1.0, 0.0, 2.0]]))).tolist()
    [[0.5, 0.0, 0.4000000059604645]]

    Reference: Krizhevsky, Sutskever and Hinton (2012), section 3.3.
    """

    def __init__(self, depth_radius=5, bias=1.0, alpha=1.0, beta=0.5, axis=-1, **kwargs):
        super().__init__(**kwargs)
        whole = isinstance(depth_radius, int) and not isinstance(depth_radius, bool)
        if not whole or depth_radius < 0:
            raise ValueError(
                "`depth_radius` must be an integer of at least 0. "
                f"Received: depth_radius={depth_radius!r}."
            )
        self.depth_radius = depth_radius
        # At bias 0 the map is discontinuous at the origin.
        self.bias = positive("bias", bias, GAIN_RANGE)
        self.alpha = finite("alpha", alpha)
        if not 0 <= self.alpha <= GAIN_RANGE[1]:
            raise ValueError(
                f"`alpha` must be between 0 and {GAIN_RANGE[1]}. Received: alpha={alpha}."
            )
        self.beta = positive("beta", beta, (1e-6, 16.0))
        self.axis = whole_axis(axis)

    @classmethod
    def alexnet(cls, size=5, bias=2.0, alpha=1e-4, beta=0.75, **kwargs):
        """The layer in AlexNet's own parameters: a window of `size` = n channels, n odd.

        Example:

        >>> layer = LocalResponseNormalization.alexnet()
        >>> layer.depth_radius, layer.bias, layer.alpha, layer.beta
        (2, 2.0, 0.0001, 0.75)
        """
        if not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise ValueError(f"`size` must be an odd positive integer. Received: size={size!r}.")
        return cls(size // 2, bias, alpha, beta, **kwargs)

    def build(self, input_shape):
        axis = feature_axis(self.axis, input_shape, self.name)
        known_size(input_shape, axis, self.name)
        super().build(input_shape)

    def call(self, x):
        axis = feature_axis(self.axis, x.shape, self.name)
        size, wide = x.shape[axis], at_least_float32(x)
        # Windows wider than the channels hold them all.
        reach = min(self.depth_radius, size - 1)
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(len(x.shape))]
        squares = ops.pad(ops.square(wide), padding)
        before = [slice(None)] * axis
        energy = sum(squares[(*before, slice(i, i + size))] for i in range(2 * reach + 1))
        return ops.cast(wide * self._factor(self.bias + self.alpha * energy), x.dtype)

    def _factor(self, d):
        """d^-beta; the usual exponents by square roots, which are faster and more accurate."""
        if self.beta == 1.0:
            return 1 / d
        if self.beta == 0.5:
            return ops.rsqrt(d)
        if self.beta == 0.75:
            root = ops.rsqrt(d)
            return root * ops.sqrt(root)
        return ops.power(d, -self.beta)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        own = {
            "depth_radius": self.depth_radius,
            "bias": self.bias,
            "alpha": self.alpha,
            "beta": self.beta,
            "axis": self.axis,
        }
        return {**super().get_config(), **own}
