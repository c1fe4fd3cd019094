"""Reads a Keras model into `Network`: its graph, its settings, and its weights as inference uses
them. With `layers`, the only part of this package that knows Keras; it computes no bound.
"""

import os
from pathlib import Path

import keras

from tf_lyapunov.errors import ModelFileError, UnsupportedLayerError
from tf_lyapunov.verification.layers import (
    LINEAR,
    MERGES,
    RULES,
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

_FINAL = ("softmax", "log_softmax", "sigmoid", "log_sigmoid")
_layers = keras.layers


def load(path):
    """The model of a `.keras` file, without running code from it.

    Raises:
        ModelFileError: if there is none.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".keras":
        raise ModelFileError(
            f"The model file is refused: it is no file that ends in .keras. Received: {path}."
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises many kinds for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelFileError(
            f"The model file is refused: Keras cannot load it ({reason}). Received: {path}."
        ) from error


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
    if isinstance(model, (str, os.PathLike)):
        model = load(model)
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras model or the path of one. "
            f"Received: an object of type {type(model).__name__}."
        )
    return _Reader().read(model, input_shape)


class _Reader:
    def __init__(self):
        self.steps, self.records, self.names = [], [], set()
        self.folded = set()

    def read(self, model, input_shape):
        _check_graph(model)
        if not model.built or len(model.inputs) != 1 or len(model.outputs) != 1:
            raise UnsupportedLayerError(
                "A proof can be verified for a built model with one input and one output. "
                f"Received: model {model.name!r}."
            )
        shape = _input_shape(model, input_shape)
        first = self._add("input", (), shape, None)
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
        return Network(tuple(self.steps), logits, tuple(self.records))

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

    def _add(self, name, inputs, shape, operation):
        self.steps.append(Step(name, tuple(inputs), tuple(int(n) for n in shape), operation))
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
        _check_graph(model)
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
                found = self._open(layer, names, prefix + layer.name + "/")
                known.update({id(t): n for t, n in zip(node.outputs, found, strict=True)})
                continue
            name = self._unique(prefix + layer.name)
            after = readers.get(id(node.outputs[0]), [])
            norm = after[0] if len(after) == 1 and folds(layer, after[0]) else None
            if norm is not None:
                self.folded.add(norm)
                self._unique(prefix + norm.operation.name)
            known[id(node.outputs[0])] = self._layer(name, layer, names, norm and norm.operation)
        return [known[id(t)] for t in model.outputs]

    def _layer(self, name, layer, inputs, norm):
        shapes = [self._shape(i) for i in inputs]
        rule = RULES.get(type(layer))
        if rule is None:
            refuse(layer)
        self.records.append(_record(name, layer, inputs, self.steps))
        parts = rule(layer, shapes)
        if norm is not None:
            self.records.append(_record(norm.name, norm, (), ()))
            suffix, operation, shape = parts[-1]
            parts[-1] = suffix, fold(operation, normalization(norm)), shape
        activation = getattr(layer, "activation", None)
        if type(layer) in LINEAR and not is_linear(activation):
            operation = activation_operation(activation, layer, parts[-1][2])
            parts.append(("/" + activation_name(activation), operation, parts[-1][2]))
        for suffix, operation, shape in parts:
            last = self._add(name + suffix, inputs, shape, operation)
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


def _check_graph(model):
    kinds = ("Functional", "Sequential")
    owner = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    is_own = owner.__name__ in kinds and owner.__module__.startswith("keras.")
    outer = next(cls for cls in type(model).__mro__ if "__call__" in vars(cls))
    if not is_own or not outer.__module__.startswith("keras."):
        raise UnsupportedLayerError(
            "A proof can be verified for Functional and Sequential models. Received: model "
            f"{model.name!r} of type {type(model).__name__}, with a `call` of its own."
        )


def _check_call(node):
    layer, given = node.operation, (node.arguments.args, node.arguments.kwargs)
    rest = [a for a in keras.tree.flatten(given) if not isinstance(a, keras.KerasTensor)]
    if any(a is not None and a is not False for a in rest):
        raise UnsupportedLayerError(
            "A layer called with more than tensors, such as `training=True`, is refused. "
            f"Received: {layer.name!r}."
        )
    if isinstance(layer, keras.Model):
        return
    if not layer.autocast and layer.compute_dtype != layer.variable_dtype:
        refuse(layer, "without autocast, whether its weights are cast depends on the model")
    if len(node.outputs) != 1 or (len(node.input_tensors) != 1 and type(layer) not in MERGES):
        refuse(layer, "it is called on several tensors (a mask or a state), or returns several")


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
