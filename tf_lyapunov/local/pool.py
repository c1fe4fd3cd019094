"""Open parts of a region as rows of arrays, which come and go in batches, the worst first."""

import dataclasses

import numpy as np

_LEAST = 1024


@dataclasses.dataclass(eq=False)
class Parts:
    """Parts of a region, one per row.

    Attributes:
        bound: float64 (n,), proved lower bound of the margin.
        low, high: float64 (n, inputs), boxes of the input.
        mask: bool (n, sets), the unsafe sets that are open.
        at: int (n,), the input along which to split.
        boxes: dict from positions to `(low, high)`, float32 (n, units), rounded outwards.
    """

    bound: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray
    at: np.ndarray
    boxes: dict

    def __len__(self):
        return len(self.bound)

    def rows(self, index):
        """Some of them, in arrays of their own."""
        boxes = {k: (a[index], b[index]) for k, (a, b) in self.boxes.items()}
        return Parts(*(v[index] for v in self._plain()), boxes)

    def halves(self):
        """Both halves of every part along its input `at`, side by side, boxes in float64."""
        low, high, at = (np.repeat(v, 2, axis=0) for v in (self.low, self.high, self.at))
        rows = np.arange(len(at))
        middle = low[rows, at] / 2 + high[rows, at] / 2
        even = rows % 2 == 0
        high[rows[even], at[even]] = middle[even]
        low[rows[~even], at[~even]] = middle[~even]
        boxes = {
            k: tuple(np.repeat(v, 2, axis=0).astype(np.float64) for v in pair)
            for k, pair in self.boxes.items()
        }
        bound, mask = (np.repeat(v, 2, axis=0) for v in (self.bound, self.mask))
        return Parts(bound, low, high, mask, at, boxes)

    def _plain(self):
        return self.bound, self.low, self.high, self.mask, self.at

    @classmethod
    def joined(cls, several):
        """Rows of several, one after the other."""
        if len(several) == 1:
            return several[0]
        plain = (np.concatenate(v) for v in zip(*(s._plain() for s in several), strict=True))
        boxes = {
            k: tuple(np.concatenate([s.boxes[k][end] for s in several]) for end in (0, 1))
            for k in several[0].boxes
        }
        return cls(*plain, boxes)


class Pool:
    """A store of `Parts`: rows are written into places that others left, nothing else moves."""

    def __init__(self):
        self._held = None
        self._free = np.zeros(0, np.int64)

    def __len__(self):
        return 0 if self._held is None else len(self._held) - len(self._free)

    @property
    def least(self):
        """The smallest bound, infinite where nothing is left."""
        return np.inf if self._held is None else float(self._held.bound.min(initial=np.inf))

    def push(self, parts):
        """Takes parts in."""
        if self._held is None:
            self._held = parts.rows(slice(0, 0))
        missing = len(parts) - len(self._free)
        if missing > 0:
            self._grow(max(missing, len(self._held) // 2, _LEAST))
        places, self._free = np.split(self._free, [len(parts)])
        held = self._held
        for mine, theirs in zip(held._plain(), parts._plain(), strict=True):
            mine[places] = theirs
        for k, pair in parts.boxes.items():
            for mine, theirs in zip(held.boxes[k], pair, strict=True):
                mine[places] = theirs

    def pop(self, count, worst=True):
        """Gives up to `count` parts away, those with the smallest bounds, or with the largest."""
        if not len(self):
            return None
        bound = self._held.bound
        # Places that are free hold infinity.
        used = np.flatnonzero(bound < np.inf)
        if count < len(used):
            order = bound[used] if worst else -bound[used]
            used = used[np.argpartition(order, count - 1)[:count]]
        found = self._held.rows(used)
        bound[used] = np.inf
        self._free = np.concatenate([self._free, used])
        return found

    def _grow(self, count):
        old, held = len(self._held), self._held

        def longer(values):
            found = np.zeros((old + count, *values.shape[1:]), values.dtype)
            found[:old] = values
            return found

        boxes = {k: tuple(longer(v) for v in pair) for k, pair in held.boxes.items()}
        self._held = Parts(*(longer(v) for v in held._plain()), boxes)
        self._held.bound[old:] = np.inf
        self._free = np.concatenate([self._free, np.arange(old, old + count)])
