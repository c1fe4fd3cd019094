"""Certificates as proof files, which `tf_lyapunov.verification` re-checks from weights alone."""

import dataclasses
import json
import math

import numpy as np

from tf_lyapunov.bounds.records import OPERATORS, RESIDUAL, ChainProof
from tf_lyapunov.certification.enclosures import enclosed
from tf_lyapunov.certification.partproofs import GROWTHS, accepted, accepted_parts
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.local.linear import LARGEST_RECORDS
from tf_lyapunov.program import rounding
from tf_lyapunov.sealing import unseal
from tf_lyapunov.verification import archive, inequalities
from tf_lyapunov.verification.around.claims import converted
from tf_lyapunov.verification.checking import (
    Claim,
    Evidence,
    cast,
    derive,
    evaluate,
    moved,
    objections,
    pack,
    radii,
    unpack,
)
from tf_lyapunov.verification.contents import BOUNDS, described
from tf_lyapunov.verification.inequalities import Multipliers
from tf_lyapunov.verification.translation import Call, contradictions

# Bytes of inputs that a certificate keeps, so that its radii can be re-checked: of arrays, which
# are in memory anyway, and of data sets.
LARGEST_ARRAY, LARGEST_STREAM = 2**28, 2**26
# A claim may be weaker than its certificate by this share, no more.
_LARGEST_LOSS = 1e-4
_ARRAYS = ("radius", "predictions", "labels", "margins")
_REGION = ("norm", "within")
_LOCAL = (
    "The radii are those of the global gains. Those from slopes on the ball around each input "
    "(method='local') cannot be re-checked from a proof file and were left out of it."
)
_BOXES = (
    "The radii are those of the global gains. Those from boxes of every signal (method='box') "
    "cannot be re-checked from a proof file and were left out of it."
)
_SLOPES = ("Slopes on the ball", "Boxes of every signal")


@dataclasses.dataclass(frozen=True, eq=False)
class Proof:
    """What a certificate keeps for its proof file.

    Attributes:
        network: `Network`, with the model.
        chain: `ChainProof`, or None for the composition rule.
        inputs: as given to `certify`, or None if they are too large to keep.
        radius: float64 (n,), by the global gains, in the certificate's norm.
        records: dict from numbers of inputs to `recording.Record`, whose radii are larger; None
            if they are too large to keep.
        bounds: `(low, high)` that those radii are limited to, or None.
    """

    network: object
    chain: ChainProof | None
    inputs: np.ndarray | None
    radius: np.ndarray
    records: dict | None = dataclasses.field(default_factory=dict)
    bounds: tuple | None = None


class KeptInputs:
    """The inputs of a model with one, as they come, until they are too large to keep.

    Args:
        is_array: whether they are parts of an array.
    """

    def __init__(self, is_array):
        self._parts, self._size = [], 0
        self._largest = LARGEST_ARRAY if is_array else LARGEST_STREAM

    def add(self, inputs):
        """Takes the next block, a list with one array for each input."""
        self._size += sum(a.nbytes for a in inputs)
        if len(inputs) > 1 or self._size > self._largest:
            self._parts = None
        if self._parts is not None:
            self._parts.append(inputs[0])

    def joined(self):
        """Copy of all in one array, or None."""
        if self._parts is None:
            return None
        kept = [p if p.dtype.kind in "iufb" else p.astype(np.float32) for p in self._parts]
        joined = np.concatenate(kept)  # bfloat16 as float32
        joined.setflags(write=False)
        return joined


