"""What is known of every signal while the input stays in a region, step by step.

Around the signals at the region's centre, as computed: elementwise bounds ("box") and an l2 bound ρ
on the distance, from those of the steps before; and boxes anew from lower bounds of single units
and their negatives, by passes of `functionals` back to the input. A pass lowers cᵀy for the y of
one step to cᵀx for the input x, step by step: adjoints of linear steps, `relaxation` at the others.
Every pass rests on boxes of earlier steps alone, which are derived here. Only shares and λ come
from elsewhere, and any values of theirs give bounds.

Rounding. A pass sums up sizes of all that it adds, and γ_N of them, N the longest of its sums and
the number of steps together, is taken off.
"""

import math

import numpy as np

from tf_lyapunov.verification.arithmetic import (
    SLACK,
    down,
    gamma,
    hypot_up,
    product_up,
    row_norms_up,
    sum_up,
    up,
)
from tf_lyapunov.verification.around import functionals
from tf_lyapunov.verification.around.balls import Balls
from tf_lyapunov.verification.around.functionals import of_units
from tf_lyapunov.verification.around.maxima import Maximum, cells_of
from tf_lyapunov.verification.around.relaxation import Relaxation
from tf_lyapunov.verification.network import forward
from tf_lyapunov.verification.operations import Activation, GlobalPooling, MaxPooling, Merge

# Numbers beyond these could overflow, or underflow by more than is taken off for it.
_LARGEST, _TINY = 2.0**400, 2.0**-400
# Entries of rows held at once.
_BLOCK = 2**21


