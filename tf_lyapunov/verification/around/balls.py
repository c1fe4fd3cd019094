"""How far signals move from those at the centre in l2, from the chords that boxes leave.

On its box, an activation moves from φ(z⁰) by m(z - z⁰) + ψ with |ψ_i| ≤ s_i|z_i - z⁰_i|: m the
middle and s half the spread of the slopes of its chords from z⁰. So with J the linearised map from
the input, J_j that from step j's output, and weights w on a signal z,

    √(Σ w_i (z_i - z⁰_i)²) ≤ ‖w^½ J‖ r + Σ_j ‖w^½ J_j s_j^½‖ t_j,                            (T)

t_j the same bound for the weights s_j on what step j reads: ψ_j = s_j^½ (s_j^½ δ) with |δ| at most
the signal's own distance. The maps are rows that are carried back, `functionals`, with what their
rounding may miss of every entry, and what underflows, below `TINY` each; maxima pass their ball by
its gain.

Of a part of a signal within a window, behind convolutions, the same window's share of the input is
what moves it, by the gain of the convolution on that window.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.arithmetic import (
    SLACK,
    TINY,
    UNIT,
    gamma,
    norm_near,
    product_up,
    row_norms_up,
    sum_up,
)
from tf_lyapunov.verification.around import functionals
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.pairs import difference
from tf_lyapunov.verification.operations import (
    Activation,
    Axis,
    Convolution,
    Identity,
    Linear,
    Scale,
)

# Sides, and entries of rows on a signal, up to which linearised maps are worth their time.
_SIDE, _ENTRIES = 2500, 2**24
# Chords over less than this share of their numbers' size are not told from slopes.
_NEAR = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One term of (T): rows of a linearised map, from what a step makes or from the input.

    Attributes:
        name: of the step, or None for the input.
        rows: float64 (units, columns); an activation's hold its s_j^½ already.
        columns: int (columns,), flat units of what the rows read, of the input alone.
        moved: t_j, how far what they read moves.
    """

    name: str | None
    rows: np.ndarray
    columns: np.ndarray
    moved: float


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """What the bound (T) of one signal was made of.

    Attributes:
        total: T, at least `off` and Σ norms_j·moved_j together.
        off: what rounding misses.
        roots: float64 (units,), w^½ of the rows of the parts.
        parts: tuple of `Part`.
        norms: tuple of floats, at least ‖w^½·rows‖ of each.
    """

    total: float
    off: float
    roots: np.ndarray
    parts: tuple
    norms: tuple


class Gains:
    """Gains of a network's steps, and of convolutions on windows of their outputs.

    Args:
        own: dict of the gain of every step alone, as `Network.gains` gives them.
    """

    def __init__(self, own):
        self.own, self.cut = own, {}

    def __getitem__(self, name):
        return self.own[name]

    def on_window(self, step, extents):
        """Gain of a convolution to outputs within a window of these sizes, wherever it lies."""
        key = step.name, extents
        if key not in self.cut:
            # A part of a map, of an input without an edge.
            axes = tuple(
                Axis(a.taps, a.stride, a.dilation,
                     (n - 1) * a.stride + (a.taps - 1) * a.dilation + 1, 0, n)
                for a, n in zip(step.operation.axes, extents, strict=True)
            )  # fmt: skip
            found = dataclasses.replace(step.operation, axes=axes).gain()
            self.cut[key] = min(found, self.own[step.name])
        return self.cut[key]


