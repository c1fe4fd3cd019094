"""Storages and multipliers: candidates of a solver, believed once `dissipation.proves` them."""

import math

import numpy as np

from tf_lyapunov.bounds.programs.sdp import check_solver
from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF
from tf_lyapunov.verification.dissipation import form, proves, smallest_theta

# Sides of M above which no semidefinite program is tried unasked: minutes instead of seconds.
LARGEST_SIDE = 80
# θ above the estimate, relative to its size: what the proof's rounding may cost.
_EXCESSES = tuple(4.0**k * UNIT_ROUNDOFF for k in range(4, 22))
_SHARES = (0.0, *np.geomspace(1e-10, 1.0, 21))


def proved_theta(system, supply, *, solver="clarabel", optimise=None, seconds=None):
    """`(θ, P, Λ)` with a small θ for which (1) of `verification.dissipation` is proved, or None.

    The storage of the layer's parametrisation is scaled first; where a semidefinite program is
    solved too, its answer is moved towards that one by growing shares until it is proved.

    Args:
        system: `System`.
        supply: `(Q, S, R)`.
        solver: cvxpy's solver.
        optimise: whether P and Λ are optimised; None: where cvxpy is there and the system small.
        seconds: time limit of the solver.
    """
    side = system.states + system.units + system.inputs
    candidates = []
    start = _started(system)
    if start is not None:
        candidates.append(_scaled(system, supply, *start))
    if optimise or (optimise is None and side <= LARGEST_SIDE and _has(solver)):
        check_solver(solver)
        found = _solved(system, supply, start, solver, seconds)
        if found is not None:
            anchor = candidates[0] if candidates else _inside(system, *found)
            for share in _SHARES:
                mixed = [(1 - share) * a + share * b for a, b in zip(found, anchor, strict=True)]
                candidates.append((*mixed,))
    ranked = sorted(
        ((smallest_theta(system, *c, supply), i) for i, c in enumerate(candidates)),
    )
    best = None
    for theta, index in ranked:
        if not math.isfinite(theta) or (best is not None and theta >= best[0]):
            break
        size = abs(theta) + float(np.max(np.abs(supply[2]), initial=0.0)) + 1e-300
        for excess in _EXCESSES:
            wanted = theta + excess * size
            if best is not None and wanted >= best[0]:
                break
            if proves(system, *candidates[index], supply, wanted):
                best = wanted, *candidates[index]
                break
        # What comes later is no better than this one's excess.
        if best is not None and best[0] <= theta + 1e-9 * size:
            break
    return best


def proved_rate(system, rate=None, *, solver="clarabel", optimise=None):
    """`(a, P, Λ)` with contraction at rate a proved, or None; the first one at most `rate`."""
    best = None
    start = _started(system)
    side = system.states + system.units
    if start is not None:
        for factor in (1.0, 0.5, 2.0, 0.1, 10.0):
            pair = start[0], factor * start[1]
            found = _smallest_rate(system, *pair)
            if found is not None and (best is None or found < best[0]):
                best = found, *pair
    wanted = rate if rate is not None else 1.0
    is_short = best is None or best[0] > wanted
    if is_short and (optimise or (optimise is None and side <= LARGEST_SIDE and _has(solver))):
        check_solver(solver)
        pair = _solved(system, None, start, solver, None, squared_rate=wanted**2)
        found = None if pair is None else _smallest_rate(system, *pair)
        if found is not None and (best is None or found < best[0]):
            best = found, *pair
    return best


