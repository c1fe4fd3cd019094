"""Sums, differences, means, maxima and concatenations of several signals."""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import scaling
from tf_lyapunov.program.families.constants import checked_constant, constants, repeats
from tf_lyapunov.program.gain import Affine, Gain, Peak
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import Operation, Signal, frozen, with_error
from tf_lyapunov.program.refusal import refuse

_layers = keras.layers

MERGING_LAYERS = (
    _layers.Add,
    _layers.Subtract,
    _layers.Average,
    _layers.Concatenate,
    _layers.Maximum,
    _layers.Minimum,
)


@dataclasses.dataclass(frozen=True)
class Weighted(Operation):
    """y = Σ_k w_k·x_k with broadcasting.

    Attributes:
        weights: tuple of float, one per signal.
    """

    weights: tuple

    def forward(self, signals, precision):
        value = sum(w * s.value for w, s in zip(self.weights, signals, strict=True))
        if any(s.error is None for s in signals):
            return Signal(value)
        pairs = list(zip(self.weights, signals, strict=True))
        size = sum(abs(w) * (np.abs(s.value) + s.error) for w, s in pairs)
        # A mean adds first, then divides.
        size = size + np.abs(sum(s.value for s in signals)) * max(map(abs, self.weights))
        error = sum(abs(w) * s.error for w, s in pairs) + precision.sum(len(pairs) + 2) * size
        return Signal(value, error * (1 + 1e-9) + 4 * precision.tiny)

    def write(self, graph, names):
        if self.weights == (1.0, -1.0):
            return graph.pointwise("Sub", *names)
        weights = set(map(float, self.weights))
        if weights == {1 / len(names)} and len(names) > 1 and not graph.is_double:
            return graph.pointwise("Mean", *names)
        if len(weights) > 1:
            pairs = zip(names, self.weights, strict=True)
            names = [graph.pointwise("Mul", x, w) if w != 1 else x for x, w in pairs]
        total = names[0]
        for name in names[1:]:
            total = graph.pointwise("Add", total, name)
        # A mean adds first.
        is_mean = len(weights) == 1 and weights != {1.0}
        return graph.pointwise("Mul", total, self.weights[0]) if is_mean else total


@dataclasses.dataclass(frozen=True)
class Extreme(Operation):
    """y = max_k x_k, or min_k x_k, entry by entry with broadcasting."""

    largest: bool

    def forward(self, signals, precision):
        pick = np.maximum if self.largest else np.minimum
        value, error = signals[0].value, signals[0].error
        for signal in signals[1:]:
            value = pick(value, signal.value)
            if error is not None and signal.error is not None:
                error = np.maximum(error, signal.error)
        return Signal(value, None if any(s.error is None for s in signals) else error)

    def write(self, graph, names):
        return graph.pointwise("Max" if self.largest else "Min", *names)


@dataclasses.dataclass(frozen=True)
class Joined(Operation):
    """Concatenation along an axis (batch axis 0)."""

    axis: int

    def forward(self, signals, precision):
        value = np.concatenate([s.value for s in signals], axis=self.axis)
        if any(s.error is None for s in signals):
            return Signal(value)
        return Signal(value, np.concatenate([s.error for s in signals], axis=self.axis))

    def write(self, graph, names):
        return graph.join(names, self.axis % (len(graph.sizes(names[0])) + 1))


@dataclasses.dataclass(frozen=True)
class Bounded(Operation):
    """y = max(x, b), or min(x, b), with a constant b.

    Attributes:
        bound: float64, broadcast against a sample.
        largest: whether it is the maximum.
    """

    bound: np.ndarray
    largest: bool

    def forward(self, signals, precision):
        (signal,) = signals
        value = (np.maximum if self.largest else np.minimum)(signal.value, self.bound)

        def error():
            # The constant is rounded to the format.
            own = precision.unit * np.abs(self.bound) + precision.tiny
            return np.maximum(signal.error, own)

        return with_error(signals, value, error)

    def write(self, graph, names):
        return graph.pointwise("Max" if self.largest else "Min", *names, self.bound)


def of_name(name, count, axis=None):
    """The operation of a merging layer by its class's name."""
    if name == "Add":
        return Weighted((1.0,) * count)
    if name == "Subtract":
        return Weighted((1.0, -1.0))
    if name == "Average":
        return Weighted((1.0 / count,) * count)
    if name == "Concatenate":
        return Joined(int(axis))
    return Extreme(name == "Maximum")


def broadcast_weights(inputs, output):
    """√(times that each input's entries appear in the output) for elementwise merging."""
    weights = []
    for tensor in inputs:
        if tensor.shape == output.shape:
            weights.append(1.0)
        elif None in (tensor.size, output.size):
            raise UnsupportedLayerError(
                "Merging tensors of different shapes needs known sizes. "
                f"Received: shapes {tensor.shape} and {output.shape}. Fix the input size."
            )
        else:
            weights.append(rounding.sqrt_up(output.size / tensor.size))
    return tuple(weights)


