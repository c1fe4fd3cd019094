"""`export_plain`: a model's graph, copied call by call."""

import json

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.export import activations, weighted, weightless
from tf_lyapunov.export.building import Names, Plain
from tf_lyapunov.program.activations import current_config
from tf_lyapunov.program.graph import Tensor, read_graph
from tf_lyapunov.program.wrapping import ADDED, Part

RULES = {**weighted.RULES, **activations.RULES, **weightless.RULES}


def export_plain(model):
    """An ordinary Keras model that computes what `model` does at inference.

    Layers keep their names, those of nested models too where no other layer has the name (else with
    the model's before it). It holds copies of all weights, shares nothing with the original, needs
    this library neither to run nor to load, and can be trained as any other (without guarantee).
    Outputs agree to rounding: about 1e-6 relative in float32. `certify` proves for it

    - the same gain, to 1e-6, for dense and convolution layers of any parametrisation; for skew and
      Cayley convolutions on small images, as matrices; for sorting, reflections, resizing, scaled
      pooling without overlap, centering and convex combinations;
    - with `method="auto"` also for dense potential and sandwich layers up to some hundred units,
      whose parts must be bounded together;
    - a larger one where only the original's structure shows it: convolutional potential layers (up
      to 3 in place of 1), sandwich convolutions (2 or more), Cayley convolutions on large images
      (4), skew ones (e), `TwoSidedReLU` (√2). The original's certificate holds for the same
      function, and so for the plain model up to rounding;
    - none for norm pooling, response normalization and sorting of more than 8 entries.

    Args:
        model: a built Keras model with one output; Functional, Sequential or nested, or subclassed
            with Keras layers and operations in `call`.

    Returns:
        A Functional `keras.Model`, not compiled.

    Raises:
        UnsupportedLayerError: if a layer of this library has no plain form.
        ValueError: if the model is not built.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.layers import MaxMin, SpectralDense
    >>> model = keras.Sequential([keras.Input((3,)), SpectralDense(4, activation=MaxMin())])
    >>> plain = export_plain(model)
    >>> sorted({type(layer).__name__ for layer in plain.layers})
    ['Dense', 'InputLayer', 'PReLU']
    >>> x = np.eye(3, dtype="float32")
    >>> bool(np.allclose(plain.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5))
    True
    """
    graph, copies = read_graph(model), {}
    names = Names(call.name for call in graph.calls if "/" not in call.name)
    inputs = [
        keras.Input(batch_shape=t.shape, dtype=t.dtype, name=names(t.producer))
        for t in graph.inputs
    ]
    known = {(t.producer, 0): x for t, x in zip(graph.inputs, inputs, strict=True)}

    def symbolic(a):
        return known[(a.producer, a.index)] if isinstance(a, Tensor) else a

    for call in graph.calls:
        args, kwargs = keras.tree.map_structure(symbolic, (call.args, call.kwargs))
        operation = call.operation
        rule = RULES.get(type(operation))
        if type(operation) in ADDED:
            outputs = operation.call(*args)
        elif type(operation) is Part:
            held = operation.operation
            outputs = _copied(held, f"{held.name}_{operation.index}", names, copies)(
                *args, **kwargs
            )
            outputs = keras.tree.flatten(outputs)[operation.index]
        elif rule is not None:
            outputs = rule(Plain(operation, call.name, names), args[0])
        else:
            outputs = _copied(operation, call.name, names, copies)(*args, **kwargs)
        for i, x in enumerate(keras.tree.flatten(outputs)):
            known[(call.name, i)] = x
    inputs = inputs[0] if len(inputs) == 1 else inputs
    plain = keras.Model(inputs, known[(graph.output.producer, graph.output.index)], name=model.name)
    _check_independent(plain)
    return plain


def _written(layer, write):
    """What `write` makes of a layer, refused where Keras cannot write one of its functions."""
    try:
        return write(layer)
    except (TypeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedLayerError(
            "Keras must be able to write a layer that is exported. Received: layer "
            f"{layer.name!r} of type {type(layer).__name__}: {reason} Use a function that is "
            "registered by `keras.saving.register_keras_serializable`."
        ) from error


def _check_independent(model):
    for layer in model.layers:
        written = _written(layer, keras.saving.serialize_keras_object)
        if "tf_lyapunov" in json.dumps(written, default=str):
            raise UnsupportedLayerError(
                f"This layer cannot be exported without the library: it refers to it. Received: "
                f"layer {layer.name!r} of type {type(layer).__name__}."
            )


def _copied(operation, name, names, copies):
    """A callable with the effect of a Keras layer or operation: a copy, with copied weights."""
    if id(operation) in copies:
        return copies[id(operation)]
    config = {**_written(operation, current_config), "name": names(name)}
    if not isinstance(operation, keras.Layer):
        return type(operation).from_config(config)
    # Recurrent layers show the activation of their cell, which their configuration holds.
    held = vars(operation).get("activation")
    inner = RULES.get(type(held))
    ignored = ("regularizer", "constraint", "initializer")
    config = {key: value for key, value in config.items() if not key.endswith(ignored)}
    is_function = callable(held) and not isinstance(held, keras.Layer)
    if inner is not None or is_function:
        config["activation"] = None
    copy = _written(operation, lambda layer: type(layer).from_config(config))
    if is_function:
        try:
            copy.activation = held  # a name may stand for another form of the function
        except AttributeError:
            raise UnsupportedLayerError(
                "A layer whose activation cannot be set has no plain form. Received: layer "
                f"{name!r} of type {type(operation).__name__}."
            ) from None

    def apply(*args, **kwargs):
        first = not copy.built
        y = copy(*args, **kwargs)
        if first or id(operation) not in copies:
            own = [] if inner is None else [id(v) for v in held.weights]
            weights = [v for v in operation.weights if id(v) not in own]
            for mine, weight in zip(copy.weights, weights, strict=True):
                mine.assign(keras.ops.convert_to_tensor(weight))
            copies[id(operation)] = apply
        if type(copy) is keras.layers.Normalization:
            copy.finalize_state()
        return y if inner is None else inner(Plain(held, held.name, names), y)

    return apply
