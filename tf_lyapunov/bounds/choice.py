"""Network bounds for `certify`: which method, at what cost, and the gains of pairs of logits."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.blocks import with_blocks
from tf_lyapunov.bounds.budget import Budget, closed_form_flops, products_flops, proof_flops
from tf_lyapunov.bounds.chains import product_gain
from tf_lyapunov.bounds.composition import lipschitz_constants, moving_entries
from tf_lyapunov.bounds.dissipativity import network_indices
from tf_lyapunov.bounds.eclipse import closed_form, eclipse
from tf_lyapunov.bounds.graphs import joint_gains, joint_part
from tf_lyapunov.bounds.liplt import Products
from tf_lyapunov.bounds.lipsdp import FLOPS, check_size, estimated_cost, lipsdp
from tf_lyapunov.bounds.multipliers import ChainBound
from tf_lyapunov.bounds.operators import OperatorChain, OperatorProducts
from tf_lyapunov.bounds.pairs import LARGEST, named_pairs, pair_gains
from tf_lyapunov.bounds.programs import first_order
from tf_lyapunov.bounds.records import JOINT, OPERATORS, RESIDUAL, ChainProof, PartProof
from tf_lyapunov.bounds.tails import Reader, dense_tail, tail_before
from tf_lyapunov.digits import at_most
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding

METHODS = ("composition", "liplt", "closed_form", "eclipse", "lipsdp", "dissipativity", "local",
           "linear", "box", "auto")  # fmt: skip


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

    The longest chain of linear layers that ends at the logits is bounded by the method as far back
    as its matrices are small, and by products of operators beyond; branches that meet before it are
    one problem. What comes before is composed; of another target, what comes after it too. Of
    everything that was proved, and for every pair of logits alone, the smallest bound counts.

    Args:
        network: `Network`.
        constants: `lipschitz_constants(network, sources)`.
        method: one of `METHODS`. `"auto"` takes the tightest that `time_budget` allows.
        time_budget: seconds for the search: factorisations that do not fit are not begun.
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
    begin, budget = time.monotonic(), Budget(time_budget)
    end = network.logits if target is None else target
    if method in ("composition", "linear", "box"):  # the others bound inputs one by one
        return NetworkGain(constants[end], None, method, (), 0.0)
    reader, found, composed = Reader(network), _Best(constants[end]), constants
    if not network.is_chain:
        composed = _of_branches(found, reader, constants, sources, method, target, budget)
    try:
        tail = dense_tail(network, reader) if target is None else tail_before(
            network, target, reader)  # fmt: skip
    except UnsupportedLayerError:
        wide = None if target is not None else _operators(reader, end, None, budget, method)
        if method != "auto" and (method != "liplt" or wide is None) and not found.is_joint:
            raise
        if not found.is_joint:
            found.sentences.insert(
                0, "Method: auto chose composition, since no dense layer makes the logits."
            )
        _take_operators(found, wide, composed, 1.0)
        return found.result(method, time.monotonic() - begin)
    chain = _moving_chain(network, constants, tail, sources)
    if chain is None:
        return NetworkGain(0.0, None, method, ("No perturbed input reaches it.",), 0.0)
    wide = _operators(reader, tail.end, tail, budget, method)
    before = composed[tail.start]
    if wide is not None:
        through = rounding.product_up(composed[wide.chain.start], wide.reach()[tail.start])
        before = min(before, through)
    by_pairs = target is None and 1 < chain.widths[-1] <= LARGEST
    for_whole = budget.part(0.5) if by_pairs else budget
    chosen = method
    if method in ("auto", "local"):
        chosen = choose(chain, for_whole)
        chosen = chosen if chosen != "closed_form" else _cheapest(chain, for_whole)
    if chosen == "lipsdp":
        check_size(chain.nonlinear_widths)
    indices, pair_method, products = None, chosen, None
    if chosen == "dissipativity":
        bound, text, whole, indices = _by_indices(chain, for_whole.left(), solver)
        found.sentences.append(text)
        pair_method = "closed_form"
    else:
        if method == "auto" or chosen == "liplt" or not for_whole.fits(_flops(chain, chosen)):
            # Cheap, and better than the product where a search gets nowhere.
            if chosen == "liplt" or for_whole.part(0.6).fits(products_flops(chain.widths)):
                products = Products(chain)
        whole = _bound(chain, chosen, for_whole, solver, products)
        bound = whole.gain_upper_bound
    pairs = None
    if target is None:
        pairs = pair_gains(chain, pair_method, budget, solver, whole, products)
    found.proof = ChainProof(
        tail.start, whole, pairs.bounds if pairs is not None else {}, indices, chain.sectors,
        chain.widths,
    )  # fmt: skip
    found.take(rounding.product_up(before, bound, tail.after))
    if pairs is not None:
        found.take_pairs(rounding.up(before * pairs.gains), pairs.methods)
    _take_operators(found, wide, composed, tail.after)
    late = pairs is not None and pairs.cut_short
    elapsed = time.monotonic() - begin
    found.sentences.insert(0, _told(chain, method, chosen, whole, bound, late, elapsed))
    return found.result(method, elapsed)


class _Best:
    """Smallest gains so far, of all outputs and of pairs, and what bounded these."""

    def __init__(self, gain):
        self.gain, self.pairs, self.methods = gain, None, {}
        self.sentences, self.proof, self.is_joint, self.parts = [], None, False, []

    def take(self, gain):
        self.gain = min(self.gain, gain)

    def take_pairs(self, gains, names):
        """Keeps smaller gains (K, K); `names` is what found them, or a dict by pair."""
        gains = np.where(np.eye(len(gains), dtype=bool) & (len(gains) > 1), 0.0, gains)
        if self.pairs is None:
            self.pairs = np.full(gains.shape, math.inf)
        for i, j in zip(*np.tril_indices(len(gains), -1), strict=True):
            pair = int(i), int(j)
            if gains[pair] < self.pairs[pair]:
                self.methods[pair] = names if isinstance(names, str) else names[pair]
        self.pairs = np.minimum(self.pairs, gains)

    def result(self, method, seconds):
        sentences = list(self.sentences)
        if self.methods:
            sentences.append(f"Gains of pairs of logits: {named_pairs(self.methods)}.")
        if self.parts:
            chain = self.proof or ChainProof()
            self.proof = dataclasses.replace(chain, parts=tuple(self.parts))
        return NetworkGain(
            self.gain, self.pairs, method, tuple(sentences), seconds, self.proof
        )  # fmt: skip


def _of_branches(found, reader, constants, sources, method, target, budget):
    """Takes what one problem for all branches proves; the composition with blocks as wholes."""
    network = reader.network
    end = network.logits if target is None else target
    part = joint_part(reader, end) if method in ("lipsdp", "auto") else None
    if part is not None and constants[part.start] > 0:
        gains = joint_gains(part, network, budget.part(0.5), with_pairs=target is None)
        before = constants[part.start]
        if math.isfinite(gains.gain_upper_bound) and before == 1.0:
            _take_joint(found, part, end, gains, before, constants[end])
            return constants
    blocks = []
    merged = with_blocks(network, seconds=0.25 * budget.left(), proofs=blocks)
    composed = lipschitz_constants(merged, sources)
    if composed[end] < constants[end]:
        found.parts += blocks
        found.sentences.append(
            f"{RESIDUAL}, by one matrix inequality each: gain {at_most(composed[end], 6)} of the "
            f"composition against {constants[end]:.6g}."
        )
    if part is not None and constants[part.start] > 0:
        _take_joint(found, part, end, gains, composed[part.start], constants[end])
    found.take(composed[end])
    return composed


def _take_joint(found, part, end, gains, before, composed):
    if not math.isfinite(gains.gain_upper_bound):
        return
    gain = rounding.product_up(before, gains.gain_upper_bound)
    found.sentences.append(
        f"{JOINT}, one matrix inequality for everything after {part.start!r}, with "
        f"{part.merges} sums or concatenations and {part.form.total} signals: "
        f"gain {at_most(gain, 6)} against {at_most(composed, 6)} of the composition."
    )
    found.is_joint = True
    found.take(gain)
    if gains.multipliers is not None:
        names = part.form.names
        proof = PartProof(part.start, end, names, gains.multipliers, gains.pair_multipliers)
        found.parts.append(proof)
    if gains.pairs is not None and len(gains.pairs) <= LARGEST:
        shared = "the multipliers of all logits in one problem with its branches"
        names = dict.fromkeys(
            zip(*map(np.ndarray.tolist, np.tril_indices(len(gains.pairs), -1)), strict=True),
            shared,
        )  # fmt: skip
        names |= dict.fromkeys(gains.searched, "lipsdp, one problem with all branches")
        found.take_pairs(rounding.up(before * gains.pairs), names)


def _operators(reader, end, tail, budget, method):
    """`OperatorProducts` of the longest chain that ends at a node; None if `tail` is as long."""
    share = 0.8 if method == "liplt" else 0.3
    chain = OperatorChain.before(reader, end)
    if chain is None or (tail is not None and chain.start == tail.start):
        return None
    return OperatorProducts(chain, budget.part(share))


def _take_operators(found, wide, composed, after):
    """Takes what the products of layers that are not written out prove."""
    if wide is None:
        return
    before, gain = composed[wide.chain.start], wide.gain()
    found.take(rounding.product_up(before, gain, after))
    pairs = wide.pair_gains()
    if pairs is not None and len(pairs) <= LARGEST:
        found.take_pairs(rounding.up(before * pairs), "liplt of operators")
    largest = max((node.shape for node in wide.chain.nodes), key=math.prod)
    found.sentences.append(
        f"{OPERATORS}, the last {wide.count} linear layers by LipLT, of which the largest has "
        f"{largest[0]}×{largest[1]} entries: gain {at_most(gain, 6)} against "
        f"{rounding.product_up(*wide.chain.norms):.6g} for the product of norms."
    )


def _told(chain, method, chosen, whole, bound, late, elapsed):
    """How the chain was bounded, in one sentence."""
    name = chosen.replace("_", " ")
    label = name if method == chosen else f"{method} chose {name}"
    widths = "-".join(map(str, chain.widths))
    text = f"Method: {label} for the last {chain.depth} linear layers, widths {widths}: gain "
    text += f"{at_most(bound, 6)} "
    if chosen != "dissipativity" and whole.method not in (name, chosen):
        text += f"(by {whole.method}) "
    text += f"against {product_gain(chain):.6g} for the product of norms; {elapsed:.2g} s. "
    text += "Multipliers were proved in float64."
    if whole.cut_short or late:
        text += " The search ended with its time budget: more time may give more."
    if whole.verdict == "SOLVER_FAILED":
        text += " The solver failed (SOLVER_FAILED); the closed form's bound stands."
    return text


def _cheapest(chain, budget):
    """The tightest of the closed form, LipLT and the product of norms that fits."""
    if budget.fits(closed_form_flops(chain.nonlinear_widths) + proof_flops(chain.nonlinear_widths)):
        return "closed_form"
    return "liplt" if budget.fits(products_flops(chain.widths)) else "product"


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
    """Tightest of lipsdp, eclipse and closed form whose estimated time is within the budget.

    Args:
        chain: `Chain`.
        time_budget: seconds on a machine that is as fast as the estimates suppose, or a `Budget`.
    """
    left = time_budget
    if isinstance(time_budget, Budget):
        left = time_budget.left() / max(1.0, time_budget.seconds_for(FLOPS))
    seconds, memory = estimated_cost(chain.nonlinear_widths)
    if seconds <= left and memory < 4e9:
        return "lipsdp"
    if _eclipse_seconds(chain.nonlinear_widths) <= left:
        return "eclipse"
    return "closed_form"


def _eclipse_seconds(widths):
    """Rough cost of one structured program per hidden layer."""
    sides = [min(a, b) for a, b in zip(widths[:-2], widths[1:-1], strict=True)]
    layers = zip(sides, widths[1:-1], strict=True)
    return sum(estimated_cost((a, b, b))[0] for a, b in layers)


def _flops(chain, method):
    """Flops of a method, roughly."""
    widths = chain.nonlinear_widths
    if method == "lipsdp":
        return first_order.estimated_flops(widths)
    if method == "eclipse":
        return FLOPS * _eclipse_seconds(widths)
    return closed_form_flops(widths) + proof_flops(widths) if method == "closed_form" else 0.0


def _bound(chain, method, budget, solver, products):
    """`ChainBound` by a method, or by the products of layers where these give less."""
    seconds = None if math.isinf(budget.seconds) else budget.left()
    other = products.bound() if products is not None else None
    if method == "liplt":
        return other
    if method == "product":
        found = ChainBound(product_gain(chain), "product")
    elif method == "closed_form":
        found = closed_form(chain, seconds=seconds)
    elif method == "eclipse":
        found = eclipse(chain, solver=solver, seconds=seconds)
    else:
        found = lipsdp(chain, solver=solver, seconds=seconds)
    if other is None or found.gain_upper_bound <= other.gain_upper_bound:
        return found
    return dataclasses.replace(other, cut_short=found.cut_short, verdict=found.verdict)


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
        f"{at_most(found.gain_upper_bound, 6)}."
    )
    return min(found.gain_upper_bound, size), text, fallback, found
