"""Proof files of properties that parts of a region prove which hidden units divide."""

import dataclasses

import numpy as np

from tf_lyapunov.local.clock import Clock
from tf_lyapunov.local.partition import Leaf
from tf_lyapunov.local.ranges import overflow_named, pieces_for, places_for, region_arrays
from tf_lyapunov.verification import archive, partitions
from tf_lyapunov.verification.properties import LEAF
from tf_lyapunov.verification.ranges import contradictions
from tf_lyapunov.verification.reading import read_with_calls

# Bytes of multipliers of the whole region that are kept.
_LARGEST = 2**24
# How often a part that the verifier does not prove is parted further, and at least for how long.
_ROUNDS, _SECONDS = 6, 10.0
# What bounds of parts must exceed then, relative to the rows' bounds.
_ROOM = 1e-7


def save_partition(found, path, clock):
    """Writes the proof file of a `verifying.Verification` by splits of hidden units.

    Raises:
        OutOfTime: if the clock's time is up before.
    """
    source, unsafe = found.source, found.unsafe
    network, region = source.network, source.region
    model, read, calls = read_with_calls(network.model, region.center.shape)
    places = places_for(source, read)
    if places is None:
        raise ValueError(
            "A proof file by splits of hidden units needs the verifier to read the same "
            f"activations. Received: model {network.model.name!r}, of which it reads others. "
            "Verify the property with branching='inputs'."
        )
    pieces = pieces_for(source, read, largest=_LARGEST, are_exact=True)
    claim = partitions.PartitionClaim(
        *region_arrays(region), unsafe.rows, unsafe.bounds, unsafe.strict.astype(np.int64),
        np.asarray(unsafe.starts, np.int64), np.array([int(found.tree.partition.is_renewed)]),
        *(np.zeros(0, np.int64),) * 3, np.zeros(0),
        **partitions.packed_leaves([]),
    )  # fmt: skip
    with overflow_named():
        writer = _Writer(found, partitions.Proofs(read, claim, pieces), places[0], clock)
        claim = dataclasses.replace(claim, **writer.arrays())
        if not writer.failed:
            # What `verify` finds of the very file.
            failed = next(partitions.failures(read, claim, pieces), None) if writer.mended else None
            if failed is not None:
                writer.failed = partitions.sentence(claim, *failed)
        wrong = [writer.failed] if writer.failed else contradictions(model, read, calls, claim)
    if wrong:
        raise ValueError(
            "The verifier could not confirm this property, so no proof file was written. "
            f"Received: model {network.model.name!r}. {' '.join(wrong)} Verify it with more "
            "`effort`, with branching='inputs' where few inputs change, or on smaller regions."
        )
    archive.write(path, *partitions.pack(read, claim, pieces))


class _Writer:
    """Trees of leaves in the verifier's terms, parted further where it does not prove them.

    Args:
        found: `verifying.Verification`.
        proofs: `partitions.Proofs`.
        outputs: steps by position of what an activation makes.
        clock: `Clock` of the whole file.

    Attributes:
        failed: a sentence on the first part that is not proved, or None.
        mended: number of parts that were parted further.
    """

    def __init__(self, found, proofs, outputs, clock):
        self.tree, self.proofs, self.outputs = found.tree, proofs, {0: 0, **outputs}
        self.limit, self.clock = clock, Clock(max(found.timeout, _SECONDS))
        self.failed, self.mended = None, 0

    def arrays(self):
        """Fields of a `PartitionClaim`; those of the first part that fails are as they were."""
        trees = {}
        for leaf in self.tree.partition.leaves:
            trees.setdefault(leaf.number, []).append(leaf)
        # A set that only the search's own bounds of the whole region prove.
        for number in self.proofs.open:
            trees.setdefault(int(number), self._whole(int(number)))
        nodes, leaves, sets = [], [], sorted(trees)
        for number in sets:
            whole = self.proofs.parts.whole()
            for part in self._proved(number, whole, trees[number], 0, 0):
                nodes += part[0]
                leaves += part[1]
        steps, units, points = zip(*nodes, strict=True) if nodes else ((), (), ())
        return {
            "sets": np.array(sets, np.int64),
            "steps": np.array(steps, np.int64),
            "units": np.array(units, np.int64),
            "points": np.array(points, np.float64),
            **partitions.packed_leaves(leaves),
        }

    def _whole(self, number):
        whole = Leaf(number, None, None)
        return self._further(whole, 0) or [whole]

    def _proved(self, number, part, leaves, depth, rounds):
        """List of `(nodes, leaves)` of a subtree: in preorder, and the `Slopes`.

        Args:
            number: of the set.
            part: the verifier's `Part` at its root.
            leaves: list of `partition.Leaf` below.
            depth: splits on the way to the root.
        """
        tree = _preorder([(leaf.splits()[depth:], leaf) for leaf in leaves])
        nodes = [LEAF_NODE if split is None else self._node(split) for split, _ in tree]
        below = [leaf for split, leaf in tree if split is None]
        slopes = [self._slopes(leaf) for leaf in below]
        found, at = [], 0
        ways = self.proofs.walk(part, nodes)
        for node in nodes:
            if node != LEAF_NODE:
                found.append(([node], []))
                continue
            self.limit.check()
            own, _ = next(ways)
            leaf, slope = below[at], slopes[at]
            excess, is_outside = self.proofs.excess(number, own, slope)
            further = None
            if not is_outside and not self.failed:
                further = self._further(leaf, rounds)
                if further is None:
                    self.failed = (
                        f"Set {number + 1} is not missed on a part after {len(leaf.splits())} "
                        f"splits: the bound of its rows' excess is {excess:.6g}."
                    )
            if further is None:
                found.append(([node], [slope]))
            else:
                found += self._proved(number, own, further, len(leaf.splits()), rounds + 1)
            at += 1
        return found

    def _further(self, leaf, rounds):
        if rounds >= _ROUNDS or self.clock.is_up():
            return None
        self.mended += 1
        size = 1 + float(np.max(np.abs(self.tree.unsafe.bounds), initial=0.0))
        return self.tree.further(leaf, rounds, _ROOM * size, self.clock)

    def _node(self, split):
        k, unit, point = split
        return self.outputs[k], unit, float(point)

    def _slopes(self, leaf):
        count = int(self.tree.unsafe.lengths[leaf.number])
        if leaf.evidence is None:
            return partitions.Slopes(np.eye(1, count)[0], ())
        parts = tuple(
            (self.outputs[k], *values) for k, values in sorted(leaf.evidence.slopes.items())
        )
        return partitions.Slopes(leaf.evidence.weights, parts)


LEAF_NODE = (LEAF, 0, 0.0)


def _preorder(leaves):
    """`(split or None, leaf or None)` in preorder, of leaves with the splits that lead to them."""
    found, waiting = [], [(leaves, 0)]
    while waiting:
        own, depth = waiting.pop()
        if len(own) == 1 and len(own[0][0]) == depth:
            found.append((None, own[0][1]))
            continue
        if not own or any(len(splits) <= depth for splits, _ in own):
            raise ValueError("A proof file needs parts that cover the region. Received: others.")
        split = own[0][0][depth][:3]
        if any(splits[depth][:3] != split for splits, _ in own):
            raise ValueError("A proof file needs parts that were halved. Received: others.")
        found.append((split, None))
        sides = [[pair for pair in own if pair[0][depth][3] == side] for side in (False, True)]
        waiting += [(sides[1], depth + 1), (sides[0], depth + 1)]
    return found
