"""Evaluates the logits of a network in batches, from arrays, PyDatasets or tf.data."""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Mapping

import keras
import numpy as np

from tf_lyapunov.layers.activations import Householder
from tf_lyapunov.layers.base import LipschitzLayer
from tf_lyapunov.layers.residual import ConvexCombination
from tf_lyapunov.program.activations import current_config, innermost
from tf_lyapunov.program.graph import Tensor, is_graph
from tf_lyapunov.program.inputs import Inputs, to_array
from tf_lyapunov.program.linear import BatchNormScale, inference_value
from tf_lyapunov.program.lipschitz_layers import fix_as_used, float64_config
from tf_lyapunov.program.own_layers import RULES as OWN_ACTIVATIONS
from tf_lyapunov.program.registry import registered_gain
from tf_lyapunov.program.rounding import UNIT_ROUNDOFF
from tf_lyapunov.program.tensors import as_array, as_tensor

# Layers that use their weights as stored, whatever their compute dtype.
_UNROUNDED = (keras.layers.BatchNormalization, Householder, ConvexCombination)
PRECISIONS = ("auto", "model", "float64")
# Activations without a constant that float32 would round.
_EXACT = ("relu", "relu6", "tanh", "sigmoid", "log_sigmoid", "softplus", "softsign", "silu")


def with_rounded_settings(network):
    """The network with error models of a float64 evaluation that include its float32 settings.

    Backends round numbers in layers' settings (slopes of LeakyReLU, bounds of ReLU, Rescaling,
    epsilon of batch normalizations, constants of GELU) to float32 whatever the layer's dtype:
    relative to the operation's output, and to the numbers themselves, by one unit each.
    """
    extra = 2 * UNIT_ROUNDOFF["float32"]
    nodes = []
    for node in network.nodes:
        name = node.method.split(",")[0]
        capped = getattr(innermost(node.layer), "max_value", None)
        norms = [n for n in (*node.batch_norms, node.layer) if _is_norm(n)]
        is_rounded = node.kind == "scaling" or norms or (
            node.kind == "activation" and (name not in _EXACT or capped is not None)
        )  # fmt: skip
        if is_rounded:
            size = math.prod(n or math.inf for n in node.output_shape[1:])
            shift = math.sqrt(size) * float(capped or 0.0)
            for norm in norms:
                bound = BatchNormScale.of(norm).shift_bound
                shift += float(np.max(bound, initial=0.0)) * math.sqrt(size)
            widened = [
                dataclasses.replace(
                    own,
                    slope=own.slope + extra * max(own.gain, 1.0),
                    constant=own.constant + extra * (own.offset + shift),
                )
                for own in (node.affine64, node.affine)
            ]
            node = dataclasses.replace(node, affine64=widened[0])
            if getattr(node.layer, "compute_dtype", "float64") == "float64":
                node = dataclasses.replace(node, affine=widened[1])
        nodes.append(node)
    return dataclasses.replace(network, nodes=tuple(nodes))


def _is_norm(layer):
    return type(layer) is keras.layers.BatchNormalization


@contextlib.contextmanager
def float64_available():
    """Lets JAX compute in float64 inside, which it does not by default; the others always do."""
    if keras.backend.backend() != "jax":
        yield
        return
    jax = importlib.import_module("jax")
    # A context manager of this name moved in 2025.
    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        enable = importlib.import_module("jax.experimental").enable_x64
    with enable(True):
        yield


@contextlib.contextmanager
def no_gradients():
    """Keeps PyTorch from recording what is called inside; the others record nothing."""
    if keras.backend.backend() != "torch":
        yield
        return
    with importlib.import_module("torch").no_grad():
        yield


def computes_in_float64():
    """Whether the backend multiplies float64 tensors in float64, tried on a known product.

    Keras on PyTorch does not, unless floatx is float64, nor JAX without its 64-bit mode.
    """
    one = keras.ops.convert_to_tensor(np.array([[1.0 + 2.0**-40]]), dtype="float64")
    product = keras.ops.matmul(one, keras.ops.ones((1, 1), dtype="float64"))
    return float(np.asarray(keras.ops.convert_to_numpy(product), np.float64)[0, 0]) == 1 + 2.0**-40


