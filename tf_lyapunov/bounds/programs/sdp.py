"""One door to semidefinite solvers, and the float64 proofs that make their answers trustworthy.

A solver's status is not a proof. What it returns are multipliers; any non-negative multipliers
prove a bound once the matrix they make is shown to be positive semidefinite, whatever the solver
did. Nothing in this package imports cvxpy but this module.
"""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.programs.interior import MultiplierProblem, minimise
from tf_lyapunov.errors import SolverFailure
from tf_lyapunov.program import rounding

SOLVERS = ("structured", "interior", "clarabel", "scs", "mosek")
# Ours, of NumPy and SciPy alone.
_OWN = ("structured", "interior")
UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Norms below are sums of fewer than 10⁷ rounded terms.
_NORM_SLACK = 1 + 1e-8


@dataclasses.dataclass(frozen=True)
class SolverResult:
    """What a solver returned: a candidate, not a proof.

    Attributes:
        theta: objective value.
        multipliers: λ (N,), clipped to be non-negative.
        status: the solver's own word.
        solver: its name.
        seconds: wall time.
        points: earlier `(theta, multipliers)` that are farther from the boundary, best first.
    """

    theta: float
    multipliers: np.ndarray
    status: str
    solver: str
    seconds: float
    points: tuple = ()


def check_solver(solver):
    """Refuses names that are not in `SOLVERS`, and solvers that are not installed.

    Raises:
        ValueError: unknown solver.
        ImportError: naming the extra to install.
    """
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {SOLVERS}. Received: solver={solver!r}.")
    if solver in _OWN:
        return
    try:
        import cvxpy
    except ImportError:
        raise ImportError(
            f"The solver {solver!r} needs cvxpy. Install it with `pip install 'tf_lyapunov[sdp]'`, "
            "or use solver='structured', which needs no other package."
        ) from None
    if solver.upper() not in cvxpy.installed_solvers():
        raise ImportError(
            f"The solver {solver!r} is not installed. Received: cvxpy with "
            f"{sorted(set(cvxpy.installed_solvers()) & {'CLARABEL', 'SCS', 'MOSEK'})}. "
            f"Run `pip install {solver}`, or use solver='structured'."
        )


def solve(
    problem, start=None, *, solver="structured", blocks=None, tol=1e-8, scale=0.0, seconds=None
):
    """Candidate multipliers of a `MultiplierProblem`.

    Args:
        problem: `MultiplierProblem`.
        start: strictly feasible `(theta, multipliers)`; needed by `"structured"`.
        solver: `"structured"` or `"interior"` (NumPy, exploits the multipliers' rank two), or
            `"clarabel"`, `"scs"`, `"mosek"` through cvxpy.
        blocks: sizes of diagonal blocks if M is block tridiagonal: cvxpy then gets one cone per
            pair of neighbours instead of one of size T (exact, by chordal decomposition).
        tol: accuracy asked for, relative to max(|θ|, scale).
        scale: size of θ below which accuracy is absolute.
        seconds: time after which the search is cut short, or None.

    Returns:
        `SolverResult`; verify before use.

    Raises:
        SolverFailure: if no multipliers came back.
        ImportError: if the solver is not installed.
    """
    check_solver(solver)
    begin = time.monotonic()
    if solver not in _OWN:
        return _solve_with_cvxpy(problem, solver, blocks, tol, seconds)
    if start is None:
        raise ValueError("`start` must be a strictly feasible point for solver='structured'.")
    deadline = None if seconds is None else begin + seconds
    try:
        points = minimise(problem, *start, tol=tol, scale=scale, deadline=deadline)
    except np.linalg.LinAlgError:  # matrices beyond float64
        points = ()
    if not points:
        raise SolverFailure(
            "The structured solver found no interior point: its start is not strictly feasible in "
            "floating point. Received: weights of very different sizes.",
            "structured",
            "no start",
        )
    best = points[-1]
    earlier = tuple((q.theta, q.multipliers) for q in reversed(points[:-1]))
    elapsed = time.monotonic() - begin
    status = "optimal" if best.gap <= 10 * tol * max(abs(best.theta), scale) else "cut short"
    return SolverResult(best.theta, best.multipliers, status, solver, elapsed, earlier)


