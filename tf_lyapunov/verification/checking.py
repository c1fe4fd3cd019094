"""What follows from a model's weights and a proof file's evidence, and which claims do not."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.verification import graphs, inequalities
from tf_lyapunov.verification.arithmetic import (
    SLACK,
    UNIT,
    down,
    product_up,
    rounded,
    row_norms_up,
    scaled_up,
    sqrt_up,
)
from tf_lyapunov.verification.around.balls import Gains
from tf_lyapunov.verification.around.claims import attempt, converted, region_around
from tf_lyapunov.verification.around.pairs import expanded
from tf_lyapunov.verification.contents import (
    Claim,
    Evidence,
    pack,
    quoted,
    unpack,
)
from tf_lyapunov.verification.network import column_distances
from tf_lyapunov.verification.rounding import computed, exact

__all__ = [
    "Claim", "Derived", "Evidence", "derive", "evaluate",
    "objections", "pack", "radii", "unpack",
]  # fmt: skip

_ENTRIES = 2**22
_ROOT2 = sqrt_up(2.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """Bounds that follow from the weights and the evidence.

    Attributes:
        gain: of all logits together.
        pairs: (K, K) gains of f_i - f_j; (1, 1) for a single logit.
        reach, own: gain from the input to each step, and of each step, by name.
        failures: sentences on evidence that did not hold.
        around: see `Evidence`; it is used by `objections`.
    """

    gain: float
    pairs: np.ndarray
    reach: dict
    own: dict
    failures: tuple
    around: dict = dataclasses.field(default_factory=dict)


def derive(network, evidence):
    """Gains of a network's logits from its weights, with the help of `Evidence`.

    Args:
        network: `network.Network`.
        evidence: `Evidence`.

    Returns:
        `Derived`.
    """
    failures, found = [], {}
    parts = _parts(network, evidence.parts, failures)
    reach, own = network.gains([(p.start, p.end, bound) for p, _, bound in parts])
    gain, classes = reach[network.logits], network[network.logits].shape[-1]
    for part, graph, _ in parts:
        for pair, multipliers in part.pairs.items():
            if not _is_pair(pair, classes, failures):
                continue
            bound = _proved_gain(
                graph.output_difference(*pair), multipliers, pair, failures, graphs
            )
            found[pair] = min(found.get(pair, math.inf), product_up(reach[part.start], bound))
    if evidence.start is not None:
        try:
            chain = network.chain(evidence.start)
        except (ValueError, KeyError) as error:
            failures.append(f"The chain of the proof is not in the model: {quoted(error)}.")
        else:
            before = reach[evidence.start]
            narrow = inequalities.narrow_input(chain)
            bound = _chain_gain(chain, narrow, evidence, failures)
            gain = min(gain, product_up(before, bound))
            for pair, multipliers in evidence.pairs.items():
                if not _is_pair(pair, classes, failures):
                    continue
                bound = _proved_gain(narrow.output_difference(*pair), multipliers, pair, failures)
                found[pair] = min(found.get(pair, math.inf), product_up(before, bound))
            if "liplt" in evidence.methods:
                gains = inequalities.liplt_pair_gains(chain)
                for i in range(classes):
                    for j in range(i):
                        bound = product_up(before, float(gains[i, j]))
                        found[i, j] = min(found.get((i, j), math.inf), bound)
    pairs = np.full((classes, classes), product_up(_ROOT2, gain) if classes > 1 else gain)
    head = network.head()
    if head is not None:
        through, weight, error = head
        if classes == 1:
            pairs = np.minimum(pairs, product_up(reach[through], own[network.logits]))
        else:
            distances = column_distances(weight, error)
            pairs = np.minimum(pairs, scaled_up(reach[through], distances))
    for (i, j), bound in found.items():
        pairs[i, j] = pairs[j, i] = min(pairs[i, j], bound)
    return Derived(gain, pairs, reach, own, tuple(failures), evidence.around)


def _chain_gain(chain, narrow, evidence, failures):
    bounds = [math.inf]
    if "product" in evidence.methods:
        bounds.append(inequalities.product_gain(chain))
    if "liplt" in evidence.methods:
        bounds.append(inequalities.liplt_gain(chain))
    if evidence.whole is not None:
        bounds.append(_proved_gain(narrow, evidence.whole, "all logits", failures))
    if evidence.indices is not None:
        delta, nu, multipliers = evidence.indices
        why = inequalities.refusal(chain, multipliers)
        if why is None and inequalities.proves_indices(chain, delta, nu, multipliers):
            bounds.append(inequalities.cone_gain(delta, nu))
        else:
            reason = why or f"they do not prove IIFOFP({delta:.6g}, {nu:.6g})"
            failures.append(f"The multipliers of the indices fail: {reason}.")
    return min(bounds)


def _parts(network, parts, failures):
    """`(Part, Graph, bound)` of those whose multipliers hold."""
    found = []
    for part in parts:
        between = f"between {quoted(part.start)} and {quoted(part.end)}"
        if part.pairs and (part.end != network.logits or len(network[part.end].shape) != 1):
            failures.append(f"Pairs of logits are no results of the part {between}.")
            continue
        try:
            graph = graphs.read(network, part.start, part.end)
        except (ValueError, KeyError) as error:
            failures.append(f"The part {between} is not in the model: {quoted(error)}.")
            continue
        bound = _proved_gain(graph, part.whole, f"the part {between}", failures, graphs)
        found.append((part, graph, bound))
    return found


def _is_pair(pair, classes, failures):
    i, j = pair
    if 0 <= j < i < classes:
        return True
    failures.append(f"There is no pair of logits ({i}, {j}).")
    return False


def _proved_gain(chain, multipliers, name, failures, rules=inequalities):
    """√ρ of multipliers that hold; infinite otherwise, and a sentence. `rules` knows the form."""
    why = rules.refusal(chain, multipliers)
    if why is None and rules.proves_gain(chain, multipliers):
        return sqrt_up(multipliers.squared)
    reason = why or f"the matrix is not proved positive semidefinite at ρ = {multipliers.squared!r}"
    failures.append(f"The multipliers of {name} fail: {reason}.")
    return math.inf


def evaluate(network, inputs, arithmetic=exact):
    """Logits (n, K) of the exact network and bounds on the errors of their computation.

    Inputs are first rounded to the dtype of the model's own input; `moved` says by how much.

    Args:
        network: `network.Network`.
        inputs: (n, …) of any real type.
        arithmetic: see `network.Network.evaluate`.
    """
    width = max(math.prod(step.shape) for step in network.steps)
    rows = max(_ENTRIES // max(width, 1), 1)
    parts = []
    for start in range(0, len(inputs), rows):
        parts.append(network.evaluate(cast(network, inputs[start : start + rows]), arithmetic))
    values, errors = (np.concatenate(p) for p in zip(*parts, strict=True))
    return values, errors


def cast(network, inputs):
    """Inputs as the model's own `Input` casts them, as float64."""
    found = np.asarray(inputs).astype(np.float64)
    for dtype in network.casts:
        found = rounded(found, dtype)
    if not np.all(np.isfinite(found)):
        raise OverflowError(f"an input is beyond the model's input dtype {network.casts}")
    return found


