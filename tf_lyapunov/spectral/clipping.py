"""Soft clipping of singular values by matrix products, guaranteed by its own polynomial.

Scaling a kernel back after every step shrinks *all* its singular values whenever the largest one
grew, so that spectra decay and accuracy with them. The Euclidean projection clips the largest
ones alone but takes an SVD. In between, with ρ the bound, X = WᵀW/ρ² and T Chebyshev polynomials,

    W ← W                                if ‖X‖₂ ≤ 1 is proved,
    W ← W (1 - a - a·T_m(2X/c - 1))      otherwise,                                        (1)

so that every singular value σ = ρ√x becomes ρ·f(x), f(x) = √x (1 - a(1 + T_m(2x/c - 1))). T_m
stays within ±1 for x ≤ c and grows as fast as any polynomial of its degree beyond: (1) takes at
most 2a off the singular values below ρ√c, and leaves none above ρ·max f. The same T_8, three
squarings of the Gram matrix, proves ‖X‖₂ ≤ 1 (see `spectral.gram`) and clips; T_4 clips what
jumped far outside. As max f < 1, a clipped kernel ends some way inside, most steps after need the
proof only, and rounding has its room.
"""

import dataclasses
import math

from keras import ops

from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.gram import SAFE_TRACE, chebyshev, product, product_terms, trace
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# c in (1): singular values below 0.89ρ are left alone.
CUT = 0.8
SQUARINGS = 3


@dataclasses.dataclass(frozen=True)
class Curve:
    """f for one degree.

    Attributes:
        level: m = 2^level.
        a: the coefficient.
        reach: the largest x that it is for.
    """

    level: int
    a: float
    reach: float

    def chebyshev(self, x):
        """T_m(2x/c - 1) for x ≥ c."""
        return math.cosh(2**self.level * math.acosh(2 * x / CUT - 1))

    def factor(self, x):
        """1 - a(1 + T_m(2x/c - 1)) for x ≥ c."""
        return 1 - self.a * (1 + self.chebyshev(x))

    @property
    def top(self):
        """max |f| over [0, reach], rounded up.

        For x ≤ c it is at most √c. Beyond, log f is concave where the factor is positive, so that
        its maximum is where the slope changes sign; after that f decreases to its last value.
        """

        def slope(x, step=1e-6):
            return math.sqrt(x + step) * self.factor(x + step) - math.sqrt(x) * self.factor(x)

        low, high = CUT, self.reach
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        peak = math.sqrt(low) * self.factor(low)
        last = math.sqrt(self.reach) * self.factor(self.reach)
        # The slope's step moves the peak by 1e-6, where f is flat to second order.
        return max(math.sqrt(CUT), peak, abs(last)) * (1 + 1e-8)


# T_8 takes 0.9% off at 0.97ρ, 2.8% at ρ, and leaves at most 0.973ρ; T_4, less steep, 0.983ρ.
NEAR = Curve(level=3, a=2.5e-5, reach=1.05)
FAR = Curve(level=2, a=1.2e-3, reach=1.5)
# Rounding leaves less reach to wide kernels.
REACHES = {NEAR: (1.05,), FAR: (1.5, 1.25, 1.1)}


