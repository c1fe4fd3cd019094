"""How an index map is written: by axis if it is one map per axis, else as one gather.

An index map y[i] = x[index[i] - 1] that reshapes, permutes, crops, flips, repeats or pads is a map
of every axis by itself, after a permutation of the axes; what mixes axes is a reshape to finer
axes, a permutation and a reshape back, or a gather of numbered entries.
"""

import dataclasses
import itertools
import math

import numpy as np

_TO_THE_END = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class AxisMaps:
    """An index map as one list of positions per axis.

    Attributes:
        lines: for every axis of the input the positions that are taken, in order.
        order: the axes of the input, as the axes of the output follow one another; None where the
            output repeats everything.
        shape: of the result before padding, an axis for every axis of the output.
        pads: per axis of the output the zeros before and behind.
    """

    lines: tuple
    order: tuple
    shape: tuple
    pads: tuple


def axis_maps(index, shape):
    """`AxisMaps` of an index map on samples of this shape, or None if it mixes axes.

    Args:
        index: integers from 1 (0 where nothing is placed), of the shape of an output sample.
        shape: of an input sample.

    Example:

    >>> index = np.array([[0, 3, 1], [0, 4, 2]])
    >>> found = axis_maps(index, (2, 2))
    >>> [line.tolist() for line in found.lines], found.order, found.pads
    ([[1, 0], [0, 1]], (1, 0), ((0, 0), (1, 0)))
    """
    inner, pads = _within_zeros(index)
    if inner is None:
        return None
    lines, order = [], [None] * inner.ndim
    for j, places in enumerate(np.unravel_index(inner - 1, shape)):
        along = [a for a in range(inner.ndim)
                 if np.any(places != np.take(places, [0], axis=a))]  # fmt: skip
        if len(along) > 1 or (along and order[along[0]] is not None):
            return None
        if along:
            order[along[0]] = j
        first = [slice(None) if a in along else 0 for a in range(inner.ndim)]
        lines.append(np.atleast_1d(places[tuple(first)]))
    return AxisMaps(tuple(lines), tuple(order), inner.shape, pads)


def _within_zeros(index):
    """The block of an index map that has no zeros, and the zeros before and behind it."""
    inner, pads = index, []
    for axis in range(index.ndim):
        others = tuple(a for a in range(index.ndim) if a != axis)
        held = np.flatnonzero(np.any(index != 0, axis=others))
        if not len(held):
            return None, None
        pads.append((int(held[0]), int(index.shape[axis] - held[-1] - 1)))
        inner = np.take(inner, np.arange(held[0], held[-1] + 1), axis=axis)
    return (inner, tuple(pads)) if np.all(inner) else (None, None)


def write_moved(graph, x, index):
    """Nodes of an index map; returns the name of its result."""
    shape, result = graph.sizes(x), index.shape
    if np.array_equal(index.ravel(), np.arange(1, math.prod(shape) + 1)):
        return x if shape == result else graph.reshape(x, result)
    found = axis_maps(index, shape)
    if found is not None:
        return _write_axes(graph, x, found, shape, result)
    fine = _finer_axes(index, math.prod(shape))
    if fine is not None:
        sizes, order = fine
        x = graph.transposed(graph.reshape(x, sizes), (0, *(a + 1 for a in order)))
        return graph.reshape(x, result)
    if len(shape) > 1:
        x = graph.reshape(x, (math.prod(shape),))
    if np.all(index):
        return graph.node("Gather", x, index - 1, axis=1)
    return graph.node("Gather", graph.node("Pad", x, (0, 1, 0, 0)), index, axis=1)


def _write_axes(graph, x, found, shape, result):
    x = write_lines(graph, x, {j + 1: line for j, line in enumerate(found.lines)}, shape)
    taken = [j for j in found.order if j is not None]
    left = [j for j in range(len(shape)) if j not in taken]
    held = tuple(1 if j is None else n for j, n in zip(found.order, found.shape, strict=True))
    if len(left) == found.order.count(None):  # axes of one stay where they are
        ones = iter(left)
        order = [next(ones) if j is None else j for j in found.order]
    else:
        order = [*taken, *left]
    x = graph.transposed(x, (0, *(j + 1 for j in order)))
    if len(left) != found.order.count(None):
        x = graph.reshape(x, held)
    if held != found.shape:
        x = graph.node("Expand", x, (1, *found.shape))
    if any(map(any, found.pads)):
        x = _write_zeros(graph, x, found.pads)
    return x