class Surroundings:
    """Boxes and relaxations of a network's steps up to its logits.

    Args:
        network: `network.Network`.
        gains: `balls.Gains`.
        region: `region.Region` of the first step's signal.
        groups: dict from names of steps to lists of `evidence.Group`, whose units' boxes are
            derived with the group's multipliers; other units use `Relaxation.starts`.

    Raises:
        OverflowError: if signals are too large for a bound on their rounding.
    """

    def __init__(self, network, gains, region, groups=None):
        self.network, self.gains, self.region = network, gains, region
        self.groups = groups or {}
        self.steps = {}
        for step in network.steps:
            self.steps[step.name] = step
            if step.name == network.logits:
                break
        self.order = list(self.steps)
        linear = [s.operation for s in self.steps.values() if s.operation is not None]
        longest = max([functionals.terms(o) for o in linear], default=0)
        widest = max(_width(s) for s in self.steps.values())
        self.terms = longest + widest + 16 * len(self.steps) + 64
        first = network.steps[0].name
        self.values = {first: region.center}
        self.boxes, self.radii = {}, {first: region.l2_radius()}
        self._keep(first, *region.box())
        self.relaxed, self.sizes, self.doubts, self.done = {}, {}, {}, {first}
        # By name: what a step adds up of distances, in size, and what it is off by besides.
        self.spreads = {}
        self.balls = Balls(self)
        for name in self.order[1:]:
            self._advance(self.steps[name])

    # Forwards -----------------------------------------------------------------------------------

    def _advance(self, step):
        operation, inputs = step.operation, step.inputs
        read = [(self.values[i][None], np.zeros((1, *self.values[i].shape))) for i in inputs]
        value, noise = (v[0] for v in forward(step, read))
        radii = [self.radii[i] for i in inputs]
        lost = float(row_norms_up(noise.reshape(1, -1))[0])
        if functionals.is_linear(operation):
            self._linear(step, value, noise, radii, lost)
        else:
            (source,) = inputs
            relaxed = self._relaxation(step, source)
            self.relaxed[step.name] = relaxed
            steepest = self.gains[step.name]
            if isinstance(operation, Activation):
                steepest = min(steepest, relaxed.steepest())
                self.spreads[step.name] = steepest * self.reach(source), noise
            else:
                self.spreads[step.name] = np.zeros_like(value), noise
            self._place(step.name, value, relaxed.range(), product_up(steepest, radii[0]), lost)

    def _linear(self, step, value, noise, radii, lost):
        operation, name = step.operation, step.name
        reaches = [self.reach(i)[None] for i in step.inputs]
        sizes = [self.size(i)[None] for i in step.inputs]
        reach = functionals.absolute(operation, reaches)[0]
        reach = reach * (1 + gamma(functionals.terms(operation) + 8))
        doubt = np.broadcast_to(functionals.doubt(operation, reaches), (1, *value.shape))[0]
        self.spreads[name] = reach, (doubt + noise) * SLACK
        reach = (reach + doubt + noise) * SLACK
        if isinstance(operation, Merge):
            if operation.kind == "concatenate":
                radius = hypot_up(*radii)
            else:
                radius = sum_up(*radii)
                radius = float(up(radius / len(radii))) if operation.kind == "average" else radius
        else:
            radius = product_up(self.gains[name], radii[0])
        shift = functionals.offset(operation)
        size = functionals.absolute(operation, sizes)[0]
        self.sizes[name] = size + (0.0 if shift is None else np.abs(shift)) + noise
        doubt = np.broadcast_to(functionals.doubt(operation, sizes), (1, *value.shape))[0]
        self.doubts[name] = doubt if np.any(doubt) else None
        self._place(name, value, (down(value - reach), up(value + reach)), radius, lost)

    def _place(self, name, value, box, radius, lost):
        radius = sum_up(radius, lost)
        low, high = np.maximum(box[0], down(value - radius)), np.minimum(box[1], up(value + radius))
        if not (np.all(np.abs(low) <= _LARGEST) and np.all(np.abs(high) <= _LARGEST)):
            raise OverflowError("a signal around an input has no bound")
        self.values[name], self.radii[name] = value, radius
        self._keep(name, low, high)

    def _keep(self, name, low, high):
        # With the centre's signal inside, slopes on the box are those of all ways from it.
        value = self.values[name]
        self.boxes[name] = np.minimum(low, value), np.maximum(high, value)

    def reach(self, name):
        """Bounds on the distance from `values`, entry by entry."""
        low, high = self.boxes[name]
        value = self.values[name]
        return np.maximum(up(np.maximum(high - value, value - low)), 0.0)

    def size(self, name):
        """Bounds on the signal's absolute values, and of those at the centre as computed."""
        low, high = self.boxes[name]
        return np.maximum(np.maximum(np.abs(low), np.abs(high)), np.abs(self.values[name]))

    def _relaxation(self, step, source):
        kind = Relaxation if isinstance(step.operation, Activation) else Maximum
        relaxed = kind(step.operation, self.values[source], *self.boxes[source])
        if source not in self.done:
            self._tighten(source, np.flatnonzero(relaxed.units))
            relaxed = kind(step.operation, self.values[source], *self.boxes[source])
        if kind is Relaxation:
            self.balls.add(step.name, source, relaxed)
        relaxed.radius = self.balls.weigh(step.name, source, relaxed.units.astype(np.float64))
        return relaxed

    def weigh(self, weights):
        """Weighs the balls of activations anew, for the passes to come.

        Args:
            weights: dict from names of steps to `(columns, roots)`: flat units and w^½ of these;
                the others have weight one.
        """
        for name, (columns, roots) in weights.items():
            relaxed = self.relaxed.get(name)
            if relaxed is None:
                continue
            full = np.ones(relaxed.units.shape)
            full[columns] = roots
            full = np.where(relaxed.units, full, 0.0)
            radius = self.balls.weigh(name, self.steps[name].inputs[0], full)
            # At most the squares of the roots that the radius is about.
            relaxed.weigh(np.where(full > 0, down(full * full), 0.0), radius)

    # Boxes by passes ----------------------------------------------------------------------------

    def _tighten(self, name, units):
        low, high = (v.copy().reshape(-1) for v in self.boxes[name])
        shape, left, parts = self.values[name].shape, units, []
        for group in self.groups.get(name, ()):
            parts += [(group.units[k], group.of(k)) for k in self.blocks(len(group.units))]
            left = np.setdiff1d(left, group.units)
        parts += [(some, None) for some in self.tiles(name, left)]
        for some, multipliers in parts:
            found = self.lower(name, of_units(some, shape), multipliers)
            count = len(some)
            low[some] = np.maximum(low[some], found[:count])
            high[some] = np.minimum(high[some], -found[count:])
        self._keep(name, low.reshape(shape), high.reshape(shape))
        self.done.add(name)

    def blocks(self, count):
        """Slices of so many units, whose rows and their negatives are passed together."""
        step = max(_BLOCK // max(v.size for v in self.values.values()) // 2, 16)
        return [slice(k, min(k + step, count)) for k in range(0, count, step)]

    def tiles(self, name, units):
        """Blocks of units whose rows are passed together: of one place, where there are places."""
        shape = self.values[name].shape
        if not len(units):
            return []
        if len(shape) > 1:
            places = units // shape[-1]
            return np.split(units, np.flatnonzero(np.diff(places)) + 1)
        return [units[k] for k in self.blocks(len(units))]

    # Backwards ----------------------------------------------------------------------------------

    def lower(self, target, c, multipliers=None, relaxed=None, region=None, joint=None):
        """Lower bounds of cᵀy on the region for the signal y of a step, rounded down, (rows,).

        Args:
            target: name of the step.
            c: `Functionals` of its signal.
            multipliers: dict from names of steps to `Multipliers` of these rows, or None.
            relaxed: dict of other relaxations by name, of smaller boxes, or None.
            region: a part of the region, or None.
            joint: `joint.Joint` of the multipliers, which pays for the balls it knows, or None.
        """
        multipliers, relaxed = multipliers or {}, {**self.relaxed, **(relaxed or {})}
        count = len(c.rows)
        bound, size, doubt = np.zeros(count), np.zeros(count), np.zeros(count)
        held = {target: c}
        for name in reversed(self.order[1 : self.order.index(target) + 1]):
            if name not in held:
                continue
            c, step = held.pop(name), self.steps[name]
            operation = step.operation
            if functionals.is_linear(operation):
                size += 2 * _dot(np.abs(c.rows), c.of(self.sizes[name]))
                if self.doubts[name] is not None:
                    doubt += _dot(np.abs(c.rows), c.of(self.doubts[name]))
                shift = functionals.offset(operation)
                if shift is not None:
                    bound += _dot(c.rows, c.of(np.broadcast_to(shift, step.shape)))
                shapes = [self.steps[i].shape for i in step.inputs]
                parts = functionals.back(operation, c, shapes, step.shape)
            else:
                own = relaxed[name]
                radius = 0.0 if joint is not None and name in joint.names else own.radius
                if c.window is not None and isinstance(operation, Activation):
                    (source,) = step.inputs
                    within = min(
                        self.balls.within(source, c.window),
                        self.balls.differences(source, np.flatnonzero(own.units), c.window),
                    )
                    radius = min(radius, product_up(own.steepest_weight, within))
                g, least, more = own.back(c, multipliers.get(name), radius)
                bound, size, parts = bound + least, size + more, [g]
            for source, part in zip(step.inputs, parts, strict=True):
                shape = self.steps[source].shape
                held[source] = held[source].plus(part, shape) if source in held else part
        c = held.pop(self.order[0])
        center = c.of(self.region.center)
        least, more = (joint or region or self.region).minimum(c)
        bound = bound + _dot(c.rows, center) + least
        size = size + 2 * _dot(np.abs(c.rows), np.abs(center)) + more
        lost = (gamma(self.terms) * size + doubt) * SLACK * (1 + gamma(self.terms)) + _TINY
        fits = (size <= _LARGEST) & np.isfinite(bound)
        return np.where(fits, down(bound - lost), -np.inf)


def _width(step):
    """Entries of a step's signal, or cells of its windows, over which passes take sums."""
    operation, size = step.operation, math.prod(step.shape)
    if isinstance(operation, MaxPooling) or (
        isinstance(operation, GlobalPooling) and not operation.mean
    ):
        return max(size, cells_of(operation, step.shape))
    return size


def _dot(rows, value):
    return rows.reshape(len(rows), -1) @ value.reshape(-1)


def is_covered(operation):
    """Whether the bounds here know an operation."""
    return functionals.is_linear(operation) or isinstance(
        operation, (Activation, MaxPooling, GlobalPooling)
    )
