"""Eigenvalue margins with rigorous rounding bounds, and quasi-dominance.

Cascade matrices are small (number of layers + 1), so every verdict can afford an a-posteriori
error bound: a status of LAPACK or of an LP is never taken for a proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF


def symmetric_matrix(matrix, name: str = "matrix") -> np.ndarray:
    """`matrix` as a finite, symmetric float64 array.

    Raises:
        ValueError: if it is not square, not finite, or not symmetric.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] == 0:
        raise ValueError(f"`{name}` must be a square matrix. Received: shape={array.shape}.")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{name}` must hold finite numbers. Received: NaN or infinity.")
    if not np.array_equal(array, array.T):
        raise ValueError(
            f"`{name}` must be symmetric. Received: largest difference to its "
            f"transpose {np.max(np.abs(array - array.T))}. Pass (M + M.T)/2 if that is meant."
        )
    return array


def smallest_eigenvalue(matrix) -> tuple[float, float]:
    """Smallest eigenvalue of a symmetric matrix, and a bound on its error.

    With computed eigenpairs MV ≈ VΛ, E = MV - VΛ and F = VᵀV - I, Weyl's theorem gives
    |λ_i(M) - Λ_i| ≤ ‖E‖ + (‖M‖ + ‖Λ‖)‖F‖; both residuals are enlarged by the rounding made in
    computing them. Rigorous for the matrix as given, whatever LAPACK did.

    Args:
        matrix: shape (n, n), finite and exactly symmetric.

    Returns:
        `(value, rounding_bound)`, float64: the true eigenvalue is within `rounding_bound` of
        `value`.

    Raises:
        ValueError: if the matrix is not square, finite and symmetric.

    Example:
        >>> value, bound = smallest_eigenvalue([[1.0, 0.5], [0.5, 1.0]])
        >>> abs(value - 0.5) <= bound < 1e-13
        True

    Reference: Weyl's inequality with the nearest orthogonal matrix to V (sound form).
    """
    m = symmetric_matrix(matrix)
    n = m.shape[0]
    scale = float(np.max(np.abs(m)))
    if scale == 0.0:
        return 0.0, 0.0
    # A power of two: exact, and keeps the squares below from over- or underflowing.
    power = 2.0 ** math.floor(math.log2(scale)) if 1e-300 < scale < 1e300 else 1.0
    values, vectors = np.linalg.eigh(m / power)
    norm = float(np.linalg.norm(m / power))
    size = norm + float(np.max(np.abs(values)))
    # An inner product of length n+1 is off by at most γ times that of the absolute values.
    gamma = (n + 4) * UNIT_ROUNDOFF / (1 - (n + 4) * UNIT_ROUNDOFF)
    residual = np.linalg.norm((m / power) @ vectors - vectors * values)
    residual += gamma * np.sqrt(n) * 2 * size
    overlap = np.linalg.norm(vectors.T @ vectors - np.eye(n)) + gamma * 2 * n
    # The factor covers the rounding of this last line and of the Frobenius norms above.
    bound = (residual + size * overlap) * (1 + 2 * n * n * UNIT_ROUNDOFF + 2.0**-20)
    # Underflow in products is below the smallest normal number per term.
    return float(values[0]) * power, float(bound) * power + n * 2.3e-308


@dataclass(frozen=True)
class Semidefiniteness:
    """Verdict on M ⪰ 0. True in a condition only if proved.

    Attributes:
        holds: the smallest eigenvalue is proved to be at least zero.
        refuted: the smallest eigenvalue is proved to be negative. Neither: too close to call.
        value: computed smallest eigenvalue (of the equilibrated matrix if `equilibrate`).
        rounding_bound: the true one is within this distance of `value`.
    """

    holds: bool
    refuted: bool
    value: float
    rounding_bound: float

    def __bool__(self) -> bool:
        return self.holds


def equilibrated(matrix) -> np.ndarray:
    """Congruent matrix DMD with a diagonal of about one, D of powers of two (hence exact).

    PSD if and only if `matrix` is; rows with a non-positive diagonal are left as they are.

    Example:
        >>> equilibrated([[4.0, 1.0], [1.0, 16.0]])
        array([[1.   , 0.125],
               [0.125, 1.   ]])
    """
    m = symmetric_matrix(matrix)
    diagonal = np.diag(m)
    exponents = np.where(
        diagonal > 0, -np.round(np.log2(np.where(diagonal > 0, diagonal, 1.0)) / 2), 0.0
    ).astype(int)
    return np.ldexp(m, exponents[:, None] + exponents[None, :])


def is_positive_semidefinite(
    matrix, *, entry_error: float = 0.0, equilibrate: bool = True
) -> Semidefiniteness:
    """Decide M ⪰ 0 by eigenvalue, with a bound on every rounding error.

    Args:
        matrix: shape (n, n), symmetric, float64.
        entry_error: the entries are within this relative distance of the matrix that is meant,
            e.g. `UNIT_ROUNDOFF` if they were correctly rounded.
        equilibrate: decide on the congruent `equilibrated` matrix, which is sharper when the
            rows have different sizes.

    Returns:
        `Semidefiniteness`.

    Example:
        >>> is_positive_semidefinite([[1.0, 0.5], [0.5, 1.0]]).holds
        True
        >>> is_positive_semidefinite([[1.0, 1.0], [1.0, 1.0]]).holds  # singular: cannot be proved
        False
    """
    m = equilibrated(matrix) if equilibrate else symmetric_matrix(matrix)
    if not np.all(np.isfinite(m)):
        return Semidefiniteness(False, False, float("nan"), float("inf"))
    value, bound = smallest_eigenvalue(m)
    bound += 1.001 * entry_error * float(np.linalg.norm(m))
    bound = float(bound)
    return Semidefiniteness(value - bound >= 0, value + bound < 0, value, bound)


@dataclass(frozen=True)
class QuasiDominance:
    """Verdict on weighted diagonal dominance m_ii p_i ≥ Σ_{j≠i} |m_ij| p_j with some p > 0.

    Attributes:
        holds: dominance with the weights `p` was checked in exact arithmetic.
        p: the weights found, with mean one.
        margin: min_i (m_ii p_i - Σ_{j≠i} |m_ij| p_j), the LP's optimum; negative if it fails.
        is_m_matrix: cross-check: the comparison matrix has a non-negative inverse.
    """

    holds: bool
    p: tuple[float, ...]
    margin: float
    is_m_matrix: bool

    def __bool__(self) -> bool:
        return self.holds


def comparison_matrix(matrix) -> np.ndarray:
    """Diagonal of M with off-diagonal entries -|m_ij|.

    Example:
        >>> comparison_matrix([[2.0, 1.0], [1.0, 3.0]])
        array([[ 2., -1.],
               [-1.,  3.]])
    """
    m = symmetric_matrix(matrix)
    return np.diag(np.diag(m) + np.abs(np.diag(m))) - np.abs(m)


def _is_m_matrix(comparison: np.ndarray) -> bool:
    try:
        inverse = np.linalg.inv(comparison)
    except np.linalg.LinAlgError:
        return False
    tolerance = 2.0**-40 * np.abs(inverse).max()
    return bool(np.all(np.diag(comparison) > 0) and np.all(inverse >= -tolerance))


def quasi_dominance(matrix) -> QuasiDominance:
    """Weights p > 0 that make a symmetric matrix diagonally dominant, if there are any.

    Solves the LP  max t  subject to  m_ii p_i - Σ_{j≠i} |m_ij| p_j ≥ t,  mean(p) = 1,  p ≥ 0,
    then checks the inequalities for the returned p without rounding. Sufficient for M ⪰ 0, not
    necessary.

    Args:
        matrix: shape (n, n), symmetric; for Theorem 3 pass -A.

    Returns:
        `QuasiDominance`.

    Example:
        >>> quasi_dominance([[1.0, 0.5], [0.5, 1.0]]).margin
        0.5

    Reference: Rahnama et al., Definition 3 and Corollary 1, as published.
    """
    from scipy.optimize import linprog

    m = symmetric_matrix(matrix)
    n = m.shape[0]
    comparison = comparison_matrix(m)
    solution = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([-comparison, np.ones((n, 1))]),
        b_ub=np.zeros(n),
        A_eq=np.append(np.ones(n), 0.0)[None, :],
        b_eq=[float(n)],
        bounds=[(0.0, None)] * n + [(None, None)],
        method="highs",
    )
    p = solution.x[:n] if solution.status == 0 else np.ones(n)
    # The LP's vertices may hold exact zeros that the definition does not allow.
    p = np.maximum(p, np.finfo(np.float64).eps)
    exact = [Fraction(float(weight)) for weight in p]
    slack = [
        sum(Fraction(float(row[j])) * exact[j] for j in np.flatnonzero(row)) for row in comparison
    ]
    margin = float(min(slack))
    return QuasiDominance(
        holds=min(slack) >= 0,
        p=tuple(float(weight) for weight in p),
        margin=margin,
        is_m_matrix=_is_m_matrix(comparison),
    )


def maximize_smallest_eigenvalue(
    constant, directions, *, iterations: int = 60, enough: float = math.inf
) -> np.ndarray:
    """Weights x > 0 that maximise λ_min(F_0 + Σ x_i F_i), up to the solver's accuracy.

    Solved by a log-det barrier; the caller must check the result, which is a candidate and no
    proof.

    Args:
        constant: F_0, shape (n, n), symmetric.
        directions: F_i, shape (k, n, n), symmetric.
        enough: stop once the smallest eigenvalue is known to exceed this.
        iterations: number of barrier parameters tried (each four times the last).

    Returns:
        Positive weights, shape (k,), float64.

    Example:
        >>> F = [[[1.0, 0.0], [0.0, -1.0]]]
        >>> x = maximize_smallest_eigenvalue([[0.0, 0.0], [0.0, 2.0]], F)
        >>> abs(float(x[0]) - 1.0) < 1e-6
        True
    """
    f0 = symmetric_matrix(constant, "constant")
    fs = np.asarray(directions, dtype=np.float64)
    k, n = fs.shape[0], f0.shape[0]
    x = np.ones(k)
    t = float(np.linalg.eigvalsh(f0 + np.tensordot(x, fs, 1))[0]) - 1.0
    all_directions = np.concatenate([fs, -np.eye(n)[None]])
    # Sharp from the start: a soft barrier would drive unbounded directions of x to infinity.
    sharpness = 16.0 * (n + k) / max(1.0, float(np.max(np.abs(f0))))

    def cost(x, t):
        if np.any(x <= 0):
            return np.inf
        try:
            factor = np.linalg.cholesky(f0 + np.tensordot(x, fs, 1) - t * np.eye(n))
        except np.linalg.LinAlgError:
            return np.inf
        return -sharpness * t - 2 * np.sum(np.log(np.diag(factor))) - np.sum(np.log(x))

    def newton_step(x, t):
        inverse = np.linalg.inv(f0 + np.tensordot(x, fs, 1) - t * np.eye(n))
        products = inverse @ all_directions
        gradient = -np.trace(products, axis1=1, axis2=2)
        gradient[:k] -= 1 / x
        gradient[k] -= sharpness
        hessian = np.einsum("iab,jba->ij", products, products)
        hessian[np.arange(k), np.arange(k)] += 1 / x**2
        # Weights may differ by many orders of magnitude: solve with a unit diagonal.
        with np.errstate(over="ignore", invalid="ignore"):
            unit = 1 / np.sqrt(np.maximum(np.diag(hessian), np.finfo(np.float64).tiny))
            scaled_hessian = hessian * unit[:, None] * unit[None, :]
        step = -unit * np.linalg.lstsq(scaled_hessian, unit * gradient, rcond=1e-14)[0]
        return step, float(-gradient @ step)

    for _ in range(iterations):
        for _ in range(30):
            try:
                step, decrement = newton_step(x, t)
            except np.linalg.LinAlgError:  # the boundary is reached within rounding
                return x
            if not np.isfinite(decrement) or decrement < 1e-7:
                break
            length, start = 1.0, cost(x, t)
            while length > 1e-12 and not (
                cost(x + length * step[:k], t + length * step[k])
                <= start - 0.1 * length * decrement
            ):
                length *= 0.5
            if length <= 1e-12:
                break
            x, t = x + length * step[:k], t + length * step[k]
        if (n + k) / sharpness < 1e-12 or t > enough:
            break
        sharpness *= 4.0
    return x
