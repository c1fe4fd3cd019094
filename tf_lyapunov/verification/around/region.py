"""The inputs around one, and the least that functionals reach on them.

All x with low ≤ x ≤ high and ‖x - x⁰‖ ≤ r, in l2, l1 or l∞ (which is a box). With d = x - x⁰
between l and u, both within ±r, for any λ ≥ 0

    cᵀd ≥ Σ_i min_{l_i ≤ t ≤ u_i} [c_i t + (λ/2)t²] - λr²/2       if ‖d‖₂ ≤ r,
    cᵀd ≥ Σ_i min_{l_i ≤ t ≤ u_i} [c_i t + λ|t|] - λr             if ‖d‖₁ ≤ r:

what is added to cᵀd is at most what is taken off. Without a box that cuts the ball the best λ
gives -r‖c‖₂ and -r max|c_i|.
"""

import copy

import numpy as np

from tf_lyapunov.verification.arithmetic import down, row_norms_up, up

NORMS = ("l2", "linf", "l1")
_ROUNDS = 8


class Region:
    """A ball around a point, within bounds.

    Args:
        center: float64 (*shape), x⁰.
        radius: r ≥ 0.
        norm: one of `NORMS`.
        bounds: `(low, high)`, arrays that broadcast against the shape, possibly infinite.

    Attributes:
        left, right: float64 (*shape), the box of x - x⁰, rounded outwards.

    Raises:
        ValueError: if the bounds hold no point within `radius` of the centre in some entry.
    """

    def __init__(self, center, radius, norm, bounds=(-np.inf, np.inf)):
        self.center, self.radius, self.norm = center, float(radius), norm
        low, high = (np.broadcast_to(np.asarray(v, np.float64), center.shape) for v in bounds)
        self.left = np.maximum(down(low - center), -self.radius)
        self.right = np.minimum(up(high - center), self.radius)
        if not np.all(self.left <= self.right):
            raise ValueError("an input lies further outside the bounds than its radius")
        self.is_cut = bool(np.any(self.left > -self.radius) or np.any(self.right < self.radius))
        self._settle()

    def _settle(self):
        self._whole = float(row_norms_up(self.reach().reshape(1, -1))[0])
        # A box within the ball is all there is, and squares of huge radii would overflow.
        self.is_box = self.norm == "linf" or (
            self.norm == "l2" and self.is_cut and self._whole <= self.radius
        )

    def half(self, unit, point, is_above):
        """The part in which a flat input lies above or below a point, or None if there is none.

        The centre stays, and may lie outside of the part.
        """
        found = copy.copy(self)
        found.left, found.right = self.left.copy(), self.right.copy()
        away = point - self.center.flat[unit]
        if is_above:
            found.left.flat[unit] = max(found.left.flat[unit], down(away))
        else:
            found.right.flat[unit] = min(found.right.flat[unit], up(away))
        if not found.left.flat[unit] <= found.right.flat[unit]:
            return None
        found.is_cut = True
        found._settle()
        return found

    def box(self):
        """`(low, high)` of x, rounded outwards."""
        return down(self.center + self.left), up(self.center + self.right)

    def reach(self):
        """Bounds on |x - x⁰|, entry by entry."""
        return np.maximum(np.abs(self.left), np.abs(self.right))

    def l2_radius(self):
        """Bound on ‖x - x⁰‖₂."""
        return self._whole if self.norm == "linf" else min(self._whole, self.radius)

    def minimum(self, c):
        """`(value, size)`: lower bounds of cᵀ(x - x⁰) up to γ_n·size, float64 (rows,) each.

        Args:
            c: `Functionals` of the input.
        """
        left, right = (c.of(v).reshape(-1) for v in (self.left, self.right))
        flat = c.rows.reshape(len(c.rows), -1)
        size = 8 * (np.abs(flat) @ c.of(self.reach()).reshape(-1))
        if self.is_box:
            return np.minimum(flat * left, flat * right).sum(axis=1), size
        if self.norm == "l2":
            # Squares of tiny numbers underflow, and a large radius makes up for them.
            norm = row_norms_up(flat)
            if not self.is_cut:
                return -self.radius * norm, size + 8 * self.radius * norm
            lam = _curve(flat, left, right, self.radius, norm)
            step = np.clip(-flat / lam[:, None], left, right)
            value = flat * step + (lam[:, None] / 2) * step * step
            far = np.sum(np.maximum(left * left, right * right))
            value = value.sum(axis=1) - lam * (self.radius * self.radius / 2)
            return value, size + 8 * lam * (far + self.radius * self.radius)
        if not self.is_cut:
            most = np.max(np.abs(flat), axis=1, initial=0.0)
            return -self.radius * most, size + 8 * self.radius * most
        lam = _price(flat, left, right, self.radius)[:, None]
        # Convex on the interval, with its corner at 0.
        ends = [flat * t + lam * np.abs(t) for t in (left, right)]
        inner = np.where((left <= 0) & (right >= 0), np.minimum(0.0, np.minimum(*ends)),
                         np.minimum(*ends))  # fmt: skip
        lam = lam[:, 0]
        far = np.sum(np.maximum(np.abs(left), np.abs(right)))
        return inner.sum(axis=1) - lam * self.radius, size + 8 * lam * (far + self.radius)


def _curve(c, left, right, radius, norm):
    """λ at which the minimiser has about the norm r."""
    lam = norm / max(radius, 1e-100)
    for _ in range(_ROUNDS):
        lam = np.maximum(lam, 1e-60)
        step = np.clip(-c / lam[:, None], left, right)
        stopped = (step == left) | (step == right)
        rest = radius * radius - np.sum(np.where(stopped, step * step, 0.0), axis=1)
        free = np.sum(np.where(stopped, 0.0, c * c), axis=1)
        lam = np.where(rest > 0, np.sqrt(free / np.maximum(rest, 1e-200)), 2 * lam)
    return np.clip(lam, 1e-60, 1e60)


def _price(c, left, right, radius):
    """λ at which moving the entries that gain most uses the radius up."""
    limit = np.maximum(np.where(c > 0, -left, right), 0.0)
    order = np.argsort(-np.abs(c), axis=1)
    used = np.cumsum(np.take_along_axis(limit, order, axis=1), axis=1)
    last = np.argmax(used >= radius, axis=1)
    price = np.take_along_axis(np.abs(c), order, axis=1)[np.arange(len(c)), last]
    return np.where(used[:, -1] < radius, 0.0, price)
