"""Proof files of properties by parts that hidden units divide: a tree of splits for every set.

What the bounds of the whole region, with the file's multipliers, do not prove of an unsafe set
{y : A y ≤ b} is proved on the leaves of a tree: each node divides its inputs by whether what an
activation reads, or an input, lies below or above a point (`around.parts`), so that the leaves hold
all inputs by construction. On a leaf it is enough that for some weights w ≥ 0 of the rows

    (wᵀA) y > wᵀb,   or ≥ where a row with a positive weight is strict:

no y of the set has that. Weights and slopes come from the file and need no proof.
"""

import dataclasses
import time

import numpy as np

from tf_lyapunov.verification import archive, claimed
from tf_lyapunov.verification.arithmetic import SLACK, down, gamma, up
from tf_lyapunov.verification.around import evidence
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.parts import Parts
from tf_lyapunov.verification.around.relaxation import Multipliers, of_rows
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.contents import quoted
from tf_lyapunov.verification.operations import Activation
from tf_lyapunov.verification.outcome import reasons_against
from tf_lyapunov.verification.properties import LEAF, SETS, PropertyVerification, SetsClaim
from tf_lyapunov.verification.ranges import Passes, contradictions

_TREE = {"renewed": "i8", "sets": "i8", "steps": "i8", "units": "i8", "points": "f8"}
_LEAVES = {
    "leaf_layout": "i8", "leaf_weights": "f8", "leaf_units": "i4", "leaf_slopes": "f4",
    "leaf_logs": "f4",
}  # fmt: skip
_KINDS = SETS | _TREE | _LEAVES
# Nodes of all trees, and steps with slopes of all leaves, at most.
_NODES = 2**22
# Numbers that the parts on the way to a leaf may hold together.
_HELD = 2**27
# Splits that a sentence names.
_NAMED = 6


@dataclasses.dataclass(frozen=True, eq=False)
class PartitionClaim(SetsClaim):
    """`SetsClaim` with trees of splits.

    Attributes:
        renewed: int64 (1,), 1 where boxes are bounded anew on every half.
        sets: int64 (trees,), the set that each tree is about.
        steps: int64 (nodes,), tree by tree, in preorder: the number of an activation, of which
            what it reads is split, 0 for the input, or `LEAF`.
        units: int64 (nodes,), flat unit.
        points: float64 (nodes,), where.
        leaf_layout: int64, leaf by leaf: number of parts, then for each step and columns.
        leaf_weights: float64, leaf by leaf: w.
        leaf_units: int32, part by part: units.
        leaf_slopes: float32, the same: g of the units; of maxima shares of cells.
        leaf_logs: float32 (parts,), log λ.
    """

    renewed: np.ndarray
    sets: np.ndarray
    steps: np.ndarray
    units: np.ndarray
    points: np.ndarray
    leaf_layout: np.ndarray
    leaf_weights: np.ndarray
    leaf_units: np.ndarray
    leaf_slopes: np.ndarray
    leaf_logs: np.ndarray

    @property
    def leaves(self):
        """Number of leaves of all trees."""
        return int(np.sum(self.steps == LEAF))


@dataclasses.dataclass(frozen=True, eq=False)
class Slopes:
    """What a file says of one leaf.

    Attributes:
        weights: float64 (rows of the set,).
        parts: tuple of `(step, columns int32, slopes float32, log λ)`.
    """

    weights: np.ndarray
    parts: tuple


def pack(network, claim, pieces=(), notes=()):
    """`(header, arrays)` for `archive.write`."""
    arrays = {name: getattr(claim, name) for name in _KINDS}
    return claimed.pack(archive.PARTITIONS, network, arrays, pieces, notes)


def packed_leaves(leaves):
    """The arrays of `_LEAVES` for a list of `Slopes`."""
    layout, parts = [], [part for leaf in leaves for part in leaf.parts]
    for leaf in leaves:
        layout.append(len(leaf.parts))
        for step, columns, _, _ in leaf.parts:
            layout += [step, len(columns)]
    return {
        "leaf_layout": np.array(layout, np.int64),
        "leaf_weights": np.concatenate([[], *(leaf.weights for leaf in leaves)]),
        "leaf_units": np.concatenate([[], *(p[1] for p in parts)]).astype(np.int32),
        "leaf_slopes": np.concatenate([[], *(p[2] for p in parts)]).astype(np.float32),
        "leaf_logs": np.array([p[3] for p in parts], np.float32),
    }


