"""Passivity indices of a whole dense network from one matrix inequality."""

import dataclasses
import time
from fractions import Fraction

import numpy as np

from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.bounds.multipliers import as_chain
from tf_lyapunov.bounds.programs.interior import MultiplierProblem
from tf_lyapunov.bounds.programs.sdp import check_solver, solve, verified_minimum
from tf_lyapunov.bounds.tails import dense_tail, keeps_order
from tf_lyapunov.errors import SolverFailure, UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.network import Network, read_network
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.rounding import round_down
from tf_lyapunov.theory.sectors import Indices

UNIT = rounding.UNIT_ROUNDOFF["float64"]
_WIDENING = 2.0**-16
# Signals of the input and all hidden layers together, beyond which no attempt is made.
_LARGEST = 4000


@dataclasses.dataclass(frozen=True)
class NetworkIndices:
    """Passivity indices that weights prove.

    Attributes:
        delta: δ as asked for.
        nu: proven ν, rounded down; -inf if nothing was proved.
        multipliers: Λ of all hidden units in a row; inf for units that no weight reaches.
        verdict: `"PROVED"` or `"SOLVER_FAILED"`.
        seconds: wall time.
    """

    delta: float
    nu: float
    multipliers: np.ndarray = dataclasses.field(repr=False)
    verdict: str
    seconds: float

    @property
    def indices(self):
        """`Indices(delta, nu)`; refuses where nothing was proved."""
        return Indices(self.delta, self.nu)

    @property
    def gain_upper_bound(self):
        """Largest slope b of the cone; infinite for δ ≤ 0 or where nothing was proved."""
        return self.indices.gain if np.isfinite(self.nu) else float("inf")

    def shortfall(self, claim):
        """How much of a claimed ν is not proved at this δ or below; 0 if the claim is proved.

        Raises:
            ValueError: if the claim's δ is larger, of which nothing is known here.
        """
        if claim.delta > self.delta:
            raise ValueError(
                f"`claim.delta` must be at most the δ that was asked for, {self.delta}. Received: "
                f"claim={claim!r}. Search again with delta={claim.delta}."
            )
        return max(float(claim.nu) - self.nu, 0.0)


def network_indices(model, sectors=None, *, delta, solver="structured", seconds=None):
    """Largest ν for which one multiplier block per layer proves a network IIFOFP(δ, ν).

        maximise ν over diagonal Λ_l ≥ 0  subject to, for all signals,
        Δuᵀ Δy - δ‖Δy‖² - ν‖Δu‖² - Σ_l (quadratic constraint of layer l with Λ_l) ≥ 0.

    Sufficient; at least as tight as any cascade of layer indices with multipliers of Theorem 1,
    because the layers' supply rates are not fixed in between. LipSDP is the case without ΔuᵀΔy.

    Args:
        model: `Chain`, weights (outputs, inputs), or a Keras model that is a dense chain.
        sectors: one `Sector` per hidden layer where weights are given.
        delta: δ.
        solver: see `sdp.solve`.
        seconds: time budget.

    Returns:
        `NetworkIndices`.

    Raises:
        UnsupportedLayerError: if a Keras model is not a dense chain from input to logits.
        ValueError: if the network is too large.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> found = network_indices([np.eye(2), np.eye(2)], [Sector(0.0, 1.0)], delta=2.0)
    >>> round(found.nu, 5), round(found.gain_upper_bound, 5)
    (-1.0, 1.0)

    Reference: Aquino et al., Theorem 1, for all layers at once; sound form of this library.
    """
    begin = time.monotonic()
    delta = finite_float("delta", delta)
    check_solver(solver)
    chain = _whole_chain(model, sectors)
    total = sum(chain.widths[:-1])
    if total > _LARGEST:
        raise ValueError(
            f"Network indices with {total} signals would take about {6e-9 * total**3 / 60:.0f} "
            f"minutes and {1.8e-7 * total**2:.0f} GB. Received: widths {chain.widths}. Use "
            "`layer_indices` per layer and the cascade, or method='eclipse' for the gain."
        )
    found = proven_indices(chain, delta, solver=solver, seconds=seconds)
    elapsed = time.monotonic() - begin
    if found is None:
        return NetworkIndices(delta, -np.inf, np.zeros(0), "SOLVER_FAILED", elapsed)
    return NetworkIndices(delta, *found, "PROVED", elapsed)


