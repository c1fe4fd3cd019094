"""Lower bounds of functionals of activations and maxima by functionals of what they read.

For z with l ≤ z ≤ u and ‖z - z⁰‖₂ ≤ ρ, any coefficients c, any g and any λ ≥ 0,

    cᵀφ(z) ≥ gᵀz + Σ_i min_{l_i ≤ t ≤ u_i} [c_i φ_i(t) - g_i t + (λ/2)(t - z⁰_i)²] - λρ²/2:    (L)

the first sum over i of cᵀφ(z) - gᵀz + (λ/2)‖z - z⁰‖² is at least that of the minima, and what was
added is at most λρ²/2. So g and λ come from a file and need no proof. With `pieces`, each minimum
is one over pieces of e t + cd - |c|e' + (λ/2)(t - z⁰)², e = cm - g, attained at
clip(z⁰ - e/λ, start, stop).

For y = max_i z_i over a window: y ≥ z_k for each cell; and with j the cell of the largest u, v the
largest u of the others, and any α ≥ 0,

    y ≤ αz_j + b,   b = max{(1 - α)u_j if α ≤ 1 else (1 - α)l_j,  v - αl_j},                    (M)

as y - αz_j is (1 - α)z_j where y = z_j, and at most v - αl_j elsewhere. Cells that lie below
another's lower bound are never the largest.

Rounding. The computed minimiser errs by 4u|t - z⁰| at most before it is clipped, so that the
quadratic lies above its minimum by less than 16u²λ(t - z⁰)²; all else is a sum of products, whose
sizes are returned: γ_n of them bounds the error, n the number of units and a few more.
"""

import dataclasses
import functools

import numpy as np

from tf_lyapunov.verification.arithmetic import down, up
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.pieces import pieces
from tf_lyapunov.verification.operations import MaxPooling, windows

# λ beyond these are 0: nothing overflows, and reciprocals are exact to a rounding.
_SMALLEST, _LARGEST = 1e-60, 1e60
_ENDLESS = 1e300
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class Multipliers:
    """What a file says of one step for rows of functionals; any values are valid.

    Attributes:
        columns: int (m,), flat units, each once.
        shares: float64 (rows, m), g = share·c of the units; α of (M).
        lam: float64 (rows,), λ.
    """

    columns: np.ndarray
    shares: np.ndarray
    lam: np.ndarray


