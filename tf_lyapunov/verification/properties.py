"""Proof files of properties: no output of a region lies in one of several polyhedra.

The region may be divided: a tree of boxes, each cut along one input, on whose leaves the rows of
every set are bounded by passes of their own. The leaves cover the region by construction, and the
tree is all that a file holds of them: two bytes a node where boxes are halved.
"""

import dataclasses
import functools
import math
import time

import numpy as np

from tf_lyapunov.verification import archive, claimed
from tf_lyapunov.verification.arithmetic import down
from tf_lyapunov.verification.around.batches import Batches, is_covered
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.boxtrees import LEAF, BoxTree, cut_of
from tf_lyapunov.verification.claimed import ClaimedRegion
from tf_lyapunov.verification.outcome import Outcome, reasons_against
from tf_lyapunov.verification.ranges import Passes, contradictions

_REAL = ("center", "low", "high", "radii", "rows", "bounds")
# Arrays of every claim that outputs lie in none of several sets.
SETS = dict.fromkeys(_REAL, "f8") | dict.fromkeys(("strict", "starts"), "i8")
_KINDS = SETS | {"axes": "i8", "points": "f8"}
# Nodes whose halves are gone through together, and numbers that are held of them and of the leaves
# that are bounded together, at most.
_FRONT, _FRONT_NUMBERS, _LEAF_NUMBERS = 512, 2**21, 2**17


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
        """Whether lower bounds (…, r) of the rows keep outputs out of each set, bool (…, sets)."""
        excess = down(lower - self.bounds)
        outside = np.where(self.strict == 1, excess >= 0, excess > 0)
        return np.logical_or.reduceat(outside, self.starts, axis=-1)

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
        if starts.ndim != 1 or not len(starts) or starts[0] != 0:
            raise ValueError("the sets do not begin at their rows")
        if np.any((starts < 0) | (starts >= count)):  # whose differences may wrap around
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
        axes: int64 (nodes,), in preorder, as in `boxtrees`.
        points: float64, where boxes are cut that are not halved.
    """

    axes: np.ndarray
    points: np.ndarray

    def holds(self, lower):
        """Whether lower bounds (…, r) of the rows keep outputs out of every set, bool (…)."""
        return np.all(self.outside(lower), axis=-1)

    @functools.cached_property
    def tree(self):
        """`boxtrees.BoxTree`."""
        return BoxTree(self.axes, self.points)

    def leaves(self):
        """Boxes `(low, high)` of the leaves, in preorder, float64 (leaves, *shape) each.

        Raises:
            ValueError: if the tree has other nodes than its splits say, or a box is split outside
                of itself.
        """
        ends = np.empty((2, self.tree.leaves, *self.center.shape))
        flat = ends.reshape(2, self.tree.leaves, -1)
        for nodes, low, high, *_ in self.tree.batches(self.low.ravel(), self.high.ravel(), _FRONT):
            flat[:, self.tree.numbers[nodes]] = low, high
        return tuple(ends)


def pack(network, claim, pieces=(), notes=()):
    """`(header, arrays)` for `archive.write`; the pieces are those of a tree of one leaf."""
    arrays = {name: getattr(claim, name) for name in _KINDS}
    arrays["axes"] = claim.axes.astype(np.int16 if claim.center.size < 2**15 - 2 else np.int32)
    return claimed.pack(archive.PROPERTIES, network, arrays, pieces, notes)


def unpack(header, arrays):
    """`(layers, claim, pieces, notes)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    kind = arrays["axes"].dtype.str[1:]
    if kind not in ("i2", "i4", "i8"):
        raise ValueError("axes is of another type")
    layers, fields, pieces, notes = claimed.unpack(header, arrays, _KINDS | {"axes": kind})
    axes, points = fields["axes"].astype(np.int64), fields["points"]
    if axes.ndim != 1 or points.ndim != 1 or not len(axes) or len(points) > len(axes):
        raise ValueError("the tree has another shape than its points")
    if len(points) == len(axes):
        # As in files of earlier versions of this library: a point for every node, leaves included.
        points, axes = points[axes != LEAF], np.where(axes == LEAF, LEAF, cut_of(axes))
    claim = PropertyClaim(**fields | {"axes": axes, "points": points})
    claim.check()
    if len(points) != np.sum(axes < LEAF):
        raise ValueError("the tree has another number of points than its cuts say")
    if len(axes) > 1 and (pieces or np.any(np.isfinite(claim.radii))):
        raise ValueError("a region that is divided is a box, without multipliers")
    return layers, claim, pieces, notes


def failures(network, claim, pieces=(), passes=None):
    """Numbers of the leaves on which the property does not follow.

    Leaves are bounded many at once where `batches` covers the network, and where that does not
    prove one, or does not cover it, one by one.

    Raises:
        ValueError: if the claim or the pieces do not fit the network.
        OverflowError: if signals on a part have no bound.
    """
    passes = Passes(network) if passes is None else passes
    claim.fits(network)
    region = claim.bounded_region()
    if len(claim.axes) == 1:
        if claim.holds(passes.lower(region, claim.rows, pieces)[0]):
            return
        if pieces or np.any(np.isfinite(claim.radii)):
            yield 0
            return
    for nodes, low, high, _ in Leaves(passes, claim).unproved(claim.tree):
        shape = (len(nodes), *claim.center.shape)
        for node, *ends in zip(nodes, low.reshape(shape), high.reshape(shape), strict=True):
            if not claim.holds(passes.lower(box_region(*ends), claim.rows)[0]):
                yield int(claim.tree.numbers[node])


def box_region(low, high):
    """`Region` of a box around its middle."""
    center = np.clip(low / 2 + high / 2, low, high)
    return ClaimedRegion(center, low, high, np.full(2, np.inf)).region()


class Leaves:
    """Bounds of a claim's rows on the leaves of trees of its box.

    Args:
        passes: `ranges.Passes`.
        claim: `PropertyClaim`; its own tree is not read.
        room: by how much more than the claim says rows must exceed their bounds.

    Raises:
        OverflowError: if signals on the box have no bound.
    """

    def __init__(self, passes, claim, room=0.0):
        self.claim, self.batches = claim, None
        self.wanted = dataclasses.replace(claim, bounds=claim.bounds + room)
        if is_covered(passes.network):
            with np.errstate(over="ignore", invalid="ignore"):
                region = claim.bounded_region()
                self.batches = Batches(Surroundings(passes.network, passes.gains, region))

    def unproved(self, tree, wanted=None, check=lambda: None):
        """Yields `(nodes, low, high, known)` of leaves without a proof, boxes float64 (n, inputs),
        and what `lower` takes.

        Args:
            tree: `boxtrees.BoxTree`.
            wanted: see its `batches`.
            check: function without arguments, called between batches.
        """
        low, high = self.claim.low.ravel(), self.claim.high.ravel()
        if self.batches is None:
            for nodes, *ends, _, _ in tree.batches(low, high, _FRONT, wanted=wanted):
                yield nodes, *ends, None
            return
        bounded, size = self.batches, self.batches.numbers + 2 * low.size
        count, step = (max(n // size, 1) for n in (_FRONT_NUMBERS, _LEAF_NUMBERS))
        with np.errstate(over="ignore", invalid="ignore"):
            walk = tree.batches(
                low, high, min(count, _FRONT), bounded.whole(), bounded.renewed, wanted
            )
            for nodes, low, high, known, owner in walk:
                is_open = []
                for k in range(0, len(nodes), step):
                    check()
                    own = slice(k, k + step)
                    held = known.take(owner[own])
                    lower = bounded.lower(low[own], high[own], held, self.claim.rows)
                    is_open.append(~self.wanted.holds(lower))
                is_open = np.concatenate(is_open)
                if np.any(is_open):
                    held = known.take(owner[is_open])
                    yield nodes[is_open], low[is_open], high[is_open], held

    def deficits(self, low, high, known):
        """By how much rows of every set miss what is wanted on boxes, all sets together, (n,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            excess = self.batches.lower(low, high, known, self.claim.rows) - self.wanted.bounds
            best = np.maximum.reduceat(excess, self.claim.starts, axis=1)
            return -np.minimum(best, 0.0).sum(axis=1)


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
