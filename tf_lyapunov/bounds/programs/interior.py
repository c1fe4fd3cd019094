"""Interior-point method for semidefinite programs whose variables are sector multipliers.

Every multiplier's matrix has rank two, which a general solver does not see: here a Newton step
costs one inverse of the matrix and one product, O((T + N)³), against O(N·T³ + N²T²) for T rows and
N multipliers. The answer is a candidate: `sdp` proves what it claims, or refuses.
"""

import dataclasses
import functools
import time

import numpy as np

from tf_lyapunov.progress import stage

# Reduction of the barrier parameter per level, and the Newton steps allowed in one.
_REDUCTION = 0.1
_STEPS = 60
# Flops per second that a step reaches on one modest core.
_FLOPS = 1e10


@dataclasses.dataclass(frozen=True)
class MultiplierProblem:
    """minimise θ  subject to  M = F_0 + θJ + Σ_i λ_i F_i ⪰ 0,  λ ≥ 0.

    F_i = e_k e_kᵀ - m_i(e_k w_iᵀ + w_i e_kᵀ) + p_i w_i w_iᵀ with k = rows[i]: the quadratic
    constraint of a unit with output signal k, input w_iᵀx and slopes [α, β], m = (α+β)/2, p = αβ.

    Args:
        constant: F_0, symmetric (T, T).
        direction: J, symmetric positive semidefinite (T, T).
        rows: int (N,), position of each unit's output signal.
        weights: w_i, (N, T).
        m, p: (N,), mean slope and product of slopes of each unit.
        groups: int (N,), units with the same number share a multiplier; None for one each.
    """

    constant: np.ndarray
    direction: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    m: np.ndarray
    p: np.ndarray
    groups: np.ndarray | None = None

    @property
    def size(self):
        """T, the side of M."""
        return len(self.constant)

    def matrix(self, theta, multipliers):
        """M at (θ, λ), float64 (T, T), symmetric."""
        lam = np.asarray(multipliers, dtype=np.float64)
        scaled = lam[:, None] * self.weights
        matrix = self.constant + theta * self.direction
        if np.any(self.p):
            product = self.weights.T @ (self.p[:, None] * scaled)
            matrix = matrix + (product + product.T) / 2
        matrix = np.array(matrix)
        cross = self.m[:, None] * scaled
        if self._has_own_rows:
            matrix[self.rows] -= cross
            matrix.T[self.rows] -= cross
            matrix[self.rows, self.rows] += lam
            return matrix
        np.add.at(matrix, self.rows, -cross)
        np.add.at(matrix.T, self.rows, -cross)
        np.add.at(matrix, (self.rows, self.rows), lam)
        return matrix

    @functools.cached_property
    def _has_own_rows(self):
        return len(np.unique(self.rows)) == len(self.rows)


@dataclasses.dataclass(frozen=True)
class InteriorPoint:
    """A strictly feasible point, by the floating-point Cholesky factorisation that found it.

    Attributes:
        theta: θ.
        multipliers: λ, (N,).
        gap: θ exceeds the optimum by about this much, on the central path.
        steps: Newton steps used so far.
    """

    theta: float
    multipliers: np.ndarray
    gap: float
    steps: int


def estimated_interior_cost(widths):
    """`(seconds, bytes)` of LipSDP by `minimise`, roughly, for signal sizes `widths`."""
    first = min(widths[0], widths[1]) if len(widths) > 2 else widths[0]
    units = float(sum(widths[1:-1]))
    size = first + units
    flops = 3 * size**3 + 4 * units * size**2 + 4 * units**2 * size + 30 * units**2
    return 0.02 + _STEPS * flops / _FLOPS, 8 * (8 * size**2 + 14 * units**2)


def _factor(matrix):
    if not np.all(np.isfinite(matrix)):
        return None
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None


