"""Network bounds for `certify`: which method, at what cost, and the gains of pairs of logits."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.blocks import with_blocks
from tf_lyapunov.bounds.chains import dense_tail, product_gain
from tf_lyapunov.bounds.composition import lipschitz_constants
from tf_lyapunov.bounds.dissipativity import network_indices
from tf_lyapunov.bounds.eclipse import closed_form, eclipse
from tf_lyapunov.bounds.liplt import liplt
from tf_lyapunov.bounds.lipsdp import check_size, estimated_cost, lipsdp
from tf_lyapunov.bounds.records import RESIDUAL, ChainProof
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding

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


def network_gain(network, constants, method, *, time_budget=60.0, solver="structured"):
    """Gains of the logits by one of `METHODS`, never above those of the composition rule.

    The longest dense chain that ends at the logits (small convolutions included) is bounded by the
    method; what comes before it is composed.

    Args:
        network: `Network`.
        constants: `lipschitz_constants(network)`.
        method: one of `METHODS`. `"auto"` takes the tightest that `time_budget` allows.
        time_budget: seconds for the search, about.
        solver: see `sdp.solve`.

    Returns:
        `NetworkGain`.

    Raises:
        UnsupportedLayerError: if the method does not apply to the model (never for `"auto"`).
        ValueError: if it is too large for the method.
    """
    begin = time.monotonic()
    if method in ("composition", "linear"):  # the latter bounds inputs one by one
        return NetworkGain(constants[network.logits], None, method, (), 0.0)
    composed, text = constants, ""
    if not network.is_chain:  # residual blocks, and what precedes the chain, as wholes
        composed = lipschitz_constants(with_blocks(network, seconds=time_budget / 4))
        if composed[network.logits] < constants[network.logits]:
            text = (
                f"{RESIDUAL}, by one matrix inequality each: gain "
                f"{composed[network.logits]:.6g} of the composition against "
                f"{constants[network.logits]:.6g}."
            )
    try:
        tail = dense_tail(network)
    except UnsupportedLayerError:
        if method != "auto":
            raise
        sentences = ("Method: auto chose composition, since no dense layer makes the logits.", text)
        elapsed = time.monotonic() - begin
        kept = tuple(filter(None, sentences))
        return NetworkGain(composed[network.logits], None, method, kept, elapsed)
    chain, before = tail.chain, composed[tail.start]
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
    pairs, pair_text, found = _pairs(
        chain, pair_method, max(time_budget - (time.monotonic() - begin), 0.0), solver, bound
    )
    proof = ChainProof(tail.start, whole, found, indices, chain.sectors, chain.widths)
    total = min(composed[network.logits], rounding.product_up(before, bound))
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
    for i in range(classes):
        for j in range(i):
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