class Relaxation:
    """(L) of one activation.

    Args:
        operation: `Activation`.
        center: float64 (*shape), z⁰ as computed.
        low, high: float64 (*shape), the box of z.
    """

    def __init__(self, operation, center, low, high):
        self.operation, self.shape = operation, center.shape
        self.center, self.low, self.high = (v.reshape(-1) for v in (center, low, high))
        p = pieces(operation, self.low, self.high, lambda a: a.reshape(-1))
        self.pieces = p
        self.bent = ~self.pieces.lines()
        self.radius = np.inf  # ρ of the units that are bent
        self.least, self.largest = p.range()
        self.reach = np.maximum(
            np.maximum(np.abs(self.low), np.abs(self.high)), np.abs(self.center)
        )
        self.heights = np.max(np.abs(p.slope) * self.reach + np.abs(p.shift) + p.error, axis=0)

    def range(self):
        """Bounds of φ(z), (*shape) each."""
        return self.least.reshape(self.shape), self.largest.reshape(self.shape)

    def steepest(self):
        """Bound on |φ(s) - φ(t)|/|s - t| over the box."""
        p = self.pieces
        return float(np.max(np.maximum(np.abs(p.low), np.abs(p.high)), initial=0.0))

    @functools.cached_property
    def starts(self):
        """Shares (m,) for c > 0 and for c < 0: of the lines that are best amid the box."""
        return self._start(1.0), self._start(-1.0)

    def _start(self, sign):
        p = self.pieces
        value = [p.slope * t + p.shift for t in (p.start, p.stop)]
        # Pieces that the interval does not meet repeat its lower end.
        end = np.where(p.stop == self.high, value[1], -np.inf).max(axis=0)
        chord = (end - value[0][0]) / np.maximum(self.high - self.low, 1e-300)
        middle = self.low / 2 + self.high / 2
        best, height = np.zeros_like(middle), np.full_like(middle, -np.inf)
        for slope in (chord, *p.slope):
            ends = [v - slope * t for v, t in zip(value, (p.start, p.stop), strict=True)]
            inner = np.minimum(*(sign * v for v in ends)).min(axis=0)
            found = inner + sign * slope * middle
            best = np.where(found > height, slope, best)
            height = np.maximum(height, found)
        return best

    def halved(self, cuts):
        """The same on a branch: with parts of the boxes of some units, whose shares stay free.

        Args:
            cuts: list of `(unit, point, is_above)`; a point beyond a box is taken to its end.
        """
        low, high = self.low.copy(), self.high.copy()
        for unit, point, is_above in cuts:
            point = min(max(point, low[unit]), high[unit])
            (low if is_above else high)[unit] = point
        found = Relaxation(
            self.operation, *(v.reshape(self.shape) for v in (self.center, low, high))
        )
        # Neither the ball nor what is no line before depends on the branch.
        found.bent, found.radius = self.bent, self.radius
        return found

    def back(self, c, multipliers, radius):
        """`(g, h, size)` of (L): `Functionals`, and float64 (rows,) twice.

        Args:
            c: `Functionals` of φ(z).
            multipliers: `Multipliers`, or None for those of `starts` with λ = 0.
            radius: ρ of the bent units within the window of `c`.
        """
        index = c.of(np.arange(len(self.center)).reshape(self.shape)).reshape(-1)
        flat = c.rows.reshape(len(c.rows), -1)
        bent = self.bent[index]
        lines, units = index[~bent], index[bent]
        own, p = self.pieces, self.pieces.of(units)
        g = np.zeros_like(flat)
        straight = flat[:, ~bent]
        g[:, ~bent] = straight * own.slope[0, lines]
        h = straight @ own.shift[0, lines]
        size = 8 * (np.abs(flat) @ self.heights[index])
        if len(units):
            some = flat[:, bent]
            shares, lam = self._chosen(some, units, multipliers)
            taken = shares * some
            if not np.isfinite(radius):
                lam = np.zeros(len(flat))
            g[:, bent] = taken
            left = down(self.low[units] - self.center[units])
            right = up(self.high[units] - self.center[units])
            least = np.concatenate(
                [
                    _minima(p, self.center[units], left, right, some[k], taken[k], lam[k])
                    for k in _blocks(len(flat), len(units))
                ]
            )
            h = h + least
            far = float(np.sum(np.maximum(np.abs(left), np.abs(right)) ** 2))
            on = lam > 0
            if np.any(on):
                h = np.where(on, h - lam * (radius**2 / 2), h)
                size = size + np.where(on, 4 * lam * (far + radius**2), 0.0)
        size = size + 8 * (np.abs(g) @ self.reach[index])
        return Functionals(g.reshape(c.rows.shape), c.window), h, size

    def _chosen(self, c, units, multipliers):
        """Shares (rows, units) and λ (rows,)."""
        shares = np.where(c > 0, *(v[units] for v in self.starts))
        if multipliers is None:
            return shares, np.zeros(len(c))
        _, here, there = np.intersect1d(units, multipliers.columns, return_indices=True)
        shares[:, here] = multipliers.shares[:, there]
        lam = multipliers.lam
        return shares, np.where((lam >= _SMALLEST) & (lam <= _LARGEST), lam, 0.0)


