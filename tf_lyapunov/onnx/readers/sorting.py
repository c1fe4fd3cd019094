"""Sorted groups, reflections of pairs, and both halves of a signal, which `compositions` finds."""

import numpy as np

from tf_lyapunov.layers.activations import FullSort, GroupSort, Householder, MaxMin, TwoSidedReLU
from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.placing import taken


def _axis(signal, axis):
    """The tensor's axis, -1 for the last one."""
    found = signal.keras_axis(axis)
    return -1 if found == len(signal.tensor.shape) - 1 else found


def _two_sided(build, node, values):
    (signal,) = values
    axis = _axis(signal, node.get("axis"))
    tensor = build.layer(node, TwoSidedReLU, signal.tensor, axis=axis)
    return signal.like(tensor, nonnegative=True)


def _whole(signal, node):
    """The tensor's axis whose halves were taken."""
    size = signal.sample[signal.sample_axis(node.get("axis"))]
    if size != (node.get("size") or size) or size % 2:
        raise BadGraph(f"it takes halves of {node.get('size')} of {size} entries")
    return _axis(signal, node.get("axis"))


def _largest_first(build, node, values):
    (signal,) = values
    tensor = build.layer(node, MaxMin, signal.tensor, axis=_whole(signal, node))
    return signal.like(tensor, nonnegative=signal.nonnegative)


def sorted_groups(build, node, signal, axis, size, suffix=""):
    """Groups of neighbours along a logical axis in ascending order."""
    place = _axis(signal, axis)
    if size == signal.sample[signal.sample_axis(axis)]:
        tensor = build.layer(node, FullSort, signal.tensor, suffix, axis=place)
    else:
        tensor = build.layer(node, GroupSort, signal.tensor, suffix, group_size=size, axis=place)
    return signal.like(tensor, nonnegative=signal.nonnegative)


def _sorted(build, node, values):
    (signal,) = values
    if signal.batch != 0:
        raise NotRead("its first axis does not count samples")
    signal = build.reshaped(node, signal, node.get("shape"), 0, "_shape")
    return sorted_groups(build, node, signal, node.get("axis"), node.get("size"))


def _top(build, node, values):
    """The k largest or smallest of an axis, in order: 1-Lipschitz; their positions jump."""
    signal, count = values
    if not isinstance(count, np.ndarray) or count.size != 1:
        raise NotRead("how many it takes is computed from inputs")
    if len(node.outputs) > 1 and node.outputs[1] in build.wanted:
        raise NotRead("positions of the largest entries are discontinuous")
    if not node.get("sorted", 1):
        raise NotRead("it states no order of what it takes")
    axis, count = node.get("axis", -1), int(count.reshape(()))
    size = signal.sample[signal.sample_axis(axis)]
    if not 1 <= count <= size:
        raise BadGraph(f"it takes {count} of {size} entries")
    cells = np.arange(count)
    if node.get("largest", 1):
        cells = size - 1 - cells
    suffix = "" if np.array_equal(cells, np.arange(size)) else "_sort"
    signal = sorted_groups(build, node, signal, axis, size, suffix)
    return taken(build, node, signal, signal.keras_axis(axis), cells)


def _angles(sine, cosine):
    """θ in float32 with sin θ/2 and cos θ/2 as stored, as nearly as there is one."""
    angle = (2 * np.arctan2(sine, cosine)).astype(np.float32)
    best, error = angle, np.full(angle.shape, np.inf)
    below = above = angle
    tried = [angle]
    for _ in range(4):
        below, above = np.nextafter(below, np.float32(-9)), np.nextafter(above, np.float32(9))
        tried += [below, above]
    for candidate in tried:
        half = candidate.astype(np.float64) / 2
        off = [np.abs(f(half).astype(np.float32) - v)
               for f, v in ((np.sin, sine), (np.cos, cosine))]  # fmt: skip
        found = np.maximum(*off)
        best, error = np.where(found < error, candidate, best), np.minimum(found, error)
    return best


def _reflected(build, node, values):
    (signal,) = values
    axis, place = _whole(signal, node), node.get("place")
    half = signal.tensor.shape[axis] // 2
    sine, cosine = node.get("sine"), node.get("cosine")
    if sine.size not in (1, half) or (place is not None and signal.sample_axis(place)
                                      != signal.sample_axis(node.get("axis"))):  # fmt: skip
        raise NotRead("its reflections differ from position to position")
    angles = np.broadcast_to(_angles(sine, cosine), (half,))
    tensor = build.layer(node, Householder, signal.tensor, weights=[angles], axis=axis)
    return signal.like(tensor)


READERS = {
    "TopK": (24, _top),
    "tf_lyapunov.TwoSided": (0, _two_sided),
    "tf_lyapunov.MaxMin": (0, _largest_first),
    "tf_lyapunov.Sorted": (0, _sorted),
    "tf_lyapunov.Reflected": (0, _reflected),
}
