"""Lower bounds of functionals of maxima over windows by functionals of the cells.

For y_j = max_i z_i over the cells of window j, with l ≤ z ≤ u and ‖z - z⁰‖₂ ≤ ρ over all of them,
any coefficients c, any shares s and any λ ≥ 0,

    c_j ≥ 0:  c_j y_j ≥ c_j αᵀz  for any α ≥ 0 of sum 1, here s⁺/Σs⁺,
    c_j < 0:  c_j y_j ≥ c_j sᵀz + Σ_k A_k + min_i (B_i - A_i) - (λ/2) Σ_k w_k(z_k - z⁰_k)²,      (M)
              A_k = min over l_k ≤ t ≤ u_k of |c_j|s_k t + (λ/2)w_k(t - z⁰_k)²,
              B_i = min over max{l_i, f} ≤ t ≤ u_i of |c_j|(s_i - 1)t + (λ/2)w_i(t - z⁰_i)²,

f the largest l of the window: where cell i is the largest, z_i ≥ f, and -|c_j|z_i + |c_j|sᵀz plus
the window's part of the quadratic is a sum of functions of single cells with these minima. A cell
in n windows has w = 1/n, so that all windows' quadratics are λρ²/2 together at most. Cells whose u
lies below f are never the largest: they take no part, and a window of one cell left is that cell.

Rounding is that of `relaxation`.
"""

import functools
import math

import numpy as np

from tf_lyapunov.verification.arithmetic import UNIT
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.relaxation import usable
from tf_lyapunov.verification.operations import MaxPooling, windows

_ENDLESS = 1e300
_BLOCK = 2**20


