"""What is known of every signal around one point: balls, boxes, relaxations; and the passes.

`Around` holds a flow's values z⁰ at the centre of a region and, position by position, elementwise
bounds D on the distance from it and an l2 bound ρ. Lower bounds of linear functions of a position
come from one pass backwards (`lower`), in which every linear operation applies its adjoint, every
elementwise step its relaxation (L), and any other step its gain,

    cᵀy ≥ cᵀy⁰ - ‖c‖·ρ_y.

Rounding. The computed adjoint ĉ of a linear step y = Wx + b errs by δ with |δ| ≤ γ_n|W|ᵀ|c|, so
that cᵀy ≥ ĉᵀx + cᵀb - γ_n|c|ᵀ(|W|X + |b|) for |x| ≤ X. Whatever n is, and in whatever order sums
are taken, the whole pass errs by at most γ_N of the sum of such sizes, N the longest of its sums
plus the number of its steps: one number per row, which `lower` subtracts. The sizes themselves are
sums of non-negative numbers.
"""

import math
import time

import numpy as np

from tf_lyapunov.local import gains, maps
from tf_lyapunov.local.curved import Curved
from tf_lyapunov.local.flow import Whole, gain_of
from tf_lyapunov.local.maxima import WindowMaximum, is_window_maximum, windows_of
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.local.relaxed import is_curved
from tf_lyapunov.program import rounding

UNIT = rounding.UNIT_ROUNDOFF["float64"]
_MARGIN = 1 + 1e-9


class OutOfTime(Exception):
    """The time of a search is up; what was proved before stands."""