class Float64Logits:
    """Logits of a program in float64 by NumPy, whatever the backend; see `LogitsModel`.

    Args:
        network: `Network`.

    Raises:
        ValueError: if a step has no evaluation apart from the model, and the backend or a layer
            cannot compute in float64 either.
    """

    precision = "float64"

    def __init__(self, network):
        self.program = network.program
        self.model = LogitsModel(network, "float64") if self.program.unread else None

    def predict(self, x, batch_size):
        """Logits as float64 (n, K), K = 1 for a single unit; `x` as for `LogitsModel.predict`."""
        if self.model is not None:
            with float64_available():
                return self.model.predict(x, batch_size)
        values = np.concatenate([self.program.logits(rows) for rows in _rows(x, batch_size)])
        return values[:, None] if values.ndim == 1 else values


class LogitsModel:
    """The network up to its logits at inference, in the model's own precision or in float64.

    A model without a final softmax or sigmoid computes its logits itself. Otherwise its layers are
    called once more on symbolic tensors, up to the logits, sharing their weights. In float64 they
    are copied, with the values of the weights that the model uses at inference.

    Args:
        network: `Network`.
        precision: `"model"` or `"float64"`.

    Raises:
        ValueError: if the backend or a layer cannot compute in float64.
    """

    def __init__(self, network, precision="model"):
        self.network, self.precision = network, precision
        model = network.model
        if precision == "model" and network.decision is None:
            if is_graph(model, also="predict_step"):
                self.model = model
                return
        if precision == "float64":
            if not computes_in_float64():
                raise ValueError(
                    "The backend does not compute in float64. Received: precision='float64'. "
                    "Set `jax_enable_x64`, or use precision='model'."
                )
        self.copies = {}
        layers = network.graph.layers
        counts = [(len(x._inbound_nodes), len(x._outbound_nodes)) for x in layers]
        self.model = self._rebuild()
        for layer, (inbound, outbound) in zip(layers, counts, strict=True):
            # The user's layers keep the graph that they had.
            del layer._inbound_nodes[inbound:], layer._outbound_nodes[outbound:]

    def predict(self, x, batch_size):
        """Logits as float64 (n, K), K = 1 for a single unit.

        Args:
            x: array (n, …), or a list with one for each of the network's inputs.
            batch_size: rows evaluated at once.
        """
        parts, dtypes = [], [self._dtype(t) for t in self.network.graph.inputs]
        inputs = Inputs.of(self.model)
        with no_gradients():
            # Never through `predict`, which keeps a compiled function and rounds to floatx.
            for rows in _rows(x, batch_size):
                given = [as_tensor(a, dtype) for a, dtype in zip(rows, dtypes, strict=True)]
                outputs = keras.tree.flatten(self.model(inputs.called(given), training=False))
                parts.append(as_array(outputs[0]))
        values = np.concatenate(parts)
        return values[:, None] if values.ndim == 1 else values

    def _rebuild(self):
        graph, network = self.network.graph, self.network
        inputs = [keras.Input(batch_shape=t.shape, dtype=self._dtype(t)) for t in graph.inputs]
        known = {(t.producer, 0): x for t, x in zip(graph.inputs, inputs, strict=True)}
        target, fused = graph.output, None
        if network.decision is not None:
            stop = network[network.decision_node].call
            call = next(c for c in graph.calls if c.name == stop)
            if network[network.logits].call == stop:
                target, fused = call.outputs[0], stop
            else:
                target = call.inputs[0]

        def symbolic(a):
            return known[(a.producer, a.index)] if isinstance(a, Tensor) else a

        for call in graph.calls:
            if (target.producer, target.index) in known:
                break
            args, kwargs = keras.tree.map_structure(symbolic, (call.args, call.kwargs))
            operation = self._operation(call, args, call.name == fused)
            outputs = keras.tree.flatten(operation(*args, **kwargs))
            known.update({(call.name, i): x for i, x in enumerate(outputs)})
        return keras.Model(inputs, self._outputs(known[(target.producer, target.index)], known))

    def _outputs(self, logits, known):
        """Symbolic outputs of the rebuilt model; `known` holds its tensors by (call, index)."""
        return logits

    def _dtype(self, tensor):
        is_float = tensor.dtype in UNIT_ROUNDOFF
        return "float64" if self.precision == "float64" and is_float else tensor.dtype

    def _operation(self, call, args, without_activation):
        """The call's layer, or a copy of it in float64 or without its fused activation."""
        operation = call.operation
        is_copied = self.precision == "float64" and registered_gain(operation) is None
        if not isinstance(operation, keras.Layer) or not (is_copied or without_activation):
            return operation
        key = (id(operation), without_activation)
        if key not in self.copies:
            self.copies[key] = self._copy(operation, args, without_activation)
        return self.copies[key]

    def _copy(self, layer, args, without_activation):
        config = {
            key: value
            for key, value in current_config(layer).items()
            if not key.endswith(("regularizer", "constraint", "initializer"))
        }
        if isinstance(layer, LipschitzLayer) and self.precision == "float64":
            config = float64_config(layer)
        if without_activation:
            config["activation"] = None
        elif type(getattr(layer, "activation", None)) in OWN_ACTIVATIONS:
            pass
        elif isinstance(getattr(layer, "activation", None), keras.Layer):
            # It holds a dtype of its own, which a copy of the outer layer would keep.
            raise ValueError(
                f"Layer {layer.name!r} holds a layer as its activation and cannot be evaluated in "
                "float64. Call the activation layer on its own."
            )
        if self.precision == "float64":
            config["dtype"] = "float64"
        copy = type(layer).from_config(config)
        held = getattr(layer, "activation", None)
        if held is not None and not without_activation and not isinstance(held, keras.Layer):
            copy.activation = held  # a name may stand for another form of the function
        copy(*args)  # builds it
        parts = [p for p in layer._flatten_layers() if type(p) in _UNROUNDED]
        kept = {id(v) for part in parts for v in part.variables}
        for mine, weight in zip(copy.variables, layer.variables, strict=True):
            if keras.backend.is_float_dtype(keras.backend.standardize_dtype(weight.dtype)):
                keeps = id(weight) in kept or self.precision == "model"
                dtype = weight.dtype if keeps else layer.compute_dtype
                mine.assign(inference_value(weight, dtype))
        if type(layer) is keras.layers.Normalization:
            copy.finalize_state()
        if isinstance(layer, LipschitzLayer) and self.precision == "float64":
            fix_as_used(copy, layer)
        return copy


