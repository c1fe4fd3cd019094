"""(3) Localized robustness: what the distances within a data set allow a classifier to be.

A one-hot classifier that is right on two samples of different classes moves its output by √2 (l2)
or 1 (l∞) between them. If it is α-Lipschitz, or α-robust for r > ‖x - x'‖, then

    ‖x - x'‖ ≥ D/α,   D = √2 or 1,                                                         (3.1)

so every closer pair of opposite classes is incompatible with it (Figures 1 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Distance of two different one-hot vectors, by norm.
ONE_HOT_DISTANCE = {2: math.sqrt(2.0), math.inf: 1.0}
_UNIT = 2.0**-53
_BLOCK = 2048
# Coordinates compared at first, then doubled: most pairs of images are told apart by a few.
_FIRST_COORDINATES = 32


@dataclass(frozen=True)
class PairStatistics:
    """Distances between samples of opposite classes, counted exactly.

    Attributes:
        norm: 2 or `math.inf`.
        thresholds: float64 (k,), ascending, in units of x.
        closer: int64 (k,), opposite-class pairs with ‖x - x'‖ < threshold.
        opposite_pairs: int, unordered pairs of samples of different classes.
        pairs: int, unordered pairs of samples, n(n-1)/2.
        nearest: float64 (n,), distance to the nearest sample of another class. No classifier that
            is right on that sample has a certified radius above it.
        nearest_index: int64 (n,), that sample's number.
        duplicates: int, opposite-class pairs at distance 0; no classifier is right on both.
    """

    norm: float
    thresholds: np.ndarray
    closer: np.ndarray
    opposite_pairs: int
    pairs: int
    nearest: np.ndarray
    nearest_index: np.ndarray
    duplicates: int

    def incompatible_share(self, slopes, within=math.inf, *, of="opposite"):
        """Share of pairs that no one-hot classifier with these slopes can fit.

        Args:
            slopes: α > 0, number or array; each D/α must be one of `thresholds`.
            within: d, a threshold: only pairs closer than d count (Figure 3); infinite: Figure 1.
            of: `"opposite"` divides by the pairs of opposite classes, `"all"` by all pairs.

        Returns:
            float64 array of the slopes' shape.

        Raises:
            ValueError: if a distance was not counted.
        """
        slopes = np.asarray(slopes, dtype=np.float64)
        if np.any(~(slopes > 0)):
            raise ValueError(f"Slopes must be positive. Received: {slopes!r}.")
        if of not in ("opposite", "all"):
            raise ValueError(f"`of` must be 'opposite' or 'all'. Received: of={of!r}.")
        reach = np.minimum(ONE_HOT_DISTANCE[self.norm] / slopes, within)
        index = np.minimum(np.searchsorted(self.thresholds, reach), len(self.thresholds) - 1)
        if not np.array_equal(self.thresholds[index], reach):
            missing = reach[self.thresholds[index] != reach]
            raise ValueError(
                f"These distances were not counted. Received: {missing}. Pass them as `thresholds` "
                "(`compatibility_thresholds` lists them)."
            )
        return self.closer[index] / (self.opposite_pairs if of == "opposite" else self.pairs)


def compatibility_thresholds(slopes, distances=(), *, norm=2):
    """Distances D/α and d at which `incompatible_share` will be asked, ascending.

    Example:

    >>> compatibility_thresholds([2.0, 4.0], [0.3], norm=np.inf).tolist()
    [0.25, 0.3, 0.5]
    """
    reach = ONE_HOT_DISTANCE[_checked_norm(norm)] / np.asarray(slopes, dtype=np.float64)
    return np.unique(np.concatenate([reach.ravel(), np.asarray(distances, np.float64).ravel()]))


def pair_statistics(x, y, thresholds, *, norm=2, progress: Callable | None = None):
    """Numbers of opposite-class pairs closer than each threshold, over all pairs of a data set.

    Every comparison decides as the float64 distance max|x - x'| or √Σ(x - x')² does. l2 distances
    are first found from block products ‖x‖² + ‖x'‖² - 2xᵀx'; wherever its proven rounding error
    leaves a comparison open, the pair is computed again from its differences. l∞ distances compare
    the coordinates of largest variance first and drop a pair as soon as it exceeds every threshold
    and both samples' nearest neighbours.

    Time grows as n²·features (l2: 2 flops per pair and feature), memory as n·features.

    Args:
        x: samples (n, …), finite; features in common units.
        y: class numbers (n,), at least two classes.
        thresholds: positive distances.
        norm: 2 or `math.inf`.
        progress: called with the share done, in [0, 1].

    Returns:
        `PairStatistics`.

    Raises:
        ValueError: for NaN, one class, mismatched sizes, or thresholds that are not positive.

    Example:

    >>> found = pair_statistics([[0.0], [1.0], [3.0]], [0, 1, 1], [1.0, 2.0, 4.0])
    >>> found.closer.tolist(), found.nearest.tolist(), found.opposite_pairs
    ([0, 1, 2], [1.0, 1.0, 3.0], 2)

    Reference: Bontonou et al., Figures 1 and 3, as published; exact.
    """
    norm = _checked_norm(norm)
    x, y = _checked_data(x, y)
    limits = np.unique(np.asarray(thresholds, dtype=np.float64).ravel())
    if not len(limits) or not np.all(np.isfinite(limits)) or limits[0] <= 0:
        raise ValueError(
            f"`thresholds` must be positive, finite distances. Received: {thresholds!r}."
        )
    order = np.argsort(y, kind="stable")
    search = (_Euclidean if norm == 2 else _Chebyshev)(x[order], y[order], limits)
    starts = range(0, len(x), _BLOCK)
    total, done = len(starts) * (len(starts) + 1) // 2, 0
    for i in starts:
        for j in range(i, len(x), _BLOCK):
            search.block(i, j)
            done += 1
            if progress is not None:
                progress(done / total)
    nearest, index = np.empty(len(x)), np.empty(len(x), np.int64)
    nearest[order], index[order] = search.nearest, order[search.index]
    counts = np.bincount(y)
    pairs = len(x) * (len(x) - 1) // 2
    same = int(np.sum(counts.astype(object) * (counts.astype(object) - 1)) // 2)
    # A pair below threshold k is below all later ones.
    closer = np.cumsum(search.counts[:-1])
    return PairStatistics(
        norm, limits, closer, pairs - same, pairs, nearest, index, search.duplicates
    )


class _Search:
    """Counts and nearest neighbours, block by block, of samples sorted by class."""

    def __init__(self, x, y, limits):
        self.x, self.y, self.limits = x, y, limits
        self.counts = np.zeros(len(limits) + 1, np.int64)
        self.nearest = np.full(len(x), np.inf)
        self.index = np.zeros(len(x), np.int64)
        self.duplicates = 0

    def block(self, i, j):
        rows = slice(i, min(i + _BLOCK, len(self.x)))
        columns = slice(j, min(j + _BLOCK, len(self.x)))
        if self.y[rows][0] == self.y[columns][-1]:
            return  # one class only
        excluded = None
        if self.y[rows][-1] >= self.y[columns][0]:  # by the order, all before are of one class
            excluded = self.y[rows][:, None] >= self.y[columns][None, :]
        self._compare(rows, columns, excluded)

    def _distances(self, rows, columns):
        """Distances of single pairs from their differences, float64."""
        found = np.empty(len(rows))
        step = max(2**22 // self.x.shape[1], 1)
        for k in range(0, len(rows), step):
            part = slice(k, k + step)
            difference = self.x[rows[part]] - self.x[columns[part]]
            found[part] = self._norms(difference)
        return found

    def _count(self, distances):
        # Position k: the first threshold above the distance, so that the pair is closer than it.
        where = np.searchsorted(self.limits, distances, side="right")
        self.counts += np.bincount(where, minlength=len(self.counts))
        self.duplicates += int(np.count_nonzero(distances == 0))

    def _settle(self, index, distances, others):
        better = distances < self.nearest[index]
        # Several candidates of one sample: the smallest is written last.
        rank = np.argsort(-distances[better], kind="stable")
        kept = np.flatnonzero(better)[rank]
        self.nearest[index[kept]] = distances[kept]
        self.index[index[kept]] = others[kept]


class _Euclidean(_Search):
    def __init__(self, x, y, limits):
        super().__init__(x, y, limits)
        self.centered = x - x.mean(axis=0)  # smaller numbers, smaller rounding errors
        self.squares = np.einsum("ij,ij->i", self.centered, self.centered)
        # Of centring, the products, the squares and their sum, per (‖x‖ + ‖x'‖)².
        self.error = 2 * (x.shape[1] + 16) * _UNIT * 4 * self.squares.max()

    @staticmethod
    def _norms(difference):
        return np.sqrt(np.einsum("ij,ij->i", difference, difference))

    def _compare(self, rows, columns, excluded):
        squared = self.centered[rows] @ (-2.0 * self.centered[columns]).T
        squared += self.squares[rows][:, None]
        squared += self.squares[columns][None, :]
        if excluded is not None:
            squared[excluded] = np.inf
        self._neighbours(squared, rows, columns)
        # Distance 0 is one more threshold, which only exact distances pass.
        limits = np.concatenate([[0.0], self.limits**2])
        slack = self.error + 8 * _UNIT * limits
        places = np.flatnonzero(squared < limits[-1] + slack[-1])
        values = squared.ravel()[places]
        below = np.searchsorted(limits - slack, values, side="right")
        is_open = below != np.searchsorted(limits + slack, values, side="right")
        self.counts += np.bincount(below[~is_open] - 1, minlength=len(self.counts))
        i, j = np.divmod(places[is_open], squared.shape[1])
        self._count(self._distances(i + rows.start, j + columns.start))

    def _neighbours(self, squared, rows, columns):
        for axis, mine, theirs in ((1, rows, columns), (0, columns, rows)):
            best, known = squared.min(axis=axis), self.nearest[mine] ** 2
            index = np.flatnonzero(best <= known + self.error)
            lines = squared[index] if axis == 1 else squared[:, index].T
            reach = np.minimum(best[index] + 2 * self.error, known[index] + self.error)
            which, others = np.nonzero((lines <= reach[:, None]) & np.isfinite(lines))
            own, other = index[which] + mine.start, others + theirs.start
            self._settle(own, self._distances(own, other), other)


class _Chebyshev(_Search):
    def __init__(self, x, y, limits):
        spread = np.argsort(-x.var(axis=0), kind="stable")
        super().__init__(np.ascontiguousarray(x[:, spread]), y, limits)

    @staticmethod
    def _norms(difference):
        return np.abs(difference).max(axis=1)

    def _compare(self, rows, columns, excluded):
        from scipy.spatial.distance import cdist

        features = self.x.shape[1]
        ends = [min(_FIRST_COORDINATES, features)]
        while ends[-1] < features:
            ends.append(min(2 * ends[-1], features))
        reach = np.maximum(self.nearest[rows][:, None], self.nearest[columns][None, :])
        reach = np.maximum(reach, self.limits[-1])
        block = cdist(self.x[rows, : ends[0]], self.x[columns, : ends[0]], "chebyshev")
        if excluded is not None:
            block[excluded] = np.inf
        start = ends.pop(0)
        # While most pairs live on, whole blocks are cheaper than gathered pairs.
        while ends and np.count_nonzero(block <= reach) > block.size // 8:
            part = slice(start, ends[0])
            own = cdist(self.x[rows, part], self.x[columns, part], "chebyshev")
            np.maximum(block, own, out=block)
            start = ends.pop(0)
        i, j = np.nonzero((block <= reach) & np.isfinite(block))
        found, bound = block[i, j], reach[i, j]
        i, j = i + rows.start, j + columns.start
        for end in ends:
            own = self._parts(i, j, slice(start, end))
            found = np.maximum(found, own)
            alive = found <= bound
            i, j, found, bound, start = i[alive], j[alive], found[alive], bound[alive], end
        self._count(found)
        self._settle(i, found, j)
        self._settle(j, found, i)

    def _parts(self, i, j, part):
        found, step = np.empty(len(i)), max(2**22 // (part.stop - part.start), 1)
        for k in range(0, len(i), step):
            here = slice(k, k + step)
            found[here] = self._norms(self.x[i[here], part] - self.x[j[here], part])
        return found


def _checked_norm(norm):
    if norm not in (2, math.inf):
        raise ValueError(f"`norm` must be 2 or math.inf. Received: norm={norm!r}.")
    return norm


def _checked_data(x, y):
    x = np.asarray(x, dtype=np.float64)
    y = np.asarray(y)
    if x.ndim < 1 or y.shape != (len(x),) or x.size == 0:
        raise ValueError(
            f"`x` must hold one sample per label. Received: shapes {x.shape} and {y.shape}."
        )
    if y.dtype.kind not in "iub":
        raise ValueError(f"`y` must hold class numbers. Received: dtype {y.dtype}.")
    if not np.all(np.isfinite(x)):
        raise ValueError("`x` must be finite. Received: NaN or infinity.")
    classes, numbers = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"Opposite classes need at least two. Received: only class {classes[0]!r}."
        )
    return x.reshape(len(x), -1), numbers
