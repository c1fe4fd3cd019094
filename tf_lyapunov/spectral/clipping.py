"""Soft clipping of singular values by matrix products, guaranteed by its own polynomial.

Scaling a kernel back after every step shrinks *all* its singular values whenever the largest one
grew, so that spectra decay and accuracy with them. The Euclidean projection clips the largest
ones alone but takes an SVD. In between, with ρ the bound,

    W ← W (I - c (WᵀW / ρ²)⁸),   so that every singular value becomes  σ (1 - c (σ/ρ)¹⁶),    (1)

    c = max_{x > 0} (1 - x^-½) x⁻⁸ = (16/17)¹⁶ / 17.                                       (2)

(2) says √x (1 - c x⁸) ≤ 1 for every x = (σ/ρ)² > 0: nothing above ρ is left, whatever the singular
values were, as long as c x⁸ ≤ 1, which a crude bound on x ensures. Below, (1) takes 2% off at
σ = ρ, 0.4% at 0.9ρ and nothing to speak of below 0.75ρ. It takes a Gram matrix, three squarings
and one product with W.
"""

import math

from keras import ops

from tf_lyapunov.spectral.gram import SAFE_TRACE, product, product_terms, sum_of_squares
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# (2): the maximum lies at √x = 17/16.
COEFFICIENT = (16 / 17) ** 16 / 17
# Larger x are scaled down to this first: (1) still leaves them half of ρ, and c·1.6⁸ < 1 leaves
# room for the rounding of x itself.
LARGEST = 1.5
# ‖X‖_F beyond which the eighth power leaves float32.
FROBENIUS_LIMIT = 200.0


def soft_clip(kernel, max_gain, otherwise):
    """The matrix with (1) applied where its norm may exceed `max_gain`.

    Sufficient: the result, as stored, has a spectral norm of at most `max_gain` in exact
    arithmetic. A kernel whose norm is at most about 0.85·`max_gain` is left as it is, bit for
    bit; none is enlarged. Costs 2mn² (Gram matrix) + 6n³ + 2mn² flops, n the smaller side.

    Args:
        kernel: `(in, out)` tensor, any floating-point type.
        max_gain: positive float ρ.
        otherwise: function without arguments that gives the result for kernels that are not
            finite, or too far outside for an eighth power.

    Returns:
        Tensor of the kernel's shape and type.

    Example:

    >>> import numpy as np
    >>> w = np.diag([1.1, 0.5]).astype("float32")
    >>> [round(float(v), 3) for v in np.diag(np.asarray(soft_clip(w, 1.0, lambda: w)))]
    [0.987, 0.5]

    Reference: sound form of this library; the papers divide by an estimate of the norm.
    """
    kernel = ops.convert_to_tensor(kernel)
    wide = ops.cast(kernel, work_dtype(kernel))
    axis = -2 if kernel.shape[0] >= kernel.shape[1] else -1
    limits = _Rounding.of(kernel, wide, axis)
    with full_precision():
        gram = product(wide, wide, axis)
        # Aim below ρ by the rounding that is usual, so that it rarely costs any scaling.
        unit = ((1 + limits.usual) / max_gain) ** 2
        x, raw = gram * unit, ops.trace(gram)
        trace = ops.maximum(raw * (unit * limits.trace_factor), 1.0)
        low, high = SAFE_TRACE
        safe = (raw > low) & (raw < high) & (trace < limits.largest_trace)
        safe = safe & (ops.sum(ops.square(x)) < FROBENIUS_LIMIT**2)
        return ops.cond(safe, lambda: _clipped(kernel, wide, x, trace, axis, limits), otherwise)


class _Rounding:
    """Constants of the rounding analysis, with X = (WᵀW)/ρ², tr its trace and b = max(1, ‖X‖₂).

    Forming X errs by e = g·tr in Frobenius norm. A squaring adds γ·‖Y‖_F², where Y ≈ X^k has
    ‖X^k‖_F² ≤ b^(2k-1)·tr, and doubles the relative error. While e and γ·tr stay below 1/64,

        ‖fl(X⁸) - X⁸‖_F ≤ κ b⁸,   κ = (8.8 g + 8.4 γ)·tr ≤ 0.27.                            (3)

    Hence ‖X‖₂ ≥ 1 implies ‖X‖₂⁸ ≤ ‖fl(X⁸)‖_F / (1 - κ). With x scaled to y = t·b ≤ 3/2 the stored
    result exceeds (1) by at most c y^8.5 (κ + 1.2 γ tr) + 8 (u + u_stored) √tr, relative to ρ.
    """

    def __init__(self, forming, squaring, entries, side, roundoff, trace_terms):
        self.error = 8.8 * forming + 8.4 * squaring
        self.spread = self.error + 1.2 * squaring
        self.entries = 8 * entries
        self.roundoff = roundoff
        self.trace_factor = 1 + 2 * gamma(trace_terms, roundoff)
        self.largest_trace = min(4.0 * side, 1 / (64 * max(forming, squaring)))
        # As for singular values of about 0.7ρ and a norm 12% above; any value is valid.
        usual = float(self.allowance(1.25, side / 2, math.sqrt(side / 2)))
        self.usual = min(usual, 1 / 16)

    @classmethod
    def of(cls, kernel, wide, axis):
        u, stored = unit_roundoff(wide.dtype), unit_roundoff(kernel.dtype)
        side = min(kernel.shape)
        terms = product_terms(kernel.shape[axis])
        squaring = gamma(product_terms(side) + 2, u)
        return cls(gamma(terms, u) + 8 * u, squaring, u + stored, side, u, terms + side)

    def allowance(self, y, trace, root_trace):
        """What rounding may add to the clipped singular values, relative to ρ."""
        return COEFFICIENT * y**8.5 * (self.spread * trace) + self.entries * root_trace


def _clipped(kernel, wide, x, trace, axis, limits):
    u = limits.roundoff
    power = x
    for _ in range(3):
        power = product(power, power, axis=-2)
    squares = _sum_of_squares(power, u)
    eighth = ops.sqrt(squares) * (1 + 8 * u) / (1 - limits.error * trace)
    b = ops.maximum(eighth, 1.0) ** 0.125 * (1 + 16 * u)
    t = ops.minimum(1.0, LARGEST / b)
    allowance = limits.allowance(t * b, trace, ops.sqrt(trace))
    scale = ops.sqrt(t) * ops.minimum(1.0, (1 + limits.usual) / (1 + allowance)) * (1 - 16 * u)

    def clip():
        excess = product(power, wide, axis=-2) if axis == -1 else ops.matmul(wide, power)
        clipped = scale * wide - (scale * (COEFFICIENT * t**8)) * excess
        return ops.cast(clipped, kernel.dtype)

    # Below 1, (3) proves ‖X‖₂ < 1.
    return ops.cond(eighth * (1 + 8 * u) < 1, lambda: kernel, clip)


def _sum_of_squares(x, u):
    """Σ x², rounded up; a long sum is cut so that γ stays that of two short ones."""
    count = x.shape[0] * x.shape[1]
    if count <= 2**20:
        return ops.sum(ops.square(x)) * (1 + 2 * gamma(count, u))
    return sum_of_squares(x) * (1 + gamma(2 * x.shape[-1] + 8, u))
