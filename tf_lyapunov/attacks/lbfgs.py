"""Szegedy's attack: box-constrained L-BFGS on distance plus loss, its weight searched for."""

from __future__ import annotations

import functools

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.boundary import Gap
from tf_lyapunov.attacks.inputs import positive_int
from tf_lyapunov.attacks.minimal import MinimalAttack
from tf_lyapunov.theory.balls import L2

_MEMORY = 10
_ARMIJO, _BACKTRACKS = 1e-4, 12


class LBFGS(MinimalAttack):
    """Least l2 perturbation by box-constrained L-BFGS, after Szegedy et al.

    The problem, per sample, for a weight α that is searched for:

        minimise α‖v‖₂² + L(x + v)   subject to   low ≤ x + v ≤ high,

    L the cross-entropy of the target t, -log p_t, or without targets -log(1 - p_y). The greatest α
    with a misclassified minimiser is found by factors of 10, then geometric bisection. ‖v‖₂²
    instead of the published ‖v‖ is differentiable at 0 and has the same minimisers under
    another α.

    All samples of a batch run at once: the gradients are one evaluation, the curvature pairs,
    active bounds and line searches are each sample's own.

    Args:
        radius: `L2`, or a ball `L2(r)` as a limit.
        searches: number of weights.
        steps: most iterations per weight.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import LBFGS
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> LBFGS()(model, [[1.0, 1.0]]).distance.round(4).tolist()
    [1.0]

    Reference:
        Szegedy et al., "Intriguing properties of neural networks", ICLR 2014, section 4.1; Peck,
        section 2.5.1. Bounds by two-metric projection (Bertsekas, SIAM J. Control 1982).
    """

    norms = (L2,)

    def __init__(
        self,
        radius=L2,
        *,
        searches: int = 8,
        steps: int = 30,
        bounds=None,
        targeted: bool = False,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        self.searches = positive_int("searches", searches)
        self.steps = positive_int("steps", steps)

    def _settings(self):
        return [f"searches={self.searches}", f"steps={self.steps}"]

    def _search(self, problem, batch):
        loop = functools.partial(_Loss, targeted=self.targeted)
        loss = problem.compiled(("lbfgs", self.targeted), loop, "xl")
        run = _Batch(problem.x[batch], problem.labels[batch], problem.bounds, loss)
        weight = run.first_weight()
        lower, upper = np.zeros(len(weight)), np.full(len(weight), np.inf)
        for _ in range(self.searches):
            reached = run.minimise(weight, self.steps)
            lower = np.where(reached, weight, lower)
            upper = np.where(reached, upper, weight)
            between = np.sqrt(lower * np.where(np.isfinite(upper), upper, 1.0))
            weight = np.where(lower == 0, upper / 10, between)
            weight = np.where(np.isinf(upper), 10 * lower, weight)
        found = np.isfinite(run.least)
        return run.best, found, ~run.fine & ~found


class _Loss:
    """Loss, its gradient and the gap on tensors; compiled as one graph."""

    def __init__(self, function, shape, targeted):
        self.gap = Gap(function, shape, targeted)

    def __call__(self, point, labels):
        def objective(z):
            value, gap = self.gap.ahead(z, labels)
            loss = ops.softplus(-value)
            return ops.sum(loss), (loss, gap)

        gradient, (loss, gap) = backend.sum_gradient(objective, point)
        return loss, gradient, gap


class _Batch:
    """One batch of samples, the nearest adversarial point of each, and their minimisations."""

    def __init__(self, x, labels, bounds, loss):
        self.x, self.labels, self.loss = x, labels, loss
        clean = x.astype(np.float64)
        box = (-np.inf, np.inf) if bounds is None else bounds
        self.low, self.high = (bound - clean for bound in box)
        self.best, self.least = x.copy(), np.full(len(x), np.inf)
        _, self.gradient, self.gap = self._evaluate(np.zeros_like(clean), np.arange(len(x)))
        size = np.linalg.norm(self.gradient, axis=1)
        self.fine = np.isfinite(size) & (size > 0)

    def first_weight(self):
        """α at which the linearised problem ends at the boundary."""
        size = np.linalg.norm(self.gradient, axis=1)
        distance = np.abs(self.gap) / np.where(self.fine, size, 1.0)
        return np.where(self.fine, size / (2 * np.maximum(distance, 1e-30)), 1.0)

    def _evaluate(self, change, rows):
        """Loss, gradient and gap of some samples; their nearest adversarial points are kept."""
        point = (self.x[rows] + change).astype(np.float32)
        loss, gradient, gap = (a.astype(np.float64) for a in self.loss(point, self.labels[rows]))
        length = np.linalg.norm(point.astype(np.float64) - self.x[rows], axis=1)
        nearer = (gap > 0) & (length < self.least[rows])
        self.best[rows[nearer]], self.least[rows[nearer]] = point[nearer], length[nearer]
        return np.where(np.isfinite(loss), loss, np.inf), np.nan_to_num(gradient), gap

    def minimise(self, weight, steps):
        """Projected L-BFGS from the clean input; whether the minimiser is past the boundary."""

        def objective(change, rows):
            loss, gradient, gap = self._evaluate(change, rows)
            square, twice = np.einsum("ij,ij->i", change, change), 2 * weight[rows]
            return 0.5 * twice * square + loss, twice[:, None] * change + gradient, gap

        low, high = (np.broadcast_to(bound, self.x.shape) for bound in (self.low, self.high))
        change = np.zeros(self.x.shape)
        value, gradient, gap = objective(change, np.arange(len(change)))
        going, pairs = self.fine.copy(), []
        for _ in range(steps):
            pinned = (change <= low) & (gradient > 0) | (change >= high) & (gradient < 0)
            free = np.where(pinned, 0.0, gradient)
            direction = _two_loops(free, [np.where(pinned, 0.0, pair) for pair in pairs], weight)
            going &= np.einsum("ij,ij->i", direction, free) < 0
            new = [a.copy() for a in (change, value, gradient, gap)]
            rows, step = np.flatnonzero(going), 1.0
            for _ in range(_BACKTRACKS):
                if not len(rows):
                    break
                trial = np.clip(change[rows] + step * direction[rows], low[rows], high[rows])
                made = (trial, *objective(trial, rows))
                descent = np.einsum("ij,ij->i", gradient[rows], trial - change[rows])
                accepted = made[1] <= value[rows] + _ARMIJO * np.minimum(descent, 0.0)
                for old, now in zip(new, made, strict=True):
                    old[rows[accepted]] = now[accepted]
                rows, step = rows[~accepted], 0.5 * step
            going[rows] = False
            pairs = [*pairs, np.stack([new[0] - change, new[2] - gradient])][-_MEMORY:]
            # float32 losses allow no better.
            going &= value - new[1] > 1e-7 * np.abs(value)
            change, value, gradient, gap = new
            if not np.any(going):
                break
        return gap > 0


def _two_loops(gradient, pairs, weight):
    """Quasi-Newton direction -H g per row; pairs without positive curvature are passed over."""
    q, kept = gradient.copy(), []
    scale = 1 / (2 * weight)
    for s, y in reversed(pairs):
        curvature = np.einsum("ij,ij->i", s, y)
        norm = np.einsum("ij,ij->i", y, y)
        good = curvature > 1e-10 * norm * scale
        rho = np.where(good, 1 / np.where(good, curvature, 1.0), 0.0)
        a = rho * np.einsum("ij,ij->i", s, q)
        q -= a[:, None] * y
        kept.append((s, y, rho, a))
    if kept:
        s, y, rho, _ = kept[0]
        norm = np.einsum("ij,ij->i", y, y)
        scale = np.where(rho > 0, 1 / np.where(rho > 0, rho * norm, 1.0), scale)
    q *= scale[:, None]
    for s, y, rho, a in reversed(kept):
        q += (a - rho * np.einsum("ij,ij->i", y, q))[:, None] * s
    return -q
