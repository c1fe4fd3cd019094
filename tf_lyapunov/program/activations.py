"""How Keras holds activations: as functions, as layers, under which names."""

import functools

import keras

_layers = keras.layers
# Functions without a constant that float32 would round, and numbers that may be set beside them.
_EXACT = (
    "linear",
    "relu",
    "relu6",
    "tanh",
    "sigmoid",
    "log_sigmoid",
    "softplus",
    "softsign",
    "silu",
)
_NUMBERS = ("negative_slope", "max_value", "threshold")


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


def settings_of(holder):
    """Numbers that are set beside a piecewise linear function, by name, those that are 0 left out.

    Args:
        holder: a function, an activation layer or operation, or a layer that holds one of them.
    """
    while hasattr(holder, "activation"):
        holder = holder.activation
    found = {}
    while isinstance(holder, functools.partial):
        found, holder = {**holder.keywords, **found}, holder.func
    found = {**{name: getattr(holder, name, None) for name in _NUMBERS}, **found}
    return {name: float(found[name]) for name in _NUMBERS if found[name]}


def is_exact(name, holder):
    """Whether a function has no constant that backends round to float32 whatever its dtype."""
    return name in _EXACT and not settings_of(holder)
