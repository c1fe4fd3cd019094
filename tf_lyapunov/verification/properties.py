"""Proof files of properties: no output of a region lies in one of several polyhedra.

The region may be divided: a tree of boxes, each halved along one input, on whose leaves the rows
of every set are bounded by passes of their own. The leaves cover the region by construction.
"""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.verification import archive, claimed
from tf_lyapunov.verification.arithmetic import down
from tf_lyapunov.verification.claimed import ClaimedRegion
from tf_lyapunov.verification.outcome import Outcome, reasons_against
from tf_lyapunov.verification.ranges import Passes, contradictions

_REAL = ("center", "low", "high", "radii", "rows", "bounds")
# Arrays of every claim that outputs lie in none of several sets.
SETS = dict.fromkeys(_REAL, "f8") | dict.fromkeys(("strict", "starts"), "i8")
_KINDS = SETS | {"axes": "i8", "points": "f8"}
# In place of an axis.
LEAF = -1
# Numbers of boxes that wait for their turn, at most.
_WAITING = 2**26


@dataclasses.dataclass(frozen=True, eq=False)
class SetsClaim(ClaimedRegion):
    """For all x of a region f(x) lies in none of the sets {y : A_k y ≤ b_k}, < in strict rows.

    Attributes:
        rows: float64 (r, logits), the rows of all A_k, one set after the other.
        bounds: float64 (r,), b.
        strict: int64 (r,), 1 where a row is A y < b.
        starts: int64 (sets,), the first row of each.
    """

    rows: np.ndarray
    bounds: np.ndarray
    strict: np.ndarray
    starts: np.ndarray

    def outside(self, lower):
        """Whether lower bounds (r,) of the rows keep outputs out of each set, bool (sets,)."""
        excess = down(lower - self.bounds)
        outside = np.where(self.strict == 1, excess >= 0, excess > 0)
        return np.logical_or.reduceat(outside, self.starts)

    def check(self):
        """Refuses what is no region or no sets."""
        super().check()
        rows, starts, count = self.rows, self.starts, len(self.bounds)
        if rows.ndim != 2 or not (rows.shape[:1] == self.bounds.shape == self.strict.shape):
            raise ValueError("the rows of the sets have another shape than their bounds")
        if not np.all(np.isfinite(rows)) or not np.all(np.isfinite(self.bounds)):
            raise ValueError("a row of a set is not finite")
        if not np.all((self.strict == 0) | (self.strict == 1)):
            raise ValueError("a row is neither strict nor not")
        if starts.ndim != 1 or not len(starts) or starts[0] != 0 or starts[-1] >= count:
            raise ValueError("the sets do not begin at their rows")
        if np.any(np.diff(starts) <= 0):
            raise ValueError("a set has no rows")

    def fits(self, network):
        """Refuses a region of other inputs, or rows of other logits, than a network's."""
        if self.center.shape != network.steps[0].shape:
            raise ValueError(f"the region is about inputs of shape {self.center.shape}")
        if self.rows.shape[1] != math.prod(network[network.logits].shape):
            raise ValueError(f"the sets are about {self.rows.shape[1]} logits")

    def bounded_region(self):
        """`Region` of all inputs, if it has an end."""
        region = self.region()
        if not np.all(np.isfinite(region.reach())):
            raise ValueError("the region is not bounded")
        return region


@dataclasses.dataclass(frozen=True, eq=False)
class PropertyClaim(SetsClaim):
    """`SetsClaim` with a tree of boxes.

    Attributes:
        axes: int64 (nodes,), in preorder, the flat input along which a box is halved, or `LEAF`.
        points: float64 (nodes,), where.
    """

    axes: np.ndarray
    points: np.ndarray

    def holds(self, lower):
        """Whether lower bounds (r,) of the rows keep outputs out of every set."""
        return bool(np.all(self.outside(lower)))

    def leaves(self):
        """Boxes `(low, high)` of the leaves, in preorder.

        Raises:
            ValueError: if the tree has other nodes than its splits say.
        """
        waiting, size = [(self.low, self.high)], self.center.size
        for axis, point in zip(self.axes, self.points, strict=True):
            if not waiting:
                raise ValueError("the tree has more nodes than its splits say")
            if 2 * size * len(waiting) > _WAITING:
                raise ValueError("the tree is too deep for its boxes")
            low, high = waiting.pop()
            if axis == LEAF:
                yield low, high
                continue
            if not 0 <= axis < size or not low.flat[axis] <= point <= high.flat[axis]:
                raise ValueError("a box is split outside of itself")
            upper, lower = low.copy(), high.copy()
            upper.flat[axis] = lower.flat[axis] = point
            waiting += [(upper, high), (low, lower)]
        if waiting:
            raise ValueError("the tree ends before its splits do")


