"""Linearised decision boundaries: the nearest of them, and DeepFool."""

from __future__ import annotations

import functools
import math

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.boundary import Gap, clip, to_plane, unit_rows
from tf_lyapunov.attacks.inputs import positive_int, positive_number
from tf_lyapunov.attacks.minimal import MinimalAttack
from tf_lyapunov.theory.balls import L2, Linf


class Linearised:
    """Planes f_j - f_y = 0, linearised at a point, for several classes j at once.

    Args:
        gap: the `Gap`; if targeted, its own linearisation is the only plane.
        norm: `L2` or `Linf`, in which distances to planes are measured.
    """

    def __init__(self, gap: Gap, norm):
        self.gap, self.norm = gap, norm

    def classes(self, logits, labels, count):
        """The `count` classes with the largest logits besides the label, `(n, count)`."""
        is_own = ops.cast(ops.one_hot(labels, logits.shape[-1]), "bool")
        return ops.top_k(ops.where(is_own, -1e30, logits), count)[1]

    def planes(self, point, labels, classes, count):
        """Normals `(n, count, d)`, values and distances `(n, count)`, and the gap `(n,)`.

        Distances are infinite where the normal is zero or not finite.
        """
        if self.gap.targeted:
            normal, gap = backend.sum_gradient(lambda z: self.gap.linear(z, labels), point)
            values = gap
        else:
            ours = ops.repeat(labels, count, axis=0)
            theirs = ops.reshape(classes, (-1,))

            def difference(z):
                logits = self.gap.logits(z)
                number = logits.shape[-1]
                other = ops.where(ops.cast(ops.one_hot(theirs, number), "bool"), logits, 0.0)
                own = ops.where(ops.cast(ops.one_hot(ours, number), "bool"), logits, 0.0)
                value = ops.sum(other - own, axis=-1)
                return ops.sum(value), (value, self.gap.of(logits, ours))

            # One pass for all classes: each input is repeated once per class.
            many = ops.repeat(point, count, axis=0)
            normal, (values, gap) = backend.sum_gradient(difference, many)
            gap = ops.reshape(gap, (-1, count))[:, 0]
        _, length, total, fine = unit_rows(normal)
        dual = total if self.norm is Linf else length
        distance = ops.where(fine, ops.abs(values) / ops.where(fine, dual, 1.0), math.inf)
        distance = ops.where(ops.isnan(distance), math.inf, distance)
        shape = (-1, count)
        normal = ops.reshape(normal, (*shape, point.shape[-1]))
        return normal, ops.reshape(values, shape), ops.reshape(distance, shape), gap

    def nearest(self, point, labels, classes, count):
        """Normal `(n, d)` and value `(n,)` of the nearest plane, its distance, and the gap."""
        normal, values, distance, gap = self.planes(point, labels, classes, count)
        if count > 1:
            chosen = ops.cast(ops.one_hot(ops.argmin(distance, axis=-1), count), "bool")
            normal = ops.sum(ops.where(chosen[:, :, None], normal, 0.0), axis=1)
            values = ops.sum(ops.where(chosen, values, 0.0), axis=1)
        else:
            normal, values = normal[:, 0], values[:, 0]
        return normal, values, ops.min(distance, axis=-1), gap


class DeepFool(MinimalAttack):
    """Steps to the nearest linearised boundary until one is crossed.

    Per step: v ← v + the least change, inside the box, that makes f_j - f_y zero in first order,
    for the class j where it is least; the input is x + (1 + overshoot)·v. Exact for linear
    models.

    Args:
        radius: `L2` (default) or `Linf`; or a ball as a limit.
        steps: most steps.
        candidates: classes considered, those with the largest logits at the clean input.
        overshoot: share by which the step goes beyond the plane.
        bounds: None, or `(low, high)`.
        targeted: labels are targets; the one boundary is f_y - max_j≠y f_j = 0.
        batch_size: inputs per step; each is evaluated once per candidate.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import DeepFool
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> DeepFool()(model, [[1.0, 1.0]]).distance.round(5).tolist()
    [1.0]

    Reference:
        Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool: a simple and accurate method to fool deep
        neural networks", CVPR 2016, Algorithm 2 and section 3.3; the box is respected by the
        projection instead of clipping after it.
    """

    def __init__(
        self,
        radius=L2,
        *,
        steps: int = 50,
        candidates: int = 10,
        overshoot: float = 0.02,
        bounds=None,
        targeted: bool = False,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        self.steps = positive_int("steps", steps)
        self.candidates = positive_int("candidates", candidates)
        self.overshoot = positive_number("overshoot", overshoot)

    def _settings(self):
        return [f"steps={self.steps}"]

    def _search(self, problem, batch):
        count = 1 if self.targeted else min(self.candidates, problem.classes - 1)
        options = dict(
            norm=self.norm, targeted=self.targeted, boxed=problem.bounds is not None, count=count
        )
        loop = functools.partial(_DeepFool, **options)
        loop = problem.compiled(("deepfool", *options.values()), loop, "xlisww")
        overshoot = np.array([self.overshoot], np.float32)
        x, labels = problem.x[batch], problem.labels[batch]
        return loop(x, labels, np.int32(self.steps), overshoot, *problem.box)


class _DeepFool:
    """All steps on tensors; compiled as one graph."""

    def __init__(self, function, shape, norm, targeted, boxed, count):
        self.gap = Gap(function, shape, targeted)
        self.lines = Linearised(self.gap, norm)
        self.norm, self.boxed, self.count = norm, boxed, count

    def __call__(self, x, labels, steps, overshoot, low, high):
        logits = self.gap.logits(x)
        classes = self.lines.classes(logits, labels, self.count)

        def unfinished(i, change, point, found, stuck):
            return ops.logical_and(i < steps, ops.logical_not(ops.all(found | stuck)))

        def body(i, change, point, found, stuck):
            normal, value, distance, gap = self.lines.nearest(point, labels, classes, self.count)
            found = found | (gap > 0)
            stuck = stuck | ((distance == math.inf) & ops.logical_not(found))
            step = to_plane(point, normal, value, self.norm, low, high, self.boxed)
            going = ops.logical_not(found | stuck)[:, None]
            change = ops.where(going, change + step, change)
            moved = clip(x + (1 + overshoot[0]) * change, low, high, self.boxed)
            return i + 1, change, ops.where(going, moved, point), found, stuck

        found = self.gap.of(logits, labels) > 0
        start = (ops.zeros_like(steps), ops.zeros_like(x), x, found, ops.zeros_like(found))
        _, _, point, _, stuck = ops.while_loop(unfinished, body, start)
        return point, self.gap.of(self.gap.logits(point), labels) > 0, stuck


class NearestClasses:
    """Classes in the order of their linearised boundaries' distances, among the likeliest."""

    def __init__(self, function, shape, norm, count):
        self.gap = Gap(function, shape)
        self.lines, self.count = Linearised(self.gap, norm), count

    def __call__(self, x, labels):
        classes = self.lines.classes(self.gap.logits(x), labels, self.count)
        _, values, distance, _ = self.lines.planes(x, labels, classes, self.count)
        order = ops.argsort(distance, axis=-1)
        return tuple(
            ops.take_along_axis(table, order, axis=-1)
            for table in (ops.cast(classes, "int32"), distance, ops.abs(values) / distance)
        )
