"""Softmax and log-softmax to second order, see `curves`.

Softmax. With p = φ(z), c̄ = pᵀc and d̄ = pᵀd, dᵀH d = Σ_k p_k(c_k - c̄)(d_k - d̄)². With p_k ≤ u_k and
c̄ ≤ κ on the set, -p_k(c_k - c̄) ≤ ε_k = u_k(κ - c_k)⁺. By Cauchy's inequality (d_k - d̄)² ≤
2(1 - p_k)[(1 - p_k)d_k² + Σ_{l≠k} p_l d_l²], so that with p_k ≥ m_k

    v_l = 2ε_l(1 - m_l)² + 2u_l Σ_{k≠l} ε_k(1 - m_k).

Its p_k move within the box as `softmax_range` says, and within the ball by at most √2ρ in
log(p_k/(1 - p_k)) = z_k - log Σ_{l≠k} exp z_l, of gradient 1 and minus a point of the simplex.

Log-softmax is c - (Σc)·log Σ exp z, convex where Σc ≤ 0; else v_k = u_k Σc, as dᵀ(diag p - ppᵀ)d =
Σ p_k(d_k - d̄)² ≤ Σ p_k d_k².
"""

import math

import numpy as np

from tf_lyapunov.local.curves import TINY, UNIT, UP, Curve, Grouped, norms, of, sets
from tf_lyapunov.program.families.softmax import Softmax


