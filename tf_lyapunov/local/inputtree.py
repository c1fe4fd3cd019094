"""Branch and bound on the input: boxes halved until every one is proved, the worst first."""

import heapq
import time

import numpy as np

from tf_lyapunov.local.around import OutOfTime
from tf_lyapunov.local.domains import narrowed
from tf_lyapunov.local.evaluating import Evaluation
from tf_lyapunov.local.tree import Tree
from tf_lyapunov.program import rounding

# Domains of one batch: few at first, then as many as pass in this time.
_FIRST, _MOST, _SECONDS = 16, 4096, 0.4
# Numbers that open domains may hold, boxes of hidden units above all, before the best is split.
_ROOM = 2**26
# Numbers of boxes that are kept for a proof file.
_LEAVES = 2**22
# Weight of a row's own slope beside what relaxations lose, in the choice of an input.
_OWN = 0.2


class InputTree(Tree):
    """Domains of one region, split along their inputs.

    Args:
        domains: `Domains`.
        unsafe, attacker, clock: of `Tree`; the attacker is shown the corners of bounds.
    """

    def __init__(self, domains, unsafe, attacker, clock):
        super().__init__(unsafe, attacker, clock)
        self.domains = domains
        # Boxes that are proved, for a proof file; None where they are too many for one.
        self.leaves = []

    def run(self, root_bound=-np.inf, report=lambda count: None):
        """Splits until nothing is open, a counterexample is found, or time is up.

        Args:
            root_bound: of the whole region, known already.
            report: called with the number of domains after every batch.
        """
        region, kept = self.domains.region, self.domains.kept
        attacker = self.attacker
        low, high = attacker.low.reshape(1, -1), attacker.high.reshape(1, -1)
        # Within the region's reach, rounded outwards.
        low, high = rounding.down(low), rounding.up(high)
        low = np.maximum(low, region.low.reshape(1, -1))
        high = np.minimum(high, region.high.reshape(1, -1))
        sets = len(self.unsafe.starts)
        self.heap = [
            (root_bound, next(self.counter), (low[0], high[0]), {}, np.ones(sets, bool), -1)
        ]
        size, rounds = _FIRST, 0
        batch = self._pop(1)
        split = False
        while batch:
            begin = time.monotonic()
            try:
                parts = self._bounded(batch, kept, split)
            except OutOfTime:
                for record in batch:
                    heapq.heappush(self.heap, record)
                return
            rounds += 1
            report(len(parts[0]))
            found = self._shown(*parts, rounds)
            if found is not None or self.clock.is_up():
                return
            spent = max(time.monotonic() - begin, 1e-4)
            limit = min(_SECONDS, 0.05 * self.clock.timeout)
            size = int(np.clip(size * np.clip(limit / spent, 0.5, 2.0), 1, _MOST))
            batch, split = self._pop(size), True

    def _pop(self, count):
        if not self.heap:
            return []
        numbers = sum(2 * len(self.domains.whole[k][0]) for k in self.domains.kept)
        if len(self.heap) * numbers < _ROOM:
            return [heapq.heappop(self.heap) for _ in range(min(count, len(self.heap)))]
        # No room for more: those that are nearly proved first; a sorted list is a heap.
        self.heap.sort()
        found, self.heap = self.heap[-count:], self.heap[:-count]
        return found

    def _bounded(self, batch, kept, split):
        """Bounds of the halves of a batch (or of the batch itself), and what is open again."""
        low = np.stack([record[2][0] for record in batch])
        high = np.stack([record[2][1] for record in batch])
        mask = np.stack([record[4] for record in batch])
        before = np.array([record[0] for record in batch])
        boxes = dict.fromkeys(kept)
        if split:
            for k in kept:
                boxes[k] = tuple(
                    np.repeat(np.stack([record[3][k][e] for record in batch]), 2, axis=0).astype(
                        np.float64
                    )
                    for e in (0, 1)
                )
            low, high, mask, before = (np.repeat(v, 2, axis=0) for v in (low, high, mask, before))
            at = np.repeat([record[5] for record in batch], 2)
            rows = np.arange(len(at))
            middle = low[rows, at] / 2 + high[rows, at] / 2
            even = rows % 2 == 0
            high[rows[even], at[even]] = middle[even]
            low[rows[~even], at[~even]] = middle[~even]
        unsafe = self.unsafe
        wanted = mask[:, unsafe.set_of]
        bounded = self.domains.bound(low, high, boxes, unsafe.rows, wanted, self.clock.check)
        excess = rounding.down(bounded.lower - unsafe.bounds)
        self.branches += len(low)
        holds = unsafe.holds(excess) & mask
        values = np.maximum(unsafe.of_rows(excess), before[:, None])
        # A set that is left behind counts with the bound that it was left with.
        closed = np.where(holds, values, np.inf)
        self.closed = min(self.closed, float(closed.min()))
        mask = mask & ~holds
        self._keep(low, high, ~mask.any(axis=1))
        bounds = np.where(mask, values, np.inf)
        target = bounds.argmin(axis=1)
        bound = bounds[np.arange(len(bounds)), target]
        rows = bounded.place[np.arange(len(low)), self._deciding(excess, target)]
        slopes = np.where((rows >= 0)[:, None], bounded.slopes[rows], 0.0)
        corners = np.where(slopes > 0, low, high)
        at = self._chosen(bounded, rows, slopes, low, high)
        narrow = {k: narrowed(*boxes[k]) for k in kept}
        margins, lost = self._margins(low, high, corners), bounded.lost[rows]
        for i in np.flatnonzero(mask.any(axis=1)):
            a, b = low[i, at[i]], high[i, at[i]]
            if not a < a / 2 + b / 2 < b or margins[i] <= lost[i]:
                self.stuck.append(float(bound[i]))
                continue
            held = {k: (a[i].copy(), b[i].copy()) for k, (a, b) in narrow.items()}
            record = float(bound[i]), next(self.counter), (low[i], high[i]), held, mask[i], at[i]
            heapq.heappush(self.heap, record)
        return low, high, corners, bound

    def _keep(self, low, high, proved):
        if self.leaves is None:
            return
        self.leaves += [(low[i].copy(), high[i].copy()) for i in np.flatnonzero(proved)]
        if len(self.leaves) * low.shape[1] > _LEAVES:
            self.leaves = None

    def _margins(self, low, high, corners):
        """Least margin at a corner and the centre of every domain, where they lie in the region.

        What rounding takes off is about the same on every part: one that holds a point whose margin
        is below that would never be proved.
        """
        shape, found = self.attacker.low.shape, []
        for points in (corners, low / 2 + high / 2):
            moved = self.attacker.projected(points.reshape(-1, *shape))
            inside = np.all(moved.reshape(points.shape) == points, axis=1)
            margins = self.unsafe.margin(Evaluation(self.domains.flow, moved).outputs)
            found.append(np.where(inside, margins, np.inf))
        return np.minimum(*found)

    def _deciding(self, excess, target):
        """The row that decides each domain's worst set."""
        starts, ends = self.unsafe.starts, self.unsafe.starts + self.unsafe.lengths
        index = np.arange(excess.shape[1])
        own = (index >= starts[target][:, None]) & (index < ends[target][:, None])
        return np.where(own, excess, -np.inf).argmax(axis=1)

    def _chosen(self, bounded, rows, slopes, low, high):
        """The input along which to split each domain: whose width costs its bound most.

        What relaxations lose shrinks with the width; what the row itself moves along an input is
        part of the function, but decides which half is the worse one.
        """
        width = high - low
        score = (self.domains.losses(bounded, rows) + _OWN * np.abs(slopes)) * width
        # Where nothing is lost, the widest for its share of the region.
        whole = np.maximum((self.attacker.high - self.attacker.low).reshape(-1), 1e-300)
        largest = score.max(axis=1, keepdims=True)
        score += np.where(largest > 0, 1e-3 * largest, 1.0) * width / whole
        return np.argmax(score, axis=1)

    def _shown(self, low, high, corners, bound, rounds):
        """Shows corners and centres to the attacker, and descends from the worst now and then."""
        attacker, shape = self.attacker, self.attacker.low.shape
        points = np.concatenate([corners, low / 2 + high / 2])
        points = attacker.projected(points.reshape(-1, *shape))
        found = attacker.tried(points)
        if found is None and self.heap and (rounds & (rounds - 1)) == 0 and rounds > 1:
            worst = np.argsort(bound, kind="stable")[:16]
            found = attacker.search(
                corners[worst].reshape(-1, *shape), starts=8, steps=20, stop=self.clock.is_up
            )
        self.counterexample = found
        return found