class Maximum:
    """(M) of a max pooling over windows, or over all positions.

    Args:
        operation: `MaxPooling` or `GlobalPooling`.
        center, low, high: float64 (*shape).

    Attributes:
        bent: bool (windows·cells,), the cells of windows in which several take part.
        units: bool (m,), which units these are.
    """

    def __init__(self, operation, center, low, high):
        self.operation, self.shape, self.radius = operation, center.shape, np.inf
        self.center = center
        center, low, high = (v.reshape(-1) for v in (center, low, high))
        self.cells, self.out = _cells(operation, self.shape)
        there = self.cells >= 0
        bottom = np.where(there, low[self.cells], -np.inf)
        top = np.where(there, high[self.cells], -np.inf)
        self.floor, self.ceiling = bottom.max(axis=1), top.max(axis=1)
        rows = np.arange(len(self.cells))
        active = there & (top > self.floor[:, None])
        # The cell of the largest l stays, even if its box is that number alone.
        active[rows, np.argmax(bottom, axis=1)] = True
        self.single = active.sum(axis=1) == 1
        self.alone = self.cells[rows, np.argmax(active, axis=1)]
        self.many = np.flatnonzero(~self.single)
        bent = active & ~self.single[:, None]
        self.bent = bent.reshape(-1)
        counts = np.bincount(self.cells[bent], minlength=len(low))
        self.units = counts > 0
        self.active, self.inner = active[self.many], self.cells[self.many]
        weights = 1 / np.maximum(counts, 1) * (1 - 4 * UNIT)
        reach = np.maximum(np.abs(low), np.abs(high))

        def of(array):
            return np.where(self.active, array[self.inner], 0.0)

        self.weights, self.z, self.low, self.high = map(of, (weights, center, low, high))
        raised = np.maximum(self.low, self.floor[self.many, None])
        self.raised = np.where(self.active, raised, 0.0)
        self.reach = reach
        self.largest = np.where(there, reach[self.cells], 0.0).max(axis=1)
        away = np.maximum(np.abs(self.high - self.z), np.abs(self.low - self.z))
        self.far = float(np.sum(self.weights * away * away))

    def within(self, low, high):
        """The same on a part of the box, float64 (m,) each."""
        found = Maximum(self.operation, *(v.reshape(self.shape) for v in (self.center, low, high)))
        # The ball is of the units that took part before.
        if not np.any(found.units & ~self.units):
            found.radius = self.radius
        return found

    def range(self):
        """Bounds of the maxima, (*out) each."""
        return self.floor.reshape(self.out), self.ceiling.reshape(self.out)

    @functools.cached_property
    def _starts(self):
        """Shares (many, cells) for c ≥ 0 and c < 0: the cell that is largest amid the box, and the
        line of the cell of the largest u above that u of the others."""
        rows = np.arange(len(self.many))
        middle = np.where(self.active, self.low + self.high, -np.inf)
        plus, minus = np.zeros(self.active.shape), np.zeros(self.active.shape)
        plus[rows, np.argmax(middle, axis=1)] = 1.0
        top = np.where(self.active, self.high, -np.inf)
        first = np.argmax(top, axis=1)
        most, least = self.high[rows, first], self.low[rows, first]
        top[rows, first] = -np.inf
        share = (most - top.max(axis=1)) / np.maximum(most - least, 1e-300)
        minus[rows, first] = np.clip(share, 0.0, 1.0)
        return plus, minus

    def back(self, c, multipliers, radius):
        """`(g, h, size)`, see `relaxation.Relaxation.back`."""
        flat = c.whole(self.out).rows.reshape(len(c.rows), -1)
        count = len(flat)
        g, h = np.zeros((count, len(self.reach))), np.zeros(count)
        np.add.at(g, (np.arange(count)[:, None], self.alone[self.single]), flat[:, self.single])
        size = 8 * (np.abs(flat) @ self.largest)
        if len(self.many):
            step = max(_BLOCK // self.active.size, 1)
            for start in range(0, count, step):
                k = slice(start, start + step)
                h[k], more = self._windows(flat[k], g[k], multipliers, k, radius)
                size[k] += more
        size = size + 8 * (np.abs(g) @ self.reach)
        return Functionals(g.reshape(count, *self.shape)), h, size

    def _windows(self, flat, g, multipliers, rows, radius):
        """`(h, size)` of windows of several cells; `g` is added to."""
        c = flat[:, self.many]
        share, lam = self._chosen(c, multipliers, rows)
        if not np.isfinite(radius):
            lam = np.zeros(len(c))
        above = np.maximum(share, 0.0)
        total = above.sum(axis=2, keepdims=True)
        alpha = np.where(total > 1e-6, above / np.maximum(total, 1e-6), self._starts[0])
        minus = np.maximum(-c, 0.0)[..., None]
        part = np.maximum(c, 0.0)[..., None] * alpha - minus * share
        for place in range(self.inner.shape[1]):
            # No two windows hold a cell in the same place.
            on = np.flatnonzero(self.active[:, place])
            g[:, self.inner[on, place]] += part[:, on, place]
        curve = lam[:, None, None] * self.weights
        on = curve > 0
        inverse = np.where(on, 1 / np.where(on, curve, 1.0), _ENDLESS)
        # Without λ the minimum is at an end, however small the tilt: twice is far enough for all.
        beyond = np.where(on, 1.0, _ENDLESS)

        def least(tilt, low):
            with np.errstate(over="ignore"):
                away = tilt * inverse * beyond
            t = np.clip(self.z - away, low, self.high)
            return tilt * t + (curve / 2) * (t - self.z) ** 2

        each = least(minus * share, self.low)
        gap = least(minus * (share - 1), self.raised) - each
        gap = np.where(self.active, gap, np.inf).min(axis=2)
        h = np.where(self.active, each, 0.0).sum(axis=(1, 2)) + gap.sum(axis=1)
        # Where c ≥ 0 the same holds of 0·y, of which only the quadratic is left.
        held = (2 + np.abs(share).sum(axis=2)) * self.largest[self.many]
        size = 8 * np.sum(np.abs(c) * held, axis=1)
        on = lam > 0
        h = np.where(on, h - lam * (min(radius, 1e150) ** 2 / 2), h)
        size = size + np.where(on, 8 * lam * (self.far + min(radius, 1e150) ** 2), 0.0)
        return h, size

    def _chosen(self, c, multipliers, rows):
        """Shares (rows, many, cells), 0 of cells that take no part, and λ (rows,)."""
        starts = self._starts
        share = np.where(c[..., None] > 0, *starts)
        if multipliers is None:
            return share, np.zeros(len(c))
        held = np.zeros((len(c), self.bent.size))
        known = np.zeros(self.bent.size, bool)
        known[multipliers.columns] = True
        held[:, multipliers.columns] = multipliers.shares[rows]
        width = self.cells.shape[1]
        held = held.reshape(len(c), -1, width)[:, self.many]
        known = known.reshape(-1, width)[self.many]
        share = np.where(self.active, np.where(known, held, share), 0.0)
        return share, usable(multipliers.lam[rows])


def cells_of(operation, shape):
    """Number of cells that multipliers of maxima are of: windows times cells of each."""
    if isinstance(operation, MaxPooling):
        return math.prod(shape) * math.prod(a.taps for a in operation.axes)
    return math.prod(shape) * operation.positions


def _cells(operation, shape):
    """`(flat input indices (outputs, cells), output shape)`, -1 beyond the edge."""
    index = np.arange(int(np.prod(shape))).reshape(1, *shape)
    if isinstance(operation, MaxPooling):
        found = np.stack([read[0] for _, read in windows(index, operation.axes, -1)])
        return found.reshape(len(found), -1).T, found.shape[1:]
    return index[0].reshape(-1, shape[-1]).T, shape[-1:]
