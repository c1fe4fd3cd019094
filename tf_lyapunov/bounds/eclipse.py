"""ECLipsE: multipliers layer by layer, exactly or in closed form, for deep and wide chains."""

import math
import time

import numpy as np

from tf_lyapunov.bounds.budget import Budget, closed_form_flops, proof_flops
from tf_lyapunov.bounds.chains import (
    ScaledChain,
    error_norm,
    norm_up,
    product_gain,
    scaled_chain,
)
from tf_lyapunov.bounds.multipliers import (
    ChainBound,
    as_chain,
    proved,
    smallest_squared_gain,
)
from tf_lyapunov.bounds.programs import first_order
from tf_lyapunov.bounds.programs.interior import MultiplierProblem, estimated_interior_cost
from tf_lyapunov.bounds.programs.sdp import check_solver, solve
from tf_lyapunov.errors import SolverFailure
from tf_lyapunov.program import rounding
from tf_lyapunov.progress import steps

# Gap of a layer's first-order search above which the interior-point method is tried, within so many
# seconds.
_GAP, _PATIENCE = 1e-4, 10.0
# Smaller sides than this have their singular values computed, others those of a Gram matrix.
_SVD = 64
# Share of the way to the scalar's multipliers: the next layer needs a positive definite matrix.
_INSIDE = 1e-7


def closed_form(chain, sectors=None, *, seconds=None):
    """Bound on the gain of a dense chain by multipliers in closed form.

    With X_0 = I, r = (β-α)/2 and K = W_l X_{l-1}⁻¹ W_lᵀ, layer l gets Λ_l = I/(r_lβ_l‖K‖), the
    best scalar for the worst direction, and leaves

        X_l = Λ_l - m²Λ_l (K⁻¹ + pΛ_l)⁻¹ Λ_l ⪰ I/(β_l²‖K‖);   gain² ≤ ‖W_n X_{n-1}⁻¹ W_nᵀ‖.

    Sufficient; never above the product of norms; linear in depth. The multipliers are then proved
    in float64 by the matrix (8.1).

    Args:
        chain: `Chain`, or weights (outputs, inputs) from the input on.
        sectors: one `Sector` per hidden layer where weights are given.
        seconds: time budget; where the proof does not fit it, the product of norms is returned.

    Returns:
        `ChainBound`.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> bound = closed_form([np.diag([2.0, 1.0]), np.diag([1.0, 2.0])], [Sector(0.0, 1.0)])
    >>> 2.0 <= bound.gain_upper_bound < 4.0
    True

    Reference: Xu and Sivaranjani, ECLipsE (NeurIPS 2024), Theorem 3 for slopes [0, β]; general
    sectors: sound form of this library.
    """
    begin, budget = time.monotonic(), Budget(seconds)
    chain = as_chain(chain, sectors)
    scaled = scaled_chain(chain)
    trivial = trivial_bound(chain, scaled, "closed form", begin)
    if trivial is not None:
        return trivial
    late = not budget.fits(closed_form_flops(scaled.widths) + proof_flops(scaled.widths))
    found = None if late else _layer_by_layer(scaled, _best_scalar)
    return proved(
        chain, scaled, found, "closed form", seconds=time.monotonic() - begin, budget=budget,
        cut_short=late,
    )  # fmt: skip


