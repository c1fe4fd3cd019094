"""Runs a model's or a layer's own `call` once on symbolic tensors, which records what it calls."""

import contextlib
import inspect

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import unrolling


def symbolic_call(layer, structure, shapes_and_dtypes):
    """Symbolic inputs and outputs of one call of `layer.call` at inference.

    Args:
        layer: a built subclassed model, or a layer of the user's own.
        structure: the call's first argument, or the tuple of its tensors by position; entries
            other than None stand for `shapes_and_dtypes` in order.
        shapes_and_dtypes: list of (shape with the batch axis, dtype).

    Returns:
        `(inputs, outputs)`, lists of KerasTensors.

    Raises:
        UnsupportedLayerError: if `call` does not run on symbolic tensors.
    """
    refusal = refusal_of(layer)
    for method in ("__call__", "predict_step"):
        owner = next((cls for cls in type(layer).__mro__ if method in vars(cls)), None)
        if owner is not None and not owner.__module__.startswith("keras."):
            raise UnsupportedLayerError(refusal + f"Received: it overrides `{method}`.")
    inputs = [keras.Input(batch_shape=s, dtype=d) for s, d in shapes_and_dtypes]
    if unrolling.is_opened(layer):
        return inputs, [unrolling.opened(layer, inputs)]
    if isinstance(structure, (list, tuple)):
        if len(structure) != len(inputs):
            raise UnsupportedLayerError(refusal + "Received: arguments that are no tensors.")
        argument = type(structure)(inputs)
    elif len(inputs) == 1:
        argument = inputs[0]
    else:
        raise UnsupportedLayerError(refusal + f"Received: {len(inputs)} inputs.")
    parameters = inspect.signature(layer.call).parameters
    extra = {"training": False} if "training" in parameters else {}
    try:
        with _inference(layer):
            outputs = layer.call(argument, **extra)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedLayerError(
            refusal + f"Received: {type(error).__name__}: {reason}"
        ) from error
    outputs = keras.tree.flatten(outputs)
    if not all(isinstance(t, keras.KerasTensor) for t in outputs):
        raise UnsupportedLayerError(refusal + "Received: an output that is not a symbolic tensor.")
    return inputs, outputs


def refusal_of(layer):
    """Beginning of the message about a `call` that cannot be followed."""
    kind = "Subclassed model" if isinstance(layer, keras.Model) else "Layer"
    return (
        f"{kind} {layer.name!r} of type {type(layer).__name__} cannot be read as a graph of "
        "layers. Use Keras layers and `keras.ops` only in `call`, or build a Functional model. "
    )


@contextlib.contextmanager
def _inference(layer):
    """What the layers inside take `training` to be when nobody passes it: False, as in use.

    Some (those that augment images) have True as their default, which only the call of the model
    around them corrects.
    """
    try:
        context = layer._get_call_context()
        before = context.get_value("training")
        context.set_value("training", False)
    except AttributeError:  # another version of Keras: what is recorded is checked as it is
        yield
        return
    try:
        yield
    finally:
        context.set_value("training", before)
        layer._maybe_reset_call_context()


def node_counts(layer):
    """Numbers of graph nodes of a layer and all layers inside, to forget later ones."""
    layers = {id(found): found for found in layer._flatten_layers()}
    return [
        (found, len(found._inbound_nodes), len(found._outbound_nodes)) for found in layers.values()
    ]


def forget_nodes(counts):
    """Leaves the user's layers as `node_counts` found them."""
    for layer, inbound, outbound in counts:
        del layer._inbound_nodes[inbound:], layer._outbound_nodes[outbound:]
