"""Smallest perturbations along one direction: FGS and FGV with bisection, hot/cold, iterated."""

from __future__ import annotations

import functools

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.base import Attack, AttackResult, Problem
from tf_lyapunov.attacks.boundary import Crossing, Gap, clip, unit_rows
from tf_lyapunov.attacks.inputs import one_of, positive_int, positive_number
from tf_lyapunov.theory.balls import L2, Ball, Linf

# Rounding moves a crossing by a few units in the last place of float32, which is little or, for
# inputs at the boundary, all of the distance.
_OUTWARDS = [2.0**k for k in range(-22, 1, 2)]
_DOUBLINGS = 40


class MinimalAttack(Attack):
    """Base class of attacks that look for the nearest input with another label.

    The problem, per sample: minimise ‖v‖ subject to argmax f(x + v) ≠ y, low ≤ x + v ≤ high. Every
    distance is an upper bound of the minimum, verified on the model itself.

    Subclasses find inputs past the boundary (`_search`). Those are drawn back to a crossing of the
    segment from the clean input, then replaced by the crossing on the path from the clean input
    along the boundary's normal there, clip(x + t·n), where that is nearer: the point at which a
    boundary that is plane in between is nearest. All as far as the model's own verdict allows.

    Args:
        radius: `L2` or `Linf`, the norm to minimise; or a ball, such as `L2(0.5)`: perturbations
            beyond its radius do not count as found.
        bounds: None, or `(low, high)`.
        targeted: whether labels are targets to reach.
        batch_size: inputs per evaluation.
    """

    norms = (L2, Linf)
    _normals = 2

    def __init__(self, radius=L2, *, bounds=None, targeted=False, batch_size=256):
        unlimited = isinstance(radius, type) and issubclass(radius, Ball) and radius is not Ball
        super().__init__(
            radius(0.0) if unlimited else radius,
            bounds=bounds,
            targeted=targeted,
            batch_size=batch_size,
        )
        if unlimited:
            self.ball = None
        if self.norm not in self.norms:
            names = " or ".join(norm.__name__ for norm in self.norms)
            raise TypeError(f"{type(self).__name__} works in {names}. Received: radius={radius!r}.")

    def __repr__(self):
        ball = self.norm.__name__ if self.ball is None else repr(self.ball)
        parts = [ball, *self._settings(), *(["targeted=True"] if self.targeted else [])]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _settings(self) -> list[str]:
        return []

    def _radii(self, n):
        return np.full(n, np.inf) if self.ball is None else self.ball.per_sample(n)

    def _search(self, problem: Problem, batch: slice):
        """Best points `(m, d)` of one batch, whether they are past the boundary, and stuck."""
        raise NotImplementedError

    def _perturb(self, problem):
        point, stuck = problem.x.copy(), np.zeros(len(problem.x), bool)
        found = stuck.copy()
        for batch in self._batches(len(point)):
            best, found[batch], stuck[batch] = self._search(problem, batch)
            change, ones = best - problem.x[batch], np.ones(len(best))
            near, _, crossed = self._crossing(problem, batch, change, 0 * ones, ones)
            # Rounding may hide the crossing from the segment: then the point itself stays.
            point[batch] = np.where((found[batch] & crossed)[:, None], near, best)
            for _ in range(self._normals if np.any(found[batch]) else 0):
                self._straighten(problem, batch, point, found)
            problem.report(batch.stop)
        return self._confirmed(problem, point, found), stuck

    def _straighten(self, problem, batch, point, found):
        """Replace points by nearer crossings along the normals of the boundary there."""
        x = problem.x[batch]
        normal = functools.partial(_Normal, targeted=self.targeted, norm=self.norm)
        direction, first = problem.compiled(("normal", self.targeted, self.norm), normal, "xxl")(
            x, point[batch], problem.labels[batch]
        )
        near, crossed = self._first_crossing(problem, batch, direction, first)
        size = [self.norm(0.0).norm(p.astype(np.float64) - x) for p in (near, point[batch])]
        nearer = found[batch] & crossed & (size[0] < size[1])
        point[batch] = np.where(nearer[:, None], near, point[batch])

    def _first_crossing(self, problem, batch, direction, first, bisect=False):
        """Crossing on clip(x + t·v) near the first t = first, 2·first, … that is past it."""
        boxed = problem.bounds is not None
        loop = functools.partial(_Doubling, targeted=self.targeted, boxed=boxed)
        lower, upper = problem.compiled(("doubling", self.targeted, boxed), loop, "xxlfww")(
            problem.x[batch], direction, problem.labels[batch], first, *problem.box
        )
        point, _, found = self._crossing(problem, batch, direction, lower, upper, bisect)
        return point, found

    def _crossing(self, problem, batch, direction, lower, upper, bisect=False):
        boxed = problem.bounds is not None
        loop = functools.partial(Crossing, targeted=self.targeted, boxed=boxed, bisect=bisect)
        key = ("crossing", self.targeted, boxed, bisect)
        return problem.compiled(key, loop, "xxlffww")(
            problem.x[batch],
            direction.astype(np.float32),
            problem.labels[batch],
            np.asarray(lower, np.float32),
            np.asarray(upper, np.float32),
            *problem.box,
        )

    def _confirmed(self, problem, point, found):
        """Found points moved outwards by rounding errors until the model itself agrees."""
        start = point.astype(np.float64) - problem.x
        for step in _OUTWARDS:
            denied = found & ~problem.reached(point)
            if not np.any(denied):
                break
            moved = (problem.x[denied] + (1 + step) * start[denied]).astype(np.float32)
            if problem.bounds is not None:
                moved = np.clip(moved, *problem.bounds)
            point[denied] = moved
        return point


