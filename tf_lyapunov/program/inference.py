"""What a recorded call computes at inference: its arguments, types and open sizes."""

import inspect

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import registry


def is_composite(operation):
    """Whether a layer is read by what its `call` does: a user's own, without a rule or a gain."""
    if not isinstance(operation, keras.Layer) or registry.is_proven(type(operation)):
        return False
    if registry.registered_gain(operation) is not None:
        return False
    if any(cls.__module__.startswith("tf_lyapunov.") for cls in type(operation).__mro__):
        return False  # what it computes depends on what it keeps
    module = type(operation).__module__
    own = not module.startswith(("keras.", "keras_"))
    return own or ".applications." in module or type(operation) is keras.layers.Pipeline


def taken_as(layer, dtype):
    """dtype that a layer casts its inputs of this dtype to before it calls itself."""
    if not layer.autocast or not keras.backend.is_float_dtype(dtype):
        return dtype
    return layer.compute_dtype if keras.backend.is_float_dtype(layer.compute_dtype) else dtype


def as_used(variable, layer):
    """A variable that a layer's own `call` uses, as its dtype policy casts it."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    cast = getattr(variable, "_autocast", True) and layer.autocast
    if not cast or not keras.backend.is_float_dtype(dtype) or dtype == layer.compute_dtype:
        return variable
    return keras.ops.cast(variable, layer.compute_dtype)


def without_open_sizes(operation):
    """A reshape to (batch size, …) whose batch size was unknown when it was recorded."""
    if type(operation).__name__ != "Reshape" or isinstance(operation, keras.Layer):
        return operation
    sizes = operation.newshape
    if not isinstance(sizes, tuple) or sizes.count(None) != 1 or -1 in sizes:
        return operation
    return type(operation)(tuple(-1 if n is None else n for n in sizes))


def at_inference(operation, args, kwargs, is_graph):
    """Arguments of a recorded call at inference.

    A graph's call with `training=False` overrides what was recorded, which for the layers that
    augment images is their default; where they cast their inputs Keras records nothing.
    """
    if isinstance(operation, keras.Layer) and "training" not in kwargs:
        names = inspect.signature(operation.call).parameters
        unsaid = "training" in names and list(names).index("training") >= len(args)
        if unsaid and names["training"].default is True:
            return args, {**kwargs, "training": False}
    if not (kwargs.get("training") or _positional_training(operation, args)):
        return args, kwargs
    parameter = inspect.signature(operation.call).parameters.get("training")
    if is_graph and parameter is not None and parameter.default is True and "training" in kwargs:
        return args, {**kwargs, "training": False}
    raise UnsupportedLayerError(
        f"A certificate holds at inference. Received: layer {operation.name!r} of type "
        f"{type(operation).__name__}, called with `training=True` in the model's graph, so that "
        "it may compute as in training whenever the model is called. Leave `training` out of the "
        "call."
    )


def check_cast(operation):
    """Without autocast it depends on the model around it whether weights are cast."""
    # These state that they use their weights as stored.
    whole = (keras.layers.LayerNormalization, keras.layers.GroupNormalization)
    if type(operation) in whole:
        return
    if isinstance(operation, keras.Layer) and operation.weights and not operation.autocast:
        if operation.compute_dtype != operation.variable_dtype:
            raise UnsupportedLayerError(
                "A layer in mixed precision must cast its weights. Received: layer "
                f"{operation.name!r} of dtype policy {operation.dtype_policy.name!r} with "
                "autocast=False. Leave `autocast` out, or use a single dtype."
            )


def _positional_training(operation, args):
    """`training` passed by position to a layer's `call`."""
    if not isinstance(operation, keras.Layer) or len(args) < 2:
        return False
    names = list(inspect.signature(operation.call).parameters)
    return "training" in names[: len(args)] and bool(args[names.index("training")])