def truncated(network, *numbers):
    """Sentences on numbers of a claim that a model of integer inputs would truncate, or wrap.

    Args:
        network: `network.Network`.
        numbers: arrays; what is infinite is left out.
    """
    for dtype in network.casts:
        if "int" not in dtype:
            continue
        limits = np.iinfo(dtype)
        for array in numbers:
            held = array[np.isfinite(array)]
            if np.any(held != np.rint(held)) or np.any((held < limits.min) | (held > limits.max)):
                yield (
                    f"The model reads {dtype}, and the inputs that the claim is about end at or "
                    "lie around numbers that it would truncate or wrap around. Use whole ones."
                )
                return


def moved(network, inputs):
    """Upper bounds on the norms of what the model's own `Input` takes off its inputs, (n,)."""
    found = np.zeros(len(inputs))
    rows = max(_ENTRIES // max(inputs[0].size, 1), 1)
    for start in range(0, len(inputs), rows):
        block = np.asarray(inputs[start : start + rows])
        change = np.abs(block.astype(np.float64) - cast(network, block))
        found[start : start + rows] = row_norms_up(change.reshape(len(block), -1)) * SLACK
    return found


def radii(logits, errors, labels, pairs, moved=0.0):
    """Radii min_j (f_c - f_j)/gain_cj, rounded down; 0 where the label does not surely win.

    Args:
        logits, errors: as `evaluate` gives them.
        labels: int (n,).
        pairs: of `Derived`.
        moved: distances of the inputs from those that were evaluated, taken off the radii.
    """
    found = _radii(logits, errors, labels, pairs)
    return np.where(moved > 0, np.maximum(down(found - moved), 0.0), found)


def _radii(logits, errors, labels, pairs):
    count, classes = logits.shape
    if classes == 1:
        sign = np.where(labels == 1, 1.0, -1.0)
        lower = down(sign * logits[:, 0] - errors[:, 0])
        return _quotient_down(lower, np.full(count, pairs[0, 0]))
    rows = np.arange(count)
    spread = (errors[rows, labels][:, None] + errors) * SLACK
    lower = down(down(logits[rows, labels][:, None] - logits) - spread)
    found = _quotient_down(lower, pairs[labels])
    found[rows, labels] = np.inf
    return found.min(axis=1)


def _quotient_down(lower, distance):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.where(distance == 0, np.inf, down(lower / distance))
    return np.where(lower > 0, np.maximum(quotient, 0.0), 0.0)


def objections(network, derived, claim):
    """Sentences on what a claim says and `derived` does not imply, and the radii derived.

    Returns:
        `(sentences, radius)`.
    """
    found = list(derived.failures)
    if not claim.gain_upper_bound >= derived.gain:
        found.append(
            f"The claimed gain {claim.gain_upper_bound!r} is below what the weights and the "
            f"multipliers prove, {derived.gain!r}."
        )
    for name, own, reach in claim.table:
        if name not in derived.own:
            found.append(f"The table names a layer {quoted(name)} that the model does not have.")
        elif not (own >= derived.own[name] and reach >= derived.reach[name]):
            found.append(
                f"The claimed gain of layer {quoted(name)} is below what its weights prove."
            )
    shape, count = network.steps[0].shape, len(claim.radius)
    classes = network[network.logits].shape[-1]
    if claim.inputs.shape != (count, *shape) or not np.all(np.isfinite(claim.inputs)):
        found.append(f"The inputs are not {count} finite arrays of shape {shape}.")
        return found, np.zeros(count)
    if np.any(claim.labels < 0) or np.any(claim.labels >= max(classes, 2)):
        found.append("A label is not one of the model's classes.")
        return found, np.zeros(count)
    if len(network[network.logits].shape) != 1:
        found.append("The model's logits are not one row per input.")
        return found, np.zeros(count)
    logits, errors = evaluate(network, claim.inputs)
    shift = moved(network, claim.inputs)
    if np.any(shift > 0) and any("int" in dtype for dtype in network.casts):
        found.append("An input is no whole number, which the model would truncate.")
        return found, np.zeros(count)
    if claim.bounds is not None:
        low, high = claim.bounds
        if np.any(claim.inputs < low) or np.any(claim.inputs > high):
            found.append("An input is not within the bounds.")
            return found, np.zeros(count)
    radius = radii(logits, errors, claim.labels, derived.pairs, shift)
    radius = converted(radius, claim.norm, claim.inputs[0].size)
    radius = _around(network, derived, claim, errors, radius, found)
    late = ~(claim.radius <= radius)
    if np.any(late):
        first = int(np.flatnonzero(late)[0])
        found.append(
            f"{np.sum(late)} of {count} radii are larger than what follows, first that of input "
            f"{first}: {float(claim.radius[first])!r} against {float(radius[first])!r}."
        )
    _, spread = evaluate(network, claim.inputs, computed)
    # A claimed allowance may be smaller than what the dtypes imply, never larger.
    own = np.sqrt(np.sum(spread * spread, axis=1)) * (1 + 2.0**-20)
    found += _described(logits, errors, claim, np.fmin(own, claim.float_allowance))
    return found, radius


def _around(network, derived, claim, errors, radius, found):
    """Radii by bounds around inputs where they are larger, which `found` says why they are not."""
    bounds = (-np.inf, np.inf) if claim.bounds is None else claim.bounds
    radius = np.array(radius)
    if not derived.around:
        return radius
    within, own = expanded(network, derived.own)
    gains = Gains(own)
    for i, pieces in derived.around.items():
        if not radius[i] < claim.radius[i] < np.inf:
            continue
        given = claim.inputs[i].astype(np.float64)
        center = cast(network, claim.inputs[i : i + 1])[0]
        try:
            region = region_around(center, given, claim.radius[i], claim.norm, bounds)
            if attempt(within, gains, region, int(claim.labels[i]), errors[i], pieces).holds:
                radius[i] = claim.radius[i]
        except (ValueError, OverflowError) as error:
            found.append(f"The multipliers around input {i} fail: {quoted(error)}.")
    return radius


def _described(logits, errors, claim, allowance):
    """Objections to decisions, margins and the verdict."""
    found, count = [], len(logits)
    rows = np.arange(count)
    if logits.shape[1] == 1:
        sure = np.abs(logits[:, 0]) > errors[:, 0] + allowance
        wrong = sure & ((logits[:, 0] > 0) != (claim.predictions == 1))
        margins = np.where(claim.labels == 1, logits[:, 0], -logits[:, 0])
    else:
        inside = (claim.predictions >= 0) & (claim.predictions < logits.shape[1])
        mine = np.where(inside, claim.predictions, 0)
        top = np.max(logits - errors, axis=1)
        # The model's own decision was computed: within its allowance it may be another.
        reach = (logits + errors)[rows, mine] + 2 * allowance
        wrong = ~inside | (reach < top)
        others = np.array(logits)
        others[rows, claim.labels] = -np.inf
        margins = logits[rows, claim.labels] - others.max(axis=1)
    if np.any(wrong):
        found.append(f"{np.sum(wrong)} of {count} decisions are not the model's.")
    room = (_ROOT2 * allowance + 2 * errors.max(axis=1)) * SLACK
    room = room + 8 * UNIT * np.abs(margins)
    if not np.all(np.abs(claim.margins - margins) <= room):
        found.append("A margin is not the model's.")
    if claim.verdict != ("PROVED" if np.any(claim.radius > 0) else "NOT_PROVED"):
        found.append(f"The verdict {claim.verdict!r} does not fit the radii.")
    return found
