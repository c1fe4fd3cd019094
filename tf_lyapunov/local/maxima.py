"""Maxima over windows on the ball and the box of their input.

For y_j = max_k z_jk over the cells of window j, z within the box l ≤ z ≤ u and the ball
Σ w(z - z⁰)² ≤ ρ², any coefficients c, any shares s and any λ ≥ 0,

    cᵀy ≥ gᵀz + Σ_j h_j - λρ²/2,   and window by window

    c_j ≥ 0:  g_jk = c_j α_k,  h_j = 0,  for any α ≥ 0 with Σα = 1, here max(s, 0)/Σ max(s, 0);
    c_j < 0:  g_jk = c_j s_k,  h_j = Σ_k A_k + min_i (B_i - A_i),                              (M)
              A_k = min over the box of  |c_j| s_k t + (λ/2) w_k (t - z⁰_k)²,
              B_i = min over max{l_i, f} ≤ t ≤ u_i of  -|c_j|(1 - s_i) t + (λ/2) w_i (t - z⁰_i)²,

f the largest l of the window. Cells whose u lies below f are never the largest: s = 0 there, and
with one cell left y is that cell. A cell in several windows has w = 1/(their number).

Proof. y ≥ αᵀz for α of the simplex. For c_j < 0 the sum of c_j max_k z_k - Σ_k g_jk z_k and of the
window's part of (λ/2) Σ w(z - z⁰)² is, where cell i is the largest, a sum of functions of single
cells whose minima are A_k for k ≠ i and B_i for i, since z_i ≥ f then; the smallest over i is h_j.
The windows' parts of the ball's sum add up to λρ²/2 at most. λ = 0 and s_k = (u_k - v)⁺/(u_k - l_k)
for a level v ≥ f give y ≤ v + Σ_k s_k (z_k - l_k), the start: v is best amid the box.
"""

import functools
import math

import numpy as np

from tf_lyapunov.local.relaxation import Multipliers, reciprocals
from tf_lyapunov.program.families import pooling as geometry
from tf_lyapunov.program.families.pooling import Pooled

_TINY = 1e-30
_UNIT = 2.0**-53


