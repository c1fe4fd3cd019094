"""Lines below and above activations, and intervals of operations, on many boxes at once."""

import dataclasses

import numpy as np

from tf_lyapunov.local.maxima import is_window_maximum, windows_of
from tf_lyapunov.local.pieces import Columns, has_pieces, linear_pieces, pieces
from tf_lyapunov.local.relaxed import curve_of, is_curved
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.elementwise import Kinked
from tf_lyapunov.program.families.merging import Extreme
from tf_lyapunov.program.operation import EXACT, Signal

UNIT = rounding.UNIT_ROUNDOFF["float64"]


@dataclasses.dataclass(eq=False)
class Lines:
    """Lines below and above an activation on every domain, float64 (domains, units) each."""

    low_slope: np.ndarray
    low_shift: np.ndarray
    high_slope: np.ndarray
    high_shift: np.ndarray
    open: np.ndarray  # bool, whether the two differ

    def __post_init__(self):
        # What the line above has more of both: cᵀφ(y) takes it where c is negative.
        self.bend = self.high_slope - self.low_slope
        self.shift = self.high_shift if self.low_shift is None else self.high_shift - self.low_shift

    def through(self, c, domain):
        """`(coefficients per input, constants)` of (C), for rows of some domains.

        Args:
            c: float64 (m·d, units).
            domain: int (d,), of rows d apart from one another.
        """
        if not len(c):
            return [c], np.zeros(0)
        rows = c.reshape(-1, len(domain), c.shape[1])
        minus = np.minimum(rows, 0.0)
        added = np.einsum("kij,ij->ki", minus, np.take(self.shift, domain, axis=0))
        if self.low_shift is not None:
            added += np.einsum("kij,ij->ki", rows, np.take(self.low_shift, domain, axis=0))
        minus *= np.take(self.bend, domain, axis=0)
        minus += rows * np.take(self.low_slope, domain, axis=0)
        return [minus.reshape(c.shape)], added.reshape(-1)

    def costs(self, c, domain):
        """Coefficients that gaps of lines are multiplied with."""
        return c

    def gap(self, low, high):
        """How far they are apart amid a box."""
        return self.shift + self.bend * (low / 2 + high / 2)


