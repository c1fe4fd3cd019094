"""`verify`: whether a proof file's claims follow from a model's weights."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.verification import archive, inequalities
from tf_lyapunov.verification.arithmetic import SLACK, UNIT, down, product_up, sqrt_up
from tf_lyapunov.verification.inequalities import Multipliers
from tf_lyapunov.verification.network import column_distances

_ENTRIES = 2**22
_ROOT2 = sqrt_up(2.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What a proof file brings beyond the weights; each item is checked, none is believed.

    Attributes:
        start: name of the step that the dense chain reads, or None without a chain.
        methods: which of `"product"`, `"liplt"` to derive for the chain besides.
        whole: `Multipliers` of all logits, or None.
        indices: `(delta, nu, Multipliers)`, or None.
        pairs: dict (i, j) -> `Multipliers` of f_i - f_j.
    """

    start: str | None = None
    methods: tuple = ()
    whole: Multipliers | None = None
    indices: tuple | None = None
    pairs: dict = dataclasses.field(default_factory=dict)


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
            failures.append(f"The chain of the proof is not in the model: {error}.")
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


def evaluate(network, inputs):
    """Logits (n, K) of the exact network and bounds on the errors of their computation."""
    width = max(math.prod(step.shape) for step in network.steps)
    rows = max(_ENTRIES // max(width, 1), 1)
    parts = []
    for start in range(0, len(inputs), rows):
        block = np.asarray(inputs[start : start + rows]).astype(np.float64)
        parts.append(network.evaluate(block))
    values, errors = (np.concatenate(p) for p in zip(*parts, strict=True))
    return values, errors


def radii(logits, errors, labels, pairs):
    """Radii min_j (f_c - f_j)/gain_cj, rounded down; 0 where the label does not surely win."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """What a proof file says. Arrays have one entry per input.

    Attributes:
        radius, labels, predictions, margins, inputs: of the inputs.
        float_allowance: distance of `margins` from those of exact arithmetic, up to √2.
        gain_upper_bound: of the logits.
        table: rows `(name, gain, gain from the input)`.
        verdict: `"PROVED"` or `"NOT_PROVED"`.
    """

    radius: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    margins: np.ndarray
    inputs: np.ndarray
    float_allowance: float
    gain_upper_bound: float
    table: tuple
    verdict: str


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
            found.append(f"The table names a layer {name!r} that the model does not have.")
        elif not (own >= derived.own[name] and reach >= derived.reach[name]):
            found.append(f"The claimed gain of layer {name!r} is below what its weights prove.")
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
    radius = radii(logits, errors, claim.labels, derived.pairs)
    late = ~(claim.radius <= radius)
    if np.any(late):
        first = int(np.flatnonzero(late)[0])
        found.append(
            f"{np.sum(late)} of {count} radii are larger than what follows, first that of input "
            f"{first}: {float(claim.radius[first])!r} against {float(radius[first])!r}."
        )
    found += _described(logits, errors, claim)
    return found, radius


def _described(logits, errors, claim):
    """Objections to decisions, margins and the verdict."""
    found, count = [], len(logits)
    rows = np.arange(count)
    if logits.shape[1] == 1:
        sure = np.abs(logits[:, 0]) > errors[:, 0] + claim.float_allowance
        wrong = sure & ((logits[:, 0] > 0) != (claim.predictions == 1))
        margins = np.where(claim.labels == 1, logits[:, 0], -logits[:, 0])
    else:
        inside = (claim.predictions >= 0) & (claim.predictions < logits.shape[1])
        mine = np.where(inside, claim.predictions, 0)
        top = np.max(logits - errors, axis=1)
        # The model's own decision was computed: within its allowance it may be another.
        reach = (logits + errors)[rows, mine] + 2 * claim.float_allowance
        wrong = ~inside | (reach < top)
        others = np.array(logits)
        others[rows, claim.labels] = -np.inf
        margins = logits[rows, claim.labels] - others.max(axis=1)
    if np.any(wrong):
        found.append(f"{np.sum(wrong)} of {count} decisions are not the model's.")
    room = (_ROOT2 * claim.float_allowance + 2 * errors.max(axis=1)) * SLACK
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
        notes: sentences on what the file covers.
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
        lines = [f"Proof file: {'VERIFIED' if self.holds else 'REFUSED'} (method: {self.method})"]
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
        return "\n".join(lines + list(self.notes))

    def __str__(self):
        return self.explain()


def verify(proof_path, model_or_path):
    """Re-checks a proof file from a model's weights, without trusting what made it.

    Derived anew: the layers' settings and digests of their weights, every layer's gain, the
    matrix inequality of every set of multipliers (by a factor of it, with all rounding bounded),
    the logits of the file's inputs, and from these every radius. The file's numbers are claims
    that must not exceed what is derived. Radii are about the exact function of the weights and
    settings. Not checked: sentences, and how closely the model's own float arithmetic follows that
    function (`float_allowance`), which margins and decisions may differ by.

    Args:
        proof_path: a file written by `Certificate.save("….npz")`.
        model_or_path: the Keras model, or the path of its `.keras` file.

    Returns:
        `Verification`; `holds` is False, with reasons, for another model or a wrong claim.

    Raises:
        ProofFileError: the file is missing, corrupt, of another version, or no proof file.
        ModelFileError: the model's file cannot be read.
        UnsupportedLayerError: naming a layer that the verifier does not know.
    """
    from tf_lyapunov.verification.reading import read

    begin = time.monotonic()
    header, arrays = archive.read(proof_path)
    try:
        layers, evidence, claim, notes, method = unpack(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ProofFileError(
            f"The proof file is refused: it is incomplete ({type(error).__name__}: {error}). "
            f"Received: {proof_path}."
        ) from error
    network = read(model_or_path, claim.inputs.shape[1:])
    reasons = list(differences(layers, network.layers))
    derived, radius = None, np.zeros(len(claim.radius))
    if not reasons:
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                derived = derive(network, evidence)
                reasons, radius = objections(network, derived, claim)
        except (OverflowError, np.linalg.LinAlgError) as error:
            reasons.append(f"A bound could not be computed: {error}.")
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
                f"Layer {layer.name!r} is not the certified layer {name!r}: its kind, settings, "
                "activation or place differ."
            )
        elif weights != layer.weights:
            yield f"Layer {layer.name!r} does not have the certified weights."


# Files ------------------------------------------------------------------------------------------


def pack(network, evidence, claim, certificate, notes=()):
    """`(header, arrays)` for `archive.write`.

    Args:
        certificate: JSON-safe dict of a certificate's other fields, kept for its reader.
    """
    header = {
        "layers": [[r.name, r.settings, r.weights] for r in network.layers],
        "chain": {"start": evidence.start, "methods": list(evidence.methods)},
        "certificate": certificate,
        "notes": list(notes),
    }
    arrays = {name: getattr(claim, name) for name in _PER_INPUT}
    if evidence.whole is not None:
        arrays |= _packed("whole", [evidence.whole])
    if evidence.indices is not None:
        delta, nu, multipliers = evidence.indices
        arrays |= _packed("indices", [multipliers])
        arrays["indices_cone"] = np.array([delta, nu])
    if evidence.pairs:
        arrays |= _packed("pairs", list(evidence.pairs.values()))
        arrays["pairs_index"] = np.array(list(evidence.pairs), dtype=np.int64)
    return header, arrays


_PER_INPUT = ("radius", "labels", "predictions", "margins", "inputs")


def _packed(name, items):
    return {
        f"{name}_squared": np.array([m.squared for m in items], dtype=np.float64),
        f"{name}_values": np.stack([np.concatenate(m.values) for m in items]),
        f"{name}_sizes": np.array([len(v) for v in items[0].values], dtype=np.int64),
        f"{name}_sectors": np.array([m.sectors for m in items], dtype=np.float64),
    }


def unpack(header, arrays):
    """`(layers, evidence, claim, notes, method)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing or of the wrong form.
    """
    numbers = header["certificate"]
    table = tuple(
        (str(row["name"]), float(row["gain_upper_bound"]), float(row["lipschitz_upper_bound"]))
        for row in numbers["contributions"]
    )
    claim = Claim(
        *(np.array(arrays[name]) for name in _PER_INPUT),
        float_allowance=float(numbers["float_allowance"]),
        gain_upper_bound=float(numbers["gain_upper_bound"]),
        table=table,
        verdict=numbers["verdict"],
    )
    kinds = ("f", "i", "i", "f")
    for name, kind in zip(_PER_INPUT[:4], kinds, strict=True):
        array = getattr(claim, name)
        if array.dtype != np.dtype(f"{kind}8") or array.shape != claim.radius.shape:
            raise ValueError(f"{name} has another shape or type")
    if claim.radius.ndim != 1 or not np.all(claim.radius >= 0) or not claim.float_allowance >= 0:
        raise ValueError("a radius or an allowance is negative or NaN")
    layers = [(str(n), str(s), str(w)) for n, s, w in header["layers"]]
    start, pairs, indices = header["chain"]["start"], {}, None
    if "pairs_index" in arrays:
        index = [(int(i), int(j)) for i, j in arrays["pairs_index"]]
        pairs = dict(zip(index, _unpacked("pairs", arrays), strict=True))
    if "indices_cone" in arrays:
        delta, nu = map(float, arrays["indices_cone"])
        indices = (delta, nu, *_unpacked("indices", arrays))
    whole = _unpacked("whole", arrays)[0] if "whole_squared" in arrays else None
    evidence = Evidence(start, tuple(header["chain"]["methods"]), whole, indices, pairs)
    notes = tuple(str(note) for note in header["notes"])
    return layers, evidence, claim, notes, str(numbers["method"])


def _unpacked(name, arrays):
    squared, values = arrays[f"{name}_squared"], arrays[f"{name}_values"].astype(np.float64)
    sizes, sectors = arrays[f"{name}_sizes"], arrays[f"{name}_sectors"]
    if values.shape != (len(squared), int(np.sum(sizes))) or np.any(sizes < 0):
        raise ValueError(f"the multipliers {name!r} have another shape")
    if sectors.shape != (len(squared), len(sizes), 2):
        raise ValueError(f"the sectors of {name!r} have another shape")
    ends = np.cumsum(sizes)[:-1]
    return [
        Multipliers(
            float(rho), tuple(np.split(row, ends)), tuple((float(a), float(b)) for a, b in slopes)
        )
        for rho, row, slopes in zip(squared, values, sectors, strict=True)
    ]
