"""Outward rounding, and the two facts about matrices that every proof here rests on.

Float64 arithmetic, rounded to nearest, errs by a relative amount of at most u = 2⁻⁵³ per operation,
and a sum of n products by at most γ_n·Σ|a||b|, γ_n = nu/(1 - nu), in whatever order it is formed
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Nothing else about the
linear algebra library is used: eigenvalues and factors that it returns are guesses to be checked.
"""

import math

import numpy as np

UNIT = 2.0**-53
# Absolute error of an operation that underflows, 2⁻¹⁰⁷⁵, with room to spare for sums of them; and
# the smallest number, for single operations.
TINY, SMALLEST = 2.0**-1000, 2.0**-1074
_NORMAL = 2.0**-1022
# Covers the rounding of a few operations on error bounds themselves.
SLACK = 1 + 2.0**-30
# Sides from which squared norms are guessed by so many powers, and what is tried above the guess,
# with a shift for the rounding of a factor.
_FEW, _POWERS, _ABOVE, _SHIFT = 200, 80, (1.0005, 1.002, 1.005, 1.01, 1.03), 1e-6


def gamma(terms):
    """γ_n of the module's text, rounded up; refuses sums too long for a bound."""
    product = terms * UNIT
    if not product < 0.01:
        raise OverflowError(f"no rounding bound for sums of {terms} terms")
    return product / (1 - product) * SLACK


def rounded(values, dtype):
    """Float64 array rounded to a dtype by name, to nearest and ties to even, as float64.

    Args:
        values: float64 array.
        dtype: `"float64"`, `"float32"`, `"float16"`, `"bfloat16"`, or an integer type's name.
    """
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return values.astype(dtype).astype(np.float64)
        # bfloat16 is the upper half of float32; through float32 as Keras's backends go.
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def up(x):
    """Float above `x` (elementwise)."""
    return np.nextafter(x, np.inf)


def down(x):
    """Float below `x` (elementwise)."""
    return np.nextafter(x, -np.inf)


def product_up(*factors):
    """Upper bound on a product of non-negative floats, 0·∞ = 0."""
    if any(f == 0 for f in factors):
        return 0.0
    total = 1.0
    for factor in factors:
        total = float(factor) if total == 1.0 else float(up(total * float(factor)))
    return total


def scaled_up(factor, values):
    """Upper bounds on the products of a float ≥ 0 and an array ≥ 0, elementwise; 0·∞ = 0."""
    if factor == 0:
        return np.zeros_like(values)
    with np.errstate(over="ignore", under="ignore"):
        return np.where(values == 0, 0.0, up(factor * values))


def sum_up(*terms):
    """Upper bound on a sum of non-negative floats."""
    total = 0.0
    for term in terms:
        total = float(term) if total == 0.0 else float(up(total + float(term)))
    return total


def ldexp_up(x, exponent):
    """Upper bound on x·2^exponent for x ≥ 0, exact but for what under- or overflows."""
    try:
        found = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
    return found if found >= _NORMAL else float(up(found))


def sqrt_up(x):
    """Upper bound on a square root."""
    return 0.0 if x == 0 else float(up(math.sqrt(x)))


def hypot_up(*terms):
    """Upper bound on √Σt² of non-negative floats."""
    largest = max(terms, default=0.0)
    if largest == 0 or not math.isfinite(largest):
        return float(largest)
    ratios = [float(up(t / largest)) for t in terms]
    return product_up(largest, sqrt_up(sum_up(*(product_up(r, r) for r in ratios))))


