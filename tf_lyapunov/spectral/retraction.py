"""Back to the matrices with orthonormal columns (or rows): the polar factor by few products."""

from keras import ops

from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.precision import full_precision, work_dtype

# (1 + e)^(-1/2) = Σ c_k eᵏ: its first terms.
COEFFICIENTS = (1.0, -1 / 2, 3 / 8, -5 / 16, 35 / 128)
# How large E = G - I may be for two, three and five of them: ¾e², ⅝e³ < 1e-6, e⁵/2 ≤ 5e-6; and
# for five, then three of what is left.
LINEAR, QUADRATIC, QUARTIC, NEAR = 1e-3, 0.01, 0.1, 0.5
# Newton-Schulz steps from far away: each multiplies small singular values by 3/2.
STEPS = 60


def polar_factor(matrix):
    """Nearest matrix with orthonormal columns, or rows of a wide one, by products alone.

        min ‖Q - X‖_F  s.t.  QᵀQ = I,      Q = X·G^(-1/2),   G = XᵀX                           (1)

    G is that of the smaller side n (XXᵀ, and Q = G^(-1/2)X, for a wide X). With E = G - I and
    bounds ‖E‖ ≤ ‖E‖_F, ‖E‖ ≤ ‖E²‖_F^(1/2) = e the series is cut where it may be,

        G^(-1/2) ≈ I - E/2            for ‖E‖_F ≤ 0.001,                                       (2)
                   ... + 3/8 E²       for e ≤ 0.01,
                   ... + E²(-5/16 E + 35/128 E²)   for e ≤ 1/10,

    which leaves ‖QᵀQ - I‖ ≤ 5·10⁻⁶ and rounding: two products of m·n² that form and apply G, and
    up to two of n³, 4mn² + 4n³ flops. To e ≤ 1/2 the second case follows the third. Farther away
    steps X ← X(3I - G)/2 come before, from X scaled to a norm of at most 1: they converge for
    every X of full rank, and where it has none, rounding decides what completes it.

    Args:
        matrix: `(..., m, n)` tensor, a stack of matrices; half formats are computed in float32.

    Returns:
        Tensor of the same shape and type; zero matrices stay, and NaN spreads.

    Example:

    >>> import numpy as np
    >>> q = polar_factor(np.array([[1.05, 0.0], [0.0, -0.95], [0.1, 0.0]], "float32"))
    >>> gram = np.asarray(ops.matmul(ops.transpose(q), q))
    >>> bool(np.allclose(gram, np.eye(2), atol=1e-6))
    True

    Reference: Higham, Functions of Matrices (2008), chapter 8; (2) is the Taylor series.
    """
    given = ops.convert_to_tensor(matrix)
    tall = given.shape[-2] >= given.shape[-1]
    x = ops.cast(given, work_dtype(given))
    eye = ops.eye(min(given.shape[-2:]), dtype=x.dtype)
    with full_precision():
        residual = _gram(x, tall) - eye
        # Comparisons are false for NaN and infinity.
        q = cond(
            _square_norm(residual) <= LINEAR**2,
            lambda: _applied(x, _polynomial(eye, residual), tall),
            lambda: _by_square(x, eye, residual, tall),
        )
    return ops.cast(q, given.dtype)


def tangent(matrix, direction):
    """Projection of a direction onto the tangent space at a matrix with orthonormal columns.

        Z - W·sym(WᵀZ)   (Z - sym(ZWᵀ)·W, for orthonormal rows),   sym(A) = (A + Aᵀ)/2          (3)

    The step of steepest descent on the manifold for a gradient Z, in the metric of ℝ^(m·n).

    Args:
        matrix: W, `(..., m, n)` tensor.
        direction: Z, of the same shape.

    Returns:
        Tensor of the type of `direction`.

    Example: the identity can only turn.

    >>> import numpy as np
    >>> z = np.array([[1.0, 2.0], [0.0, 1.0]], "float32")
    >>> np.asarray(tangent(np.eye(2, dtype="float32"), z)).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    given = ops.convert_to_tensor(direction)
    w = ops.convert_to_tensor(matrix)
    tall = w.shape[-2] >= w.shape[-1]
    w = ops.cast(w, work_dtype(w))
    z = ops.cast(given, w.dtype)
    with full_precision():
        part = ops.matmul(_turned(w), z) if tall else ops.matmul(z, _turned(w))
        normal = _applied(w, 0.5 * (part + _turned(part)), tall)
    return ops.cast(z - normal, given.dtype)


def _square_norm(x):
    """Largest square of a Frobenius norm in a stack."""
    return ops.max(ops.sum(ops.square(x), axis=(-2, -1)))


def _by_square(x, eye, residual, tall):
    square = ops.matmul(residual, residual)
    size = _square_norm(square)

    def near():
        factor = cond(
            size <= QUADRATIC**4,
            lambda: _polynomial(eye, residual, square),
            lambda: _series(eye, residual, square),
        )
        q = _applied(x, factor, tall)
        return cond(size <= QUARTIC**4, lambda: q, lambda: _refined(q, eye, tall))

    return cond(size <= NEAR**4, near, lambda: _from_far(x, eye, tall))


def _refined(x, eye, tall):
    residual = _gram(x, tall) - eye
    return _applied(x, _polynomial(eye, residual, ops.matmul(residual, residual)), tall)


def _polynomial(eye, residual, square=None):
    c0, c1, c2, *_ = COEFFICIENTS
    found = c0 * eye + c1 * residual
    return found if square is None else found + c2 * square


def _series(eye, residual, square):
    *_, c3, c4 = COEFFICIENTS
    last = ops.matmul(square, c3 * residual + c4 * square)
    return _polynomial(eye, residual, square) + last


def _from_far(x, eye, tall):
    """Newton-Schulz steps, and the series at last."""
    largest = ops.max(ops.abs(x), axis=(-2, -1), keepdims=True)
    x = x / ops.where(largest > 0, largest, ops.ones_like(largest))
    gram = _gram(x, tall)
    # ‖G‖ ≤ ‖G‖_F, with 1% for rounding.
    norm = 1.01 * ops.sqrt(ops.sum(ops.square(gram), axis=(-2, -1), keepdims=True))
    norm = ops.where(norm > 0, norm, ops.ones_like(norm))
    x, gram = x / ops.sqrt(norm), gram / norm

    def distance(gram):
        return _square_norm(gram - eye)

    def step(k, x, gram):
        x = _applied(x, 1.5 * eye - 0.5 * gram, tall)
        return k + 1, x, _gram(x, tall)

    _, x, gram = ops.while_loop(
        lambda k, x, gram: ops.logical_and(k < STEPS, distance(gram) > NEAR**2), step, (0, x, gram)
    )
    residual = gram - eye
    square = ops.matmul(residual, residual)
    # Without full rank the series would not converge.
    last = _refined(_applied(x, _series(eye, residual, square), tall), eye, tall)
    return ops.where(distance(gram) <= NEAR**2, last, x)


def _gram(x, tall):
    return ops.matmul(_turned(x), x) if tall else ops.matmul(x, _turned(x))


def _applied(x, factor, tall):
    return ops.matmul(x, factor) if tall else ops.matmul(factor, x)


def _turned(x):
    return ops.swapaxes(x, -1, -2)
