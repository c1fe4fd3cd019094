"""Candidates for regions of attraction: a matrix inequality solved by cvxpy, on sets that adapt.

What is found here is proved elsewhere (`verification.loops`); nothing here is a proof.
"""

import dataclasses
import math
import warnings

import numpy as np

from tf_lyapunov.bounds.programs.sdp import check_solver
from tf_lyapunov.verification import loops

# Shares of the box tried until one is feasible, and growths of the set around an ellipsoid found.
_SHARES = (1.0, 0.6, 0.35, 0.2, 0.1, 0.05, 0.02, 0.005)
_GROWTHS = (1.3, 1.12, 1.05, 1.0)
# Strictness that is asked of the solver in scaled variables, and taken off the ellipsoid.
# The next is asked where the proof of what was found fails: solvers end near their tolerance.
_MARGINS, _INSIDE = (1e-7, 1e-6, 1e-5, 1e-4), 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """An ellipsoid and multipliers; `first` and `reads` say on which set; `size` is ½ log det P."""

    first: np.ndarray
    reads: np.ndarray
    shape: np.ndarray
    lam: np.ndarray
    mu: np.ndarray
    size: float


def candidates(plant, controller, box, rate, solver):
    """`Candidate`s to prove one after the other: the best by every margin, then all the others."""
    held = []
    for margin in _MARGINS:
        best = search(plant, controller, box, rate, solver, margin, held)
        if best is None:
            break
        yield best
    yield from sorted(held, key=lambda found: found.size)


def search(plant, controller, box, rate, solver, margin=_MARGINS[0], held=None):
    """The best `Candidate` found, or None; `held` takes all that were found on the way.

    Volumes are enlarged by tr(P_k⁻¹P), which majorises log det P, and the set by growing and
    shrinking it around the ellipsoid that was found.
    """
    full = loops.form_on(plant, controller, box, np.inf, np.full(len(plant.kinds), np.inf))
    n, count = len(box), len(plant.kinds)
    last = len(full.widths) - count
    first, reads = full.widths[n:last], full.widths[last:]
    best, held = None, [] if held is None else held
    for share in _SHARES:
        found = solve(
            plant, controller, box, share * first, share * reads, rate, solver, margin=margin
        )
        if found is not None:
            held.append(found)
        if found is not None and (best is None or found.size < best.size):
            best = found
        elif best is not None:
            break
    if best is None or not len(full.widths[n:]):
        return best
    for growth in _GROWTHS:
        for _ in range(3):
            extent = _extent(best.shape, full.bounds[n:]) * growth
            tried = solve(
                plant, controller, box, np.minimum(extent[: last - n], first),
                np.minimum(extent[last - n :], reads), rate, solver, start=best.shape,
                margin=margin,
            )  # fmt: skip
            if tried is None or not tried.size < best.size - 1e-3:
                break
            best = tried
    return best


def _extent(shape, rows):
    """max cᵀx over the ellipsoid, for all rows c."""
    return np.sqrt(np.maximum(np.sum(rows * np.linalg.solve(shape, rows.T).T, axis=1), 0.0))


def solve(plant, controller, box, first, reads, rate, solver, *, start=None, rounds=3, blend=1.0,
          margin=_MARGINS[0]):  # fmt: skip
    """`Candidate` on one set, or None where the solver finds none.

    Args:
        first, reads: widths of the set, see `loops.form_on`.
        start: P near which to begin.
        rounds: of the majorised log det.
        blend: share of every sector's half width that is kept, around its middle.
        margin: strictness of the inequality, in scaled variables.
    """
    form = loops.form_on(plant, controller, box, first, reads)
    low = np.concatenate([form.alpha, form.low])
    high = np.concatenate([form.beta, form.high])
    middle = (low + high) / 2
    low, high = middle + blend * (low - middle), middle + blend * (high - middle)
    return _solved(form, box, low, high, rate, solver, start, rounds, margin)


def _solved(form, box, low, high, rate, solver, start, rounds, margin):
    import cvxpy as cp

    n, size = len(box), form.motion.shape[1]
    units = len(form.alpha)
    reads = np.concatenate([form.signal, form.gap_reads(size)])
    # Every signal in units of what it can be, so that the solver sees numbers near one.
    scale = np.concatenate([box, np.ones(size - n)])
    for k in range(size - n):
        reach = np.abs(reads[k]) * scale
        steep = max(abs(low[k]), abs(high[k]), 1e-6)
        scale[n + k] = max(steep * float(reach.sum()), 1e-9)
    motion = form.motion * scale / box[:, None]
    reads, picks = reads * scale, np.diag(scale)[n:]
    p = cp.Variable((n, n), symmetric=True)
    weight = cp.Variable(max(size - n, 1), nonneg=True)
    first = np.eye(size)[:, :n]
    matrix = rate * first @ p @ first.T - motion.T @ p @ motion
    terms = np.zeros((size * size, max(size - n, 1)))
    for k in range(size - n):
        v, w = reads[k], picks[k]
        term = np.outer(w - low[k] * v, high[k] * v - w)
        # In units in which the multiplier is near one.
        terms[:, k] = (term + term.T).ravel() / (2 * scale[n + k] ** 2)
    matrix = matrix - cp.reshape(terms @ weight, (size, size), order="C")
    constraints = [matrix >> margin * np.eye(size)]
    for row, width in zip(form.bounds, form.widths, strict=True):
        row = row * box
        if not np.any(row):
            continue
        if width <= 0:
            return None
        row = (row / width)[None]
        constraints.append(cp.bmat([[np.eye(1), row], [row.T, p]]) >> 0)
    gradient = cp.Parameter((n, n), PSD=True)
    program = cp.Problem(cp.Minimize(cp.trace(gradient @ p)), constraints)
    value = np.eye(n) if start is None else np.linalg.inv(start * np.outer(box, box))
    best, previous = None, math.inf
    for _ in range(rounds):
        gradient.value = (value + value.T) / 2 / np.trace(value) * n
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on accuracy, which a proof decides
                program.solve(solver=solver.upper())
        except cp.error.SolverError:
            break
        usable = program.status in ("optimal", "optimal_inaccurate")
        if not usable or p.value is None or not np.all(np.isfinite(p.value)):
            break
        found = (p.value + p.value.T) / 2
        sign, size_now = np.linalg.slogdet(found)
        if sign <= 0 or np.linalg.eigvalsh(found)[0] <= 0:
            break
        if size_now < previous:
            best, gained, previous = (found, weight.value.copy()), previous - size_now, size_now
            if gained < 1e-3:
                break
        else:
            break
        value = np.linalg.inv(found)
    if best is None:
        return None
    found, multipliers = best
    grow = 1 + _INSIDE
    shape = found / np.outer(box, box) * grow
    multipliers = np.maximum(multipliers[: size - n], 0.0) / scale[n:] ** 2 * grow
    widths = form.widths
    count = size - n - units
    last = len(widths) - count
    return Candidate(
        widths[n:last], widths[last:], (shape + shape.T) / 2, multipliers[:units],
        multipliers[units:], 0.5 * float(np.linalg.slogdet(shape)[1]),
    )  # fmt: skip


def ready(solver):
    """Refuses solvers that are not cvxpy's or not installed; see `check_solver`."""
    if solver not in ("clarabel", "scs", "mosek"):
        raise ValueError(
            f"`solver` must be 'clarabel', 'scs' or 'mosek'. Received: solver={solver!r}."
        )
    check_solver(solver)
