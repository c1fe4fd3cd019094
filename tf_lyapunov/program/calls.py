"""The gain of any call but those of dense and convolution layers."""

import keras

from tf_lyapunov.program import own_layers, registry
from tf_lyapunov.program.gains import LAYER_RULES, MERGING_LAYERS, refuse, registered_gain
from tf_lyapunov.program.operations import operation_gain


def call_gain(call):
    """`Gain` of one `graph.Call` that is not a dense or convolution layer."""
    operation = call.operation
    if isinstance(operation, keras.Layer):
        registered = registry.registered_gain(operation)
        if registered is not None:
            return registered_gain(registered, call)
        rule = LAYER_RULES.get(type(operation))
        if rule is None:
            refuse(operation)
        if len(call.inputs) != 1 and type(operation) not in (
            *MERGING_LAYERS,
            *own_layers.MERGING,
        ):
            refuse(operation, "it is called on several tensors (a mask or a state)")
        return rule(call)
    return operation_gain(call)
