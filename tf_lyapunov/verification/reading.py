"""Reads a Keras model into `Network`: its graph, its settings, and its weights as inference uses
them. With `layers`, the only part of this package that knows Keras; it computes no bound.
"""

import os

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.modelfile import load_model
from tf_lyapunov.verification.layers import (
    KEEP_INTEGERS,
    LINEAR,
    MERGES,
    RULES,
    TAKE_INTEGERS,
    Final,
    activation_name,
    activation_operation,
    fold,
    folds,
    is_linear,
    normalization,
    refuse,
    stored,
)
from tf_lyapunov.verification.network import Network, Step, record
from tf_lyapunov.verification.operations import Activation, Identity
from tf_lyapunov.verification.suspicion import (
    cast_of,
    check_call,
    check_layer,
    check_model,
    is_float,
)

_FINAL = ("softmax", "log_softmax", "sigmoid", "log_sigmoid")
_layers = keras.layers


def read(model, input_shape=None):
    """`Network` of a Keras model, or of a `.keras` file.

    Args:
        model: a built Functional or Sequential model with one input and one output, or a path.
        input_shape: shape without the batch axis, where the model leaves sizes open.

    Raises:
        UnsupportedLayerError: naming a layer that this reader does not know.
        ModelFileError: for a file that is not a model.
        ValueError: for weights that are NaN or infinite.
    """
    return read_with_calls(model, input_shape)[1]


def read_with_calls(model, input_shape=None):
    """`(model, network, calls)`: what `read` gives, and how its layers are called.

    Args, Raises: see `read`.

    Returns:
        `calls` is a tuple of `(layers, names of the steps read, steps, plural)`.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras model or the path of one. "
            f"Received: an object of type {type(model).__name__}."
        )
    reader = _Reader()
    network = reader.read(model, input_shape)
    return model, network, tuple(reader.calls)


class _Reader:
    def __init__(self):
        self.steps, self.records, self.names = [], [], set()
        self.folded, self.dtypes, self.calls = set(), {}, []

    def read(self, model, input_shape):
        check_model(model)
        if not model.built or len(model.inputs) != 1 or len(model.outputs) != 1:
            raise UnsupportedLayerError(
                "A proof can be verified for a built model with one input and one output. "
                f"Received: model {model.name!r}."
            )
        shape = _input_shape(model, input_shape)
        given = keras.backend.standardize_dtype(model.inputs[0].dtype)
        if not is_float(given) and (given == "bool" or "int" not in given):
            raise UnsupportedLayerError(
                "A proof can be verified for a model of real inputs. Received: model "
                f"{model.name!r} of inputs in {given}."
            )
        first = self._add("input", (), shape, None, given)
        if is_float(given):
            first = self._cast(model, [first], "")[0]
        output = self._open(model, [first], "")[0]
        logits = self._logits(output)
        if isinstance(self._final(output).operation, Final) and self._shape(logits)[-1] == 1:
            raise UnsupportedLayerError(
                f"A softmax over one unit is constant. Received: model {model.name!r}."
            )
        before = self.steps[: [step.name for step in self.steps].index(logits) + 1]
        if any(isinstance(step.operation, Final) for step in before):
            raise UnsupportedLayerError(
                f"A softmax inside a network cannot be verified. Received: model {model.name!r}."
            )
        return Network(tuple(self.steps), logits, tuple(self.records), (given,))

    def _final(self, name):
        """The last step that does something."""
        steps = {step.name: step for step in self.steps}
        step = steps[name]
        while type(step.operation) is Identity:
            step = steps[step.inputs[0]]
        return step

    def _logits(self, name):
        """Step before a final softmax or sigmoid."""
        step = self._final(name)
        if isinstance(step.operation, Final):
            return step.inputs[0]
        if isinstance(step.operation, Activation) and step.operation.name in _FINAL:
            return step.inputs[0]
        return name

    def _add(self, name, inputs, shape, operation, dtype):
        shape = tuple(int(n) for n in shape)
        if name in self.dtypes:  # of a part such as `dense/relu`
            raise UnsupportedLayerError(
                "The verifier tells steps apart by the names of their layers. Received: two called "
                f"{name!r}. Give one of these layers another name."
            )
        self.steps.append(Step(name, tuple(inputs), shape, operation, dtype))
        self.dtypes[name] = dtype
        return name

    def _unique(self, name):
        candidate, count = name, 1
        while candidate in self.names or candidate == "input":
            count += 1
            candidate = f"{name}#{count}"
        self.names.add(candidate)
        return candidate

    def _open(self, model, inputs, prefix):
        """Adds the calls inside a model, called on the named steps."""
        check_model(model)
        known = {id(t): name for t, name in zip(model.inputs, inputs, strict=True)}
        nodes = _ordered(model)
        readers = {}
        for node in nodes:
            for tensor in node.input_tensors:
                readers.setdefault(id(tensor), []).append(node)
        for tensor in model.outputs:
            readers.setdefault(id(tensor), []).append(None)
        for node in nodes:
            layer = node.operation
            names = [known[id(t)] for t in node.input_tensors]
            if node in self.folded:
                known[id(node.outputs[0])] = names[0]
                continue
            _check_call(node)
            if isinstance(layer, keras.Model):
                names = self._cast(layer, names, prefix)
                found = self._open(layer, names, prefix + layer.name + "/")
                known.update({id(t): n for t, n in zip(node.outputs, found, strict=True)})
                continue
            name = self._unique(prefix + layer.name)
            after = readers.get(id(node.outputs[0]), [])
            norm = after[0] if len(after) == 1 and folds(layer, after[0]) else None
            if norm is not None:
                _check_call(norm)
                self.folded.add(norm)
                self._unique(prefix + norm.operation.name)
            begin, norm = len(self.steps), norm and norm.operation
            known[id(node.outputs[0])] = self._layer(name, layer, names, norm)
            called = (layer,) if norm is None else (layer, norm)
            plural = isinstance(node.arguments.args[0], (list, tuple))
            self.calls.append((called, tuple(names), tuple(self.steps[begin:]), plural))
        return [known[id(t)] for t in model.outputs]

    def _cast(self, model, names, prefix):
        """Inputs of a nested model as it casts them."""
        found = []
        for tensor, name in zip(model.inputs, names, strict=True):
            narrower = cast_of(model, tensor, self.dtypes[name])
            if narrower is not None:
                cast = self._unique(f"{prefix}{model.name}/cast")
                read = name
                name = self._add(cast, [read], self._shape(read), Identity(), narrower)
                self.calls.append(((), (read,), (self.steps[-1],), False))
            found.append(name)
        return found

    def _dtype(self, layer, inputs):
        """Dtype of a layer's output; integers must become floats before they are computed with."""
        if all(is_float(self.dtypes[i]) for i in inputs):
            return layer.compute_dtype
        if type(layer) in KEEP_INTEGERS:
            return self.dtypes[inputs[0]]
        if type(layer) not in TAKE_INTEGERS:
            refuse(layer, "it reads integers, which wrap around; begin with a Rescaling layer")
        return layer.compute_dtype

    def _layer(self, name, layer, inputs, norm):
        shapes = [self._shape(i) for i in inputs]
        dtype = self._dtype(layer, inputs)
        parts = RULES[type(layer)](layer, shapes)
        activation = getattr(layer, "activation", None)
        after = None
        if type(layer) in LINEAR and not is_linear(activation):
            after = activation_operation(activation, layer, parts[-1][2])
        # Only now is every part of it one that Keras can describe.
        self.records.append(_record(name, layer, inputs, self.steps))
        if norm is not None:
            self.records.append(_record(norm.name, norm, (), ()))
            suffix, operation, shape = parts[-1]
            parts[-1] = suffix, fold(operation, normalization(norm)), shape
        if after is not None:
            parts.append(("/" + activation_name(activation), after, parts[-1][2]))
        for suffix, operation, shape in parts:
            last = self._add(name + suffix, inputs, shape, operation, dtype)
            inputs = [last]
        return last

    def _shape(self, name):
        return next(step.shape for step in self.steps if step.name == name)


