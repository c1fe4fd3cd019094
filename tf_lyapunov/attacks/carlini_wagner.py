"""Carlini and Wagner's l2 attack: Adam on distance plus a hinge whose weight is searched for."""

from __future__ import annotations

import functools
import math

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.boundary import Gap, extent, unit_rows
from tf_lyapunov.attacks.inputs import positive_int, positive_number
from tf_lyapunov.attacks.linearised import NearestClasses
from tf_lyapunov.attacks.minimal import MinimalAttack
from tf_lyapunov.theory.balls import L2

_MEAN, _SQUARE = 0.9, 0.999
# The box is mapped to the line by artanh; this keeps its edges at finite places.
_EDGE = 0.999999
_LAST_STEP = 0.01
# Adam's first step in artanh of the box.
_TANH_STEP = 0.25
# Classes among which the nearest are looked for.
_LIKELIEST = 10


class CarliniWagner(MinimalAttack):
    """Least l2 perturbation by unconstrained optimisation, after Carlini and Wagner.

    The problem, per sample, for a weight c that is searched for:

        minimise ‖v‖₂² + c·max(0, f_y - f_t)(x + v)

    by Adam, from v = 0, for the classes t whose linearised boundaries are nearest; with a box over
    w in x + v = mid + half·tanh(w). The weight is divided by 10 or bisected (geometrically) after
    a success, multiplied by 10 or bisected after a failure.

    Args:
        radius: `L2`, or a ball `L2(r)` as a limit.
        candidates: number of classes t that are attacked, the nearest one first; any change of
            the class counts.
        searches: number of weights per class.
        steps: number of gradients per weight.
        step: Adam's first step, which falls to a hundredth along a cosine: in units of the input,
            or of artanh with a box. None: the mean change per entry that the first-order
            distance suggests, or 0.25 with a box.
        weight: first c. None: twice what the linearised problem needs, per sample, so that the
            scales of inputs and logits do not matter.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach; the hinge is max_j≠y f_j - f_y.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import CarliniWagner
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> CarliniWagner(searches=2)(model, [[1.0, 1.0]]).distance.round(4).tolist()
    [1.0]

    Reference:
        Carlini, Wagner, "Towards evaluating the robustness of neural networks", IEEE Symposium on
        Security and Privacy 2017, section VI.A, objective f_6, confidence 0.
    """

    norms = (L2,)

    def __init__(
        self,
        radius=L2,
        *,
        candidates: int = 3,
        searches: int = 3,
        steps: int = 100,
        step: float | None = None,
        weight: float | None = None,
        bounds=None,
        targeted: bool = False,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        self.candidates = positive_int("candidates", candidates)
        self.searches = positive_int("searches", searches)
        self.steps = positive_int("steps", steps)
        self.step = None if step is None else positive_number("step", step)
        self.weight = None if weight is None else positive_number("weight", weight)

    def _settings(self):
        return [
            f"candidates={self.candidates}",
            f"searches={self.searches}",
            f"steps={self.steps}",
        ]

    def _search(self, problem, batch):
        x, labels = problem.x[batch], problem.labels[batch]
        best, least = x.copy(), np.full(len(x), np.inf, np.float32)
        classes, distance, slope = self._classes(problem, x, labels)
        for k in range(classes.shape[1]):
            start = (distance[:, k], slope[:, k])
            best, least = self._weights(problem, x, labels, classes[:, k], *start, best, least)
        found = np.isfinite(least)
        return best, found, ~np.isfinite(distance).any(axis=1) & ~found

    def _classes(self, problem, x, labels):
        """Classes to attack `(m, k)`, first-order distances and slopes of their boundaries."""
        if self.targeted:
            first = functools.partial(_First, targeted=True)
            distance, slope = problem.compiled(("cw first",), first, "xl")(x, labels)
            # The hinge of a targeted attack has no use for a second class.
            return labels[:, None], distance[:, None], slope[:, None]
        count = min(_LIKELIEST, problem.classes - 1)
        order = functools.partial(NearestClasses, norm=L2, count=count)
        order = problem.compiled(("nearest classes", L2, count), order, "xl")
        return [table[:, : self.candidates] for table in order(x, labels)]

    def _weights(self, problem, x, labels, classes, distance, slope, best, least):
        """The search over weights, for one class per sample."""
        boxed = problem.bounds is not None
        loop = functools.partial(_Adam, targeted=self.targeted, boxed=boxed, free=problem.free)
        loop = problem.compiled(("cw", self.targeted, boxed), loop, "xllffxfsww")
        known = np.isfinite(distance) & (slope > 0)
        distance = np.where(known, distance, 1.0).astype(np.float64)
        weight = np.full(len(x), self.weight or 1.0)
        if self.weight is None:
            weight = np.clip(4 * distance / np.where(known, slope, 1.0), 1e-30, 1e30)
        step = np.full(len(x), self.step or _TANH_STEP)
        if self.step is None and not boxed:
            step = distance / math.sqrt(x.shape[1])
        cosine = (1 + np.cos(np.pi * np.arange(self.steps) / self.steps)) / 2
        decay = (_LAST_STEP + (1 - _LAST_STEP) * cosine).astype(np.float32)
        lower, upper = np.zeros(len(x)), np.full(len(x), np.inf)
        for _ in range(self.searches):
            numbers = weight.astype(np.float32), step.astype(np.float32)
            best, least, found = loop(
                x, labels, classes, *numbers, best, least, decay, *problem.box
            )
            upper = np.where(found, weight, upper)
            lower = np.where(found, lower, weight)
            between = np.sqrt(lower * np.where(np.isfinite(upper), upper, 1.0))
            below = np.where(lower > 0, between, upper / 10)
            weight = np.clip(np.where(np.isinf(upper), 10 * lower, below), 1e-30, 1e30)
        return best, least


class _First:
    """First-order distance to a targeted boundary, and the slope of the gap, at the input."""

    def __init__(self, function, shape, targeted):
        self.gap = Gap(function, shape, targeted)

    def __call__(self, x, labels):
        gradient, gap = backend.sum_gradient(lambda z: self.gap.linear(z, labels), x)
        _, length, _, fine = unit_rows(gradient)
        slope = ops.where(fine, length, 0.0)
        return ops.where(fine, ops.abs(gap) / ops.where(fine, slope, 1.0), math.inf), slope


class _Adam:
    """All steps for one weight per sample; compiled as one graph."""

    def __init__(self, function, shape, targeted, boxed, free):
        self.gap, self.boxed, self.free = Gap(function, shape, targeted), boxed, free

    def __call__(self, x, labels, classes, weight, step, best, least, decay, low, high):
        count = ops.shape(decay)[0]
        middle, half = 0.5 * (high + low), 0.5 * (high - low)
        origin = ops.arctanh(_EDGE * (x - middle) / half) if self.boxed else x

        def point_of(variable):
            if not self.boxed:
                return x + variable
            point = middle + half * ops.tanh(origin + variable)
            if x.shape[1] == self.free:
                return point
            return ops.concatenate([point[:, : self.free], x[:, self.free :]], axis=1)

        def objective(variable):
            point = point_of(variable)
            logits = self.gap.logits(point)
            gap = self.gap.of(logits, labels)
            hinge = -gap
            if not self.gap.targeted:
                other = ops.cast(ops.one_hot(classes, logits.shape[-1]), "bool")
                own = ops.cast(ops.one_hot(labels, logits.shape[-1]), "bool")
                hinge = ops.sum(
                    ops.where(own, logits, 0.0) - ops.where(other, logits, 0.0), axis=-1
                )
            square = ops.sum(ops.square(point - x), axis=-1)
            return ops.sum(square + weight * ops.relu(hinge)), (point, gap)

        def keep(point, gap, best, least, found):
            length = extent(point - x, L2)
            better = (gap > 0) & (length < least)
            best = ops.where(better[:, None], point, best)
            return best, ops.where(better, length, least), found | (gap > 0)

        def unfinished(i, *state):
            return i < count

        def body(i, variable, mean, square, best, least, found):
            gradient, (point, gap) = backend.sum_gradient(objective, variable)
            kept = keep(point, gap, best, least, found)
            gradient = ops.where(ops.abs(gradient) < math.inf, gradient, 0.0)
            mean = _MEAN * mean + (1 - _MEAN) * gradient
            square = _SQUARE * square + (1 - _SQUARE) * ops.square(gradient)
            time = ops.cast(i + 1, "float32")
            bias = ops.sqrt(1 - _SQUARE**time) / (1 - _MEAN**time)
            some = square > 0
            ratio = ops.where(some, mean / ops.sqrt(ops.where(some, square, 1.0)), 0.0)
            variable = variable - (ops.take(decay, i) * step)[:, None] * bias * ratio
            return i + 1, variable, mean, square, *kept

        zero = ops.zeros_like(x)
        found = ops.zeros_like(labels) > 0
        start = (ops.zeros((), "int32"), zero, zero, zero, best, least, found)
        _, variable, _, _, best, least, found = ops.while_loop(unfinished, body, start)
        point = point_of(variable)
        gap = self.gap.of(self.gap.logits(point), labels)
        return keep(point, gap, best, least, found)
