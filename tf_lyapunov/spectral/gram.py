"""Guaranteed upper bounds on the largest eigenvalue and singular value, from products alone.

For a positive semidefinite G and any c > 0 let X = 2G/c - I and T the Chebyshev polynomials.
With θ = acosh(max(1, ‖T_{2^k}(X)‖_F)),

    λ_max(G) ≤ (c/2)·(1 + cosh(θ / 2^k)),                                           (1)

because |T_m(x)| = cosh(m·acosh x) for x ≥ 1 and ‖·‖₂ ≤ ‖·‖_F. It holds for *every* c; c near
λ_max makes it tight: eigenvalues below c stay in [-1, 1], so that n of them add √n to the norm
and log(2√n)/2^k to θ/2^k. T_{2m} = 2T_m² - I takes one product. Unlike power iteration this
never underestimates, and unlike an SVD it costs milliseconds under any compiler.

Rounding. With Y = 2T the recursion is Y ← YᵀY - 2I. It is run forwards in floating point, and
the bound is read backwards from what was computed: if Y' = YᵀY - 2I + E then, for any matrix Y,
symmetric or not, ‖Y‖₂² = ‖YᵀY‖₂ ≤ ‖Y'‖₂ + 2 + ‖E‖_F. One square root per level halves the
angle, as in (1), and each level's own error enters where it was made: nothing is accumulated.

Complex Hermitian H = S + iK (S symmetric, K skew) is stored as the *real* matrix Z = S + K, which
has the same Frobenius norm and stands for exactly one Hermitian matrix. Then

    H²  is stored as  ½(Z + Zᵀ)² - (Zᵀ)²                                            (2)

(S² - K² + SK + KS): two real products instead of four.
"""

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# Inner products are cut into pieces of this many terms, whose sums are added: γ grows with the
# length of a piece plus their number, not with their product.
PIECE = 256
# Squarings k in (1) with a guess of λ_max, and without one. Each costs 2n³ flops and divides the
# excess by four: that of σ is about acosh(√n)²/(8·4^k), 0.6% for n = 256 and k = 4.
SQUARINGS, FREE_SQUARINGS = 4, 6
# Without a guess, two coarse bounds find c: (squarings, what to divide the bound by). The
# first cannot overflow for n ≤ 4096, the second ends 6% above λ_max at worst.
COARSE = ((3, 1.3), (4, 1.06))
DOWN = 2.0**-40
# Identities of a larger side are made where they are used, not kept in the graph.
LARGEST_CONSTANT = 256
# Sums of squares outside this range are formed again after scaling the kernel to entries ≤ 1.
# Inside, squares of squares neither overflow nor lose more than 1e-15 to underflow in float32.
SAFE_TRACE = (1e-10, 1e15)


def _transposed(x):
    axes = list(range(len(x.shape)))
    return ops.transpose(x, [*axes[:-2], axes[-1], axes[-2]])


def _pieces(length):
    """Number of equal pieces and the γ index (piece length plus additions) of a cut product."""
    count = max(1, math.ceil(length / PIECE))
    return count, math.ceil(length / count) + count - 1


def product(a, b, axis=-1):
    """`a @ bᵀ` (`axis=-1`) or `aᵀ @ b` (`axis=-2`), in pieces along the contracted axis."""
    length = a.shape[axis]
    count, _ = _pieces(length)
    size = math.ceil(length / count)
    total = None
    for start in range(0, length, size):
        stop = min(start + size, length)
        if count == 1:
            x, y = a, b
        elif axis == -1:
            x, y = a[..., start:stop], b[..., start:stop]
        else:
            x, y = a[..., start:stop, :], b[..., start:stop, :]
        part = ops.matmul(x, _transposed(y)) if axis == -1 else ops.matmul(_transposed(x), y)
        total = part if total is None else total + part
    return total


def trace(x):
    """Sum of the diagonal over the last two axes (`ops.trace` makes three passes over x)."""
    side = x.shape[-1]
    return ops.sum(ops.reshape(x, (*x.shape[:-2], side * side))[..., :: side + 1], axis=-1)


def product_terms(length):
    """Index n of the γ_n that bounds the rounding of `product` over `length` terms."""
    return _pieces(length)[1]


def sum_of_squares(x):
    """Σ x² over the last two axes; positive terms in two sums, so its relative error is ≤ γ_{2n+4}.

    Dividing the rows' sums by the largest keeps a compiler from merging the two sums into one,
    whose γ would be that of n² terms.
    """
    rows = ops.sum(ops.square(x), axis=-1)
    top = ops.maximum(ops.max(rows), 1e-30)
    return top * ops.sum(rows / top, axis=-1)


