"""Networks as compositions of blocks: runs of layers and residual blocks, each with one bound.

A residual block x ↦ Sx + f(x) gets one matrix inequality for shortcut and branch together, which
sees where they cancel; the sum of the gains does not.
"""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.chains import (
    Chain,
    ScaledChain,
    norm_up,
    normal_form,
)
from tf_lyapunov.bounds.lipsdp import (
    check_size,
    estimated_cost,
    lipsdp,
    lipsdp_problem,
    split,
)
from tf_lyapunov.bounds.multipliers import ChainBound, as_chain, unscaled
from tf_lyapunov.bounds.programs import first_order
from tf_lyapunov.bounds.programs.sdp import smallest_parameter, verified_point
from tf_lyapunov.bounds.records import PartProof
from tf_lyapunov.bounds.tails import Reader, chain_of
from tf_lyapunov.program import rounding
from tf_lyapunov.progress import steps

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Signals of a residual block together, beyond which its gain is composed.
_LARGEST = 2500
# Entries of an identity matrix that may stand before or after a branch.
_IDENTITY = 2**11


def residual_gain(chain, sectors=None, *, shortcut=None, seconds=None):
    """Bound on the gain of a residual block x ↦ Sx + f(x), f a dense chain.

        minimise ρ over Λ_l ≥ 0 diagonal  subject to, for all signals,
        ρ‖x‖² - ‖Sx + W_nz_{n-1}‖² - Σ_l (quadratic constraint of layer l with Λ_l) ≥ 0;  gain ≤ √ρ.

    Sufficient; never above σ(S) + (LipSDP's bound on f), which is returned for blocks of more than
    2500 signals. The multipliers are proved in float64.

    Args:
        chain: f, `Chain`, or weights (outputs, inputs) from the input on.
        sectors: one `Sector` per hidden layer where weights are given.
        shortcut: S, float64 (outputs, inputs); None for the identity.
        seconds: time budget.

    Returns:
        `ChainBound`, method `"residual"`, or `"lipsdp"` where the sum of the gains is as small.

    Raises:
        ValueError: if the shapes do not fit.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> bound = residual_gain([np.eye(2), -np.eye(2)], [Sector(0.0, 1.0)])  # x - relu(x)
    >>> round(bound.gain_upper_bound, 6)
    1.0

    Reference: Fazlyab et al. (NeurIPS 2019) with a general quadratic form of inputs and outputs;
    sound form of this library.
    """
    begin = time.monotonic()
    deadline = None if seconds is None else begin + seconds
    chain = as_chain(chain, sectors)
    inputs, outputs = chain.widths[0], chain.widths[-1]
    shortcut = np.eye(outputs) if shortcut is None else np.asarray(shortcut, dtype=np.float64)
    if shortcut.shape != (outputs, inputs) or not np.all(np.isfinite(shortcut)):
        raise ValueError(
            f"`shortcut` must be finite, of shape {(outputs, inputs)}; the identity needs equal "
            f"widths. Received: shape {shortcut.shape}."
        )
    branch = lipsdp(chain, seconds=seconds)
    summed = rounding.sum_up(norm_up(shortcut), branch.gain_upper_bound)
    fallback = dataclasses.replace(branch, gain_upper_bound=summed, multipliers=(), scaled=None)
    squared, least, proof = math.inf, 0.0, {}
    if sum(chain.widths[:-1]) <= _LARGEST:
        squared, least, proof = _residual_squared(chain, shortcut, deadline)
    gain = rounding.sqrt_up(squared) if math.isfinite(squared) else math.inf
    elapsed = time.monotonic() - begin
    if not gain < summed:
        return dataclasses.replace(fallback, seconds=elapsed, least=0.0)
    return ChainBound(
        gain, "residual", solver="structured", seconds=elapsed, least=math.sqrt(least), **proof
    )


