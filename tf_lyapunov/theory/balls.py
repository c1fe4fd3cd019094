"""Norm balls: the norm and the size of a perturbation in one object, `L2(0.3)`, `Linf(8/255)`."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np


class Ball:
    """The set of perturbations with norm at most `radius`, centred at zero.

    One radius for all samples, or one per sample (so that every input can be attacked at its own
    certified radius). Use the subclasses `L2` and `Linf`.

    Args:
        radius: float, or array of shape `(n,)`; finite and not negative, in units of the input.

    Raises:
        TypeError: if `radius` is no number and no array of numbers.
        ValueError: if `radius` is negative, not finite, or has more than one axis.
    """

    order: ClassVar[float]
    dual: ClassVar[float]

    def __init__(self, radius):
        if type(self) is Ball:
            raise TypeError("`Ball` has no norm. Use `L2(radius)` or `Linf(radius)`.")
        object.__setattr__(self, "radius", _checked_radius(radius))

    def __setattr__(self, name, value):
        raise AttributeError(
            f"{type(self).__name__} cannot be changed. Make a new one. Received: {name}={value!r}."
        )

    def norm(self, x) -> np.ndarray:
        """Norm of each sample, over all axes but the first.

        Args:
            x: array of shape `(n, ...)`, in units of the input.

        Returns:
            float64 array of shape `(n,)`.
        """
        return self._norm(_rows(x), self.order)

    def dual_norm(self, x) -> np.ndarray:
        """Dual norm of each sample: the maximum of <x, v> over the vectors v of norm one.

        Args:
            x: array of shape `(n, ...)`, for example a gradient.

        Returns:
            float64 array of shape `(n,)`.
        """
        return self._norm(_rows(x), self.dual)

    def per_sample(self, n: int) -> np.ndarray:
        """The radius of each of `n` samples, float64 of shape `(n,)`.

        Raises:
            ValueError: if there is one radius per sample, for another number of samples.
        """
        if np.ndim(self.radius) == 1 and len(self.radius) != n:
            raise ValueError(
                f"`radius` must have one entry per sample, {n}. Received: "
                f"{type(self).__name__} with {len(self.radius)} radii."
            )
        return np.broadcast_to(np.asarray(self.radius, np.float64), (n,)).copy()

    def scaled(self, factor: float):
        """The same ball with every radius multiplied by `factor`."""
        return type(self)(np.asarray(self.radius) * factor)

    def project(self, x) -> np.ndarray:
        """Nearest point of the ball to each sample, in the l2 sense.

        Args:
            x: array of shape `(n, ...)`, perturbations.

        Returns:
            float64 array of the same shape.
        """
        raise NotImplementedError

    def maximizer(self, gradient) -> np.ndarray:
        """A perturbation that maximises <gradient, v> over the ball; zero where the gradient is.

        The maximum is `radius * dual_norm(gradient)`.

        Args:
            gradient: array of shape `(n, ...)`.

        Returns:
            float64 array of the same shape.
        """
        raise NotImplementedError

    @staticmethod
    def _norm(rows, order) -> np.ndarray:
        if rows.shape[1] == 0:
            return np.zeros(len(rows))
        size = np.abs(rows)
        if order == math.inf:
            return size.max(axis=1)
        if order == 1:
            return size.sum(axis=1)
        # Scaled by the largest entry, so that squares neither overflow nor underflow.
        top = size.max(axis=1)
        scale = np.where((top > 0) & np.isfinite(top), top, 1.0)
        size /= scale[:, None]
        return scale * np.sqrt(np.einsum("ij,ij->i", size, size))

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        return np.array_equal(self.radius, other.radius)

    def __hash__(self):
        return hash((type(self), np.asarray(self.radius).tobytes()))

    def __repr__(self):
        if np.ndim(self.radius) == 0:
            return f"{type(self).__name__}({self.radius:g})"
        low, high = (np.min(self.radius), np.max(self.radius)) if len(self.radius) else (0, 0)
        return f"{type(self).__name__}({len(self.radius)} radii, {low:g} to {high:g})"


class L2(Ball):
    """Euclidean ball: ‖v‖₂ ≤ radius.

    Args:
        radius: float, or array of shape `(n,)`; finite and not negative.

    Example:

    >>> from tf_lyapunov.theory.balls import L2
    >>> L2(1.0).project([[3.0, 4.0], [0.3, 0.4]]).round(12).tolist()
    [[0.6, 0.8], [0.3, 0.4]]
    """

    order = 2.0
    dual = 2.0

    def project(self, x) -> np.ndarray:
        x = np.asarray(x, np.float64)
        radius, size = self.per_sample(len(x)), self.norm(x)
        outside = _column(size > radius, x.ndim)
        # Divided first: radius/size may underflow where neither does.
        scale = _column(np.where(size > radius, size, 1.0), x.ndim)
        return np.where(outside, x / scale * _column(radius, x.ndim), x)

    def maximizer(self, gradient) -> np.ndarray:
        gradient = np.asarray(gradient, np.float64)
        # In units of the power of two next to the largest entry: subnormal numbers have few digits.
        top = np.abs(gradient).reshape(len(gradient), -1).max(axis=1, initial=0.0)
        gradient = np.ldexp(gradient, -_column(np.frexp(top)[1], gradient.ndim))
        size = self.norm(gradient)
        unit = np.divide(
            gradient,
            _column(size, gradient.ndim),
            out=np.zeros_like(gradient),
            where=_column(size > 0, gradient.ndim),
        )
        return unit * _column(self.per_sample(len(gradient)), gradient.ndim)


class Linf(Ball):
    """Maximum-norm ball: |v_i| ≤ radius for every entry i.

    Args:
        radius: float, or array of shape `(n,)`; finite and not negative.

    Example:

    >>> from tf_lyapunov.theory.balls import Linf
    >>> Linf(0.5).project([[3.0, -0.2]]).tolist()
    [[0.5, -0.2]]
    """

    order = math.inf
    dual = 1.0

    def project(self, x) -> np.ndarray:
        x = np.asarray(x, np.float64)
        radius = _column(self.per_sample(len(x)), x.ndim)
        return np.clip(x, -radius, radius)

    def maximizer(self, gradient) -> np.ndarray:
        gradient = np.asarray(gradient, np.float64)
        return np.sign(gradient) * _column(self.per_sample(len(gradient)), gradient.ndim)


def _checked_radius(radius):
    try:
        value = np.array(radius, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"`radius` must be a number or an array of shape (n,). Received: radius={radius!r}."
        ) from None
    if value.ndim > 1:
        raise ValueError(
            "`radius` must be a number or an array of shape (n,). "
            f"Received: an array of shape {value.shape}."
        )
    if not np.all(np.isfinite(value)) or np.any(value < 0):
        bad = value if value.ndim == 0 else value[~(np.isfinite(value) & (value >= 0))][0]
        raise ValueError(f"`radius` must be finite and not negative. Received: radius={bad}.")
    if value.ndim == 0:
        return float(value)
    value.flags.writeable = False
    return value


def _rows(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim < 1:
        raise ValueError("Norms are per sample: `x` needs a first axis. Received: a scalar.")
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _column(values, ndim) -> np.ndarray:
    return np.reshape(values, (-1,) + (1,) * (ndim - 1))
