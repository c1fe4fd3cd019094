"""Attention by distances in place of products, which has a Lipschitz constant."""

import math

import keras

from tf_lyapunov.layers.axes import known_size
from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.spectral.arguments import GAIN_RANGE, positive
from tf_lyapunov.theory.attention import l2_attention_gain


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class L2Attention(keras.layers.Layer):
    """Every token becomes a mean of all, weighted by distances: gain at most `max_gain`.

        z_i = (g/L(N)) Σ_j P_ij y_j,   P_i = softmax over j of -‖y_i - y_j‖²/s,   g = max_gain  (1)

    in each of `heads` parts of the channels, over N tokens; y are the inputs (n, N, channels).
    Scores by products are unbounded in their slope, as tokens far away turn them; scores by
    distances with the same map for queries and keys are not: L(N), of `theory.attention`,
    eq. (2), bounds the gain of the mean in one head, whatever s is,

        L(N) = √((N+1)/2) + 2c + 2√(cκ(N-1)),   c e^(c+1) = N - 1,   κ e^(κ+1) = 1.            (2)

    Heads are parts of the channels, each mapped by itself, so that all together have that of one:
    ‖z‖² = Σ_h ‖z_h‖² ≤ g² Σ_h ‖y_h‖². The layer has no weights. Put maps before and after it: with
    y = xW, queries, keys and values of all heads, and the output zV the gain is at most g‖W‖‖V‖,
    and at most g with two `SpectralDense`.

    Loose as N grows: L is 4.2, 10.5 and 23.1 for 4, 16 and 64 tokens, of the order of √(N log N).

    Args:
        heads: number of parts of the channels, which it divides.
        max_gain: g.
        temperature: s, or None for √(channels of a head).

    Raises:
        ValueError: if an argument is out of range, the number of tokens or channels is not known,
            or the heads do not divide the channels.

    Example:

    >>> import numpy as np
    >>> layer = L2Attention(heads=2)
    >>> tuple(layer(np.ones((1, 5, 4), "float32")).shape)
    (1, 5, 4)

    Reference: Kim, Papamakarios, Mnih, The Lipschitz constant of self-attention (2021), whose
    values are y·Wᵀ/√(D/H) times a map of their own: one choice of V here. Sound form.
    """

    def __init__(self, heads=1, max_gain=1.0, temperature=None, **kwargs):
        super().__init__(**kwargs)
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(f"`heads` must be a positive integer. Received: heads={heads!r}.")
        self.heads = heads
        self.max_gain = positive("max_gain", max_gain, GAIN_RANGE)
        self.temperature = None
        if temperature is not None:
            self.temperature = positive("temperature", temperature, (1e-3, 1e6))

    def build(self, input_shape):
        if len(input_shape) != 3:
            raise ValueError(
                "`L2Attention` must be called on (n, tokens, channels). Received: input shape "
                f"{tuple(input_shape)}."
            )
        known_size(input_shape, 1, self.name)
        channels = known_size(input_shape, 2, self.name)
        if channels % self.heads:
            raise ValueError(
                f"`heads` must divide the channels. Received: heads={self.heads} for {channels}."
            )
        super().build(input_shape)

    def factor(self, count):
        """g/L(N) as the compute dtype holds it, rounded down."""
        return rounded_down(self.max_gain / l2_attention_gain(count), self.compute_dtype)

    def inverse_temperature(self, channels):
        """1/s as the compute dtype holds it."""
        s = self.temperature or math.sqrt(channels / self.heads)
        return rounded_down(1 / s, self.compute_dtype)

    def call(self, inputs):
        count, channels = (known_size(inputs.shape, i, self.name) for i in (1, 2))
        y = keras.ops.reshape(inputs, (-1, count, self.heads, channels // self.heads))
        y = keras.ops.transpose(y, (0, 2, 1, 3))
        apart = y[:, :, :, None] - y[:, :, None]
        squares = keras.ops.sum(keras.ops.square(apart), axis=-1)
        weights = keras.ops.softmax(-self.inverse_temperature(channels) * squares, axis=-1)
        found = keras.ops.transpose(keras.ops.matmul(weights, y), (0, 2, 1, 3))
        return self.factor(count) * keras.ops.reshape(found, (-1, count, channels))

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        own = {
            "heads": self.heads,
            "max_gain": self.max_gain,
            "temperature": self.temperature,
        }
        return {**super().get_config(), **own}