def soft_clip(kernel, max_gain, otherwise):
    """The matrix with (1) applied where its norm may exceed `max_gain`.

    Sufficient: the result, as stored, has a spectral norm of at most `max_gain` in exact
    arithmetic. A kernel whose norm is below about 0.97·`max_gain` is left as it is, bit for bit;
    no singular value is enlarged. Costs 2mn² (Gram matrix) + 6n³ flops, and 2mn² more where it
    clips; n is the smaller side.

    Args:
        kernel: `(in, out)` tensor, any floating-point type.
        max_gain: positive float ρ.
        otherwise: function without arguments that gives the result for kernels that are not
            finite, or beyond the reach of (1).

    Returns:
        Tensor of the kernel's shape and type.

    Example:

    >>> import numpy as np
    >>> w = np.diag([1.1, 0.5]).astype("float32")
    >>> [round(float(v), 3) for v in np.diag(np.asarray(soft_clip(w, 1.0, lambda: w)))]
    [0.963, 0.499]

    Reference: sound form of this library; the papers divide by an estimate of the norm.
    """
    kernel = ops.convert_to_tensor(kernel)
    wide = ops.cast(kernel, work_dtype(kernel))
    axis = -2 if kernel.shape[0] >= kernel.shape[1] else -1
    rounding = _Rounding.of(kernel, wide, axis)
    u, square = rounding.u, max_gain**2
    with full_precision():
        gram = product(wide, wide, axis)
        raw = trace(gram)
        total = raw * rounding.trace_factor
        powers, top = chebyshev(gram, CUT * square, SQUARINGS)
        top = (top + rounding.forming * total) * (1 + 8 * u)
        low, high = SAFE_TRACE
        safe = (raw > low) & (raw < high)
        x, total = (value * ((1 + 8 * u) / square) for value in (top, total))

        def clip(near):
            power = ops.where(near, powers[NEAR.level], powers[FAR.level])
            a = ops.cast(ops.where(near, NEAR.a, FAR.a), wide.dtype)
            swapped = axis == -1
            excess = product(power, wide, axis=-2) if swapped else ops.matmul(wide, power)
            return ops.cast((1 - a) * wide - (0.5 * a) * excess, kernel.dtype)

        def outside():
            near, far = (rounding.reaches(curve, x, total) for curve in (NEAR, FAR))
            return cond(safe & (near | far), lambda: clip(near), otherwise)

        return cond(safe & (x <= 1), lambda: kernel, outside)


class _Rounding:
    """How far rounding lets each curve reach, in units of ρ.

    Let b ≥ ‖X‖₂, tr ≥ trace X, S_k = 2T_{2^k}(2X/c - 1) with ‖S_k‖₂ ≤ s_k = 2T_{2^k}(2b/c - 1), Y_k
    what was computed and d_k ≥ ‖Y_k - S_k‖_F. At most tr/c eigenvalues exceed c, so that

        ‖S_k‖_F ≤ p_k = √(4n + tr/c·s_k²),   d_0 = (4/c)(g + 8u)·tr + 4u√n,
        d_{k+1} = 2 s_k d_k + d_k² + γ(p_k + d_k)² + 2u√n,                                 (2)

    with g, γ the relative errors of the two kinds of products. Beside max f, the result is then of
    norm at most √b·(a/2)·d_k (the error of T_m) + (a/2)·γ_n·√tr·(p_k + d_k) (the product with W) +
    12(u + u_stored)·√tr (entry by entry).
    """

    def __init__(self, forming, squaring, multiplying, side, u, stored, trace_terms):
        self.forming, self.squaring, self.multiplying = forming, squaring, multiplying
        self.side, self.u, self.stored = side, u, stored
        self.trace_factor = 1 + 2 * gamma(trace_terms, u)

    @classmethod
    def of(cls, kernel, wide, axis):
        u, stored = unit_roundoff(wide.dtype), unit_roundoff(kernel.dtype)
        side = min(kernel.shape)
        terms = product_terms(kernel.shape[axis])
        squaring = gamma(product_terms(side) + 2, u)
        return cls(gamma(terms, u), squaring, gamma(side, u), side, u, stored, terms + side)

    def excess(self, curve, reach, trace):
        """What rounding may add to f, for b = `reach` and this trace."""
        error = 4 / CUT * (self.forming + 8 * self.u) * trace + 4 * self.u * math.sqrt(self.side)
        for level in range(curve.level + 1):
            s = 2 * dataclasses.replace(curve, level=level).chebyshev(reach)
            p = math.sqrt(4 * self.side + trace / CUT * s**2)
            if level < curve.level:
                error = 2 * s * error + error**2 + self.squaring * (p + error) ** 2
                error += 2 * self.u * math.sqrt(self.side)
        root = math.sqrt(trace)
        product_error = self.multiplying * root * (p + error)
        entries = 12 * (self.u + self.stored) * root
        return curve.a / 2 * (math.sqrt(reach) * error + product_error) + entries

    def largest_trace(self, curve, reach):
        """Largest trace X for which the result stays below ρ; 0 if there is none."""
        room = 1 - curve.top - 1e-6
        low, high = 0.0, 4.0 * self.side
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.excess(curve, reach, middle) <= room else (low, middle)
            )
        return low

    def reaches(self, curve, x, total):
        """Whether b = `x` and the trace, as tensors, are within one of the curve's reaches."""
        within = [
            (x <= reach) & (total <= self.largest_trace(curve, reach)) for reach in REACHES[curve]
        ]
        return ops.any(ops.stack(within))