def _solve_with_cvxpy(problem, solver, blocks, tol, seconds):
    import cvxpy as cp

    begin = time.monotonic()
    count = len(problem.rows)
    groups = np.arange(count) if problem.groups is None else problem.groups
    z = cp.Variable(int(groups.max()) + 1, nonneg=True)
    theta = cp.Variable()
    share = np.zeros((count, z.shape[0]))
    share[np.arange(count), groups] = 1.0
    lam = share @ z
    rows = np.zeros((count, problem.size))
    rows[np.arange(count), problem.rows] = 1.0
    weights = problem.weights
    diagonal = cp.diag(lam)
    cross = rows.T @ cp.diag(cp.multiply(problem.m, lam)) @ weights
    matrix = problem.constant + theta * problem.direction + rows.T @ diagonal @ rows
    matrix = matrix - cross - cross.T
    if np.any(problem.p):
        matrix = matrix + weights.T @ cp.diag(cp.multiply(problem.p, lam)) @ weights
    constraints = []
    if blocks is None or len(blocks) < 3:
        constraints.append((matrix + matrix.T) / 2 >> 0)
    else:
        ends = np.cumsum([0, *blocks])
        kept = None
        for index in range(len(blocks) - 1):
            a, b, c = ends[index], ends[index + 1], ends[index + 2]
            first = matrix[a:b, a:b] if kept is None else matrix[a:b, a:b] - kept
            last = index == len(blocks) - 2
            kept = matrix[b:c, b:c] if last else cp.Variable((c - b, c - b), symmetric=True)
            clique = cp.bmat([[first, matrix[a:b, b:c]], [matrix[b:c, a:b], kept]])
            constraints.append((clique + clique.T) / 2 >> 0)
    program = cp.Problem(cp.Minimize(theta), constraints)
    options = {
        "clarabel": {"tol_gap_rel": max(tol, 1e-9), "tol_gap_abs": max(tol, 1e-9)},
        "scs": {"eps_abs": max(tol, 1e-8), "eps_rel": max(tol, 1e-8), "max_iters": 200_000},
        "mosek": {},
    }[solver]
    if seconds is not None:
        name = {"clarabel": "time_limit", "scs": "time_limit_secs"}.get(solver)
        options |= {name: seconds} if name else {}
    try:
        program.solve(solver=solver.upper(), **options)
    except cp.error.SolverError as error:
        raise SolverFailure(
            f"{solver} returned nothing usable: {error}. Use solver='structured'.", solver, "error"
        ) from None
    if z.value is None or theta.value is None or not np.all(np.isfinite(z.value)):
        raise SolverFailure(
            f"{solver} returned no multipliers. Received: status={program.status!r}. "
            "Use solver='structured'.",
            solver,
            str(program.status),
        )
    values = share @ np.maximum(np.asarray(z.value, dtype=np.float64), 0.0)
    elapsed = time.monotonic() - begin
    return SolverResult(float(theta.value), values, str(program.status), solver, elapsed)


# Proofs -----------------------------------------------------------------------------------------


def smallest_parameter(matrix, inputs):
    """Smallest θ ≥ 0 with M + θ diag(I, 0) ⪰ 0, as computed; inf if there is none.

    A candidate: `verified_point` and `verified_block_semidefinite` prove.

    Args:
        matrix: M, float64 (n, n), symmetric.
        inputs: size of I.

    Example:

    >>> round(smallest_parameter(np.array([[0.0, 1.0], [1.0, 2.0]]), 1), 12)
    0.5
    """
    from scipy.linalg import solve_triangular

    if not np.all(np.isfinite(matrix)):
        return math.inf
    try:
        factor = np.linalg.cholesky(matrix[inputs:, inputs:])
    except np.linalg.LinAlgError:
        return math.inf
    left = solve_triangular(factor, matrix[inputs:, :inputs], lower=True, check_finite=False)
    need = left.T @ left - matrix[:inputs, :inputs]
    return max(float(np.linalg.eigvalsh((need + need.T) / 2)[-1]), 0.0)


