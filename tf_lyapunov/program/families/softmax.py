"""Softmax and log-softmax."""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import FUNCTION_ULPS, ZERO_SLACK, Affine, Gain, with_cast
from tf_lyapunov.program.operation import Operation, with_error


@dataclasses.dataclass(frozen=True)
class Softmax(Operation):
    """exp(x) / Σ exp(x) along axes, or its logarithm.

    Attributes:
        axes: tuple of int, batch axis 0 not among them.
        logarithm: bool.
    """

    axes: tuple
    logarithm: bool = False

    def forward(self, signals, precision):
        (signal,) = signals
        top = signal.value.max(axis=self.axes, keepdims=True)
        powers = np.exp(signal.value - top)
        total = powers.sum(axis=self.axes, keepdims=True)
        value = signal.value - top - np.log(total) if self.logarithm else powers / total

        def error():
            count = np.prod([signal.value.shape[a] for a in self.axes])
            moved = signal.error.max(axis=self.axes, keepdims=True)
            size = 1 + np.abs(signal.value - top)
            if len(self.axes) > 1:  # by exp(x - log Σ exp x), whose terms are rounded first
                size = size + np.abs(signal.value) + np.abs(top)
            if self.logarithm:
                own = (precision.sum(count) + 4 * precision.function) * (size + np.abs(value))
                return 2 * moved + own
            # The exponent's own rounding is relative to it; where it is large the power is small.
            relative = precision.sum(count) + 4 * precision.function + precision.unit * size
            # By powers relative to each other, or by the Jacobian's absolute row sums, 2p(1 - p) at
            # most; and no two probabilities are further apart than 1.
            change = np.minimum(value * np.expm1(np.minimum(2 * moved, 50.0)), moved / 2)
            return (
                np.minimum(change, 1.0)
                + relative * value
                + (4 * precision.tiny + precision.function * precision.unit)
            )

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        if len(self.axes) == 1:
            below, (axis,), back = graph.below(x, self.axes)
            return back(graph.node("LogSoftmax" if self.logarithm else "Softmax", below, axis=axis))
        x = graph.pointwise("Sub", x, graph.reduce("Max", x, self.axes, True))
        powers = graph.pointwise("Exp", x)
        total = graph.reduce("Sum", powers, self.axes, True)
        if self.logarithm:
            return graph.pointwise("Sub", x, graph.pointwise("Log", total))
        return graph.pointwise("Div", powers, total)


def of_axis(axis, rank, logarithm=False):
    """`Softmax` along one axis or several of a tensor of this rank."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return Softmax(tuple(sorted(a % rank for a in axes)), logarithm)


def softmax_gain(name, axis, tensor, dtype):
    """Softmax has gain 1/2, log-softmax √K.

    diag(p) - ppᵀ has absolute row sums 2p_i(1 - p_i) ≤ 1/2. I - 1pᵀ is an oblique projection,
    whose norm is that of its complement 1pᵀ: √K‖p‖ ≤ √K.
    """
    rank = len(tensor.shape)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(a % rank for a in axes)
    if 0 in axes:
        raise UnsupportedLayerError(
            f"A softmax over the batch axis mixes inputs. Received: {name} with axis={axis}."
        )
    classes = [tensor.shape[a] for a in axes]
    count = None if None in classes else math.prod(classes)
    if name == "log_softmax" and count is None:
        raise UnsupportedLayerError(
            "A log-softmax over an axis of unknown size has no known gain. "
            f"Received: input shape {tensor.shape}."
        )
    unit = rounding.unit_roundoff(dtype)
    size = math.inf if tensor.size is None else tensor.size
    terms = math.inf if count is None else count + FUNCTION_ULPS
    error = rounding.gamma(terms, unit)
    if name == "softmax":
        value, offset = 0.5, math.sqrt(size)
        affine = Affine(value, offset, 4 * unit * math.sqrt(size), error * math.sqrt(size))
    else:
        value = rounding.sqrt_up(count)
        offset = math.sqrt(size) * (math.log(count) * ZERO_SLACK + 1e-6)
        affine = Affine(value, offset, 4 * unit * value, error * (offset + math.sqrt(size)))
    last = axes == (rank - 1,)
    affine = with_cast(affine, tensor, dtype, unit)
    return Gain("softmax", value, f"{name} Jacobian", affine, decision=name if last else None)


def _read(call):
    return [of_axis(call.operation.axis, len(call.inputs[0].shape))]


def _rule(call):
    layer = call.operation
    return softmax_gain("softmax", layer.axis, call.inputs[0], layer.compute_dtype)


def _is_logarithm(call):
    return type(call.operation).__name__ == "LogSoftmax"


def _read_bare(call):
    return [of_axis(call.operation.axis, len(call.inputs[0].shape), _is_logarithm(call))]


def _bare_rule(call):
    name = "log_softmax" if _is_logarithm(call) else "softmax"
    return softmax_gain(name, call.operation.axis, call.inputs[0], call.outputs[0].dtype)


READERS = {keras.layers.Softmax: _read}
RULES = {keras.layers.Softmax: _rule}
BARE_READERS = dict.fromkeys(("Softmax", "LogSoftmax"), _read_bare)
BARE_RULES = dict.fromkeys(("Softmax", "LogSoftmax"), _bare_rule)