class WindowMaximum:
    """(M) of a max pooling step around one point; has the methods of `relaxation.Elementwise`.

    Args:
        operation: `Pooled` of kind `"max"`.
        center: (1 or rows, *shape), z⁰ as computed.
        low, high: (1 or rows, *shape), the box of z.
        radius: ρ over the cells of `units`, with the rounding of z⁰; infinite if unknown.
        exists: bool (1 or rows, *shape), cells that count at all, or None for all.

    Attributes:
        units: int, flat cells of windows with more than one candidate.
        columns: int (windows·cells,), which entries of such windows the multipliers are of.
        out: shape of a sample of the maxima.
    """

    def __init__(self, operation, center, low, high, radius=np.inf, exists=None):
        self.operation, self.radius = operation, radius
        self.shape, self.dtype = center.shape[1:], center.dtype
        cells, self.out = windows_of(operation, self.shape)
        center, low, high = (v.reshape(len(v), -1) for v in (center, low, high))
        there = (cells >= 0)[None]
        if exists is not None:
            there = there & exists.reshape(len(exists), -1)[:, cells]
        bottom = np.where(there, low[:, cells], -np.inf)
        top = np.where(there, high[:, cells], -np.inf)
        floor = bottom.max(axis=2)
        self.floor, self.ceiling = floor, top.max(axis=2)
        active = there & (top > floor[..., None])
        # The cell of the largest l stays, even if its box is that number alone.
        best = np.argmax(bottom, axis=2)[..., None]
        np.put_along_axis(active, best, np.take_along_axis(there, best, axis=2), axis=2)
        # Rows of boxes of their own may leave different cells.
        ever = active.any(axis=0)
        self.single = ever.sum(axis=1) == 1
        place = np.argmax(ever, axis=1)
        self.alone = cells[np.arange(len(cells)), place]
        # Windows may share a cell, but not in the same place.
        self.places = [np.flatnonzero(self.single & (place == k)) for k in range(cells.shape[1])]
        self.many = np.flatnonzero(~self.single)
        self.cells = cells[self.many]
        # Of the norm of the means' absolute map, see `LocalGains`.
        self.growth = 2 * cells.shape[1]
        self.active = active[:, self.many]
        width = cells.shape[1]
        self.columns = (self.many[:, None] * width + np.arange(width)).ravel()
        shares = np.bincount(self.cells[self.active.any(axis=0)], minlength=low.shape[1])
        self.units = np.flatnonzero(shares)
        weight = (1 / np.maximum(shares, 1)) * (1 - 8 * _UNIT)
        self.weights = weight[self.cells].astype(self.dtype)
        zero = np.where(self.active, 0.0, np.nan)

        def kept(array):
            return np.where(np.isnan(zero), 0.0, array[:, self.cells]).astype(self.dtype)

        self.z, self.low, self.high = kept(center), kept(low), kept(high)
        lifted = np.where(np.isfinite(floor), floor, 0.0)[:, self.many, None]
        self.lifted = np.where(self.active, np.maximum(self.low, lifted), 0.0).astype(self.dtype)
        size = np.maximum(np.abs(low), np.abs(high)).max(axis=0)
        self.largest_z = size
        self.largest_value = np.where(cells >= 0, size[cells], 0.0).max(axis=1)
        reach = np.maximum(np.abs(self.high - self.z), np.abs(self.low - self.z)).max(axis=0)
        self.square = float(
            np.sum(self.weights * (reach**2 + _UNIT * np.abs(self.z).max(axis=0) ** 2))
        )

    def range(self):
        """Bounds on the maximum over the box, for the one box of all rows."""
        return self.floor[0].reshape(self.out), self.ceiling[0].reshape(self.out)

    def _starts(self):
        """Shares for c ≥ 0: the cell that is largest amid the box; for c < 0: of the best level."""
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        middle = np.where(self.active, (low + high) / 2, -np.inf)
        below = np.zeros(self.active.shape)
        first = np.argmax(middle, axis=2)[..., None]
        np.put_along_axis(below, first, 1.0, axis=2)
        width = np.maximum(high - low, _TINY)
        floor = np.where(self.active, low, -np.inf).max(axis=2)
        best = level = None
        for k in range(low.shape[2] + 1):
            v = floor if k == low.shape[2] else np.maximum(high[..., k], floor)
            if k < low.shape[2]:
                v = np.where(self.active[..., k], v, floor)
            share = np.clip((high - v[..., None]) / width, 0.0, 1.0)
            value = v + np.sum(np.where(self.active, share * (high - low) / 2, 0.0), axis=2)
            if best is None:
                best, level = value, v
            level = np.where(value < best, v, level)
            best = np.minimum(value, best)
        above = np.clip((high - level[..., None]) / width, 0.0, 1.0)
        return below, np.where(self.active, above, 0.0)

    @functools.cached_property
    def _first(self):
        return tuple(part.astype(self.dtype) for part in self._starts())

    def start(self, c):
        """`Multipliers` of (M)'s start with λ = 0."""
        units = c.reshape(len(c), -1)[:, self.many, None]
        share = np.where(units > 0, *self._first)
        return self._multipliers(share, c)

    def blank(self, c):
        """Shares that suit c ≥ 0, to be filled from others; `c` gives the number of rows alone."""
        return self._multipliers(np.broadcast_to(self._first[0], (len(c), *self.cells.shape)), c)

    def _multipliers(self, share, c):
        return Multipliers(
            np.array(share).reshape(len(c), -1), np.full(len(c), -np.inf, c.dtype), self.columns
        )

    def _simplex(self, share):
        """`(α, Σ max(s, 0))`, the first cell where nothing is positive."""
        above = np.maximum(share, 0)
        above *= self.active
        total = above.sum(axis=2)
        none = total <= 1e-6
        if np.any(none):
            above = np.where(none[..., None], self._first[0], above)
            total = np.where(none, 1.0, total)
        above /= total[..., None]
        return above, total

    def backward(self, c, multipliers, record=True):
        """`(g, h, memory)`, see `Elementwise.backward`."""
        rows, flat = len(c), c.reshape(len(c), -1)
        g = np.zeros((rows, math.prod(self.shape)), c.dtype)
        h = np.zeros(rows, c.dtype)
        lam = np.zeros(rows, c.dtype)
        if np.isfinite(self.radius):
            lam = np.exp(multipliers.log_lam)
            h = h - lam * (self.radius * self.radius / 2)
        self._add_alone(g, flat)
        if not len(self.many):
            return g.reshape(rows, *self.shape), h, None
        units = flat[:, self.many]
        share = multipliers.share.reshape(rows, *self.cells.shape)
        own = share * self.active
        alpha, total = self._simplex(share)
        minus = np.maximum(-units, 0)[..., None]
        self._add(g, self.cells, np.maximum(units, 0)[..., None] * alpha - minus * own)
        curve, inverse, far = reciprocals(lam[:, None, None] * self.weights)
        half = 0.5 * curve

        def nearest(slope, low):
            with np.errstate(over="ignore"):  # beyond every box is far enough
                away = slope * inverse
                if far is not None:
                    away *= far
            return np.clip(self.z - away, low, self.high)

        slope = minus * own
        point = nearest(slope, self.low)
        value = slope * point + half * (point - self.z) ** 2
        slope = slope - minus
        raised = nearest(slope, self.lifted)
        gap = slope * raised + half * (raised - self.z) ** 2 - value
        gap = np.where(self.active, gap, np.inf)
        which = np.argmin(gap, axis=2)[..., None]
        least = np.take_along_axis(gap, which, axis=2)[..., 0]
        # Windows of rows that hold no cell at all have no say: c is zero there.
        least = np.where(np.isfinite(least), least, 0.0)
        h = h + value.sum(axis=(1, 2)) + least.sum(axis=1)
        if not record:
            return g.reshape(rows, *self.shape), h, None
        top = np.take_along_axis(raised, which, axis=2)
        np.put_along_axis(point, which, top, axis=2)
        return g.reshape(rows, *self.shape), h, (units, point, top[..., 0], own, alpha, total, lam)

    def _add_alone(self, g, flat):
        for windows in self.places:
            if len(windows):
                g[:, self.alone[windows]] += flat[:, windows]

    def _add(self, g, cells, part):
        """Adds entries of windows to their cells: no two windows share a cell in the same place."""
        for k in range(cells.shape[1]):
            here = cells[:, k]
            ok = here >= 0
            if np.all(ok):
                g[:, here] += part[..., k]
            else:
                g[:, here[ok]] += part[:, ok, k]

    def spread(self):
        """s_j: y_j - y⁰_j is the mean of z - z⁰ over the candidates of window j up to s_j times the
        norm of z - z⁰ there, float64 (outputs,), for the one box of all rows.

        By the mean value theorem y_j - y⁰_j = ᾱᵀ(z - z⁰) with ᾱ on the simplex of the q candidates,
        and ‖ᾱ - 1/q‖ ≤ √(1 - 1/q), attained at its corners. So between any two points of the box.
        """
        found = np.zeros(len(self.single))
        found[self.many] = np.sqrt(1 - 1 / self.active[0].sum(axis=1)) * (1 + 8 * _UNIT)
        return found

    def spread_back(self, weights):
        """Per cell, the sum of weights of the windows that hold it as a candidate."""
        found = np.zeros((1, math.prod(self.shape)))
        self._add(found, self.cells, np.where(self.active, weights[self.many][:, None], 0.0))
        return found[0]

    def mean_back(self, flat):
        """Adjoint of the means over candidates, (rows, outputs) to (rows, cells)."""
        found = np.zeros((len(flat), math.prod(self.shape)), flat.dtype)
        self._add_alone(found, flat)
        share = self.active[0] / np.maximum(self.active[0].sum(axis=1, keepdims=True), 1)
        self._add(found, self.cells, flat[:, self.many, None] * share)
        return found

    def slack(self, c, g, multipliers):
        """What `backward` summed up, in size, per row."""
        flat, own = np.abs(c.reshape(len(c), -1)), np.abs(g.reshape(len(g), -1))
        found = 4 * (flat @ self.largest_value) + 4 * (own @ self.largest_z)
        if len(self.many):
            share = np.abs(multipliers.share.reshape(len(c), *self.cells.shape)) * self.active
            weight = (2 + share.sum(axis=2)) * self.largest_value[self.many]
            found = found + 8 * np.sum(flat[:, self.many] * weight, axis=1)
        if np.isfinite(self.radius):
            lam = np.exp(multipliers.log_lam)
            found = found + lam * 4 * (self.square + self.radius * self.radius)
        return found

    def forward(self, y, memory):
        """`(by_c, by_share, by_log_lam)`, see `Elementwise.forward`."""
        flat = y.reshape(len(y), -1)
        found = np.zeros((len(y), len(self.single)), y.dtype)
        found[:, self.single] = flat[:, self.alone[self.single]]
        if memory is None:
            shape = (len(y), *self.out)
            return found.reshape(shape), np.zeros((len(y), len(self.columns))), np.zeros(len(y))
        units, point, top, own, alpha, total, lam = memory
        if len(flat) < len(units):
            flat, found = (np.repeat(v, len(units), axis=0) for v in (flat, found))
        read = flat[:, self.cells]
        mean = np.sum(alpha * read, axis=2)
        positive = units > 0
        away = read - point
        found[:, self.many] = np.where(positive, mean, top + np.sum(own * away, axis=2))
        scale = np.where(positive, units / total, units)[..., None]
        by_share = scale * np.where(positive[..., None], read - mean[..., None], away) * self.active
        by_lam = np.zeros(len(units))
        if np.isfinite(self.radius):
            moved = point - self.z
            used = np.where(positive, 0.0, np.sum(self.weights * moved * moved, axis=2))
            by_lam = lam * (used.sum(axis=1) - self.radius * self.radius) / 2
        shape = (len(units), *self.out)
        return found.reshape(shape), by_share.reshape(len(units), -1), by_lam


