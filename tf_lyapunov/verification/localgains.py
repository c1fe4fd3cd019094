"""Proof files of local gains: how far logits move between any two points of balls around inputs."""

import dataclasses
import time

import numpy as np

from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.verification import archive, claimed, translation
from tf_lyapunov.verification.around import evidence
from tf_lyapunov.verification.around.differences import Differences, Entries
from tf_lyapunov.verification.around.region import Region
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.checking import truncated
from tf_lyapunov.verification.outcome import Outcome, reasons_against
from tf_lyapunov.verification.ranges import Passes

NORMS = ("l2", "linf")
_WORDS = {"l2": "l2", "linf": "l∞"}
_KINDS = {"centers": "f8", "radii": "f8", "gains": "f8", "norm": "i8"}
_SHOWN = 10


@dataclasses.dataclass(frozen=True, eq=False)
class GainClaim:
    """‖f(u) - f(v)‖ ≤ gain·‖u - v‖ for all u, v within a radius of each input, f the logits.

    Attributes:
        centers: float64 (n, …), the inputs.
        radii, gains: float64 (n,).
        norm: int64 (1,), which of `NORMS` all norms are.
    """

    centers: np.ndarray
    radii: np.ndarray
    gains: np.ndarray
    norm: np.ndarray

    def check(self):
        """Refuses what is of another form."""
        count = len(self.radii) if self.radii.ndim == 1 else 0
        if not count or self.gains.shape != (count,) or self.centers.shape[:1] != (count,):
            raise ValueError("there is not one radius and one gain for at least one input")
        if self.centers.ndim < 2 or not np.all(np.isfinite(self.centers)):
            raise ValueError("the inputs are not finite arrays")
        if not np.all(np.isfinite(self.radii) & (self.radii > 0)) or np.any(self.gains < 0):
            raise ValueError("a radius is not positive and finite, or a gain negative")
        if self.norm.shape != (1,) or self.norm[0] not in (0, 1):
            raise ValueError("the norm is none")

    @property
    def norm_name(self):
        """Name of the norm."""
        return NORMS[int(self.norm[0])]


def pack(network, claim, pieces, notes=()):
    """`(header, arrays)` for `archive.write`; pieces are a dict of lists by number of the input."""
    arrays = {name: getattr(claim, name) for name in _KINDS}
    return claimed.pack(archive.GAINS, network, arrays, pieces, notes)


def unpack(header, arrays):
    """`(layers, claim, pieces, notes)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    layers, fields, pieces, notes = claimed.unpack(header, arrays, _KINDS, "radii")
    claim = GainClaim(**fields)
    claim.check()
    return layers, claim, pieces, notes


def derived(network, claim, pieces):
    """Gains (n,) of a claim's balls; what it claims is not read.

    Raises:
        ValueError: if the claim or the pieces do not fit the network.
        OverflowError: if signals on a ball have no bound.
    """
    if claim.centers.shape[1:] != network.steps[0].shape:
        raise ValueError(f"the balls are around inputs of shape {claim.centers.shape[1:]}")
    passes, found = Passes(network), []
    for i, (center, radius) in enumerate(zip(claim.centers, claim.radii, strict=True)):
        given = evidence.read(passes.network, pieces.get(i, []), 0)
        if given.last or given.branches or given.weights or given.joint:
            raise ValueError("a gain has no multipliers but those of boxes")
        norm = claim.norm_name
        with np.errstate(over="ignore", invalid="ignore"):
            region = Region(center, radius, norm)
            around = Surroundings(passes.network, passes.gains, region, given.groups)
            gain = (Differences if norm == "l2" else Entries)(around).gain()
        found.append(gain if gain >= 0 else np.inf)
    return np.array(found)


@dataclasses.dataclass(frozen=True, eq=False)
class GainVerification(Outcome):
    """Outcome of `verify` for a proof file of local gains.

    Attributes:
        holds: every claim of the file follows from the model's weights.
        reasons: why not; empty if it holds.
        claim: `GainClaim`, as the file says.
        gains: float64 (n,), as derived here; infinite if nothing could be.
        notes: what the file says of itself, unchecked: each on one line, in quotation marks.
        seconds: wall time.
    """

    holds: bool
    reasons: tuple
    claim: GainClaim
    gains: np.ndarray
    notes: tuple
    seconds: float

    def explain(self):
        """Plain text: whether the file's claims follow from the weights, and if not, why."""
        claim, count = self.claim, len(self.claim.gains)
        norm = _WORDS[claim.norm_name]
        lines = [
            f"{'VERIFIED' if self.holds else 'NOT VERIFIED'}: gains of the logits in {norm} "
            f"between any two points of a ball in {norm} around each of {count} inputs of shape "
            f"{claim.centers.shape[1:]}."
        ]
        lines += [f"  - {reason}" for reason in self.reasons]
        if self.holds:
            for i in range(min(count, _SHOWN)):
                lines.append(
                    f"  input {i}: at most {at_most(claim.gains[i])} within "
                    f"{at_least(claim.radii[i])}"
                )
            if count > _SHOWN:
                lines.append(f"  … and {count - _SHOWN} more")
        return "\n".join(lines + self.closing("the inputs of the file"))

    def fields(self):
        """JSON-safe dict of the outcome, without what the file says of itself.

        `gains` are those derived here, None where there is none; `claimed_gains` are the file's,
        and true only if it holds.
        """
        return {
            "holds": bool(self.holds),
            "reasons": list(self.reasons),
            "norm": self.claim.norm_name,
            "radii": [float(r) for r in self.claim.radii],
            "gains": _numbers(self.gains),
            "claimed_gains": _numbers(self.claim.gains),
        }


def _numbers(values):
    return [float(v) if np.isfinite(v) else None for v in values]


def objections(claim, gains):
    """Sentences on what a claim says and the derived gains do not imply."""
    wrong = ~(claim.gains >= gains)
    if np.any(wrong):
        i = int(np.argmax(wrong))
        yield (
            f"{np.sum(wrong)} of {len(wrong)} gains are smaller than what follows, first that of "
            f"input {i}: {float(claim.gains[i])!r} against {float(gains[i])!r}."
        )


def contradictions(model, network, calls, claim):
    """`translation.contradictions` at the inputs, for which no class is claimed."""
    found = list(truncated(network, claim.centers))
    if found:
        return found
    count = len(claim.radii)
    tried = translation.Tried(claim.centers, np.zeros(count, int), np.zeros(count))
    return translation.contradictions(
        model, network, tuple(translation.Call(*call) for call in calls), tried
    )


def checked(layers, claim, pieces, notes, model, network, calls):
    """`GainVerification` of a file's contents, see `rechecking.verify`."""
    begin = time.monotonic()
    gains = np.full(len(claim.gains), np.inf)

    def check():
        nonlocal gains
        gains = derived(network, claim, pieces)
        return list(objections(claim, gains)) or contradictions(model, network, calls, claim)

    reasons = reasons_against(layers, network, check)
    seconds = time.monotonic() - begin
    return GainVerification(not reasons, tuple(reasons), claim, gains, notes, seconds)