def proven_indices(chain, delta, *, solver="structured", tol=1e-8, seconds=None):
    """`(ν, multipliers)` of `network_indices` for a `Chain`, proved, or None."""
    chain, is_live = _live_units(chain)
    small = _fewer_inputs(chain)
    found = _searched(small, delta, solver, tol, seconds)
    if found is None:
        return None
    problem, error = _problem(chain, delta)
    errors = {"entry_error": _relative_error(chain), "constant_error": error}
    result, start = found
    if small is not chain:  # along the inputs left out M is θI
        result, start = _with_non_negative(result), (max(start[0], 1e-9 * abs(start[0])), start[1])
    proved = verified_minimum(problem, result, start, **errors)
    if proved is None:
        return None
    nu = -proved[0]
    if delta > 0:  # beyond it the cone is empty, so that only rounding can lead there
        nu = min(nu, round_down(1 / (4 * Fraction(delta))))
    multipliers = np.full(len(is_live), np.inf)
    multipliers[is_live] = proved[1]
    return nu, multipliers


def estimated_nu(chain, delta, *, solver="structured", tol=1e-4):
    """`(ν, multipliers)` for a `Chain` as computed, or None: they steer, and prove nothing."""
    chain = _live_units(chain)[0]
    small = _fewer_inputs(chain)
    found = _searched(small, delta, solver, tol, None)
    if found is None:
        return None
    theta = found[0].theta if small is chain else max(found[0].theta, 0.0)
    return -theta, found[0].multipliers


def _searched(chain, delta, solver, tol, seconds):
    """`(SolverResult, start)`, or None if nothing was found."""
    problem, _ = _problem(chain, delta)
    start = _start(problem, chain)
    if start is None:
        return None
    options = {"solver": solver, "tol": tol, "scale": 1e-4 * abs(start[0]), "seconds": seconds}
    try:
        return solve(problem, start, **options), start
    except SolverFailure:
        return None


def _fewer_inputs(chain):
    """A chain with the same M but for rows and columns of θI, where there are many inputs.

    Beyond those that ΔuᵀΔy compares with outputs, inputs enter through the first layer alone: with
    W = [W₁, LQᵀ], QᵀQ = I, the chain of [W₁, L] has the same ν as long as ν ≤ 0, which directions
    that W does not see enforce. L is rounded: what is found for it is a candidate.
    """
    first, shared = chain.weights[0], min(chain.widths[-1], chain.widths[0])
    rest = first[:, shared:]
    if rest.shape[1] <= rest.shape[0]:
        return chain
    lower = np.linalg.qr(rest.T, mode="r").T
    return Chain((np.hstack([first[:, :shared], lower]), *chain.weights[1:]), chain.sectors)


def _with_non_negative(result):
    points = tuple((max(theta, 0.0), multipliers) for theta, multipliers in result.points)
    return dataclasses.replace(result, theta=max(result.theta, 0.0), points=points)


def _live_units(chain):
    """The chain without hidden units that no weight reaches, and which of all units remain.

    They are constant: the larger their multipliers the better, without an end.
    """
    weights, errors, kept = list(chain.weights), list(chain.errors), []
    for layer in range(chain.depth - 1):
        spread = np.broadcast_to(errors[layer], weights[layer].shape)
        live = np.any((weights[layer] != 0) | (spread != 0), axis=1)
        live[0] |= not np.any(live)  # a layer keeps one unit at least
        kept.append(live)
        weights[layer], weights[layer + 1] = weights[layer][live], weights[layer + 1][:, live]
        errors[layer] = spread[live]
        errors[layer + 1] = np.broadcast_to(
            errors[layer + 1], (len(chain.weights[layer + 1]), len(live))
        )[:, live]
    return Chain(tuple(weights), chain.sectors, errors=tuple(errors)), np.concatenate(kept)


def proven_minimum(problem, start, errors=None, **options):
    """Smallest θ of a `MultiplierProblem` that could be proved, whatever the solver said.

    Args:
        problem: `MultiplierProblem`.
        start: strictly feasible `(theta, multipliers)`.
        errors: as for `sdp.verified_minimum`.
        **options: of `sdp.solve`.

    Returns:
        `(theta, multipliers)`, or None.
    """
    try:
        result = solve(problem, start, **options)
    except SolverFailure:
        return None
    return verified_minimum(problem, result, start, **(errors or {}))


def _whole_chain(model, sectors):
    if isinstance(model, (Chain, list, tuple)):
        return as_chain(model, sectors)
    network = model if isinstance(model, Network) else read_network(model)
    return chain_from_input(network, "Network indices need")


