"""Functions of several variables to second order around a point, on a box and a ball.

With J the Jacobian at z⁰ and d = z - z⁰, |d| ≤ D on the box and ‖d‖₂ ≤ ρ on the ball, both convex,
every c has weights v(c) ≥ 0 and e(c) ≥ 0 with

    cᵀφ(z) ≥ cᵀφ(z⁰) + (J_cᵀc)ᵀd - ½ Σ_k v_k(c) d_k² - e(c)                                (V)

for all z of both: by Taylor's theorem it is enough that dᵀH d ≥ -Σ v_k d_k² for the Hessian H of
cᵀφ at all of these z. J_c is J, and e is 0, but for 2-norms. The families are `softmax`,
`normalized` and `windownorms`.

All of a curve's arrays are float64 over (centres, inputs) or (centres, outputs); rows are
functionals, each at one of the centres.
"""

import math

import numpy as np

from tf_lyapunov.program.operation import EXACT, Signal

UNIT = 2.0**-53
# Relative room for the rounding of sums of non-negative numbers, of up to 10⁶ terms.
UP = 1 + 1e-9
TINY = 1e-300


class Curve:
    """(V) of one operation around some centres; subclasses are the families.

    Attributes:
        value, doubt: (centres, outputs), φ(z⁰) as computed and what it may be off by.
        low, high: (centres, outputs), the range of φ on the set.
        away: (centres, inputs), D.
        gain: bound on ‖J‖ on all of the set, for all centres.
        out: shape of an output sample.
    """

    def __init__(self, operation, shape, center, low, high, radius):
        self.operation, self.shape, self.radius = operation, shape, float(radius)
        self.center, self.bottom, self.top = (
            np.asarray(v, np.float64) for v in (center, low, high)
        )
        samples = self.center.reshape(-1, *shape)
        found = operation.forward([Signal(samples, np.zeros_like(samples))], EXACT)
        self.out = found.value.shape[1:]
        self.value = found.value.reshape(len(samples), -1)
        self.doubt = np.broadcast_to(found.error, found.value.shape).reshape(len(samples), -1)
        self.away = np.maximum(np.maximum(self.top - self.center, self.center - self.bottom), 0.0)
        self._prepare()

    def _hold(self, low, high):
        # What is computed at the centre is inside, whatever its rounding.
        self.low = np.minimum(low, self.value - self.doubt)
        self.high = np.maximum(high, self.value + self.doubt)

    def ends(self):
        """The range of φ, (centres, *out) each."""
        return tuple(v.reshape(-1, *self.out) for v in (self.low, self.high))

    def offset(self, c, at):
        """e(c), (rows,)."""
        return np.zeros(len(c))

    def offset_back(self, c):
        """Derivative of e(c) by c, (rows, outputs)."""
        return np.zeros_like(c)

    def slopes_back(self, c):
        """Jᵀc at the only centre, (rows, inputs)."""
        return self.pull(c, None)

    def least(self, c, at):
        """`(bound, point)`: a lower bound of cᵀφ by ranges, (rows,), and its derivative by c."""
        point = np.where(c > 0, of(self.low, at), of(self.high, at))
        return np.einsum("ij,ij->i", c, point), point


def of(array, at):
    """Those of the rows' centres; all rows share one where `at` is None."""
    return array if at is None else array[at]


class Grouped(Curve):
    """A curve over sets of entries, whose outputs lie where its inputs do."""

    def _grouped(self, array):
        return array[:, self.index]

    def _flat(self, array):
        found = np.empty((len(array), self.index.size))
        found[:, self.index] = array
        return found

    def _reach(self, away):
        """Bound on how far each set moves in l2, (centres, sets, 1)."""
        return np.minimum(norms(away), self.radius) * UP

    def spread_back(self, weights):
        """Weights of inputs for those of outputs that are `spread`."""
        return weights

    def losses(self):
        """½ Σ v_k(±e_j) D_k² for every output j, below and above: (centres, outputs) each."""
        count, sets, width = len(self.center), *self.index.shape
        below, above = np.zeros((2, count, sets, width))
        at = np.arange(count)
        squares = np.square(self._grouped(self.away))
        for found, sign in ((below, 1.0), (above, -1.0)):
            for j in range(width):
                c = np.zeros((count, sets, width))
                c[:, :, j] = sign
                v = self._grouped(self.curvature(self._flat(c), at))
                found[:, :, j] = np.einsum("bgk,bgk->bg", v, squares) / 2 * UP
        return self._flat(below), self._flat(above)


def sets(array, axes):
    """Flat entries of every set along axes of a sample (batch axis 0 not among its own)."""
    inner = [a - 1 for a in axes]
    outer = [a for a in range(array.ndim) if a not in inner]
    array = np.transpose(array, [*outer, *inner])
    return array.reshape(-1, math.prod(array.shape[len(outer) :]))


def norms(array):
    """2-norms along the last axis, kept, without over- or underflow."""
    largest = np.abs(array).max(axis=-1, keepdims=True, initial=0.0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    return scale * np.sqrt(np.sum(np.square(array / scale), axis=-1, keepdims=True))