def _newton(problem, inverse, lam, sharpness, share):
    """Gradient and Hessian of sharpness·θ - log det M - Σ log λ over (θ, groups)."""
    w, m, p = problem.weights, problem.m, problem.p
    at = inverse[problem.rows]
    a = at[:, problem.rows]
    b = at @ w.T
    d = w @ (inverse @ w.T)
    c = b.T
    mi, pi, mj, pj = m[:, None], p[:, None], m[None, :], p[None, :]
    hessian = (a - mi * c) * (a - mj * b) + (b - mi * d) * (-mj * a + pj * b)
    hessian += (-mi * a + pi * c) * (c - mj * d) + (-mi * b + pi * d) * (-mj * c + pj * d)
    hessian[np.diag_indices(len(lam))] += 1 / lam**2
    gradient = -(np.diag(a) - 2 * m * np.diag(b) + p * np.diag(d)) - 1 / lam
    through = inverse @ problem.direction
    q = through @ inverse
    # e_iᵀQw_i for every unit at once.
    mixed = np.einsum("ij,ij->i", q[problem.rows], w)
    own = np.einsum("ij,ij->i", w @ q, w)
    edge = q[problem.rows, problem.rows] - 2 * m * mixed + p * own
    corner = np.einsum("ij,ji->", through, through)
    if share is not None:
        gradient, edge = share.T @ gradient, share.T @ edge
        hessian = share.T @ hessian @ share
    full = np.empty((len(edge) + 1, len(edge) + 1))
    full[0, 0], full[0, 1:], full[1:, 0], full[1:, 1:] = corner, edge, edge, hessian
    return np.concatenate([[sharpness - np.trace(through)], gradient]), full


def minimise(problem, theta, multipliers, *, tol=1e-8, levels=40, scale=0.0, deadline=None):
    """Follows the central path from a strictly feasible point.

    Args:
        problem: `MultiplierProblem`.
        theta, multipliers: a strictly feasible start; λ > 0, equal within groups.
        tol: stop at an estimated gap of tol·max(|θ|, scale).
        levels: largest number of barrier parameters.
        scale: size of θ below which accuracy is absolute.
        deadline: `time.monotonic()` value after which the path is cut short, or None.

    Returns:
        List of `InteriorPoint`, one per barrier parameter, the last the best; empty if the start
        is not strictly feasible.
    """
    with stage("Newton steps") as shown:
        return _path(problem, theta, multipliers, tol, levels, scale, deadline, shown)


def _path(problem, theta, multipliers, tol, levels, scale, deadline, shown):
    lam = np.array(multipliers, dtype=np.float64)
    share = None
    if problem.groups is not None:
        share = np.zeros((len(lam), int(problem.groups.max()) + 1))
        share[np.arange(len(lam)), problem.groups] = 1.0
    factor = _factor(problem.matrix(theta, lam))
    if factor is None or np.any(lam <= 0):
        return []
    points, steps = [], 0
    barriers = problem.size + len(lam)
    scale = max(scale, np.finfo(float).tiny)
    gap = max(abs(theta), scale)

    def cost(theta, lam, sharpness):
        if np.any(lam <= 0):
            return np.inf, None
        factor = _factor(problem.matrix(theta, lam))
        if factor is None:
            return np.inf, None
        logs = 2 * np.sum(np.log(np.diag(factor))) + np.sum(np.log(lam))
        return sharpness * theta - logs, factor

    for _ in range(levels):
        sharpness = barriers / gap
        value = cost(theta, lam, sharpness)[0]
        stuck = False
        for _ in range(_STEPS):
            half = np.linalg.solve(factor, np.eye(problem.size))
            gradient, hessian = _newton(problem, half.T @ half, lam, sharpness, share)
            unit = 1 / np.sqrt(np.maximum(np.diag(hessian), np.finfo(float).tiny))
            scaled = hessian * unit[:, None] * unit[None, :]
            try:
                step = -unit * np.linalg.solve(scaled, unit * gradient)
            except np.linalg.LinAlgError:
                stuck = True
                break
            decrement = -float(gradient @ step)
            steps += 1
            shown.advance()
            if not np.isfinite(decrement) or decrement <= 1e-10:
                break
            move = step[1:] if share is None else share @ step[1:]
            shrinking = move < 0
            length = 1.0
            if np.any(shrinking):
                length = min(1.0, 0.99 * float(np.min(-lam[shrinking] / move[shrinking])))
            while length > 1e-10:
                new, trial = cost(theta + length * step[0], lam + length * move, sharpness)
                if new <= value - 0.05 * length * decrement:
                    break
                length *= 0.5
            else:
                stuck = True
                break
            theta, lam = theta + length * step[0], lam + length * move
            value, factor = new, trial
            late = deadline is not None and time.monotonic() > deadline
            if decrement < 0.1 or late:
                break
        points.append(InteriorPoint(float(theta), lam.copy(), gap, steps))
        late = deadline is not None and time.monotonic() > deadline
        if stuck or late or gap <= tol * max(abs(theta), scale):
            break
        gap *= _REDUCTION
    return points
