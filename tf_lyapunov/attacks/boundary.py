"""Decision boundaries on tensors: the gap, the crossing on a path, the nearest point of a plane."""

from __future__ import annotations

import numpy as np
from keras import ops

from tf_lyapunov.attacks.logits import two_columns
from tf_lyapunov.theory.balls import Linf

# Gaps closer to zero than this, relative to the logits, may change sign between a compiled loop
# and the model's own predictions.
_TIE = 64 * float(np.finfo(np.float32).eps)
# A crossing is located to this share of the gap at the path's start: float32 sees no more.
_LANDING = 1e-6
_BISECTIONS = 30
# Box corners that a projection on a plane may visit, one per Newton step; it stops when done.
_CORNERS = 25


class Gap:
    """How far inputs are past the boundary: max_j≠y f_j - f_y, its negative for targets.

    Args:
        function: logits of a batch.
        shape: shape of one sample.
        targeted: whether labels are to be reached instead of left.
    """

    def __init__(self, function, shape, targeted=False):
        self.function, self.shape, self.targeted = function, shape, targeted

    def logits(self, point):
        """Logits `(n, classes)` of rows `(n, d)`."""
        return two_columns(self.function(ops.reshape(point, (-1, *self.shape))))

    def of(self, logits, labels):
        """The gap `(n,)`; positive where the goal is reached."""
        own, top, _ = self._parts(logits, labels)
        return own - top if self.targeted else top - own

    def surely(self, logits, labels):
        """Whether the goal is reached by more than rounding, so that the model will agree."""
        own, top, _ = self._parts(logits, labels)
        gap = own - top if self.targeted else top - own
        return gap > _TIE * ops.maximum(ops.abs(own), ops.abs(top))

    def linear(self, point, labels):
        """Sum and values of the gap, for `sum_gradient`."""
        gap = self.of(self.logits(point), labels)
        return ops.sum(gap), gap

    def smooth(self, point, labels):
        """Sum of log Σ_j≠y exp(f_j - f_y), and the gap.

        The gradient is parallel to that of the cross-entropy, and never saturates.
        """
        value, gap = self.ahead(point, labels)
        return ops.sum(value), gap

    def ahead(self, point, labels):
        """log Σ_j≠y exp(f_j) - f_y, its negative for targets, and the gap."""
        own, top, others = self._parts(self.logits(point), labels)
        value, gap = ops.logsumexp(others, axis=-1) - own, top - own
        return (-value, -gap) if self.targeted else (value, gap)

    def _parts(self, logits, labels):
        is_own = ops.cast(ops.one_hot(labels, logits.shape[-1]), "bool")
        others = ops.where(is_own, -1e30, logits)
        return ops.sum(ops.where(is_own, logits, 0.0), axis=-1), ops.max(others, axis=-1), others


class Crossing:
    """Parameter of the first point past the boundary on t -> clip(x + t·v), between two others.

    Bisection, or regula falsi (Illinois), which needs a handful of evaluations on smooth gaps.
    The upper end stays past the boundary.
    """

    def __init__(self, function, shape, targeted, boxed, bisect):
        self.gap = Gap(function, shape, targeted)
        self.boxed, self.bisect = boxed, bisect

    def __call__(self, x, direction, labels, lower, upper, low, high):
        def value(t):
            point = clip(x + t[:, None] * direction, low, high, self.boxed)
            return self.gap.of(self.gap.logits(point), labels)

        def unfinished(i, lower, upper, *rest):
            return ops.logical_and(i < _BISECTIONS, ops.any(active(lower, upper, rest[-1])))

        def active(lower, upper, last):
            wide = upper - lower > 1.5e-7 * upper
            return wide if self.bisect else wide & (last > landing)

        def body(i, lower, upper, below, above, last):
            going = active(lower, upper, last)
            middle = 0.5 * (lower + upper)
            if not self.bisect:
                span = above - below
                share = (above - 0.5 * landing) / ops.where(span > 0, span, 1.0)
                secant = upper - ops.clip(share, 0.0, 1.0) * (upper - lower)
                # Where rounding would leave the secant at an end, and every third time, halve.
                inside = (secant > lower) & (secant < upper) & (i % 3 < 2)
                middle = ops.where(inside, secant, middle)
            now = value(middle)
            past = going & (now > 0)
            short = going & ops.logical_not(now > 0)
            if not self.bisect:
                above = ops.where(past, now, ops.where(short, 0.5 * above, above))
                below = ops.where(short, now, ops.where(past, 0.5 * below, below))
                last = ops.where(past, now, last)
            return (
                i + 1,
                ops.where(short, middle, lower),
                ops.where(past, middle, upper),
                below,
                above,
                last,
            )

        below, above = value(lower), value(upper)
        found = above > 0
        landing = _LANDING * ops.abs(below)
        start = (ops.zeros((), "int32"), lower, upper, below, above, above)
        _, _, upper, *_ = ops.while_loop(unfinished, body, start)
        return clip(x + upper[:, None] * direction, low, high, self.boxed), upper, found


