"""Boxes, balls and relaxations of every step around one point, in the order of the flow."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.local.around import Around
from tf_lyapunov.local.ascent import PATIENCE, RATE, TRIALS, ascend, tried
from tf_lyapunov.local.localgains import LocalGains
from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.local.relaxed import is_relaxed
from tf_lyapunov.local.windows import Windows, window_around
from tf_lyapunov.program import rounding

# Weights of balls: a power of coefficients relative to their mean, within limits.
_POWER, _WEIGHTS = 0.4, (0.1, 10.0)
# Entries of one block of rows, at the widest step.
_BLOCK = 2**21


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is searched.

    Attributes:
        box_steps: ascent steps for boxes of hidden steps; 0 uses the first trials alone.
        box_trials: values of λ tried first for boxes, see `ascent.TRIALS`.
        margin_steps: ascent steps for the functionals asked for.
        margin_trials: values of λ tried first for them.
        balls: whether balls are used at all.
        rate: of the ascent.
        patience: passes after which an ascent ends where little was gained, or None.
    """

    box_steps: int = 12
    box_trials: tuple = (0.0, 0.05, 0.3)
    margin_steps: int = 60
    margin_trials: tuple = TRIALS
    balls: bool = True
    rate: float = RATE
    patience: int | None = PATIENCE


CROWN = Effort(0, (0.0,), 0, (0.0,), False)


@dataclasses.dataclass
class Found:
    """Multipliers of the boxes of one position.

    Attributes:
        units: int, the units that were bounded, in the order of the rows.
        multipliers: dict of `Multipliers` by position; row i is the lower bound of units[i], row
            len(units) + i minus the upper one.
    """

    units: np.ndarray
    multipliers: dict


@dataclasses.dataclass
class Memory:
    """What a search found; all of it is arbitrary to a proof.

    Attributes:
        boxes: dict from positions to lists of `Found`.
        weights: dict from positions of elementwise outputs to `(columns, weights)`.
        vectors: singular vectors of linearised maps, see `LocalGains`.
    """

    boxes: dict = dataclasses.field(default_factory=dict)
    weights: dict = dataclasses.field(default_factory=dict)
    vectors: dict = dataclasses.field(default_factory=dict)

    def copy(self):
        """The same, to be renewed apart."""
        return Memory(dict(self.boxes), dict(self.weights), self.vectors)


def surround(flow, traced, region, effort=None, memory=None, *, dtype=np.float64, proof=False,
             target=None, deadline=np.inf):  # fmt: skip
    """`Around` with every step up to `target` relaxed.

    Args:
        flow, traced: `Flow` and its `Trace` at the region's centre.
        region: `Region`.
        effort: `Effort`.
        memory: `Memory`, whose boxes are read and renewed.
        dtype: of the search; proofs are float64.
        proof: whether boxes are proved with the multipliers of `memory` instead of searched.
        target: position; by default the output.
        deadline: see `Around`.
    """
    effort = effort or Effort()
    memory = Memory() if memory is None else memory
    around = Around(flow, traced, region, dtype, deadline)
    around.gains = gains = None
    if effort.balls:
        around.gains = gains = LocalGains(around, memory.vectors)
    last = flow.output if target is None else target
    for k in range(1, last + 1):
        link = flow.links[k - 1]
        if is_relaxed(link.operation):
            source = link.inputs[0]
            if source not in around.tightened and source > 0:
                _tighten(around, k, effort, memory, proof)
            _relax(around, k, gains)
        around.advance(k)
    return around


def surround_proved(flow, traced, region, effort=None, memory=None, *, deadline=np.inf):
    """As `surround` in float64, with multipliers that are searched first and boxes proved by them.

    Bounds of a search are not rounded outwards: only what is bounded once more counts. A `memory`
    holds what was found.
    """
    memory = Memory() if memory is None else memory
    surround(flow, traced, region, effort, memory, deadline=deadline)
    return surround(flow, traced, region, effort, memory, proof=True, deadline=deadline)


def _relax(around, k, gains):
    step = around.relax(k)
    if gains is None:
        return
    if len(step.units):
        weights = np.zeros(math.prod(step.shape))
        weights[step.units] = 1.0
        step.radius = gains.weigh(k, weights)
    gains.add(k)


def weigh(around, c, target, multipliers, memory):
    """Weighs the balls of elementwise steps for these rows of `target`, and remembers how.

    Units that matter more may move less: weights grow with the mean size of their coefficients. Any
    are valid, with the radius that `LocalGains` proves for them.
    """
    _, _, passed = around.backward(c, target, multipliers, record=True)
    found = {}
    for k, own in passed:
        step = around.steps.get(k)
        if own is None or not isinstance(step, Elementwise) or not np.isfinite(step.radius):
            continue
        size = np.abs(own[0]).mean(axis=0)
        mean = max(float(size.mean()), 1e-30)
        weights = np.clip((size / mean) ** _POWER, *_WEIGHTS).astype(np.float64)
        found[k] = step.columns, weights
    memory.weights = found
    reweigh(around, memory)