def _residual_squared(chain, shortcut, deadline):
    """Proven ρ, or inf, the value of the dual, and `multipliers` and `scaled` of a `ChainBound`."""
    weights, alphas, betas, errors = normal_form(chain)
    if len(weights) == 1:
        total = shortcut + weights[0]
        error = np.abs(total) * UNIT + np.broadcast_to(errors[0], total.shape)
        norm = rounding.sum_up(norm_up(total), float(np.linalg.norm(error)) * (1 + 1e-9))
        return rounding.product_up(norm, norm), 0.0, {}
    power, powers = 0, []
    for layer, weight in enumerate(weights):
        # Powers of two are exact; the last layer gets back what the others lose.
        size = float(np.max(np.abs(weight)))
        own = -power if layer == len(weights) - 1 else round(math.log2(size)) if size else 0
        weights[layer], errors[layer] = np.ldexp(weight, -own), np.ldexp(errors[layer], -own)
        power += own
        powers.append(own)
    form = ScaledChain(
        tuple(weights), tuple(alphas), tuple(betas), 0, tuple(errors), powers=tuple(powers)
    )
    problem, error = _residual_problem(form, shortcut)
    inputs = shortcut.shape[1]

    def reach(multipliers):
        return smallest_parameter(problem.matrix(0.0, np.concatenate(multipliers)), inputs)

    found = first_order.search(
        form.weights, form.alphas, form.betas, reach, shortcut=shortcut, deadline=deadline
    )
    if not math.isfinite(found.squared):
        return math.inf, found.value, {}
    spread = {"entry_error": _relative_error(form), "constant_error": error}
    lam = np.concatenate(found.multipliers)
    if not (np.all(np.isfinite(lam)) and np.isfinite(spread["entry_error"])):
        return math.inf, found.value, {}
    lam = np.maximum(lam, 1e-14 * lam.max())
    depth, growth = len(weights), 4 * UNIT * problem.size**2
    while growth < 1e-2:
        parts = split(form, lam)
        grown = [(1 + growth) ** (depth - 1 - layer) * part for layer, part in enumerate(parts)]
        squared = reach(grown) * (1 + 10 * growth)
        if verified_point(problem, squared, np.concatenate(grown), **spread):
            return squared, found.value, {"multipliers": tuple(grown), "scaled": form}
        growth *= 10
    return math.inf, found.value, {}


def _residual_problem(form, shortcut):
    """`MultiplierProblem` with θ = ρ, and the entrywise error of its constant matrix."""
    problem = lipsdp_problem(form)
    last, spread = form.weights[-1], np.broadcast_to(form.errors[-1], form.weights[-1].shape)
    tail, head = slice(problem.size - last.shape[1], None), slice(shortcut.shape[1])
    constant, error = np.array(problem.constant), np.zeros_like(problem.constant)
    gram, cross = shortcut.T @ shortcut, last.T @ shortcut
    constant[head, head] -= (gram + gram.T) / 2
    constant[tail, head] -= cross
    constant[head, tail] -= cross.T
    constant = (constant + constant.T) / 2
    size, edge = np.abs(last), np.abs(shortcut)
    relative = rounding.gamma(len(last) + 8, UNIT)
    own = size.T @ spread
    error[tail, tail] = relative * (size.T @ size) + own + own.T + spread.T @ spread
    error[head, head] = relative * (edge.T @ edge)
    error[tail, head] = relative * (size.T @ edge) + spread.T @ edge
    error[head, tail] = error[tail, head].T
    return dataclasses.replace(problem, constant=constant), 1.01 * error