def eclipse(chain, sectors=None, *, solver="structured", seconds=None, fallback=None, known=None):
    """Bound on the gain of a dense chain by one small semidefinite program per hidden layer.

    Given X_{l-1}, diagonal Λ_l ≥ 0 and the largest c with

        [X_{l-1} + pW_lᵀΛ_lW_l, -mW_lᵀΛ_l; -mΛ_lW_l, Λ_l - c·W_{l+1}ᵀW_{l+1}] ⪰ 0,

    which leaves most room for the next layer. Greedy: not the optimum of LipSDP over all layers
    together, but linear in depth. Returned together with the closed form's bound if that is
    smaller.

    Args:
        chain: `Chain`, or weights (outputs, inputs) from the input on.
        sectors: one `Sector` per hidden layer where weights are given.
        solver: `"structured"`, the first-order method of `first_order`; otherwise see `sdp.solve`.
        seconds: time budget; layers beyond it get the closed form's multipliers.
        fallback: a proven `ChainBound` of this chain, instead of the closed form's.
        known: `ChainBound` with multipliers of a chain that differs in its last layer alone: all
            hidden layers but the last get those, since theirs do not depend on it.

    Returns:
        `ChainBound`; verdict `"SOLVER_FAILED"` with the closed form's bound if a solver failed.

    Raises:
        ImportError: if the solver is not installed.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> bound = eclipse([np.diag([2.0, 1.0]), np.diag([1.0, 2.0])], [Sector(0.0, 1.0)])
    >>> round(bound.gain_upper_bound, 6)
    2.0

    Reference: Xu and Sivaranjani, ECLipsE (NeurIPS 2024), Algorithm 1; sound form.
    """
    begin, budget = time.monotonic(), Budget(seconds)
    check_solver(solver)
    chain = as_chain(chain, sectors)
    scaled = scaled_chain(chain)
    trivial = trivial_bound(chain, scaled, "eclipse", begin)
    if trivial is not None:
        return trivial
    fallback = closed_form(chain, seconds=seconds) if fallback is None else fallback
    deadline = budget.before(proof_flops(scaled.widths))
    given = _shared_multipliers(known, scaled)

    def choose(x, weight, after, alpha, beta):
        if given:
            return given.pop(0)
        outputs, inputs = weight.shape
        own = first_order.estimated_flops((min(inputs, outputs), outputs, outputs))
        if deadline is not None and time.monotonic() + budget.seconds_for(own) > deadline:
            return _best_scalar(x, weight, after, alpha, beta)
        return _best_diagonal(x, weight, after, alpha, beta, solver, deadline)

    late = not budget.fits(closed_form_flops(scaled.widths) + proof_flops(scaled.widths))
    try:
        found = None if late else _layer_by_layer(scaled, choose)
    except SolverFailure:
        found = None
    elapsed = time.monotonic() - begin
    return proved(
        chain, scaled, found, "eclipse", solver=solver, seconds=elapsed, fallback=fallback,
        budget=budget, cut_short=late,
    )  # fmt: skip


def _shared_multipliers(known, scaled):
    """Λ_l of the hidden layers but the last of a bound on a chain that ends differently."""
    if known is None or len(known.multipliers) != len(scaled.weights) - 1:
        return []
    size = math.ldexp(1.0, -2 * known.scaled.exponent) * known.gain_upper_bound**2
    return [lam / size for lam in known.multipliers[:-1]] if 0 < size < math.inf else []


def closed_form_multipliers(scaled):
    """The closed form's multipliers, or None if they cannot be computed."""
    return _layer_by_layer(scaled, _best_scalar)


def trivial_bound(chain, scaled, method, begin):
    """`ChainBound` of a constant or a linear chain, else None."""
    if scaled.is_zero:
        return ChainBound(0.0, method, seconds=time.monotonic() - begin)
    if len(scaled.weights) == 1:
        weight = scaled.weights[0]
        norm = rounding.sum_up(norm_up(weight), error_norm(scaled.errors[0], weight))
        gain = min(rounding.ldexp_up(norm, scaled.exponent), product_gain(chain))
        return ChainBound(gain, method, seconds=time.monotonic() - begin)
    return None


def _layer_by_layer(scaled, choose):
    """Multipliers with ρ scaled so that (8.1) is nearly tight; None if a step breaks down."""
    weights = scaled.weights
    x = np.eye(weights[0].shape[1])
    found = []
    try:
        for index in steps(range(len(weights) - 1), "hidden layers"):
            alpha, beta = scaled.alphas[index], scaled.betas[index]
            lam = choose(x, weights[index], weights[index + 1], alpha, beta)
            found.append(lam)
            x = next_form(x, weights[index], lam, alpha, beta)
        squared = _largest(_whitened(x, weights[-1]))
    except np.linalg.LinAlgError:
        return None
    if not math.isfinite(squared) or squared == 0:
        return None
    return [squared * (1 + 1e-12) * lam for lam in found]