class _Ray(MinimalAttack):
    """Smallest step along one direction per sample, by bisection (Algorithm 2.1)."""

    _normals = 0

    def __init__(self, radius, *, limit=None, bounds=None, targeted=False, batch_size=256):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        self.limit = None if limit is None else positive_number("limit", limit)

    def _settings(self):
        return [] if self.limit is None else [f"limit={self.limit:g}"]

    def _direction(self, problem, batch):
        """Directions, the gap at the input, the slope of the gap along the direction, fine."""
        raise NotImplementedError

    def _search(self, problem, batch):
        x = problem.x[batch]
        direction, first, fine = self._direction(problem, batch)
        if self.limit is None:
            point, found = self._first_crossing(problem, batch, direction, first, bisect=True)
        else:
            upper = np.full(len(x), self.limit)
            point, _, found = self._crossing(problem, batch, direction, 0 * upper, upper, True)
        return np.where(found[:, None], point, x), found & fine, ~fine


class MinimalFGS(_Ray):
    """Smallest step ε along the sign of the loss gradient that changes the class, by bisection.

    η = ε·sign(∇_x L(x, y)), with the least ε in (0, M] that Algorithm 2.1 finds. Bisection assumes
    one crossing; it keeps its upper end past a crossing, so what it returns is adversarial even
    where the assumption fails.

    Args:
        radius: `Linf` (default) or `L2`, the norm of the reported distance; or a ball as a limit.
        limit: M. None: doubled from a first-order estimate of ε until the class changes, so
            that nearer crossings are preferred. A number: as published, bisection on [0, M].
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import MinimalFGS
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.5, 0.0]])])
    >>> MinimalFGS()(model, [[1.0, 1.0]]).distance.round(5).tolist()
    [1.0]

    Reference:
        Peck, "Lower bounds on the robustness of neural networks", Algorithm 2.1 and eq. (2.8);
        as published with `limit`.
    """

    def __init__(
        self, radius=Linf, *, limit=None, bounds=None, targeted=False, batch_size: int = 256
    ):
        super().__init__(
            radius, limit=limit, bounds=bounds, targeted=targeted, batch_size=batch_size
        )

    sign = True

    def _direction(self, problem, batch):
        loop = functools.partial(_GradientRay, targeted=self.targeted, sign=self.sign)
        return problem.compiled(("ray", self.targeted, self.sign), loop, "xl")(
            problem.x[batch], problem.labels[batch]
        )


