"""Branch and bound on the input: boxes halved until every one is proved, the worst first."""

import collections.abc
import dataclasses
import time

import numpy as np

from tf_lyapunov.local.around import OutOfTime
from tf_lyapunov.local.climbing import Climber
from tf_lyapunov.local.domains import narrowed
from tf_lyapunov.local.evaluating import Evaluation
from tf_lyapunov.local.pool import Parts, Pool
from tf_lyapunov.local.tree import Tree
from tf_lyapunov.program import rounding
from tf_lyapunov.theory.threads import each_in_threads

# Domains of one batch: few at first, then as many as pass in this time.
_FIRST, _MOST, _SECONDS = 16, 4096, 0.4
# Domains from which a batch is worth several threads.
_THREADED = 256
# Share of the time for the attack.
_ATTACKED = 0.2
# Numbers that open domains may hold, boxes of hidden units above all, before the best is split.
_ROOM = 2**26
# Numbers of boxes that are kept for a proof file: 64 MiB, or 838,000 boxes of five inputs, which
# take minutes to write, or to check, and four bytes a box on disk.
_LEAVES = 2**23
# Weight of a row's own slope beside what relaxations lose, in the choice of an input.
_OWN = 0.2
# What lines lose at a box's corner, at most about, for what they lose amid it.
_CORNER = 4