class Balls:
    """(T) for `Surroundings`, step by step.

    Args:
        around: `Surroundings`, of which only steps that are known are read.
    """

    def __init__(self, around):
        self.around = around
        self.middles, self.roots, self.moves, self.maps = {}, {}, {}, {}
        self.apart = {}
        # What (T) was made of, for `joint`: of the last radius, of the s_j^½, and of balls.
        self.term, self.terms, self.weighed = None, {}, {}

    def add(self, name, source, relaxed):
        """Takes in an activation, with the box of what it reads."""
        low, high = chords(relaxed)
        middle = low / 2 + high / 2
        spread = np.maximum(high - middle, middle - low) * (1 + 4 * UNIT)
        spread = np.where(high > low, spread, 0.0)
        shape = relaxed.shape
        self.middles[name] = middle.reshape(shape)
        # A root's square lies within a rounding of what it is the root of.
        self.roots[name] = (np.sqrt(spread) * (1 + 4 * UNIT)).reshape(shape)
        self.moves[name] = self.radius(source, self.roots[name].reshape(-1))
        self.terms[name] = self.term

    def weigh(self, name, source, roots):
        """`radius` for the ball of a step, whose `Term` is kept."""
        found = self.radius(source, roots)
        self.weighed[name] = self.term
        return found

    def radius(self, source, roots):
        """Bound on √(Σ w_i (z_i - z⁰_i)²) for the signal of a step.

        Args:
            source: name of the step.
            roots: float64 (m,) ≥ 0, w^½.
        """
        around, units, self.term = self.around, np.flatnonzero(roots), None
        if not len(units):
            return 0.0
        roots = roots[units]
        largest = float(roots.max())
        entries = roots * around.reach(source).reshape(-1)[units] + TINY
        whole = min(
            product_up(largest, around.radii[source]),
            product_up(largest, self.differences(source, units)),
            float(row_norms_up(entries[None])[0]),
        )
        sizes = [around.values[name].size for name in self._before(source)]
        entries = len(units) * max(sizes)
        if min(len(units), around.region.center.size) > _SIDE or entries > _ENTRIES:
            return whole
        found = self._through(source, units, roots)
        if not found <= whole:
            self.term = None
        return min(whole, found)

    def differences(self, source, units, window=None):
        """Bound on how far differences of neighbours move, within a window; infinite if any of the
        units is none."""
        around, step = self.around, self.around.steps[source]
        half = around.steps[source].shape[-1] // 2
        if step.operation is None or not np.all(units % (2 * half) >= half):
            return np.inf
        before = around.steps[step.inputs[0]]
        if source not in self.apart:
            found = difference(before.operation, step.operation)
            if found is not None:
                # No text: a layer cannot have this name.
                name = source, "difference"
                found = dataclasses.replace(step, name=name, inputs=before.inputs, operation=found)
                around.gains.own.setdefault(found.name, found.operation.gain())
            self.apart[source] = found
        apart = self.apart[source]
        if apart is None:
            return np.inf
        read = apart.inputs[0]
        if window is None:
            moved = product_up(around.gains[apart.name], around.radii[read])
        else:
            gain, window = self._reads(apart, window)
            moved = product_up(gain, self.within(read, window))
        noise = (around.spreads[k][1].reshape(1, -1) for k in (before.name, source))
        return sum_up(moved, *(float(row_norms_up(n)[0]) for n in noise))

    def _reads(self, step, window):
        """`(gain, window)` of a convolution to a window of its outputs: of the inputs there."""
        extents, before = [], []
        shape = self.around.steps[step.inputs[0]].shape
        for (a, b), axis, size in zip(window, step.operation.axes, shape, strict=False):
            extents.append(b - a)
            left = a * axis.stride - axis.left
            last = (b - 1) * axis.stride - axis.left + (axis.taps - 1) * axis.dilation
            before.append((min(max(left, 0), size), max(min(last + 1, size), 0)))
        gain = self.around.gains.on_window(step, tuple(extents))
        return gain, tuple((min(a, b), b) for a, b in before)

    def within(self, name, window):
        """Bound on the l2 distance of a signal's part within a window from that at the centre."""
        around, step = self.around, self.around.steps[name]
        cut = tuple(slice(a, b) for a, b in window)
        entries = float(row_norms_up(around.reach(name)[cut].reshape(1, -1))[0])
        found = min(around.radii[name], entries)
        operation = step.operation
        if isinstance(operation, Convolution):
            gain, window = self._reads(step, window)
        elif isinstance(operation, Activation):
            gain = around.relaxed[name].steepest()
        elif isinstance(operation, (Scale, Identity)) or (
            isinstance(operation, Linear) and len(step.shape) > 1
        ):
            gain = around.gains[name]
        else:
            return found
        moved = product_up(gain, self.within(step.inputs[0], window))
        noise = float(row_norms_up(around.spreads[name][1].reshape(1, -1))[0])
        return min(found, sum_up(moved, noise))

    def _before(self, source):
        order = self.around.order
        return order[: order.index(source) + 1]

    def _through(self, source, units, roots):
        held, parts, lost = self.maps.get(source, (units[:0], [], None))
        if not np.array_equal(held, units):
            parts, lost = self._linearised(source, units)
            self.maps[source] = units, parts, lost
        total = float(row_norms_up((roots * lost)[None])[0])
        total += TINY * sum(part.moved for part in parts)
        off, norms = total * SLACK, []
        for part in parts:
            norms.append(norm_near(roots[:, None] * part.rows))
            total = sum_up(total, product_up(norms[-1], part.moved))
        self.term = Term(total * SLACK, off, roots, tuple(parts), tuple(norms))
        return total * SLACK

    def _linearised(self, source, units):
        """`(parts, lost)`: matrices with rows of `units`, each with how far what it reads moves,
        and what rounding misses of every row."""
        around = self.around
        shape = around.values[source].shape
        rows = np.zeros((len(units), int(np.prod(shape))))
        rows[np.arange(len(units)), units] = 1.0
        held = {source: Functionals(rows.reshape(len(units), *shape))}
        parts, lost = [], np.zeros(len(units))
        for name in reversed(self._before(source)[1:]):
            if name not in held:
                continue
            c, step = held.pop(name), around.steps[name]
            # What the step's own evaluation errs by, and what rounding misses of the rest.
            size, noise = around.spreads[name]
            lost += gamma(around.terms) * 4 * _dot(np.abs(c.rows), c.of(size))
            lost += _dot(np.abs(c.rows), c.of(noise))
            if name in self.middles:
                parts.append(_part(name, c.rows * c.of(self.roots[name]), self.moves[name]))
                found = [Functionals(c.rows * c.of(self.middles[name]), c.window)]
            elif functionals.is_linear(step.operation):
                shapes = [around.steps[i].shape for i in step.inputs]
                found = functionals.back(step.operation, c, shapes, step.shape)
            else:
                parts.append(_part(name, c.rows, around.radii[name]))
                continue
            for before, part in zip(step.inputs, found, strict=True):
                lost += TINY * float(np.sum(around.reach(before)))
                held[before] = (
                    held[before].plus(part, around.steps[before].shape) if before in held else part
                )
        first = held.pop(around.order[0], None)
        if first is not None:
            whole = first.whole(around.region.center.shape)
            parts.append(_part(None, whole.rows, around.region.l2_radius()))
        return parts, lost