def unpack(header, arrays):
    """`(layers, claim, pieces, notes)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    layers, fields, pieces, notes = claimed.unpack(header, arrays, _KINDS)
    claim = PartitionClaim(**fields)
    claim.check()
    for name in (*_TREE, *_LEAVES):
        if fields[name].ndim != 1:
            raise ValueError(f"{name} is no row of numbers")
    if claim.renewed.shape != (1,) or claim.renewed[0] not in (0, 1):
        raise ValueError("boxes are neither bounded anew nor not")
    if len(claim.steps) > _NODES or len(claim.leaf_layout) > 8 * _NODES:
        raise ValueError("the trees have more nodes than are read")
    if not claim.steps.shape == claim.units.shape == claim.points.shape:
        raise ValueError("the trees have another shape than their points")
    if not np.all(np.isfinite(claim.points)) or not np.all(np.isfinite(claim.leaf_slopes)):
        raise ValueError("a point or a slope is not finite")
    weights = claim.leaf_weights
    if not np.all((weights >= 0) & (weights <= 2.0**100)):
        raise ValueError("a weight of a row is negative or huge")
    sets = claim.sets
    if len(np.unique(sets)) != len(sets) or np.any(sets < 0) or np.any(sets >= len(claim.starts)):
        raise ValueError("a tree is about no set, or two are about one")
    return layers, claim, pieces, notes


def nodes(claim):
    """`(trees, leaves)`: per tree its set and nodes `(step, unit, point)`, and the `Slopes` of all
    leaves.

    Raises:
        ValueError: if the arrays do not fit each other.
    """
    table = list(
        zip(claim.steps.tolist(), claim.units.tolist(), claim.points.tolist(), strict=True)
    )
    lengths = np.diff(np.append(claim.starts, len(claim.bounds)))
    trees, at, owners = [], 0, []
    for number in claim.sets.tolist():
        waiting, start = 1, at
        while waiting:
            if at == len(table):
                raise ValueError("a tree ends before its splits do")
            is_leaf = table[at][0] == LEAF
            owners += [number] if is_leaf else []
            waiting += -1 if is_leaf else 1
            at += 1
        trees.append((number, table[start:at]))
    if at != len(table):
        raise ValueError("there are more nodes than trees hold")
    layout, held = _Reader(claim.leaf_layout), _Reader(claim.leaf_weights)
    columns, slopes = _Reader(claim.leaf_units), _Reader(claim.leaf_slopes)
    logs, leaves = _Reader(claim.leaf_logs), []
    for number in owners:
        weights, parts = held.take(int(lengths[number])), []
        for _ in range(layout.count()):
            step, size = (int(v) for v in layout.take(2))
            parts.append((step, columns.take(size), slopes.take(size), float(logs.take(1)[0])))
        leaves.append(Slopes(weights, tuple(parts)))
    if any(reader.rest for reader in (layout, held, columns, slopes, logs)):
        raise ValueError("the leaves hold more than is laid out")
    return trees, leaves


class _Reader:
    def __init__(self, array):
        self.array, self.place = array, 0

    @property
    def rest(self):
        return len(self.array) - self.place

    def take(self, count):
        if not 0 <= count <= self.rest:
            raise ValueError("the slopes of the leaves end too early")
        self.place += count
        return self.array[self.place - count : self.place]

    def count(self):
        """A number of things that take two more numbers each."""
        count = int(self.take(1)[0])
        if not 0 <= count <= self.rest // 2:
            raise ValueError("the layout of the leaves does not fit")
        return count


class Proofs:
    """Bounds of a network's logits on a region and its parts, for one claim.

    Args:
        network: `network.Network`.
        claim: `PartitionClaim`; its trees and leaves are not read.
        pieces: list of `evidence.Piece`.

    Attributes:
        open: numbers of the sets that the bounds of the whole region do not prove.

    Raises:
        ValueError: if the claim or the pieces do not fit the network.
        OverflowError: if signals on the region have no bound.
    """

    def __init__(self, network, claim, pieces):
        claim.fits(network)
        passes = Passes(network)
        self.network, self.claim, self.shape = passes.network, claim, passes.shape
        region, rows = claim.bounded_region(), claim.rows
        given = evidence.read(self.network, pieces, len(rows))
        if given.branches or given.joint:
            raise ValueError("a region has no branches beside its trees, and no joint multipliers")
        target = self.network.logits
        with np.errstate(over="ignore", invalid="ignore"):
            self.around = around = Surroundings(self.network, passes.gains, region, given.groups)
            around.weigh(given.weights)
            found = [
                around.lower(
                    target, Functionals(rows[k].reshape(-1, *self.shape)), of_rows(given.last, k)
                )
                for k in around.blocks(len(rows))
            ]
        self.open = np.flatnonzero(~claim.outside(np.concatenate(found)))
        self.parts = Parts(self.around, bool(claim.renewed[0]))
        self.numbers = {step.name: k for k, step in enumerate(self.network.steps)}

    def signal(self, step):
        """`(name, size)` of the signal that a node splits."""
        name = self.network.steps[0].name
        if step != 0:
            if not 0 < step < len(self.network.steps):
                raise ValueError(f"there is no step {step}")
            found = self.network.steps[step]
            if not isinstance(found.operation, Activation) or found.name not in self.around.relaxed:
                raise ValueError(f"step {step} is no activation before the logits")
            (name,) = found.inputs
        return name, self.around.values[name].size

    def walk(self, part, tree):
        """The parts of a tree's leaves, in preorder; None for those found to hold no input.

        Args:
            part: `Part` at the tree's root, or None.
            tree: list of `(step, unit, point)`.
        """
        most = max(_HELD // self.parts.numbers, 16)
        waiting = [(part, ())]
        for step, unit, point in tree:
            part, way = waiting.pop()
            if callable(part):
                part = part()
            if step == LEAF:
                yield part, way
                continue
            name, size = self.signal(step)
            if not 0 <= unit < size:
                raise ValueError(f"there is no unit {unit} to split")
            if len(waiting) > most:
                raise ValueError("a tree is too deep")
            for is_above in (True, False):
                waiting.append((
                    self._half(part, name, unit, point, is_above),
                    (*way[-_NAMED + 1:], (name, unit, point, is_above)),
                ))  # fmt: skip

    def _half(self, part, *cut):
        """A function that makes a half when its turn comes."""
        if part is None:
            return None
        return lambda: self.parts.half(part, *cut)

    def excess(self, number, part, slopes):
        """`(lower, is_outside)`: of wᵀA y - wᵀb on a part, and whether that keeps y out of a set.

        Args:
            number: of the set.
            part: `Part`, or None where there is no input.
            slopes: `Slopes`.
        """
        if part is None:
            return np.inf, True
        claim, w = self.claim, slopes.weights
        end = np.append(claim.starts, len(claim.bounds))[number + 1]
        own = slice(int(claim.starts[number]), int(end))
        rows, bounds = claim.rows[own], claim.bounds[own]
        if not np.any(w > 0):
            return -np.inf, False
        c, need, doubt = w @ rows, float(w @ bounds), 0.0
        if np.sum(w > 0) > 1 or np.max(w) != 1:
            # The rounding of the two combinations.
            room = gamma(len(w) + 8) * SLACK
            size = self.around.size(self.network.logits).reshape(-1)
            most = float((w @ np.abs(rows)) @ size) * (1 + gamma(len(size) + len(w) + 8))
            doubt = room * (most + float(w @ np.abs(bounds))) * SLACK + 2.0**-500
        c = Functionals(c.reshape(1, *self.shape))
        lower = float(self.parts.lower(part, c, self._multipliers(slopes))[0])
        excess = down(down(lower - need) - up(doubt))
        is_strict = bool(np.any(claim.strict[own][w > 0] == 1))
        return float(excess), bool(excess > 0 or (is_strict and excess >= 0))

    def _multipliers(self, slopes):
        found = {}
        for step, columns, values, log in slopes.parts:
            if not 0 < step < len(self.network.steps):
                raise ValueError(f"there is no step {step}")
            reads = self.network.steps[step]
            if reads.name in found:
                raise ValueError("the slopes of a step are there twice")
            evidence.check_units(columns, evidence.shared(reads))
            found[reads.name] = Multipliers(
                columns,
                values.astype(np.float64)[None],
                evidence.lam_of(np.array([log])),
                isinstance(reads.operation, Activation),
            )
        return found


def failures(network, claim, pieces=()):
    """`(set, number of the leaf or None, way, bound)` wherever a claim does not follow.

    Raises:
        ValueError: if the claim or the pieces do not fit the network.
        OverflowError: if signals on the region have no bound.
    """
    trees, leaves = nodes(claim)
    proofs = Proofs(network, claim, pieces)
    for number in proofs.open:
        if number not in claim.sets:
            yield int(number), None, (), -np.inf
    at = 0
    for number, tree in trees:
        for part, way in proofs.walk(proofs.parts.whole(), tree):
            excess, is_outside = proofs.excess(number, part, leaves[at])
            if not is_outside:
                yield number, at, way, excess
            at += 1


def sentence(claim, number, leaf, way, excess):
    """A sentence on what does not follow."""
    if leaf is None:
        return f"Set {number + 1} is not missed on the whole region, and has no parts."
    splits = ", ".join(
        f"{quoted(name)} {unit} {'≥' if is_above else '≤'} {point:.6g}"
        for name, unit, point, is_above in way
    )
    where = f" ({splits})" if splits else ""
    return (
        f"Set {number + 1} is not missed on part {leaf + 1} of {claim.leaves}{where}: the bound of "
        f"its rows' excess is {excess:.6g}."
    )


def checked(layers, claim, pieces, notes, model, network, calls):
    """`PropertyVerification` of a file's contents, see `rechecking.verify`."""
    begin = time.monotonic()

    def check():
        failed = next(failures(network, claim, pieces), None)
        if failed is not None:
            return [sentence(claim, *failed)]
        return contradictions(model, network, calls, claim)

    reasons = reasons_against(layers, network, check)
    seconds = time.monotonic() - begin
    return PropertyVerification(
        not reasons, tuple(reasons), claim, max(claim.leaves, 1), notes, seconds
    )