def frobenius_norm_upper_bound(x):
    """‖x‖_F of a matrix with entries of modulus ≤ 1, rounded up."""
    terms = x.shape[-1] + x.shape[-2] + 8
    return ops.sqrt(sum_of_squares(x)) * (1 + gamma(terms, unit_roundoff(x.dtype)))


def _double_and_square(y, paired, identity):
    """2·T_{2m} from Y = 2·T_m, for symmetric (Y) or Hermitian matrices (stored as S + K)."""
    if not paired:
        return product(y, y, axis=-2) - identity
    turned = _transposed(y)
    return 0.5 * _squared(y + turned) - _squared(turned) - identity


def _squared(x):
    """`x @ x`, in pieces; a batched product need not transpose what it does not cut."""
    return ops.matmul(x, x) if _pieces(x.shape[-1])[0] == 1 else product(x, _transposed(x))


def chebyshev(gram, c, squarings, *, paired=False):
    """`[2T_1(X), 2T_2(X), 2T_4(X), …]` as computed, and the right side of (1) with their rounding.

    Args:
        gram: `(..., n, n)`, see `eigenvalue_upper_bound`.
        c: positive scalar of (1), X = 2G/c - I.
        squarings: k in (1).
        paired: see `eigenvalue_upper_bound`.

    Returns:
        `(powers, bound)`: k + 1 matrices like `gram`, and a scalar ≥ ‖G‖₂, the largest over
        leading axes; infinite if the last matrix overflows.
    """
    side, u = gram.shape[-1], unit_roundoff(gram.dtype)
    identity = _twice_identity(side, keras.backend.standardize_dtype(gram.dtype))
    powers = [gram * (4.0 / c) - identity]
    for _ in range(squarings):
        powers.append(_double_and_square(powers[-1], paired, identity))
    # ‖E‖_F ≤ a·‖Y‖_F² + 2u√n ≤ a·n·‖Y‖₂² + 2u√n, where a gathers the products (γ of their
    # length; for (2): twice the first, once the second) and the subtractions.
    terms = product_terms(side)
    growth = side * (3 * gamma(terms + 6, u) if paired else gamma(terms + 1, u))
    if growth >= 0.5:
        raise ValueError(
            f"The smaller side of a kernel is too large for a bound in {gram.dtype}. "
            f"Received: {side}. Use a float64 kernel."
        )
    shift = 2 + 2 * u * math.sqrt(side)
    # Scaled by 2^-40, y up to 1e31 may be squared; what underflows is below 2^-23 per entry.
    squared = ops.max(sum_of_squares(powers[-1] * DOWN))
    norm = ops.sqrt(squared) * ((1 + gamma(2 * side + 8, u)) / DOWN) + side * 2.0**-22
    for _ in range(squarings):
        norm = ops.sqrt((norm + shift) * ((1 + 8 * u) / (1 - growth)))
    # G = (c/4)(Y₀ + 2I) up to 3u per entry, so up to 3u√n·‖G‖₂ in norm.
    bound = c / 4 * (norm + 2) * ((1 + 8 * u) / (1 - 4 * u * math.sqrt(side)))
    # A c far below λ_max overflows: (1) then says nothing, and the caller's other bound stands.
    return powers, ops.where(squared < 1e36, bound, np.inf)


def _twice_identity(side, dtype):
    # A graph holds a constant per use, and several copies of it where it is compiled.
    return 2.0 * (
        np.eye(side, dtype=dtype) if side <= LARGEST_CONSTANT else ops.eye(side, dtype=dtype)
    )


def _looseness(side, squarings):
    """φ with (1) ≤ c·φ whenever all eigenvalues are at most c."""
    return (1 + math.cosh(math.acosh(math.sqrt(side)) / 2**squarings)) / 2


