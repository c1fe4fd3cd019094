"""Minimal perturbations by gradient steps of known length under a norm that adapts: DDN, FMN."""

from __future__ import annotations

import functools
import math

import numpy as np
from keras import ops

from tf_lyapunov.attacks import backend
from tf_lyapunov.attacks.boundary import Gap, clip, extent, to_plane, unit_rows
from tf_lyapunov.attacks.inputs import positive_int, positive_number
from tf_lyapunov.attacks.linearised import Linearised
from tf_lyapunov.attacks.minimal import MinimalAttack
from tf_lyapunov.theory.balls import L2, Linf

_LAST_STEP = 0.01
_LAST_GAMMA = 1e-3
# Classes among which FMN starts towards the nearest.
_LIKELIEST = 10


class _Decoupled(MinimalAttack):
    def __init__(
        self,
        radius=L2,
        *,
        steps: int = 100,
        gamma: float = 0.05,
        step: float | None = None,
        bounds=None,
        targeted: bool = False,
        batch_size: int = 256,
    ):
        super().__init__(radius, bounds=bounds, targeted=targeted, batch_size=batch_size)
        self.steps = positive_int("steps", steps)
        self.gamma = positive_number("gamma", gamma)
        if self.gamma >= 1:
            raise ValueError(f"`gamma` must be less than 1. Received: gamma={gamma}.")
        self.step = None if step is None else positive_number("step", step)

    def _settings(self):
        return [f"steps={self.steps}"]

    def _search(self, problem, batch):
        boxed = problem.bounds is not None
        options = dict(
            rule=self._rule,
            count=1 if self.targeted else min(_LIKELIEST, problem.classes - 1),
            norm=self.norm,
            targeted=self.targeted,
            boxed=boxed,
        )
        loop = problem.compiled(
            ("decoupled", *options.values()), functools.partial(_Loop, **options), "xlsssww"
        )
        cosine = (1 + np.cos(np.pi * np.arange(self.steps) / self.steps)) / 2
        alpha = _LAST_STEP + (1 - _LAST_STEP) * cosine
        gamma = self._gammas(cosine)
        scale = [0.0 if self.step is None else self.step]
        arrays = (np.asarray(a, np.float32) for a in (alpha, gamma, scale))
        return loop(problem.x[batch], problem.labels[batch], *arrays, *problem.box)

    def _gammas(self, cosine):
        raise NotImplementedError


class DDN(_Decoupled):
    """Decoupled direction and norm: gradient steps, then a norm that shrinks where they succeed.

    Per step k: v ← v + α_k·g/‖g‖₂ with g the loss gradient; ρ ← (1 - γ)ρ where x + v is past the
    boundary, else (1 + γ)ρ; v ← ρ·v/‖v‖₂, clipped to the box. α falls to α/100 along a cosine.

    Args:
        radius: `L2`, or a ball `L2(r)` as a limit.
        steps: number of gradients.
        gamma: γ in (0, 1).
        step: first α and ρ, in units of the input; the paper's 1 suits images in [0, 1]. None:
            each sample's first-order distance to the boundary.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import DDN
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    >>> DDN()(model, [[1.0, 1.0]]).distance.round(4).tolist()
    [1.0]

    Reference:
        Rony, Hafemann, Oliveira, Ben Ayed, Sabourin, Granger, "Decoupling direction and norm for
        efficient gradient-based l2 adversarial attacks and defenses", CVPR 2019, Algorithm 1;
        scaled per sample, and drawn to the crossing at the end.
    """

    norms = (L2,)
    _rule = "ddn"

    def _gammas(self, cosine):
        return np.full(self.steps, self.gamma)


class FMN(_Decoupled):
    """Fast minimum norm: ascent of the gap between logits inside a ball that follows the boundary.

    Per step k: ε ← min((1 - γ_k)ε, least distance found) where x + v is past the boundary, else
    (1 + γ_k)ε, or (1 + γ_k)(‖v‖ + |gap|/‖∇gap‖_*) while nothing was found;
    v ← P_ε(v + α_k·g/‖g‖₂), clipped to the box. γ and α fall along a cosine.

    Args:
        radius: `L2` (default) or `Linf`; or a ball as a limit.
        steps: number of gradients.
        gamma: first γ in (0, 1).
        step: first α, an l2 length in units of the input. None: each sample's first-order
            distance to the boundary, times √d in l∞.
        bounds: None, or `(low, high)`.
        targeted: labels are targets to reach.
        batch_size: inputs per gradient.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.attacks import FMN
    >>> from tf_lyapunov.theory.balls import Linf
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, -1.0], [1.0, -1.0]])])
    >>> FMN(Linf)(model, [[1.0, 1.0]]).distance.round(4).tolist()
    [1.0]

    Reference:
        Pintor, Roli, Brendel, Biggio, "Fast minimum-norm adversarial attacks through adaptive norm
        constraints", NeurIPS 2021, Algorithm 1; it starts on the nearest linearised boundary,
        since the gap alone would follow the likeliest class.
    """

    _rule = "fmn"

    def _gammas(self, cosine):
        return _LAST_GAMMA + np.maximum(self.gamma - _LAST_GAMMA, 0.0) * cosine


