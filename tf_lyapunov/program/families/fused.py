"""What a layer applies to its own result: a function, an activation layer, or a softmax."""

import functools
import sys

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.activations import LipschitzPReLU
from tf_lyapunov.program.activations import activation_name, is_softmax
from tf_lyapunov.program.families import elementwise, softmax, sorting
from tf_lyapunov.program.families.unchanged import unchanged_gain
from tf_lyapunov.program.graph import Call

_layers = keras.layers
# Layers of this library that may be held as an activation.
HELD = (*sorting.RULES, LipschitzPReLU)
_HELD_READERS = {**elementwise.READERS, **sorting.READERS}
_HELD_RULES = {**elementwise.RULES, **sorting.RULES}


def fused_gain(layer, tensor):
    """`Gain` of the activation that a layer applies to `tensor` itself, or None for the identity.

    Args:
        layer: a layer with an `activation`: a function, a Keras layer or one of ours.
        tensor: `graph.Tensor` before the activation.

    Raises:
        UnsupportedLayerError: for activations without a proven sector.
    """
    activation = layer.activation
    if type(activation) in HELD:
        return _HELD_RULES[type(activation)](_as_call(activation, tensor))
    return activation_gain(activation, tensor, layer.compute_dtype, layer)


def activation_gain(activation, tensor, dtype, owner):
    """`Gain` of an activation function or layer on `tensor`, or None for the identity.

    Args:
        activation: a Keras activation function, an activation layer, or None.
        tensor: `graph.Tensor` that it is applied to.
        dtype: compute dtype.
        owner: the layer that applies it, for messages.

    Raises:
        UnsupportedLayerError: for activations without a proven sector.
    """
    if is_softmax(activation):
        axis = getattr(activation, "axis", -1)
        return softmax.softmax_gain(activation_name(activation), axis, tensor, dtype)
    if type(activation) is _layers.Activation:
        return activation_gain(activation.activation, tensor, dtype, owner)
    known = elementwise.ACTIVATION_LAYERS
    if isinstance(activation, keras.Layer) and type(activation) not in known:
        raise UnsupportedLayerError(
            "A layer held as an activation must be ReLU, LeakyReLU, ELU, PReLU or Activation. "
            f"Received: {activation.name!r} of type {type(activation).__name__}."
        )
    return elementwise.sector_gain(activation, tensor, dtype, owner)


def _as_call(layer, tensor):
    return Call(layer.name, layer, (tensor,), {}, (tensor,), (tensor,))


def is_keras_own(activation):
    """Whether a function is the very object that Keras holds under its module and name."""
    module = sys.modules.get(getattr(activation, "__module__", None) or "")
    name = getattr(activation, "__name__", "")
    return getattr(module, name, None) is activation and module.__name__.split(".")[0] == "keras"


def read(layer, tensor):
    """Operations of the activation that a layer applies to `tensor`; none for the identity.

    Raises:
        UnsupportedLayerError: for a function that is not Keras' own, or has no entry here.
    """
    activation = layer.activation
    while type(activation) is _layers.Activation:
        activation = activation.activation
    if activation is None or activation is keras.activations.linear:
        return []
    if is_softmax(activation):
        logarithm = activation is keras.activations.log_softmax
        axis = getattr(activation, "axis", -1)
        return [softmax.of_axis(axis, len(tensor.shape), logarithm)]
    if isinstance(activation, keras.Layer):
        reader = _HELD_READERS.get(type(activation))
        if reader is None:
            what = f"its activation of type {type(activation).__name__}"
            raise elementwise.unread(layer, what)
        return reader(_as_call(activation, tensor))
    parameters = {}
    if isinstance(activation, functools.partial):
        parameters, activation = dict(activation.keywords), activation.func
    if not is_keras_own(activation):
        name = getattr(activation, "__name__", activation)
        raise elementwise.unread(layer, f"the activation {name!r}")
    name = activation.__name__
    if name == "gelu" and ".ops" in activation.__module__:
        parameters = {"approximate": True, **parameters}
    return [elementwise.named(name, parameters, layer)]


def _read_activation(call):
    return read(call.operation, call.outputs[0])


def _activation_rule(call):
    gain = fused_gain(call.operation, call.inputs[0])
    return gain if gain is not None else unchanged_gain(call)


READERS = {_layers.Activation: _read_activation}
RULES = {_layers.Activation: _activation_rule}
