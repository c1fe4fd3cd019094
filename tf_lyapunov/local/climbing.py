"""Random steps around the best points found so far, for regions in which few inputs move.

Where a property is broken by a narrow margin, on a small part of the region, gradients of the row
that decides lead to and fro across the corners of piecewise linear functions. Steps at random, some
inputs at a time, find their way along them: those that help grow, others shrink, point by point.
"""

import numpy as np

from tf_lyapunov.local.evaluating import Evaluation

# Points to begin from, of which the best are kept; tries around each of those, and rounds of them.
_BEGIN, _KEPT, _TRIES, _ROUNDS = 1024, 64, 32, 30
# Numbers of one position of the flow at most, so that large networks get fewer points.
_ROOM = 2**21
# Sizes of steps relative to the region: first, least and most; how they grow and shrink.
_SIZE, _SIZES = 0.1, (1e-6, 0.3)
_GROWTH, _SHRINKAGE = 1.3, 0.6
# How many inputs a step changes, about.
_SHARE = 0.6


class Climber:
    """Searches a region from many points at once, round by round, without an end.

    Args:
        attacker: `Attacker`, which is shown every point.
    """

    def __init__(self, attacker):
        self.attacker, self.rng = attacker, attacker.rng
        self.width = attacker.high - attacker.low
        self.points, self.round = None, 0
        self.room = 1.0

    def step(self, points):
        """One more round, anew after some: a `Counterexample`, or None.

        Args:
            points: float64 (n, *shape), to begin from as well, where a new search begins.
        """
        if self.points is None or self.round >= _ROUNDS:
            return self._begin(points)
        self.round += 1
        count, tries = len(self.points), self._many(_TRIES)
        shape = (count, tries, *self.width.shape)
        size = self.size.reshape(count, *[1] * (len(shape) - 1))
        moves = self.rng.normal(size=shape) * size * self.width
        moves *= self.rng.random(shape) < _SHARE
        found = (self.points[:, None] + moves).reshape(-1, *self.width.shape)
        found = self.attacker.projected(found)
        values, counterexample = self._values(found)
        values = values[np.arange(len(found)), np.repeat(self.targets, tries)].reshape(count, tries)
        best = values.argmin(axis=1)
        value, index = values[np.arange(count), best], np.arange(count) * tries + best
        better = value < self.values
        self.points[better] = found[index[better]]
        self.values = np.where(better, value, self.values)
        self.size = np.clip(self.size * np.where(better, _GROWTH, _SHRINKAGE), *_SIZES)
        return counterexample

    def _begin(self, points):
        attacker, shape = self.attacker, self.width.shape
        # A probe of one point says how wide the network is.
        widest = max(v.size for v in Evaluation(attacker.flow, attacker.low[None]).values)
        self.room = min(1.0, _ROOM / (widest * _KEPT * _TRIES))
        drawn = self.rng.uniform(attacker.low, attacker.high, (self._many(_BEGIN), *shape))
        points = attacker.projected(np.concatenate([drawn, points]))
        values, counterexample = self._values(points)
        near = np.argsort(values.min(axis=0), kind="stable")[: _KEPT // 4]
        each = max(_KEPT // len(near), 1)
        order = np.argsort(values[:, near], axis=0, kind="stable")[:each]
        self.targets = np.tile(near, len(order))
        self.points = points[order.reshape(-1)].copy()
        self.values = values[order.reshape(-1), self.targets]
        self.size = np.full(len(self.points), _SIZE)
        self.round = 0
        return counterexample

    def _many(self, count):
        return max(int(count * self.room), 2)

    def _values(self, points):
        """Largest entry of every set's rows, (n, sets), and what the attacker makes of them."""
        outputs = Evaluation(self.attacker.flow, points).outputs
        return self.attacker.sets(outputs), self.attacker.shown(points, outputs)
