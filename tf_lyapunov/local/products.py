"""Products of two signals to second order, see `curves`; and what `Beside` is among linear maps.

Y = AB is bilinear in z = (A, B): with a = A - A⁰ and b = B - B⁰, exactly

    <C, AB> = <C, A⁰B⁰> + <C B⁰ᵀ, a> + <A⁰ᵀC, b> + <C, ab>,   <C, ab> = Σ_ijk C_ij a_ik b_kj,

and of the last term, for any positive weights s of its pairs, |C_ij a_ik b_kj| ≤
½|C_ij|(s a_ik² + b_kj²/s). So (V) holds with e = 0 and

    v(a_ik) = Σ_j |C_ij| s_ikj,   v(b_kj) = Σ_i |C_ij| / s_ikj.

On the box |a| ≤ D_A, |b| ≤ D_B the best weights are s = D_B/D_A, which lose Σ|C_ij|D_A,ik D_B,kj:
the middle one of McCormick's planes. On a ball s = 1 serves, v(a) and v(b) the sums of rows and
columns of |C|, or by |<C, ab>| ≤ ‖C‖‖a‖_F‖b‖_F ≤ ½‖C‖(‖a‖² + ‖b‖²) the same v = ‖C‖ for all
entries; of several matrix products each has its own. Row by row that is taken which loses less.

J moves from A⁰, B⁰ to A, B by the map (a', b') ↦ a'b + ab', whose norm is at most √(‖a‖² + ‖b‖²);
between two points of a convex set Y moves by J of their middle. ‖·‖ is bounded by the Frobenius
norm and by √(largest row sum · largest column sum) of absolute values (Schur).
"""

import math

import numpy as np

from tf_lyapunov.local import gains, maps
from tf_lyapunov.local.curves import TINY, UNIT, UP, Curve, of
from tf_lyapunov.program.families.products import Beside, Product


@maps.adjoint.register
def _(operation: Beside, c, shapes):
    ends = np.cumsum([math.prod(s) for s in shapes])[:-1]
    parts = np.split(c.reshape(len(c), -1), ends, axis=1)
    return [p.reshape(len(c), *s) for p, s in zip(parts, shapes, strict=True)]


@maps.absolute.register
def _(operation: Beside, sizes):
    return np.concatenate([s.reshape(len(s), -1) for s in sizes], axis=1)


@gains.radius.register
def _(operation: Product, shapes, radii):
    """None on all of space: what bounds it is `ProductCurve.gain`, on a ball."""
    return math.inf


