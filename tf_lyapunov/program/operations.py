"""Gains of bare `keras.ops` calls in a model's graph, such as `x + y`, `2 * x` or `ops.relu(x)`."""

import re

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.activations import elementwise_gain, softmax_gain
from tf_lyapunov.program.gain import Affine, Gain
from tf_lyapunov.program.gains import diagonal_gain, merged_gain, refuse
from tf_lyapunov.program.graph import Cast, Tensor, check_own_call
from tf_lyapunov.theory.sectors import Sector

# Attributes of Keras's activation operations that are parameters of the activation.
_PARAMETERS = ("negative_slope", "alpha", "approximate", "threshold", "max_value", "b")
_NAMES = {"re_lu": "relu"}
_MERGES = {"Add": "Add", "Subtract": "Subtract", "Maximum": "Maximum", "Minimum": "Minimum"}


def operation_gain(call):
    """`Gain` of a `graph.Call` of a Keras operation.

    Raises:
        UnsupportedLayerError: for operations without a rule, and for those that mix samples.
    """
    operation = call.operation
    check_own_call(operation)
    if type(operation) is not Cast and not type(operation).__module__.startswith("keras."):
        refuse(operation, "it is not one of Keras's own operations")
    output = call.outputs[0]
    if len(call.outputs) != 1 or not output.shape or not call.inputs:
        refuse(operation)
    kind = type(operation).__name__
    rule = _RULES.get(kind)
    if rule is not None:
        return rule(call)
    if len(call.inputs) != 1:
        refuse(operation)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind).lower()
    name = {"re_lu": "relu", "relu6": "relu6"}.get(name, name)
    tensor = call.inputs[0]
    if name in ("softmax", "log_softmax"):
        return softmax_gain(name, operation.axis, tensor, output.dtype)
    values = vars(operation)
    parameters = {key: values[key] for key in _PARAMETERS if key in values}
    try:
        sector = Sector.of(name, **parameters)
    except (UnsupportedLayerError, TypeError) as error:
        if name in ("abs", "absolute"):
            sector = Sector(-1.0, 1.0)
        else:
            refuse(operation, f"no proven gain is known for it ({error})")
    at_zero = operation(keras.ops.zeros((1, 1), dtype="float32"))
    at_zero = float(keras.ops.convert_to_numpy(at_zero)[0, 0])
    return elementwise_gain(name, sector, tensor, output.dtype, at_zero)


