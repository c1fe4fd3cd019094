"""Fast adaptive boundary attack: projections on linearised boundaries, near the clean input."""

from __future__ import annotations

import functools
import math

import numpy as np
from keras import ops

from tf_lyapunov.attacks.apgd import Likeliest
from tf_lyapunov.attacks.boundary import Gap, clip, extent, to_plane
from tf_lyapunov.attacks.inputs import checked_seed, generator, positive_int
from tf_lyapunov.attacks.linearised import Linearised
from tf_lyapunov.attacks.minimal import MinimalAttack
from tf_lyapunov.theory.balls import L2, Linf

# Extrapolation η, greatest share α of the clean input, and backward step β, as published.
_OVERSHOOT, _BIAS, _BACK = 1.05, 0.1, 0.9


class FAB(MinimalAttack):
    """Least perturbation by projections of the iterate and of the clean input on one plane.

    With d and d_0 the steps of the iterate x_k and of x to the nearest linearised boundary inside
    the box, and α = min(‖d‖/(‖d‖ + ‖d_0‖), 0.1):

        x_{k+1} = (1 - α)(x_k + 1.05·d) + α(x + 1.05·d_0),

    and x_{k+1} ← x + 0.9·(x_{k+1} - x) after each success.

    Args:
        radius: `L2` (default) or `Linf`; or a ball as a limit: what lies inside is found, and not
            improved further by other classes or restarts.
        steps: number of linearisations per run.
        restarts: number of runs; all but the first start at random, at half the distance found.
        classes: None: the nearest of all boundaries at each step. A number: that many classes, the
            likeliest first, are attacked one by one (FAB-T), with one gradient per step; any
            change of the class counts.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach.
        seed: int, for restarts.
        batch_size: inputs per step; each is evaluated once per class without `classes`.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import FAB
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> FAB(steps=10)(model, [[1.0, 1.0]]).distance.round(5).tolist()
    [1.0]

    Reference:
        Croce, Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
        attack", ICML 2020, Algorithm 1.
    """

    def __init__(
        self,
        radius=L2,
        *,
        steps: int = 100,
        restarts: int = 1,
        classes: int | None = None,
        bounds=None,
        targeted: bool = False,
        seed: int = 0,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        self.steps = positive_int("steps", steps)
        self.restarts = positive_int("restarts", restarts)
        self.classes = None if classes is None else positive_int("classes", classes)
        if classes is not None and targeted:
            raise ValueError(
                "`classes` needs true labels, not targets. Received: "
                f"classes={classes}, targeted=True."
            )
        self.seed = checked_seed(seed)

    def _settings(self):
        parts = [f"steps={self.steps}"]
        parts += [f"restarts={self.restarts}"] if self.restarts > 1 else []
        return parts + ([] if self.classes is None else [f"classes={self.classes}"])

    def _notes(self, classes):
        if self.classes is not None and self.classes > classes - 1:
            return (f"{classes - 1} instead of {self.classes} other classes: there are no more",)
        return ()

    def _search(self, problem, batch):
        x, labels = problem.x[batch], problem.labels[batch]
        best, least = x.copy(), np.full(len(x), np.inf, np.float32)
        stuck = np.ones(len(x), bool)
        tables = self._tables(problem, x, labels)
        for run in range(self.restarts):
            for table in tables:
                rows = np.arange(len(x))
                if self.ball is not None:
                    rows = np.flatnonzero(least > problem.radius[batch])
                if not len(rows):
                    break
                start = x[rows] if run == 0 else self._start(problem, batch, rows, run, least)
                best[rows], least[rows], idle = self._run(
                    problem, x[rows], labels[rows], table[rows], start, best[rows], least[rows]
                )
                stuck[rows] &= idle
        found = np.isfinite(least)
        return best, found, stuck & ~found

    def _tables(self, problem, x, labels):
        """Tables `(m, k)` of the classes to attack at once, one per run."""
        if self.targeted:
            return [labels[:, None]]
        count = min(self.classes or problem.classes, problem.classes - 1)
        likeliest = functools.partial(Likeliest, count=count)
        table = problem.compiled(("likeliest", count), likeliest, "xl")(x, labels)[0]
        return [table] if self.classes is None else np.split(table, count, axis=1)

    def _run(self, problem, x, labels, classes, start, best, least):
        options = dict(
            norm=self.norm,
            targeted=self.targeted,
            boxed=problem.bounds is not None,
            count=classes.shape[1],
        )
        loop = functools.partial(_Loop, **options)
        loop = problem.compiled(("fab", *options.values()), loop, "xlciwwxxf")
        return loop(x, labels, classes, np.int32(self.steps), *problem.box, start, best, least)

    def _start(self, problem, batch, rows, run, least):
        x = problem.x[batch][rows]
        size = np.minimum(least[rows], problem.radius[batch][rows])
        size = np.where(np.isfinite(size), size, 0.0)
        start, free = x.copy(), problem.free
        for i, row in enumerate(rows):
            random = generator(self.seed, problem.index[batch][row], run)
            direction = random.uniform(-1, 1, free)
            if self.norm is L2:
                direction = random.standard_normal(free)
            length = np.linalg.norm(direction, np.inf if self.norm is Linf else 2)
            start[i, :free] += 0.5 * size[i] * direction / length
        return start if problem.bounds is None else np.clip(start, *problem.bounds)


class _Loop:
    """All steps of one run on tensors; compiled as one graph."""

    def __init__(self, function, shape, norm, targeted, boxed, count):
        self.gap = Gap(function, shape, targeted)
        self.lines = Linearised(self.gap, norm)
        self.norm, self.boxed, self.count = norm, boxed, count

    def __call__(self, x, labels, classes, steps, low, high, point, best, least):
        def plane(at, normal, value):
            return to_plane(at, normal, value, self.norm, low, high, self.boxed)

        def unfinished(i, point, best, least, stuck):
            return ops.logical_and(i < steps, ops.logical_not(ops.all(stuck)))

        def body(i, point, best, least, stuck):
            normal, value, distance, _ = self.lines.nearest(point, labels, classes, self.count)
            stuck = stuck | (distance == math.inf)
            ours = plane(point, normal, value)
            clean = plane(x, normal, value + ops.sum(normal * (x - point), axis=-1))
            one, two = extent(ours, self.norm), extent(clean, self.norm)
            share = one / ops.maximum(one + two, 1e-30)
            share = ops.minimum(share, _BIAS)[:, None]
            moved = (1 - share) * (point + _OVERSHOOT * ours) + share * (x + _OVERSHOOT * clean)
            moved = clip(moved, low, high, self.boxed)
            point = ops.where(stuck[:, None], point, moved)
            past = self.gap.of(self.gap.logits(point), labels) > 0
            length = extent(point - x, self.norm)
            better = past & (length < least)
            best = ops.where(better[:, None], point, best)
            least = ops.where(better, length, least)
            point = ops.where(past[:, None], x + _BACK * (point - x), point)
            return i + 1, point, best, least, stuck

        start = (ops.zeros_like(steps), point, best, least, ops.zeros_like(least) > 0)
        _, _, best, least, stuck = ops.while_loop(unfinished, body, start)
        return best, least, stuck