class ProductCurve(Curve):
    """(V) of products of two signals."""

    def _prepare(self):
        operation = self.operation
        self.terms, size = operation.left.shape[2], math.prod(self.shape)
        self.where = np.concatenate([operation.left.ravel(), operation.right.ravel()])
        order = np.argsort(self.where, kind="stable")
        ends = np.flatnonzero(np.diff(self.where[order], prepend=-1))
        self.order, self.ends, self.used = order, ends, self.where[order][ends]
        self.is_apart = len(ends) == len(order)
        self.size = size
        self.inverse = np.argsort(operation.index.ravel())
        self.a, self.b = operation.factors(self.center)
        self.da, self.db = operation.factors(self.away)
        a_size, b_size = np.abs(self.a), np.abs(self.b)
        # What a sum of so many products, and of several such sums, may miss.
        lost = 2 * (max(*operation.left.shape[1:], operation.right.shape[2]) + 8) * UNIT
        lost *= 1 if self.is_apart else 1 + len(order) // len(ends)
        self.off = lost * self._flat(self.da @ b_size + a_size @ self.db)
        self._range(a_size, b_size)
        moved = np.sqrt(np.square(_norms(self.da)) + np.square(_norms(self.db))) * UP
        moved = np.minimum(moved, self.radius * UP)
        ends = [
            np.minimum(_norms(x + d), _norms(x) + np.minimum(_norms(d), self.radius))
            for x, d in ((a_size, self.da), (b_size, self.db))
        ]
        whole = self._per_input(np.square(ends[0]) + np.square(ends[1]))
        self.gain = float(np.sqrt(whole.max(initial=0.0))) * UP
        at_center = self._per_input(np.square(_norms(a_size)) + np.square(_norms(b_size)))
        self.growth = 8 * float(np.sqrt(at_center[0].max(initial=0.0))) * UP
        out = (*operation.left.shape[:2], operation.right.shape[2])
        self.spread = self._flat(np.broadcast_to(moved[:1, :, None, None], (1, *out)))[0] * UP

    def _shaped(self, c):
        """(rows, outputs) as (rows, G, I, J)."""
        left, right = self.operation.left, self.operation.right
        return c[:, self.inverse].reshape(len(c), *left.shape[:2], right.shape[2])

    def _flat(self, y):
        return self.operation.placed(y).reshape(len(y), -1)

    def _added(self, left, right):
        """Numbers of entries of A and of B, summed up for every input: (rows, inputs)."""
        rows = max(len(left), len(right))
        found = np.zeros((rows, self.size))
        whole = np.concatenate([left.reshape(rows, -1), right.reshape(rows, -1)], axis=1)
        if self.is_apart:
            found[:, self.where] = whole
        else:
            found[:, self.used] = np.add.reduceat(whole[:, self.order], self.ends, axis=1)
        return found

    def _per_input(self, groups):
        """Sums over the products that hold each input, (rows, inputs), of numbers (rows, G)."""
        operation, groups = self.operation, groups[:, :, None, None]
        left, right = (
            np.broadcast_to(groups, (len(groups), *index.shape))
            for index in (operation.left, operation.right)
        )
        return self._added(left, right) * UP

    def _range(self, a_size, b_size):
        operation = self.operation
        (a0, b0), (a1, b1) = operation.factors(self.bottom), operation.factors(self.top)
        low = high = size = 0.0
        for k in range(self.terms):
            x, y = (v[:, :, :, k, None] for v in (a0, a1)), [v[:, :, k, None, :] for v in (b0, b1)]
            corners = np.stack([p * q for p in x for q in y])
            corners = np.where(np.isnan(corners), 0.0, corners)  # an end of 0 times an open one
            low, high = low + corners.min(axis=0), high + corners.max(axis=0)
            size = size + np.abs(corners).max(axis=0)
        room = 2 * (self.terms + 8) * UNIT * size + TINY
        low, high = self._flat(low - room), self._flat(high + room)
        # And by (V) on the ball: the norm of a row of J, and ‖a_i‖‖b_j‖ ≤ ½ρ².
        rows = (
            np.square(a_size).sum(axis=3)[:, :, :, None]
            + np.square(b_size).sum(axis=2)[:, :, None, :]
        )
        reach = (np.sqrt(self._flat(rows)) * self.radius + self.radius**2 / 2) * UP + self.doubt
        reach = reach + 8 * UNIT * np.abs(self.value)
        low = np.fmax(low, np.where(np.isfinite(reach), self.value - reach, -np.inf))
        high = np.fmin(high, np.where(np.isfinite(reach), self.value + reach, np.inf))
        self._hold(low, high)

    def pull(self, c, at):
        """Jᵀc, (rows, inputs)."""
        c = self._shaped(c)
        a, b = of(self.a, at), of(self.b, at)
        return self._added(c @ np.swapaxes(b, 2, 3), np.swapaxes(a, 2, 3) @ c)

    def push(self, d, c, at):
        """J d, (rows, outputs)."""
        da, db = self.operation.factors(d)
        return self._flat(da @ of(self.b, at) + of(self.a, at) @ db)

    def missed(self, c, at):
        """What the rounding of Jᵀc may miss of cᵀJd, (rows,)."""
        return np.einsum("ij,ij->i", np.abs(c), np.broadcast_to(of(self.off, at), c.shape)) * UP

    def _weights(self, c, at):
        """`(by the box, by the ball, whether rows of |C| serve, whether the box loses less)`."""
        sizes = np.abs(self._shaped(c))
        da, db = of(self.da, at), of(self.db, at)
        inner, outer = sizes @ np.swapaxes(db, 2, 3), np.swapaxes(da, 2, 3) @ sizes
        box = [_quotient(v, d) for v, d in ((inner, da), (outer, db))]
        rows, columns = sizes.sum(axis=3), sizes.sum(axis=2)
        whole = np.sqrt(np.square(sizes).sum(axis=(2, 3)))
        by_sums = np.maximum(rows.max(axis=2), columns.max(axis=2)) <= whole
        ball = [
            np.where(by_sums[:, :, None, None], v, whole[:, :, None, None])
            for v in (rows[:, :, :, None], columns[:, :, None, :])
        ]
        ball = [np.broadcast_to(v, w.shape) for v, w in zip(ball, box, strict=True)]
        box, ball = (self._added(*v) * UP for v in (box, ball))
        squares = np.square(of(self.away, at))
        with np.errstate(invalid="ignore", over="ignore"):  # of a ball without a radius
            losses = [
                np.fmin((v * squares).sum(axis=1), v.max(axis=1) * self.radius**2)
                for v in (box, ball)
            ]
        return box, ball, by_sums, ~(losses[1] < losses[0])

    def curvature(self, c, at):
        """v(c), (rows, inputs)."""
        box, ball, _, boxed = self._weights(c, at)
        return np.where(boxed[:, None], box, ball)

    def curvature_back(self, weights, c, at):
        """Derivative of Σ w_k v_k(c) by c, (rows, outputs)."""
        operation = self.operation
        _, _, by_sums, boxed = self._weights(c, at)
        shaped = self._shaped(c)
        wa, wb = operation.factors(np.broadcast_to(weights, (len(c), self.size)))
        da, db = of(self.da, at), of(self.db, at)
        by_box = _quotient(wa, da) @ db + da @ _quotient(wb, db)
        sums = wa.sum(axis=3)[:, :, :, None] + wb.sum(axis=2)[:, :, None, :]
        total = wa.sum(axis=(2, 3), keepdims=True) + wb.sum(axis=(2, 3), keepdims=True)
        sizes = np.abs(shaped)
        whole = np.sqrt(np.square(sizes).sum(axis=(2, 3), keepdims=True))
        by_ball = np.where(by_sums[:, :, None, None], sums, total * _quotient(sizes, whole))
        found = np.where(boxed[:, None, None, None], by_box, by_ball)
        return self._flat(np.sign(shaped) * found)

    def spread_back(self, weights):
        """Weights of inputs for those of outputs that are `spread`."""
        groups = self._shaped(weights[None]).max(axis=(2, 3))
        return self._per_input(groups)[0]

    def losses(self):
        """½ Σ v_k(±e_j) D_k² for every output j, below and above: (centres, outputs) each."""
        found = self._flat(self.da @ self.db) * UP
        return found, found

    def magnified(self, sizes):
        """|J|s for every centre within the box, (outputs,)."""
        a, b = self.operation.factors(np.maximum(np.abs(self.bottom), np.abs(self.top)))
        da, db = self.operation.factors(sizes[None])
        return self._flat(da @ b + a @ db)[0] * UP


def _quotient(numerator, denominator):
    """0 where the denominator is."""
    safe = np.where(denominator > 0, denominator, 1.0)
    return np.where(denominator > 0, numerator / safe, 0.0)


def _norms(matrices):
    """Upper bounds on ‖·‖₂ of matrices (…, I, K), by their absolute values."""
    sizes = np.abs(matrices)
    with np.errstate(over="ignore"):
        frobenius = np.sqrt(np.square(sizes).sum(axis=(-2, -1)))
        sums = sizes.sum(axis=-1).max(axis=-1) * sizes.sum(axis=-2).max(axis=-1)
    return np.minimum(frobenius, np.sqrt(sums)) * UP