def windows_of(operation, shape):
    """Cells of every window of a max pooling of samples of this shape.

    Returns:
        `(cells, output shape)`: flat input indices (outputs, cells), -1 beyond the edge.

    Example:

    >>> pool = Pooled("max", (2,), (2,), "same", False)
    >>> windows_of(pool, (3, 1))[0].tolist()
    [[0, 1], [2, -1]]
    """
    return _windows(operation, tuple(shape))


@functools.lru_cache(maxsize=64)
def _windows(operation, shape):
    first = operation.channels_first
    spatial, channels = (shape[1:], shape[0]) if first else (shape[:-1], shape[-1])
    rank = len(spatial)
    axes = [
        np.arange(n)[None]
        if operation.sizes is None
        else geometry._cells(n, operation.sizes[a], operation.strides[a], operation.padding)
        for a, n in enumerate(spatial)
    ]
    index, inside = 0, True
    for a, (cells, n) in enumerate(zip(axes, spatial, strict=True)):
        form = [1] * (2 * rank)
        form[a], form[rank + a] = cells.shape
        cells = cells.reshape(form)
        index = index * n + np.clip(cells, 0, n - 1)
        inside = inside & (cells >= 0) & (cells < n)
    counts = [len(cells) for cells in axes]
    index = np.where(inside, index, -1).reshape(math.prod(counts), -1)
    channel = np.arange(channels)
    if first:
        flat = index[None] + channel[:, None, None] * math.prod(spatial)
        flat = np.where(index[None] >= 0, flat, -1)
        out = (channels, *counts)
    else:
        flat = index[:, None] * channels + channel[:, None]
        flat = np.where(index[:, None] >= 0, flat, -1)
        out = (*counts, channels)
    if operation.sizes is None and not operation.keepdims:
        out = (channels,)
    return flat.reshape(-1, index.shape[1]), out


def is_window_maximum(operation):
    """Whether `WindowMaximum` applies."""
    return isinstance(operation, Pooled) and operation.kind == "max"
