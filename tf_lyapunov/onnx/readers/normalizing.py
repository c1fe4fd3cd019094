"""Normalizations at inference, softmax, and reductions over axes."""

import keras
import numpy as np

from tf_lyapunov.layers.pooling import GlobalL2NormPooling2D
from tf_lyapunov.layers.response import LocalResponseNormalization
from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers.moving import axes_of
from tf_lyapunov.onnx.signals import Signal, size_of

_EPSILON = float(np.float32(1e-5))


def _epsilon(node, signal):
    """The constant beneath a root: the decimal that the file's single precision stands for.

    It is taken where it is not larger, so that gains, which fall with it, bound those of both; a
    layer in single precision computes with what the file holds.
    """
    held = node.get("epsilon", _EPSILON)
    if signal.dtype != "float32":
        return held
    decimal = float(str(np.float32(held)))
    return decimal if decimal <= held and np.float32(decimal) == np.float32(held) else held


def _weights(signal, values, sizes):
    """Weight arrays in the signal's type; refused where they are no constants."""
    found = []
    for value, size in zip(values, sizes, strict=True):
        if not isinstance(value, np.ndarray):
            raise NotRead("its weights are computed from inputs")
        if value.size != size:
            raise BadGraph(f"its weights of shape {value.shape} meet {size} channels")
        found.append(np.asarray(value, signal.dtype).ravel())
    return found


def _batch_normalization(build, node, values):
    signal = values[0]
    if node.get("training_mode", 0) or len([o for o in node.outputs if o]) > 1:
        raise NotRead("it computes as in training; export the network for inference")
    if not node.get("spatial", 1):
        raise NotRead("it normalizes every position by itself")
    axis = signal.keras_axis(1) if signal.rank > 1 else None
    if axis is None or signal.batch != 0:
        raise NotRead("its input must have the axes batch and channels")
    channels = signal.tensor.shape[axis]
    tensor = build.layer(
        node,
        keras.layers.BatchNormalization,
        signal.tensor,
        weights=_weights(signal, values[1:5], [channels] * 4),
        axis=axis if axis != len(signal.tensor.shape) - 1 else -1,
        epsilon=_epsilon(node, signal),
        momentum=node.get("momentum", float(np.float32(0.9))),
    )
    return signal.like(tensor)


def _over_last(build, node, values, kind, **settings):
    """Layer or root mean square normalization of the last axes."""
    signal = values[0]
    if len([o for o in node.outputs if o]) > 1:
        raise NotRead("its statistics are read as outputs")
    first = node.get("axis", -1)
    first += signal.rank if first < 0 else 0
    places = [signal.sample_axis(a) for a in range(first, signal.rank)]
    given = [v for v in values[1:3] if v is not None]
    return _normalized(build, node, signal, places, given, kind, **settings)


def _normalized(build, node, signal, places, given, kind, **settings):
    """A normalization of axes of a sample together, which are brought to the end.

    Args:
        build: `Builder`.
        node: `OnnxNode`.
        signal: `Signal`.
        places: axes of a sample, ascending.
        given: weights that broadcast over them.
        kind: class of the layer.
        settings: of the layer.
    """
    if not places:
        raise BadGraph("it normalizes no axis")
    if set(signal.order[-len(places) :]) != set(places) or given:
        signal = build.arranged(
            node, signal, [*(a for a in signal.order if a not in places), *places]
        )
    axes = list(range(len(signal.order) + 1 - len(places), len(signal.order) + 1))
    shape = [signal.tensor.shape[a] for a in axes]
    weights = []
    for value in given:
        if not isinstance(value, np.ndarray):
            raise NotRead("its weights are computed from inputs")
        weights.append(np.array(np.broadcast_to(value, shape), signal.dtype))
    tensor = build.layer(
        node,
        kind,
        signal.tensor,
        weights=weights or None,
        axis=axes if len(axes) > 1 else -1,
        epsilon=_epsilon(node, signal),
        **settings,
    )
    return signal.like(tensor)


def _layer_normalization(build, node, values):
    center = len(values) > 2 and values[2] is not None
    return _over_last(build, node, values, keras.layers.LayerNormalization, center=center)


def _composed(build, node, values):
    """A layer normalization without weights, which `patterns` found."""
    (signal,) = values
    places = sorted(signal.sample_axis(a) for a in node.get("axes"))
    shape = [signal.sample[p] for p in places]
    given = [np.ones(shape), np.zeros(shape)]
    return _normalized(build, node, signal, places, given, keras.layers.LayerNormalization)