def save_proof(certificate, path):
    """Writes a certificate's proof file; see `Certificate.save`.

    The claims in the file are those that the verifier derives, so that they are weaker than the
    certificate's by a part in 10⁴ at most (typically 10⁻⁹); it is run here once. Radii by bounds
    around inputs are those that the verifier proves with the multipliers found; where they are
    smaller by more than 0.2%, the file's notes say by how much.

    Raises:
        ValueError: if the certificate carries no proof, the model has changed or has several
            inputs, its gain or rounding allowance is infinite, or the verifier cannot confirm the
            certificate, or would refuse the model for what it computes.
        UnsupportedLayerError: naming a layer that the verifier does not know.
    """
    from tf_lyapunov.verification.reading import read_with_calls

    proof = certificate.proof
    if proof is None:
        raise ValueError(
            "A proof file needs the certificate that `certify` returned. Received: an edited or "
            "loaded certificate, without its proof. Certify again, or copy the file."
        )
    if len(proof.network.inputs) > 1 or certificate.perturbed is not None:
        raise ValueError(
            "A proof file is about a model with one input, which the verifier reads. Received: "
            f"model {proof.network.model.name!r} with {len(proof.network.inputs)} inputs. Save it "
            "as .json."
        )
    if proof.inputs is None:
        raise ValueError(
            f"A proof file holds the inputs, up to {LARGEST_ARRAY // 2**20} MB of an array and "
            f"{LARGEST_STREAM // 2**20} MB of a data set. Received: a certificate of more. Certify "
            "them in parts, or save as .json."
        )
    if proof.records is None:
        raise ValueError(
            "A proof file holds the multipliers of bounds around inputs, up to "
            f"{LARGEST_RECORDS // 2**20} MB of them. Received: a certificate of more. Certify the "
            "inputs in parts, or save as .json."
        )
    if not math.isfinite(certificate.float_allowance):
        raise ValueError(
            "A proof file states how far computed margins are from exact ones. Received: "
            "float_allowance=inf, as the model computes in too low a precision for a bound. "
            "Certify with precision='float64', or save as .json."
        )
    if not math.isfinite(certificate.gain_upper_bound):
        raise ValueError(
            "A proof file states a finite gain of the logits. Received: gain_upper_bound=inf"
            f"{_products(proof.network)}. Save as .json."
        )
    if proof.network.digest() != certificate.model_digest:
        raise ValueError(
            "The model's weights have changed since it was certified. "
            f"Received: model {proof.network.model.name!r}. Certify it again."
        )
    parts = () if proof.chain is None else proof.chain.parts
    if not parts and any(text.startswith(RESIDUAL) for text in certificate.assumptions):
        raise ValueError(
            "A proof file holds no multipliers of single residual blocks yet. Received: "
            f"method={certificate.method!r} for a model with residual blocks. Certify with "
            "method='composition', or save as .json."
        )
    if any(text.startswith(OPERATORS) for text in certificate.assumptions):
        raise ValueError(
            "A proof file holds no products of layers that are not written out yet. Received: "
            f"method={certificate.method!r} for a model with such layers. Certify with "
            "method='composition', or save as .json."
        )
    model, network, calls = read_with_calls(
        proof.network.model, proof.network.graph.inputs[0].shape[1:]
    )
    evidence = _evidence(network, proof.chain)
    derived = derive(network, evidence)
    logits, errors = evaluate(network, proof.inputs)
    shift = moved(network, proof.inputs)
    size = proof.inputs[0].size

    def by_gains(logits, errors):
        found = radii(logits, errors, certificate.labels, derived.pairs, shift)
        return converted(found, certificate.norm, size)

    derived_radius = np.minimum(proof.radius, by_gains(logits, errors))
    # Underflow in the model's own dtype shortens radii; what else shortens them is a disagreement.
    plain = dataclasses.replace(
        network, steps=tuple(dataclasses.replace(s, dtype="float64") for s in network.steps)
    )
    expected = by_gains(*evaluate(plain, proof.inputs))
    given = proof.inputs.astype(np.float64)
    around = enclosed(certificate, proof, network, derived_radius, logits, errors, given,
                      cast(network, proof.inputs))  # fmt: skip
    evidence = dataclasses.replace(evidence, around=around.pieces)
    derived = dataclasses.replace(derived, around=around.pieces)
    weaker = dataclasses.replace(
        certificate,
        radius=around.radius,
        gain_upper_bound=max(certificate.gain_upper_bound, derived.gain),
        contributions=tuple(
            dataclasses.replace(
                row,
                gain_upper_bound=max(row.gain_upper_bound, derived.own.get(row.name, math.inf)),
                lipschitz_upper_bound=max(
                    row.lipschitz_upper_bound, derived.reach.get(row.name, math.inf)
                ),
            )
            for row in certificate.contributions
        ),
        verdict="PROVED" if np.any(around.radius > 0) else "NOT_PROVED",
    )
    notes = around.sentences
    if certificate.method in ("local", "box"):
        notes += (_LOCAL if certificate.method == "local" else _BOXES,)
    if notes:
        kept = [s for s in certificate.assumptions if not s.startswith(_SLOPES)]
        weaker = dataclasses.replace(weaker, assumptions=(*kept, *notes))
    claim = _claim(weaker, proof)
    found, _ = objections(network, derived, claim)
    loss = derived.gain / certificate.gain_upper_bound if certificate.gain_upper_bound else 1.0
    if loss > 1 + _LARGEST_LOSS:
        found.append(
            f"The verifier proves a gain of {derived.gain!r}, the certificate "
            f"{certificate.gain_upper_bound!r}."
        )
    # Radii near zero are differences of nearly equal numbers.
    small = 1e-6 * float(np.median(proof.radius[np.isfinite(proof.radius)], axis=0)) if np.any(
        np.isfinite(proof.radius)) else 0.0  # fmt: skip
    if np.any(np.minimum(expected, proof.radius) < proof.radius * (1 - _LARGEST_LOSS) - small):
        found.append("The verifier proves smaller radii.")
    if not found:  # what `verify` asks the model itself: better known now than by who receives it
        found = contradictions(model, network, tuple(Call(*call) for call in calls), claim)
    if found:
        raise ValueError(
            "The verifier could not confirm this certificate, so no proof file was written. "
            f"Received: method={certificate.method!r}. {' '.join(found)} Save it as .json."
        )
    fields = unseal(json.loads(weaker.to_json()))
    fields = {k: v for k, v in fields.items() if k not in (*_ARRAYS, "perturbed", *_REGION)}
    header, arrays = pack(network, evidence, claim, fields, notes)
    _check_readable(header, arrays)
    archive.write(path, header, arrays)


