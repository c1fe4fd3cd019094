"""LipSDP: the tightest gain bound with one diagonal multiplier per hidden layer."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.budget import Budget, proof_flops
from tf_lyapunov.bounds.chains import scaled_chain
from tf_lyapunov.bounds.eclipse import closed_form, closed_form_multipliers, trivial_bound
from tf_lyapunov.bounds.multipliers import as_chain, proved, smallest_squared_gain
from tf_lyapunov.bounds.programs import first_order
from tf_lyapunov.bounds.programs.interior import MultiplierProblem, estimated_interior_cost
from tf_lyapunov.bounds.programs.sdp import check_solver, solve
from tf_lyapunov.errors import SolverFailure

VARIANTS = ("neuron", "layer")
# Flops per second on one modest core, and seconds that a step takes per layer beside them.
FLOPS, _OVERHEAD = 1e10, 2e-4
# Memory above which no attempt is made, in bytes.
_MEMORY = 8e9
# Seconds that the interior-point method may add where no budget is given, and the share of a budget
# that it has where it was asked for.
_PATIENCE, _ALONE = 20.0, 0.6


def lipsdp(
    chain, sectors=None, *, variant="neuron", solver="structured", seconds=None, tol=1e-6,
    fallback=None,
):  # fmt: skip
    """Smallest gain bound that diagonal multipliers can prove for a dense chain.

        minimise ρ over Λ_1, …, Λ_{n-1} ≥ 0 diagonal  subject to  (8.1) ⪰ 0;   gain ≤ √ρ.

    Sufficient. Exact for non-negative weights and slopes [0, β] that reach β. The solver's
    multipliers are proved in float64 (`multipliers.certified_squared_gain`) whatever it said.
    LipSDP-Network, with multipliers for pairs of units, is not offered: it is unsound.

    Args:
        chain: `Chain`, or weights (outputs, inputs) from the input on.
        sectors: one `Sector` per hidden layer where weights are given.
        variant: `"neuron"`, or `"layer"` with one number per layer, which is faster and looser.
        solver: `"structured"`, the method of `first_order`, and the interior-point method where it
            leaves a gap and the size allows; `"interior"`, and `first_order` where that stops
            before its end (`ChainBound.solver` says whose multipliers they are); or `"clarabel"`,
            `"scs"`, `"mosek"` through cvxpy.
        seconds: time budget; the search is cut short and what it has is proved.
        tol: relative accuracy of ρ asked from the solver.
        fallback: a proven `ChainBound` of this chain, instead of the closed form's.

    Returns:
        `ChainBound`; verdict `"SOLVER_FAILED"` with the closed form's bound if nothing better
        could be proved because the solver failed.

    Raises:
        ValueError: unknown variant; or the problem does not fit into memory, with what does.
        ImportError: if the solver is not installed.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> bound = lipsdp([np.array([[1.0], [1.0]]), np.array([[1.0, -1.0]])], [Sector(0.0, 1.0)])
    >>> round(bound.gain_upper_bound, 6)  # relu(x) - relu(x - 1) has Lipschitz constant 1
    1.0

    Reference: Fazlyab et al., Efficient and accurate estimation of Lipschitz constants (NeurIPS
    2019), LipSDP-Neuron and LipSDP-Layer; sound form.
    """
    begin, budget = time.monotonic(), Budget(seconds)
    if variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {VARIANTS}. Received: variant={variant!r}.")
    check_solver(solver)
    chain = as_chain(chain, sectors)
    method = "lipsdp" if variant == "neuron" else "lipsdp-layer"
    scaled = scaled_chain(chain)
    trivial = trivial_bound(chain, scaled, method, begin)
    if trivial is not None:
        return trivial
    check_size(scaled.widths)
    fallback = closed_form(chain, seconds=seconds) if fallback is None else fallback
    deadline = budget.before(proof_flops(scaled.widths))
    found = None
    try:
        found = _search(scaled, variant, solver, deadline, tol)
    except SolverFailure:
        found = _Found(None, solver=solver)
    return proved(
        chain,
        scaled,
        found.multipliers,
        method,
        solver=found.solver,
        seconds=time.monotonic() - begin,
        fallback=fallback,
        least=scaled.gain(found.least),
        budget=budget,
        cut_short=found.cut_short,
    )


def estimated_cost(widths):
    """`(seconds, bytes)` that `lipsdp` with solver='structured' needs, roughly, on one core.

    Args:
        widths: signal sizes from the input to the output.
    """
    sizes = [float(w) for w in first_order.narrow(widths)]
    weights = sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    squares = sum(w**2 for w in sizes[:-1])
    steps, flops = first_order.estimated_steps(widths), first_order.estimated_flops(widths)
    seconds = 0.02 + _OVERHEAD * steps * len(sizes) + flops / FLOPS
    return seconds, 8 * 8 * (squares + weights)


def check_size(widths):
    """Refuses chains too large for LipSDP, with the estimate and what fits instead."""
    seconds, memory = estimated_cost(widths)
    if memory > _MEMORY:
        raise ValueError(
            f"LipSDP with {sum(widths[1:-1])} hidden units would take about {seconds / 60:.0f} "
            f"minutes and {memory / 1e9:.0f} GB, as would method='eclipse'. Received: widths "
            f"{tuple(widths)}. Use method='composition', which needs the layers' norms only."
        )


def lipsdp_problem(scaled, variant="neuron"):
    """`MultiplierProblem` of (8.1) with θ = ρ; blocks are the signals from the input on."""
    weights = scaled.weights
    sizes = scaled.widths[:-1]
    ends = np.cumsum([0, *sizes])
    total, units = int(ends[-1]), int(ends[-1] - ends[1])
    constant = np.zeros((total, total))
    last = weights[-1]
    constant[ends[-2] :, ends[-2] :] = -last.T @ last
    direction = np.zeros((total, total))
    direction[: sizes[0], : sizes[0]] = np.eye(sizes[0])
    columns = np.zeros((units, total))
    m, p, groups = np.zeros(units), np.zeros(units), np.zeros(units, dtype=int)
    for layer in range(len(sizes) - 1):
        mine = slice(ends[layer + 1] - sizes[0], ends[layer + 2] - sizes[0])
        columns[mine, ends[layer] : ends[layer + 1]] = weights[layer]
        alpha, beta = scaled.alphas[layer], scaled.betas[layer]
        m[mine], p[mine], groups[mine] = (alpha + beta) / 2, alpha * beta, layer
    rows = sizes[0] + np.arange(units)
    tied = groups if variant == "layer" else None
    return MultiplierProblem(constant, direction, rows, columns, m, p, tied)


def split(scaled, multipliers):
    """Multipliers of all units as one array per hidden layer."""
    return np.split(np.asarray(multipliers), np.cumsum(scaled.widths[1:-1])[:-1])


@dataclasses.dataclass(frozen=True)
class _Found:
    """Candidate multipliers, or None; the value of (8.2), or 0; and how they were found."""

    multipliers: object
    least: float = 0.0
    solver: str = "structured"
    cut_short: bool = False
    gap: float = math.inf


def _search(scaled, variant, solver, deadline, tol):
    """`_Found`: of `solver`, or of the first-order method where that stopped before its end."""

    def reach(multipliers):
        return smallest_squared_gain(scaled, multipliers)

    first, reached = None, math.inf
    start = closed_form_multipliers(scaled)
    if solver == "structured":
        first, reached = _ascended(scaled, reach, variant, deadline, tol)
        left = _PATIENCE if deadline is None else deadline - time.monotonic()
        seconds, memory = estimated_interior_cost(scaled.widths)
        if first.gap <= tol or seconds > left or memory > _MEMORY:
            return first
    squared = math.inf if start is None else reach([1.01 * lam for lam in start])
    second, complete = None, False
    if math.isfinite(squared):
        # Alone it leaves the first-order method time to do better.
        share = 1.0 if first is not None else _ALONE
        now = time.monotonic()
        try:
            result = solve(
                lipsdp_problem(scaled, variant),
                (2.2 * squared, 2 * np.concatenate(start)),
                solver=solver,
                blocks=scaled.widths[:-1],
                tol=min(tol, 1e-8),
                seconds=None if deadline is None else max(share * (deadline - now), 0.0),
            )
            second, complete = split(scaled, result.multipliers), result.status == "optimal"
        except SolverFailure:
            if first is None and solver != "interior":
                raise
    if first is None and not complete and solver == "interior":
        first, reached = _ascended(scaled, reach, variant, deadline, tol)
    least = 0.0 if first is None else first.least
    if first is None or (second is not None and reach(second) < reached):
        if second is None:
            raise SolverFailure("No strictly feasible start is known.", solver, "no start")
        late = deadline is not None and time.monotonic() > deadline and not complete
        return _Found(second, least, solver, late)
    return first


def _ascended(scaled, reach, variant, deadline, tol):
    """`_Found` of the first-order method, and ρ as computed."""
    candidate = first_order.search(
        scaled.weights, scaled.alphas, scaled.betas, reach, tied=variant == "layer", tol=tol,
        deadline=deadline,
    )  # fmt: skip
    found = candidate.multipliers
    if not math.isfinite(candidate.squared):
        found = closed_form_multipliers(scaled)
    late = deadline is not None and time.monotonic() > deadline and candidate.gap > tol
    found = _Found(found, candidate.value, "structured", late, candidate.gap)
    return found, candidate.squared
