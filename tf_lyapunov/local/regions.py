"""Sets of inputs around a point: balls, boxes, and a ball cut with a box."""

import dataclasses
import functools

import numpy as np

from tf_lyapunov.program import rounding

NORMS = ("l2", "linf", "l1")
_ROUNDS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """All x with low ≤ x ≤ high, ‖x - center‖₂ ≤ radius and ‖x - center‖₁ ≤ radius_l1.

    Use `Region.ball` and `Region.box`.

    Attributes:
        center: float64, of the shape of one input, inside the box.
        low, high: float64 of that shape, possibly infinite.
        radius, radius_l1: positive, possibly infinite.

    Example:

    >>> region = Region.ball(np.zeros(2), 1.0)
    >>> value, _ = region.minimum(np.array([[3.0, 4.0]]))
    >>> round(float(value[0]), 6)
    -5.0
    >>> cut = Region.ball(np.zeros(2), 1.0, bounds=(0.0, 1.0))
    >>> float(cut.minimum(np.array([[3.0, 4.0]]))[0][0]) > -1e-9
    True
    """

    center: np.ndarray
    low: np.ndarray
    high: np.ndarray
    radius: float = np.inf
    radius_l1: float = np.inf

    def __post_init__(self):
        if not all(np.all(~np.isnan(v)) for v in (self.center, self.low, self.high)):
            raise ValueError("A region must be made of numbers. Received: NaN.")
        if np.isnan(self.radius) or np.isnan(self.radius_l1):
            raise ValueError("A region must be made of numbers. Received: a radius of NaN.")
        if min(self.radius, self.radius_l1) < 0 or np.any(self.low > self.high):
            raise ValueError(
                "A region must hold its centre. Received: an empty one, with a negative radius or "
                "a lower bound above the upper one."
            )
        if np.any(self.center < self.low) or np.any(self.center > self.high):
            raise ValueError(
                "The centre of a region must lie within its bounds. Received: a centre outside. "
                "Clip the input, or widen `bounds`."
            )
        shapes = [np.shape(v) for v in (self.low, self.center, self.high)]
        if not shapes[0] == shapes[1] == shapes[2]:
            raise ValueError(
                "The bounds of a region must have the shape of its centre. Received: shapes "
                f"{shapes[0]} and {shapes[2]} around {shapes[1]}."
            )
        if not np.all(np.isfinite(self.reach())):
            raise ValueError(
                "A region must be bounded. Received: neither a finite radius nor a finite box."
            )

    @classmethod
    def ball(cls, center, radius, norm="l2", bounds=None):
        """The ball of a norm, cut with the box of valid inputs.

        Args:
            center: array, one input.
            radius: positive number.
            norm: `"l2"`, `"linf"` or `"l1"`.
            bounds: `(low, high)` of every entry (numbers or arrays), or None.
        """
        check_norm(norm)
        center = np.asarray(center, np.float64)
        low, high = np.full(center.shape, -np.inf), np.full(center.shape, np.inf)
        if norm == "linf":
            low, high = rounding.down(center - radius), rounding.up(center + radius)
        if bounds is not None:
            floor, ceiling = (fitted(v, center.shape) for v in checked_bounds(bounds))
            low, high = np.maximum(low, floor), np.minimum(high, ceiling)
        return cls(
            center,
            low,
            high,
            float(radius) if norm == "l2" else np.inf,
            float(radius) if norm == "l1" else np.inf,
        )

    @classmethod
    def box(cls, low, high):
        """All x between two arrays, entry by entry."""
        low, high = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (low, high)))
        with np.errstate(invalid="ignore"):
            center = np.clip(low / 2 + high / 2, low, high)
        return cls(center, low, high)

    def reach(self):
        """Elementwise bounds on |x - center|, rounded up."""
        with np.errstate(invalid="ignore"):
            box = np.maximum(self.high - self.center, self.center - self.low)
        return np.minimum(rounding.up(box), min(self.radius, self.radius_l1))

    def l2_radius(self):
        """Bound on ‖x - center‖₂."""
        held = float(rounding.euclidean_norms_up(self.reach()[None])[0])
        return min(self.radius, self.radius_l1, held)

    @functools.cached_property
    def is_cut(self):
        """Whether the box takes part at all."""
        reach = min(self.radius, self.radius_l1)
        room = np.minimum(self.high - self.center, self.center - self.low)
        return bool(np.any(room < reach))

    @functools.cached_property
    def is_box(self):
        """Whether the box lies within the balls, whose squares would overflow if they are huge."""
        with np.errstate(over="ignore"):
            reach = rounding.up(np.maximum(self.high - self.center, self.center - self.low))
            if not np.all(np.isfinite(reach)):
                return False
            corner = float(rounding.euclidean_norms_up(reach.reshape(1, -1))[0])
            return corner <= self.radius and np.sum(reach) * (1 + 1e-9) <= self.radius_l1

    def minimum(self, c):
        """Lower bounds on cᵀ(x - center) over the region, by weak duality, and where they are.

        For the l2 ball ‖d‖ ≤ r and the box, for any λ ≥ 0,

            cᵀd ≥ Σ_i min_{low ≤ x⁰+t ≤ high} [c_i t + (λ/2)t²] - λr²/2,

        λ from the entries that the box leaves free; for the l1 ball the same with μ|t| - μr. The
        computed values may lie above the exact ones by their rounding alone, at most
        γ_{n+16}·(|c|ᵀreach + the multiplier's term), which `slack` bounds.

        Args:
            c: float64 (rows, *shape).

        Returns:
            `(value, d)`: float64 (rows,), and (rows, *shape) where it is attained, nearly.
        """
        if np.isfinite(self.radius) and not self.is_cut:
            flat = c.reshape(len(c), -1)
            size = rounding.euclidean_norms(flat)
            step = flat / np.where(size > 0, size, 1)[:, None] * -self.radius
            return -self.radius * size, step.reshape(c.shape)
        low, high = self.low - self.center, self.high - self.center
        return self.minimum_between(c, low[None], high[None])

    def minimum_between(self, c, low, high):
        """`minimum` with another box of x - center, one for all rows or one per row."""
        flat = c.reshape(len(c), -1)
        # Rounded inwards they leave points out, as far as `slack` holds.
        low = low.reshape(len(low), -1).astype(c.dtype, copy=False)
        high = high.reshape(len(high), -1).astype(c.dtype, copy=False)
        if np.isfinite(self.radius) and not self.is_box:
            value, step = _ball_and_box(flat, low, high, self.radius)
        elif np.isfinite(self.radius_l1) and not self.is_box:
            value, step = _cross_and_box(flat, low, high, self.radius_l1)
        else:
            step = np.where(flat > 0, low, high)
            value = np.einsum("ij,ij->i", flat, step)
        return value, step.reshape(c.shape)

    def slack(self, c):
        """Bound on the rounding of `minimum`'s values, relative to γ_n: what was summed up."""
        flat = np.abs(c.reshape(len(c), -1))
        return 4 * (flat @ self.reach().ravel()) + 4 * self.l2_radius() * flat.sum(axis=1)


