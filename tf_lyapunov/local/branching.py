"""Splits of single units: every branch has a smaller box, and the worst of them counts.

The inputs of a region are divided by whether a unit's input lies below or above a point of its box;
a bound that holds on every branch holds. (L) holds on a branch with its box alone changed, since
neither ball nor centre depend on it; a branch without inputs may have any bound.
"""

import dataclasses

import numpy as np

from tf_lyapunov.local.ascent import ascend
from tf_lyapunov.local.relaxation import Elementwise


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """What proves bounds on all branches.

    Attributes:
        splits: tuple of `(position, unit, point)`; branch b lies above the points of those whose
            bits are set in b.
        multipliers: dict from positions to `Multipliers` of all branches, row after row.
    """

    splits: tuple
    multipliers: dict


def split_lower(around, rows, multipliers, count, steps, finder=None, stop=None):
    """Proved lower bounds of rows of the output, by splits of the units that cost them most.

    Args:
        around: float64 `Around`, complete.
        rows: float64 (rows, outputs).
        multipliers: of the rows without splits, from which every branch begins.
        count: number of units to split, for 2^count branches of each row.
        steps: of ascent on every branch.
        finder: an `Around` of a `SearchFlow` to ascend on, in place of `around` itself.
        stop: level of the bounds that is enough, or None.

    Returns:
        `(bounds, branches)`: float64 (rows,), and the `Branches` of them all.
    """
    target = around.flow.output
    shape = around.trace.shape(target)
    c = rows.reshape(len(rows), *shape)
    bound, _, memory = around.backward(c, target, multipliers, record=True)
    units = _costly(around, memory, np.argmin(bound), count)
    branches = 2 ** len(units)
    signs, many = np.arange(branches), np.repeat(c, branches, axis=0)
    points = [_point(around.steps[k], unit) for k, unit in units]
    split = _split(around, units, points, signs, rows)
    found = {}
    for k, held in multipliers.items():
        step = split.get(k) or around.steps[k]
        found[k] = step.blank(many)
        parents = np.repeat(np.arange(len(rows)), branches)
        found[k].adopt(held, np.arange(len(many)), parents)
    if found and steps:
        own = split if finder is None else _split(finder, units, points, signs, rows)
        _improve(around if finder is None else finder, target, many, found, own, steps, stop)
    lower = around.lower(many, target, found, split=split)
    places = tuple((k, unit, point) for (k, unit), point in zip(units, points, strict=True))
    return lower.reshape(len(rows), branches).min(axis=1), Branches(places, found)


def _point(step, unit):
    left, right = float(step.low[0, unit]), float(step.high[0, unit])
    return 0.0 if left < 0 < right else (left + right) / 2


def _split(around, units, points, signs, rows):
    """Dict of the `Elementwise` of steps whose units are split, a box per branch of every row."""
    split, count = {}, len(signs) * len(rows)
    for k in {k for k, _ in units}:
        step = around.steps[k]
        low = np.repeat(step.low, count, axis=0)
        high = np.repeat(step.high, count, axis=0)
        for bit, (other, unit) in enumerate(units):
            if other != k:
                continue
            above = np.tile((signs >> bit) & 1, len(rows)).astype(bool)
            low[above, unit], high[~above, unit] = points[bit], points[bit]
        split[k] = Elementwise(step.operation, step.center.reshape(1, *step.shape),
                               low, high, step.radius, step.all_weights())  # fmt: skip
        # Of a unit that was split g is free: what it adds is the split's own multiplier.
        split[k].free = None
    return split


def _improve(finder, target, many, found, split, steps, stop):
    """Ascends from the multipliers `found` of all branches, on an `Around` of any precision."""
    many, every = many.astype(finder.dtype), np.arange(len(many))
    searched = {k: (split.get(k) or finder.steps[k]).blank(many) for k in found}
    for k, held in searched.items():
        held.adopt(found[k], every, every)
    ascend(finder, many, target, searched, steps, split=split, stop=stop)
    for k, held in searched.items():
        found[k].adopt(held, every, every)


def _costly(around, memory, row, count):
    """`(position, unit)` of the units whose relaxation costs a row most."""
    scores = []
    for k, own in memory:
        step = around.steps.get(k)
        if own is None or not isinstance(step, Elementwise):
            continue
        low, high = step.low[0, step.columns], step.high[0, step.columns]
        away = np.maximum(np.minimum(high, -low), 0.0)
        size = np.abs(own[0][row]) * away
        scores += [(float(s), k, int(u)) for s, u in zip(size, step.columns, strict=True)]
    return [(k, u) for s, k, u in sorted(scores, reverse=True)[:count] if s > 0]