def reweigh(around, memory):
    """Takes over remembered weights, unit by unit; others keep weight one."""
    if around.gains is None:
        return
    for k, (columns, weights) in memory.weights.items():
        step = around.steps.get(k)
        if not isinstance(step, Elementwise) or not len(step.columns):
            continue
        everything = np.ones(math.prod(step.shape))
        everything[columns] = weights
        own = everything[step.columns]
        full = np.zeros(len(everything))
        full[step.columns] = own
        plain = step.radius if step.plain is None else step.plain
        most = rounding.product_up(rounding.sqrt_up(float(own.max())), plain)
        step.weigh(own, min(around.gains.weigh(k, full), float(most)))


def _tighten(around, k, effort, memory, proof):
    """Improves the box of what link k reads, where it is not linear on the box at hand."""
    source = around.flow.links[k - 1].inputs[0]
    units = around.relax(k).units
    windows = Windows(around.flow, around.trace, source)
    shape = around.trace.shape(source)
    size = int(np.prod(shape))
    widest = max(v.size * _pieces(around, i) for i, v in enumerate(around.values[: source + 1]))
    if windows.applies:
        widest = max(math.prod(n for n, _, _ in windows.plans[i]) * around.trace.shape(i)[-1]
                     * _pieces(around, i) for i in range(source))  # fmt: skip
    block = max(_BLOCK // widest // 2, 8)
    low, high = (v.copy().reshape(-1) for v in around.box(source))
    known, renewed = memory.boxes.get(source, []), []
    for start in range(0, len(units), block):
        some = units[start : start + block]
        count = len(some)
        if windows.applies:
            inner, c = window_around(around, windows, some, effort.balls)
            # Both ends of a unit read the same window.
            lower, below = _bounds(inner, c, source, effort, known, some, proof, (0,))
            upper, above = _bounds(inner, -c, source, effort, known, some, proof, (1,))
            found = np.concatenate([lower, upper])
            multipliers = {k: below[k].joined(above[k]) for k in below}
        else:
            c = np.zeros((2 * count, size), around.dtype)
            c[np.arange(count), some] = 1.0
            c[count + np.arange(count), some] = -1.0
            c = c.reshape(-1, *shape)
            found, multipliers = _bounds(around, c, source, effort, known, some, proof)
        renewed.append(Found(some, multipliers))
        low[some] = np.maximum(low[some], found[:count])
        high[some] = np.minimum(high[some], -found[count:])
    memory.boxes[source] = renewed
    around.tighten(source, low.reshape(1, *shape), high.reshape(1, *shape))


def _pieces(around, k):
    """How often a pass goes over the signal at a position: once per piece of what made it."""
    pieces = getattr(around.steps.get(k), "pieces", None)
    return 1 if pieces is None else len(pieces.slope)


def _bounds(around, c, source, effort, known, units, proof, sides=(0, 1)):
    """Lower bounds of rows, and their multipliers."""
    if proof:
        multipliers = remembered(around, c, source, known, units, sides=sides)
        return around.lower(c, source, multipliers), multipliers
    multipliers, found = tried(around, c, source, trials=effort.box_trials)
    if known:
        multipliers = remembered(around, c, source, known, units, multipliers, sides)
    if multipliers and effort.box_steps:
        found = ascend(
            around,
            c,
            source,
            multipliers,
            effort.box_steps,
            rate=effort.rate,
            patience=effort.patience,
        )
    elif known and multipliers:
        found, _, _ = around.backward(c, source, multipliers)
    return found, multipliers


def remembered(around, c, source, known, units, multipliers=None, sides=(0, 1)):
    """Multipliers of earlier searches, row by row, where there are any.

    Args:
        sides: of what the rows are: 0 lower bounds of the units, 1 minus upper ones.
    """
    if multipliers is None:
        multipliers = {k: step.blank(c) for k, step in around.steps.items() if k <= source}
    count = len(units)
    for old in known:
        _, mine, theirs = np.intersect1d(units, old.units, return_indices=True)
        if not len(mine):
            continue
        mine = np.concatenate([i * count + mine for i in range(len(sides))])
        theirs = np.concatenate([side * len(old.units) + theirs for side in sides])
        for k, held in multipliers.items():
            if k in old.multipliers:
                held.adopt(old.multipliers[k], mine, theirs)
    return multipliers