def chords(relaxed):
    """Bounds `(low, high)` of (φ(t) - φ(z⁰))/(t - z⁰) over the box, float64 (m,) each.

    On a line the chord's slope is monotone in t on either side of z⁰, so that the ends of pieces
    hold the extremes; where one lies close to z⁰, or pieces are no lines, slopes of φ bound it.
    """
    p, z = relaxed.pieces, relaxed.center
    low, high = p.low.copy(), p.high.copy()
    value, known = np.zeros_like(z), np.zeros(z.shape, bool)
    for k in range(len(p.slope)):
        inside = (p.start[k] <= z) & (z <= p.stop[k])
        value = np.where(inside & ~known, p.slope[k] * z + p.shift[k], value)
        known |= inside
    least, most = np.full(z.shape, np.inf), np.full(z.shape, -np.inf)
    for k in range(len(p.slope)):
        holds = (p.start[k] <= z) & (z <= p.stop[k])
        least = np.where(holds, np.minimum(least, p.slope[k]), least)
        most = np.where(holds, np.maximum(most, p.slope[k]), most)
        for t in (p.start[k], p.stop[k]):
            away = t - z
            known &= np.abs(away) > _NEAR * (1 + np.abs(z) + np.abs(t))
            chord = (p.slope[k] * t + p.shift[k] - value) / np.where(away == 0, 1.0, away)
            least, most = np.minimum(least, chord), np.maximum(most, chord)
    known &= np.all(p.error == 0, axis=0)
    # Numbers cancel to `_NEAR` of their size at most: of 10 roundings, 10⁻⁹ of the steepest slope.
    room = 1e-8 * (np.abs(p.slope).max(axis=0) + np.abs(p.shift).max(axis=0))
    low = np.where(known, np.maximum(low, least - room), low)
    return low, np.maximum(np.where(known, np.minimum(high, most + room), high), low)


def _part(name, rows, moved):
    """`Part` of rows on a signal; columns without an entry change no norm."""
    flat = rows.reshape(len(rows), -1)
    columns = np.flatnonzero(np.any(flat != 0, axis=0))
    return Part(name, flat[:, columns], columns, moved)


def _dot(rows, value):
    return rows.reshape(len(rows), -1) @ value.reshape(-1)