def _refuse_as_bias(name, inputs):
    """Keras on TensorFlow takes a tensor with one long axis, the batch's too, for a bias.

    (4, 4) + (4, 1) then adds the second tensor along the channels: samples mix, for batches whose
    size is that of an axis.
    """
    if keras.backend.backend() != "tensorflow":
        return
    first = inputs[0].shape[1:]
    for tensor in inputs[1:]:
        own = tensor.shape[1:]
        first, before = (
            np.broadcast_shapes(*(tuple(n or 2**31 for n in s) for s in (first, own))),
            first,
        )
        long = [i for i, n in enumerate(own) if n != 1]
        is_channels = long == [len(own) - 1] and before[-1] == own[-1]
        if tuple(own) != tuple(before) and len(long) <= 1 and not is_channels:
            raise UnsupportedLayerError(
                "Keras on TensorFlow adds a tensor of this shape as if it were a bias, wherever "
                "the batch or an axis is as long as the other tensor has channels. Received: "
                f"{name} of shapes {inputs[0].shape} and {tensor.shape}. Repeat the tensor to the "
                "full shape first, or use `keras.layers.Subtract` of its negative."
            )


def merged_gain(name, inputs, output, dtype, axis=None):
    """`Gain` of Add, Subtract, Average (triangle inequality), Maximum, Minimum, Concatenate (√Σ).

    |max(a, b) - max(a', b')| ≤ max(|a - a'|, |b - b'|) per entry, so its square is at most the
    sum of the squares.
    """
    unit = rounding.unit_roundoff(dtype)
    count = len(inputs)
    cast = sum(unit for t in inputs if t.dtype != dtype)
    if name == "Concatenate":
        rank = len(output.shape)
        if axis % rank == 0:
            raise UnsupportedLayerError("Concatenating along the batch axis mixes inputs.")
        weights, rule, value = (1.0,) * count, "root_sum_squares", 1.0
        return Gain("merge", value, "concatenation, √Σ L²", Affine(1.0, 0.0, cast), rule, weights)
    weights = broadcast_weights(inputs, output)
    if name in ("Add", "Average"):
        _refuse_as_bias(name, inputs)
    if name in ("Maximum", "Minimum"):
        method = f"elementwise {name.lower()}, √Σ L²"
        return Gain("merge", 1.0, method, Affine(1.0, 0.0, cast), "root_sum_squares", weights)
    error = rounding.gamma(count + 1, unit) + cast
    if name == "Average":
        value = float(rounding.up(1 / count)) if count & (count - 1) else 1 / count
        affine = Affine(value, 0.0, error)
        return Gain("merge", value, "mean, Σ L / k", affine, "sum", weights, peak=Peak(1.0))
    method = "sum of branches, Σ L" if name == "Add" else "difference of branches, Σ L"
    return Gain("merge", 1.0, method, Affine(1.0, 0.0, error), "sum", weights)


def _read(call):
    layer = call.operation
    return [of_name(type(layer).__name__, len(call.inputs), getattr(layer, "axis", None))]


def _rule(call):
    layer = call.operation
    axis = getattr(layer, "axis", None)
    name = type(layer).__name__
    return merged_gain(name, call.inputs, call.outputs[0], layer.compute_dtype, axis)


# Bare operations --------------------------------------------------------------------------------


def _read_merge(call):
    kind, found = type(call.operation).__name__, constants(call)
    if not found:
        return [of_name(kind, len(call.inputs))]
    ((position, value),) = found
    if kind == "Add":
        return [scaling.scaled(np.ones(()), value)]
    if kind == "Subtract":
        sign = 1.0 if position == 1 else -1.0
        return [scaling.scaled(np.array(sign), -sign * value)]
    return [Bounded(frozen(value), kind == "Maximum")]


def _read_concatenate(call):
    return [Joined(int(call.operation.axis))]


def _merge_rule(call):
    name, output = type(call.operation).__name__, call.outputs[0]
    arguments = list(call.args) + list(call.kwargs.values())
    found = [checked_constant(call, a) for a in arguments if not isinstance(a, Tensor)]
    if any(len(t.shape) != len(output.shape) for t in call.inputs):
        refuse(call.operation, "tensors of different ranks are combined across samples")
    if not found:
        return merged_gain(name, call.inputs, output, output.dtype)
    if len(call.inputs) != 1 or len(found) != 1:
        refuse(call.operation)
    (shift,) = found
    clip = name in ("Maximum", "Minimum")
    method = f"{name.lower()} with a constant" if clip else "adds a constant"
    scale = np.array(repeats(call))
    return scaling.diagonal_gain("scaling", method, scale, shift, output, output.dtype)


def _concatenate_rule(call):
    output = call.outputs[0]
    tensors = keras.tree.flatten((call.args, call.kwargs))
    if not all(isinstance(t, Tensor) for t in tensors):
        refuse(call.operation, "it joins constants")
    return merged_gain("Concatenate", call.inputs, output, output.dtype, call.operation.axis)


READERS = dict.fromkeys(MERGING_LAYERS, _read)
RULES = dict.fromkeys(MERGING_LAYERS, _rule)
SEVERAL_INPUTS = MERGING_LAYERS
_MERGES = ("Add", "Subtract", "Maximum", "Minimum")
BARE_READERS = {**dict.fromkeys(_MERGES, _read_merge), "Concatenate": _read_concatenate}
BARE_RULES = {**dict.fromkeys(_MERGES, _merge_rule), "Concatenate": _concatenate_rule}