def _input_shape(model, given):
    """The model's own input shape; only what it leaves open may be given."""
    own = tuple(model.inputs[0].shape[1:])
    if given is None and None in own:
        raise ValueError(
            "The model leaves sizes of its input open, and its gain may depend on them. "
            f"Received: a model of input shape {own}. Pass `input_shape` (--input-shape)."
        )
    shape = own if given is None else tuple(int(n) for n in given)
    fits = len(shape) == len(own) and all(o in (None, n) for o, n in zip(own, shape, strict=True))
    if not fits or any(n < 1 for n in shape):
        raise ValueError(
            f"`input_shape` must fit the model's own input shape {own}. Received: {shape}."
        )
    return shape


def _check_call(node):
    layer = node.operation
    if isinstance(layer, keras.Model):
        check_model(layer)
    elif type(layer) not in RULES:
        refuse(layer)
    else:
        check_layer(layer)
        if not layer.autocast and layer.compute_dtype != layer.variable_dtype:
            refuse(layer, "without autocast, whether its weights are cast depends on the model")
    check_call(node, type(layer) in MERGES)


def _ordered(model):
    """Nodes from the inputs to the outputs, each after those it reads."""
    done, order, stack = {id(t) for t in model.inputs}, [], [(model.outputs[0], False)]
    while stack:
        tensor, expanded = stack.pop()
        if id(tensor) in done:
            continue
        history = tensor._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        if node.is_input:
            raise UnsupportedLayerError(f"Model {model.name!r} has an input of its own inside.")
        if expanded:
            done.update(id(t) for t in node.outputs)
            order.append(node)
        else:
            stack.append((tensor, True))
            stack.extend((t, False) for t in reversed(node.input_tensors))
    return order


def _record(name, layer, inputs, steps):
    config = {
        key: value
        for key, value in layer.get_config().items()
        if not key.endswith(("initializer", "regularizer", "constraint"))
        and key not in ("name", "trainable", "build_config", "seed")
    }
    activation = getattr(layer, "activation", None)
    if isinstance(activation, keras.Layer):
        config["activation"] = [type(activation).__name__, activation.get_config()]
    if type(layer) is _layers.ELU:
        config["alpha"] = float(layer.alpha)  # not in Keras's configuration
    order = [step.name for step in steps]
    settings = {"config": _plain(config), "reads": [order.index(i) for i in inputs]}
    arrays = [
        stored(v, None) for v in layer.variables if "seed_generator" not in getattr(v, "path", "")
    ]
    return record(name, type(layer).__name__, settings, arrays)


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k != "name"}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)
