"""Orthogonal layers by block reflections (BRO): dense, and circular convolutions per frequency."""

import keras

from tf_lyapunov.layers.keras_order import extending
from tf_lyapunov.layers.linear import LipschitzDense, known_width, with_gain
from tf_lyapunov.layers.orthogonal import CayleyConv2D
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.reflection import block_reflection


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class BlockReflectorDense(LipschitzDense):
    """Dense layer with orthonormal columns (or rows) by a block reflection (BRO).

        y = φ(x K + b),   K = max_gain·(I - 2V(VᵀV)⁻¹Vᵀ)[:in, :units]

    V is the raw kernel, max(in, units) × rank. ‖K‖ ≤ max_gain as stored, for every V: what rounding
    leaves above is measured and divided out. The scale of V is without effect. The smaller the rank
    the cheaper the step, and the smaller the subspace that the map turns around.

    Args:
        units: width of the output.
        *args: what `keras.layers.Dense` takes next, in its order.
        rank: of V; None: a quarter of its rows.
        **kwargs: as there, and `max_gain`.

    Raises:
        ValueError: when built, if the rank exceeds max(in, units).

    Example:

    >>> import numpy as np
    >>> layer = BlockReflectorDense(3)
    >>> layer.build((None, 5))
    >>> kernel = layer.effective_values()["kernel"]
    >>> bool(np.allclose(kernel.T @ kernel, np.eye(3), atol=1e-4))
    True

    Reference: Lai et al. (2025), section 3; as published (one reflection, V of low rank), with the
    excess divided out in place of a ridge.
    """

    @extending(LipschitzDense)
    def __init__(self, units, *args, rank=None, **kwargs):
        super().__init__(units, *args, **kwargs)
        self.rank = None if rank is None else count("rank", rank)

    def build(self, input_shape):
        width = known_width(input_shape, self)
        self._sides = (width, self.units)
        side = max(self._sides)
        self._add_kernel((side, rank_of(self, side)))
        self._add_bias(self.units)
        self._build_activation(input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: width})
        self._track_effective({"kernel": self._sides}, [self.kernel], self._parametrised)

    def _parametrised(self, kernel, training=False):
        width, units = self._sides
        matrix = block_reflection(kernel)[:width, :units]
        return (with_gain(matrix, self.max_gain, min(self._sides)),)

    def call(self, x, training=None):
        (kernel,) = self.effective(training)
        return self._activated(keras.ops.matmul(x, kernel))

    @property
    def rounding_inflation(self):
        width, units = self._sides
        return self._cast_inflation(min(self._sides), 1, width * units)

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class BlockReflectorConv2D(CayleyConv2D):
    """Orthogonal convolution with circular padding, one block reflection per frequency (BRO).

        ŷ(θ) = x̂(θ)·Q(θ),   Q(θ) = max_gain·(I - 2V̂(V̂ᴴV̂)⁻¹V̂ᴴ)(θ)[:in', :filters]

    V̂(θ) = Σ_t V[t]exp(iθ·t) is the symbol of the raw kernel V (k₁, k₂, n, rank), n = max(in',
    filters), in' = s₁s₂·in for strides that move pixels into channels. Q(θ) has orthonormal
    columns, or rows if there are more filters; ‖y‖ ≤ max_gain·‖x‖ as stored. Effective weights,
    strides and half formats: as for `CayleyConv2D`, whose transform this is. V̂ has less than full
    rank only where V is degenerate, and Q(θ) is a contraction there.

    Args:
        filters, kernel_size, strides: as for `CayleyConv2D`.
        rank: of V; None: a quarter of n.
        **kwargs: as there.

    Raises:
        ValueError: as there, and if the rank exceeds n.

    Example:

    >>> import numpy as np
    >>> layer = BlockReflectorConv2D(3, 3, use_bias=False)
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 6, 3)).astype("float32")
    >>> y = keras.ops.convert_to_numpy(layer(x))
    >>> bool(np.allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-3))
    True

    Reference: Lai et al. (2025), section 3.2; as published by frequencies, with circular padding
    (they pad by zeros, transform, and crop), and with the excess divided out.
    """

    @extending(CayleyConv2D)
    def __init__(self, filters, kernel_size, strides=1, *, rank=None, **kwargs):
        super().__init__(filters, kernel_size, strides, **kwargs)
        self.rank = None if rank is None else count("rank", rank)

    def _raw_sides(self):
        side = max(self._sides)
        return side, rank_of(self, side)

    def _orthogonal(self, real, imag):
        channels, filters = self._sides
        real, imag = block_reflection(real, imag)
        return real[..., :channels, :filters], imag[..., :channels, :filters]

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}


def rank_of(layer, side):
    """Columns of V for a reflection of this side."""
    rank = max(side // 4, 1) if layer.rank is None else layer.rank
    if rank > side:
        raise ValueError(
            f"A reflection of {side} dimensions turns at most as many around. Received: "
            f"rank={rank} in layer {layer.name!r}."
        )
    return rank
