"""Boxes of every signal of a program from those of its inputs, many inputs at once, in float64.

One pass forwards, no search (interval bound propagation). With middle m and half width r of what a
linear operation y = Wx + b reads, y lies within Wm + b ± |W|r; this is what `Operation.forward`
bounds for inputs with errors r, its own rounding included. What grows in every entry has its own
values at both ends, elementwise functions else those of `pieces`. An l2 ball of radius ρ that only
moves before the first linear operation enters it by Wx + b ± ρ·(norms of the rows of W). The
margins of two classes are those of one linear function of what the last dense layer reads,

    f_y - f_j ≥ (w_y - w_j)ᵀm + b_y - b_j - |w_y - w_j|ᵀr,                                  (B)

so that what both logits share cancels.
"""

import dataclasses
import time

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local import maps
from tf_lyapunov.local.pieces import Columns, has_pieces, pieces
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import (
    elementwise,
    indexing,
    merging,
    moving,
    pooling,
    reducing,
    separable,
    sorting,
    two_sided,
)
from tf_lyapunov.program.families.linear import Linear
from tf_lyapunov.program.operation import EXACT, Signal

# What grows in every entry of its inputs.
GROWING = (
    elementwise.Clipped,
    indexing.Filled,
    indexing.Stepped,
    merging.Bounded,
    merging.Extreme,
    merging.Joined,
    moving.Moved,
    pooling.Pooled,
    reducing.Reduced,
    reducing.Stacked,
    separable.Largest,
    sorting.Sorted,
)
UNIT = rounding.UNIT_ROUNDOFF["float64"]
_MARGIN = 1 + 1e-9
# Float64 entries of one signal held at once.
_BLOCK = 2**22
# Evaluations at most, relative width of the bracket at which the search of a radius ends, and the
# most by which a radius grows at once.
_EVALUATIONS, _WIDTH, _GROWTH = 90, 2.0**-12, 8.0
# Radius tried first, relative to the largest entries.
_FIRST = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """A program's operations up to its logits, one after the other.

    Attributes:
        operations: tuple of `Operation`; number k makes position k + 1.
        inputs: tuple of tuples of positions; 0 is the input.
    """

    operations: tuple
    inputs: tuple


def line_of(network):
    """`Line` of a network's program.

    Raises:
        UnsupportedLayerError: for a model with several inputs, and listing steps without a rule.
    """
    program = network.program
    if len(program.inputs) != 1:
        raise UnsupportedLayerError(
            "method='box' needs a model with one input. Received: "
            f"{len(program.inputs)} inputs. Concatenate them inside the model."
        )
    places, operations, inputs, refused = {program.inputs[0]: 0}, [], [], {}
    for step in program.steps:
        held = step.operations
        if held is None:
            refused[step.name] = step.why
            held = ()
        if step.name == program.decision:
            held = held[:-1]
        read = tuple(places.get(name, 0) for name in step.inputs)
        for operation in held:
            if not is_known(operation):
                refused[step.name] = f"an operation of type {type(operation).__name__}"
            operations.append(operation)
            inputs.append(read)
            read = (len(operations),)
        places[step.name] = read[0]
        if step.name in (program.output, program.decision):
            break
    if refused:
        found = "; ".join(f"step {name!r}: {why}" for name, why in refused.items())
        raise UnsupportedLayerError(
            "method='box' has no rule for some steps of the model. Received: "
            f"{found}. Use method='linear' or 'auto'."
        )
    end = places[program.decision or program.output]
    return Line(tuple(operations[:end]), tuple(inputs[:end]))


def is_known(operation):
    """Whether an operation has a rule here."""
    known = (*GROWING, two_sided.Halves, separable.Separable)
    return isinstance(operation, known) or maps.is_linear(operation) or has_pieces(operation)


def passed(operation, boxes):
    """Box behind an operation, from those of its inputs.

    Args:
        operation: one that `is_known`.
        boxes: list of `(low, high)`, float64 (n, …).

    Returns:
        `(low, high)`, rounded outwards.
    """
    if isinstance(operation, two_sided.Halves):
        ends = [_at(operation, [end]) for end in boxes[0]]
        return np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])
    grows = isinstance(operation, GROWING)
    if isinstance(operation, elementwise.Elementwise):
        grows = operation.sector.alpha >= 0
    if grows:
        low, high = (_at(operation, [box[i] for box in boxes]) for i in (0, 1))
        return low[0], high[1]
    if has_pieces(operation):
        low, high = (v.reshape(len(v), -1) for v in boxes[0])
        shape = boxes[0][0].shape
        columns = Columns(np.arange(low.shape[1]), shape[1:])
        return tuple(v.reshape(shape) for v in pieces(operation, low, high, columns).range())
    return _spread(operation, [Signal(*_centered(low, high)) for low, high in boxes])