def _relative_error(form):
    """Largest relative error of an entry of the hidden layers; infinite if it has no bound."""
    largest = 0.0
    for weight, error in zip(form.weights[:-1], form.errors[:-1], strict=True):
        spread = np.broadcast_to(error, weight.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(spread > 0, spread / np.abs(weight), 0.0)
        largest = max(largest, float(np.max(ratio)) * (1 + 1e-9))
    return largest


# Reading ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ResidualBlock:
    """A sum of two branches of one signal, of which one is linear.

    Attributes:
        name: of the node that adds.
        start: name of the node that both branches read.
        chain: f.
        shortcut: S, float64 (outputs, inputs), or None for the identity.
        functions: names of the elementwise functions of f, one by one.
    """

    name: str
    start: str
    chain: Chain
    shortcut: np.ndarray | None
    functions: tuple = ()


def residual_blocks(network):
    """`ResidualBlock` of every addition of two dense (or small convolution) branches.

    Args:
        network: `Network`.

    Returns:
        Tuple in the order of the nodes. Branches may begin or end with an elementwise function.
    """
    reader = Reader(network)
    readable = _readable(reader)
    found = (_residual_block(node, reader, readable) for node in network.nodes)
    return tuple(block for block in found if block is not None)


def _readable(reader):
    """Names of the nodes that a chain can contain."""
    return {node.name for node in reader.network.nodes if reader.is_readable(node)}


def _residual_block(node, reader, readable):
    nodes = reader.nodes
    is_sum = node.kind == "merge" and type(node.layer).__name__ == "Add" and node.rule == "sum"
    if not is_sum or len(node.inputs) != 2 or set(node.weights) != {1.0} or len(node.weights) != 2:
        return None
    paths = [_path(name, nodes, readable) for name in node.inputs]
    shared = next((name for name in paths[0] if name in paths[1]), None)
    if shared is None or None in nodes[shared].output_shape[1:]:
        return None
    size = math.prod(nodes[shared].output_shape[1:])
    runs = [[nodes[name] for name in path[: path.index(shared)]][::-1] for path in paths]
    branches = [_branch(run, reader, size) for run in runs]
    linear = [k for k, chain in enumerate(branches) if chain is None or chain.depth == 1]
    if len(linear) != 1 or any(chain == () for chain in branches):
        return None  # two chains, two matrices, or too large
    chain, shortcut = branches[1 - linear[0]], branches[linear[0]]
    functions = _functions(runs[1 - linear[0]])
    if shortcut is None:
        return ResidualBlock(node.name, shared, chain, None, functions)
    if np.any(shortcut.errors[0]):
        return None
    return ResidualBlock(node.name, shared, chain, shortcut.weights[0], functions)


def _functions(run):
    return tuple(node.name for node in run if node.kind == "activation")


def _path(name, nodes, readable):
    """Names of readable nodes from `name` backwards, and of the first that is not."""
    path = [name]
    while name in readable:
        name = nodes[name].inputs[0]
        path.append(name)
    return path


def _branch(run, reader, size):
    """`Chain` of a branch, None for the identity, () if it is too large."""
    acting = [node for node in run if node.kind == "activation" or reader.is_linear(node)]
    if not acting:
        return None
    widths = [size, *(math.prod(node.output_shape[1:]) for node in acting)]
    ends = [w for w, node in ((size, acting[0]), (widths[-1], acting[-1]))
            if node.kind == "activation"]  # fmt: skip
    return () if any(width > _IDENTITY for width in ends) else chain_of(run, reader, size)


def with_blocks(network, *, seconds=30.0, proofs=None):
    """The network with residual blocks and runs of linear layers bounded as wholes.

    For `composition.lipschitz_constants` only: nodes that end a block read its start and carry its
    gain, so that the composition goes from block to block.

    Args:
        network: `Network`.
        seconds: time budget for all blocks together; those that would exceed it stay as they are.
        proofs: list that `records.PartProof` of blocks are added to, or None.

    Returns:
        `Network` whose composed gains are never larger.
    """
    begin = time.monotonic()
    reader = Reader(network)
    nodes, readable = reader.nodes, _readable(reader)
    replaced = {}

    def merge(node, start, functions, bound, chain, method, **options):
        left = seconds - (time.monotonic() - begin)
        if estimated_cost(chain.widths)[0] > left:  # a decomposition cannot be cut short
            return
        try:
            check_size(chain.widths)
        except ValueError:  # composed as before
            return
        found = bound(chain, seconds=left, **options)
        replaced[node.name] = _merged_node(node, start, found.gain_upper_bound, method)
        if proofs is not None and found.multipliers and len(found.multipliers) == len(functions):
            proofs.append(PartProof(start, node.name, functions, unscaled(found)))

    for block in steps(residual_blocks(network), "residual blocks"):
        branch = block.chain
        merge(
            nodes[block.name], block.start, block.functions, residual_gain, branch,
            f"residual block of {branch.depth} linear layers, one matrix inequality",
            shortcut=block.shortcut,
        )  # fmt: skip
    inner = {name for node in network.nodes for name in _inside(node, reader, readable)}
    for node in steps(network.nodes, "runs of layers"):
        if not reader.is_linear(node) or node.name in inner:
            continue
        run = [nodes[name] for name in _path(node.name, nodes, readable)[:-1]][::-1]
        while run and not reader.is_linear(run[0]):
            run.pop(0)
        if sum(n.kind == "linear" for n in run) < 2:
            continue
        chain = chain_of(run, reader)
        merge(
            node, run[0].inputs[0], _functions(run), lipsdp, chain,
            f"{chain.depth} linear layers together, widths {'-'.join(map(str, chain.widths))}",
        )  # fmt: skip
    kept = tuple(replaced.get(node.name, node) for node in network.nodes)
    return dataclasses.replace(network, nodes=kept)


def _inside(node, reader, readable):
    """Names of the linear nodes that the run which ends at a linear node contains."""
    if node.name not in readable or not reader.is_linear(node):
        return []
    path = _path(node.name, reader.nodes, readable)[1:-1]
    return [name for name in path if reader.is_linear(reader.nodes[name])]


def _merged_node(node, start, gain, method):
    return dataclasses.replace(
        node, inputs=(start,), gain_upper_bound=gain, method=method, rule="single", weights=(1.0,),
        matrix=None,
    )  # fmt: skip
