"""Proof files of properties that hold on a region, or on every part of it."""

import dataclasses

import numpy as np

from tf_lyapunov.local.around import OutOfTime
from tf_lyapunov.local.clock import Clock
from tf_lyapunov.local.partfiles import save_partition
from tf_lyapunov.local.ranges import check_unchanged, overflow_named, pieces_for, region_arrays
from tf_lyapunov.verification import archive, properties
from tf_lyapunov.verification.boxtrees import LEAF, BoxTree, cut_of
from tf_lyapunov.verification.ranges import Passes, contradictions
from tf_lyapunov.verification.reading import read_with_calls

# Halvings of a part that the verifier does not prove as it is.
_FURTHER = 12
# Inputs that change, up to which all are tried for that, and boxes that are tried together.
_FEW, _TRIED = 8, 256
# What another machine's order of sums may change of a bound, relative to its size, and more.
_ROOM = 1e-9


def save_property(found, path, timeout=None):
    """Writes the proof file of a `verifying.Verification`; see its `save`."""
    source = found.source
    if not found.is_proved or source is None:
        raise ValueError(
            "A proof file needs a property that `verify_property` proved. Received: status "
            f"{found.status}" + ("." if source is not None else ", without what it was found by.")
        )
    by_units = found.tree is not None and found.tree.partition.leaves is not None
    if found.leaves is None and not by_units:
        raise ValueError(
            "A proof file holds a region as a whole, parts of a box split along the inputs, or "
            f"parts split at hidden units. Received: a proof by {found.branches} branches, too "
            "many or of inputs on a ball. Verify the property with branching='units', or with "
            "more `effort`."
        )
    check_unchanged(source)
    clock = Clock(np.inf if timeout is None else timeout)
    try:
        if found.leaves is None:
            save_partition(found, path, clock)
        else:
            _save(found, path, clock)
    except OutOfTime:
        raise ValueError(
            "A proof file takes the time to bound every part once more, and it was up. Received: "
            f"{timeout:.3g} seconds, for a proof by {found.branches} branches. Allow more."
        ) from None


def _save(found, path, clock):
    network, region, unsafe = found.source.network, found.source.region, found.unsafe
    model, read, calls = read_with_calls(network.model, region.center.shape)
    passes = Passes(read)
    pieces = pieces_for(found.source, read) if not found.leaves else []
    claim = properties.PropertyClaim(
        *region_arrays(region),
        unsafe.rows,
        unsafe.bounds,
        unsafe.strict.astype(np.int64),
        np.asarray(unsafe.starts, np.int64),
        np.array([LEAF]),
        np.zeros(0),
    )
    with overflow_named():
        if found.leaves:
            tree = parted(claim, found.leaves.low, found.leaves.high)
            tree, is_proved = _proved(claim, passes, tree, clock)
            claim = dataclasses.replace(claim, axes=tree.axes, points=tree.points)
        else:
            is_proved = next(properties.failures(read, claim, pieces, passes), None) is None
        wrong = contradictions(model, read, calls, claim) if is_proved else [
            "It does not prove all parts of the region by its own bounds."
        ]  # fmt: skip
    if wrong:
        raise ValueError(
            "The verifier could not confirm this property, so no proof file was written. "
            f"Received: model {network.model.name!r}. {' '.join(wrong)} Verify it with "
            "branching='inputs' where few inputs change, or on smaller regions."
        )
    archive.write(path, *properties.pack(read, claim, pieces))


def _proved(claim, passes, tree, clock):
    """A tree whose leaves the verifier proves, with room, and whether there is one.

    A leaf's bound depends on the way to it alone: halving one changes no other's.
    """
    size = np.abs(claim.rows).sum(axis=1) + np.abs(claim.bounds)
    leaves = properties.Leaves(passes, claim, _ROOM * size)
    widths = np.maximum((claim.high - claim.low).ravel(), 1e-300)
    wanted, moving = None, np.flatnonzero(claim.low.ravel() < claim.high.ravel())
    for rounds in range(_FURTHER + 1):
        left = []
        for nodes, low, high, known in leaves.unproved(tree, wanted, clock.check):
            if rounds == _FURTHER:
                return tree, False
            axes = np.argmax((high - low) / widths, axis=1)
            if known is not None and len(moving) <= _FEW:
                axes = _chosen(leaves, low, high, known, moving, clock)
            left.append((nodes, axes))
        if not left:
            return tree, True
        tree, wanted = _halved(tree, *(np.concatenate(v) for v in zip(*left, strict=True)))
    return tree, False


