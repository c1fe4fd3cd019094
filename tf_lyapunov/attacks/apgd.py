"""Auto-PGD: ascent in a ball with momentum and a step that halves when it stops helping."""

from __future__ import annotations

import functools

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.base import Attack, margin
from tf_lyapunov.attacks.boundary import Gap, clip, extent, unit_rows
from tf_lyapunov.attacks.inputs import checked_seed, generator, one_of, positive_int
from tf_lyapunov.theory.balls import L2, Ball, Linf

_LOSSES = ("cross_entropy", "margin", "dlr")
_MOMENTUM = 0.75
_ENOUGH = 0.75
# After so many steps, samples that are broken leave the batch.
_STAGES = (10, 30)


class APGD(Attack):
    """Projected gradient ascent with momentum whose steps halve per sample, from a random start.

    With P the projection on ball and box, g the normalised gradient (its sign in l∞):

        z = P(x_k + η g),   x_{k+1} = P(x_k + ¾(z - x_k) + ¼(x_k - x_{k-1})),   η_0 = 2·radius.

    At checkpoints after 22% of the steps, and then after gaps that shrink by 3% to 6%, a sample
    halves its step and goes back to its best point if fewer than 75% of the steps since the last
    one raised the loss, or if neither step nor best loss changed. A broken sample is finished.

    Args:
        radius: `L2(...)` or `Linf(...)`; one radius, or one per sample.
        steps: number of gradients per run.
        restarts: number of runs, each on the samples that are not broken yet.
        loss: `"cross_entropy"`, `"margin"` (max_j≠y f_j - f_y), or `"dlr"`, the difference of
            logits ratio (max_j≠y f_j - f_y)/(f_(1) - f_(3)) with f_(k) the k-th largest.
        classes: None, or a number of classes t that are attacked one by one, the likeliest first,
            with f_t - f_y in place of the margin, over f_(1) - ½(f_(3) + f_(4)) for `"dlr"`; any
            change of the class counts.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach; the loss is descended.
        seed: int; random starts depend on it and on the sample's position alone.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import APGD
    >>> from tf_lyapunov.theory.balls import L2
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> APGD(L2([0.9, 1.1]))(model, [[1.0, 0.0], [1.0, 0.0]]).success.tolist()
    [False, True]

    Reference:
        Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks", ICML 2020, Algorithm 1 and section 4. The ratio needs three
        classes, with `classes` four: below, the margin takes its place, and the result says so.
    """

    def __init__(
        self,
        radius: Ball,
        *,
        steps: int = 100,
        restarts: int = 1,
        loss: str = "cross_entropy",
        classes: int | None = None,
        bounds=None,
        targeted: bool = False,
        seed: int = 0,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        if self.norm not in (L2, Linf):
            raise TypeError(f"`radius` must be L2 or Linf. Received: {self.norm.__name__}.")
        self.steps = positive_int("steps", steps)
        self.restarts = positive_int("restarts", restarts)
        self.loss = one_of("loss", loss, _LOSSES)
        self.classes = None if classes is None else positive_int("classes", classes)
        if classes is not None and (targeted or loss == "cross_entropy"):
            raise ValueError(
                "`classes` needs true labels and loss='dlr' or 'margin'. Received: "
                f"classes={classes}, targeted={targeted}, loss={loss!r}."
            )
        self.seed = checked_seed(seed)

    def __repr__(self):
        parts = [repr(self.ball), f"steps={self.steps}", f"loss={self.loss!r}"]
        for name in ("restarts", "classes", "targeted"):
            value = getattr(self, name)
            parts += [f"{name}={value}"] if value not in (1, None, False) else []
        return f"{type(self).__name__}({', '.join(parts)})"

    def _notes(self, classes):
        notes = ()
        if self.loss == "dlr" and self._rule(classes) != "dlr":
            notes += (
                f"the margin instead of the logit ratio, which needs {self._least()} classes: the "
                f"model has {classes}",
            )
        if self.classes is not None and self.classes > classes - 1:
            notes += (f"{classes - 1} instead of {self.classes} other classes: there are no more",)
        return notes

    def _least(self):
        return 3 if self.classes is None else 4

    def _rule(self, classes):
        return "margin" if self.loss == "dlr" and classes < self._least() else self.loss

    def _loss(self, logits, labels):
        if self.loss == "cross_entropy":
            return super()._loss(logits, labels)
        return -margin(logits, labels)

    def _perturb(self, problem):
        n = len(problem.x)
        point, found, stuck = problem.x.copy(), np.zeros(n, bool), np.zeros(n, bool)
        count = None if self.classes is None else min(self.classes, problem.classes - 1)
        targets = [problem.labels] if count is None else self._likeliest(problem, count).T
        for run in range(self.restarts * len(targets)):
            rows = np.flatnonzero(~found)
            if not len(rows):
                break
            state = self._ascend(problem, rows, targets[run % len(targets)], run)
            point[rows], found[rows] = state["point"], state["found"]
            stuck[rows] |= state["stuck"]
            problem.report(int(found.sum()), f"{self!r}, run {run + 1}, broken")
        return point, stuck

    def _likeliest(self, problem, count):
        function = functools.partial(Likeliest, count=count)
        likeliest = problem.compiled(("likeliest", count), function, "xl")
        parts = [
            likeliest(problem.x[b], problem.labels[b])[0] for b in self._batches(len(problem.x))
        ]
        return np.concatenate(parts)

    def _start(self, problem, rows, run):
        start, free = problem.x[rows], problem.free
        for i, row in enumerate(rows):
            random = generator(self.seed, problem.index[row], run)
            if self.norm is Linf:
                direction = random.uniform(-1, 1, free)
                direction /= np.abs(direction).max()
            else:
                direction = random.standard_normal(free)
                direction /= np.linalg.norm(direction)
            start[i, :free] += problem.radius[row] * direction
        return start if problem.bounds is None else np.clip(start, *problem.bounds)

    def _ascend(self, problem, rows, targets, run):
        """All steps of one run, in stages: samples that are done do not enter the next stage."""
        n = len(rows)
        rule = self._rule(problem.classes)
        options = dict(
            norm=self.norm,
            loss=rule,
            targeted=self.targeted,
            other=self.classes is not None,
            boxed=problem.bounds is not None,
        )
        loop = functools.partial(_Ascent, **options)
        loop = problem.compiled(("apgd", *options.values()), loop, "xllfwwiis" + _Ascent.kinds)
        start = self._start(problem, rows, run)
        radius = problem.radius[rows].astype(np.float32)
        no, low = np.zeros(n, bool), np.full(n, -np.inf, np.float32)
        state = dict(
            current=start,
            previous=start.copy(),
            best=start.copy(),
            slope=np.zeros_like(start),
            point=start.copy(),
            top=low,
            last=low.copy(),
            checked=low.copy(),
            ups=np.zeros(n, np.float32),
            step=2 * radius,
            halved=~no,
            found=no,
            stuck=no.copy(),
        )
        windows = _windows(self.steps)
        ends = [*(s for s in _STAGES if s < self.steps), self.steps]
        active = np.arange(n)
        for begin, end in zip([0, *ends], ends, strict=False):
            for batch in self._batches(len(active)):
                here = active[batch]
                there = rows[here]
                outputs = loop(
                    problem.x[there],
                    problem.labels[there],
                    targets[there].astype(np.int32),
                    radius[here],
                    *problem.box,
                    np.int32(begin),
                    np.int32(end),
                    windows,
                    *(values[here] for values in state.values()),
                )
                for values, output in zip(state.values(), outputs, strict=True):
                    values[here] = output
            active = active[~state["found"][active]]
        return state


def _windows(steps):
    """Length of the window that ends at each evaluation, zero where there is no checkpoint."""
    windows = np.zeros(steps, np.float32)
    gap, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    at = gap
    while at < steps:
        windows[at] = gap
        gap = max(gap - shrink, least)
        at += gap
    return windows


class Likeliest:
    """The classes with the largest logits besides the label, `(n, count)`."""

    def __init__(self, function, shape, count):
        self.gap, self.count = Gap(function, shape), count

    def __call__(self, x, labels):
        logits = self.gap.logits(x)
        is_own = ops.cast(ops.one_hot(labels, logits.shape[-1]), "bool")
        return (ops.cast(ops.top_k(ops.where(is_own, -1e30, logits), self.count)[1], "int32"),)


class _Ascent:
    """Steps `begin` to `end` on tensors; compiled as one graph."""

    kinds = "xxxxxfffffbbb"

    def __init__(self, function, shape, norm, loss, targeted, other, boxed):
        self.gap = Gap(function, shape, targeted)
        self.norm, self.loss, self.other, self.boxed = norm, loss, other, boxed

    def __call__(self, x, labels, targets, radius, low, high, begin, end, windows, *state):
        def objective(point):
            logits = self.gap.logits(point)
            value = self._value(logits, labels, targets)
            value = -value if self.gap.targeted else value
            return ops.sum(value), (value, self.gap.surely(logits, labels))

        def project(change):
            if self.norm is Linf:
                bound = radius[:, None]
                change = ops.minimum(ops.maximum(change, -bound), bound)
            else:
                length = extent(change, L2)
                outside = length > radius
                scale = ops.where(outside, radius / ops.where(outside, length, 1.0), 1.0)
                change = scale[:, None] * change
            return clip(x + change, low, high, self.boxed) - x

        def unfinished(i, *state):
            found, stuck = state[-2:]
            return ops.logical_and(i < end, ops.logical_not(ops.all(found | stuck)))

        def body(
            i,
            current,
            previous,
            best,
            slope,
            point,
            top,
            last,
            checked,
            ups,
            step,
            halved,
            found,
            stuck,
        ):
            gradient, (value, broken) = backend.sum_gradient(objective, current)
            better = value > top
            best = ops.where(better[:, None], current, best)
            slope = ops.where(better[:, None], gradient, slope)
            top = ops.where(better, value, top)
            point = ops.where((broken & ops.logical_not(found))[:, None], current, point)
            found = found | broken
            ups = ups + ops.cast((value > last) & (i > 0), "float32")
            window = ops.take(windows, i)
            idle = ops.logical_not(halved) & (checked >= top)
            halve = ((ups <= _ENOUGH * window) | idle) & (window > 0)
            halved = ops.where(window > 0, halve, halved)
            checked, ups = ops.where(window > 0, top, checked), ops.where(window > 0, 0.0, ups)
            step = ops.where(halve, 0.5 * step, step)
            now = ops.where(halve[:, None], best, current)
            unit, _, _, fine = unit_rows(ops.where(halve[:, None], slope, gradient))
            direction = ops.sign(unit) if self.norm is Linf else unit
            change = now - x
            ahead = project(change + step[:, None] * direction)
            share = ops.where(i > 0, _MOMENTUM, 1.0)
            moved = project(change + share * (ahead - change) + (1 - share) * (now - previous))
            stuck = stuck | (ops.logical_not(fine) & ops.logical_not(found))
            return (
                *(i + 1, x + moved, now, best, slope, point),
                *(top, value, checked, ups, step, halved, found, stuck),
            )

        _, current, *state = ops.while_loop(unfinished, body, (begin, *state))
        previous, best, slope, point, *numbers, found, stuck = state
        # The last iterate has not been evaluated yet, and needs no gradient.
        _, (value, broken) = objective(current)
        broken = broken & ops.logical_not(found)
        point = ops.where(broken[:, None], current, point)
        found = found | broken
        highest = ops.where((value > numbers[0])[:, None], current, best)
        point = ops.where(found[:, None], point, highest)
        return (current, previous, best, slope, point, *numbers, found, stuck)

    def _value(self, logits, labels, targets):
        number = logits.shape[-1]
        is_own = ops.cast(ops.one_hot(labels, number), "bool")
        own = ops.sum(ops.where(is_own, logits, 0.0), axis=-1)
        others = ops.where(is_own, -1e30, logits)
        if self.loss == "cross_entropy":
            # Parallel to the cross-entropy, increasing in it, and never saturated.
            return ops.logsumexp(others, axis=-1) - own
        if self.other:
            is_target = ops.cast(ops.one_hot(targets, number), "bool")
            value = ops.sum(ops.where(is_target, logits, 0.0), axis=-1) - own
        else:
            value = ops.max(others, axis=-1) - own
        if self.loss == "margin":
            return value
        order = ops.top_k(logits, 4 if self.other else 3)[0]
        third = 0.5 * (order[:, 2] + order[:, 3]) if self.other else order[:, 2]
        spread = order[:, 0] - third
        return value / ops.maximum(spread, 1e-12 + 1e-7 * ops.abs(order[:, 0]))
