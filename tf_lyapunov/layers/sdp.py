"""SDP-based Lipschitz layers (SLL): the convex potential layer with one scale per hidden channel.

    z = g·(x - 2W T⁻¹ φ(Wᵀx + b)),   T diagonal, T ⪰ WᵀW                                     (1)

T comes from row sums (`theory.potential.schur_diagonal`): no power iteration and no eigenvalues.
For a convolution WᵀW is, on the infinite grid, the convolution with the autocorrelation of the
kernel, G_ij[lag] = Σ_t ⟨K[t+lag]_i, K[t]_j⟩, whose rows have the absolute sum Σ_j Σ_lag |G_ij|.
A finite, zero-padded image keeps some rows and columns of W; T acts on channels alone, so that
‖W T^(-1/2)‖ ≤ 1 survives. (Row sums of the finite WᵀW itself may be larger: terms that cancel
inside the image need not at its border.)
"""

import itertools
import math

import keras
from keras import ops

from tf_lyapunov.layers.potential import PotentialConvolution, PotentialLayer
from tf_lyapunov.spectral.gram import product, product_terms
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# q = exp(raw), of which only the ratios matter, kept within exp(±20).
LARGEST_LOGARITHM = 10.0
# More than products below the smallest float32 can add up to; far below any useful T.
UNDERFLOW = 2.0**-64


class SDPLipschitz(PotentialLayer):
    """The scale of SDP-based layers, t = 2/T."""

    def _scale_sources(self, width):
        self.weights_logarithm = self.add_weight(
            name="weights_logarithm", shape=(width,), initializer="zeros", autocast=False
        )
        return [self.weights_logarithm], (width,)

    def _inverse_scale(self, kernel, logarithm, *, training):
        limit = LARGEST_LOGARITHM
        return 0.5 * _dominating_diagonal(kernel, ops.exp(ops.clip(logarithm, -limit, limit)))


def _dominating_diagonal(kernel, q):
    """T_i ≥ Σ_j (Σ_lag |G_ij|)·q_j/q_i, rounding included, for the exact G of the kernel."""
    given, dtype = kernel.dtype, work_dtype(kernel)
    kernel, q = ops.cast(kernel, dtype), ops.cast(q, dtype)
    u, sizes, width = unit_roundoff(dtype), kernel.shape[:-2], kernel.shape[-1]
    total, lags, terms = 0.0, 0, 0
    with full_precision():
        for lag in itertools.product(*(range(1 - k, k) for k in sizes)):
            if lag < tuple(0 for _ in lag):
                continue  # the transpose of the opposite lag
            ahead = tuple(slice(max(d, 0), k + min(d, 0)) for d, k in zip(lag, sizes, strict=True))
            behind = tuple(
                slice(max(-d, 0), k - max(d, 0)) for d, k in zip(lag, sizes, strict=True)
            )
            a, b = (ops.reshape(kernel[part], (-1, width)) for part in (ahead, behind))
            gram = ops.abs(product(a, b, axis=-2))
            total = total + (gram if not any(lag) else gram + ops.transpose(gram))
            lags, terms = lags + 2, max(terms, product_terms(a.shape[0]))
        # Forming G errs, entry by entry and summed over the lags, by γ·AᵀA, A = Σ_t |K[t]|.
        sums = ops.sum(ops.abs(ops.reshape(kernel, (-1, *kernel.shape[-2:]))), axis=0)
        q = ops.expand_dims(q, -1)
        forming = gamma(terms, u) * ops.matmul(ops.transpose(sums), ops.matmul(sums, q))
        diagonal = (ops.matmul(total, q) + forming) / q
    # Sums of non-negative terms: relative errors only.
    rounding = 2 * gamma(lags + width + math.prod(sizes) + kernel.shape[-2] + 16, u)
    return ops.cast(ops.squeeze(diagonal, -1) * (1 + rounding) + UNDERFLOW, given)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SDPLipschitzDense(SDPLipschitz):
    """SDP-based Lipschitz layer on the last axis.

        z = g·(x - 2W T⁻¹ φ(Wᵀx + b)),   T_i = Σ_j |WᵀW|_ij·q_j/q_i,   g = max_gain

    Gain at most `max_gain` at every value of W and of the trainable q > 0, in every compute dtype:
    T is that of the kernel after its cast, with the rounding of WᵀW added, and 2/T is rounded
    down, so that `rounding_inflation` is 1.

    Args:
        width: number of hidden units (`None`: the input's).
        activation: φ, a Keras activation with slopes in [0, 1].
        use_bias, kernel_initializer, …: as in `keras.layers.Dense`, and in its order.
        max_gain: g.

    Raises:
        ValueError: if an argument is out of range, or φ is not monotone and 1-Lipschitz.

    Example:

    >>> import numpy as np, keras
    >>> layer = SDPLipschitzDense(8)
    >>> tuple(layer(np.ones((2, 4), "float32")).shape)
    (2, 4)
    >>> bool(1.0 <= layer.gain_upper_bound() < 1.0 + 1e-9)
    True

    Reference: Araujo et al. (2023), Theorem 3 ("SLL"); sound form (rounding included).
    """


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SDPLipschitzConv2D(PotentialConvolution, SDPLipschitz):
    """SDP-based Lipschitz layer on images, stride 1, with 'same' zero padding.

        z = g·(x - 2W T⁻¹ φ(Wᵀx + b)),   T_i = Σ_j Σ_lag |G_ij[lag]|·q_j/q_i,   g = max_gain

    with G the autocorrelation of the kernel: valid at every image size. See `SDPLipschitzDense`.

    Args:
        width: number of hidden channels (`None`: the input's).
        kernel_size: an integer or two.
        activation, use_bias, kernel_initializer, bias_initializer, max_gain: see
            `SDPLipschitzDense`.

    Raises:
        ValueError: see `SDPLipschitzDense`; if Keras is set to channels first.

    Example:

    >>> import numpy as np, keras
    >>> layer = SDPLipschitzConv2D(8, kernel_size=3)
    >>> tuple(layer(np.ones((2, 6, 6, 4), "float32")).shape)
    (2, 6, 6, 4)
    >>> bool(1.0 <= layer.gain_upper_bound() < 1.0 + 1e-9)
    True

    Reference: Araujo et al. (2023), Theorem 3 ("SLL"); sound form (rounding, zero padding).
    """

    spatial_axes = 2


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SDPLipschitzConv1D(PotentialConvolution, SDPLipschitz):
    """SDP-based Lipschitz layer on sequences: see `SDPLipschitzConv2D`.

    Example:

    >>> import numpy as np, keras
    >>> tuple(SDPLipschitzConv1D(8, kernel_size=3)(np.ones((2, 6, 4), "float32")).shape)
    (2, 6, 4)
    """

    spatial_axes = 1
