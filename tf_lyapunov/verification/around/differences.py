"""How far a network's logits move between any two inputs of a region, per unit of their distance.

On the boxes of a region, an activation moves between two points by φ(u) - φ(v) = m(u - v) + ψ with
|ψ_i| ≤ s_i|u_i - v_i|: m the middle and s half the spread of the slopes of φ on the box. Hence, for
two inputs at distance at most one, with J the linearised map from the input and J_j that from the
output of step j,

    ‖f(u) - f(v)‖₂ ≤ ‖J‖ + Σ_j ‖J_j s_j^½‖ t_j                                   in l2,
    |f(u) - f(v)|  ≤ |J|1 + Σ_j |J_j| s_j D_j     entry by entry                  in l∞,

t_j the same bound of s_j^½ times what step j reads (`balls`), D_j bounds on the entries of what it
reads: Σ over the signals before of |W| D, or the steepest slope times it. Maxima pass their gain,
in l∞ the largest D of each window.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.arithmetic import (
    SLACK,
    TINY,
    UNIT,
    gamma,
    hypot_up,
    product_up,
    sum_up,
    up,
)
from tf_lyapunov.verification.around import functionals
from tf_lyapunov.verification.around.balls import Balls
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.operations import Activation, Merge


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A ball of radius one, of which only sizes are read."""

    center: np.ndarray

    def l2_radius(self):
        return 1.0


class Differences:
    """Bounds on differences of signals of two inputs of a region at distance one, step by step.

    Args:
        around: `Surroundings` of the region.

    Attributes:
        radii: dict by name of l2 bounds, for inputs at l2 distance one.
    """

    def __init__(self, around):
        self.around, self.steps, self.order = around, around.steps, around.order
        self.gains, self.terms, self.values = around.gains, around.terms, around.values
        first = self.order[0]
        self.region = _Unit(around.region.center)
        self.radii, self.spreads = {first: 1.0}, {}
        balls = _Slopes(self)
        for name in self.order[1:]:
            step = self.steps[name]
            radii = [self.radii[i] for i in step.inputs]
            zeros = np.zeros(self.values[name].shape)
            if isinstance(step.operation, Activation):
                relaxed = around.relaxed[name]
                steepest = min(self.gains[name], relaxed.steepest())
                self.radii[name] = product_up(steepest, radii[0])
                self.spreads[name] = steepest * self.reach(step.inputs[0]), zeros
                balls.add(name, step.inputs[0], relaxed)
            elif functionals.is_linear(step.operation):
                self.spreads[name] = _moved(step.operation, [self.reach(i)[None] for i in
                                                             step.inputs], zeros)  # fmt: skip
                self.radii[name] = _radius(step, radii, self.gains)
            else:
                self.radii[name], self.spreads[name] = product_up(self.gains[name], radii[0]), (
                    zeros, zeros)  # fmt: skip
        self.balls = balls

    def reach(self, name):
        """Bounds on the entries' differences, which the whole signal's bounds."""
        return np.full(self.values[name].shape, self.radii[name])

    def gain(self):
        """Bound on the l2 gain to the logits."""
        target = self.around.network.logits
        whole = self.balls.radius(target, np.ones(self.values[target].size))
        return min(whole, self.radii[target])


class _Slopes(Balls):
    """`balls.Balls` between any two points."""

    def add(self, name, source, relaxed):
        p = relaxed.pieces
        middle = p.low / 2 + p.high / 2
        spread = np.maximum(p.high - middle, middle - p.low) * (1 + 4 * UNIT)
        spread = np.where(p.high > p.low, spread, 0.0)
        self.middles[name] = middle.reshape(relaxed.shape)
        self.roots[name] = (np.sqrt(spread) * (1 + 4 * UNIT)).reshape(relaxed.shape)
        self.moves[name] = self.radius(source, self.roots[name].reshape(-1))

    def differences(self, source, units, window=None):
        return np.inf