class MinimalFGV(MinimalFGS):
    """Smallest step along the loss gradient itself that changes the class, by bisection.

    η = ε·∇_x L(x, y) with the least ε that Algorithm 2.1 finds; ε is counted in units of the
    gradient's l2 norm, so that `limit` is a distance.

    Args:
        radius: `L2` (default) or `Linf`, the norm of the reported distance; or a ball as a limit.
        limit: greatest step; None doubles a first-order estimate until the class changes.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import MinimalFGV
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> MinimalFGV()(model, [[1.0, 1.0]]).distance.round(5).tolist()
    [1.0]

    Reference:
        Peck, "Lower bounds on the robustness of neural networks", eq. (2.10); Rozsa, Rudd, Boult,
        "Adversarial diversity and hard positive generation", CVPR workshops 2016.
    """

    sign = False

    def __init__(
        self, radius=L2, *, limit=None, bounds=None, targeted=False, batch_size: int = 256
    ):
        super().__init__(
            radius, limit=limit, bounds=bounds, targeted=targeted, batch_size=batch_size
        )


class HotCold(_Ray):
    """Smallest step that moves towards a hot class and away from the cold one, by bisection.

    The direction is the gradient of <ω, h(x)> with ω held fixed, h the logits, c the label and c'
    the hot class: ω_c' = |h_c'|, ω_c = -|h_c|, zero elsewhere. The published ω_c = -h_c points
    back to the cold class where h_c < 0. The crossing may lead to any other class.

    Args:
        radius: `L2` (default) or `Linf`, or a ball as a limit.
        rank: which class is hot: 1 for the one with the largest logit besides the label, and so
            on; several ranks give several perturbations of one input.
        rule: `"sound"`, or `"published"` for ω_c = -h_c.
        limit: greatest step; None doubles a first-order estimate until the class changes.
        bounds: None, or `(low, high)`.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import HotCold
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> HotCold()(model, [[1.0, 1.0]]).distance.round(5).tolist()
    [1.0]

    Reference:
        Rozsa, Rudd, Boult, CVPR workshops 2016; Peck, section 2.5.3, eq. (2.9).
    """

    def __init__(
        self, radius=L2, *, rank=1, rule="sound", limit=None, bounds=None, batch_size: int = 256
    ):
        super().__init__(radius, limit=limit, bounds=bounds, batch_size=batch_size)
        self.rank = positive_int("rank", rank)
        self.rule = one_of("rule", rule, ("sound", "published"))

    def _settings(self):
        return [f"rank={self.rank}", f"rule={self.rule!r}", *super()._settings()]

    def _direction(self, problem, batch):
        loop = functools.partial(_HotCold, rank=self.rank, published=self.rule == "published")
        return problem.compiled(("hot/cold", self.rank, self.rule), loop, "xl")(
            problem.x[batch], problem.labels[batch]
        )


class IterativePerturbation:
    """Sequence X_0, X_1, …: each an adversarial perturbation of the one before.

    X_{i+1} = attack(X_i), with the model's own verdict on X_i as the label. After the first, the
    inputs lie on a boundary and the perturbations become small; labels often alternate between
    two classes.

    Args:
        attack: an attack; default `MinimalFGS()`.
        steps: length of the sequence.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import IterativePerturbation
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0]])])
    >>> path = IterativePerturbation(steps=3)(model, [[1.0]])
    >>> [int(step.predictions_adv[0]) for step in path]
    [1, 0, 1]

    Reference:
        Peck, "Lower bounds on the robustness of neural networks", section 2.7.
    """

    def __init__(self, attack: Attack | None = None, *, steps: int = 5):
        self.attack = MinimalFGS() if attack is None else attack
        if not isinstance(self.attack, Attack):
            raise TypeError(f"`attack` must be an attack. Received: attack={attack!r}.")
        self.steps = positive_int("steps", steps)

    def __call__(self, model, x, *, perturbed=None, progress=None) -> tuple[AttackResult, ...]:
        """One `AttackResult` per step; step i attacks `x_adv` of step i - 1.

        An input whose step failed stays where that attack left it.
        """
        path, options = [], {"perturbed": perturbed, "progress": progress}
        for _ in range(self.steps):
            path.append(self.attack(model, path[-1].x_adv if path else x, **options))
        return tuple(path)

    def __repr__(self):
        return f"IterativePerturbation({self.attack!r}, steps={self.steps})"


