"""Activations on intervals as linear pieces, with a bound on what each misses.

|φ(t) - (m t + d)| ≤ e on start ≤ t ≤ stop. Piecewise linear functions are their own pieces (e = 0).
Others are cut into cells. On one of width w, with ℓ the computed line near the chord, what ℓ misses
is at most what it misses at the two ends plus how far φ leaves its chord, which is at most

    min{ κw²/8,  (β - m)(m - α)w/(β - α) },                                               (P)

κ a Lipschitz constant of φ' within the cell, [α, β] the slopes of φ, m that of the chord: φ lies
between the lines of slopes α and β through either end, whose corners are that far from the chord.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification import activations
from tf_lyapunov.verification.arithmetic import SLACK, UNIT

CELLS = 12
# Lipschitz constants of φ', rounded up, away from the corners that are listed with them. Extrema of
# φ'': of tanh at tanh² = 1/3, of the logistic function at tanh² = 1/3 of half its argument, the
# others at 0.
_CURVATURES = {
    "tanh": (0.76981, ()),
    "sigmoid": (0.096226, ()),
    "log_sigmoid": (0.25, ()),
    "softplus": (0.25, ()),
    "softsign": (2.0, ()),
    "silu": (0.5, ()),
    "gelu": (0.797885, ()),
    "selu": (1.7580994, (0.0,)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Linear pieces of one function per unit.

    Attributes:
        start, stop: float64 (pieces, m); together they cover the interval of every unit.
        slope, shift, error: float64 (pieces, m), m, d and e.
        low, high: float64 (m,), bounds of the slopes of φ on the interval.
    """

    start: np.ndarray
    stop: np.ndarray
    slope: np.ndarray
    shift: np.ndarray
    error: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def range(self):
        """Bounds `(least, largest)` of φ over the interval, (m,) each."""
        first, last = self.slope * self.start + self.shift, self.slope * self.stop + self.shift
        reach = np.maximum(np.abs(self.start), np.abs(self.stop))
        room = self.error + 4 * UNIT * (np.abs(self.slope) * reach + np.abs(self.shift))
        least = (np.minimum(first, last) - room * SLACK).min(axis=0)
        return least, (np.maximum(first, last) + room * SLACK).max(axis=0)

    def lines(self):
        """Which units are a line on their interval, (m,) bool."""
        same = np.all(self.slope == self.slope[0], axis=0)
        same &= np.all(self.shift == self.shift[0], axis=0)
        return same & np.all(self.error == 0, axis=0)

    def of(self, index):
        """Those of some units."""
        fields = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Pieces(*(v[..., index] for v in fields))


def pieces(operation, low, high, units):
    """`Pieces` of an `operations.Activation` on low ≤ t ≤ high.

    Args:
        operation: `Activation`.
        low, high: float64 (m,), finite.
        units: function that gives, of an array of the signal's shape, its entries for these units.
    """
    exact = _lines(operation, units)
    if exact is not None:
        return _between(*exact, low, high)
    return _cells(operation, low, high)


def _lines(operation, units):
    """`(edges, [(slope, shift)])` of a piecewise linear function, or None."""
    name, given = operation.name, operation.parameters
    if operation.slopes_at is not None:
        return (0.0,), [(units(operation.slopes_at), 0.0), (1.0, 0.0)]
    if name in ("relu", "leaky_relu"):
        slope, cap = float(given.get("negative_slope", 0.0)), given.get("max_value")
        if cap is None:
            return (0.0,), [(slope, 0.0), (1.0, 0.0)]
        if slope >= 0 and cap >= 0:
            return (0.0, float(cap)), [(slope, 0.0), (1.0, 0.0), (0.0, float(cap))]
        return None
    if name == "relu6":
        return (0.0, 6.0), [(0.0, 0.0), (1.0, 0.0), (0.0, 6.0)]
    if name == "linear":
        return (), [(1.0, 0.0)]
    return None


def _between(edges, lines, low, high):
    edges = [-np.inf, *edges, np.inf]
    parts = []
    # The line at the lower end stands for those that the interval does not meet.
    own_slope, own_shift = np.zeros_like(low), np.zeros_like(low)
    for k, (slope, shift) in enumerate(lines):
        here = (low >= edges[k]) & (low <= edges[k + 1])
        own_slope, own_shift = np.where(here, slope, own_slope), np.where(here, shift, own_shift)
    for k, (slope, shift) in enumerate(lines):
        start, stop = np.maximum(low, edges[k]), np.minimum(high, edges[k + 1])
        meets = start < stop
        parts.append(
            [
                np.where(meets, start, low),
                np.where(meets, stop, low),
                np.where(meets, slope, own_slope),
                np.where(meets, shift, own_shift),
            ]
        )
    start, stop, slope, shift = (np.stack(p) for p in zip(*parts, strict=True))
    return Pieces(
        start, stop, slope, shift, np.zeros_like(slope), slope.min(axis=0), slope.max(axis=0)
    )


def _cells(operation, low, high):
    name, given = operation.name, operation.parameters
    curvature, corners = _CURVATURES.get(name, (np.inf, ()))
    if name == "elu":
        curvature, corners = abs(float(given.get("alpha", 1.0))), (0.0,)
    alpha, beta = operation.slopes()
    share = np.linspace(0.0, 1.0, CELLS + 1)[:, None]
    knots = np.clip(low + (high - low) * share, low, high)
    knots[-1] = high
    for corner in corners:
        knots = np.concatenate([knots, np.clip(corner, low, high)[None]])
    knots = np.sort(knots, axis=0)
    value, noise = activations.evaluate(name, given, knots, np.zeros_like(knots))
    start, stop = knots[:-1], knots[1:]
    width = (stop - start) * (1 + 4 * UNIT)
    wide = width > 0
    slope = np.divide(value[1:] - value[:-1], width, out=np.zeros_like(width), where=wide)
    slope = np.clip(slope, alpha, beta)
    shift = value[:-1] - slope * start
    ends = [
        np.abs(v - (slope * t + shift)) + n + 8 * UNIT * (np.abs(v) + np.abs(slope * t))
        for v, t, n in ((value[:-1], start, noise[:-1]), (value[1:], stop, noise[1:]))
    ]
    missed = np.maximum(*ends)
    # The true chord's slope is this far from the line's, times the width, at most.
    tilt = ends[0] + ends[1]
    room = max(beta - alpha, 1e-300)
    away = (beta - slope) * (slope - alpha) / room * width + tilt
    away = np.minimum(away, curvature * width * width / 8 if np.isfinite(curvature) else np.inf)
    away = np.minimum(away, (beta - alpha) / 4 * width)
    error = (away + missed) * SLACK
    spread = np.divide(tilt, width, out=np.full_like(width, np.inf), where=wide)
    spread = spread + (curvature * width if np.isfinite(curvature) else np.inf)
    # Cells without a width, such as at corners outside, hold no two points.
    counts = wide | ~np.any(wide, axis=0)
    least = np.where(counts, np.maximum(slope - spread * SLACK, alpha), np.inf).min(axis=0)
    largest = np.where(counts, np.minimum(slope + spread * SLACK, beta), -np.inf).max(axis=0)
    return Pieces(start, stop, slope, shift, error, least, largest)
