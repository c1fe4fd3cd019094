"""`verify`: whether a proof file's claims follow from a model's weights."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.digits import at_most
from tf_lyapunov.errors import ProofFileError
from tf_lyapunov.verification import (
    archive,
    localgains,
    loopfiles,
    memoryfiles,
    partitions,
    properties,
    ranges,
    translation,
)
from tf_lyapunov.verification.checking import derive, objections
from tf_lyapunov.verification.contents import described, quoted, unpack
from tf_lyapunov.verification.outcome import Outcome, reasons_against
from tf_lyapunov.verification.reading import read_with_calls

# What reads and checks files that are no certificates.
_OTHERS = {
    archive.RANGES: ranges,
    archive.PROPERTIES: properties,
    archive.PARTITIONS: partitions,
    archive.GAINS: localgains,
    archive.LOOPS: loopfiles,
    archive.MEMORIES: memoryfiles,
}
_WORDS = {"l2": "l2", "linf": "l∞", "l1": "l1"}


@dataclasses.dataclass(frozen=True, eq=False)
class Verification(Outcome):
    """Outcome of `verify`.

    Attributes:
        holds: every claim of the file follows from the model's weights.
        reasons: why not; empty if it holds.
        method: how the certificate was made, as the file says.
        gain_upper_bound: of the logits, as derived here (infinite if nothing could be).
        radius: float64 (n,), as derived here for the file's inputs and labels; 0 if nothing could.
        claimed_gain_upper_bound, claimed_radius: as the file says.
        norm: of the radii, `"l2"`, `"linf"` or `"l1"`.
        within: the inputs that the radii are limited to, in words, or None for all.
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
    norm: str = "l2"
    within: str | None = None

    def explain(self):
        """Plain text: whether the file's claims follow from the weights, and if not, why."""
        count, proved = len(self.claimed_radius), int(np.sum(self.claimed_radius > 0))
        outcome = "VERIFIED" if self.holds else "REFUSED"
        lines = [f"Proof file: {outcome} (method, as the file says: {self.method})"]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines.append(
            f"Claimed: gain at most {at_most(self.claimed_gain_upper_bound, 6)}, and positive "
            f"radii in {_WORDS[self.norm]} for {proved} of {count} inputs"
            + (f", for changes that stay within {self.within}" if self.within else "")
            + ", in exact arithmetic on the model's weights."
        )
        if self.holds:
            lines.append(
                "Derived from the weights alone, by float64 arithmetic rounded outwards: gain "
                f"{at_most(self.gain_upper_bound, 6)}, and no claimed radius exceeds its own."
            )
        return "\n".join(lines + self.closing("inputs of the file"))

    def fields(self):
        """JSON-safe dict of the outcome, without what the file says of itself."""
        return {
            "holds": bool(self.holds),
            "reasons": list(self.reasons),
            "method": self.method,
            "gain_upper_bound": self.gain_upper_bound,
            "claimed_gain_upper_bound": self.claimed_gain_upper_bound,
            "norm": self.norm,
            "within": self.within,
            "examples": len(self.claimed_radius),
        }


def verify(proof_path, model_or_path, input_shape=None):
    """Re-checks a proof file from a model's weights, without trusting what made it.

    Derived anew: the layers' settings and digests of their weights, every layer's gain, the
    matrix inequality of every set of multipliers (by a factor of it, with all rounding bounded),
    the logits of the file's inputs, and from these every radius; where a radius is larger, the
    bounds of the margins on its ball, by passes from the logits to the input with the file's
    multipliers, on boxes and balls found in the same way. The file's numbers are claims
    that must not exceed what is derived. Radii are about the exact function of the weights and
    settings, less what the model's dtypes lose by underflow. That this function is the model's is
    tested, not proved: its layers are called one by one, and the model itself, eagerly, on up to 64
    of the inputs and on random probes, and must agree within the rounding of its dtypes, and decide
    for the label where a radius is claimed. Not checked: sentences.

    Files of ranges (`OutputBounds.save`), of properties (`local.verifying.Verification.save`) and
    of local gains (`gain_on(…, proof=…)`) are checked by the same passes, over their region, its
    parts or the balls; files of regions of attraction (`control.RegionOfAttraction.save`) and of
    models with memory (`dynamics.DynamicsCertificate.save`) by their matrix inequalities.

    Args:
        proof_path: a file written by `Certificate.save("….npz")`, by `save` of what
            `output_bounds` or `verify_property` gave, or by `gain_on`.
        model_or_path: the Keras model, or the path of its `.keras` file.
        input_shape: shape of one input, only for a model that leaves sizes open: a gain can depend
            on them, so they are not taken from the file.

    Returns:
        `Verification`, `ranges.RangeVerification`, `properties.PropertyVerification`,
        `localgains.GainVerification`, `loopfiles.LoopVerification` or
        `memoryfiles.MemoryVerification`; `holds` is False, with reasons, for another model or a
        wrong claim.

    Raises:
        ProofFileError: the file is missing, corrupt, of another version, or no proof file.
        ModelFileError: the model's file cannot be read.
        UnsupportedLayerError: naming a layer that the verifier does not know.
        ValueError: the model leaves sizes open and `input_shape` is missing, or does not fit.

    Example:

    >>> import keras, os, tempfile
    >>> import tf_lyapunov as tfl
    >>> identity = keras.layers.Dense(2, kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "proof.npz")
    ...     tfl.certify(model, np.array([[3.0, 1.0]], "float32")).save(file)
    ...     verify(file, model).holds
    True
    """
    begin = time.monotonic()
    header, arrays = archive.read(proof_path)
    try:
        other = _OTHERS.get(header["version"])
        if other is not None:
            contents = other.unpack(header, arrays)
        else:
            layers, evidence, claim, notes, method = unpack(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ProofFileError(
            f"The proof file is refused: it is incomplete ({type(error).__name__}: "
            f"{quoted(error)}). Write it again with `save`. "
            f"Received: {proof_path}."
        ) from error
    if other is memoryfiles:
        return memoryfiles.checked(*contents, model_or_path)
    model, network, calls = read_with_calls(model_or_path, input_shape)
    if other is not None:
        return other.checked(*contents, model, network, calls)
    derived, radius = None, np.zeros(len(claim.radius))

    def check():
        nonlocal derived, radius
        derived = derive(network, evidence)
        found, radius = objections(network, derived, claim)
        if found:
            return found
        return translation.contradictions(
            model, network, tuple(translation.Call(*call) for call in calls), claim
        )

    reasons = reasons_against(layers, network, check)
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
        norm=claim.norm,
        within=described(claim.bounds),
    )