def row_norms_up(rows):
    """Upper bounds on the Euclidean norms of the rows of a float64 matrix."""
    rows = np.asarray(rows, dtype=np.float64)
    largest = float(np.max(np.abs(rows), initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return np.full(len(rows), largest)
    exponent = math.frexp(largest)[1]
    scaled = np.ldexp(rows, -exponent)
    squares = np.sum(scaled * scaled, axis=1) * (1 + gamma(rows.shape[1] + 4)) + TINY
    found = np.ldexp(np.sqrt(squares) * (1 + 4 * UNIT), exponent)
    return np.where(found < _NORMAL, up(found), found)


def frobenius_up(matrix):
    """Upper bound on the Frobenius norm of a real or complex array, or of `0.0`."""
    if np.ndim(matrix) == 0:
        return float(abs(matrix))
    flat = np.abs(matrix).reshape(1, -1)
    return float(row_norms_up(flat)[0]) * (1 + 8 * UNIT)


def times(a, b, a_error=0.0, b_error=0.0, terms=None):
    """Product of matrices known up to entrywise errors, with the error of every entry.

    Args:
        a, b: float64 matrices (…, k) and (k, …).
        a_error, b_error: arrays of the same shapes, or 0.0.
        terms: largest number of products of non-zeros in an entry, k by default.

    Returns:
        `(product, error)`.
    """
    size_a, size_b = np.abs(a), np.abs(b)
    terms = a.shape[-1] if terms is None else terms
    error = gamma(terms + 2) * (size_a @ size_b)
    if np.ndim(a_error):
        error = error + a_error @ size_b
    if np.ndim(b_error):
        error = error + size_a @ b_error
        if np.ndim(a_error):
            error = error + a_error @ b_error
    return a @ b, error * (1 + gamma(a.shape[-1] + 8)) * SLACK + terms * TINY


def has_square_root(matrix, shift):
    """Whether b + shift·I ⪰ 0 is proved for every matrix b of a stack, by a factor of each.

    With any R and D = b - RRᴴ, b + ‖D‖I = RRᴴ + D + ‖D‖I ⪰ 0. ‖D‖ is bounded by the computed
    Frobenius norm and γ·(‖b‖_F + ‖R‖_F²) for rounding.

    Args:
        matrix: (…, n, n) symmetric or Hermitian.
        shift: positive float or (…,) array.
    """
    try:
        root = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    side = matrix.shape[-1]
    difference = np.abs(matrix - root @ np.conj(np.swapaxes(root, -1, -2)))
    residual = np.sqrt(np.sum(difference * difference, axis=(-2, -1)))
    # ‖ |R||R|ᵀ ‖ and ‖ |b| ‖ by their largest row sums; a complex product is four real ones.
    size_root = np.abs(root)
    reach = size_root @ np.sum(size_root, axis=-2)[..., None]
    size = np.max(reach, axis=(-2, -1)) + np.max(np.sum(np.abs(matrix), axis=-1), axis=-1)
    terms = (4 if np.iscomplexobj(matrix) else 1) * side + 16
    bound = residual * (1 + gamma(side**2 + 16)) + gamma(terms) * size * (1 + gamma(4 * side + 16))
    bound = bound * SLACK + side * TINY
    return bool(np.all(np.isfinite(bound)) and np.all(bound <= shift))


def is_semidefinite(matrix, error=0.0):
    """Whether every symmetric matrix within the entrywise error of `matrix` is proved ⪰ 0.

    A symmetric Δ with |Δ| ≤ E is at least -diag(row sums of E). The matrix is scaled by powers of
    two, which is exact, to a diagonal near one. False means "not proved".

    Args:
        matrix: float64 (n, n), symmetric.
        error: (n, n) symmetric, or 0.0.
    """
    diagonal = np.diag(matrix)
    if not (np.all(np.isfinite(matrix)) and np.all(np.isfinite(error)) and np.all(diagonal > 0)):
        return False
    side = len(matrix)
    powers = -(np.frexp(diagonal)[1] // 2)
    scaled = np.ldexp(np.ldexp(matrix, powers[:, None]), powers[None, :])
    spread = 0.0
    if np.ndim(error):
        grown = np.ldexp(np.ldexp(error, powers[:, None]), powers[None, :])
        spread = np.sum(grown, axis=1) * (1 + gamma(side + 4)) + side * TINY
    for size in (128.0, 4.0 * side):  # enough as a rule, and what n terms need at worst
        shift = size * gamma(side + 16)
        shifted = np.array(scaled)
        # A hair more than the shift, for the rounding of this subtraction.
        shifted[np.diag_indices(side)] -= spread + shift * (1 + 2.0**-3)
        if has_square_root(shifted, shift):
            return True
    return False


def largest_eigenvalue_up(gram, error=0.0):
    """Proven c with A ⪯ cI for every symmetric A within the entrywise error of `gram`.

    Args:
        gram: (…, n, n) real or Hermitian; the bound is for all matrices of a stack.
        error: (n, n) entrywise error of a single matrix, or a float that bounds its norm.
    """
    side = gram.shape[-1]
    if np.ndim(error):
        error = float(np.max(np.sum(error, axis=-1))) * (1 + gamma(side + 4))
    top = max(float(np.max(np.linalg.eigvalsh(gram))), 0.0)
    if not (math.isfinite(top) and math.isfinite(error)):
        return math.inf
    excess, index = 32 * gamma(side + 16) * top + TINY, np.arange(side)
    for _ in range(40):
        shifted = -gram
        shifted[..., index, index] += top + excess
        # Half an excess for the factor, half for the rounding of the diagonal just formed.
        if has_square_root(shifted, excess / 2):
            return sum_up(top, 2 * excess, error)
        excess *= 4
    return math.inf


def norm_up(matrix, error=0.0):
    """Proven upper bound on ‖W‖ for every W within the entrywise error of a real matrix."""
    matrix = np.asarray(matrix, dtype=np.float64)
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if not math.isfinite(largest):
        return math.inf
    extra = frobenius_up(error)
    if largest == 0:
        return extra
    if 1 in matrix.shape:
        return sum_up(frobenius_up(matrix), extra)
    exponent = math.frexp(largest)[1]
    scaled = np.ldexp(matrix, -exponent)
    tall = scaled if scaled.shape[0] >= scaled.shape[1] else scaled.T
    gram, rounding = times(tall.T, tall)
    eigenvalue = largest_eigenvalue_up((gram + gram.T) / 2, rounding * (1 + 4 * UNIT))
    return sum_up(ldexp_up(sqrt_up(eigenvalue), exponent), extra)


def norm_near(matrix):
    """Proven upper bound on ‖W‖ of a real matrix, a few thousandths above it as a rule.

    For large matrices in a fraction of the time of `norm_up`: the guess is of the power method.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    side = min(matrix.shape, default=0)
    size = frobenius_up(matrix)
    if side <= _FEW or not TINY < size < 1 / TINY:
        return norm_up(matrix)
    scaled = np.ldexp(matrix, -math.frexp(size)[1])
    tall = scaled if scaled.shape[0] >= scaled.shape[1] else scaled.T
    gram = tall.T @ tall
    vector = gram[np.argmax(np.diag(gram))]
    for _ in range(_POWERS):
        vector = gram @ (vector / max(float(np.linalg.norm(vector)), TINY))
    # What the product may miss: ‖ |A|ᵀ|A| ‖ is at most the squared Frobenius norm, here 1.
    error, index = 2 * gamma(len(tall) + 4), np.arange(side)
    for factor in _ABOVE:
        top = float(np.linalg.norm(vector)) * factor
        shifted = -(gram + gram.T) / 2
        shifted[index, index] += top
        if has_square_root(shifted, _SHIFT * top):
            # Twice the shift, for the rounding of the diagonal just formed.
            squared = sum_up(top, 2 * _SHIFT * top, error)
            return ldexp_up(sqrt_up(squared), math.frexp(size)[1])
    return norm_up(matrix)