def _composed_rms(build, node, values):
    """A root mean square normalization without weights, which `patterns` found."""
    (signal,) = values
    places = sorted(signal.sample_axis(a) for a in node.get("axes"))
    ones = [np.ones([signal.sample[p] for p in places])]
    return _normalized(build, node, signal, places, ones, keras.layers.RMSNormalization)


def _rms_normalization(build, node, values):
    return _over_last(build, node, values[:2], keras.layers.RMSNormalization)


def _groups(build, node, signal, groups, gamma, beta):
    signal = build.channels_last(node, signal)
    channels = signal.sample[0]
    if groups < 1 or channels % groups:
        raise BadGraph(f"it makes {groups} groups of {channels} channels")
    tensor = build.layer(
        node,
        keras.layers.GroupNormalization,
        signal.tensor,
        weights=_weights(signal, (gamma, beta), [channels] * 2),
        groups=groups,
        axis=-1,
        epsilon=_epsilon(node, signal),
    )
    return signal.like(tensor)


def _instance_normalization(build, node, values):
    signal, gamma, beta = values
    return _groups(build, node, signal, signal.sample[0] if signal.sample else 0, gamma, beta)


def _group_normalization(build, node, values):
    signal, gamma, beta = values
    groups = node.get("num_groups", 0)
    return _groups(build, node, signal, groups, gamma, beta)


def _windowed_response(build, node, values):
    """A response normalization along one axis, which `compositions` found."""
    (signal,) = values
    axis, sizes = node.get("axis", -1), node.get("sizes")
    if signal.rank != node.get("rank") or signal.batch != 0:
        raise NotRead(
            "its windows do not lie along " + ("the last axis", "the channels")[axis == 1]
        )
    if sizes is not None and tuple(sizes) != (build.batch, *signal.sample[:2]):
        raise NotRead("its windows do not lie along the channels")
    axis = signal.keras_axis(axis)
    tensor = build.layer(
        node,
        LocalResponseNormalization,
        signal.tensor,
        depth_radius=node.get("reach"),
        **{name: node.get(name) for name in ("bias", "alpha", "beta")},
        axis=-1 if axis == len(signal.tensor.shape) - 1 else axis,
    )
    return signal.like(tensor)


def _response(build, node, values):
    (signal,) = values
    size = node.get("size", 0)
    if size < 1 or size % 2 == 0:
        raise NotRead("its window has an even size, which onnxruntime does not run")
    if signal.rank < 3 or signal.batch != 0:
        raise NotRead("its input must have the axes batch, channels and positions")
    tensor = build.layer(
        node,
        LocalResponseNormalization,
        signal.tensor,
        depth_radius=size // 2,
        bias=node.get("bias", 1.0),
        alpha=node.get("alpha", float(np.float32(1e-4))) / size,
        beta=node.get("beta", 0.75),
        axis=signal.keras_axis(1),
    )
    return signal.like(tensor)


# Softmax ----------------------------------------------------------------------------------------


def _softmax_axes(node, signal):
    """Axes of the tensor: one since operator set 13, all from one on before."""
    if node.since is not None and node.since < 13:
        axis = node.get("axis", 1)
        axis += signal.rank if axis < 0 else 0
        return [signal.keras_axis(a) for a in range(axis, signal.rank)]
    return [signal.keras_axis(node.get("axis", -1))]


def _softmax(build, node, values):
    (signal,) = values
    return _softmax_over(build, node, signal, _softmax_axes(node, signal))


def _composed_softmax(build, node, values):
    """A softmax over axes, which `compositions` found."""
    (signal,) = values
    return _softmax_over(build, node, signal, sorted(map(signal.keras_axis, node.get("axes"))))


def _softmax_over(build, node, signal, axes):
    last = len(signal.tensor.shape) - 1
    if not axes:
        raise NotRead("it has no axis")
    axis = -1 if axes == [last] else axes[0] if len(axes) == 1 else axes
    tensor = build.layer(node, keras.layers.Softmax, signal.tensor, axis=axis)
    return signal.like(tensor, nonnegative=True)


