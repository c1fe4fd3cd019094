"""Functions of every entry alone."""

import keras

_NONNEGATIVE = ("relu", "sigmoid", "softplus", "hard_sigmoid")


def activated(build, node, signal, name, suffix=""):
    """A Keras activation by its name."""
    tensor = build.layer(node, keras.layers.Activation, signal.tensor, suffix, activation=name)
    return signal.like(tensor, nonnegative=name in _NONNEGATIVE)


def _plain(name):
    return lambda build, node, values: activated(build, node, values[0], name)


READERS = {
    "Relu": (14, _plain("relu")),
    "Sigmoid": (13, _plain("sigmoid")),
    "Tanh": (13, _plain("tanh")),
}