def _chosen(leaves, low, high, known, moving, clock):
    """The input along which halving each box leaves least to be proved: all of them are tried."""
    best, least = np.zeros(len(low), np.int64), np.full(len(low), np.inf)
    for start in range(0, len(low), _TRIED):
        own = np.arange(start, min(start + _TRIED, len(low)))
        held = known.take(own)
        for axis in moving:
            clock.check()
            middle = low[own, axis] / 2 + high[own, axis] / 2
            missed = np.zeros(len(own))
            for end in range(2):
                ends = low[own], high[own]
                ends[1 - end][:, axis] = middle
                missed += leaves.deficits(*ends, held)
            is_better = missed < least[own]
            best[own] = np.where(is_better, axis, best[own])
            least[own] = np.where(is_better, missed, least[own])
    return best


def _halved(tree, nodes, axes):
    """A tree in which leaves are halved, and which of its nodes lead to those halves."""
    counts = np.ones(len(tree.axes), np.int64)
    counts[nodes] = 3
    found = np.repeat(tree.axes, counts)
    own = (np.cumsum(counts) - counts)[nodes]
    found[own] = axes
    tree = BoxTree(found, tree.points)
    inner = np.flatnonzero(found != LEAF)
    above = np.zeros(len(found), np.int64)
    above[inner + 1] = above[tree.upper[inner]] = inner
    wanted = np.zeros(len(found), bool)
    wanted[own + 1] = wanted[own + 2] = True
    while len(own):
        wanted[own] = True
        own = np.unique(above[own])
        own = own[~wanted[own]]
    return tree, wanted


def parted(claim, low, high):
    """The `BoxTree` of a claim's box that parts it as boxes do which come from halving it.

    Every group of boxes is cut where none lies on both sides, all groups of one depth at once.

    Args:
        low, high: float64 (leaves, inputs), flat.

    Raises:
        ValueError: if the boxes were not halved.
    """
    order, starts = np.arange(len(low)), np.zeros(1, np.int64)
    nodes, ends = np.zeros(1, np.int64), np.stack([claim.low.ravel(), claim.high.ravel()])[None]
    total = 2 * len(low) - 1
    axes, points, lower = np.full(total, LEAF), np.zeros(total), np.zeros(total, np.int64)
    waves, count = [], 1
    while True:
        sizes = np.diff(np.append(starts, len(order)))
        kept = sizes > 1
        order = order[np.repeat(kept, sizes)]
        if not len(order):
            break
        nodes, ends, sizes = nodes[kept], ends[kept], sizes[kept]
        starts, index = np.cumsum(sizes) - sizes, np.arange(len(nodes))
        first = np.minimum.reduceat(low[order], starts)
        last = np.maximum.reduceat(high[order], starts)
        of, middle = np.repeat(index, sizes), first / 2 + last / 2
        # A box without width along an input counts as below.
        below, above = high[order] <= middle[of], low[order] >= middle[of]
        clean = np.logical_and.reduceat(below | above, starts)
        for side in (below, ~below):
            clean &= np.logical_or.reduceat(side, starts)
        axis = np.argmax(clean, axis=1)
        if not np.all(clean[index, axis]):
            raise ValueError("A proof file needs boxes that were halved. Received: others.")
        point = middle[index, axis]
        is_middle = point == ends[index, 0, axis] / 2 + ends[index, 1, axis] / 2
        axes[nodes], points[nodes] = np.where(is_middle, axis, cut_of(axis)), point
        waves.append(nodes)
        lower[nodes] = count + 2 * index
        nodes = count + np.arange(2 * len(index))
        count += len(nodes)
        ends = np.repeat(ends, 2, axis=0)
        ends[2 * index, 1, axis] = ends[2 * index + 1, 0, axis] = point
        side = 2 * of + ~below[np.arange(len(of)), axis[of]]
        order = order[np.argsort(side, kind="stable")]
        starts = np.searchsorted(np.sort(side), np.arange(len(nodes)))
    sizes, place = np.ones(total, np.int64), np.zeros(total, np.int64)
    for nodes in reversed(waves):
        sizes[nodes] += sizes[lower[nodes]] + sizes[lower[nodes] + 1]
    for nodes in waves:
        place[lower[nodes]] = place[nodes] + 1
        place[lower[nodes] + 1] = place[nodes] + 1 + sizes[lower[nodes]]
    order = np.argsort(place)
    axes, points = axes[order], points[order]
    return BoxTree(axes, points[axes < LEAF])