def eigenvalue_upper_bound(gram, trace, *, paired=False, near=None, squarings=None):
    """Upper bound on the largest eigenvalue over a batch of positive semidefinite matrices.

    Args:
        gram: `(..., n, n)` as computed (it need not be symmetric to the last bit), real symmetric
            or, if `paired`, Hermitian S + iK stored as S + K. Entries within `SAFE_TRACE`.
        trace: `(...)` its traces.
        paired: see `gram`.
        near: scalar guess of the largest eigenvalue, for instance the bound that training keeps
            the kernel at. It steers c in (1) and nothing else. Without it, c is found by two
            coarse bounds, at twice the cost.
        squarings: k in (1), at most 6; by default 4, or 6 without `near`.

    Returns:
        Scalar λ with ‖G‖₂ ≤ λ for the matrices given, all rounding of this function included
        (that of forming G is the caller's).
    """
    side, u = gram.shape[-1], unit_roundoff(gram.dtype)
    if side == 1:
        return ops.max(ops.abs(gram))
    squares = sum_of_squares(gram)
    frobenius = ops.sqrt(ops.max(squares)) * (1 + gamma(2 * side + 8, u))
    # Σλ²/Σλ ≤ λ_max ≤ Σλ
    ceiling = ops.maximum(ops.max(trace), 1e-30)
    floor = ops.max(squares / (ops.maximum(trace, 0.0) + 1e-6 * ceiling))
    floor = ops.maximum(floor, 1e-30)
    if near is None:
        # A c below λ_max costs little, one above it costs its distance: come from below.
        guess = floor
        for coarse_levels, retreat in COARSE:
            coarse = chebyshev(gram, guess, coarse_levels, paired=paired)[1]
            guess = ops.maximum(ops.minimum(coarse, frobenius) / retreat, floor)
        levels = FREE_SQUARINGS if squarings is None else squarings
    else:
        levels = SQUARINGS if squarings is None else squarings
        # Kernels with λ_max ≤ near/φ are shown to be below `near`.
        guess = near / _looseness(side, levels)
    c = ops.minimum(ops.maximum(guess, floor), ceiling)
    return ops.minimum(chebyshev(gram, c, levels, paired=paired)[1], frobenius)


def dense_norm_upper_bound(kernel, *, near=None, squarings=None):
    """Upper bound on the largest singular value of a matrix.

        σ(W)² = λ_max(WᵀW) ≤ (c/2)(1 + cosh(acosh(max(1, ‖T_{2^k}(2WᵀW/c - I)‖_F)) / 2^k))

    on the smaller side (WWᵀ for a wide kernel). A guarantee for the matrix given: holds in exact
    arithmetic whatever the rounding of the computation, which adds γ_m·‖W‖_F² to σ² and is what
    keeps the bound from being tighter. Costs 2mn² + 2kn³ flops, n the smaller side.

    Args:
        kernel: `(in, out)` tensor, any floating-point type.
        near: guess of σ (a float or scalar tensor), see `eigenvalue_upper_bound`.
        squarings: k above; more is tighter and slower.

    Returns:
        Scalar tensor (float32, or float64 for float64 kernels); NaN if the kernel is not finite.

    Example:

    >>> import numpy as np
    >>> bound = float(dense_norm_upper_bound(np.diag([3.0, 1.0]).astype("float32")))
    >>> 3.0 <= bound < 3.01
    True

    Reference: Chebyshev form of Gram iteration (Delattre et al., 2023); sound form.
    """
    return dense_bounds(kernel, near=near, squarings=squarings)[0]


def dense_bounds(kernel, *, near=None, squarings=None):
    """Upper bounds `(σ, ‖W‖_F)` of a matrix; see `dense_norm_upper_bound`."""
    kernel = ops.convert_to_tensor(kernel)
    if len(kernel.shape) != 2:
        raise ValueError(f"A dense kernel must be a matrix. Received: shape={kernel.shape}.")
    kernel = ops.cast(kernel, work_dtype(kernel))
    with full_precision():
        axis = -2 if kernel.shape[0] >= kernel.shape[1] else -1
        gram = product(kernel, kernel, axis)
        total = trace(gram)
        bounds = _dense_bounds(kernel, axis, gram, total, near, squarings)
        low, high = SAFE_TRACE
        safe = ops.logical_and(total > low, total < high)
        return cond(
            safe,
            lambda: bounds,
            lambda: _scaled_dense_bounds(kernel, axis, near, squarings),
        )


def _scaled_dense_bounds(kernel, axis, near, squarings):
    """`_dense_bounds` of very large, very small, zero or non-finite kernels."""
    scale, kernel = unit_entries(kernel)
    gram = product(kernel, kernel, axis)
    near = None if near is None else near / scale
    sigma, frobenius = _dense_bounds(kernel, axis, gram, trace(gram), near, squarings)
    # Scaling rounds every entry by 2u: ‖ΔW‖₂ ≤ 2u‖W‖_F.
    u = unit_roundoff(kernel.dtype)
    return scale * (sigma + 4 * u * frobenius), scale * frobenius * (1 + 8 * u)


def unit_entries(kernel):
    """`(scale, kernel / scale)` with entries of modulus ≤ 1; a zero kernel keeps scale 1."""
    largest = ops.max(ops.abs(kernel))
    scale = ops.where(largest > 0, largest, ops.ones_like(largest))
    return scale, kernel / scale


