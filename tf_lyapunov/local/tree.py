"""What branch and bound keeps, whatever it splits: open parts of a region, the worst first."""

import itertools

import numpy as np


class Tree:
    """Parts of one region, as records `(bound, number, …)` in a heap.

    Args:
        unsafe: `Unsafe`.
        attacker: `Attacker`, to which points where bounds are least are shown.
        clock: `Clock`.

    Attributes:
        branches: number of parts that were bounded.
        counterexample: what the attacker found, or None.
    """

    def __init__(self, unsafe, attacker, clock):
        self.unsafe, self.attacker, self.clock = unsafe, attacker, clock
        self.counter = itertools.count()
        # Bounds of parts that cannot be split further; the least bound of those proved.
        self.heap, self.stuck, self.closed = [], [], np.inf
        self.branches, self.counterexample = 0, None

    @property
    def bound(self):
        """Proved lower bound of the margin over the region."""
        return min([self.closed, *(record[0] for record in self.heap[:1]), *self.stuck])

    @property
    def open(self):
        """Number of parts that are not proved."""
        return len(self.heap) + len(self.stuck)
