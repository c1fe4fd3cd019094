"""From a Keras classifier to its logits: softmax and sigmoid heads are looked through."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np
from keras import ops

from tf_lyapunov.program.logits import LogitsModel
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.replay import without_activation

# Outputs of low-precision (bfloat16) softmax heads sum to one only to this accuracy.
_PROBABILITY_TOL = 1e-2


@dataclass
class LogitsView:
    """How to evaluate a model's logits, and what its own outputs are.

    Attributes:
        function: maps a batch (backend tensor) to logits, `(batch, classes)`; it shares the
            model's weights and holds no reference to the model itself.
        heads: `"softmax"` and `"sigmoid"` heads that were looked through, the last one first.
        affine: whether the last layer is affine, so that the outputs are logits for sure.
        variables: the model's variables, for backends that want them as arguments.
        compiled: compiled functions, by whatever key their maker chose.
    """

    function: Callable
    heads: tuple
    affine: bool
    fingerprint: tuple
    variables: list
    compiled: dict = field(default_factory=dict)
    checked: bool = False

    def packed(self, packing) -> LogitsView:
        """The same logits, of rows that hold several inputs."""
        key = ("packed", packing.chosen, packing.shapes, packing.dtypes)
        if key not in self.compiled:
            function = self.function
            self.compiled[key] = LogitsView(
                lambda rows: function(packing.tensors(rows)),
                self.heads,
                self.affine,
                self.fingerprint,
                self.variables,
            )
        return self.compiled[key]

    @property
    def head(self) -> str | None:
        """The last head that was looked through, or None: the outputs are the logits."""
        return self.heads[0] if self.heads else None

    def check_outputs(self, model, outputs, x, predict, logits, free=None) -> None:
        """Refuse models whose outputs are probabilities that cannot be looked through.

        Args:
            model: the model.
            outputs: array `(n, k)`, the model's outputs at `x`.
            x: array `(n, ...)`.
            predict: function from inputs to the model's own outputs.
            logits: function from inputs to this view's logits.
            free: number of leading entries of rows that may change, None for all.

        Raises:
            ValueError: if `outputs` are probabilities although no head was found, or a head was
                found but does not explain the outputs.
        """
        if self.checked:
            return
        few = slice(0, 64)
        if self.heads:
            expected = logits(x[few])
            for head in reversed(self.heads):
                expected = probabilities(expected, head)
            if not np.allclose(expected, outputs[few], rtol=0, atol=_PROBABILITY_TOL):
                raise ValueError(
                    f"The {self.heads[0]} head of model {model.name!r} does not explain what it "
                    "predicts. Call `model.compile()` if its layers were changed, so that Keras "
                    "forgets its old graph, or pass a model that returns logits."
                )
        elif not self.affine and _look_like_probabilities(outputs):
            # Logits may lie in [0, 1] by chance, but not also far away from the data.
            probes = np.concatenate([100.0 * x[few], -100.0 * x[few]]).astype(np.float32)
            if free is not None:
                probes[:, free:] = np.concatenate([x[few], x[few]])[:, free:]
            if _look_like_probabilities(predict(probes)):
                raise ValueError(
                    f"Model {model.name!r} returns probabilities, and its head could not be looked "
                    "through. Attacks need logits: end the model with a linear layer, or with a "
                    "`Softmax` or `Activation` layer or an `activation='softmax'` of a functional "
                    f"or sequential model. Received: outputs in [0, 1] of shape {outputs.shape}."
                )
        self.checked = True


# Values hold no reference to their key, so entries disappear with the model.
_VIEWS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def logits_view(model, packing=None) -> LogitsView:
    """The logits of a built Keras classifier.

    Looks through a final `Softmax` layer, `Activation("softmax")`, `activation="softmax"` of the
    last layer, and the same with sigmoid, also inside nested models. Views are kept per model and
    renewed when its layers change.

    Args:
        model: built Keras model with one output.
        packing: `Packing` of its inputs, if it has several.

    Returns:
        A `LogitsView`.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it has several outputs, or several inputs without a `packing`.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}.")
    view = _view(model, packing is not None)
    return view if packing is None else view.packed(packing)


def _view(model, several):
    if _is_graph(model) and (len(model.outputs) != 1 or (len(model.inputs) != 1 and not several)):
        raise ValueError(
            "Attacks need a model with one output, and arrays for each of its inputs. Received: "
            f"model {model.name!r} with {len(model.inputs)} inputs and {len(model.outputs)} "
            "outputs."
        )
    fingerprint = tuple(_fingerprint(model))
    view = _VIEWS.get(model)
    if view is not None and view.fingerprint == fingerprint:
        return view
    function, heads, affine = None, (), False
    if _is_graph(model):
        function, heads, affine = _peel(model)
    if function is None and not affine:
        function, heads = _read_to_logits(model)
    if function is None:
        reference = weakref.ref(model)

        def function(x):
            return reference()(x, training=False)

    view = LogitsView(function, heads, affine, fingerprint, list(model.variables))
    _VIEWS[model] = view
    return view