def _rows(x, size):
    """Lists of at most `size` rows of every input."""
    arrays = x if isinstance(x, list) else [x]
    for start in range(0, len(arrays[0]), size):
        yield [a[start : start + size] for a in arrays]


def batches(x, y, inputs):
    """Yields `(inputs, labels or None)` from arrays, a PyDataset, or an iterable of batches.

    Args:
        x: array (n, …), or a list, tuple or dict with one for each input of the model;
            `keras.utils.PyDataset`, tf.data or any finite iterable of batches, each `x` or
            `(x, y)` or `(x, y, sample_weight)`.
        y: labels for an array or for a data set without labels, or None.
        inputs: `Inputs` of the model.

    Yields:
        A list with one array for each input, and labels.

    Raises:
        ValueError: if labels come twice, the data set is infinite or empty, or see `Inputs.flat`.
    """
    if hasattr(x, "__array__") or keras.ops.is_tensor(x) or isinstance(x, (list, tuple, Mapping)):
        found = inputs.flat(x)
        yield found, None if y is None else to_array(y, "y")
        return
    empty = True
    labels = None if y is None else to_array(y, "y")
    position = 0
    for batch in _iterate(x):
        empty = False
        parts = batch if isinstance(batch, (list, tuple)) else (batch,)
        found = inputs.flat(parts[0])
        given = to_array(parts[1], "y") if len(parts) > 1 and parts[1] is not None else None
        if given is not None and labels is not None:
            raise ValueError(
                "Labels must come once. Received: a data set with labels, and `y` as well. "
                "Leave `y` out."
            )
        if labels is not None:
            given = labels[position : position + len(found[0])]
            position += len(found[0])
        yield found, given
    if empty:
        raise ValueError("`x` must hold at least one input. Received: an empty data set.")
    if labels is not None and position != len(labels):
        raise ValueError(
            f"`y` must have one label per input. Received: {len(labels)} labels for {position} "
            "inputs."
        )


def _iterate(x):
    if isinstance(x, keras.utils.PyDataset):
        count = x.num_batches
        if count is None:
            raise ValueError("`x` must be finite. Received: a PyDataset of unknown length.")
        return (x[i] for i in range(count))
    if hasattr(x, "cardinality") and int(x.cardinality()) == -1:  # tf.data: INFINITE
        raise ValueError(
            "`x` must be finite. Received: an endless data set. Leave out `.repeat()`, or use "
            "`.take(n)`."
        )
    if isinstance(x, (str, bytes)) or not hasattr(x, "__iter__"):
        raise TypeError(
            "`x` must be an array, a keras.utils.PyDataset or an iterable of batches. "
            f"Received: an object of type {type(x).__name__}."
        )
    return iter(x)
