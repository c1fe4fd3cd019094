"""Gains of every step on the ball around one point, from the slopes that its boxes leave.

On the boxes, y = φ(z) moves from y⁰ by M(z - z⁰) + ψ with |ψ_i| ≤ s_i|z_i - z⁰_i|, M the middle
and s half the width of the chords' slopes (φ(t) - φ(z⁰))/(t - z⁰). Hence, for weights w on the
signal z of a step, with J the linearised maps from the input and from the outputs of the steps j
before it,

    t(w) = ‖w^½ J‖·r + Σ_j ‖w^½ J_j s_j^½‖·t_j,     t_j = t(s_j) of the signal at step j,     (t)

bounds √(Σ w_i (z_i - z⁰_i)²): ‖w^½J_jψ_j‖ ≤ ‖w^½J_j s_j^½‖·‖s_j^½ (z - z⁰)‖. The maps are rows
of one backward pass without a relaxation.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.local.curved import Curved
from tf_lyapunov.local.maxima import WindowMaximum
from tf_lyapunov.local.pairs import difference_gain
from tf_lyapunov.local.scalable import Scalable
from tf_lyapunov.local.windowrows import on_windows, rows_behind
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.einsum import Contracted
from tf_lyapunov.program.families.linear import Linear
from tf_lyapunov.program.families.merging import Weighted
from tf_lyapunov.program.families.scaling import Scaled

UNIT = rounding.UNIT_ROUNDOFF["float64"]
_TINY = 1e-12
# Sides up to this have their eigenvalues computed in a search too.
_EXACT = 160
# Linearised maps are formed up to this smaller side, and with this many entries at once.
_SIDE, _ENTRIES = 2500, 2**24


def chords(step):
    """Bounds on (φ(t) - φ(z⁰))/(t - z⁰) over the box of an elementwise step, (*shape) each.

    On a linear piece the chord's slope is monotone in t, so that the ends of pieces hold its
    extremes; near z⁰, and where pieces are inexact, the slopes of the pieces bound it.
    """
    low, high = (s.copy() for s in step.slopes)
    p, index = step.pieces, step.columns
    if len(index) and not np.any(p.error):
        z = step.z[0]
        value = _value(p, z)
        least, most = np.full(z.shape, np.inf), np.full(z.shape, -np.inf)
        for k in range(len(p.slope)):
            start, stop, slope = p.start[k].min(0), p.stop[k].max(0), p.slope[k][0]
            for t in (start, stop):
                away = t - z
                far = np.abs(away) > 1e-6 * (1 + np.abs(z) + np.abs(t))
                chord = (slope * t + p.intercept[k][0] - value) / np.where(far, away, 1.0)
                least = np.where(far, np.minimum(least, chord), least)
                most = np.where(far, np.maximum(most, chord), most)
            close = 3e-6 * (1 + np.abs(z))  # all that is not far
            near = (start - close <= z) & (z <= stop + close)
            near &= stop > start
            least = np.where(near, np.minimum(least, slope), least)
            most = np.where(near, np.maximum(most, slope), most)
        # Chords start at z⁰ as computed; differences cancel to 10⁻⁶ of their numbers at most.
        room = 1e-8 * (np.abs(p.slope).max(axis=(0, 1)) + np.abs(p.intercept).max(axis=(0, 1)))
        low[index] = np.maximum(low[index], least - room)
        high[index] = np.minimum(high[index], most + room)
    return low, np.maximum(high, low)


def _value(p, z):
    """φ(z⁰) of exact pieces."""
    held = np.full(z.shape, np.nan)
    for k in range(len(p.slope)):
        inside = (p.start[k][0] <= z) & (z <= p.stop[k][0])
        held = np.where(inside, p.slope[k][0] * z + p.intercept[k][0], held)
    return np.where(np.isnan(held), p.slope[0][0] * z + p.intercept[0][0], held)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One term of (t): rows of a linearised map from one position.

    Attributes:
        k: position.
        rows: `Scalable`; behind a step with slopes, with s^½ in them.
        size: bound on their norm with all entries positive, products of the steps' own.
        wrong: bound on the norm of what rounding moved them by.
        moved: bound on how far what they read moves.
    """

    k: int
    rows: Scalable
    size: float
    wrong: float
    moved: float


