"""`verify`: whether a proof file's claims follow from a model's weights."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.verification import archive, inequalities
from tf_lyapunov.verification.arithmetic import (
    SLACK,
    UNIT,
    down,
    product_up,
    rounded,
    row_norms_up,
    sqrt_up,
)
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
    "Claim", "Derived", "Evidence", "Verification", "derive", "differences", "evaluate",
    "objections", "pack", "radii", "unpack", "verify",
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
    """

    gain: float
    pairs: np.ndarray
    reach: dict
    own: dict
    failures: tuple


def derive(network, evidence):
    """Gains of a network's logits from its weights, with the help of `Evidence`.

    Args:
        network: `network.Network`.
        evidence: `Evidence`.

    Returns:
        `Derived`.
    """
    reach, own = network.gains()
    gain, failures, found = reach[network.logits], [], {}
    classes = network[network.logits].shape[-1]
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
            for (i, j), multipliers in evidence.pairs.items():
                if not (0 <= j < i < classes):
                    failures.append(f"There is no pair of logits ({i}, {j}).")
                    continue
                bound = _proved_gain(narrow.output_difference(i, j), multipliers, (i, j), failures)
                found[i, j] = product_up(before, bound)
            if "liplt" in evidence.methods:
                for i in range(classes):
                    for j in range(i):
                        bound = inequalities.liplt_gain(chain.output_difference(i, j))
                        found[i, j] = min(found.get((i, j), math.inf), product_up(before, bound))
    pairs = np.full((classes, classes), product_up(_ROOT2, gain) if classes > 1 else gain)
    head = network.head()
    if head is not None:
        through, weight, error = head
        if classes == 1:
            pairs = np.minimum(pairs, product_up(reach[through], own[network.logits]))
        else:
            distances = column_distances(weight, error)
            pairs = np.minimum(pairs, reach[through] * distances * (1 + 4 * UNIT))
    for (i, j), bound in found.items():
        pairs[i, j] = pairs[j, i] = min(pairs[i, j], bound)
    return Derived(gain, pairs, reach, own, tuple(failures))


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


def _proved_gain(chain, multipliers, name, failures):
    why = inequalities.refusal(chain, multipliers)
    if why is None and inequalities.proves_gain(chain, multipliers):
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
    radius = radii(logits, errors, claim.labels, derived.pairs, shift)
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


@dataclasses.dataclass(frozen=True, eq=False)
class Verification:
    """Outcome of `verify`.

    Attributes:
        holds: every claim of the file follows from the model's weights.
        reasons: why not; empty if it holds.
        method: how the certificate was made, as the file says.
        gain_upper_bound: of the logits, as derived here (infinite if nothing could be).
        radius: float64 (n,), as derived here for the file's inputs and labels; 0 if nothing could.
        claimed_gain_upper_bound, claimed_radius: as the file says.
        notes: what the file says of itself, unchecked: each on one line, in quotation marks.
        seconds: wall time.
    """

    holds: bool
    reasons: tuple
    method: str
    gain_upper_bound: float
    radius: np.ndarray
    claimed_gain_upper_bound: float
    claimed_radius: np.ndarray
    notes: tuple
    seconds: float

    def __bool__(self):
        return self.holds

    def explain(self):
        """Plain text: whether the file's claims follow from the weights, and if not, why."""
        count, proved = len(self.claimed_radius), int(np.sum(self.claimed_radius > 0))
        outcome = "VERIFIED" if self.holds else "REFUSED"
        lines = [f"Proof file: {outcome} (method, as the file says: {self.method})"]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines.append(
            f"Claimed: gain at most {self.claimed_gain_upper_bound:.6g}, and positive radii for "
            f"{proved} of {count} inputs, in exact arithmetic on the model's weights."
        )
        if self.holds:
            lines.append(
                "Derived from the weights alone, by float64 arithmetic rounded outwards: gain "
                f"{self.gain_upper_bound:.6g}, and no claimed radius exceeds its own."
            )
            lines.append(
                "Tested, not proved: called on inputs of the file and on random probes, the model "
                "agrees with what was read of it, within the rounding of its dtypes."
            )
        if self.notes:
            lines.append("The file says of itself, unchecked and in its own words:")
            lines += [f"  > {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self):
        return self.explain()


def verify(proof_path, model_or_path, input_shape=None):
    """Re-checks a proof file from a model's weights, without trusting what made it.

    Derived anew: the layers' settings and digests of their weights, every layer's gain, the
    matrix inequality of every set of multipliers (by a factor of it, with all rounding bounded),
    the logits of the file's inputs, and from these every radius. The file's numbers are claims
    that must not exceed what is derived. Radii are about the exact function of the weights and
    settings, less what the model's dtypes lose by underflow. That this function is the model's is
    tested, not proved: its layers are called one by one, and the model itself, eagerly, on up to 64
    of the inputs and on random probes, and must agree within the rounding of its dtypes, and decide
    for the label where a radius is claimed. Not checked: sentences.

    Args:
        proof_path: a file written by `Certificate.save("….npz")`.
        model_or_path: the Keras model, or the path of its `.keras` file.
        input_shape: shape of one input, only for a model that leaves sizes open: a gain can depend
            on them, so they are not taken from the file.

    Returns:
        `Verification`; `holds` is False, with reasons, for another model or a wrong claim.

    Raises:
        ProofFileError: the file is missing, corrupt, of another version, or no proof file.
        ModelFileError: the model's file cannot be read.
        UnsupportedLayerError: naming a layer that the verifier does not know.
        ValueError: the model leaves sizes open and `input_shape` is missing, or does not fit.
    """
    from tf_lyapunov.verification import translation
    from tf_lyapunov.verification.reading import read_with_calls

    begin = time.monotonic()
    header, arrays = archive.read(proof_path)
    try:
        layers, evidence, claim, notes, method = unpack(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ProofFileError(
            f"The proof file is refused: it is incomplete ({type(error).__name__}: "
            f"{quoted(error)}). Write it again with `Certificate.save`. "
            f"Received: {proof_path}."
        ) from error
    model, network, calls = read_with_calls(model_or_path, input_shape)
    reasons = list(differences(layers, network.layers))
    derived, radius = None, np.zeros(len(claim.radius))
    if not reasons:
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                derived = derive(network, evidence)
                reasons, radius = objections(network, derived, claim)
            if not reasons:
                calls = tuple(translation.Call(*call) for call in calls)
                reasons += translation.contradictions(model, network, calls, claim)
        except (OverflowError, ValueError, MemoryError, np.linalg.LinAlgError) as error:
            reasons.append(f"A bound could not be computed: {quoted(error)}.")
    return Verification(
        holds=not reasons,
        reasons=tuple(reasons),
        method=method,
        gain_upper_bound=math.inf if derived is None else derived.gain,
        radius=radius,
        claimed_gain_upper_bound=claim.gain_upper_bound,
        claimed_radius=claim.radius,
        notes=notes,
        seconds=time.monotonic() - begin,
    )


def differences(claimed, present):
    """Sentences on how a model's layers differ from those that were certified."""
    if len(claimed) != len(present):
        yield f"Another model: it has {len(present)} layers, the certified one {len(claimed)}."
    for (name, settings, weights), layer in zip(claimed, present, strict=False):
        if settings != layer.settings:
            yield (
                f"Layer {layer.name!r} is not the certified layer {quoted(name)}: its kind, "
                "settings, activation or place differ."
            )
        elif weights != layer.weights:
            yield f"Layer {layer.name!r} does not have the certified weights."
