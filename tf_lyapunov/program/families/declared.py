"""Layers of users' own classes: their gain is what `register_gain` declared."""

import dataclasses
import math

import keras

from tf_lyapunov.program import registry, rounding
from tf_lyapunov.program.gain import ZERO_SLACK, Affine, Gain
from tf_lyapunov.program.graph import Call
from tf_lyapunov.program.operation import Operation, Signal
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.replay import arguments
from tf_lyapunov.program.tensors import as_array, as_tensor


@dataclasses.dataclass(frozen=True)
class Declared(Operation):
    """A call of a user's own layer, which Keras evaluates in the layer's own precision.

    Attributes:
        call: `graph.Call`.
    """

    call: Call

    def forward(self, signals, precision):
        known = {}
        for tensor, signal in zip(self.call.inputs, signals, strict=True):
            outputs = known.get(tensor.producer, ())
            outputs = (*outputs, *(None,) * (tensor.index + 1 - len(outputs)))
            given = as_tensor(signal.value, tensor.dtype)
            outputs = (*outputs[: tensor.index], given, *outputs[tensor.index + 1 :])
            known[tensor.producer] = outputs
        args, kwargs = arguments(self.call, known)
        value = as_array(self.call.operation(*args, **kwargs))
        # Nothing is known about its rounding but what its declaration takes it to be.
        return Signal(value, None)

    def settings(self):
        # Its weights and settings enter a digest as those of every layer do.
        return "Declared", [("class", type(self.call.operation).__qualname__)]


def read(call):
    """The call itself.

    Raises:
        UnsupportedLayerError: if it has several outputs.
    """
    if len(call.outputs) != 1:
        refuse(call.operation, "it has several outputs")
    return (Declared(call),)


def gain(registered, call):
    """`Gain` of a call of a layer with a `registry.RegisteredGain`."""
    layer = call.operation
    shapes = [t.shape for t in call.inputs]
    shape = shapes[0] if len(shapes) == 1 else shapes
    value = registry.evaluate(registered, layer, shape)
    dtype = call.outputs[0].dtype
    sizes = [t.size for t in (*call.inputs, *call.outputs)]
    if len(call.outputs) != 1:
        refuse(layer, "it has several outputs")
    affine = Affine(value, math.inf, math.inf, math.inf)
    if None not in sizes:
        zeros = [keras.ops.zeros((1, *t.shape[1:]), dtype=t.dtype) for t in call.inputs]
        arguments = iter(zeros)

        def fill(a):
            return next(arguments) if a in call.inputs else a

        args, kwargs = keras.tree.map_structure(fill, (call.args, call.kwargs))
        at_zero = keras.ops.convert_to_numpy(keras.ops.cast(layer(*args, **kwargs), "float32"))
        offset = float(rounding.euclidean_norms_up(at_zero)[0]) * ZERO_SLACK
        # As for a dense layer from all inputs to all outputs.
        error = rounding.gamma(sum(sizes[:-1]) + 16, rounding.unit_roundoff(dtype))
        width = math.sqrt(min(sum(sizes[:-1]), sizes[-1]))
        affine = Affine(value, offset, error * width * value, error * offset)
    return Gain(
        "declared",
        value,
        "declared by register_gain",
        affine,
        "single" if len(shapes) == 1 else "root_sum_squares",
        (1.0,) * len(shapes),
        f"{type(layer).__name__}: {registered.assumption} Its rounding error is taken to be that "
        "of a dense layer of its size.",
    )