def _moved(operation, reaches, zeros):
    """`(reach, doubt)` of a linear step's output for entrywise bounds of what it reads."""
    reach = functionals.absolute(operation, reaches)[0]
    reach = reach * (1 + gamma(functionals.terms(operation) + 8))
    # What is doubtful of a shift is the same at both points, and counts for next to nothing.
    doubt = np.broadcast_to(functionals.doubt(operation, reaches), (1, *zeros.shape))[0]
    return reach, doubt * SLACK


def _radius(step, radii, gains):
    if not isinstance(step.operation, Merge):
        return product_up(gains[step.name], radii[0])
    if step.operation.kind == "concatenate":
        return hypot_up(*radii)
    total = sum_up(*radii)
    return float(up(total / len(radii))) if step.operation.kind == "average" else total


class Entries:
    """Bounds on entries of signals of two inputs of a region at l∞ distance one, step by step.

    Args:
        around: `Surroundings` of the region.
    """

    def __init__(self, around):
        self.around = around
        self.bounds = {around.order[0]: np.ones(around.region.center.shape)}
        self.moved = {}
        for name in around.order[1:]:
            step = around.steps[name]
            reads, zeros = [self.bounds[i] for i in step.inputs], np.zeros(step.shape)
            if isinstance(step.operation, Activation):
                p = around.relaxed[name].pieces
                steepest = np.maximum(np.abs(p.low), np.abs(p.high)).reshape(step.shape)
                found = steepest * reads[0]
            elif functionals.is_linear(step.operation):
                self.moved[name] = _moved(step.operation, [r[None] for r in reads], zeros)
                found = sum(self.moved[name])
            else:
                # A maximum moves by no more than the cell that moves most.
                cells = around.relaxed[name].cells
                found = np.where(cells >= 0, reads[0].reshape(-1)[cells], 0.0).max(axis=1)
                found = found.reshape(step.shape)
            self.bounds[name] = found * SLACK + TINY

    def gain(self):
        """Bound on the l∞ gain to the logits."""
        around = self.around
        target = around.network.logits
        size = around.values[target].size
        total = np.zeros(size)
        held = {target: Functionals(np.eye(size).reshape(size, *around.values[target].shape))}
        for name in reversed(around.order[1:]):
            if name not in held:
                continue
            c, step = held.pop(name), around.steps[name]
            flat = np.abs(c.rows)
            if isinstance(step.operation, Activation):
                p = around.relaxed[name].pieces
                middle = p.low / 2 + p.high / 2
                spread = np.maximum(p.high - middle, middle - p.low).reshape(step.shape)
                source = self.bounds[step.inputs[0]]
                total += _dot(flat, c.of(spread * source))
                # The rounding of the middles, and of their products with the rows.
                steepest = np.maximum(np.abs(p.low), np.abs(p.high)).reshape(step.shape)
                total += 16 * UNIT * _dot(flat, c.of(steepest * source))
                parts = [Functionals(c.rows * c.of(middle.reshape(step.shape)), c.window)]
            elif functionals.is_linear(step.operation):
                reach, doubt = self.moved[name]
                total += gamma(around.terms) * 4 * _dot(flat, c.of(reach))
                total += _dot(flat, c.of(doubt))
                shapes = [around.steps[i].shape for i in step.inputs]
                parts = functionals.back(step.operation, c, shapes, step.shape)
            else:
                total += _dot(flat, c.of(self.bounds[name]))
                continue
            for source, part in zip(step.inputs, parts, strict=True):
                # What underflows of the rows, see `balls`.
                total += TINY * float(np.sum(self.bounds[source]))
                shape = around.steps[source].shape
                held[source] = held[source].plus(part, shape) if source in held else part
        if around.order[0] in held:
            total += np.abs(held.pop(around.order[0]).rows).reshape(size, -1).sum(axis=1)
        total = float(np.max(total)) * (1 + gamma(around.terms) * 4) * SLACK
        return min(total, float(np.max(self.bounds[target])))


def _dot(rows, value):
    return rows.reshape(len(rows), -1) @ value.reshape(-1)