def verified_block_semidefinite(diagonal, lower=(), diagonal_errors=None, lower_errors=None):
    """Whether a symmetric block tridiagonal matrix is proved to be positive semidefinite.

    Congruence by powers of two gives M a diagonal near one. A block Cholesky factor L of M - ηI is
    computed in float64; with E = M - ηI - LLᵀ, evaluated a posteriori and enlarged by the rounding
    made in evaluating it, M ⪰ (η - ‖E‖)I. How L was found does not enter the proof.

    Args:
        diagonal: list of symmetric blocks (w_k, w_k).
        lower: list of blocks (k+1, k), one fewer.
        diagonal_errors, lower_errors: lists of arrays of the blocks' shapes, or of scalars, that
            bound the entrywise distance to the blocks that are meant; None for exact ones.

    Returns:
        bool. False means "not proved".

    Example:

    >>> verified_block_semidefinite([np.array([[2.0, 1.0], [1.0, 2.0]])])
    True
    >>> verified_block_semidefinite([np.array([[1.0, 2.0], [2.0, 1.0]])])
    False

    Reference: Rump, Verification of positive definiteness (BIT 2006), with an explicit residual.
    """
    from scipy.linalg import solve_triangular

    if not all(np.all(np.isfinite(block)) for block in (*diagonal, *lower)):
        return False
    if any(np.any(np.diag(block) <= 0) for block in diagonal):
        return False
    powers = [-np.round(np.log2(np.diag(block)) / 2).astype(int) for block in diagonal]
    blocks = [np.ldexp(a, q[:, None] + q[None, :]) for a, q in zip(diagonal, powers, strict=True)]
    below = [
        np.ldexp(c, r[:, None] + q[None, :])
        for c, q, r in zip(lower, powers[:-1], powers[1:], strict=True)
    ]
    exponents = [q[:, None] + q[None, :] for q in powers]
    own = _error_norms(blocks, exponents, diagonal_errors)
    exponents = [r[:, None] + q[None, :] for q, r in zip(powers[:-1], powers[1:], strict=True)]
    off = _error_norms(below, exponents, lower_errors)
    # An a-priori guess of the error, then the a-posteriori one decides.
    sizes = np.array([len(a) for a in blocks])
    traces = np.array([np.trace(a) for a in blocks])
    widest = sizes + np.concatenate([[0], sizes[:-1]])
    guess = 3 * rounding.gamma(int(widest.max()) + 8, UNIT) * traces.max()
    shift = 2 * (guess + own.max() + 2 * off.max(initial=0.0))
    if not np.isfinite(shift):
        return False
    error = np.zeros(len(blocks))
    errors_below = np.zeros(max(len(blocks) - 1, 0))
    previous = None
    for k, block in enumerate(blocks):
        size = len(block)
        shifted = block - shift * np.eye(size)
        left, target = None, shifted
        if k:
            left = solve_triangular(previous, below[k - 1].T, lower=True, check_finite=False).T
            if not np.all(np.isfinite(left)):
                return False
            target = shifted - left @ left.T
        try:
            factor = np.linalg.cholesky((target + target.T) / 2)
        except np.linalg.LinAlgError:
            return False
        factor = np.tril(factor)
        product = factor @ factor.T
        mass = float(np.sum(factor**2)) + float(np.linalg.norm(block)) + shift * np.sqrt(size)
        terms = size + 8
        if k:
            product = product + left @ left.T
            mass += float(np.sum(left**2))
            terms += left.shape[1]
            residual = np.linalg.norm(below[k - 1] - left @ previous.T)
            reach = np.linalg.norm(left) * np.linalg.norm(previous) + np.linalg.norm(below[k - 1])
            residual += rounding.gamma(left.shape[1] + 8, UNIT) * reach
            errors_below[k - 1] = residual + off[k - 1]
        error[k] = np.linalg.norm(shifted - product) + rounding.gamma(terms, UNIT) * mass + own[k]
        previous = factor
    total = np.array(error)
    total[1:] += errors_below
    total[:-1] += errors_below
    worst = float(np.max(total)) * _NORM_SLACK
    return bool(np.isfinite(worst) and worst <= shift)


def _error_norms(blocks, exponents, errors):
    """Frobenius norms of entrywise errors after scaling."""
    if errors is None:
        return np.zeros(len(blocks))
    spreads = [np.broadcast_to(e, b.shape) for e, b in zip(errors, blocks, strict=True)]
    return np.array(
        [np.linalg.norm(np.ldexp(e, q)) for e, q in zip(spreads, exponents, strict=True)]
    )


