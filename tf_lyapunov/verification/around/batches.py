"""Lower bounds of rows of the logits on many boxes of the input at once.

For networks of affine steps and activations, by NumPy's products of whole arrays. On every box an
activation stands between two lines,

    a t + b ≤ φ(t) ≤ a' t + b'   for l ≤ t ≤ u,     (B)

with any a and a', and for any row c, with c = c⁺ + c⁻, c⁺ ≥ 0 ≥ c⁻ entry by entry,

    cᵀφ(z) ≥ (c⁺a + c⁻a')ᵀz + c⁺ᵀb + c⁻ᵀb'.

A pass lowers a row of a signal to one of the input, step by step: adjoints of affine steps, (B) at
activations; on a box the least of a row is that of its entries. The boxes of (B) are found so, unit
by unit, from those of the steps before; nothing comes from elsewhere. What holds on a box holds on
each part of it, so that parts inherit boxes, and only units that are bent on theirs have passes.

Rounding. The lines of (B) are computed so that they hold as the floats that they are (`lines`). A
pass is a chain of inequalities about the very rows that it computes: at an affine step y = Wx + b
the computed row errs by γ_n|W|ᵀ|c| at most, which changes its value by γ_n|c|ᵀ|W|s for |x| ≤ s, and
cᵀb by γ_n|c|ᵀ|b|; at an activation each entry is one product, which errs by u|g||z|, and the sum of
the constants by γ_n|c|ᵀmax(|b|, |b'|); at the input the sum errs by γ_n of the sizes of its terms.
So γ_N of all these sizes, N the longest sum and the number of steps together, is taken off. They
are at most |c|ᵀS for the row c that a pass begins with, where, once for all boxes of the region,

    S = 4s at the input,   S_y = 2(|W|s + |b|) + |W|S_x,   S_φ = 4h + σ(2s_z + S_z),        (S)

h a bound on |b| and |b'|, σ on |a| and |a'|: a step's row is at most |W|ᵀ|c| or σ|c|, up to the
rounding that a factor stands for. Errors of W and b themselves add up in the same way.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.arithmetic import SLACK, TINY, UNIT, down, gamma, up
from tf_lyapunov.verification.around import functionals
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.relaxation import Relaxation
from tf_lyapunov.verification.operations import Activation

# What is added for numbers that underflow, and beyond which sizes are not trusted.
_TINY, _LARGEST = 2.0**-400, 2.0**400
# More than computed values of activations err by, relative to 1 + |t|.
_NOISE = 2.0**-40
# Entries of one block of rows at the widest step: a core's own cache holds a few such.
_BLOCK = 2**14
# Entries of the rows of a signal's units in what its step reads, at most, to be kept.
_TABLE = 2**22


def is_covered(network):
    """Whether all steps up to a network's logits are affine or activations."""
    for step in network.steps[1:]:
        operation = step.operation
        if not (isinstance(operation, Activation) or functionals.is_linear(operation)):
            return False
        if step.name == network.logits:
            break
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """(B) of one activation on boxes, float64 (boxes, units); a shift of None is zero."""

    low_slope: np.ndarray
    low_shift: np.ndarray | None
    high_slope: np.ndarray
    high_shift: np.ndarray

    def of(self, boxes):
        """Those of some boxes."""
        return Lines(*(v if v is None else np.take(v, boxes, axis=0) for v in vars(self).values()))


class Boxes(dict):
    """`(low, high)`, float64 (boxes, units), by names of signals that activations read."""

    def take(self, index):
        """Those of some boxes, of which the same may be wanted several times."""
        return Boxes({
            name: tuple(np.take(v, index, axis=0) for v in ends) for name, ends in self.items()
        })  # fmt: skip


