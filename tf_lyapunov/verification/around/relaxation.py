"""Lower bounds of functionals of activations by functionals of what they read.

For z with l ≤ z ≤ u and Σ w_i(z_i - z⁰_i)² ≤ ρ², any coefficients c, any g and any λ ≥ 0,

    cᵀφ(z) ≥ gᵀz + Σ_i min_{l_i ≤ t ≤ u_i} [c_i φ_i(t) - g_i t + (λ/2)w_i(t - z⁰_i)²] - λρ²/2:  (L)

the first sum over i of cᵀφ(z) - gᵀz + (λ/2)Σ w_i(z_i - z⁰_i)² is at least that of the minima, and
what was added is at most λρ²/2. So g and λ come from a file and need no proof, nor do the weights,
for which ρ is derived. With `pieces`, each minimum is one over pieces of
e t + cd - |c|e' + (λw/2)(t - z⁰)², e = cm - g, attained at clip(z⁰ - e/(λw), start, stop).

Rounding. The computed minimiser errs by 8u|t - z⁰| at most before it is clipped, so that the
quadratic lies above its minimum by less than 64u²λw(t - z⁰)²; all else is a sum of products, whose
sizes are returned: γ_n of them bounds the error, n the number of units and a few more.
"""

import dataclasses
import functools

import numpy as np

from tf_lyapunov.verification.arithmetic import down, sqrt_up, up
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.pieces import pieces

# λ beyond these are 0: nothing overflows, and reciprocals are exact to a rounding.
_SMALLEST, _LARGEST = 1e-60, 1e60
_ENDLESS = 1e300
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class Multipliers:
    """What a file says of one step for rows of functionals; any values are valid.

    Attributes:
        columns: int (m,), flat units, each once; of maxima, cells of windows.
        shares: float64 (rows, m), g = share·c of the units; s of (M).
        lam: float64 (rows,), λ.
        are_slopes: whether shares of activations are g itself.
    """

    columns: np.ndarray
    shares: np.ndarray
    lam: np.ndarray
    are_slopes: bool = False


def usable(lam):
    """λ that count, 0 for the others."""
    return np.where((lam >= _SMALLEST) & (lam <= _LARGEST), lam, 0.0)


def of_rows(multipliers, rows):
    """Some rows of a dict from names of steps to `Multipliers`."""
    return {
        name: Multipliers(m.columns, m.shares[rows], m.lam[rows]) for name, m in multipliers.items()
    }


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
        self.bent = self.units = ~self.pieces.lines()
        self.radius = np.inf  # ρ of the units that are bent
        self.weights, self.steepest_weight = np.ones(self.bent.shape), 1.0
        self.least, self.largest = p.range()
        self.reach = np.maximum(
            np.maximum(np.abs(self.low), np.abs(self.high)), np.abs(self.center)
        )
        self.heights = np.max(np.abs(p.slope) * self.reach + np.abs(p.shift) + p.error, axis=0)

    def weigh(self, weights, radius):
        """Other weights w ≥ 0 (m,) of the ball, 0 where units are not bent, with their ρ."""
        self.weights, self.radius = weights, radius
        self.steepest_weight = sqrt_up(float(np.max(weights, initial=0.0)))

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
        return self.within(low, high)

    def within(self, low, high, free=()):
        """The same on a part of the box.

        Args:
            low, high: float64 (m,), within the box; low ≤ high.
            free: units whose g is free even where they are lines.
        """
        found = Relaxation(
            self.operation, *(v.reshape(self.shape) for v in (self.center, low, high))
        )
        # Neither the ball nor what is no line before depends on the part; the ball is of the
        # latter alone.
        found.bent, found.units = self.bent.copy(), self.units
        found.bent[list(free)] = True
        found.weigh(np.where(self.units, self.weights, 0.0), self.radius)
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
            taken, lam = self._chosen(some, units, multipliers)
            if not np.isfinite(radius):
                lam = np.zeros(len(flat))
            g[:, bent] = taken
            weights = self.weights[units]
            left = down(self.low[units] - self.center[units])
            right = up(self.high[units] - self.center[units])
            least = np.concatenate(
                [
                    _minima(
                        p,
                        self.center[units],
                        left,
                        right,
                        some[k],
                        taken[k],
                        lam[k, None] * weights,
                    )
                    for k in _blocks(len(flat), len(units))
                ]
            )
            h = h + least
            far = float(np.sum(weights * np.maximum(np.abs(left), np.abs(right)) ** 2))
            on = lam > 0
            if np.any(on):
                square = radius * radius  # infinite for huge ones, as the size then is
                h = np.where(on, h - lam * (square / 2), h)
                size = size + np.where(on, 4 * lam * (far + square), 0.0)
        size = size + 8 * (np.abs(g) @ self.reach[index])
        return Functionals(g.reshape(c.rows.shape), c.window), h, size

    def _chosen(self, c, units, multipliers):
        """g (rows, units) and λ (rows,)."""
        shares = np.where(c > 0, *(v[units] for v in self.starts))
        if multipliers is None:
            return shares * c, np.zeros(len(c))
        _, here, there = np.intersect1d(units, multipliers.columns, return_indices=True)
        given, lam = multipliers.shares[:, there], multipliers.lam
        if not multipliers.are_slopes:
            shares[:, here] = given
        found = shares * c
        if multipliers.are_slopes:
            found[:, here] = given
        return found, usable(lam)


def _blocks(rows, columns):
    step = max(_BLOCK // max(columns, 1), 1)
    return [slice(k, k + step) for k in range(0, rows, step)]


def _minima(p, center, left, right, c, g, weight):
    """Σ_i min over the pieces, (rows,), with λw (rows, units)."""
    inverse = np.where(weight > 0, 1 / np.where(weight > 0, weight, 1.0), _ENDLESS)
    # Without λ the minimum is at an end, however small the tilt: twice is far enough for all.
    beyond = None if np.all(weight > 0) else np.where(weight > 0, 1.0, _ENDLESS)
    best = None
    for k in range(len(p.slope)):
        tilt = c * p.slope[k] - g
        # The ends of pieces within the box, outwards too: a piece is a line everywhere.
        start = np.maximum(down(p.start[k] - center), left)
        stop = np.minimum(up(p.stop[k] - center), right)
        with np.errstate(over="ignore"):  # beyond every end, which is where it stops
            away = -tilt * inverse
            away = away if beyond is None else away * beyond
        away = np.clip(away, start, stop)
        value = tilt * (away + center) + (weight / 2) * away * away
        if np.any(p.shift[k]):
            value += c * p.shift[k]
        if np.any(p.error[k]):
            value -= np.abs(c) * p.error[k]
        best = value if best is None else np.minimum(best, value)
    return best.sum(axis=1)