def _at(operation, values):
    """Bounds on what an operation makes of exact values."""
    return _spread(operation, [Signal(v, np.zeros_like(v)) for v in values])


def _spread(operation, signals):
    found = operation.forward(signals, EXACT)
    return rounding.down(found.value - found.error), rounding.up(found.value + found.error)


def _centered(low, high):
    """Middle of a box, and how far it reaches, rounded up."""
    middle = low / 2 + high / 2
    return middle, rounding.up(np.maximum(high - middle, middle - low))


def boxes_of(line, x, low, high, radius=None):
    """Boxes at every position that the last operation needs, the others None.

    Args:
        line: `Line`.
        x: float64 (n, …), centres.
        low, high: float64 (n, …), the box of the input.
        radius: float64 (n,) of an l2 ball that holds the region, or None.

    Returns:
        List of `(low, high)`.
    """
    last = {k: i for i, read in enumerate(line.inputs) for k in read}
    found = [(low, high)]
    ball = {0: x} if radius is not None else {}
    for i, (operation, read) in enumerate(zip(line.operations, line.inputs, strict=True)):
        box = passed(operation, [found[k] for k in read])
        if read[0] in ball and isinstance(operation, Linear):
            round_box = _rows(operation, ball[read[0]], radius)
            box = np.maximum(box[0], round_box[0]), np.minimum(box[1], round_box[1])
        elif read[0] in ball and isinstance(operation, moving.Moved):
            center = ball[read[0]]
            if maps.is_flattening(operation, center[0].size):
                ball[i + 1] = center.reshape(box[0].shape)
        found.append(box)
        for k in set(read):
            if last[k] == i and i + 1 < len(line.operations):
                found[k] = None
    return found


def _rows(operation, x, radius):
    """Wx + b ± radius·(norms of the rows of W), outwards."""
    value = operation.forward([Signal(x, np.zeros_like(x))], EXACT)
    square = dataclasses.replace(operation, kernel=np.square(operation.kernel), bias=None)
    ones = np.ones((1, *x.shape[1:]))
    sums = square.forward([Signal(ones, np.zeros_like(ones))], EXACT)
    norms = rounding.up(np.sqrt(rounding.up(sums.value * _MARGIN + sums.error + rounding.TINY)))
    size = rounding.up(norms * radius.reshape(-1, *[1] * (sums.value.ndim - 1)))
    size = rounding.up(size + value.error)
    return rounding.down(value.value - size), rounding.up(value.value + size)


def box_margins(line, boxes, labels):
    """Lower bounds of the margins, float64 (n,): of f_y over every f_j, or of ±f of one output.

    Args:
        line: `Line`.
        boxes: of `boxes_of`.
        labels: int64 (n,).
    """
    low, high = boxes[-1]
    count, rows = low.shape[-1], np.arange(len(low))
    if count == 1:
        return np.where(labels == 1, low[:, 0], -high[:, 0])
    last = line.operations[-1] if line.operations else None
    rivals = np.arange(count) != labels[:, None]
    if isinstance(last, Linear) and last.linear_map.kind == "dense" and low.ndim == 2:
        found = _shared(last, *boxes[line.inputs[-1][0]], labels)
    else:
        found = rounding.down(low[rows, labels][:, None] - high)
    with np.errstate(invalid="ignore"):
        found = np.min(np.where(rivals, found, np.inf), axis=1)
    return np.where(np.isfinite(found), found, -np.inf)


def _shared(operation, low, high, labels):
    """(B) for every class, float64 (n, classes)."""
    kernel = operation.kernel
    bias = np.zeros(kernel.shape[1]) if operation.bias is None else operation.bias
    middle, radius = _centered(low, high)
    size = np.abs(middle) + radius
    found = np.empty((len(low), kernel.shape[1]))
    # Each difference of columns is rounded once, each sum γ_n of the sizes that it adds up.
    lost = rounding.gamma(len(kernel) + 8, UNIT) * _MARGIN
    for label in np.unique(labels):
        some = labels == label
        c = kernel[:, label : label + 1] - kernel
        shift = bias[label] - bias
        total = np.abs(bias[label]) + np.abs(bias) + size[some] @ np.abs(c)
        value = middle[some] @ c + shift - radius[some] @ np.abs(c)
        found[some] = value - 4 * lost * total - rounding.TINY * len(kernel)
    return rounding.down(found)