def _ball_and_box(c, low, high, radius):
    """Value at a λ found by fixing the entries that the box stops."""
    stopped = np.zeros(c.shape, bool)
    lam = rounding.euclidean_norms(c) / radius
    for _ in range(_ROUNDS):
        lam = np.maximum(lam, 1e-30)
        step = np.clip(-c / lam[:, None], low, high)
        stopped = (step == low) | (step == high)
        free = np.where(stopped, 0.0, c)
        used = np.einsum("ij,ij->i", np.where(stopped, step, 0.0), np.where(stopped, step, 0.0))
        rest = radius * radius - used
        size = np.einsum("ij,ij->i", free, free)
        # Too much is stopped: a larger λ lets go of some.
        lam = np.where(rest > 0, np.sqrt(size / np.maximum(rest, 1e-300)), 2 * lam)
    lam = np.maximum(lam, 1e-30)
    step = np.clip(-c / lam[:, None], low, high)
    value = np.einsum("ij,ij->i", c, step)
    square = np.einsum("ij,ij->i", step, step)
    return value + lam / 2 * (square - radius * radius), step


def _cross_and_box(c, low, high, radius):
    """Value at μ = |c_i| of the entry at which moving the largest first uses the radius up."""
    limit = np.where(c > 0, -low, high)
    order = np.argsort(-np.abs(c), axis=1)
    sorted_limit = np.take_along_axis(np.minimum(limit, radius), order, axis=1)
    used = np.cumsum(sorted_limit, axis=1)
    last = np.argmax(used >= radius, axis=1)
    short = used[:, -1] < radius
    size = np.take_along_axis(np.abs(c), order, axis=1)
    mu = np.where(short, 0.0, size[np.arange(len(c)), last])
    moved = np.abs(c) - mu[:, None]
    value = -np.einsum("ij,ij->i", np.maximum(moved, 0.0), np.where(moved > 0, limit, 0.0))
    before = used - sorted_limit
    part = np.clip(radius - before, 0.0, sorted_limit)
    step = np.zeros(c.shape)
    np.put_along_axis(step, order, part, axis=1)
    return value - mu * radius, -np.sign(c) * step


def check_norm(norm):
    """Refuses names of norms that are not in `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"`norm` must be one of {NORMS}. Received: norm={norm!r}.")


def fitted(bound, shape):
    """A bound of valid inputs as an array that broadcasts against one input of this shape."""
    extra = bound.ndim - len(shape)
    if extra > 0 and bound.shape[:extra] == (1,) * extra:
        bound = bound.reshape(bound.shape[extra:])
    try:
        fits = np.broadcast_shapes(bound.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            "`bounds` must be numbers, or arrays of the shape of one input, the same for all. "
            f"Received: a bound of shape {bound.shape} for inputs of shape {tuple(shape)}."
        )
    return bound


def checked_bounds(bounds):
    """`(low, high)` as float64 arrays, low ≤ high, no NaN."""
    try:
        low, high = (np.asarray(v, np.float64) for v in bounds)
    except (TypeError, ValueError):
        raise ValueError(
            f"`bounds` must be a pair (low, high) of numbers or arrays. Received: {bounds!r}."
        ) from None
    if np.any(np.isnan(low)) or np.any(np.isnan(high)) or np.any(low > high):
        raise ValueError(
            f"`bounds` must be a pair (low, high) with low ≤ high. Received: {bounds!r}."
        )
    return low, high