class SoftmaxCurve(Grouped):
    """(V) of a softmax."""

    def _prepare(self):
        axes = self.operation.axes
        self.index = sets(np.arange(math.prod(self.shape)).reshape(self.shape), axes)
        plain = Softmax(axes)
        low, high = (v.reshape(-1, *self.shape) for v in (self.bottom, self.top))
        least, most = (v.reshape(len(v), -1) for v in softmax_range(plain, low, high))
        self._probabilities()
        least, most = self._grouped(least), self._grouped(most)
        p, lost = self.p, self.lost
        reach = math.sqrt(2) * self._reach(self._grouped(self.away))
        turned, near = np.exp(np.minimum(reach, 600.0)), reach < 600
        a, b = np.maximum(p - lost, 0.0), np.minimum(p + lost, 1.0)
        most = np.where(near, np.minimum(most, b * turned / ((1 - b) + b * turned) * UP), most)
        least = np.where(near, np.maximum(least, a / (a + (1 - a) * turned) / UP), least)
        least = np.maximum(np.minimum(least, p - lost), 0.0)
        # What underflows is positive all the same.
        most = np.maximum(np.maximum(most, p + lost), TINY)
        self.least_p, self.most_p = least, np.minimum(most, 1.0)
        self.far = 1 - self.least_p
        self.up, self.down = self.most_p - p, self.least_p - p
        self._finish()

    def _probabilities(self):
        self.p, self.lost = self._grouped(self.value), self._grouped(self.doubt)

    def _finish(self):
        self._hold(self._flat(self.least_p), self._flat(self.most_p))
        nearest = np.clip(0.5, self.least_p, self.most_p)
        # Row sums of |diag p - ppᵀ| are 2p(1 - p).
        own = np.minimum(0.5, (2 * nearest * (1 - nearest)).max(axis=2, keepdims=True) * UP)
        self.gain = float(own.max())
        moved = np.maximum(self.up, -self.down)
        size = norms(moved) * (norms(self.p) + norms(self.most_p)) * UP
        # Between semidefinite matrices lies no more than the larger of their norms.
        lost = self.lost.max(axis=2, keepdims=True) + 2 * norms(self.lost)
        spread = np.minimum(own, moved.max(axis=2, keepdims=True) + size) + lost
        self.growth = 8.0
        self.spread = self._flat(np.broadcast_to(spread, self.p.shape))[0]

    def pull(self, c, at):
        """J_cᵀc, (rows, inputs)."""
        c, p = self._grouped(c), of(self.p, at)
        return self._flat(p * (c - np.sum(p * c, axis=2, keepdims=True)))

    def push(self, d, c, at):
        """J_c d, (rows, outputs)."""
        return self.pull(d, at)

    def missed(self, c, at):
        """What the rounding of J may miss of cᵀJd, (rows,)."""
        c, p, lost = np.abs(self._grouped(c)), of(self.p, at), of(self.lost, at) + 4 * UNIT
        total = lambda v: v.sum(axis=2, keepdims=True)  # noqa: E731
        each = c * lost + lost * total(c * p) + p * total(c * lost)
        return np.sum(of(self._grouped(self.away), at) * each, axis=(1, 2)) * 1.01

    def _top(self, c, at):
        """`(κ, mean, excess, which are cut)`."""
        mean = np.sum(of(self.p, at) * c, axis=2, keepdims=True)
        away = c - mean
        steps = np.where(away > 0, of(self.up, at), of(self.down, at))
        top = mean + np.sum(away * steps, axis=2, keepdims=True)
        largest = c.max(axis=2, keepdims=True)
        cut = top > largest
        room = 1e-12 * np.abs(c).max(axis=2, keepdims=True)
        return np.minimum(top, largest) + room, steps, cut

    def curvature(self, c, at):
        """v(c), (rows, inputs)."""
        c, far, most = self._grouped(c), of(self.far, at), of(self.most_p, at)
        top, _, _ = self._top(c, at)
        each = most * np.maximum(top - c, 0.0)
        others = each * far
        others = np.maximum(others.sum(axis=2, keepdims=True) * UP - others, 0.0)
        return self._flat((2 * each * far * far + 2 * most * others) * UP)

    def curvature_back(self, weights, c, at):
        """Derivative of Σ w_k v_k(c) by c, (rows, outputs)."""
        c, w = self._grouped(c), self._grouped(weights)
        far, most, p = of(self.far, at), of(self.most_p, at), of(self.p, at)
        top, steps, cut = self._top(c, at)
        total = np.sum(w * most, axis=2, keepdims=True)
        each = 2 * w * far * far + 2 * far * (total - w * most)
        each = np.where(top > c, each * most, 0.0)
        whole = np.sum(each, axis=2, keepdims=True)
        plain = p + steps - p * np.sum(steps, axis=2, keepdims=True)
        largest = np.zeros(c.shape)
        np.put_along_axis(largest, c.argmax(axis=2)[..., None], 1.0, axis=2)
        return self._flat(whole * np.where(cut, largest, plain) - each)

    def least(self, c, at):
        """By weak duality of Σp = 1: m + Σ min{(c_j - m)p_j}, m where the mass is used up."""
        c = self._grouped(c)
        low = np.broadcast_to(of(self.least_p, at), c.shape)
        high = np.broadcast_to(of(self.most_p, at), c.shape)
        order = np.argsort(c, axis=2)
        room = np.take_along_axis(high - low, order, axis=2)
        rest = 1 - low.sum(axis=2, keepdims=True)
        number = np.sum(np.cumsum(room, axis=2) < rest, axis=2, keepdims=True)
        last = np.take_along_axis(order, np.minimum(number, c.shape[2] - 1), axis=2)
        level = np.take_along_axis(c, last, axis=2)
        above = c - level
        point = np.where(above < 0, high, np.where(above > 0, low, 0.0))
        found = level[..., 0] + np.sum(above * point, axis=2)
        # The level may be that of an entry whose own part is too small to count.
        size = np.abs(level[..., 0]) + np.sum(np.abs(above) * point, axis=2)
        found = found - (c.shape[2] + 8) * UNIT * size
        spare = 1 - point.sum(axis=2, keepdims=True)
        np.put_along_axis(point, last, np.take_along_axis(point, last, axis=2) + spare, axis=2)
        return found.sum(axis=1), self._flat(point)

    def magnified(self, sizes):
        """|J|s for every centre within the box, (outputs,)."""
        s, most = self._grouped(sizes[None]), self.most_p
        return self._flat(most * (s + np.sum(most * s, axis=2, keepdims=True)))[0] * UP