def repeated(domain, count):
    """Domains of `count` rows, of which those d apart share theirs."""
    return domain if len(domain) == count else np.tile(domain, count // max(len(domain), 1))


def breaks_of(operation):
    """Where a piecewise linear function changes its slope, or None for others."""
    if isinstance(operation, Kinked):
        return (0.0,)
    exact = linear_pieces(operation)
    return None if exact is None else exact[0]


def lines_of(operation, low, high, shape):
    """`Lines` of an activation on boxes (domains, units) of samples of a shape."""
    slopes = _leak(operation)
    if slopes is not None and np.all((slopes >= 0) & (slopes <= 1)):
        slopes = np.broadcast_to(slopes, shape).reshape(-1)
        return _leaky_lines(slopes, low, high)
    p = pieces(operation, low, high, Columns(np.arange(low.shape[1]), shape))
    at = [p.slope * t + p.intercept for t in (p.start, p.stop)]
    begin = np.where(p.start == low, at[0], -np.inf).max(axis=0)
    end = np.where(p.stop == high, at[1], -np.inf).max(axis=0)
    least, most = p.slopes()
    wide = high > low
    chord = np.where(wide, (end - begin) / np.where(wide, high - low, 1.0), p.slope[0])
    chord = np.clip(chord, p.slope.min(axis=0), p.slope.max(axis=0))
    middle = low / 2 + high / 2
    count = len(p.slope)
    candidates = [chord] + [
        np.broadcast_to(p.slope[k], chord.shape) for k in sorted({0, count // 2, count - 1})
    ]
    found = []
    for sign in (1.0, -1.0):
        best = slope = shift = None
        for s in candidates:
            ends = [sign * (a - s * t) for a, t in zip(at, (p.start, p.stop), strict=True)]
            inner = (np.minimum(*ends) - p.error).min(axis=0)
            value = inner + sign * s * middle
            if best is None:
                best, slope, shift = value, s, sign * inner
            else:
                better = value > best
                best = np.where(better, value, best)
                slope = np.where(better, s, slope)
                shift = np.where(better, sign * inner, shift)
        found += [slope, shift]
    open_ = (least < most) & wide
    return Lines(*found, open_)


def _leak(operation):
    """Slopes below zero of a function that is t above it, or None for others."""
    if isinstance(operation, Kinked):
        return operation.slopes
    exact = linear_pieces(operation)
    if exact is not None and exact[0] == (0.0,) and exact[1][1] == (1.0, 0.0):
        slope, shift = exact[1][0]
        return np.array(slope) if shift == 0.0 else None
    return None


def _leaky_lines(slopes, low, high):
    """max(t, slope·t): the chord above, the nearer of its two lines below."""
    open_ = (low < 0) & (high > 0)
    width = np.where(open_, high - low, 1.0)
    share = np.where(open_, high / width, np.where(low >= 0, 1.0, 0.0))
    high_slope = slopes + (1 - slopes) * share
    # At t = high the chord gives high: high·(1 - slope of the chord).
    shift = np.where(open_, high * (1 - high_slope), 0.0)
    low_slope = np.where(open_, np.where(high > -low, 1.0, slopes), high_slope)
    return Lines(low_slope, None, high_slope, shift, open_)


@dataclasses.dataclass(eq=False)
class WindowLines:
    """(M) of `maxima` on every domain: a cell below, and α times a cell plus b above."""

    below: np.ndarray
    above: np.ndarray
    alpha: np.ndarray
    shift: np.ndarray
    size: int

    def costs(self, c, domain):
        """Coefficients of the maxima, of which no cost is known."""
        return c

    def through(self, c, domain):
        """As that of `Lines`."""
        minus, domain = np.minimum(c, 0.0), repeated(domain, len(c))
        found = np.zeros((len(c), self.size))
        row = np.arange(len(c))[:, None]
        np.add.at(found, (row, self.below[domain]), np.maximum(c, 0.0))
        np.add.at(found, (row, self.above[domain]), minus * self.alpha[domain])
        return [found], np.einsum("ij,ij->i", minus, self.shift[domain])


def window_lines(operation, shape, low, high):
    """`WindowLines` of a max pooling on boxes (domains, entries) of samples of a shape."""
    cells, _ = windows_of(operation, shape)
    exists = cells >= 0
    bottom = np.where(exists, low[:, cells], -np.inf)
    top = np.where(exists, high[:, cells], -np.inf)
    active = active_cells(exists, bottom, top)
    first = np.where(active, top, -np.inf).argmax(axis=2)
    pick = np.arange(cells.shape[1]) == first[:, :, None]
    second = np.where(active & ~pick, top, -np.inf).max(axis=2)
    middle = np.where(active, (bottom + top) / 2, -np.inf)
    index = np.arange(len(cells))
    below = cells[index, middle.argmax(axis=2)]
    above = cells[index, first]
    rows = np.arange(len(low))[:, None]
    least, most = low[rows, above], high[rows, above]
    alone = ~np.isfinite(second)
    second = np.where(alone, least, second)
    width = np.maximum(most - least, 1e-30)
    alpha = np.where(alone, 1.0, np.clip((most - second) / width, 0.0, 1.0))
    shift = np.where(alone, 0.0, np.maximum((1 - alpha) * most, second - alpha * least))
    below = np.where(alone, above, below)
    return WindowLines(below, above, alpha, shift, low.shape[1])


def active_cells(exists, bottom, top):
    """Cells that may be the largest of their window, that of the largest lower end included."""
    active = exists & (top > bottom.max(axis=2, keepdims=True))
    np.put_along_axis(active, bottom.argmax(axis=2)[:, :, None], True, axis=2)
    return active


def interval_of(operation, reads, shape):
    """`(low, high)` of an operation that is not linear on boxes (domains, ...), or None.

    Args:
        reads: list of `(low, high)`, one per input.
        shape: of an output sample.
    """
    if has_pieces(operation):
        low, high = (v.reshape(len(v), -1) for v in reads[0])
        return range_of(operation, low, high, Columns(np.arange(low.shape[1]), shape))
    if is_curved(operation):
        return curve_on(operation, *reads[0]).ends()
    if isinstance(operation, Extreme) or is_window_maximum(operation):
        # Nondecreasing in every entry, and exact.
        ends = ([Signal(read[end]) for read in reads] for end in (0, 1))
        return tuple(operation.forward(signals, EXACT).value for signals in ends)
    return None


def range_of(operation, low, high, columns):
    """Range of an activation on boxes (domains, units)."""
    slopes = _leak(operation)
    if slopes is not None and np.all(slopes >= 0):
        slopes = np.broadcast_to(slopes, columns.shape).reshape(-1)
        return (np.where(low > 0, low, rounding.down(slopes * low)),
                np.where(high > 0, high, rounding.up(slopes * high)))  # fmt: skip
    return pieces(operation, low, high, columns).range()


@dataclasses.dataclass(eq=False)
class CurvedLines:
    """(V) of `curves` around the middle of every domain, entry by entry, or ranges."""

    curve: object
    below: np.ndarray  # what is lost below and above, (domains, outputs)
    above: np.ndarray
    use: np.ndarray  # bool, whether slopes rather than ranges bound an output

    def through(self, c, domain):
        """As that of `Lines`."""
        domain = repeated(domain, len(c))
        curve, use = self.curve, self.use[domain]
        a = np.where(use, c, 0.0)
        g = curve.pull(a, domain)
        added = np.einsum("ij,ij->i", a, curve.value[domain])
        added -= np.einsum("ij,ij->i", g, curve.center[domain])
        lost = np.where(a > 0, self.below[domain], self.above[domain]) + curve.doubt[domain]
        added -= np.einsum("ij,ij->i", np.abs(a), lost) + curve.missed(a, domain)
        ends = np.where(c > 0, curve.low[domain], curve.high[domain])
        added += np.einsum("ij,ij->i", c, np.where(use, 0.0, ends))
        return [g], added

    def costs(self, c, domain):
        """v(c) of rows, (rows, inputs)."""
        domain = repeated(domain, len(c))
        return self.curve.curvature(np.where(self.use[domain], c, 0.0), domain)


def curve_on(operation, low, high):
    """The `Curve` around the middles of boxes (domains, *shape)."""
    shape, (low, high) = low.shape[1:], (v.reshape(len(v), -1) for v in (low, high))
    return curve_of(operation, shape, low / 2 + high / 2, low, high)


def curved_lines(operation, shape, low, high):
    """`CurvedLines` of an operation on boxes (domains, entries) of samples of a shape."""
    curve = curve_on(operation, *(v.reshape(-1, *shape) for v in (low, high)))
    below, above = curve.losses()
    with np.errstate(invalid="ignore"):
        use = below + above < (curve.high - curve.low) / 2
    below, above = (np.where(use, v, 0.0) for v in (below, above))
    return CurvedLines(curve, below, above, use)