def _constant(call, value):
    """A non-symbolic argument as a float64 array that broadcasts over samples."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, keras.Variable) or keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        refuse(call.operation, "one of its arguments is not a number")
    array = array.astype(np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"Constants in the graph must be finite. Received: NaN or infinity in operation "
            f"{call.operation.name!r}."
        )
    rank = len(call.inputs[0].shape)
    if array.ndim > rank or (array.ndim == rank and array.shape[0] != 1):
        refuse(call.operation, "a constant of this shape does not broadcast over samples")
    return array


def _merge_rule(call):
    name, output = _MERGES[type(call.operation).__name__], call.outputs[0]
    arguments = list(call.args) + list(call.kwargs.values())
    constants = [_constant(call, a) for a in arguments if not isinstance(a, Tensor)]
    if any(len(t.shape) != len(output.shape) for t in call.inputs):
        refuse(call.operation, "tensors of different ranks are combined across samples")
    if not constants:
        return merged_gain(name, call.inputs, output, output.dtype)
    if len(call.inputs) != 1 or len(constants) != 1:
        refuse(call.operation)
    (shift,) = constants
    repeats = _repeats(call)
    clip = name in ("Maximum", "Minimum")
    method = f"{name.lower()} with a constant" if clip else "adds a constant"
    gain = diagonal_gain("scaling", method, np.array(repeats), shift, output, output.dtype)
    return gain


def _multiply_rule(call):
    output = call.outputs[0]
    arguments = list(call.args) + list(call.kwargs.values())
    if len(call.inputs) != 1 or len(arguments) != 2:
        refuse(call.operation, "a product of two inputs has no global Lipschitz constant")
    divides = type(call.operation).__name__ in ("TrueDivide", "Divide")
    if divides and not isinstance(arguments[0], Tensor):
        refuse(call.operation, "a division by an input has no global Lipschitz constant")
    constant = next(c for c in (_constant(call, a) for a in arguments) if c is not None)
    if divides:
        if np.any(constant == 0):
            raise ValueError(f"Operation {call.operation.name!r} divides by zero.")
        constant = 1 / constant
    largest = float(np.max(np.abs(constant)))
    largest = float(rounding.up(largest)) if divides else largest
    largest = np.array(rounding.product_up(largest, _repeats(call)))
    method = "divides by a constant" if divides else "multiplies by a constant"
    return diagonal_gain("scaling", method, largest, np.zeros(1), output, output.dtype)


def _repeats(call):
    tensor, output = call.inputs[0], call.outputs[0]
    if tensor.shape == output.shape:
        return 1.0
    if None in (tensor.size, output.size):
        refuse(call.operation, "its shapes are unknown")
    return rounding.sqrt_up(output.size / tensor.size)


def _moving_rule(call):
    """Operations that only move or drop entries, and leave the batch axis alone."""
    operation, tensor, output = call.operation, call.inputs[0], call.outputs[0]
    kind, rank = type(operation).__name__, len(tensor.shape)
    mixes = "it mixes samples along the batch axis"
    if len(call.inputs) != 1 or (tensor.shape[0] is not None) != (output.shape[0] is not None):
        refuse(operation, mixes)
    if kind == "Transpose" and (operation.axes is None or operation.axes[0] % rank != 0):
        refuse(operation, mixes)
    if kind == "Reshape" and (tensor.size is None or tensor.size != output.size):
        refuse(operation, mixes)
    if kind == "Squeeze":
        axes = operation.axis
        axes = (axes,) if isinstance(axes, int) else axes
        if axes is None or 0 in [a % rank for a in axes]:
            refuse(operation, mixes)
    if kind == "ExpandDims":
        axes = operation.axis
        axes = (axes,) if isinstance(axes, int) else axes
        if 0 in [a % len(output.shape) for a in axes]:
            refuse(operation, mixes)
    if kind == "GetItem":
        key = call.args[1] if len(call.args) > 1 else call.kwargs.get("key")
        parts = key if isinstance(key, (tuple, list)) else (key,)
        kinds = (int, np.integer, slice, type(Ellipsis), type(None))
        if any(isinstance(p, bool) or not isinstance(p, kinds) for p in parts):
            refuse(operation, "an index array may repeat entries")
        if not parts or (parts[0] is not Ellipsis and parts[0] != slice(None)):
            refuse(operation, mixes)
        if parts[0] is Ellipsis and len([p for p in parts[1:] if p is not None]) >= rank:
            refuse(operation, mixes)
    return Gain("reshape", 1.0, "moves or drops entries")


def _negative_rule(call):
    return Gain("scaling", 1.0, "changes signs")


def _cast_rule(call):
    """A cast to a wider format is exact; a narrower one is a staircase, whatever its steps."""
    tensor, dtype = call.inputs[0], call.outputs[0].dtype
    units = rounding.UNIT_ROUNDOFF
    exact = dtype == tensor.dtype or (
        dtype in units and (tensor.dtype not in units or units[dtype] < units[tensor.dtype])
    )
    if not exact:
        refuse(
            call.operation,
            f"a cast of {tensor.dtype} to {dtype} within the graph is discontinuous",
        )
    # Integers need not fit the format.
    unit = 0.0 if tensor.dtype in units else units[dtype]
    return Gain("identity", 1.0, f"cast to {dtype}", Affine(1.0, 0.0, unit))


def _concatenate_rule(call):
    output = call.outputs[0]
    tensors = keras.tree.flatten((call.args, call.kwargs))
    if not all(isinstance(t, Tensor) for t in tensors):
        refuse(call.operation, "it joins constants")
    return merged_gain("Concatenate", call.inputs, output, output.dtype, call.operation.axis)


def _unchanged_rule(call):
    return Gain("identity", 1.0, "identity")


_RULES = {
    **dict.fromkeys(_MERGES, _merge_rule),
    **dict.fromkeys(("Multiply", "TrueDivide", "Divide"), _multiply_rule),
    **dict.fromkeys(("Transpose", "Reshape", "Squeeze", "ExpandDims", "GetItem"), _moving_rule),
    "Negative": _negative_rule,
    "Cast": _cast_rule,
    "Concatenate": _concatenate_rule,
    "StopGradient": _unchanged_rule,
}
