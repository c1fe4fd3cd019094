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


def split_lower(around, rows, multipliers, count, steps):
    """Proved lower bounds of rows of the output, by splits of the units that cost them most.

    Args:
        around: float64 `Around`, complete.
        rows: float64 (rows, outputs).
        multipliers: of the rows without splits, from which every branch begins.
        count: number of units to split, for 2^count branches of each row.
        steps: of ascent on every branch.

    Returns:
        `(bounds, branches)`: float64 (rows,), and the `Branches` of them all.
    """
    target = around.flow.output
    shape = around.trace.shape(target)
    c = rows.reshape(len(rows), *shape)
    bound, _, memory = around.backward(c, target, multipliers, record=True)
    units = _costly(around, memory, np.argmin(bound), count)
    branches = 2 ** len(units)
    split, signs, points = {}, np.arange(branches), [None] * len(units)
    many = np.repeat(c, branches, axis=0)
    for k in {k for k, _ in units}:
        step = around.steps[k]
        low = np.repeat(step.low, len(many), axis=0)
        high = np.repeat(step.high, len(many), axis=0)
        for bit, (other, unit) in enumerate(units):
            if other != k:
                continue
            above = np.tile((signs >> bit) & 1, len(rows)).astype(bool)
            left, right = low[0, unit], high[0, unit]
            point = 0.0 if left < 0 < right else (left + right) / 2
            low[above, unit], high[~above, unit] = point, point
            points[bit] = k, unit, float(point)
        split[k] = Elementwise(step.operation, step.center.reshape(1, *step.shape),
                               low, high, step.radius, step.all_weights())  # fmt: skip
        # Of a unit that was split g is free: what it adds is the split's own multiplier.
        split[k].free = None
    found = {}
    for k, held in multipliers.items():
        step = split.get(k) or around.steps[k]
        found[k] = step.blank(many)
        parents = np.repeat(np.arange(len(rows)), branches)
        found[k].adopt(held, np.arange(len(many)), parents)
    if found and steps:
        ascend(around, many, target, found, steps, split=split)
    lower = around.lower(many, target, found, split=split)
    return lower.reshape(len(rows), branches).min(axis=1), Branches(tuple(points), found)


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