def chain_from_input(network, reader):
    """The `Chain` of a network whose logits depend on its input through dense layers alone.

    Args:
        network: `Network`.
        reader: the message's first words, e.g. `"method='local' needs"`.

    Raises:
        UnsupportedLayerError: naming the node in front of the dense layers.
    """
    tail = dense_tail(network)
    node = network[tail.start]
    while node.kind == "identity" or keeps_order(node):
        node = network[node.inputs[0]]
    if node.kind != "input":
        raise UnsupportedLayerError(
            f"{reader} dense layers (or small convolutions) and activations from the input to the "
            f"logits. Received: node {node.name!r} of kind {node.kind!r} before them. Use "
            "method='auto' for gains and radii."
        )
    return tail.chain


def _relative_error(chain):
    """Largest relative error of an entry of the hidden layers; infinite if it has no bound."""
    largest = 0.0
    for weight, error in zip(chain.weights[:-1], chain.errors[:-1], strict=True):
        spread = np.broadcast_to(error, weight.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(spread > 0, spread / np.abs(weight), 0.0)
        largest = max(largest, float(np.max(ratio)) * (1 + 1e-9))
    return largest


def _problem(chain, delta):
    """`MultiplierProblem` with θ = -ν, and the entrywise error of its constant matrix."""
    sizes = chain.widths[:-1]
    ends = np.cumsum([0, *sizes])
    total, units = int(ends[-1]), int(ends[-1] - ends[1])
    last, outputs = chain.weights[-1], chain.widths[-1]
    constant, error = np.zeros((total, total)), np.zeros((total, total))
    tail, shared = slice(int(ends[-2]), total), min(outputs, sizes[0])
    gram, size = last.T @ last, np.abs(last).T @ np.abs(last)
    constant[tail, tail] = -delta * (gram + gram.T) / 2
    error[tail, tail] = abs(delta) * rounding.gamma(outputs + 4, UNIT) * size
    constant[tail, :shared] += last[:shared].T / 2
    constant[:shared, tail] += last[:shared] / 2
    spread = np.broadcast_to(chain.errors[-1], last.shape)
    if np.any(spread):
        cross = np.abs(last).T @ spread
        error[tail, tail] += 1.01 * abs(delta) * (cross + cross.T + spread.T @ spread)
        error[tail, :shared] += spread[:shared].T / 2
        error[:shared, tail] += spread[:shared] / 2
    direction = np.zeros((total, total))
    direction[: sizes[0], : sizes[0]] = np.eye(sizes[0])
    columns = np.zeros((units, total))
    m, p = np.zeros(units), np.zeros(units)
    for layer, sector in enumerate(chain.sectors):
        mine = slice(int(ends[layer + 1] - sizes[0]), int(ends[layer + 2] - sizes[0]))
        columns[mine, ends[layer] : ends[layer + 1]] = chain.weights[layer]
        width = max(sector.magnitude, 1e-100) * _WIDENING
        alpha = min(sector.alpha, sector.beta - width)  # a superset where the slopes coincide
        m[mine], p[mine] = (alpha + sector.beta) / 2, alpha * sector.beta
    rows = sizes[0] + np.arange(units)
    return MultiplierProblem(constant, direction, rows, columns, m, p), 1.01 * error


def _start(problem, chain):
    """Strictly feasible `(θ, λ)`, from the output backwards; None if rounding prevents it."""
    sizes = chain.widths[:-1]
    ends = np.cumsum([0, *sizes])
    lam = np.zeros(len(problem.rows))
    first = sizes[0]
    try:
        for layer in range(len(sizes) - 1, -1, -1):
            here = slice(int(ends[layer]), int(ends[layer + 1]))
            beyond = slice(int(ends[layer + 1]), int(ends[-1]))
            matrix = problem.matrix(0.0, lam)
            need = -matrix[here, here]
            if beyond.start < beyond.stop:
                factor = np.linalg.cholesky(matrix[beyond, beyond])
                left = np.linalg.solve(factor, matrix[beyond, here])
                need = need + left.T @ left
            top = float(np.linalg.eigvalsh((need + need.T) / 2)[-1])
            if layer == 0:
                size = max(abs(top), float(np.max(np.abs(left), initial=0.0)) ** 2, 1e-100)
                return top + 0.1 * size, lam
            mine = slice(here.start - first, here.stop - first)
            floor = 1e-3 * float(np.max(lam, initial=0.0)) or 1.0 / first
            lam[mine] = 2 * max(top, 0.0) + floor
    except np.linalg.LinAlgError:
        return None
    return None