def next_form(x, weight, lam, alpha, beta):
    """Schur complement X_l that a layer leaves to the next one, as computed.

    Args:
        x: X_{l-1}.
        weight, lam: W_l and the diagonal of Λ_l.
        alpha, beta: slopes.

    Raises:
        LinAlgError: if X_{l-1} is not positive definite.
    """
    m, p = (alpha + beta) / 2, alpha * beta
    inner = x + p * weight.T @ (lam[:, None] * weight) if p else x
    left = _whitened((inner + inner.T) / 2, weight) * (m * lam)
    result = np.diag(lam) - left.T @ left
    return (result + result.T) / 2


def _whitened(x, weight):
    """L⁻¹Wᵀ for X = LLᵀ."""
    from scipy.linalg import solve_triangular

    return solve_triangular(np.linalg.cholesky(x), weight.T, lower=True, check_finite=False)


def _largest(matrix):
    """Largest squared singular value, as computed."""
    if not np.all(np.isfinite(matrix)):
        raise np.linalg.LinAlgError("a layer is beyond the range of floats")
    if min(matrix.shape) <= _SVD:
        return np.linalg.norm(matrix, 2) ** 2
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return float(np.linalg.eigvalsh(wide @ wide.T)[-1])


def _best_scalar(x, weight, after, alpha, beta):
    squared = _largest(_whitened(x, weight))
    if squared == 0 or not math.isfinite(squared):
        raise np.linalg.LinAlgError("a layer is numerically zero")
    return np.full(len(weight), 2 / ((beta - alpha) * beta * squared))


def _best_diagonal(x, weight, after, alpha, beta, solver, deadline):
    scalar = _best_scalar(x, weight, after, alpha, beta)
    # The input block enters only through K = W X⁻¹ Wᵀ: its square root stands for the weights.
    left = _whitened(x, weight)
    root = np.linalg.qr(left, mode="r").T if left.shape[0] > left.shape[1] else left.T
    size, inputs = len(root), root.shape[1]
    width = inputs + size
    # Unknowns scaled by the closed form's, and c by what it reaches there.
    root = root * math.sqrt(scalar[0])
    reached = next_form(np.eye(inputs), root, np.ones(size), alpha, beta)
    try:
        best = 1 / _largest(_whitened(reached, after))
    except (np.linalg.LinAlgError, ZeroDivisionError):
        return scalar
    if not math.isfinite(best):
        return scalar
    if solver == "structured":
        after, best = math.sqrt(best) * after, 1.0
        scaled = ScaledChain((root, after), (alpha,), (beta,), 0, (0.0, 0.0))
        found = first_order.search(
            scaled.weights, scaled.alphas, scaled.betas,
            lambda lam: smallest_squared_gain(scaled, lam), deadline=deadline,
        )  # fmt: skip
        seconds, _ = estimated_interior_cost((inputs, size, size))
        if found.gap <= _GAP or (math.isfinite(found.squared) and seconds > _PATIENCE):
            lam = found.multipliers[0] / found.squared
            return scalar * ((1 - _INSIDE) * lam + _INSIDE)
        if seconds > _PATIENCE:
            return scalar
    constant = np.zeros((width, width))
    constant[:inputs, :inputs] = np.eye(inputs)
    direction = np.zeros((width, width))
    direction[inputs:, inputs:] = best * after.T @ after
    weights = np.zeros((size, width))
    weights[:, :inputs] = root
    m, p = (alpha + beta) / 2, alpha * beta
    problem = MultiplierProblem(
        constant,
        direction,
        inputs + np.arange(size),
        weights,
        np.full(size, m),
        np.full(size, p),
    )
    result = solve(problem, (-0.5, np.ones(size)), solver=solver, tol=1e-7)
    return scalar * ((1 - _INSIDE) * result.multipliers + _INSIDE)