class Around:
    """A flow around the centre of a region.

    Args:
        flow: `Flow`.
        traced: `Trace` at the region's centre.
        region: `Region`.
        dtype: float32 for a search, whose bounds prove nothing; float64 for proofs.
        deadline: `time.monotonic()` after which a pass raises `OutOfTime`.

    Attributes:
        values: list of arrays (1, *shape) of this dtype.
        heights: list of their sizes and largest absolute values.
        reach: list of float64 (1, *shape), D per position (None until it is known).
        radii: list of float, ρ per position.
        steps: dict from positions of elementwise outputs to `Elementwise`.
    """

    def __init__(self, flow, traced, region, dtype=np.float64, deadline=math.inf):
        self.flow, self.trace, self.region = flow, traced, region
        self.dtype, self.deadline = np.dtype(dtype), deadline
        self.values = [v.astype(dtype, copy=False) for v in traced.values]
        self.heights = [(v.size, float(np.max(np.abs(v), initial=0.0))) for v in self.values]
        self.reach = [region.reach()[None].astype(dtype)]
        self.radii = [region.l2_radius()]
        self.boxes, self.tightened = {}, set()
        self.steps = {}
        self.sizes = [None]
        longest = max(
            [maps.terms(k.operation, self._shapes(k)) for k in flow.links if self._linear(k)],
            default=0,
        )
        widths = [math.prod(v.shape[1:]) for v in traced.values]
        # Maxima are summed over the cells of all their windows.
        widths += [
            windows_of(k.operation, traced.shape(k.inputs[0]))[0].size
            for k in flow.links
            if is_window_maximum(k.operation)
        ]
        self.sum_length = longest + max(widths) + 200 * (len(flow.links) + 10)

    def _shapes(self, link):
        return [self.trace.shape(k) for k in link.inputs]

    def _linear(self, link):
        return not isinstance(link.operation, Whole) and maps.is_linear(link.operation)

    # Forwards ---------------------------------------------------------------------------------

    def advance(self, k):
        """Fills in position k (from 1 on), whose inputs are known, by intervals and gains."""
        link = self.flow.links[k - 1]
        operation, noise = link.operation, self.trace.noise[k]
        reads = [self.reach[i] for i in link.inputs]
        radii = [self.radii[i] for i in link.inputs]
        size = None
        if self._linear(link):
            shapes = self._shapes(link)
            reach = maps.absolute(operation, reads)
            radius = maps.radius(operation, shapes, radii)
            # A linear operation is evaluated anew: its rounding is relative to what it sums up.
            reach = reach * (1 + rounding.gamma(maps.terms(operation, shapes) + 8, UNIT))
            size = maps.size_up(
                operation, [np.abs(self.values[i]) + self.reach[i] for i in link.inputs]
            )
        elif k in self.steps:
            low, high = self.steps[k].range()
            value = self.values[k]
            self.boxes[k] = np.minimum(low, value), np.maximum(high, value)
            reach = np.maximum(high - value, value - low)
            if has_pieces(operation):
                steepest = max(float(np.max(np.abs(s), initial=0.0)) for s in self.steps[k].slopes)
                radius = rounding.product_up(steepest, radii[0])
            else:
                radius = gains.radius(operation, self._shapes(link), radii)
                if isinstance(self.steps[k], Curved):
                    radius = min(radius, rounding.product_up(self.steps[k].gain, radii[0]))
        elif has_pieces(operation):
            steepest = _steepest(operation)
            reach = steepest * reads[0]
            radius = rounding.product_up(steepest, radii[0])
        else:
            nodes = operation.nodes if isinstance(operation, Whole) else None
            radius = (
                gain_of(nodes, radii)
                if nodes
                else gains.radius(operation, self._shapes(link), radii)
            )
            reach = np.full(self.values[k].shape, np.inf)
        lost = noise if np.ndim(noise) == 0 else float(rounding.euclidean_norms_up(noise)[0])
        radius = rounding.sum_up(radius, lost)
        if not isinstance(operation, Whole):
            reach = reach + noise
        reach = reach.astype(self.dtype, copy=False)
        reach = np.minimum(reach * _MARGIN, radius)
        self._place(k, reach, radius, size)

    def loss(self, first, last):
        """Bound on the rounding of z⁰ that links first to last add, each of gain one or less after
        the first: the l2 norms of their noise."""
        noises = (self.trace.noise[k] for k in range(first, last + 1))
        sizes = [n if np.ndim(n) == 0 else rounding.euclidean_norms_up(n)[0] for n in noises]
        return float(rounding.sum_up(*sizes))

    def _place(self, k, reach, radius, size):
        for held, value in ((self.reach, reach), (self.radii, radius), (self.sizes, size)):
            if len(held) == k:
                held.append(value)
            else:
                held[k] = value

    def box(self, k):
        """`(low, high)`, float64 (1, *shape), of the signal at position k."""
        value, reach = self.values[k], self.reach[k]
        low, high = rounding.down(value - reach), rounding.up(value + reach)
        low, high = low.astype(self.dtype, copy=False), high.astype(self.dtype, copy=False)
        if k in self.boxes:
            low = np.maximum(low, self.boxes[k][0])
            high = np.minimum(high, self.boxes[k][1])
        return low, high

    def tighten(self, k, low, high):
        """Intersects the box of position k with another valid one."""
        old = self.box(k)
        low, high = np.maximum(old[0], low), np.minimum(old[1], high)
        # z⁰ as computed stays inside, whatever its rounding: slopes are read on the box.
        value = self.values[k]
        low, high = np.minimum(low, value), np.maximum(high, value)
        self.boxes[k] = low, high
        self.tightened.add(k)
        self.reach[k] = np.minimum(
            self.reach[k], rounding.up(np.maximum(np.maximum(high - value, value - low), 0.0))
        )

    def relax(self, k, radius=np.inf, weights=None):
        """Makes the relaxation of the link that makes position k, with the box of what it reads."""
        link = self.flow.links[k - 1]
        source = link.inputs[0]
        low, high = self.box(source)
        if is_window_maximum(link.operation):
            self.steps[k] = WindowMaximum(link.operation, self.values[source], low, high, radius)
            return self.steps[k]
        if is_curved(link.operation):
            self.steps[k] = Curved(link.operation, self.values[source], low, high, radius)
            return self.steps[k]
        self.steps[k] = Elementwise(link.operation, self.values[source], low, high, radius, weights)
        return self.steps[k]

    # Backwards --------------------------------------------------------------------------------

    def backward(self, c, target, multipliers, record=False, measure=False, split=None):
        """One pass from `target` to the input.

        Args:
            c: float64 (rows, *shape of the target).
            target: position.
            multipliers: dict from positions of elementwise outputs to `Multipliers`; missing
                ones are made by `Elementwise.start` and kept in it.
            record: whether to keep what `derivatives` needs.
            measure: whether to sum up sizes.
            split: dict of other `Elementwise` steps per position, of smaller boxes, or None.

        Returns:
            `(bound, size, memory)`: float64 (rows,) lower bounds of cᵀz before rounding, the
            sizes that were summed up (with `measure`), and the memory for `derivatives`.
        """
        rows = len(c)
        held = {target: c}
        constant, size = np.zeros(rows, self.dtype), np.zeros(rows, self.dtype)
        memory = []
        for k in range(target, 0, -1):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            if k not in held:
                continue
            c = held.pop(k)
            link = self.flow.links[k - 1]
            operation = link.operation
            step = (split or self.steps).get(k) or self.steps.get(k)
            if self._linear(link):
                shift = maps.offset(operation)
                if shift is not None:
                    shift = np.broadcast_to(shift, c.shape[1:])
                    constant = constant + np.tensordot(c, shift, c.ndim - 1)
                if measure:
                    size = size + 2 * _dot(np.abs(c), self.sizes[k])
                found = maps.adjoint(operation, c, self._shapes(link))
                own = None
            elif step is not None:
                if k not in multipliers:
                    multipliers[k] = step.start(c)
                g, h, own = step.backward(c, multipliers[k], record)
                constant = constant + h
                if measure:
                    size = size + step.slack(c, g, multipliers[k])
                found = [g]
            else:
                # The ball's gain: nothing flows on.
                value = self.values[k]
                norm = rounding.euclidean_norms(c)
                constant = constant + _dot(c, value) - norm * self.radii[k]
                if measure:
                    size = size + 2 * _dot(np.abs(c), np.abs(value)) + 4 * norm * self.radii[k]
                found, own = [], (c, norm)
            if record:
                memory.append((k, own))
            for i, part in zip(link.inputs, found, strict=False):
                held[i] = held[i] + part if i in held else part
        if 0 in held:
            c, center = held[0], self.values[0]
            value, step = self.region.minimum(c)
            constant = constant + _dot(c, center) + value
            if measure:
                size = size + 2 * _dot(np.abs(c), np.abs(center)) + self.region.slack(c)
            if record:
                memory.append((0, center + step))
        return constant, size, memory if record else None

    def lower(self, c, target, multipliers, split=None):
        """Proved lower bounds of cᵀz at `target`, float64 (rows,); see the module's docstring."""
        bound, size, _ = self.backward(c, target, multipliers, measure=True, split=split)
        lost = rounding.gamma(self.sum_length, UNIT) * size * _MARGIN + 1e-290 + self.underflow()
        found = rounding.down(bound - lost)
        return np.where(np.isfinite(found), found, -np.inf)

    def underflow(self):
        """Bound on what underflows of c on the way back takes off cᵀz, for all signals together."""
        found = 0.0
        for (count, largest), reach in zip(self.heights, self.reach, strict=False):
            most = largest + float(np.max(reach, initial=0.0))
            # What has no bound bounds nothing before it, and gives none behind it.
            found += rounding.TINY * count * most if math.isfinite(most) else 0.0
        return found

    def derivatives(self, target, memory, multipliers, split=None):
        """Derivatives of a recorded pass's bound by every multiplier.

        Returns:
            Dict from positions to lists `[by_share, by_log_lam]`, or with a third entry by shift.
        """
        values, found = {}, {}
        for k, own in reversed(memory):
            if k == 0:
                values[0] = own
                continue
            link = self.flow.links[k - 1]
            operation = link.operation
            step = (split or self.steps).get(k) or self.steps.get(k)
            if self._linear(link):
                reads = [self._read(values, i, own) for i in link.inputs]
                rows = max(len(v) for v in reads)
                reads = [v if len(v) == rows else np.repeat(v, rows, axis=0) for v in reads]
                values[k] = maps.applied(operation, reads)
            elif step is not None:
                read = self._read(values, link.inputs[0], own)
                values[k], *found[k] = step.forward(read, own)
            else:
                c, norm = own
                shape = (-1, *[1] * (c.ndim - 1))
                values[k] = self.values[k] - c * (self.radii[k] / np.maximum(norm, 1e-300)).reshape(
                    shape
                )
        return found

    def _read(self, values, i, own):
        # What no row depends on does not matter.
        return values[i] if i in values else self.values[i]


def _steepest(operation):
    sector = getattr(operation, "sector", None)
    if sector is not None:
        return sector.magnitude
    return float(max(1.0, np.max(np.abs(operation.slopes), initial=0.0)))


def _dot(c, value):
    """cᵀv per row, for one v or one per row."""
    flat, value = c.reshape(len(c), -1), value.reshape(len(value), -1)
    return flat @ value[0] if len(value) == 1 else np.einsum("ij,ij->i", flat, value)
