"""How Keras holds activations: as functions, as layers, under which names."""

import functools

import keras

_layers = keras.layers


def is_softmax(activation):
    """Whether this is Keras's own softmax or log-softmax; a user's `softmax` may be anything."""
    own = (keras.activations.softmax, keras.activations.log_softmax)
    return type(activation) is _layers.Softmax or any(activation is f for f in own)


def innermost(layer):
    """The activation layer that a layer holds as its activation, however deep, or the layer."""
    while isinstance(getattr(layer, "activation", None), keras.Layer):
        layer = layer.activation
    return layer


def current_config(layer):
    """A layer's configuration as it computes now: for ELU Keras repeats what it was made with."""
    config = layer.get_config()
    return {**config, "alpha": layer.alpha} if type(layer) is _layers.ELU else config


def activation_name(activation):
    """Short lower-case name of an activation function or layer, whatever settings are fixed."""
    while isinstance(activation, functools.partial):
        activation = activation.func
    if activation is None:
        return "linear"
    if isinstance(activation, keras.Layer):
        names = {"ReLU": "relu", "LeakyReLU": "leaky_relu", "ELU": "elu", "PReLU": "leaky_relu"}
        kind = type(activation).__name__
        return names.get(kind, kind.lower())
    return getattr(activation, "__name__", type(activation).__name__)