class InputTree(Tree):
    """Domains of one region, split along their inputs.

    Args:
        domains: `Domains`.
        unsafe, attacker, clock: of `Tree`; the attacker is shown the corners of bounds.
    """

    def __init__(self, domains, unsafe, attacker, clock):
        super().__init__(unsafe, attacker, clock)
        self.domains, self.pool = domains, Pool()
        self.climber, self.spent = Climber(attacker), 0.0
        # Boxes that are proved, `(low, high)` of one batch after the other, for a proof file; None
        # where they are too many for one.
        self._proved, self._count = [], 0
        # Boxes of units that an affine map of the input gives exactly need not be kept.
        exact = domains.affine if domains.is_box else [False] * len(domains.affine)
        self.kept = [k for k in domains.kept if not exact[k]]

    @property
    def leaves(self):
        """`ProvedBoxes`, or None if they are too many."""
        if self._proved is None:
            return None
        return ProvedBoxes(*(np.concatenate(ends) for ends in zip(*self._proved, strict=True)))

    @property
    def bound(self):
        return min([self.closed, self.pool.least, *self.stuck])

    @property
    def open(self):
        return len(self.pool) + len(self.stuck)

    def run(self, root_bound=-np.inf, report=lambda count: None):
        """Splits until nothing is open, a counterexample is found, or time is up.

        Args:
            root_bound: of the whole region, known already.
            report: called with the number of domains after every batch.
        """
        batch, size, rounds = self._whole(root_bound), _FIRST, 0
        parts = batch
        while parts is not None:
            begin = time.monotonic()
            try:
                bounded = self._bounded(parts)
            except OutOfTime:
                self.pool.push(batch)
                return
            rounds += 1
            report(len(parts))
            self.counterexample = self._shown(bounded, rounds)
            if self.counterexample is not None or self.clock.is_up():
                return
            spent = max(time.monotonic() - begin, 1e-4)
            limit = min(_SECONDS, 0.05 * self.clock.timeout)
            size = int(np.clip(size * np.clip(limit / spent, 0.5, 2.0), 1, _MOST))
            batch = self._pop(size)
            parts = None if batch is None else batch.halves()

    def _whole(self, bound):
        """The region as the one part."""
        region, attacker = self.domains.region, self.attacker
        # Within the region's reach, rounded outwards.
        low = rounding.down(attacker.low.reshape(1, -1))
        high = rounding.up(attacker.high.reshape(1, -1))
        low = np.maximum(low, region.low.reshape(1, -1))
        high = np.minimum(high, region.high.reshape(1, -1))
        mask = np.ones((1, len(self.unsafe.starts)), bool)
        return Parts(np.array([bound]), low, high, mask, np.zeros(1, int), {})

    def _pop(self, count):
        numbers = sum(2 * len(self.domains.whole[k][0]) for k in self.kept)
        if len(self.pool) * (numbers + 1) < _ROOM:
            return self.pool.pop(count)
        # No room for more: those that are nearly proved first.
        return self.pool.pop(count, worst=False)

    def _bounded(self, parts):
        """Bounds parts, puts what is open into the pool, and gives what the attacker is shown."""
        step = self.domains.chunk(len(self.unsafe.rows))
        chunks = [parts.rows(slice(start, start + step)) for start in range(0, len(parts), step)]
        threads = 1 if len(parts) < _THREADED else None
        found = list(each_in_threads(self._part, chunks, threads))
        self.branches += len(parts)
        for part in found:
            self.closed = min(self.closed, part.closed)
            self._keep(*part.proved)
        found = [part for part in found if part.open is not None]
        for part in found:
            self.stuck += part.stuck
        if found:
            self.pool.push(Parts.joined([part.open for part in found]))
        return [part.shown for part in found]

    def _part(self, parts):
        """`_Found` of some parts, whose boxes are in float64."""
        low, high, unsafe, mask = parts.low, parts.high, self.unsafe, parts.mask
        boxes = dict.fromkeys(self.domains.kept) | parts.boxes
        wanted = mask[:, unsafe.set_of]
        bounded = self.domains.bound(low, high, boxes, unsafe.rows, wanted, self.clock.check)
        excess = rounding.down(bounded.lower - unsafe.bounds)
        holds = unsafe.holds(excess) & mask
        values = np.maximum(unsafe.of_rows(excess), parts.bound[:, None])
        # A set that is left behind counts with the bound that it was left with.
        closed = float(np.where(holds, values, np.inf).min(initial=np.inf))
        mask = mask & ~holds
        is_open = mask.any(axis=1)
        proved = low[~is_open], high[~is_open]
        own = np.flatnonzero(is_open)
        if not len(own):
            return _Found(None, proved, closed)
        low, high, mask = low[own], high[own], mask[own]
        bounds = np.where(mask, values[own], np.inf)
        target = bounds.argmin(axis=1)
        bound = bounds[np.arange(len(own)), target]
        centers, at_centers, seen = self._seen(low, high, low / 2 + high / 2)
        rows = self._deciding(bounded, own, excess[own], seen, target, high - low)
        slopes = np.where((rows >= 0)[:, None], bounded.slopes[rows], 0.0)
        corners = np.where(slopes > 0, low, high)
        at = self._chosen(bounded, own, rows, slopes, low, high)
        ends, at_ends, seen_there = self._seen(low, high, corners)
        points, outputs = np.concatenate([ends, centers]), np.concatenate([at_ends, at_centers])
        # What rounding takes off is about the same on every part: one that holds a point whose
        # margin is below that would never be proved.
        margins = np.minimum(*(unsafe.of_rows(e).min(axis=1) for e in (seen, seen_there)))
        a, b = (v[np.arange(len(own)), at] for v in (low, high))
        middle = a / 2 + b / 2
        divides = (a < middle) & (middle < b) & (margins > bounded.lost[rows])
        boxes = {k: narrowed(*(v[own] for v in boxes[k])) for k in self.kept}
        parts = Parts(bound, low, high, mask, at, boxes).rows(divides)
        stuck = [float(v) for v in bound[~divides]]
        return _Found(parts, proved, closed, stuck, (points, outputs, corners, bound))

    def _keep(self, low, high):
        if self._proved is None or not len(low):
            return
        self._proved.append((low, high))
        self._count += 2 * low.size
        if self._count > _LEAVES:
            self._proved = None

    def _seen(self, low, high, points):
        """A point of every domain, within the region; the outputs and A y - b there.

        Points that the region's ball moved out of their domain say nothing: A y - b is ∞.
        """
        moved = self.attacker.projected(points.reshape(-1, *self.attacker.low.shape))
        flat = moved.reshape(points.shape)
        inside = np.all((low <= flat) & (flat <= high), axis=1)
        outputs = Evaluation(self.domains.flow, moved).outputs
        excess = outputs @ self.unsafe.rows.T - self.unsafe.bounds
        return moved, outputs, np.where(inside[:, None], excess, np.inf)

    def _deciding(self, bounded, own, excess, seen, target, width):
        """Position of the row that is to prove each domain's worst set.

        The nearest to its proof of those that can be proved: one that fails at the centre, which
        both halves hold, would hold on neither; and one that lacks more than relaxations lose
        fails at its corner, however the domain is cut.
        """
        starts, ends = self.unsafe.starts, self.unsafe.starts + self.unsafe.lengths
        index = np.arange(excess.shape[1])
        choice = (index >= starts[target][:, None]) & (index < ends[target][:, None])
        if self.unsafe.lengths.max() > 1:
            lost = [self.domains.losses(bounded, own, r) for r in bounded.place[own].T]
            gains = np.stack([(v * width).sum(axis=1) for v in lost], axis=1)
            could = excess + _CORNER * gains > 0
            for able in (choice & (seen > 0), choice & (seen > 0) & could):
                choice = np.where(able.any(axis=1, keepdims=True), able, choice)
        return bounded.place[own, np.where(choice, excess, -np.inf).argmax(axis=1)]

    def _chosen(self, bounded, own, rows, slopes, low, high):
        """The input along which to split each domain: whose width costs its bound most.

        What relaxations lose shrinks with the width; what the row itself moves along an input is
        part of the function, but decides which half is the worse one.
        """
        width = high - low
        score = (self.domains.losses(bounded, own, rows) + _OWN * np.abs(slopes)) * width
        # Where nothing is lost, the widest for its share of the region.
        whole = np.maximum((self.attacker.high - self.attacker.low).reshape(-1), 1e-300)
        largest = score.max(axis=1, keepdims=True)
        score += np.where(largest > 0, 1e-3 * largest, 1.0) * width / whole
        return np.argmax(score, axis=1)

    def _shown(self, found, rounds):
        """Shows corners and centres to the attacker, descends from the worst now and then, and
        climbs on for a share of the time."""
        if not found:
            return None
        attacker, shape, begin = self.attacker, self.attacker.low.shape, time.monotonic()
        points, outputs, corners, bound = map(np.concatenate, zip(*found, strict=True))
        worst = corners[np.argsort(bound, kind="stable")[:16]].reshape(-1, *shape)
        found = attacker.shown(points, outputs)
        if found is None and rounds > 1 and rounds & (rounds - 1) == 0:
            found = attacker.search(worst, starts=8, steps=20, stop=self.clock.is_up)
        self.spent += time.monotonic() - begin
        while found is None and self.spent < _ATTACKED * self.clock.passed():
            begin = time.monotonic()
            found = self.climber.step(worst)
            self.spent += time.monotonic() - begin
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class ProvedBoxes(collections.abc.Sequence):
    """Flat boxes of the input on which a property is proved: `(low, high)` each, in any order.

    Attributes:
        low, high: float64 (boxes, inputs).
    """

    low: np.ndarray
    high: np.ndarray

    def __len__(self):
        return len(self.low)

    def __getitem__(self, index):
        return self.low[index], self.high[index]


@dataclasses.dataclass(eq=False)
class _Found:
    """What was found of some parts.

    Attributes:
        open: `Parts` that may be split, or None if nothing is open.
        proved: `(low, high)` of those that are proved.
        closed: the least bound with which a set was left behind.
        stuck: bounds of parts that cannot be split.
        shown: of open parts, points and the outputs there, corners where the bounds are attained,
            and these.
    """

    open: Parts | None
    proved: tuple
    closed: float
    stuck: list = ()
    shown: tuple = ()