def _check_readable(header, arrays):
    """Refuses contents that `verify` would call incomplete."""
    try:
        whole = {"format": archive.FORMAT, "version": archive.VERSION, **header}
        unpack(json.loads(json.dumps(whole)), arrays)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            "A proof file holds finite numbers that fit each other, and none was written. "
            f"Received: a certificate of which the verifier says: {error}. Save it as .json."
        ) from error


def claimed_fields(path):
    """Fields of the certificate that a proof file claims, unchecked, as in its JSON form."""
    header, arrays = archive.read(path)
    if header["version"] > 2:
        raise ProofFileError(
            "The proof file is about outputs over a region, and no certificate of radii. Check it "
            f"by `tf_lyapunov.verification.verify`. Received: {path}."
        )
    try:
        found = {**header["certificate"], **{name: arrays[name].tolist() for name in _ARRAYS}}
        if header["version"] > 1:
            bounds = [arrays[name] for name in BOUNDS if name in arrays]
            found |= {"norm": header["norm"], "within": described(bounds or None)}
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise incomplete(path, error) from error


def incomplete(path, error):
    """The error of a proof file that lacks a part."""
    return ProofFileError(
        f"The proof file is refused: it is incomplete ({error}). Received: {path}."
    )


def _claim(certificate, proof):
    bounds = proof.bounds
    if bounds is not None:
        bounds = tuple(np.atleast_1d(np.asarray(b, np.float64)) for b in bounds)
    return Claim(
        **{name: getattr(certificate, name) for name in _ARRAYS},
        inputs=proof.inputs,
        norm=certificate.norm,
        bounds=bounds,
        float_allowance=certificate.float_allowance,
        gain_upper_bound=certificate.gain_upper_bound,
        table=tuple(
            (row.name, row.gain_upper_bound, row.lipschitz_upper_bound)
            for row in certificate.contributions
        ),
        verdict=certificate.verdict,
    )


# Evidence ---------------------------------------------------------------------------------------