def _smallest_rate(system, storage, multipliers):
    """Smallest a ≤ 1 of a grid of floats that P and Λ prove, or None."""

    def holds(rate):
        # The product is rounded: a² is to be no more than the rate's.
        return proves(system, storage, multipliers, squared_rate=math.nextafter(rate * rate, 0.0))

    if not holds(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _has(solver):
    try:
        check_solver(solver)
    except ImportError:
        return False
    return True


def _started(system):
    """Storage of the parametrisation, or that of a linear system by its Lyapunov equation."""
    if system.storage is not None:
        return system.storage, system.multipliers
    if system.units:
        return None
    n = system.states
    a = system.step[:, :n]
    radius = float(np.max(np.abs(np.linalg.eigvals(a)), initial=0.0))
    if radius >= 1:
        return None
    from scipy.linalg import solve_discrete_lyapunov

    c = system.output[:, :n]
    storage = solve_discrete_lyapunov((a / math.sqrt(radius**2 / 2 + 0.5)).T, np.eye(n) + c.T @ c)
    return (storage + storage.T) / 2, np.zeros(0)


def _scaled(system, supply, storage, multipliers):
    """(cP, cΛ) with the smallest θ, c by golden section on its logarithm."""

    def value(c):
        return smallest_theta(system, c * storage, c * multipliers, supply)

    grid = 10.0 ** np.linspace(-6, 6, 25)
    values = [value(c) for c in grid]
    index = int(np.argmin(values))
    low, high = np.log(grid[max(index - 1, 0)]), np.log(grid[min(index + 1, len(grid) - 1)])
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(24):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        if value(math.exp(first)) <= value(math.exp(second)):
            high = second
        else:
            low = first
    best = min((grid[index], math.exp((low + high) / 2)), key=value)
    return best * storage, best * multipliers


def _inside(system, storage, multipliers):
    """A point to move to where no other is known: more storage and larger multipliers."""
    size = float(np.trace(storage)) / max(system.states, 1)
    return storage + size * np.eye(system.states), multipliers * 2 + 1e-3 * size


def _solved(system, supply, start, solver, seconds, squared_rate=1.0):
    """Candidate `(P, Λ)` of a semidefinite program in the coordinates of the start, or None."""
    import cvxpy as cp

    n, q, m = system.states, system.units, system.inputs
    scale_x, scale_w = np.eye(n), np.ones(q)
    if start is not None:
        try:
            scale_x = np.linalg.inv(np.linalg.cholesky(start[0])).T
        except np.linalg.LinAlgError:
            pass
        scale_w = 1 / np.sqrt(
            np.maximum(start[1], 1e-12 * max(float(np.max(start[1], initial=0)), 1e-300))
        )
    step = np.linalg.solve(scale_x, _columns(system.step, scale_x, scale_w))
    neurons = _columns(system.neurons, scale_x, scale_w) / scale_w[:, None]
    output = _columns(system.output, scale_x, scale_w)
    side = n + q + m
    pick = np.eye(side)
    x, w, u = pick[:n], pick[n : n + q], pick[n + q :]
    p, theta = cp.Variable((n, n), symmetric=True), cp.Variable()
    matrix = squared_rate * x.T @ p @ x - step.T @ p @ step
    constraints = []
    lam = np.zeros(0)
    if q:
        lam = cp.Variable(q, nonneg=True)
        alpha, beta = system.sector.alpha, system.sector.beta
        cross = w.T @ cp.diag(lam) @ neurons
        matrix = matrix - (alpha + beta) * (cross + cross.T) + 2 * w.T @ cp.diag(lam) @ w
        if alpha * beta:
            matrix = matrix + 2 * alpha * beta * neurons.T @ cp.diag(lam) @ neurons
    if supply is None:
        matrix = matrix[: n + q, : n + q]
        constraints += [matrix >> theta * np.eye(n + q), p >> theta * np.eye(n), cp.trace(p) == n]
        objective = cp.Maximize(theta)
    else:
        q_matrix, s_matrix, r_matrix = supply
        cross = u.T @ s_matrix @ output
        known = output.T @ q_matrix @ output + cross + cross.T + u.T @ r_matrix @ u
        constraints += [matrix + known + theta * u.T @ u >> 0, p >> 0]
        objective = cp.Minimize(theta)
    problem = cp.Problem(objective, constraints)
    options = {} if seconds is None else {"time_limit": float(seconds)}
    try:
        problem.solve(solver=solver.upper(), **options)
    except (cp.SolverError, ValueError, ArithmeticError):
        return None
    if p.value is None or not np.all(np.isfinite(p.value)):
        return None
    back = np.linalg.inv(scale_x)
    storage = back.T @ p.value @ back
    multipliers = np.maximum(lam.value, 0.0) / scale_w**2 if q else lam
    return (storage + storage.T) / 2, multipliers


def _columns(rows, scale_x, scale_w):
    n, q = len(scale_x), len(scale_w)
    return np.hstack([rows[:, :n] @ scale_x, rows[:, n : n + q] * scale_w, rows[:, n + q :]])


__all__ = ["LARGEST_SIDE", "form", "proved_rate", "proved_theta"]