def box_radii(network, x, labels, radius, needed, *, norm, bounds=None, deadline=np.inf):
    """Radii at which every margin stays above what it needs, by boxes alone.

    Args:
        network: `Network`.
        x: inputs (n, …) as the model receives them.
        labels: int64 (n,).
        radius: float64 (n,), proved already.
        needed: function of numbers of inputs and of radii: what margins must exceed, float64.
        norm: `"linf"`, `"l2"` or `"l1"`.
        bounds: `(low, high)` of valid inputs, or None.
        deadline: `time.monotonic()` at which the search ends.

    Returns:
        `(radius, sentences)`, radii at least those given.

    Raises:
        UnsupportedLayerError: listing steps without a rule.
    """
    line, x = line_of(network), np.asarray(x, np.float64)
    found, done = np.array(radius, np.float64), 0
    widest = max(t.size or 1 for c in network.graph.calls for t in c.outputs)
    block = max(_BLOCK // max(widest, x[0].size), 1)
    for start in range(0, len(x), block):
        if time.monotonic() > deadline:
            break
        rows = np.arange(start, min(start + block, len(x)))
        done += len(rows)

        def left(r, some, rows=rows):
            own = rows[some]
            return margins_at(line, x[own], r, labels[own], norm, bounds) - needed(own, r)

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # of steering alone
            better = _largest(left, x[rows], found[rows], bounds)
        found[rows] = np.maximum(found[rows], better)
    wider = found > radius
    sentences = [
        "Boxes of every signal (interval bounds in float64, rounded outwards) enlarged the radius "
        f"of {np.mean(wider):.1%} of the inputs."
    ]
    if done < len(x):
        sentences.append(
            f"Time was up after {done} of {len(x)} inputs; the others keep their radius by gains."
        )
    return found, sentences


def margins_at(line, x, radius, labels, norm, bounds=None):
    """`box_margins` of the balls of a norm with radii (n,), cut with bounds or None."""
    away = radius.reshape(-1, *[1] * (x.ndim - 1))
    low, high = rounding.down(x - away), rounding.up(x + away)
    if bounds is not None:
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
    boxes = boxes_of(line, x, low, high, None if norm == "linf" else radius)
    return box_margins(line, boxes, labels)


def _largest(left, x, start, bounds):
    """Radii (n,) that hold, near the largest; 0 where none was found.

    By secants of the margins, which fall almost linearly, within a bracket that is halved where
    these do not shrink it; every input is left alone when it is done.

    Args:
        left: function of radii and numbers of inputs: margins less what they need; > 0 holds.
        x: float64 (n, …).
        start: float64 (n,), radii that are known.
        bounds: `(low, high)` of valid inputs, or None.
    """
    count = len(x)
    scale = np.maximum(np.max(np.abs(x).reshape(count, -1), axis=1), 1e-3)
    trial = np.maximum(start * 1.001, _FIRST * scale)
    most = np.full(count, np.inf)
    if bounds is not None:
        # Beyond it the region holds every valid input.
        extent = np.maximum(np.abs(bounds[1] - x), np.abs(x - bounds[0])).reshape(count, -1)
        most = np.linalg.norm(extent, axis=1)
    low, high = np.zeros(count), np.full(count, np.inf)
    above, below = left(np.zeros(count), np.arange(count)), np.full(count, -np.inf)
    found, width = np.zeros(count), np.full(count, np.inf)
    open_ = np.flatnonzero(above > 0)
    for number in range(_EVALUATIONS):
        value = left(trial[open_], open_)
        good, r = value > 0, trial[open_]
        found[open_[good]] = np.maximum(found[open_[good]], r[good])
        # The secant's root, from the point before and this one while nothing has failed.
        slope = (above[open_] - value) / (r - low[open_])
        ahead = r + value / slope
        low[open_[good]], above[open_[good]] = r[good], value[good]
        high[open_[~good]], below[open_[~good]] = r[~good], value[~good]
        kept = np.where(np.isinf(high[open_]), low[open_] < most[open_],
                        high[open_] - low[open_] > _WIDTH * high[open_])  # fmt: skip
        ahead, open_ = ahead[kept], open_[kept]
        if not len(open_):
            break
        least, h, a, b = (v[open_] for v in (low, high, above, below))
        growing = np.isinf(h)
        within = least + (h - least) * a / (a - b)
        # Off the end that it is near, so that the bracket closes from both sides.
        within = np.clip(within, least + _WIDTH / 2 * h, h - _WIDTH / 2 * h)
        slow = (h - least > width[open_] / 2) & (number % 2 == 1) | ~np.isfinite(b)
        within = np.where(slow, (least + h) / 2, within)
        width[open_] = np.where(number % 2 == 1, h - least, width[open_])
        ahead = np.where(np.isfinite(ahead), ahead, 2 * least) * (1 + _WIDTH)
        trial[open_] = np.where(growing, np.clip(ahead, 2 * least, _GROWTH * least), within)
    return found
