"""The relaxation of an elementwise step that joins the ball and the box of its input.

For z with Σ w_i (z_i - z⁰_i)² ≤ ρ² and l ≤ z ≤ u, any coefficients c, any g and any λ ≥ 0,

    cᵀφ(z) ≥ gᵀz + h,
    h = Σ_i min_{l_i ≤ t ≤ u_i} [c_i φ_i(t) - g_i t + (λ/2) w_i (t - z⁰_i)²] - λρ²/2.      (L)

Proof. cᵀφ(z) - gᵀz = Σ_i [c_i φ_i(z_i) - g_i z_i + (λ/2) w_i (z_i - z⁰_i)²] - (λ/2) Σ w_i (z_i -
z⁰_i)², whose first sum is at least that of the minima and whose second is at most λρ²/2.

With `Pieces` φ_i(t) ≥ s t + d - e where c_i > 0, and ≤ s t + d + e where c_i < 0, so that the
minimum is one over pieces of a convex quadratic (a line for λ = 0), attained at
clip(z⁰ - (c s - g)/(λ w), a, b). Special cases: λ = 0 is CROWN and α-CROWN; a box without ends is
SDP-CROWN's Theorem 4.1; a unit that was split has a smaller box.

Rounding. Let t* be the minimiser of the piece that holds the exact minimum, t̂ the computed one.
Both are clipped to [a, b], so q(t̂) ≤ q(t*) + λw·d² with d the error of the unclipped point, at
most 4u(|z⁰| + |t̂ - z⁰|), or q(t̂) is linear; and q(t̂) is computed with an error of at most
8u(|c|(|s||t̂| + |d|) + |g||t̂| + λw(t̂ - z⁰)²/2). Every one of these is below u·`slack`, which sums
them for the whole row with the largest values over the box, and the sum over units costs γ_n of it
once more.
"""

import dataclasses

import numpy as np

from tf_lyapunov.local.pieces import Columns, pieces

_TINY = 1e-30
_CANDIDATES = 5
# Entries of a block of rows that is worked on at once.
_CLOSE = 2**17
_PLUS, _MINUS = 1.0, -1.0
# Far beyond what helps, far from what overflows.
_LOG_LAM = (-40.0, 30.0)


@dataclasses.dataclass(eq=False)
class Multipliers:
    """g and λ of one step for a batch of rows; any values are valid.

    Attributes:
        share, shift: g_i = share·c_i + shift of the units that are not linear on their box, float64
            (rows, m); a shift of None is zero.
        log_lam: log λ, float64 (rows,); -inf for λ = 0.
        columns: int (m,), which units these are.
        scale: size of a step of `shift`, float64 (rows, 1).
    """

    share: np.ndarray
    log_lam: np.ndarray
    columns: np.ndarray
    shift: np.ndarray | None = None
    scale: np.ndarray | None = None

    def copy(self):
        """The same values in arrays of their own."""
        return self.of_rows(slice(None))

    def of_rows(self, rows):
        """Those of some rows, in arrays of their own."""
        return Multipliers(
            self.share[rows].copy(),
            self.log_lam[rows].copy(),
            self.columns,
            None if self.shift is None else self.shift[rows].copy(),
            None if self.scale is None else self.scale[rows],
        )

    def joined(self, other):
        """Those rows and then another's, of the same units; without shifts."""
        return Multipliers(
            np.concatenate([self.share, other.share]),
            np.concatenate([self.log_lam, other.log_lam]),
            self.columns,
        )

    def adopt(self, other, mine, theirs):
        """Takes over rows `theirs` of another's into rows `mine`, for the units that both have."""
        _, here, there = np.intersect1d(self.columns, other.columns, return_indices=True)
        self.share[np.ix_(mine, here)] = other.share[np.ix_(theirs, there)]
        self.log_lam[mine] = other.log_lam[theirs]

    def take(self, other, rows):
        """Takes over the rows of another where `rows` (bool) says so."""
        self.share[rows] = other.share[rows]
        self.log_lam[rows] = other.log_lam[rows]
        if self.shift is not None:
            self.shift[rows] = other.shift[rows]

    def move(self, directions, size):
        """Moves by a step in the directions of `share`, `log_lam` and, if there are, `shift`."""
        self.share = self.share + 0.3 * size * directions[0]
        self.log_lam = np.clip(self.log_lam + size * directions[1], *_LOG_LAM)
        if self.shift is not None:
            self.shift = self.shift + size * self.scale * directions[2]


