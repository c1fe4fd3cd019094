"""Constants among the arguments of bare operations."""

import keras
import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.refusal import refuse


def constants(call):
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


def checked_constant(call, value):
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


def repeats(call):
    """√(times that broadcasting repeats each entry of the one input)."""
    tensor, output = call.inputs[0], call.outputs[0]
    if tensor.shape == output.shape:
        return 1.0
    if None in (tensor.size, output.size):
        refuse(call.operation, "its shapes are unknown")
    return rounding.sqrt_up(output.size / tensor.size)