def _evidence(network, chain_proof):
    """`Evidence` that the verifier accepts, from what was found here."""
    if chain_proof is None:
        return Evidence()
    parts = accepted_parts(network, chain_proof.parts)
    if chain_proof.start is None:
        return Evidence(parts=parts)
    chain = network.chain(chain_proof.start)
    narrow = inequalities.narrow_input(chain)
    methods, whole, indices = ["product"], None, None
    bound = chain_proof.whole
    by_products = [b for b in (bound, *chain_proof.pairs.values()) if b and b.method == "liplt"]
    # Without a hidden layer, products are all there is, and exact.
    if by_products or not chain.slopes:
        methods.append("liplt")
    if bound is not None and bound.multipliers:
        whole = _accepted(narrow, bound, chain)
    if chain_proof.indices is not None and chain.slopes:
        indices = _accepted_indices(chain, chain_proof)
    pairs = {}
    for pair, found in chain_proof.pairs.items():
        if found.multipliers:
            part = chain.output_difference(*pair)
            pairs[pair] = _accepted(narrow.output_difference(*pair), found, part)
    return Evidence(chain_proof.start, tuple(methods), whole, indices, pairs, parts)


def _accepted(narrow, bound, chain):
    """`Multipliers` of a `ChainBound` in the verifier's units, grown until it accepts them."""
    start = _unscaled(chain, bound)
    found = accepted(narrow, start)
    if found is not None:
        return found
    reason = inequalities.refusal(narrow, start) or "they are too close to the boundary"
    raise ValueError(
        "The verifier could not confirm the multipliers of this certificate, so no proof file was "
        f"written: {reason}. Received: gain {bound.gain_upper_bound!r} by {bound.method}. "
        "Save it as .json."
    )


def _unscaled(chain, bound):
    """Multipliers of a `ScaledChain` for the chain itself: a congruence by powers of two.

    With W_l = 2^{e_l}W'_l the form (8.1) of the scaled chain is that of the chain for
    Λ_l = 4^{e_{l+1} + … + e_n}·Λ'_l.
    """
    scaled = bound.scaled
    powers = []
    for pair in zip(chain.weights, scaled.weights, strict=True):
        mine, theirs = (float(rounding.euclidean_norms(w.reshape(1, -1))[0]) for w in pair)
        powers.append(round(math.log2(mine) - math.log2(theirs)) if mine and theirs else 0)
    ahead = np.cumsum(powers[::-1])[::-1][1:]
    values = tuple(
        np.ldexp(lam, 2 * int(power)) for lam, power in zip(bound.multipliers, ahead, strict=True)
    )
    sectors = []
    for (low, high), alpha, beta in zip(chain.slopes, scaled.alphas, scaled.betas, strict=True):
        if -low > high:  # φ and the next layer had changed sign together
            alpha, beta = -beta, -alpha
        sectors.append((min(alpha, low), max(beta, high)))
    squared = float(rounding.up(bound.gain_upper_bound**2))
    return Multipliers(squared, values, tuple(sectors))


def _accepted_indices(chain, chain_proof):
    """(δ, ν, `Multipliers`) with ν lowered until the verifier accepts them.

    Linear layers, which the verifier multiplies into the next, need no multipliers: their terms
    vanish where their output is what they say.
    """
    found = chain_proof.indices
    ends = np.cumsum(chain_proof.widths[1:-1])[:-1]
    values, sectors = [], []
    for lam, sector in zip(
        np.split(np.asarray(found.multipliers), ends), chain_proof.sectors, strict=True
    ):
        if (sector.alpha, sector.beta) != (1.0, 1.0):
            # As `network_indices` widened it, where the slopes nearly coincide.
            width = max(sector.magnitude, 1e-100) * 2.0**-16
            values.append(lam)
            sectors.append((min(sector.alpha, sector.beta - width), sector.beta))
    sectors = [
        (min(a, low), max(b, high))
        for (a, b), (low, high) in zip(sectors, chain.slopes, strict=True)
    ]
    size = abs(found.nu) + 1 / found.delta
    for growth in GROWTHS:
        grown = Multipliers(
            0.0,
            tuple(v * (1 + growth) ** (len(values) - k) for k, v in enumerate(values)),
            tuple(sectors),
        )
        nu = found.nu - growth * size
        if inequalities.proves_indices(chain, found.delta, nu, grown):
            return found.delta, nu, grown
    raise ValueError(
        "The verifier could not confirm the multipliers of these indices, so no proof file was "
        f"written. Received: delta={found.delta!r}, nu={found.nu!r}. Save it as .json."
    )


def _products(network):
    """Why no gain is finite, where signals are multiplied."""
    if not network.products:
        return ""
    names = ", ".join(network.products[:5])
    return f" of a model that multiplies signals ({names}), which the verifier does not read"
