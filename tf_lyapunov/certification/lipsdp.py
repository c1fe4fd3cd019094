"""LipSDP: the tightest gain bound with one diagonal multiplier per hidden layer."""

import math
import time

import numpy as np

from tf_lyapunov.certification.chains import scaled_chain
from tf_lyapunov.certification.eclipse import closed_form, closed_form_multipliers, trivial_bound
from tf_lyapunov.certification.interior import MultiplierProblem
from tf_lyapunov.certification.multipliers import as_chain, proved, smallest_squared_gain
from tf_lyapunov.certification.sdp import check_solver, solve
from tf_lyapunov.errors import SolverFailure

VARIANTS = ("neuron", "layer")
# Newton steps that a solve takes, and flops per second that they reach on one modest core.
_STEPS = 60
_FLOPS = 1e10
# Memory above which no attempt is made, in bytes.
_MEMORY = 8e9


def lipsdp(chain, sectors=None, *, variant="neuron", solver="structured", seconds=None, tol=1e-8):
    """Smallest gain bound that diagonal multipliers can prove for a dense chain.

        minimise ρ over Λ_1, …, Λ_{n-1} ≥ 0 diagonal  subject to  (8.1) ⪰ 0;   gain ≤ √ρ.

    Sufficient. Exact for non-negative weights and slopes [0, β] that reach β. The solver's
    multipliers are proved in float64 (`multipliers.certified_squared_gain`) whatever it said.
    LipSDP-Network, with multipliers for pairs of units, is not offered: it is unsound.

    Args:
        chain: `Chain`, or weights (outputs, inputs) from the input on.
        sectors: one `Sector` per hidden layer where weights are given.
        variant: `"neuron"`, or `"layer"` with one number per layer, which is faster and looser.
        solver: `"structured"` (no other package needed), `"clarabel"`, `"scs"`, `"mosek"`.
        seconds: time budget; the search is cut short and what it has is proved.
        tol: relative accuracy of ρ asked from the solver.

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
    begin = time.monotonic()
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
    fallback = closed_form(chain)
    found = None
    try:
        found = _search(scaled, variant, solver, seconds, tol)
    except SolverFailure:
        pass
    elapsed = time.monotonic() - begin
    return proved(chain, scaled, found, method, solver=solver, seconds=elapsed, fallback=fallback)


def estimated_cost(widths):
    """`(seconds, bytes)` that the structured solver needs, roughly.

    Args:
        widths: signal sizes from the input to the output.
    """
    first = min(widths[0], widths[1]) if len(widths) > 2 else widths[0]
    units = float(sum(widths[1:-1]))
    size = first + units
    flops = 3 * size**3 + 4 * units * size**2 + 4 * units**2 * size + 30 * units**2
    return 0.02 + _STEPS * flops / _FLOPS, 8 * (8 * size**2 + 14 * units**2)


def check_size(widths):
    """Refuses chains too large for LipSDP, with the estimate and what fits instead."""
    seconds, memory = estimated_cost(widths)
    if memory > _MEMORY:
        raise ValueError(
            f"LipSDP with {sum(widths[1:-1])} hidden units would take about {seconds / 60:.0f} "
            f"minutes and {memory / 1e9:.0f} GB. Received: widths {tuple(widths)}. Use "
            "method='eclipse' (a program per layer) or its closed form, linear in depth."
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


def _search(scaled, variant, solver, seconds, tol):
    problem = lipsdp_problem(scaled, variant)
    start = closed_form_multipliers(scaled)
    if start is None:
        return None
    squared = smallest_squared_gain(scaled, [1.01 * lam for lam in start])
    if not math.isfinite(squared):
        return None
    flat = 2 * np.concatenate(start)
    result = solve(
        problem,
        (2.2 * squared, flat),
        solver=solver,
        blocks=scaled.widths[:-1],
        tol=tol,
        seconds=seconds,
    )
    return split(scaled, result.multipliers)