def matrix_with_error(
    problem, theta, multipliers, *, entry_error=0.0, constant_error=0.0, weight_error=None
):
    """M of a `MultiplierProblem` and a bound on every entry's distance to the matrix meant.

    Args:
        problem: `MultiplierProblem`.
        theta, multipliers: the point.
        entry_error: relative error of the entries of the weights.
        constant_error: entrywise error of the constant matrix.
        weight_error: (N, T), absolute error of the entries of the weights, or None.

    Returns:
        `(matrix, error)`, float64 (T, T).
    """
    lam = np.asarray(multipliers, dtype=np.float64)
    matrix = problem.matrix(theta, lam)
    matrix = (matrix + matrix.T) / 2
    size = np.abs(problem.constant) + abs(theta) * np.abs(problem.direction)
    absolute = np.abs(lam[:, None] * problem.weights)
    cross = np.zeros_like(matrix)
    np.add.at(cross, problem.rows, np.abs(problem.m)[:, None] * absolute)
    size = size + cross + cross.T
    if np.any(problem.p):
        size = size + np.abs(problem.weights).T @ (np.abs(problem.p)[:, None] * absolute)
    np.add.at(size, (problem.rows, problem.rows), lam)
    relative = rounding.gamma(len(lam) + 24, UNIT) + 2.1 * entry_error
    error = (relative * (1 + 1e-6)) * size + constant_error
    if weight_error is not None:
        drift = lam[:, None] * weight_error
        moved = np.zeros_like(matrix)
        np.add.at(moved, problem.rows, np.abs(problem.m)[:, None] * drift)
        moved = moved + moved.T
        if np.any(problem.p):
            through = np.abs(problem.weights).T @ (np.abs(problem.p)[:, None] * drift)
            moved += through + through.T + weight_error.T @ (np.abs(problem.p)[:, None] * drift)
        error = error + moved * (1 + 1e-6)
    return matrix, error


def verified_point(
    problem, theta, multipliers, *, entry_error=0.0, constant_error=0.0, weight_error=None
):
    """Whether M(θ, λ) ⪰ 0 is proved, and λ ≥ 0."""
    lam = np.asarray(multipliers)
    if not np.all(np.isfinite(lam)) or np.any(lam < 0) or not np.isfinite(theta):
        return False
    matrix, error = matrix_with_error(
        problem, theta, lam, entry_error=entry_error, constant_error=constant_error,
        weight_error=weight_error,
    )  # fmt: skip
    return verified_block_semidefinite([matrix], (), [error])


def verified_minimum(problem, result, interior, *, entry_error=0.0, constant_error=0.0):
    """Smallest θ near a solver's answer for which M ⪰ 0 is proved.

    Moves from the answer towards a strictly interior point by growing shares s of the way,
    10⁻¹³ … 1: (1-s)(θ, λ) + s(θ', λ') is feasible if both are, and more so as s grows.

    Args:
        problem: `MultiplierProblem`.
        result: `SolverResult`.
        interior: strictly feasible `(theta, multipliers)`.
        entry_error, constant_error: as for `matrix_with_error`.

    Returns:
        `(theta, multipliers)`, proved, or None.
    """
    errors = {"entry_error": entry_error, "constant_error": constant_error}
    shares = (0.0, *np.geomspace(1e-13, 1.0, 27))
    best = None

    def proved(anchor, share):
        theta = (1 - share) * result.theta + share * anchor[0]
        lam = (1 - share) * result.multipliers + share * anchor[1]
        is_proved = verified_point(problem, theta, lam, **errors)
        return (float(theta), lam) if is_proved else None

    for anchor in [*result.points[:3], interior]:
        if best is None and (best := proved(anchor, 0.0)) is not None:
            break
        # By bisection: the last share but one that is not proved, the first that is.
        found, low, high = proved(anchor, 1.0), 0, len(shares) - 1
        while found is not None and high - low > 1:
            middle = (low + high) // 2
            closer = proved(anchor, shares[middle])
            found, low, high = (found, middle, high) if closer is None else (closer, low, middle)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
        if best is not None and best[0] <= result.theta + 1e-7 * abs(result.theta):
            break
    return best


__all__ = [
    "SOLVERS",
    "MultiplierProblem",
    "SolverResult",
    "check_solver",
    "solve",
    "verified_block_semidefinite",
    "verified_minimum",
    "verified_point",
]