class LocalGains:
    """(t) for one `Around`, step by step.

    Args:
        around: `Around`; its `steps` are read as they become known.
        estimates: dict of singular vectors of earlier searches, renewed.
    """

    def __init__(self, around, estimates=None):
        self.around = around
        self.middles, self.roots, self.signals = {}, {}, {}
        self.linearised, self.estimates = {}, {} if estimates is None else estimates
        # What (t) was made of: for the last radius, for spreads, and for steps' balls; see `forms`.
        self.term, self.spread, self.weighed = None, {}, {}

    def add(self, k):
        """Takes in the elementwise step that makes position k, whose relaxation is known."""
        around = self.around
        step = around.steps[k]
        if isinstance(step, (WindowMaximum, Curved)):
            self._add_several(k, step)
            return
        low, high = chords(step)
        self.middles[k] = (low + high) / 2
        spread = (high - low) / 2 * (1 + 8 * UNIT) + 4 * UNIT * np.maximum(
            np.abs(low), np.abs(high)
        )
        spread = np.where(high > low, spread, 0.0)
        self.roots[k] = np.sqrt(spread)
        source = around.flow.links[k - 1].inputs[0]
        self.signals[k] = self.radius(source, spread)
        self.spread[k] = None if self.term is None else (spread.ravel(), self.term)

    def _add_several(self, k, step):
        """Takes in outputs of several inputs each: their linear part and what it leaves, `spread`:
        means over the candidates of maxima, or slopes at the centre."""
        spread = step.spread()
        self.middles[k], self.roots[k] = step, np.sqrt(spread) * (1 + 4 * UNIT)
        source = self.around.flow.links[k - 1].inputs[0]
        self.signals[k] = self.radius(source, step.spread_back(spread))

    def radius(self, source, weights):
        """Bound on √(Σ w_i (z_i - z⁰_i)²) at a position, z⁰ as computed.

        Args:
            source: position.
            weights: float64 (n,) ≥ 0 over the flat sample.
        """
        weights = np.asarray(weights).ravel()
        used, self.term = np.flatnonzero(weights), None
        if not len(used):
            return 0.0
        roots = np.sqrt(weights[used])
        largest = rounding.product_up(
            roots.max(), min(self._radius_at(source), self._apart(source, used))
        )
        entries = roots * np.broadcast_to(self._entries_at(source), weights.shape)[used]
        entries = entries + rounding.TINY
        whole = min(largest, float(rounding.euclidean_norms_up(entries[None])[0]))
        if not self._is_worth(source, len(used)):
            return whole * (1 + _TINY)
        return min(whole, self._through(source, used, roots)) * (1 + _TINY)

    def weigh(self, k, weights):
        """`radius` for the weights of the ball of step k, whose terms are kept."""
        found = float(self.radius(self.around.flow.links[k - 1].inputs[0], weights))
        self.weighed.pop(k, None)
        if self.term is not None:
            self.weighed[k] = np.asarray(weights, np.float64).ravel(), self.term
        return found

    def _is_worth(self, source, rows):
        """Whether a linearised map of so many rows may be formed.

        On windows nothing is formed but its parts: by the input, and by the outputs of steps.
        """
        values = self.around.trace.values
        if on_windows(self.around, source) is None:
            side = min(rows, values[0].size)
            return side <= _SIDE and rows * max(v.size for v in values[: source + 1]) <= _ENTRIES
        parts = [np.count_nonzero(root) for k, root in self.roots.items() if k <= source]
        return all(min(rows, n) <= _SIDE and rows * n <= _ENTRIES for n in (values[0].size, *parts))

    def _apart(self, source, used):
        """How far differences of neighbours move, infinite if any of the units used is none."""
        part = difference_gain(self.around.flow, self.around.trace, source)
        if part is None:
            return np.inf
        gain, before = part
        width = self.around.trace.shape(source)[-1]
        if np.any(used % width < width // 2):
            return np.inf
        moved = rounding.product_up(gain, self._radius_at(before))
        return rounding.sum_up(moved, self._lost(before + 1, source))

    def _lost(self, first, last):
        return self.around.loss(first, last)

    def _radius_at(self, k):
        return self.around.radii[k]

    def _entries_at(self, k):
        return self.around.reach[k].ravel()

    def _noise_at(self, k):
        noise = self.around.trace.noise[k]
        return noise if np.ndim(noise) == 0 else float(rounding.euclidean_norms_up(noise)[0])

    def _through(self, source, used, roots):
        held, parts, lost = self.linearised.get(source, (np.zeros(0, int), (), 0.0))
        at = np.minimum(np.searchsorted(held, used), max(len(held) - 1, 0))
        if not len(held) or not np.array_equal(held[at], used):
            held, at = used, np.arange(len(used))
            parts, lost = self._linearise(source, used)
            self.linearised[source] = held, parts, lost
        largest = float(roots.max())
        total, terms = lost * largest, []
        for part in parts:
            norm = self._norm((source, part.k), part.rows, at, roots, part.wrong * largest)
            terms.append((part.k, norm, part.size * largest, part.moved))
            total += norm * part.moved
        total *= 1 + 1e-9
        self.term = total, lost * largest, tuple(terms)
        return total

    def _linearise(self, source, used):
        """`(parts, noise)`: for weights w of these units, t(w) is at most the sum of ‖w^½ A‖·t over
        the `Part`s, and of what values may err by, for w ≤ 1."""
        around = self.around
        rows = rows_behind(around, source, used)
        parts, lost = [], 0.0
        # Rows, their size with all entries positive, and what rounding moved them by.
        held = {source: (rows.units(), 1.0, 0.0)}
        for k in range(source, 0, -1):
            if k not in held:
                continue
            c, size, wrong = held.pop(k)
            link, length = around.flow.links[k - 1], _frobenius(c)
            lost += min(size, length + wrong) * self._noise_at(k)
            if k in self.middles:
                root = float(np.max(self.roots[k], initial=0.0))
                own = Scalable(rows.columns(k, c, self.roots[k]))
                off = (wrong + UNIT * length) * root * (1 + _TINY)
                parts.append(Part(k, own, size, off, self.signals[k]))
                found, grown, moved = self._through_middle(k, c, size, wrong, length, rows)
            elif around._linear(link):
                shapes, unit = around._shapes(link), rounding.gamma(around.sum_length, UNIT)
                found = rows.back(k, c)
                sums = absolute_norms(link.operation, shapes)
                grown = [size * n for n in sums]
                norms = maps.norms(link.operation, shapes)
                moved = [
                    wrong * min(n, s) + unit * length * s for n, s in zip(norms, sums, strict=True)
                ]
            else:
                parts.append(Part(k, Scalable(rows.columns(k, c)), size, wrong, self._radius_at(k)))
                continue
            for i, part, g, off in zip(link.inputs, found, grown, moved, strict=True):
                # What underflows of the rows.
                most = float(np.max(self._entries_at(i), initial=0.0))
                lost += rounding.TINY * len(used) * around.values[i].size * most
                off += rounding.TINY * len(used) * around.values[i].size
                if i in held:
                    other, before, apart = held[i]
                    off += apart + UNIT * (_frobenius(other) + _frobenius(part))
                    part, g = other + part, before + g
                held[i] = part, g, off * (1 + _TINY)
        if 0 in held:
            c, size, wrong = held[0]
            parts.append(Part(0, Scalable(rows.columns(0, c)), size, wrong, self._radius_at(0)))
        return parts, lost

    def _through_middle(self, k, c, size, wrong, length, rows):
        """Rows before a step that is not linear, by its linear part; their sizes and errors."""
        middle = self.middles[k]
        if isinstance(middle, (WindowMaximum, Curved)):
            shape = self.around.trace.shape(self.around.flow.links[k - 1].inputs[0])
            found = middle.mean_back(c.reshape(len(c), -1)).reshape(-1, *shape)
            unit = rounding.gamma(self.around.sum_length, UNIT)
            return [found], [size * middle.growth], [(wrong + unit * length) * middle.growth]
        most = float(np.max(np.abs(middle), initial=0.0))
        moved = (wrong + UNIT * length) * most
        return [rows.scaled(k, c, middle)], [size * (most + 1)], [moved]

    def _norm(self, key, rows, at, roots, wrong):
        """‖diag(roots)·A[at]‖ from above: of what was computed of A, plus what rounding moved."""
        sides = len(at), rows.matrix.shape[1]
        if not all(sides):
            return 0.0
        if self.around.dtype != np.float64 and min(sides) > _EXACT:
            # Of a search, which proves nothing.
            found, self.estimates[key] = rows.estimate(at, roots, self.estimates.get(key))
            return found
        scaled = 4 * UNIT * rows.size * float(roots.max())
        return rows.norm(at, roots) + wrong + scaled + rounding.TINY * math.prod(sides)


def _frobenius(c):
    """‖c‖_F from above."""
    flat = np.asarray(c, np.float64).reshape(1, -1)
    return float(rounding.euclidean_norms_up(flat)[0])


def absolute_norms(operation, shapes):
    """Bounds on the norms of |W_k|, by Schur's test, √(largest row sum · largest column sum)."""
    return _absolute(maps._Kept(operation), tuple(tuple(s) for s in shapes))


_CACHE = {}


def _absolute(kept, shapes):
    key = (id(kept.operation), shapes)
    held = _CACHE.get(key)  # threads of a worker share it
    if held is None or held[0] is not kept.operation:
        found = []
        for i in range(len(shapes)):
            ones = [np.ones((1, *s)) if i == j else np.zeros((1, *s)) for j, s in enumerate(shapes)]
            rows = maps.absolute(kept.operation, ones)
            # The sum of |W|ᵀ1 over outputs bounds every column's.
            column = column_sums(kept.operation, shapes, i)
            found.append(float(np.sqrt(rows.max() * column)) * (1 + 1e-9))
        if len(_CACHE) > 512:
            _CACHE.clear()
        held = _CACHE[key] = kept.operation, tuple(found)
    return held[1]


def column_sums(operation, shapes, i):
    """Largest column sum of |W_i|."""
    ones = np.ones((1, *maps.applied_shape(operation, shapes)))
    if isinstance(operation, (Linear, Contracted)):
        operation = dataclasses.replace(operation, kernel=np.abs(operation.kernel))
    elif isinstance(operation, Weighted):
        operation = Weighted(tuple(map(abs, operation.weights)))
    elif isinstance(operation, Scaled):
        operation = dataclasses.replace(operation, scale=np.abs(operation.scale))
    return float(maps.adjoint(operation, ones, shapes)[i].max())
