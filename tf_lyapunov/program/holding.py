"""Objects that hold a network and give it as a Keras model, in the place of a model."""

import functools

import keras


def model_of(held):
    """The Keras model of what a user passed as one.

    Args:
        held: a `keras.Model`, or an object with a method `to_keras()` that gives one, such as
            `load_onnx` returns; its attribute `keras_model` is taken where it has one. Anything
            else is given back as it is.

    Example:

    >>> class Held:
    ...     def to_keras(self):
    ...         return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> type(model_of(Held())).__name__, model_of(3)
    ('Sequential', 3)
    """
    if isinstance(held, keras.Model | type) or not callable(getattr(held, "to_keras", None)):
        return held
    kept = getattr(held, "keras_model", None)
    return held.to_keras() if kept is None else kept


def takes_networks(function):
    """A function whose argument `model` may be what `model_of` takes."""

    @functools.wraps(function)
    def opened(*args, **kwargs):
        if "model" in kwargs:
            kwargs["model"] = model_of(kwargs["model"])
        elif args:
            args = (model_of(args[0]), *args[1:])
        return function(*args, **kwargs)

    return opened