def _dense_bounds(kernel, axis, gram, trace, near, squarings):
    u = unit_roundoff(kernel.dtype)
    side, terms = gram.shape[0], product_terms(kernel.shape[axis])
    # |ΔG| ≤ γ|W|ᵀ|W| entry by entry, hence ‖ΔG‖₂ ≤ γ·trace(G); the trace itself is a sum of
    # non-negative terms.
    trace = trace * (1 + 2 * gamma(terms + side, u))
    near = None if near is None else ops.cast(near, kernel.dtype) ** 2
    top = eigenvalue_upper_bound(gram, trace, near=near, squarings=squarings)
    top = ops.minimum(top + gamma(terms, u) * trace, trace) * (1 + 8 * u)
    frobenius = ops.sqrt(trace) * (1 + 8 * u)
    sigma = ops.minimum(ops.sqrt(top) * (1 + 8 * u), frobenius)
    return ops.where(trace < np.inf, sigma, np.nan), frobenius


def gram_norm_upper_bound(real, imag=None, *, near=None, squarings=None):
    """Upper bound on the spectral norms of a batch of real or complex matrices A = R + iJ.

        σ(A)² = λ_max(AAᴴ),   AAᴴ stored as (R + J)(R - J)ᵀ + 2JJᵀ,

    on the smaller side. Same guarantee as `dense_norm_upper_bound`.

    Args:
        real: `(..., a, b)` R.
        imag: `(..., a, b)` J, or `None` for real matrices.
        near: guess of the largest norm.
        squarings: squarings of the Chebyshev recursion.

    Returns:
        Scalar tensor: the bound over all leading axes.

    Example:

    >>> import numpy as np
    >>> eye = np.eye(2, dtype="float32")
    >>> bound = float(gram_norm_upper_bound(3 * eye, 4 * eye))
    >>> 5.0 <= bound < 5.05
    True
    """
    real = ops.convert_to_tensor(real)
    dtype = work_dtype(real)
    real = ops.cast(real, dtype)
    scale = ops.max(ops.abs(real))
    if imag is not None:
        imag = ops.cast(imag, dtype)
        scale = ops.maximum(scale, ops.max(ops.abs(imag)))
    scale = ops.where(scale > 0, scale, ops.ones_like(scale))
    near = None if near is None else near / scale
    u = unit_roundoff(dtype)
    with full_precision():
        if imag is None:
            top, trace = paired_bounds(real / scale, None, None, near=near, squarings=squarings)
        else:
            real, imag = real / scale, imag / scale
            top, trace = paired_bounds(
                real + imag, real - imag, math.sqrt(2.0) * imag, near=near, squarings=squarings
            )
    # Entries err by 4u in scaling, adding and by the factor √2: to first order 16u·‖A‖_F·‖A‖_F.
    top = top + 16 * u * trace
    return scale * ops.sqrt(top) * (1 + 8 * u)


def paired_bounds(plus, minus, twisted, *, near=None, squarings=None):
    """Upper bounds `(λ, trace)` of AAᴴ over a batch, from R + J, R - J and √2·J.

    With `minus` and `twisted` None, `plus` is a real matrix R and AAᴴ = RRᵀ. λ includes the
    rounding of forming AAᴴ from what is given (not of the arguments) and is NaN if they are not
    finite. Entries must be of modulus up to about 1.
    """
    u = unit_roundoff(plus.dtype)
    axis = -1 if plus.shape[-2] <= plus.shape[-1] else -2
    paired = minus is not None
    if paired:
        gram = product(plus, minus, axis) + product(twisted, twisted, axis)
    else:
        gram = product(plus, plus, axis)
    total = trace(gram)
    side, terms = gram.shape[-1], product_terms(plus.shape[axis])
    # ‖ΔG‖_F ≤ γ(‖R+J‖‖R-J‖ + 2‖J‖²) ≤ 3γ·trace, as ‖R+J‖‖R-J‖ ≤ ‖R‖² + ‖J‖².
    error = (3 if paired else 1) * gamma(terms + 1, u)
    total = total * ((1 + 2 * gamma(side, u)) / (1 - error))
    near = None if near is None else ops.cast(near, plus.dtype) ** 2
    top = eigenvalue_upper_bound(gram, total, paired=paired, near=near, squarings=squarings)
    largest = ops.max(total)
    top = (top + error * largest) * (1 + 8 * u)
    return ops.where(ops.sum(total) < np.inf, top, np.nan), largest
