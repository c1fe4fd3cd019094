"""Gradient attacks inside a ball: FGM, FGSM and PGD in l2 and l∞."""

from __future__ import annotations

import math

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.base import Attack, Problem, margin
from tf_lyapunov.attacks.inputs import checked_seed, generator, one_of, positive_int
from tf_lyapunov.attacks.logits import two_columns
from tf_lyapunov.theory.balls import L2, Ball, Linf

# Margins closer to zero than this, relative to the logits, may flip sign between the compiled
# loop and the model's own predictions: such an iterate is not yet taken for a success.
_TIE = 64 * float(np.finfo(np.float32).eps)
# Sums of squares in float32 are trusted between these; else rows are rescaled first.
_SMALL_SQUARE, _LARGE_SQUARE = 1e-30, 1e30
_LOSSES = ("cross_entropy", "margin")
_KEEPS = ("nearest", "loss", "last")
_FIRST_STAGE = 5


class PGD(Attack):
    """Projected gradient ascent on a classification loss inside a ball around each input.

    The problem, per sample, with the loss ℓ of the logits f:

        maximise ℓ(f(x + v), y)   subject to   ‖v‖ ≤ radius,  low ≤ x + v ≤ high

    by v ← P(v + step·g/‖g‖₂) in l2 and v ← P(v + step·sign(g)) in l∞, g the gradient. Success is a
    proof that the input can be broken; failure proves nothing.

    Cross-entropy is ascended through log Σ_j≠y exp(f_j - f_y): its gradient has the same direction
    at every point, and does not vanish in float32 when the softmax saturates.

    Args:
        radius: `L2(...)` or `Linf(...)`; one radius, or one per sample.
        steps: number of gradient steps per restart.
        step: step length in units of the input, a number or one per sample. Default:
            2.5 · radius / steps.
        restarts: independent runs; all but the first start at random, and only on samples that
            are not broken yet.
        random_start: whether the first run, too, starts uniformly at random in the ball.
        bounds: None, or `(low, high)` that every iterate respects. A certificate over ℝⁿ must be
            attacked with None.
        loss: `"cross_entropy"`, or `"margin"`: max_j≠y f_j - f_y.
        targeted: labels are targets to reach; the loss of the target is descended.
        keep: which iterate is returned. `"nearest"`: the misclassified one with the smallest
            distance, else the one with the largest loss. `"loss"`: the largest loss. `"last"`: the
            final one, as in the papers' protocols.
        stop_early: with `keep="nearest"`, a sample is finished once it is broken; pass False to
            spend all steps in search of a nearer one.
        seed: int; random starts depend on it and on the sample's position alone.
        batch_size: inputs per gradient.

    Raises:
        TypeError, ValueError: for arguments out of range.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import PGD
    >>> from tf_lyapunov.theory.balls import L2
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> result = PGD(L2([0.9, 1.1]), steps=10)(model, [[1.0, 0.0], [1.0, 0.0]])
    >>> result.success.tolist()
    [False, True]

    Reference:
        Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards deep learning models resistant to
        adversarial attacks", ICLR 2018, eq. (2.1) and section 2.1.
    """

    def __init__(
        self,
        radius: Ball,
        *,
        steps: int = 40,
        step=None,
        restarts: int = 1,
        random_start: bool = False,
        bounds=None,
        loss: str = "cross_entropy",
        targeted: bool = False,
        keep: str = "nearest",
        stop_early: bool = True,
        seed: int = 0,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        if not isinstance(radius, (L2, Linf)):
            raise TypeError(f"`radius` must be L2 or Linf. Received: {type(radius).__name__}.")
        self.steps = positive_int("steps", steps)
        self.restarts = positive_int("restarts", restarts)
        self.step = _checked_step(step)
        self.random_start = bool(random_start)
        self.loss = one_of("loss", loss, _LOSSES)
        self.keep = one_of("keep", keep, _KEEPS)
        self.stop_early = bool(stop_early) and keep == "nearest"
        self.seed = checked_seed(seed)

    def __repr__(self):
        parts = [repr(self.ball), f"steps={self.steps}"]
        if self.restarts > 1:
            parts.append(f"restarts={self.restarts}")
        if self.loss != "cross_entropy":
            parts.append(f"loss={self.loss!r}")
        if self.targeted:
            parts.append("targeted=True")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _loss(self, logits, labels):
        if self.loss == "margin":
            return -margin(logits, labels)
        return super()._loss(logits, labels)

    def _perturb(self, problem: Problem):
        n = len(problem.x)
        best = _State.at(problem.x)
        for restart in range(self.restarts):
            rows = np.flatnonzero(~best.found) if self.stop_early else np.arange(n)
            if not len(rows):
                break
            random = self.random_start or restart > 0
            run = _State.at(self._start(problem, rows, restart) if random else problem.x[rows])
            self._ascend(problem, rows, run, random)
            best.take_better(rows, run, always=restart == 0)
        return best.point, best.stuck

    def _start(self, problem, rows, restart):
        """Uniformly random points of the ball, one generator per sample, inside the box."""
        dimension = problem.free
        start = problem.x[rows]
        for i, row in enumerate(rows):
            random = generator(self.seed, problem.index[row], restart)
            if isinstance(self.ball, Linf):
                direction = random.uniform(-1, 1, dimension)
            else:
                direction = random.standard_normal(dimension)
                direction *= random.uniform() ** (1 / dimension) / np.linalg.norm(direction)
            start[i, :dimension] += problem.radius[row] * direction
        return start if problem.bounds is None else np.clip(start, *problem.bounds)

    def _ascend(self, problem, rows, run, random):
        """All steps of one run, in stages: samples that are done do not enter the next stage."""
        ascent = self._compiled(problem)
        radius = problem.radius.astype(np.float32)
        step = self._steps_of(problem)
        low, high = problem.bounds or (np.zeros((1, problem.x.shape[1]), np.float32),) * 2
        active, taken = np.arange(len(rows)), 0
        while taken < self.steps and len(active):
            count = self.steps - taken
            if self.stop_early:
                # Growing stages: most samples that break at all break early.
                count = min(count, max(_FIRST_STAGE, 2 * taken))
            last, evaluate_first = taken + count == self.steps, random or taken > 0
            for batch in self._batches(len(active)):
                here = active[batch]
                there = rows[here]
                outputs = ascent(
                    problem.x[there],
                    problem.labels[there],
                    radius[there],
                    step[there],
                    low,
                    high,
                    np.int32(count),
                    np.bool_(last),
                    np.bool_(evaluate_first),
                    *run.take(here),
                )
                run.put(here, outputs)
            taken += count
            if self.stop_early:
                active = active[~(run.found | run.stuck)[active]]

    def _steps_of(self, problem):
        if self.step is None:
            return (2.5 * problem.radius / self.steps).astype(np.float32)
        if self.step.ndim and len(self.step) != problem.total:
            raise ValueError(
                f"`step` must be a number or have one entry per sample, {problem.total}. "
                f"Received: {len(self.step)} entries."
            )
        return np.broadcast_to(self.step, problem.total)[problem.index].astype(np.float32)

    def _compiled(self, problem):
        rule = "l2" if isinstance(self.ball, L2) else "linf"
        boxed = problem.bounds is not None
        options = (rule, self.loss, self.targeted, self.keep, self.stop_early, boxed)
        cache, key = problem.view.compiled, (options, problem.shape)
        if key not in cache:
            loop = _Ascent(problem.view.function, problem.shape, *options)
            width = math.prod(problem.shape)
            flat, one = ("float32", (None, width)), ("float32", (None,))
            flag, bound = ("bool", (None,)), ("float32", (1, width))
            arguments = [flat, ("int32", (None,)), one, one, bound, bound]
            arguments += [("int32", ()), ("bool", ()), ("bool", ())]
            state = [flat, flat, one, one, flag, flag]
            cache[key] = backend.compiled(loop, problem.view.variables, arguments + state)
        return cache[key]


class FGM(PGD):
    """Fast gradient method: one full step along the gradient.

    l2: v = radius·g/‖g‖₂. l∞ (FGSM): v = radius·sign(g). The result is that step, also when it
    fails. For a linear model with two classes it is the strongest perturbation.

    Args:
        radius: `L2(...)` or `Linf(...)`; one radius, or one per sample.
        bounds: None, or `(low, high)`.
        loss: `"cross_entropy"` or `"margin"`.
        targeted: labels are targets to reach.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import FGM
    >>> from tf_lyapunov.theory.balls import L2
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> FGM(L2(0.5))(model, [[1.0, 0.0]]).x_adv.tolist()
    [[0.5, 0.0]]

    Reference:
        Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015,
        section 4 (l∞); Miyato, Dai, Goodfellow, ICLR 2017, eq. (5) (l2).
    """

    def __init__(
        self,
        radius: Ball,
        *,
        bounds=None,
        loss: str = "cross_entropy",
        targeted: bool = False,
        batch_size: int = 256,
    ):
        step = getattr(radius, "radius", None)
        super().__init__(
            radius,
            steps=1,
            step=None,
            bounds=bounds,
            loss=loss,
            targeted=targeted,
            keep="last",
            batch_size=batch_size,
        )
        self.step = np.asarray(step, np.float64)

    def __repr__(self):
        return f"{type(self).__name__}({self.ball!r})"


class FGSM(FGM):
    """Fast gradient sign method: `FGM` in l∞.

    Args:
        radius: a number, an array `(n,)`, or `Linf(...)`.
        **options: as for `FGM`.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import FGSM
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.5, 0.0]])])
    >>> FGSM(0.5)(model, [[1.0, 1.0]]).x_adv.tolist()
    [[0.5, 0.5]]

    Reference:
        Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015.
    """

    def __init__(self, radius, **options):
        super().__init__(radius if isinstance(radius, Ball) else Linf(radius), **options)
        if not isinstance(self.ball, Linf):
            raise TypeError(f"FGSM is an l∞ attack; use FGM. Received: radius={radius!r}.")


class _State:
    """Where one run stands: NumPy rows that are gathered into batches and scattered back."""

    fields = ("current", "point", "size", "loss", "found", "stuck")

    def __init__(self, current, point, size, loss, found, stuck):
        self.current, self.point = current, point
        self.size, self.loss, self.found, self.stuck = size, loss, found, stuck

    @classmethod
    def at(cls, points):
        n = len(points)
        infinite = np.full(n, np.inf, np.float32)
        no = np.zeros(n, bool)
        return cls(points.copy(), points.copy(), infinite, -infinite, no.copy(), no)

    def take(self, rows):
        return [getattr(self, name)[rows] for name in self.fields]

    def put(self, rows, values):
        for name, value in zip(self.fields, values, strict=True):
            getattr(self, name)[rows] = value

    def take_better(self, rows, run, always=False):
        """Merge another run on some rows: broken before unbroken, then nearer, then larger loss."""
        found, size, loss = self.found[rows], self.size[rows], self.loss[rows]
        both = found & run.found
        nearer = (run.size < size) | ((run.size == size) & (run.loss > loss))
        better = (run.found & ~found) | (both & nearer)
        better |= ~found & ~run.found & (run.loss > loss)
        better |= always
        for name in ("point", "size", "loss", "found"):
            getattr(self, name)[rows[better]] = getattr(run, name)[better]
        self.stuck[rows] |= run.stuck


class _Ascent:
    """`count` steps of projected gradient ascent on tensors; compiled as one graph."""

    def __init__(self, function, shape, rule, loss, targeted, keep, stop_early, boxed):
        self.function, self.shape = function, shape
        self.rule, self.loss, self.targeted, self.boxed = rule, loss, targeted, boxed
        self.keep, self.stop_early = keep, stop_early

    def __call__(self, x, labels, radius, step, low, high, count, last, evaluate_first, *state):
        radius, step = radius[:, None], step[:, None]

        def objective(point):
            return self._objective(point, labels)

        def unfinished(i, change, current, point, size, loss, found, stuck):
            more = i < count
            if self.stop_early:
                more = ops.logical_and(more, ops.logical_not(ops.all(found | stuck)))
            return more

        def body(i, change, current, *kept):
            gradient, measured = backend.sum_gradient(objective, current)
            candidate = ops.logical_or(i > 0, evaluate_first)
            if self.keep != "last":
                kept = self._keep(candidate, change, current, measured, *kept)
            *kept, stuck = kept
            change, moved = self._move(change, gradient, radius, step)
            current = x + change
            if self.boxed:
                current = ops.minimum(ops.maximum(current, low), high)
                change = current - x
            stuck = stuck | (ops.logical_not(moved) & ops.logical_not(kept[-1]))
            return (i + 1, change, current, *kept, stuck)

        current, *kept = state
        start = (ops.zeros_like(count), current - x, current, *kept)
        _, change, current, *kept = ops.while_loop(unfinished, body, start)
        # The last iterate has not been evaluated yet, and needs no gradient.
        kept = ops.cond(
            last,
            lambda: tuple(self._keep(last, change, current, objective(current)[1], *kept)),
            lambda: tuple(kept),
        )
        return (current, *kept)

    def _objective(self, point, labels):
        """Sum over the batch of what is ascended; per sample, that and whether it is broken."""
        logits = two_columns(self.function(ops.reshape(point, (-1, *self.shape))))
        is_own = ops.cast(ops.one_hot(labels, logits.shape[-1]), "bool")
        own = ops.sum(ops.where(is_own, logits, 0.0), axis=-1)
        others = ops.where(is_own, -1e30, logits)
        top = ops.max(others, axis=-1)
        lead = top if self.loss == "margin" else ops.logsumexp(others, axis=-1)
        value, gap = lead - own, top - own
        if self.targeted:
            value, gap = -value, -gap
        broken = gap > _TIE * ops.maximum(ops.abs(own), ops.abs(top))
        return ops.sum(value), (value, broken)

    def _keep(self, candidate, change, current, measured, point, size, loss, found, stuck):
        """Replace the kept iterate where the current one is better."""
        value, broken = measured
        broken = broken & candidate
        extent = size
        if self.keep == "last":
            better = ops.ones_like(found) & candidate
        elif self.keep == "loss":
            better = (value > loss) & candidate
        else:
            better = ops.logical_not(found) & (((value > loss) & candidate) | broken)
            if not self.stop_early:
                extent = self._extent(change)
                better = better | (found & broken & (extent < size))
        point = ops.where(better[:, None], current, point)
        size = ops.where(better & broken, extent, size)
        loss = ops.where(better, value, loss)
        found = ops.where(better, broken, found)
        return point, size, loss, found, stuck

    def _extent(self, change):
        if self.rule == "linf":
            return ops.max(ops.abs(change), axis=-1)
        return ops.sqrt(ops.sum(ops.square(change), axis=-1))

    def _move(self, change, gradient, radius, step):
        """One projected step; also where the gradient was neither zero nor non-finite."""
        if self.rule == "linf":
            direction = ops.sign(gradient)
            # A sum, because it is NaN wherever an entry is, and NaN > 0 is false.
            moved = ops.sum(ops.abs(direction), axis=-1) > 0
            direction = ops.cond(
                ops.all(moved), lambda: direction, lambda: _rows_or_zero(direction, moved)
            )
            change = change + step * direction
            return ops.minimum(ops.maximum(change, -radius), radius), moved
        square = ops.sum(ops.square(gradient), axis=-1)
        trusted = ops.all((square > _SMALL_SQUARE) & (square < _LARGE_SQUARE))
        gradient, norm = ops.cond(
            trusted, lambda: (gradient, ops.sqrt(square)), lambda: _rescaled(gradient)
        )
        moved = norm > 0
        scale = ops.where(moved[:, None], step / ops.where(moved, norm, 1.0)[:, None], 0.0)
        change = change + scale * gradient
        length = ops.sqrt(ops.sum(ops.square(change), axis=-1, keepdims=True))
        outside = length > radius
        factor = ops.where(outside, radius / ops.where(outside, length, 1.0), 1.0)
        return change * factor, moved


def _rescaled(gradient):
    """Rows divided by their largest entry, and their norms; zero for zero and non-finite rows."""
    top = ops.max(ops.abs(gradient), axis=-1)
    fine = (top > 0) & (top < math.inf)
    gradient = _rows_or_zero(gradient / ops.where(fine, top, 1.0)[:, None], fine)
    return gradient, ops.sqrt(ops.sum(ops.square(gradient), axis=-1))


def _rows_or_zero(values, keep):
    return ops.where(keep[:, None], values, ops.zeros_like(values))


def _checked_step(step):
    if step is None:
        return None
    try:
        value = np.array(step, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"`step` must be a number or an array. Received: step={step!r}.") from None
    if value.ndim > 1 or not np.all(np.isfinite(value)) or np.any(value <= 0):
        raise ValueError(
            "`step` must be positive and finite, one number or one per sample. "
            f"Received: step={step!r}. Pass `None` for 2.5·radius/steps."
        )
    return value
