"""Network bounds for `certify`: which method, at what cost, and the gains of pairs of logits."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.blocks import with_blocks
from tf_lyapunov.bounds.chains import dense_tail, product_gain, tail_before
from tf_lyapunov.bounds.composition import lipschitz_constants, moving_entries
from tf_lyapunov.bounds.dissipativity import network_indices
from tf_lyapunov.bounds.eclipse import closed_form, eclipse
from tf_lyapunov.bounds.liplt import liplt
from tf_lyapunov.bounds.lipsdp import check_size, estimated_cost, lipsdp
from tf_lyapunov.bounds.records import RESIDUAL, ChainProof
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.progress import steps

METHODS = ("composition", "liplt", "closed_form", "eclipse", "lipsdp", "dissipativity", "local",
           "linear", "auto")  # fmt: skip
# More classes than this get no bound per pair of logits.
_CLASSES = 40


@dataclasses.dataclass(frozen=True)
class NetworkGain:
    """Proven gains of a network's logits.

    Attributes:
        gain_upper_bound: of all logits together.
        pairs: float64 (K, K), gains of f_i - f_j, or None; (1, 1) for a single logit.
        method: what found them.
        sentences: what was done, for `Certificate.assumptions`.
        seconds: wall time.
        proof: `ChainProof` with what the bounds rest on, or None for the composition rule.
    """

    gain_upper_bound: float
    pairs: np.ndarray | None
    method: str
    sentences: tuple
    seconds: float
    proof: ChainProof | None = None


def network_gain(
    network,
    constants,
    method,
    *,
    time_budget=60.0,
    solver="structured",
    sources=None,
    target=None,
):
    """Gains of the logits by one of `METHODS`, never above those of the composition rule.

    The longest dense chain that ends at the logits (small convolutions included) is bounded by the
    method; what comes before it is composed. Of another target, what comes after it too.

    Args:
        network: `Network`.
        constants: `lipschitz_constants(network, sources)`.
        method: one of `METHODS`. `"auto"` takes the tightest that `time_budget` allows.
        time_budget: seconds for the search, about.
        solver: see `sdp.solve`.
        sources: names of the inputs that change, None for all.
        target: name of a node, whose outputs may have any shape, instead of the logits; then no
            pairs are bounded.

    Returns:
        `NetworkGain`.

    Raises:
        UnsupportedLayerError: if the method does not apply to the model (never for `"auto"`).
        ValueError: if it is too large for the method.
    """
    begin = time.monotonic()
    end = network.logits if target is None else target
    if method in ("composition", "linear"):  # the latter bounds inputs one by one
        return NetworkGain(constants[end], None, method, (), 0.0)
    composed, text = constants, ""
    if not network.is_chain:  # residual blocks, and what precedes the chain, as wholes
        composed = lipschitz_constants(with_blocks(network, seconds=time_budget / 4), sources)
        if composed[end] < constants[end]:
            text = (
                f"{RESIDUAL}, by one matrix inequality each: gain "
                f"{composed[end]:.6g} of the composition against "
                f"{constants[end]:.6g}."
            )
    try:
        tail = dense_tail(network) if target is None else tail_before(network, target)
    except UnsupportedLayerError:
        if method != "auto":
            raise
        sentences = ("Method: auto chose composition, since no dense layer makes the logits.", text)
        elapsed = time.monotonic() - begin
        kept = tuple(filter(None, sentences))
        return NetworkGain(min(composed[end], constants[end]), None, method, kept, elapsed)
    chain, before = _moving_chain(network, constants, tail, sources), composed[tail.start]
    if chain is None:
        return NetworkGain(0.0, None, method, ("No perturbed input reaches it.",), 0.0)
    chosen = choose(chain, time_budget) if method in ("auto", "local") else method
    if chosen == "lipsdp":
        check_size(chain.widths)
    sentences, failed = [text] if text else [], False
    indices = None
    if chosen == "dissipativity":
        bound, text, whole, indices = _by_indices(chain, time_budget, solver)
        sentences.append(text)
        pair_method = "closed_form"
    else:
        whole = _bound(chain, chosen, time_budget, solver)
        failed = whole.verdict == "SOLVER_FAILED"
        pair_method = chosen
        bound = whole.gain_upper_bound
    pairs, pair_text, found = None, "", {}
    if target is None:
        left = max(time_budget - (time.monotonic() - begin), 0.0)
        pairs, pair_text, found = _pairs(chain, pair_method, left, solver, bound)
    proof = ChainProof(tail.start, whole, found, indices, chain.sectors, chain.widths)
    total = rounding.product_up(before, bound, tail.after)
    total = min(composed[end], constants[end], total)
    if pairs is not None:
        pairs = np.where(pairs == 0, 0.0, rounding.up(before * pairs))
    name = chosen.replace("_", " ")
    elapsed = time.monotonic() - begin
    label = name if method == chosen else f"{method} chose {name}"
    sentences.insert(
        0,
        f"Method: {label} for the last {chain.depth} linear layers, widths "
        f"{'-'.join(map(str, chain.widths))}: gain {bound:.6g} against {product_gain(chain):.6g} "
        f"for the product of norms{pair_text}; {elapsed:.2g} s. Multipliers were proved in float64."
        + (" The solver failed (SOLVER_FAILED); the closed form's bound stands." if failed else ""),
    )
    return NetworkGain(total, pairs, method, tuple(sentences), elapsed, proof)


def _moving_chain(network, constants, tail, sources):
    """The chain on those entries of its input that may change; None if there are none."""
    entries = moving_entries(network, tail.start, constants, sources or network.inputs)
    chain = tail.chain
    if entries is None or len(entries) != chain.widths[0] or np.all(entries):
        return None if constants[tail.start] == 0 else chain
    if not np.any(entries):
        return None
    error = chain.errors[0]
    return dataclasses.replace(
        chain,
        weights=(chain.weights[0][:, entries], *chain.weights[1:]),
        errors=(error[:, entries] if np.ndim(error) else error, *chain.errors[1:]),
        biases=None,  # they differ from input to input
    )


def choose(chain, time_budget):
    """Tightest of lipsdp, eclipse and closed form whose estimated time is within the budget."""
    seconds, memory = estimated_cost(chain.widths)
    if seconds <= time_budget and memory < 4e9:
        return "lipsdp"
    if _eclipse_seconds(chain.widths) <= time_budget:
        return "eclipse"
    return "closed_form"


def _eclipse_seconds(widths):
    """Rough cost of one structured program per hidden layer."""
    sides = [min(a, b) for a, b in zip(widths[:-2], widths[1:-1], strict=True)]
    layers = zip(sides, widths[1:-1], strict=True)
    return sum(estimated_cost((a, b, b))[0] for a, b in layers)


def _bound(chain, method, seconds, solver):
    if method == "liplt":
        return liplt(chain)
    if method == "closed_form":
        return closed_form(chain)
    if method == "eclipse":
        return eclipse(chain, solver=solver, seconds=seconds)
    return lipsdp(chain, solver=solver, seconds=seconds)


def _pairs(chain, method, seconds, solver, whole):
    """Gains of differences of logits, (K, K), how they were found, and the bounds by pair."""
    classes = chain.widths[-1]
    if classes > _CLASSES or chain.depth < 2:
        return None, "", {}
    if classes == 1:
        return np.full((1, 1), whole), "", {}
    count = classes * (classes - 1) // 2
    widths = (*chain.widths[:-1], 1)
    cost = {"lipsdp": estimated_cost(widths)[0], "eclipse": _eclipse_seconds(widths)}
    used = method
    if cost.get(method, 0.0) * count > seconds:
        used = "closed_form"
    deadline = time.monotonic() + max(seconds, 5.0)
    cap = rounding.product_up(float(rounding.up(math.sqrt(2.0))), whole)
    pairs, bounds = np.zeros((classes, classes)), {}
    for i, j in steps(list(zip(*np.tril_indices(classes, -1), strict=True)), "pairs of classes"):
        row = np.zeros((1, classes))
        row[0, i], row[0, j] = 1.0, -1.0
        late = time.monotonic() > deadline
        part = chain.with_output(row)
        found = _bound(part, "closed_form" if late else used, seconds, solver)
        bounds[i, j] = found
        pairs[i, j] = pairs[j, i] = min(cap, found.gain_upper_bound)
    return pairs, f", and each of {count} pairs of logits by {used.replace('_', ' ')}", bounds


def _by_indices(chain, seconds, solver):
    """Gain of the cone that the chain's indices prove, a sentence, and what proves it."""
    fallback = closed_form(chain)
    size = fallback.gain_upper_bound
    if size == 0:
        return 0.0, "The chain is constant: every (δ, ν) with ν ≤ 0 holds.", fallback, None
    if chain.depth == 1:
        return size, "The chain is one linear map, bounded by its norm.", fallback, None
    found = network_indices(chain, delta=64.0 / size, solver=solver, seconds=max(seconds, 1.0))
    if found.verdict != "PROVED":
        text = "No indices were proved (SOLVER_FAILED); the closed form's bound stands."
        return size, text, fallback, None
    text = (
        f"These {chain.depth} layers are IIFOFP(δ, ν) with δ = {found.delta:.6g}, "
        f"ν = {found.nu:.6g} (one multiplier block per layer), hence of gain at most "
        f"{found.gain_upper_bound:.6g}."
    )
    return min(found.gain_upper_bound, size), text, fallback, found