class _GradientRay:
    """Direction of the loss gradient, and the step to the boundary that linearising predicts."""

    def __init__(self, function, shape, targeted, sign):
        self.gap, self.sign = Gap(function, shape, targeted), sign

    def __call__(self, x, labels):
        gradient, gap = backend.sum_gradient(lambda z: self.gap.smooth(z, labels), x)
        unit, length, total, fine = unit_rows(gradient)
        if self.sign:
            unit, length = ops.sign(unit), total
        return unit, _estimate(gap, length, fine), fine


class _Normal:
    """Normal of the boundary at a point, and the step from the clean input to its plane."""

    def __init__(self, function, shape, targeted, norm):
        self.gap, self.norm = Gap(function, shape, targeted), norm

    def __call__(self, x, point, labels):
        normal, gap = backend.sum_gradient(lambda z: self.gap.linear(z, labels), point)
        unit, length, total, fine = unit_rows(normal)
        value = gap / ops.where(fine, length, 1.0) + ops.sum(unit * (x - point), axis=-1)
        if self.norm is Linf:
            dual = ops.where(fine, total / ops.where(fine, length, 1.0), 1.0)
            return ops.sign(unit), _estimate(value, dual, fine)
        return unit, _estimate(value, ops.ones_like(length), fine)


class _HotCold:
    def __init__(self, function, shape, rank, published):
        self.gap, self.rank, self.published = Gap(function, shape), rank, published

    def __call__(self, x, labels):
        logits = self.gap.logits(x)
        classes = logits.shape[-1]
        if self.rank >= classes:
            raise ValueError(
                f"`rank` must be less than the number of classes, {classes}. "
                f"Received: rank={self.rank}."
            )
        cold = ops.one_hot(labels, classes)
        others = ops.where(ops.cast(cold, "bool"), -1e30, logits)
        order = ops.top_k(others, self.rank)[1]
        hot = ops.one_hot(order[:, -1], classes)
        away = logits if self.published else ops.abs(logits)
        weights = ops.stop_gradient(hot * ops.abs(logits) - cold * away)

        def features(z):
            found = self.gap.logits(z)
            return ops.sum(weights * found), self.gap.of(found, labels)

        gradient, gap = backend.sum_gradient(features, x)
        unit, length, _, fine = unit_rows(gradient)
        return unit, _estimate(gap, length, fine), fine


def _estimate(gap, length, fine):
    """Step to the boundary of the linearised gap; a positive number in any case."""
    step = ops.where(fine, ops.abs(gap) / ops.where(fine, length, 1.0), 1.0)
    return ops.clip(step, 1e-20, 1e20)


class _Doubling:
    """Steps doubled until the gap is positive, and the last step before."""

    def __init__(self, function, shape, targeted, boxed):
        self.gap, self.boxed = Gap(function, shape, targeted), boxed

    def __call__(self, x, direction, labels, step, low, high):
        def past(t):
            point = clip(x + t[:, None] * direction, low, high, self.boxed)
            return self.gap.of(self.gap.logits(point), labels) > 0

        def unfinished(i, lower, upper, found):
            return ops.logical_and(i < _DOUBLINGS, ops.logical_not(ops.all(found)))

        def body(i, lower, upper, found):
            lower = ops.where(found, lower, upper)
            upper = ops.where(found, upper, 2.0 * upper)
            return i + 1, lower, upper, found | past(upper)

        start = (ops.zeros((), "int32"), ops.zeros_like(step), step, past(step))
        _, lower, upper, _ = ops.while_loop(unfinished, body, start)
        return lower, upper