class Elementwise:
    """(L) of one elementwise step around one point.

    Args:
        operation: an elementwise operation that `pieces` knows.
        center: float64 (1 or rows, *shape), z⁰ as computed.
        low, high: float64 (1 or rows, *shape), the box of z.
        radius: ρ for `weights`, with the rounding of z⁰; infinite if unknown.
        weights: float64 (*shape) w ≥ 0, or None for 1 on the units that are not linear.
        columns: int, units to be treated as not linear even where their boxes leave them so: g is
            free there, as the multiplier of what makes the box that small. None for none.
    """

    def __init__(self, operation, center, low, high, radius=np.inf, weights=None, columns=None):
        self.operation, self.shape = operation, center.shape[1:]
        self.center = center.reshape(len(center), -1)
        self.low, self.high = (v.reshape(len(v), -1) for v in (low, high))
        # The radius before other weights were chosen.
        self.radius, self.plain = radius, None
        everything = Columns(np.arange(self.center.shape[1]), self.shape)
        whole = pieces(operation, self.low, self.high, everything)
        below, above = whole.slopes()
        self.slopes = below.min(axis=0), above.max(axis=0)
        linear = (self.slopes[0] == self.slopes[1]) & (whole.error.max(axis=(0, 1)) == 0)
        # Rows of boxes of their own may lie on different pieces of the same slope.
        linear &= np.ptp(whole.intercept, axis=(0, 1)) == 0
        if columns is not None:
            linear[columns] = False
        self.columns = self.units = np.flatnonzero(~linear)
        # Rows of boxes of their own may leave different units linear.
        self.free = None
        if len(below) > 1:
            self.free = ((below != above) | (whole.error.max(axis=0) > 0))[:, self.columns]
        # Of a linear unit all pieces agree; of the others nothing is read here.
        kind = self.center.dtype
        self.slope = np.where(linear, whole.slope[0, 0], 0.0).astype(kind)
        self.shift = np.where(linear, whole.intercept[0, 0], 0.0).astype(kind)
        self.has_shift = bool(np.any(self.shift))
        index = self.columns
        few = slice(None) if len(index) == self.center.shape[1] else index
        self.pieces = dataclasses.replace(
            whole,
            **{
                f.name: getattr(whole, f.name)[..., few].astype(kind, copy=False)
                for f in dataclasses.fields(whole)
            },
        )
        self.kinds = [_kind(slope) for slope in self.pieces.slope]
        self.shifted = [bool(np.any(v)) for v in self.pieces.intercept]
        self.inexact = [bool(np.any(v)) for v in self.pieces.error]
        self.z = self.center[:, index]
        self.weights = 1.0 if weights is None else np.asarray(weights).ravel()[index][None]
        self.starts = None
        # For the slack: largest values over the box.
        size = np.maximum(np.abs(self.low), np.abs(self.high)).max(axis=0)
        steepest = np.abs(whole.slope).max(axis=(0, 1))
        self.largest_z = size
        self.largest_value = (
            steepest * size
            + np.abs(whole.intercept).max(axis=(0, 1))
            + whole.error.max(axis=(0, 1))
        )
        reach = np.maximum(np.abs(self.high - self.center), np.abs(self.low - self.center))
        squares = reach.max(axis=0)[index] ** 2
        # The minimiser itself is rounded relative to z⁰, which may be far larger.
        squares = squares + 2.0**-53 * np.abs(self.z).max(axis=0, initial=0.0) ** 2
        self.squares = squares
        self.square = float(np.sum(self.weights * squares))

    def weigh(self, weights, radius):
        """Another ball: Σ w_i (z_i - z⁰_i)² ≤ radius² over the units that are not linear."""
        if self.plain is None:
            self.plain = self.radius
        self.weights = np.asarray(weights, self.center.dtype)[None]
        self.radius = float(radius)
        self.square = float(np.sum(self.weights * self.squares))

    def all_weights(self):
        """w of every unit, 0 for those that are linear, of which the radius says nothing."""
        found = np.zeros(self.center.shape[1])
        found[self.columns] = self.weights if np.ndim(self.weights) == 0 else self.weights[0]
        return found

    def range(self):
        """Bounds on φ over the box, (*shape) each, for the one box of all rows."""
        everything = Columns(np.arange(self.center.shape[1]), self.shape)
        low, high = pieces(self.operation, self.low, self.high, everything).range()
        return low.min(axis=0).reshape(self.shape), high.max(axis=0).reshape(self.shape)

    def _starts(self, sign):
        """CROWN's slopes for a sign of c: of lines through the pieces, best amid the box."""
        p = self.pieces
        first, last = p.start.min(axis=0), p.stop.max(axis=0)
        z = (first + last) / 2
        at = [p.slope * t + p.intercept for t in (p.start, p.stop)]
        begin = np.where(p.start == first, at[0], -np.inf).max(axis=0)
        end = np.where(p.stop == last, at[1], -np.inf).max(axis=0)
        chord = (end - begin) / np.maximum(last - first, _TINY)
        stops = np.unique(np.linspace(0, len(p.slope) - 1, _CANDIDATES).astype(int))
        best = held = None
        for slope in (chord, *(p.slope[k] for k in stops)):
            # min over the pieces of sign·φ(t) - g t, plus g z⁰: the bound's value at z.
            inner = np.minimum(
                *(a - slope * t for a, t in zip(at, (p.start, p.stop), strict=True))
            ) if sign is _PLUS else np.minimum(
                *(slope * t - a for a, t in zip(at, (p.start, p.stop), strict=True))
            )  # fmt: skip
            value = (inner - p.error).min(axis=0) + sign * slope * z
            better = None if best is None else value > best
            best = value if best is None else np.where(better, value, best)
            held = slope + 0.0 * chord if held is None else np.where(better, slope, held)
        return held

    def start(self, c):
        """`Multipliers` with CROWN's slopes and λ = 0."""
        units = c.reshape(len(c), -1)[:, self.columns]
        if self.starts is None:
            self.starts = self._starts(_PLUS), self._starts(_MINUS)
        share = np.where(units > 0, *self.starts)
        return Multipliers(share, np.full(len(c), -np.inf, c.dtype), self.columns)

    def blank(self, c):
        """`Multipliers` of zeros, to be filled from others."""
        share = np.zeros((len(c), len(self.columns)), c.dtype)
        return Multipliers(share, np.full(len(c), -np.inf, c.dtype), self.columns)

    def backward(self, c, multipliers, record=True):
        """`(g, h, memory)` of (L); `memory` is for `forward`, None without `record`."""
        flat = c.reshape(len(c), -1)
        g = flat * self.slope
        h = flat @ self.shift if self.has_shift else np.zeros(len(c), c.dtype)
        units = flat[:, self.columns]
        own = multipliers.share * units
        if multipliers.shift is not None:
            own = own + multipliers.shift
        g[:, self.columns] = own
        lam = np.zeros(len(c), c.dtype)
        if np.isfinite(self.radius):
            lam = np.exp(multipliers.log_lam)
        if not units.shape[1]:
            return g.reshape(c.shape), h, None
        point, read = (np.empty_like(units), np.empty_like(units)) if record else (None, None)
        step = max(_CLOSE // units.shape[1], 1)
        for start in range(0, len(c), step):
            rows = slice(start, start + step)
            least, *found = self._least(units[rows], own[rows], lam[rows], rows, record)
            h[rows] += least
            if record:
                point[rows], read[rows] = found
        if np.isfinite(self.radius):
            h = h - lam * (self.radius * self.radius / 2)
        if not record:
            return g.reshape(c.shape), h, None
        memory = units, point, read, lam, multipliers.share, multipliers.shift is not None
        return g.reshape(c.shape), h, memory

    def _least(self, units, own, lam, rows, record):
        """Of a slice of rows, the sums of minima, and their points with φ or its line there."""
        curve, inverse, far = reciprocals(lam[:, None] * self.weights)
        half = 0.5 * curve
        best = None
        p, z = self.pieces, of(self.z, rows)
        for k in range(len(p.slope)):
            if self.kinds[k] == 0:
                slope = -own
            else:
                slope = units - own if self.kinds[k] == 1 else units * of(p.slope[k], rows) - own
            with np.errstate(over="ignore"):  # beyond every box is far enough
                t = slope * inverse
                if far is not None:
                    t *= far
            np.subtract(z, t, out=t)
            np.maximum(t, of(p.start[k], rows), out=t)
            np.minimum(t, of(p.stop[k], rows), out=t)
            value = t - z
            value *= value
            value *= half
            value += slope * t
            if self.shifted[k]:
                value += units * of(p.intercept[k], rows)
            if self.inexact[k]:
                value -= np.abs(units) * of(p.error[k], rows)
            if best is None:
                best, point = value, t
                read = self._line(k, units, t, rows) if record else None
            elif not record:
                np.minimum(best, value, out=best)
            else:
                # Products with zeros and ones are several times faster than selections.
                better = (value < best).astype(value.dtype)
                np.minimum(best, value, out=best)
                line = self._line(k, units, t, rows)
                t -= point
                t *= better
                point += t
                read = read + better * (line - read)
        return best.sum(axis=1), point, read

    def _line(self, k, units, point, rows):
        """Piece k at a point: φ, or the line below or above it that stands for it."""
        p = self.pieces
        if self.kinds[k] == 0:
            found = np.zeros((1, 1), point.dtype)
        else:
            found = point.copy() if self.kinds[k] == 1 else of(p.slope[k], rows) * point
        if self.shifted[k]:
            found = found + of(p.intercept[k], rows)
        if self.inexact[k]:
            found = found - np.sign(units) * of(p.error[k], rows)
        return found

    def slack(self, c, g, multipliers):
        """What `backward` summed up, in size, per row: its rounding is below γ_n of it."""
        flat, own = np.abs(c.reshape(len(c), -1)), np.abs(g.reshape(len(g), -1))
        found = 4 * (flat @ self.largest_value) + 4 * (own @ self.largest_z)
        if np.isfinite(self.radius):
            lam = np.exp(multipliers.log_lam)
            found = found + lam * 4 * (self.square + self.radius * self.radius)
        return found

    def forward(self, y, memory):
        """Derivatives of the bound: by c, and by the multipliers, from `y`, that by g.

        Returns:
            `(by_c, by_share, by_log_lam)`, and by the shift if there is one.
        """
        flat = y.reshape(len(y), -1)
        found = flat * self.slope + self.shift
        if memory is None:
            return found.reshape(y.shape), np.zeros((len(y), 0)), np.zeros(len(y))
        units, point, read, lam, share, shifted = memory
        through = flat[:, self.columns] - point
        found[:, self.columns] = read + share * through
        away = point - self.z
        square = np.sum(self.weights * away * away, axis=1)
        by_lam = np.zeros(len(y))
        if np.isfinite(self.radius):
            by_lam = lam * (square - self.radius * self.radius) / 2
        by_share = units * through
        if self.free is not None:
            by_share = np.where(self.free, by_share, 0.0)
        if shifted:
            return found.reshape(y.shape), by_share, by_lam, through
        return found.reshape(y.shape), by_share, by_lam


def reciprocals(curve):
    """`(curve, inverse, far)`: slope·inverse·far is how far a minimiser lies from z⁰.

    Where λw is 0, or too small for a reciprocal, that must be beyond every box, whatever the slope:
    no single number is large enough for the smallest of them, the square of one is.
    """
    smallest = 1e-200 if curve.dtype == np.float64 else 1e-30
    flat = curve < smallest
    if not np.any(flat):
        return curve, 1 / curve, None
    endless = 1e300 if curve.dtype == np.float64 else 1e30
    inverse = np.where(flat, endless, 1 / np.where(flat, 1.0, curve))
    return np.where(flat, 0.0, curve), inverse, np.where(flat, endless, 1.0)


def of(array, rows):
    """Rows of an array that has one for each, or one for all."""
    return array if len(array) == 1 else array[rows]


def _kind(slope):
    """0 or 1 where a piece has this slope for all units, else 2."""
    if not slope.size:
        return 2
    return 0 if np.all(slope == 0) else 1 if np.all(slope == 1) else 2