def _log_softmax(build, node, values):
    (signal,) = values
    axes = _softmax_axes(node, signal)
    if len(axes) == 1:
        axis = -1 if axes[0] == len(signal.tensor.shape) - 1 else axes[0]
        tensor = keras.ops.log_softmax(signal.tensor, axis=axis)
        return signal.like(build.operation(node, tensor))
    first = signal.rank - len(axes)
    if (signal.batch is not None and signal.batch >= first) or not axes:
        raise NotRead("it combines samples along the batch axis")
    shape, batch = signal.sample, signal.batch
    kept = list(signal.shape(1)[:first])
    if batch is not None:
        del kept[batch]
    flat = build.reshaped(node, signal, [*kept, -(-size_of(shape) // size_of(kept))], batch,
                          "_rows")  # fmt: skip
    flat = flat.like(build.operation(node, keras.ops.log_softmax(flat.tensor, axis=-1)))
    return build.reshaped(node, flat, shape, batch, "_shape")


# Reductions -------------------------------------------------------------------------------------


def _reduced(function, nonnegative):
    def read(build, node, values):
        signal, axes = values[0], axes_of(node, values)
        if axes is None or not len(axes):
            if node.get("noop_with_empty_axes", 0):
                return signal
            axes = range(signal.rank)
        axes = {a % signal.rank for a in axes}
        keep = bool(node.get("keepdims", 1))
        batch = signal.batch
        if batch in axes:
            if build.batch != 1:
                raise NotRead("it combines samples along the batch axis")
            axes.remove(batch)
            if not keep:
                batch = None
        places = {signal.sample_axis(a) for a in axes}
        tensor = signal.tensor
        if places:
            dims = tuple(sorted(1 + signal.order.index(p) for p in places))
            tensor = build.operation(node, function(tensor, axis=dims, keepdims=keep))
        positive = nonnegative and signal.nonnegative
        if keep or not places:
            return Signal(tensor, signal.order, batch, positive)
        left = [p for p in range(len(signal.order)) if p not in places]
        order = tuple(left.index(p) for p in signal.order if p in left)
        if batch is not None:
            batch -= sum(1 for p in places if p < signal.batch)
        return Signal(tensor, order, batch, positive)

    return read


def _norm_reduced(build, node, values):
    """√Σ x² over axes: by the layer for images, to which the axes are brought."""
    signal, axes = values[0], axes_of(node, values)
    if axes is None or not len(axes):
        raise NotRead("it states no axes")
    places = sorted({signal.sample_axis(a) for a in axes})
    keep = bool(node.get("keepdims", 1))
    kept = [a for a in signal.order if a not in places]
    layer = {"keepdims": False, "data_format": "channels_last"}
    image = len(places) == 2 and len(kept) == 1
    signal = build.arranged(node, signal, [*places, *kept])
    tensor, shape = signal.tensor, [signal.sample[a] for a in kept]
    if not image:
        cells = size_of([signal.sample[a] for a in places])
        flat = (cells, 1, size_of(shape))
        tensor = build.layer(node, keras.layers.Reshape, tensor, "_cells", target_shape=flat)
    tensor = build.layer(node, GlobalL2NormPooling2D, tensor, **layer)
    ordered = sorted(kept)
    if tuple(shape) != tuple(tensor.shape[1:]):
        tensor = build.layer(node, keras.layers.Reshape, tensor, "_kept", target_shape=shape)
    batch = signal.batch
    if batch is not None:
        batch -= sum(1 for p in places if p < batch)
    result = Signal(tensor, tuple(ordered.index(a) for a in kept), batch, True)
    if not keep:
        return result
    axes = [ordered.index(a) if a in ordered else None for a in range(len(signal.order))]
    return build.refitted(node, result, axes, signal.batch)


READERS = {
    "BatchNormalization": (15, _batch_normalization),
    "LayerNormalization": (17, _layer_normalization),
    "tf_lyapunov.Normalized": (0, _composed),
    "tf_lyapunov.RootMeanSquare": (0, _composed_rms),
    "RMSNormalization": (23, _rms_normalization),
    "InstanceNormalization": (22, _instance_normalization),
    "GroupNormalization": (21, _group_normalization),
    "LRN": (13, _response),
    "Softmax": (13, _softmax),
    "tf_lyapunov.Softmax": (0, _composed_softmax),
    "tf_lyapunov.Response": (0, _windowed_response),
    "LogSoftmax": (13, _log_softmax),
    "ReduceL2": (18, _norm_reduced),
    "ReduceMean": (18, _reduced(keras.ops.mean, True)),
    "ReduceSum": (13, _reduced(keras.ops.sum, True)),
    "ReduceMax": (20, _reduced(keras.ops.max, True)),
    "ReduceMin": (20, _reduced(keras.ops.min, True)),
}