class Batches:
    """Bounds on boxes within one region.

    Args:
        around: `Surroundings` of the region, a box, for a network that `is_covered`.
    """

    def __init__(self, around):
        self.around, self.steps, self.order = around, around.steps, around.order
        self.target = around.network.logits
        self.first = self.order[0]
        self.rounding = gamma(around.terms) * SLACK * (1 + gamma(around.terms))
        self.widths = {name: around.values[name].size for name in self.order}
        self.widest = max(self.widths.values())
        # Activations by the signal that they read, and signals that no activation is before.
        self.readers, self.affine = {}, {self.first: True}
        for name in self.order[1:]:
            step = self.steps[name]
            bends = name in around.relaxed
            self.affine[name] = not bends and all(self.affine[i] for i in step.inputs)
            if bends:
                self.readers.setdefault(step.inputs[0], []).append(name)
        self._sum_up()
        self._rows, self._tables = {}, {}

    @property
    def numbers(self):
        """Numbers that `Boxes` hold of one box."""
        return sum(2 * self.widths[name] for name in self.readers)

    def _sum_up(self):
        """What rounding may take from a row of each signal, per |c|: γ_N·S of (S), and doubts."""
        around = self.around
        grown = (1 + gamma(around.terms)) * SLACK
        own = around.size(self.first)[None]
        sizes, doubts = {self.first: 4 * own}, {self.first: np.zeros_like(own)}
        # What a pass sums up at each step, beside what it does at those before.
        self.own = {self.first: 4 * own.reshape(-1)}
        for name in self.order[1:]:
            step = self.steps[name]
            before, doubted = ([held[i] for i in step.inputs] for held in (sizes, doubts))
            if functionals.is_linear(step.operation):
                own, doubt = 2 * around.sizes[name][None], around.doubts[name]
                sizes[name] = (own + functionals.absolute(step.operation, before)) * grown
                doubt = 0.0 if doubt is None else doubt[None]
                doubts[name] = (doubt + functionals.absolute(step.operation, doubted)) * grown
            else:
                steepest = step.operation.gain()
                reach = around.size(step.inputs[0])[None]
                # What lines reach at an end, and their slopes take back from there to zero.
                height = around.size(name) + around.relaxed[name].heights.reshape(step.shape)
                height = 2 * (height[None] + 4 * steepest * reach) + _NOISE * (1 + reach)
                own = 4 * height + 2 * steepest * reach
                sizes[name] = (own + steepest * before[0]) * grown
                doubts[name] = steepest * doubted[0] * grown
            self.own[name] = np.broadcast_to(own, (1, *step.shape)).reshape(-1)
        self.lost, self.doubted = {}, {}
        for name in self.order:
            size, doubt = (held[name].reshape(-1) for held in (sizes, doubts))
            with np.errstate(over="ignore"):
                size = np.where(size <= _LARGEST, size, np.inf)
            self.doubted[name] = doubt * SLACK
            self.lost[name] = (self.rounding * size + doubt) * SLACK

    # Boxes --------------------------------------------------------------------------------------

    def whole(self):
        """`Boxes` of the region, as one box."""
        return Boxes({
            name: tuple(v.reshape(1, -1) for v in self.around.boxes[name]) for name in self.readers
        })  # fmt: skip

    def renewed(self, low, high, known):
        """`Boxes` on parts of the region.

        Args:
            low, high: float64 (boxes, inputs), of the input.
            known: `Boxes` that hold theirs.
        """
        return self._renewed(low, high, known)[0]

    def _renewed(self, low, high, known):
        """`(Boxes, Lines by activation)`."""
        found, held = Boxes(), {}
        for name in self.order[1:]:
            if name in self.around.relaxed:
                (source,) = self.steps[name].inputs
                if source not in found:
                    found[source] = self._box(source, low, high, known[source], held)
                held[name] = lines(self.steps[name].operation, *found[source])
        return found, held

    def _box(self, source, low, high, known, held):
        least, most = known
        if source == self.first:
            return np.maximum(least, low), np.minimum(most, high)
        if self.affine[source]:
            rows, shift = self._affine(source)
            plus, minus = np.maximum(rows, 0.0).T, np.minimum(rows, 0.0).T
            lost = self.lost[source] + _TINY
            found = down(low @ plus + high @ minus + (shift - lost))
            other = up(high @ plus + low @ minus + (shift + lost))
            # NaN of overflows proves nothing.
            return np.fmax(least, found), np.fmin(most, other)
        bent = np.zeros(least.shape, bool)
        for name in self.readers[source]:
            bent |= bends(self.steps[name].operation, least, most)
        least, most = least.copy(), most.copy()
        box, unit = np.nonzero(bent)
        width = max(self.widths[n] for n in self.order[: self.order.index(source)])
        count = max(_BLOCK // (2 * width), 64)
        for start in range(0, len(box), count):
            some, units = box[start : start + count], unit[start : start + count]
            found = self._units(source, some, units, low, high, held)
            least[some, units] = np.maximum(least[some, units], found[0])
            most[some, units] = np.minimum(most[some, units], -found[1])
        # Both ends hold: they cross nowhere but where there is nothing between them.
        return least, np.maximum(most, least)

    def _affine(self, source):
        """`(rows, shift)` of an affine signal y = rows·x + shift."""
        if source not in self._rows:
            rows, shift = self._back({source: np.eye(self.widths[source])[None]}, source, None, {})
            self._rows[source] = rows[0], shift[0]
        return self._rows[source]

    def _units(self, source, box, unit, low, high, held):
        """Bounds of units, one on each box, and of their negatives: (2, pairs)."""
        step = self.steps[source]
        table = self._table(source) if len(step.inputs) == 1 else None
        if table is None:
            c = np.zeros((2, len(unit), self.widths[source]))
            c[0, np.arange(len(unit)), unit], c[1, np.arange(len(unit)), unit] = 1.0, -1.0
            at, shift = source, 0.0
        else:
            c = np.take(table[0], unit, axis=0)
            c, at = np.stack([c, -c]), step.inputs[0]
            shift = table[1][unit]
        rows, constant = self._back({at: c}, at, box, held)
        constant[0] += shift
        constant[1] -= shift
        lost = self.lost[source][unit] + _TINY
        return _proved(self._at_input(rows, box, low, high) + constant - lost)

    def _table(self, source):
        """`(rows, shift)` of an affine step with one input, or None if it is large."""
        if source not in self._tables:
            step, width = self.steps[source], self.widths[source]
            self._tables[source] = None
            (before,) = step.inputs
            if width * self.widths[before] <= _TABLE and functionals.is_linear(step.operation):
                rows, shift = self._through(step, np.eye(width)[None])
                self._tables[source] = rows[0][0], shift[0]
        return self._tables[source]

    # Passes -------------------------------------------------------------------------------------

    def lower(self, low, high, known, rows):
        """Lower bounds of rows of the logits on boxes, float64 (boxes, r).

        Args:
            low, high: float64 (boxes, inputs), of the input.
            known: `Boxes` that hold theirs.
            rows: float64 (r, logits).
        """
        _, held = self._renewed(low, high, known)
        c = np.broadcast_to(rows[:, None], (len(rows), len(low), rows.shape[1]))
        size = np.zeros(c.shape[:2])
        slopes, constant = self._back({self.target: c}, self.target, None, held, size)
        size += np.abs(slopes) @ self.own[self.first]
        # What was summed up indeed is often far less than (S) says.
        doubt = (np.abs(c) @ self.doubted[self.target]) * (1 + gamma(rows.shape[1] + 8))
        size = np.where(size <= _LARGEST, size, np.inf)
        lost = (self.rounding * size + doubt) * SLACK + _TINY
        return _proved(self._at_input(slopes, None, low, high) + constant - lost).T

    def _at_input(self, rows, box, low, high):
        if box is not None:
            low, high = np.take(low, box, axis=0), np.take(high, box, axis=0)
        return np.einsum("kbi,kbi->kb", rows, np.where(rows > 0, low, high))

    def _back(self, rows, target, box, held, size=None):
        """What passes make of rows of a signal.

        Args:
            rows: dict from the target's name to float64 (k, pairs, units).
            box: int (pairs,), each one's box, or None where pairs are boxes.
            held: `Lines` by name.
            size: float64 (k, pairs), to which the sizes of what is summed up are added, or None.

        Returns:
            `(rows, constant)`: float64 (k, pairs, inputs) and (k, pairs).
        """
        constant = np.zeros(rows[target].shape[:2])
        for name in reversed(self.order[1 : self.order.index(target) + 1]):
            if name not in rows:
                continue
            c, step = rows.pop(name), self.steps[name]
            if size is not None:
                size += np.abs(c) @ self.own[name]
            if name in held:
                own = held[name] if box is None else held[name].of(box)
                plus = np.maximum(c, 0.0)
                minus = c - plus
                constant += np.einsum("kbi,bi->kb", minus, own.high_shift)
                if own.low_shift is not None:
                    constant += np.einsum("kbi,bi->kb", plus, own.low_shift)
                plus *= own.low_slope
                minus *= own.high_slope
                plus += minus
                found = [plus]
            else:
                found, shift = self._through(step, c)
                constant += shift
            for source, part in zip(step.inputs, found, strict=True):
                rows[source] = rows[source] + part if source in rows else part
        c = rows.get(self.first)
        if c is None:
            c = np.zeros((*constant.shape, self.widths[self.first]))
        return c, constant

    def _through(self, step, c):
        """Wᵀc for every input of an affine step, and cᵀb."""
        shape = c.shape[:2]
        shift = functionals.offset(step.operation)
        constant = 0.0
        if shift is not None:
            constant = c @ np.broadcast_to(shift, step.shape).reshape(-1)
        shaped = Functionals(c.reshape(-1, *step.shape))
        shapes = [self.steps[i].shape for i in step.inputs]
        found = functionals.back(step.operation, shaped, shapes, step.shape)
        return [
            part.whole(s).rows.reshape(*shape, -1) for part, s in zip(found, shapes, strict=True)
        ], np.broadcast_to(constant, shape)


def _proved(bound):
    return np.where(np.isfinite(bound), down(bound), -np.inf)


def _leak(operation):
    """Slopes below zero of a function that is t above it and convex, flat, or None for others."""
    if operation.slopes_at is not None:
        slopes = operation.slopes_at.reshape(-1)
    elif operation.name in ("relu", "leaky_relu") and operation.parameters.get("max_value") is None:
        slopes = np.array([float(operation.parameters.get("negative_slope", 0.0))])
    else:
        return None
    return slopes if np.all((slopes >= 0) & (slopes <= 1)) else None


def bends(operation, low, high):
    """Where an `Activation` may be no line on boxes, bool (boxes, units)."""
    return (low < 0) & (high > 0) if _leak(operation) is not None else low < high


def lines(operation, low, high):
    """`Lines` of an `Activation` on boxes low ≤ t ≤ high, (boxes, units), that hold as they are.

    max(t, s·t), 0 ≤ s ≤ 1, is at least either line, and at most any that is at its height or above
    it at both ends. Of others the least of φ(t) - a t over the ends of `pieces` is taken. What is
    computed at an end errs by less than 8u times the sizes of its terms, which shifts it.
    """
    slopes = _leak(operation)
    reach = np.maximum(np.abs(low), np.abs(high))
    if slopes is None:
        return _any_lines(operation, low, high, reach)
    is_bent = (low < 0) & (high > 0)
    share = np.where(is_bent, high, 1.0) / np.where(is_bent, high - low, 1.0)
    above = np.where(is_bent, slopes + (1 - slopes) * share, np.where(low >= 0, 1.0, slopes))
    shift = np.maximum(high - above * high, slopes * low - above * low)
    room = 8 * UNIT * (1 + above) * reach * SLACK + TINY
    below = np.where(is_bent, np.where(high > -low, 1.0, slopes), above)
    return Lines(below, None, above, np.where(is_bent, shift + room, 0.0))


def _any_lines(operation, low, high, reach):
    count, shape = len(low), low.shape
    if operation.slopes_at is not None:
        slopes = np.tile(operation.slopes_at.reshape(-1), count)
        operation = dataclasses.replace(operation, slopes_at=slopes)
    low, high, reach = low.reshape(-1), high.reshape(-1), reach.reshape(-1)
    relaxed = Relaxation(operation, np.clip(low / 2 + high / 2, low, high), low, high)
    p, found = relaxed.pieces, []
    for sign, slope in zip((1.0, -1.0), relaxed.starts, strict=True):
        slope = np.clip(slope, *operation.slopes())
        ends = [sign * (p.slope * t + p.shift - slope * t) for t in (p.start, p.stop)]
        least = (np.minimum(*ends) - p.error).min(axis=0)
        room = 8 * UNIT * (relaxed.heights + np.abs(slope) * reach) * SLACK + TINY
        found += [slope.reshape(shape), (sign * (least - room)).reshape(shape)]
    return Lines(*found)