def _write_zeros(graph, x, pads):
    below, places, back = graph.below(x, tuple(range(1, len(pads) + 1)))
    ends = np.zeros((2, len(pads) + 1), np.int64)
    for place, pair in zip(places, pads, strict=True):
        ends[:, place] = pair
    return back(graph.node("Pad", below, ends.ravel()))


def write_lines(graph, x, lines, shape):
    """Nodes that take positions along axes.

    Args:
        graph, x: `Graph`, and the name of a signal of this shape.
        lines: dict of axes, batch axis 0, and the positions that are taken in order.
        shape: of a sample.
    """
    x, places, back = graph.below(x, tuple(lines))
    slices, pads, repeats, gathers = [], {}, {}, []
    for place, (axis, line) in zip(places, lines.items(), strict=True):
        size = shape[axis - 1]
        steps = np.unique(np.diff(line))
        if len(line) == size and np.array_equal(line, np.arange(size)):
            continue
        if len(steps) == 0 or (len(steps) == 1 and steps[0] != 0):
            slices.append((place, *_slice(line, size)))
        elif (mode := _mode(line, size)) is not None:
            pads.setdefault(mode[0], []).append((place, mode[1]))
        elif np.array_equal(line, np.repeat(np.arange(size), len(line) // size)):
            repeats[place] = len(line) // size
        else:
            gathers.append((place, line))
    if slices:
        axes, starts, stops, steps = zip(*slices, strict=True)
        x = graph.node("Slice", x, starts, stops, axes, steps)
    for mode, sides in pads.items():
        ends = np.zeros((2, len(shape) + 1), np.int64)
        for place, pair in sides:
            ends[:, place] = pair
        x = graph.node("Pad", x, ends.ravel(), mode=mode)
    if repeats and not graph.is_double and len(shape) > 1:
        scales = np.ones(len(shape) + 1, np.float32)
        scales[list(repeats)] = list(repeats.values())
        x = graph.node(
            "Resize", x, "", graph.single(scales), mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip
    else:
        gathers += [(place, None) for place in repeats]
    for place, line in gathers:
        if line is None:
            size = shape[[*lines][places.index(place)] - 1]
            line = np.repeat(np.arange(size), repeats[place])
        x = graph.node("Gather", x, line, axis=place)
    return back(x)


def _slice(line, size):
    """`(start, stop, step)` of an arithmetic progression."""
    start, step = int(line[0]), int(line[1] - line[0]) if len(line) > 1 else 1
    stop = int(line[-1]) + (1 if step > 0 else -1)
    return start, stop if stop >= 0 else -_TO_THE_END, step


def _mode(line, size):
    """`(mode, (before, behind))` of a padded axis, or None."""
    more = len(line) - size
    if more < 1:
        return None
    for mode, before in itertools.product(("edge", "reflect"), range(more + 1)):
        if mode == "reflect" and max(before, more - before) >= size:
            continue
        if np.array_equal(np.pad(np.arange(size), (before, more - before), mode), line):
            return mode, (before, more - before)
    return None


def _finer_axes(index, size):
    """`(sizes, order)`: reshape to sizes, permute by order, reshape; None if it is no such map."""
    loops, places = [], index.ravel() - 1
    if np.any(index == 0) or len(places) != size or len(np.unique(places)) < size:
        return None
    while len(places) > 1:
        step = places[1] - places[0]
        ends = np.flatnonzero(np.diff(places) != step)
        count = int(ends[0]) + 1 if len(ends) else len(places)
        if len(places) % count or step < 1:
            return None
        blocks = places.reshape(-1, count)
        if np.any(blocks != blocks[:, :1] + step * np.arange(count)):
            return None
        loops.append((int(step), count))
        places = blocks[:, 0]
    # Sorted by their steps from the largest, the loops are the axes of the input.
    axes = sorted(loops, reverse=True)
    below = 1
    for step, count in reversed(axes):
        if step != below:
            return None
        below *= count
    return tuple(n for _, n in axes), tuple(axes.index(loop) for loop in reversed(loops))