class LogSoftmaxCurve(SoftmaxCurve):
    """(V) of a log-softmax."""

    def _probabilities(self):
        self.p = np.exp(self._grouped(self.value))
        # A probability that underflows keeps none of its digits.
        self.lost = self.p * (np.expm1(self._grouped(self.doubt)) + 8 * UNIT) + TINY

    def _finish(self):
        low, high = (v.reshape(-1, *self.shape) for v in (self.bottom, self.top))
        low, high = (v.reshape(len(v), -1) for v in softmax_range(self.operation, low, high))
        ends = [
            np.where(v > 1e-290, np.log(v), end)
            for v, end in ((self._flat(self.least_p), -np.inf), (self._flat(self.most_p), np.inf))
        ]
        room = [1e-9 * (1 + np.abs(v)) for v in ends]
        low = np.fmax(low, np.where(np.isfinite(ends[0]), ends[0] - room[0], -np.inf))
        # Nothing is further from the rest than twice the reach.
        moved = 2 * norms(self._grouped(self.away)) * UP
        low = np.maximum(low, self._flat(self._grouped(self.value - self.doubt) - moved))
        self._hold(low, np.minimum(np.fmin(high, ends[1] + room[1]), 0.0))
        width = self.index.shape[1]
        # I - 1pᵀ is an oblique projection, whose norm is √n‖p‖.
        norm = np.minimum(norms(self.most_p), 1.0)
        self.gain = float(norm.max()) * math.sqrt(width) * UP
        moved = np.maximum(self.up, -self.down) + self.lost
        spread = math.sqrt(width) * norms(moved) * UP
        self.growth = 8.0 * math.sqrt(width)
        self.spread = self._flat(np.broadcast_to(spread, self.p.shape))[0]

    def pull(self, c, at):
        """J_cᵀc, (rows, inputs)."""
        c = self._grouped(c)
        return self._flat(c - of(self.p, at) * c.sum(axis=2, keepdims=True))

    def push(self, d, c, at):
        """J_c d, (rows, outputs)."""
        d = self._grouped(d)
        return self._flat(d - np.sum(of(self.p, at) * d, axis=2, keepdims=True))

    def missed(self, c, at):
        """What the rounding of J may miss of cᵀJd, (rows,)."""
        c, lost = np.abs(self._grouped(c)).sum(axis=2), of(self.lost, at) + 4 * UNIT
        moved = np.sum(lost * of(self._grouped(self.away), at), axis=2)
        return np.sum(c * moved, axis=1) * 1.01

    def curvature(self, c, at):
        """v(c), (rows, inputs)."""
        c = self._grouped(c)
        total = c.sum(axis=2, keepdims=True) + 1e-12 * np.abs(c).sum(axis=2, keepdims=True)
        return self._flat(np.maximum(total, 0.0) * of(self.most_p, at) * UP)

    def curvature_back(self, weights, c, at):
        """Derivative of Σ w_k v_k(c) by c, (rows, outputs)."""
        c, w = self._grouped(c), self._grouped(weights)
        total = c.sum(axis=2, keepdims=True) > 0
        each = np.sum(w * of(self.most_p, at), axis=2, keepdims=True)
        return self._flat(np.broadcast_to(total * each, c.shape))

    least = Curve.least

    def magnified(self, sizes):
        """|J|s for every centre within the box, (outputs,)."""
        s = self._grouped(sizes[None])
        return self._flat(s + np.sum(self.most_p * s, axis=2, keepdims=True))[0] * UP


def softmax_range(operation, low, high):
    """Entry i is least where it alone is low and the others are high.

    log(p_i/(1 - p_i)) = z_i - log Σ_{j≠i} exp z_j, each by its own largest term: what is common to
    all may underflow in it. An error of that number is at most the relative one of p_i.
    """
    axes, count = operation.axes, math.prod(low.shape[a] for a in operation.axes)
    room = 4 * (count + 64) * UNIT
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = []
        for own, rest, sign in ((low, _others(high, axes), -1.0), (high, _others(low, axes), 1.0)):
            odds = own - rest
            spread = sign * room * (1 + np.abs(own) + np.abs(rest))
            logarithm = spread - np.logaddexp(0.0, -odds)
            found.append(logarithm if operation.logarithm else np.exp(logarithm) + sign * TINY)
    least, most = found
    floor, limit = (-np.inf, 0.0) if operation.logarithm else (0.0, 1.0)
    least = np.where(np.isnan(least), floor, np.maximum(least, floor))
    return least, np.where(np.isnan(most), limit, np.minimum(most, limit))


def _others(z, axes):
    """log Σ_{j≠i} exp z_j for every entry i of a set along the axes."""
    ends = range(z.ndim - len(axes), z.ndim)
    moved = np.moveaxis(z, axes, ends)
    flat = moved.reshape(*moved.shape[: z.ndim - len(axes)], -1)
    first = np.arange(flat.shape[-1]) == flat.argmax(axis=-1)[..., None]
    largest = flat.max(axis=-1, keepdims=True)
    second = np.where(first, -np.inf, flat).max(axis=-1, keepdims=True)
    shifts = [np.where(np.isfinite(v), v, 0.0) for v in (largest, second)]
    # The largest is among the others of all but itself, so that these sums do not cancel.
    terms = np.exp(flat - shifts[0])
    total = shifts[0] + np.log(terms.sum(axis=-1, keepdims=True) - terms)
    rest = np.where(first, 0.0, np.exp(flat - shifts[1])).sum(axis=-1, keepdims=True)
    found = np.where(first, shifts[1] + np.log(rest), total)
    return np.moveaxis(found.reshape(moved.shape), ends, axes)
