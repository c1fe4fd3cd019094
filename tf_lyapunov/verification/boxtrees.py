"""Trees of boxes: one box, cut in two along an input, and so on; the leaves cover it.

Nodes are in preorder, the lower half before the upper one. A node is `LEAF`, or the flat input
along which its box is halved in its middle, or `cut_of` that input where it is cut at a point that
the tree holds: boxes are computed from the root's alone, so that no leaf can be moved or left out.
"""

import dataclasses
import functools

import numpy as np

LEAF = -1
# Numbers of boxes that wait for their turn, at most.
_WAITING = 2**26
# How many cuts apart nodes are with which things are found that hold for all below.
STRIDE = 6


def cut_of(axis):
    """A node that is cut along a flat input at a point of its own."""
    return -2 - axis


@dataclasses.dataclass(frozen=True, eq=False)
class BoxTree:
    """A tree of boxes.

    Attributes:
        axes: int64 (nodes,), see the module.
        points: float64, the points of those that have one, in preorder.

    Raises:
        ValueError: if the tree has other nodes than its cuts say.
    """

    axes: np.ndarray
    points: np.ndarray

    def __post_init__(self):
        if len(self.points) != np.sum(self.axes < LEAF):
            raise ValueError("the tree has another number of points than its cuts say")

    @property
    def leaves(self):
        """Number of leaves."""
        return int(np.sum(self.axes == LEAF))

    @functools.cached_property
    def numbers(self):
        """int64 (nodes,): of a leaf, how many there are before it."""
        return np.cumsum(self.axes == LEAF) - 1

    @functools.cached_property
    def upper(self):
        """int64 (nodes,): node of the upper half; the lower one's is next."""
        found, waiting, last = np.zeros(len(self.axes), np.int64), [], len(self.axes) - 1
        for node, is_leaf in enumerate((self.axes == LEAF).tolist()):
            if not is_leaf:
                waiting.append(node)
            elif waiting:
                found[waiting.pop()] = node + 1
            elif node != last:
                raise ValueError("the tree has more nodes than its splits say")
        if waiting or found.max(initial=0) > last:
            raise ValueError("the tree ends before its splits do")
        return found

    @functools.cached_property
    def _place(self):
        return np.cumsum(self.axes < LEAF) - 1

    def halves(self, nodes, low, high):
        """`(nodes, low, high)` of the lower halves of some nodes, and of the upper ones behind.

        Args:
            nodes: int64 (n,), none of them a leaf.
            low, high: float64 (n, inputs), their boxes.

        Raises:
            ValueError: if a box is cut outside of itself.
        """
        code, index = self.axes[nodes], np.arange(len(nodes))
        axis = np.where(code < LEAF, -2 - code, code)
        if np.any(axis >= low.shape[1]):
            raise ValueError("a box is split along no input")
        first, last = low[index, axis], high[index, axis]
        point = first / 2 + last / 2
        own = code < LEAF
        point[own] = self.points[self._place[nodes[own]]]
        if not np.all((first <= point) & (point <= last)):
            raise ValueError("a box is split outside of itself")
        low, high = np.concatenate([low, low]), np.concatenate([high, high])
        high[index, axis] = low[len(nodes) + index, axis] = point
        return np.concatenate([nodes + 1, self.upper[nodes]]), low, high

    def batches(self, low, high, count, known=None, renewed=None, wanted=None):
        """Yields `(nodes, low, high, known, owner)`: leaves' nodes and boxes, batch by batch, and
        what is known of boxes that hold them, each of that of its owner.

        Args:
            low, high: float64 (inputs,), the box of the root.
            count: of nodes whose halves are gone through together.
            known: what is known of the root's box, with `take(index)`, or None.
            renewed: function of `(low, high, known)` that gives what is known of boxes, from what
                is of those that hold them, called on every `STRIDE`-th node on the way to a leaf.
            wanted: bool (nodes,), which to go through: with a node those above it; or None for all.
        """
        root, _ = np.zeros(1, np.int64), self.upper
        waiting, held = [(root, low[None], high[None], known, root)], 2 * low.size
        while waiting:
            nodes, low, high, known, owner = waiting.pop()
            if len(nodes) > count:
                waiting.append((*(v[count:] for v in (nodes, low, high)), known, owner[count:]))
                nodes, low, high, owner = (v[:count] for v in (nodes, low, high, owner))
            held -= 2 * low.size
            if known is not None:
                known = known.take(owner) if renewed is None else renewed(
                    low, high, known.take(owner))  # fmt: skip
            owner, found = np.arange(len(nodes)), []
            for depth in range(STRIDE + 1):
                is_leaf = self.axes[nodes] == LEAF
                found.append([v[is_leaf] for v in (nodes, low, high, owner)])
                nodes, low, high, owner = (v[~is_leaf] for v in (nodes, low, high, owner))
                if depth == STRIDE or not len(nodes):
                    break
                nodes, low, high = self.halves(nodes, low, high)
                owner = np.concatenate([owner, owner])
                if wanted is not None:
                    kept = wanted[nodes]
                    nodes, low, high, owner = (v[kept] for v in (nodes, low, high, owner))
            if len(nodes):
                held += 2 * low.size
                if held > _WAITING:
                    raise ValueError("the tree is too deep for its boxes")
                waiting.append((nodes, low, high, known, owner))
            leaf, first, last, owner = (np.concatenate(v) for v in zip(*found, strict=True))
            if len(leaf):
                yield leaf, first, last, known, owner
