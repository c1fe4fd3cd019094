"""Softmax, normalisations and 2-norms on the ball and the box of their input.

By (V) of `curves`, for any split c = a + b and any λ ≥ 0,

    cᵀφ(z) ≥ gᵀz + h,  g = J_aᵀa,                                                              (T)
    h = aᵀφ(z⁰) - gᵀz⁰ - e(a) - ½ Σ_k (v_k(a) - λ)⁺ D_k² - λρ²/2 + min{bᵀy : y in the range of φ}.

Proof. v_k d_k² ≤ (v_k - λ)⁺D_k² + λd_k² as |d_k| ≤ D_k, and Σd_k² ≤ ρ². The last term is about
bᵀφ(z) alone. So any share a_j = s_j c_j is valid; the best λ is the v_k at which the D_k² of the
larger ones have used up ρ². A ball of vanishing radius loses the square of it.

Rounding. g is J_aᵀa up to `Curve.missed`; values at the centre are off by `Curve.doubt`. What else
is computed is a sum of sizes that `slack` has.
"""

import functools
import math

import numpy as np

from tf_lyapunov.local.relaxation import Multipliers
from tf_lyapunov.local.relaxed import curve_of

_UP = 1 + 1e-9
# A split at the centre's slopes starts where it loses less than this share of what ranges do.
_WORTH = 0.5