class _Loop:
    """All steps of DDN or FMN on tensors; compiled as one graph."""

    def __init__(self, function, shape, rule, count, norm, targeted, boxed):
        self.gap, self.count = Gap(function, shape, targeted), count
        self.fmn, self.norm, self.boxed = rule == "fmn", norm, boxed
        self.width = math.prod(shape)

    def __call__(self, x, labels, alpha, gamma, scale, low, high):
        count = ops.shape(alpha)[0]

        def measured(change):
            objective = self.gap.linear if self.fmn else self.gap.smooth
            point = x + change
            gradient, gap = backend.sum_gradient(lambda z: objective(z, labels), point)
            if self.boxed:
                # Entries that the box would undo would still cost length.
                outwards = ((gradient > 0) & (point >= high)) | ((gradient < 0) & (point <= low))
                gradient = ops.where(outwards, 0.0, gradient)
            return *unit_rows(gradient), gap

        # First-order distance to the boundary from the clean input.
        _, length, total, fine, gap = measured(ops.zeros_like(x))
        dual = total if self.norm is Linf else length
        first = ops.where(fine, ops.abs(gap) / ops.where(fine, dual, 1.0), 0.0)
        root = math.sqrt(self.width) if self.norm is Linf else 1.0
        stride = ops.where(scale[0] > 0, scale[0] * ops.ones_like(first), root * first)

        def unfinished(i, change, size, best, least, stuck):
            return ops.logical_and(i < count, ops.logical_not(ops.all(stuck)))

        def keep(change, gap, best, least):
            length = extent(change, self.norm)
            past = gap > 0
            better = past & (length < least)
            return past, ops.where(better[:, None], change, best), ops.where(better, length, least)

        def body(i, change, size, best, least, stuck):
            unit, length, total, fine, gap = measured(change)
            past, best, least = keep(change, gap, best, least)
            a, g = ops.take(alpha, i), ops.take(gamma, i)
            grown = (1 + g) * size
            if self.fmn:
                dual = total if self.norm is Linf else length
                ahead = ops.where(fine, ops.abs(gap) / ops.where(fine, dual, 1.0), 0.0)
                reach = (1 + g) * (extent(change, self.norm) + ahead)
                grown = ops.where(least < math.inf, grown, reach)
            size = ops.where(past, ops.minimum((1 - g) * size, least), grown)
            change = change + (a * stride)[:, None] * unit
            change = clip(x + self._project(change, size), low, high, self.boxed) - x
            return i + 1, change, size, best, least, stuck | (ops.logical_not(fine) & ~past)

        infinite = ops.full_like(first, math.inf)
        size = infinite if self.fmn else stride
        zero = ops.zeros_like(x)
        change = self._nearest_plane(x, labels, low, high) if self.fmn else zero
        stuck = ops.zeros_like(fine)
        start = (ops.zeros((), "int32"), change, size, zero, infinite, stuck)
        _, change, _, best, least, stuck = ops.while_loop(unfinished, body, start)
        gap = self.gap.of(self.gap.logits(x + change), labels)
        _, best, least = keep(change, gap, best, least)
        found = least < math.inf
        return x + ops.where(found[:, None], best, change), found, stuck

    def _nearest_plane(self, x, labels, low, high):
        lines = Linearised(self.gap, self.norm)
        classes = lines.classes(self.gap.logits(x), labels, self.count)
        normal, value, _, _ = lines.nearest(x, labels, classes, self.count)
        return to_plane(x, normal, value, self.norm, low, high, self.boxed)

    def _project(self, change, size):
        if self.norm is Linf:
            size = size[:, None]
            return ops.minimum(ops.maximum(change, -size), size)
        length = extent(change, L2)
        safe = ops.where(length > 0, length, 1.0)
        if self.fmn:
            size = ops.minimum(size, length)
        return change * ops.where(length > 0, size / safe, 0.0)[:, None]