def _read_to_logits(model):
    """Logits function and heads of a model whose end only its reading shows, or `(None, ())`.

    Such are a head within a layer of the user's own, or in a subclassed model.
    """
    if _is_graph(model):
        operation = model.outputs[0]._keras_history.operation
        if type(operation).__module__.startswith(("keras.", "tf_lyapunov.")):
            return None, ()
    try:
        network = read_network(model, bounded=False)
    except ValueError:  # what cannot be read is attacked as it is
        return None, ()
    single = network.graph.output.shape[-1] == 1
    if network.decision != "sigmoid" and (network.decision != "softmax" or single):
        return None, ()
    head = network.decision
    graph = dataclasses.replace(network.graph, model=None)
    return LogitsModel(dataclasses.replace(network, model=None, graph=graph)), (head,)


def probabilities(logits: np.ndarray, head: str) -> np.ndarray:
    """Outputs of a softmax or sigmoid head, in float64.

    Args:
        logits: array `(n, k)`.
        head: `"softmax"` or `"sigmoid"`.

    Returns:
        float64 array `(n, k)`.
    """
    logits = np.asarray(logits, np.float64)
    if head == "sigmoid":
        return 0.5 * (1.0 + np.tanh(0.5 * logits))
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Margin f_y - max_j≠y f_j in float64, negative where the class y is not the largest.

    Args:
        logits: array `(n, classes)`, at least two classes.
        labels: int array `(n,)`.

    Returns:
        float64 array `(n,)`.
    """
    logits = np.array(logits, np.float64)
    own, rows = logits[np.arange(len(logits)), labels], np.arange(len(logits))
    logits[rows, labels] = -math.inf
    return own - logits.max(axis=1)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy -log softmax(f)_y per sample, in float64.

    Args:
        logits: array `(n, classes)`.
        labels: int array `(n,)`.

    Returns:
        float64 array `(n,)`.
    """
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), labels]


def _look_like_probabilities(outputs) -> bool:
    outputs = np.asarray(outputs, np.float64)
    if not np.all((outputs >= 0) & (outputs <= 1)):
        return False
    if outputs.shape[1] == 1:
        return True
    return bool(np.all(np.abs(outputs.sum(axis=1) - 1) <= _PROBABILITY_TOL))


def _is_graph(model) -> bool:
    """Whether the model runs exactly the graph that its `inputs` and `outputs` describe."""
    owner = next(base for base in type(model).__mro__ if "call" in vars(base))
    if owner.__name__ not in ("Functional", "Sequential"):
        return False
    return owner.__module__.startswith("keras.") and model.built


def _fingerprint(layer):
    yield id(layer), id(getattr(layer, "activation", None)), str(layer.dtype_policy.name)
    for child in getattr(layer, "layers", ()):
        yield from _fingerprint(child)
    if not getattr(layer, "layers", ()):
        for variable in layer.variables:
            yield id(variable)


def _peel(model):
    """Logits function, heads (last first), and whether the outputs are affine; None if no head."""
    heads, affine, tail = (), False, None
    tensor = model.outputs[0]
    binary = tensor.shape[-1] == 1
    while not _is_input(tensor, model):
        operation, node_index, _ = tensor._keras_history
        sources = operation._inbound_nodes[node_index].input_tensors
        if isinstance(operation, keras.Model):
            if _is_graph(operation) and len(operation.outputs) == len(operation.inputs) == 1:
                inner, inner_heads, affine = _peel(operation)
                if inner_heads:
                    heads, tail, tensor = heads + inner_heads, inner, sources[0]
            break
        name = _head_name(operation)
        if name == "linear" and isinstance(operation, keras.layers.Activation):
            tensor = sources[0]
            continue
        # One softmax unit is constant, and two sigmoids move the threshold off zero.
        if name not in ("softmax", "sigmoid") or (binary and (heads or name == "softmax")):
            affine = name == "linear" and isinstance(operation, keras.layers.Dense)
            break
        heads, tensor = (*heads, name), sources[0]
        owns_map = not isinstance(operation, keras.layers.Activation)
        if owns_map and getattr(operation, "activation", None) is not None:
            tail = without_activation(operation)
            break
    if not heads:
        return None, (), affine
    features = None
    if len(model.inputs) > 1:
        features = keras.Model(model._inputs_struct, tensor, name="attacked_features")
    elif not _is_input(tensor, model):
        # Named, so that Keras's counter for automatic names does not move.
        features = keras.Model(model.inputs, tensor, name="attacked_features")

    def function(x):
        if features is not None:
            x = features(x, training=False)
        return x if tail is None else tail(x)

    return function, heads, affine


def _is_input(tensor, model) -> bool:
    return any(tensor is source for source in model.inputs)


def _head_name(operation) -> str | None:
    """`"softmax"`, `"sigmoid"`, `"linear"`, another activation's name, or None without one."""
    if type(operation).__name__ == "Softmax":
        # Any other axis would normalise over something else than the classes.
        return "softmax" if getattr(operation, "axis", -1) in (-1, 1) else None
    if type(operation).__name__ == "Sigmoid":
        return "sigmoid"
    activation = getattr(operation, "activation", None)
    if activation is None:
        return "linear" if isinstance(operation, keras.layers.Dense) else None
    if isinstance(activation, keras.layers.Layer):
        return _head_name(activation)
    name = getattr(activation, "__name__", "")
    return "softmax" if name in ("softmax_v2", "softmax") else name


def two_columns(logits):
    """Logits `(batch, classes)` with at least two classes: a single logit f becomes (0, f)."""
    logits = ops.cast(logits, "float32")
    if logits.shape[-1] == 1:
        logits = ops.concatenate([ops.zeros_like(logits), logits], axis=-1)
    return logits