def _blocks(rows, columns):
    step = max(_BLOCK // max(columns, 1), 1)
    return [slice(k, k + step) for k in range(0, rows, step)]


def _minima(p, center, left, right, c, g, lam):
    """Σ_i min over the pieces, (rows,)."""
    weight = lam[:, None]
    inverse = np.where(weight > 0, 1 / np.where(weight > 0, weight, 1.0), _ENDLESS)
    # Without λ the minimum is at an end, however small the tilt: twice is far enough for all.
    beyond = None if np.all(weight > 0) else np.where(weight > 0, 1.0, _ENDLESS)
    best = None
    for k in range(len(p.slope)):
        tilt = c * p.slope[k] - g
        # The ends of pieces within the box, outwards too: a piece is a line everywhere.
        start = np.maximum(down(p.start[k] - center), left)
        stop = np.minimum(up(p.stop[k] - center), right)
        away = -tilt * inverse
        away = np.clip(away if beyond is None else away * beyond, start, stop)
        value = tilt * (away + center) + (weight / 2) * away * away
        if np.any(p.shift[k]):
            value += c * p.shift[k]
        if np.any(p.error[k]):
            value -= np.abs(c) * p.error[k]
        best = value if best is None else np.minimum(best, value)
    return best.sum(axis=1)


class Maximum:
    """(M) of a max pooling over windows, or over all positions.

    Args:
        operation: `MaxPooling` or `GlobalPooling`.
        center, low, high: float64 (*shape).
    """

    def __init__(self, operation, center, low, high):
        self.shape = center.shape
        self.low, self.high = low.reshape(-1), high.reshape(-1)
        self.cells, self.out = _cells(operation, self.shape)
        self.radius = np.inf
        there = self.cells >= 0
        bottom = np.where(there, self.low[self.cells], -np.inf)
        top = np.where(there, self.high[self.cells], -np.inf)
        self.floor, self.ceiling = bottom.max(axis=1), top.max(axis=1)
        rows = np.arange(len(self.cells))
        first = np.argmax(top, axis=1)
        others = there & (top > self.floor[:, None])
        # The cell of the largest l stays, even if its box is that number alone.
        others[rows, np.argmax(bottom, axis=1)] = True
        others[rows, first] = False
        self.single = ~others.any(axis=1)
        self.above = self.cells[rows, first]
        self.below = self.cells[rows, np.argmax(bottom + top, axis=1)]
        # A window of one cell left is that cell, from below too.
        self.below = np.where(self.single, self.above, self.below)
        self.second = np.where(others, top, -np.inf).max(axis=1)

    def range(self):
        """Bounds of the maxima, (*out) each."""
        return self.floor.reshape(self.out), self.ceiling.reshape(self.out)

    def back(self, c, multipliers, radius):
        """`(g, h, size)`, see `Relaxation.back`; the ball takes no part."""
        flat = c.whole(self.out).rows.reshape(len(c.rows), -1)
        low, high = self.low[self.above], self.high[self.above]
        second = np.where(self.single, low, self.second)
        alpha = np.clip((high - second) / np.maximum(high - low, 1e-300), 0.0, 1.0)
        alpha = np.repeat(alpha[None], len(flat), axis=0)
        if multipliers is not None:
            inside = multipliers.columns < alpha.shape[1]
            alpha[:, multipliers.columns[inside]] = multipliers.shares[:, inside]
        alpha = np.where(self.single, 1.0, np.maximum(alpha, 0.0))
        offset = np.maximum((1 - alpha) * np.where(alpha <= 1, high, low), second - alpha * low)
        offset = np.where(self.single, 0.0, offset)
        plus, minus = np.maximum(flat, 0.0), np.minimum(flat, 0.0)
        g = np.zeros((len(self.low), len(flat)))
        np.add.at(g, self.below, plus.T)
        np.add.at(g, self.above, (alpha * minus).T)
        reach = np.maximum(np.abs(self.low), np.abs(self.high))
        largest = np.where(self.cells >= 0, reach[self.cells], 0.0).max(axis=1)
        size = 8 * np.sum(np.abs(flat) * (1 + alpha) * largest, axis=1)
        size = size + 8 * (reach @ np.abs(g))
        rows = np.ascontiguousarray(g.T).reshape(len(flat), *self.shape)
        return Functionals(rows), np.sum(minus * offset, axis=1), size


def _cells(operation, shape):
    """`(flat input indices (outputs, cells), output shape)`, -1 beyond the edge."""
    index = np.arange(int(np.prod(shape))).reshape(1, *shape)
    if isinstance(operation, MaxPooling):
        found = np.stack([read[0] for _, read in windows(index, operation.axes, -1)])
        return found.reshape(len(found), -1).T, found.shape[1:]
    return index[0].reshape(-1, shape[-1]).T, shape[-1:]