def pack(network, claim, pieces=(), notes=()):
    """`(header, arrays)` for `archive.write`; the pieces are those of a tree of one leaf."""
    arrays = {name: getattr(claim, name) for name in _KINDS}
    return claimed.pack(archive.PROPERTIES, network, arrays, pieces, notes)


def unpack(header, arrays):
    """`(layers, claim, pieces, notes)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    layers, fields, pieces, notes = claimed.unpack(header, arrays, _KINDS)
    claim = PropertyClaim(**fields)
    claim.check()
    if claim.axes.ndim != 1 or claim.axes.shape != claim.points.shape or not len(claim.axes):
        raise ValueError("the tree has another shape than its points")
    if len(claim.axes) > 1 and (pieces or np.any(np.isfinite(claim.radii))):
        raise ValueError("a region that is divided is a box, without multipliers")
    return layers, claim, pieces, notes


def failures(network, claim, pieces=(), passes=None):
    """Numbers of the leaves on which the property does not follow, the first first.

    Raises:
        ValueError: if the claim or the pieces do not fit the network.
        OverflowError: if signals on a part have no bound.
    """
    passes = Passes(network) if passes is None else passes
    claim.fits(network)
    if len(claim.axes) > 1 and not (
        np.all(np.isfinite(claim.low)) and np.all(np.isfinite(claim.high))
    ):
        raise ValueError("the region is not bounded")
    for number, (low, high) in enumerate(claim.leaves()):
        is_whole = len(claim.axes) == 1
        region = claim.bounded_region() if is_whole else box_region(low, high)
        if not claim.holds(passes.lower(region, claim.rows, pieces)[0]):
            yield number


def box_region(low, high):
    """`Region` of a box around its middle."""
    center = np.clip(low / 2 + high / 2, low, high)
    return ClaimedRegion(center, low, high, np.full(2, np.inf)).region()


@dataclasses.dataclass(frozen=True, eq=False)
class PropertyVerification(Outcome):
    """Outcome of `verify` for a proof file of a property.

    Attributes:
        holds: the property follows from the model's weights.
        reasons: why not; empty if it holds.
        claim: `PropertyClaim` or `partitions.PartitionClaim`, as the file says.
        leaves: parts of the region, of all sets together.
        notes: what the file says of itself, unchecked: each on one line, in quotation marks.
        seconds: wall time.
    """

    holds: bool
    reasons: tuple
    claim: SetsClaim
    leaves: int
    notes: tuple
    seconds: float

    def explain(self):
        """Plain text: whether the property follows from the weights, and if not, why."""
        sets = len(self.claim.starts)
        lines = [
            f"{'VERIFIED' if self.holds else 'NOT VERIFIED'}: the logits lie in none of {sets} "
            f"sets of {len(self.claim.bounds)} linear inequalities in all, for all "
            f"{self.claim.words()}; in {self.leaves} parts."
        ]
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join(lines + self.closing("the region's centre"))

    def fields(self):
        """JSON-safe dict of the outcome, without what the file says of itself."""
        return {
            "holds": bool(self.holds),
            "reasons": list(self.reasons),
            "unsafe_sets": len(self.claim.starts),
            "inequalities": len(self.claim.bounds),
            "leaves": self.leaves,
        }


def checked(layers, claim, pieces, notes, model, network, calls):
    """`PropertyVerification` of a file's contents, see `rechecking.verify`."""
    begin = time.monotonic()

    def check():
        failed = next(failures(network, claim, pieces), None)
        if failed is not None:
            return [f"The property does not follow on part {failed + 1} of {leaves}."]
        return contradictions(model, network, calls, claim)

    leaves = int(np.sum(claim.axes == LEAF))
    reasons = reasons_against(layers, network, check)
    seconds = time.monotonic() - begin
    return PropertyVerification(not reasons, tuple(reasons), claim, leaves, notes, seconds)
