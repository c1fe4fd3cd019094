"""Boxes and balls of signals as differentiable tensors (see `boxflow`)."""

from __future__ import annotations

import dataclasses

from keras import ops


@dataclasses.dataclass(frozen=True)
class Box:
    """All z with low ≤ z ≤ high, tensors (n, *shape)."""

    low: object
    high: object

    @property
    def middle(self):
        """Middle of every entry."""
        return 0.5 * (self.low + self.high)

    @property
    def radius(self):
        """Half width of every entry, at least 0."""
        return ops.maximum(0.5 * (self.high - self.low), 0.0)

    def least(self, c):
        """Least cᵀz per row of c (n, rows, *shape), tensor (n, rows)."""
        axes = tuple(range(2, len(c.shape)))
        middle, radius = (ops.expand_dims(v, 1) for v in (self.middle, self.radius))
        return ops.sum(c * middle - ops.abs(c) * radius, axis=axes)


@dataclasses.dataclass(frozen=True)
class RoundBall:
    """All z with ‖z - center‖₂ ≤ size, center a tensor (n, *shape), within limits or None."""

    center: object
    size: object
    limits: tuple | None = None

    def box(self):
        """The box around it."""
        return _limited(self.center - self.size, self.center + self.size, self.limits)

    def least(self, c):
        """As of `Box`; the larger of the bounds of the ball and of its box."""
        axes = tuple(range(2, len(c.shape)))
        length = root(ops.sum(ops.square(c), axis=axes))
        found = ops.sum(c * ops.expand_dims(self.center, 1), axis=axes) - self.size * length
        return found if self.limits is None else ops.maximum(found, self.box().least(c))


def _limited(low, high, limits):
    if limits is None:
        return Box(low, high)
    floor, ceiling = (ops.cast(v, low.dtype) for v in limits)
    return Box(ops.clip(low, floor, ceiling), ops.clip(high, floor, ceiling))


def as_box(signal):
    """The signal itself, or the box around a ball."""
    return signal.box() if isinstance(signal, RoundBall) else signal


def region_around(x, radius, norm, limits=None):
    """The signal of the ball of a norm around every input, cut with limits or None.

    Args:
        x: float tensor (n, *shape).
        radius: scalar tensor or number.
        norm: `"l2"` or `"linf"`.
        limits: `(low, high)`, which x lies between.
    """
    radius = ops.cast(radius, x.dtype)
    if norm == "l2":
        return RoundBall(x, radius, limits)
    return _limited(x - radius, x + radius, limits)


def root(squares):
    """√squares with a derivative of 0 at 0."""
    counts = squares > 0
    root = ops.sqrt(ops.where(counts, squares, ops.ones_like(squares)))
    return ops.where(counts, root, ops.zeros_like(root))