class Curved:
    """(T) of one step around one point; has the methods of `relaxation.Elementwise`.

    Args:
        operation: one that `relaxed.is_curved`.
        center, low, high: (1, *shape), z⁰ as computed and the box of z.
        radius: ρ over all entries, with the rounding of z⁰; infinite if unknown.

    Attributes:
        units: int, all entries of the input, or none if it does not move.
        columns: int (outputs,), which outputs shares are of: all.
        out: shape of an output sample.
    """

    def __init__(self, operation, center, low, high, radius=np.inf):
        self.operation, self.shape, self.dtype = operation, center.shape[1:], center.dtype
        self._ends = [np.asarray(v, np.float64).reshape(1, -1) for v in (center, low, high)]
        self._radius = float(radius)
        moves = np.any(self._ends[1] < self._ends[2])
        self.units = np.arange(self._ends[0].size if moves else 0)
        self.out = self.curve.out
        self.columns = np.arange(math.prod(self.out))

    @property
    def radius(self):
        """ρ; what is known of the step depends on it."""
        return self._radius

    @radius.setter
    def radius(self, value):
        if value != self._radius:
            self._radius = float(value)
            self.__dict__.pop("curve", None)

    @functools.cached_property
    def curve(self):
        """The `Curve`, of this box and this ball."""
        return curve_of(self.operation, self.shape, *self._ends, self._radius)

    @property
    def gain(self):
        """How far the output moves for how far the input does, in l2, on the box and the ball."""
        return self.curve.gain

    def range(self):
        """Bounds on the output."""
        return tuple(v.reshape(self.out) for v in (self.curve.low, self.curve.high))

    def start(self, c):
        """`Multipliers` of the centre's slopes where these lose less than ranges do, row by row."""
        flat = c.reshape(len(c), -1).astype(np.float64)
        ones = np.ones(flat.shape, self.dtype)
        depth = flat @ self.curve.value[0] - self.curve.least(flat, None)[0]
        lost, _ = self._lost(flat)
        ones *= (lost <= _WORTH * depth)[:, None]
        return Multipliers(ones, np.full(len(c), -np.inf, self.dtype), self.columns)

    def blank(self, c):
        """Shares of one, to be filled from others; `c` gives the number of rows alone."""
        share = np.ones((len(c), len(self.columns)), self.dtype)
        return Multipliers(share, np.full(len(c), -np.inf, self.dtype), self.columns)

    def _lost(self, a):
        """`(loss, weights)`: ½ Σ(v - λ)⁺D² + λρ²/2 + e of rows, and its derivatives by v."""
        v, squares = self.curve.curvature(a, None), np.square(self.curve.away[0])
        used = np.broadcast_to(squares, v.shape)
        level = np.zeros((len(v), 1))
        if np.isfinite(self._radius):
            room = self._radius * self._radius
            if squares.sum() > room:
                order = np.argsort(-v, axis=1)
                sums = np.cumsum(squares[order], axis=1)
                number = np.sum(sums < room, axis=1, keepdims=True)
                last = np.take_along_axis(order, np.minimum(number, v.shape[1] - 1), axis=1)
                level = np.take_along_axis(v, last, axis=1)
                used = np.where(v > level, squares, 0.0)
                # What the ball leaves for the entry at its level.
                spare = np.maximum(room - used.sum(axis=1, keepdims=True), 0.0)
                np.put_along_axis(used, last, spare, axis=1)
        found = np.maximum(v - level, 0.0) @ squares
        if np.isfinite(self._radius):
            found = found + level[:, 0] * self._radius**2
        return found / 2 * _UP + self.curve.offset(a, None), used / 2

    def backward(self, c, multipliers, record=True):
        """`(g, h, memory)`, see `Elementwise.backward`."""
        curve, rows = self.curve, len(c)
        flat = c.reshape(rows, -1).astype(np.float64)
        share = multipliers.share.astype(np.float64)
        a = share * flat
        b = flat - a
        with np.errstate(over="ignore", invalid="ignore"):
            g = curve.pull(a, None)
            lost, weights = self._lost(a)
            least, point = curve.least(b, None)
            h = a @ curve.value[0] - g @ curve.center[0] - lost + least
            h = h - np.abs(a) @ curve.doubt[0] * _UP - curve.missed(a, None)
        found = g.reshape(rows, *self.shape).astype(self.dtype)
        if not record:
            return found, h.astype(self.dtype), None
        return found, h.astype(self.dtype), (flat, a, weights, point, share)

    def slack(self, c, g, multipliers):
        """What `backward` summed up, in size, per row."""
        curve = self.curve
        flat, own = np.abs(c.reshape(len(c), -1)), np.abs(g.reshape(len(g), -1))
        largest = np.maximum(np.abs(curve.low), np.abs(curve.high))[0]
        share = 1 + 2 * np.abs(multipliers.share)
        reach = np.maximum(np.abs(self._ends[1]), np.abs(self._ends[2]))[0]
        a = (multipliers.share * c.reshape(len(c), -1)).astype(np.float64)
        return 8 * ((flat * share) @ largest) + 8 * (own @ reach) + 4 * self._lost(a)[0]

    def forward(self, y, memory):
        """`(by_c, by_share, by_log_lam)`, see `Elementwise.forward`."""
        flat = y.reshape(len(y), -1).astype(np.float64)
        if memory is None:
            return np.zeros((len(y), *self.out)), np.zeros((len(y), 0)), np.zeros(len(y))
        c, a, weights, point, share = memory
        curve = self.curve
        d = flat - curve.center
        if len(d) < len(a):
            d = np.repeat(d, len(a), axis=0)
        by_a = curve.value + curve.push(d, a, None)
        by_a = by_a - curve.curvature_back(weights, a, None) - curve.offset_back(a)
        by_c = share * by_a + (1 - share) * point
        shape = (len(a), *self.out)
        by_share = (c * (by_a - point)).astype(self.dtype)
        return by_c.reshape(shape).astype(self.dtype), by_share, np.zeros(len(a), self.dtype)

    # For gains ----------------------------------------------------------------------------------

    def spread(self):
        """s_j: with ψ = y - y' - J(z - z') between any two points of the box and ball, or from the
        centre, Σ ψ_j²/s_j ≤ Σ_k w_k (z_k - z'_k)² for w = `spread_back(s)`; float64 (outputs,).

        Slopes on the way from z' to z lie within s_j of J, in the norm of each set of entries.
        """
        return self.curve.spread

    def spread_back(self, weights):
        """Weights of inputs for those of outputs that are `spread`."""
        return self.curve.spread_back(weights)

    def mean_back(self, flat):
        """Jᵀ of rows, (rows, outputs) to (rows, inputs)."""
        return self.curve.slopes_back(flat.astype(np.float64)).astype(flat.dtype)

    @property
    def growth(self):
        """Bound on the norm of |J|, which the rounding of `mean_back` is relative to."""
        return self.curve.growth
