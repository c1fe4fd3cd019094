"""Proof files of ranges: linear functions of a model's logits over one region of inputs."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.verification import archive, claimed, translation
from tf_lyapunov.verification.around import evidence
from tf_lyapunov.verification.around.balls import Gains
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.pairs import expanded
from tf_lyapunov.verification.around.relaxation import of_rows
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.checking import truncated
from tf_lyapunov.verification.claimed import ClaimedRegion
from tf_lyapunov.verification.outcome import Outcome, reasons_against

_NAMES = ("center", "low", "high", "radii", "functionals", "lower", "upper")
_KINDS = dict.fromkeys(_NAMES, "f8")


@dataclasses.dataclass(frozen=True, eq=False)
class RangeClaim(ClaimedRegion):
    """lower ≤ A f(x) ≤ upper for all x of a region.

    Attributes:
        functionals: float64 (m, logits), the rows of A.
        lower, upper: float64 (m,), possibly infinite.
    """

    functionals: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def pack(network, claim, pieces, notes=()):
    """`(header, arrays)` for `archive.write`.

    Args:
        network: `network.Network`.
        claim: `RangeClaim`.
        pieces: list of `evidence.Piece`, the functionals' rows being A's and then those of -A.
        notes: sentences.
    """
    arrays = {name: getattr(claim, name) for name in _KINDS}
    return claimed.pack(archive.RANGES, network, arrays, pieces, notes)


def unpack(header, arrays):
    """`(layers, claim, pieces, notes)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    layers, fields, pieces, notes = claimed.unpack(header, arrays, _KINDS)
    claim = RangeClaim(**fields)
    claim.check()
    if not np.all(np.isfinite(claim.functionals)):
        raise ValueError("a functional is not finite")
    if claim.functionals.ndim != 2 or len(claim.functionals) == 0:
        raise ValueError("there is no functional")
    if not claim.lower.shape == claim.upper.shape == claim.functionals.shape[:1]:
        raise ValueError("there is not one range per functional")
    return layers, claim, pieces, notes


class Passes:
    """Lower bounds of linear functions of a network's logits, region by region.

    Args:
        network: `network.Network`.
    """

    def __init__(self, network):
        self.network, own = expanded(network, network.gains()[1])
        self.gains, self.shape = Gains(own), network[network.logits].shape

    def lower(self, region, rows, pieces=()):
        """`(bounds, box)`: float64 (r,), and `(low, high)` of the logits, flat.

        Args:
            region: `Region`, bounded.
            rows: float64 (r, logits).
            pieces: list of `evidence.Piece`, the last of them about these rows.

        Raises:
            ValueError: if the pieces do not fit the network.
            OverflowError: if signals on the region have no bound.
        """
        given = evidence.read(self.network, pieces, len(rows))
        if given.branches or given.joint:
            raise ValueError("a range has no branches, and no joint multipliers")
        target = self.network.logits
        with np.errstate(over="ignore", invalid="ignore"):
            around = Surroundings(self.network, self.gains, region, given.groups)
            around.weigh(given.weights)
            found = [
                around.lower(
                    target, Functionals(rows[k].reshape(-1, *self.shape)), of_rows(given.last, k)
                )
                for k in around.blocks(len(rows))
            ]
        box = tuple(bound.reshape(-1) for bound in around.boxes[target])
        return np.concatenate(found), box


def derived(network, claim, pieces):
    """`(lower, upper)`, float64 (m,), of a claim's functionals on its region.

    Args:
        network: `network.Network`.
        claim: `RangeClaim`; what it claims is not read.
        pieces: list of `evidence.Piece`.

    Raises:
        ValueError: if the claim or the pieces do not fit the network.
        OverflowError: if signals on the region have no bound.
    """
    shape = network[network.logits].shape
    if claim.center.shape != network.steps[0].shape:
        raise ValueError(f"the region is about inputs of shape {claim.center.shape}")
    if claim.functionals.shape[1] != math.prod(shape):
        raise ValueError(f"the functionals are about {claim.functionals.shape[1]} logits")
    with np.errstate(over="ignore"):
        region = claim.region()
    if not np.all(np.isfinite(region.reach())):
        raise ValueError("the region is not bounded")
    count = len(claim.functionals)
    rows = np.concatenate([claim.functionals, -claim.functionals])
    found, (low, high) = Passes(network).lower(region, rows, pieces)
    # Of single logits there are boxes, too.
    for i, row in enumerate(rows):
        (places,) = np.nonzero(row)
        if len(places) == 1 and abs(row[places[0]]) == 1:
            (j,) = places
            found[i] = max(found[i], low[j] if row[j] > 0 else -high[j])
    return found[:count], -found[count:]


@dataclasses.dataclass(frozen=True, eq=False)
class RangeVerification(Outcome):
    """Outcome of `verify` for a proof file of ranges.

    Attributes:
        holds: every claim of the file follows from the model's weights.
        reasons: why not; empty if it holds.
        claim: `RangeClaim`, as the file says.
        lower, upper: float64 (m,), as derived here; infinite if nothing could be.
        notes: what the file says of itself, unchecked: each on one line, in quotation marks.
        seconds: wall time.
    """

    holds: bool
    reasons: tuple
    claim: RangeClaim
    lower: np.ndarray
    upper: np.ndarray
    notes: tuple
    seconds: float

    def explain(self):
        """Plain text: whether the file's claims follow from the weights, and if not, why."""
        count = len(self.claim.lower)
        title = "VERIFIED" if self.holds else "NOT VERIFIED"
        lines = [
            f"{title}: ranges of {count} linear functions of the logits, for all "
            f"{self.claim.words()}."
        ]
        lines += [f"  - {reason}" for reason in self.reasons]
        if self.holds:
            for i in range(min(count, 10)):
                low, high = at_least(self.claim.lower[i]), at_most(self.claim.upper[i])
                lines.append(f"  function {i}: between {low} and {high}")
            if count > 10:
                lines.append(f"  … and {count - 10} more")
        return "\n".join(lines + self.closing("the region's centre"))

    def fields(self):
        """JSON-safe dict of the outcome, without what the file says of itself.

        `lower` and `upper` are those derived here, None where there is none; `claimed_lower` and
        `claimed_upper` are the file's, and true only if it holds.
        """
        return {
            "holds": bool(self.holds),
            "reasons": list(self.reasons),
            "region": self.claim.words(),
            "functionals": len(self.claim.lower),
            "lower": _numbers(self.lower),
            "upper": _numbers(self.upper),
            "claimed_lower": _numbers(self.claim.lower),
            "claimed_upper": _numbers(self.claim.upper),
        }


def _numbers(values):
    return [float(v) if np.isfinite(v) else None for v in values]


def checked(layers, claim, pieces, notes, model, network, calls):
    """`RangeVerification` of a file's contents, see `rechecking.verify`."""
    begin = time.monotonic()
    count = len(claim.lower)
    lower, upper = np.full(count, -np.inf), np.full(count, np.inf)

    def check():
        nonlocal lower, upper
        lower, upper = derived(network, claim, pieces)
        found = list(objections(claim, lower, upper))
        return found or contradictions(model, network, calls, claim)

    reasons = reasons_against(layers, network, check)
    seconds = time.monotonic() - begin
    return RangeVerification(not reasons, tuple(reasons), claim, lower, upper, notes, seconds)


def objections(claim, lower, upper):
    """Sentences on what a claim says and the derived ranges do not imply."""
    wrong = ~((claim.lower <= lower) & (upper <= claim.upper))
    if not np.any(wrong):
        return
    i = int(np.argmax(wrong))
    yield (
        f"{np.sum(wrong)} of {len(wrong)} ranges are narrower than what follows, first that of "
        f"function {i}: {float(claim.lower[i])!r} to {float(claim.upper[i])!r} against "
        f"{float(lower[i])!r} to {float(upper[i])!r}."
    )


def contradictions(model, network, calls, claim):
    """`translation.contradictions` at the centre of the region, for which no class is claimed."""
    is_ball = np.any(np.isfinite(claim.radii))
    numbers = (claim.low, claim.high, *([claim.center] if is_ball else []))
    found = list(truncated(network, *numbers))
    if found:
        return found
    tried = translation.Tried(claim.center[None], np.zeros(1, int), np.zeros(1))
    return translation.contradictions(
        model, network, tuple(translation.Call(*call) for call in calls), tried
    )
