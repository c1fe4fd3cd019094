"""Operators that move entries: reshapes, transposes, slices, selections, repetitions."""

import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.linear import transposed
from tf_lyapunov.onnx.signals import BATCH, size_of


def to_shape(build, node, signal, sizes):
    """The signal reshaped to logical sizes, one of which may be -1; `BATCH` counts samples.

    Samples must stay apart: the entries before the batch axis, and those behind it, keep their
    places, so that it stands where as many entries come before it as before.
    """
    sizes = [int(n) for n in sizes]
    count = size_of(signal.sample)
    if sizes.count(-1) > 1:
        raise BadGraph("it leaves several sizes open")
    if signal.batch is None:
        total = count
        if -1 in sizes:
            sizes[sizes.index(-1)] = total // max(size_of([n for n in sizes if n != -1]), 1)
        return build.reshaped(node, signal, sizes, None)
    before = size_of(signal.sample[: signal.batch])
    known = size_of([n for n in sizes if n != -1])
    batch = build.batch
    if -1 in sizes and known:
        # The open size is what is left of samples times entries.
        sizes[sizes.index(-1)] = batch * count // known if batch * count % known == 0 else 0
    if size_of(sizes) != batch * count:
        raise BadGraph(
            f"it reshapes samples of shape {signal.sample} to {_shown(sizes)}, which has another "
            "size"
        )
    for place in range(len(sizes)):
        fits = sizes[place] == batch and size_of(sizes[:place]) == before
        if fits:
            return build.reshaped(node, signal, sizes[:place] + sizes[place + 1 :], place)
    if batch == 1:  # the axis of one is dropped
        return build.reshaped(node, signal, sizes, None)
    raise NotRead("it mixes samples along the batch axis")


def _shown(sizes):
    return tuple("batch" if n == BATCH else n for n in sizes)


def _reshape(build, node, values):
    signal, asked = values[0], values[1]
    sizes = [int(n) for n in np.asarray(asked).ravel()]
    shape = signal.shape(build.batch)
    if not node.get("allowzero", 0):
        if any(n == 0 and i >= len(shape) for i, n in enumerate(sizes)):
            raise BadGraph("it copies a size that its input lacks")
        sizes = [shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    if signal.batch == 0 and sizes and sizes[0] == 1 and build.batch == BATCH:
        # Written for one sample, declared for many: onnxruntime would refuse the others.
        raise NotRead("it makes one sample of all")
    return to_shape(build, node, signal, sizes)


def _flatten(build, node, values):
    (signal,) = values
    axis = node.get("axis", 1)
    shape = signal.shape(build.batch)
    if not -len(shape) <= axis <= len(shape):
        raise BadGraph(f"it flattens at axis {axis} of {len(shape)}")
    axis += len(shape) if axis < 0 else 0
    return to_shape(build, node, signal, [size_of(shape[:axis]), size_of(shape[axis:])])


def _transpose(build, node, values):
    (signal,) = values
    axes = node.get("perm", list(range(signal.rank))[::-1])
    if sorted(axes) != list(range(signal.rank)):
        raise BadGraph(f"it permutes {signal.rank} axes by {axes}")
    return transposed(signal, axes)


def axes_of(node, values, place=1):
    """Axes as an attribute, or as an input since a later operator set; None where left out."""
    if len(values) > place and values[place] is not None:
        return [int(a) for a in np.asarray(values[place]).ravel()]
    axes = node.get("axes")
    return None if axes is None else [int(a) for a in axes]


def _squeeze(build, node, values):
    signal, shape = values[0], values[0].shape(build.batch)
    axes = axes_of(node, values)
    if axes is None:
        axes = [i for i, n in enumerate(shape) if n == 1]
    axes = {a % signal.rank for a in axes}
    if any(shape[a] != 1 for a in axes):
        raise BadGraph(f"it drops axes {sorted(axes)} of shape {_shown(shape)}")
    kept = [i for i in range(signal.rank) if i not in axes]
    batch = kept.index(signal.batch) if signal.batch in kept else None
    places = [signal.place(i) for i in kept if i != signal.batch]
    return build.refitted(node, signal, places, batch, "")


def _unsqueeze(build, node, values):
    signal, axes = values[0], axes_of(node, values)
    rank = signal.rank + len(axes)
    added = {a % rank for a in axes}
    old, batch, places = iter(range(signal.rank)), None, []
    for i in range(rank):
        if i in added:
            places.append(None)
            continue
        axis = next(old)
        if axis == signal.batch:
            batch = i
        else:
            places.append(signal.place(axis))
    return build.refitted(node, signal, places, batch, "")


READERS = {
    "Reshape": (25, _reshape),
    "Flatten": (25, _flatten),
    "Transpose": (25, _transpose),
    "Squeeze": (25, _squeeze),
    "Unsqueeze": (25, _unsqueeze),
}
