"""Bare operations of `keras.ops` in a model's graph, with their constants."""

import re

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.families import elementwise, merging, moving, scaling, softmax
from tf_lyapunov.program.graph import Tensor

_PARAMETERS = ("negative_slope", "alpha", "approximate", "threshold", "max_value", "b")


def _constants(call):
    """Position and float64 value of every argument that is no tensor of the graph."""
    found = []
    for i, argument in enumerate([*call.args, *call.kwargs.values()]):
        if isinstance(argument, Tensor):
            continue
        if isinstance(argument, keras.Variable) or keras.ops.is_tensor(argument):
            argument = keras.ops.convert_to_numpy(argument)
        value = np.asarray(argument).astype(np.float64)
        rank = len(call.inputs[0].shape)
        # A leading axis of one stands for the batch.
        value = value.reshape(value.shape[1:]) if value.ndim == rank else value
        found.append((i, value))
    return found


def _merge(call):
    kind, constants = type(call.operation).__name__, _constants(call)
    if not constants:
        return [merging.of_name(kind, len(call.inputs))]
    ((position, value),) = constants
    if kind == "Add":
        return [scaling.scaled(np.ones(()), value)]
    if kind == "Subtract":
        sign = 1.0 if position == 1 else -1.0
        return [scaling.scaled(np.array(sign), -sign * value)]
    raise UnsupportedLayerError(f"{kind} with a constant is not evaluated apart from the model.")


def _multiply(call):
    ((_, value),) = _constants(call)
    divides = type(call.operation).__name__ in ("TrueDivide", "Divide")
    return [scaling.scaled(1 / value if divides else value, np.zeros(()))]


def _softmax(call):
    kind = type(call.operation).__name__
    return [softmax.of_axis(call.operation.axis, len(call.inputs[0].shape), kind == "LogSoftmax")]


def _concatenate(call):
    return [merging.Joined(int(call.operation.axis))]


def read(call):
    """Operations of one bare call.

    Raises:
        UnsupportedLayerError: if it is not evaluated here.
    """
    operation = call.operation
    reader = READERS.get(type(operation).__name__)
    if reader is not None:
        return reader(call)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(operation).__name__).lower()
    values = vars(operation)
    parameters = {key: values[key] for key in _PARAMETERS if key in values}
    return [elementwise.named(name, parameters, operation)]


READERS = {
    **dict.fromkeys(("Add", "Subtract", "Maximum", "Minimum"), _merge),
    **dict.fromkeys(("Multiply", "TrueDivide", "Divide"), _multiply),
    **moving.OPERATIONS,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Concatenate": _concatenate,
    "Negative": lambda call: [scaling.scaled(np.array(-1.0), np.zeros(()))],
    "Cast": lambda call: [],
    "StopGradient": lambda call: [],
}