def clip(point, low, high, boxed):
    """Points moved into the box, if there is one."""
    return ops.minimum(ops.maximum(point, low), high) if boxed else point


def extent(change, norm):
    """Norm of each row in float32."""
    if norm is Linf:
        return ops.max(ops.abs(change), axis=-1)
    return ops.sqrt(ops.sum(ops.square(change), axis=-1))


def unit_rows(gradient):
    """Unit rows, their l2 and l1 norms, and which were fine; others, zero or not finite, are zero.

    Rows are scaled by their largest entry first, so that squares neither overflow nor vanish.
    """
    total = ops.sum(ops.abs(gradient), axis=-1)
    fine = (total > 0) & (total < float("inf"))
    top = ops.where(fine, ops.max(ops.abs(gradient), axis=-1), 1.0)[:, None]
    scaled = ops.where(fine[:, None], gradient / top, ops.zeros_like(gradient))
    length = ops.where(fine, ops.sqrt(ops.sum(ops.square(scaled), axis=-1)), 1.0)[:, None]
    return scaled / length, (top * length)[:, 0], total, fine


def to_plane(point, normal, value, norm, low, high, boxed):
    """Least v with value + <normal, v> = 0 and low ≤ point + v ≤ high; the nearest try if none.

    v = -λ·w in l2 and -λ·sign(w) in l∞, clipped to the box; <w, v> is concave in λ and piecewise
    linear, so that Newton's method from λ = 0 is monotone and ends at the solution.

    Args:
        point: `(n, d)`, inside the box.
        normal: w `(n, d)`.
        value: `(n,)`.
        norm: `L2` or `Linf`.
        low, high: `(1, d)`; read if `boxed`.
        boxed: whether there is a box.

    Returns:
        v `(n, d)`, zero where the normal is zero or not finite.
    """
    unit, length, total, fine = unit_rows(normal)
    sign = ops.where(value > 0, 1.0, -1.0)[:, None]
    needed = ops.where(fine, ops.abs(value) / length, 0.0)
    direction = -sign * (ops.sign(unit) if norm is Linf else unit)
    if not boxed:
        slope = total / length if norm is Linf else ops.ones_like(total)
        return (needed / ops.where(fine, slope, 1.0))[:, None] * direction
    speed, weight = ops.abs(direction), ops.abs(unit)
    room = ops.where(direction > 0, high - point, point - low)

    def short(scale):
        return needed - ops.sum(weight * ops.minimum(scale[:, None] * speed, room), axis=-1)

    def unfinished(i, scale, missing, slope):
        more = (missing > 1e-6 * needed) & (slope > 0)
        return ops.logical_and(i < _CORNERS, ops.any(more))

    def slope_at(scale):
        free = scale[:, None] * speed < room
        return ops.sum(ops.where(free, weight * speed, 0.0), axis=-1)

    def body(i, scale, missing, slope):
        scale = scale + ops.where(
            slope > 0, ops.maximum(missing, 0.0) / ops.where(slope > 0, slope, 1.0), 0.0
        )
        return i + 1, scale, short(scale), slope_at(scale)

    zero = ops.zeros_like(needed)
    start = (ops.zeros((), "int32"), zero, needed, slope_at(zero))
    _, scale, _, _ = ops.while_loop(unfinished, body, start)
    return ops.sign(direction) * ops.minimum(scale[:, None] * speed, room)
