"""Flattens a Keras model into the list of layer and operation calls that its output depends on.

Functional and Sequential models carry their graph; a subclassed model is called once on symbolic
tensors, which records the graph if its `call` uses Keras layers and operations only. Nested models
are opened in place, at the sizes they are called with.
"""

import dataclasses
import inspect
import math

import keras

from tf_lyapunov.errors import UnsupportedLayerError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the flattened graph: its producer's name, which output, and its shape."""

    producer: str
    index: int
    shape: tuple
    dtype: str

    @property
    def size(self):
        """Number of entries per sample, or None where a size is unknown."""
        return None if None in self.shape[1:] else math.prod(self.shape[1:])


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a Keras layer or operation, with symbolic arguments replaced by `Tensor`."""

    name: str
    operation: object
    args: tuple
    kwargs: dict
    inputs: tuple
    outputs: tuple


@dataclasses.dataclass(frozen=True)
class Graph:
    """Calls in topological order from `inputs` to `output`."""

    model: object
    inputs: tuple
    calls: tuple
    output: Tensor
    traced: bool

    @property
    def layers(self):
        """The Keras layers that are called, without repetition."""
        found = {id(c.operation): c.operation for c in self.calls}
        return [op for op in found.values() if isinstance(op, keras.Layer)]


def read_graph(model, input_shapes=None):
    """Flattened graph of a built model.

    Args:
        model: a built `keras.Model`.
        input_shapes: list with one shape per input, batch axis first; by default the shapes that
            the model was built with. Sizes that the model leaves open are taken from here.

    Returns:
        `Graph`.

    Raises:
        UnsupportedLayerError: if the model has several outputs, or a subclassed `call` that does
            not run on symbolic tensors.
        ValueError: if the model is not built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "A certificate needs a `keras.Model`. "
            f"Received: an object of type {type(model).__name__}. Wrap a single layer in "
            "`keras.Sequential([keras.Input(shape), layer])`."
        )
    return _Reader(model, input_shapes).read()


class _Reader:
    def __init__(self, model, input_shapes):
        self.model = model
        self.input_shapes = input_shapes
        self.calls = []
        self.names = set()
        self.traced = False
        self.owned = {id(v) for v in model.variables}

    def read(self):
        _check_built(self.model)
        shapes = self.input_shapes or _built_input_shapes(self.model)
        dtypes = ["float32"] * len(shapes)
        if is_graph(self.model) and self.model.inputs:
            dtypes = [keras.backend.standardize_dtype(t.dtype) for t in self.model.inputs]
            if len(shapes) != len(dtypes):
                raise ValueError(
                    f"The model has {len(dtypes)} inputs. Received: {len(shapes)} input shapes."
                )
        inputs = tuple(
            Tensor(self._unique("input"), 0, tuple(shape), dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        outputs = self._open(self.model, inputs, None, "")
        if len(outputs) != 1:
            raise UnsupportedLayerError(
                "Only models with one output have a certificate. Received: model "
                f"{self.model.name!r} with {len(outputs)} outputs. Choose one of them by "
                "`keras.Model(model.inputs, model.outputs[i])`."
            )
        return Graph(self.model, inputs, self._needed(outputs[0]), outputs[0], self.traced)

    def _needed(self, output):
        """Calls that the output depends on, in topological order."""
        needed = {output.producer}
        for call in reversed(self.calls):
            if call.name in needed:
                needed.update(t.producer for t in call.inputs)
        return tuple(c for c in self.calls if c.name in needed)

    def _unique(self, name):
        candidate, count = name, 1
        while candidate in self.names:
            count += 1
            candidate = f"{name}#{count}"
        self.names.add(candidate)
        return candidate

    def _open(self, model, inputs, structure, prefix):
        """Adds the calls inside `model`, called on `inputs`; returns its output tensors."""
        _check_built(model)
        counts = {}
        if is_graph(model):
            symbolic_inputs, symbolic_outputs = model.inputs, model.outputs
        else:
            self.traced = True
            counts = _node_counts(model)
            symbolic_inputs, symbolic_outputs = _trace(model, inputs, structure)
        if len(symbolic_inputs) != len(inputs):
            raise UnsupportedLayerError(
                f"Model {model.name!r} takes {len(symbolic_inputs)} tensors. "
                f"Received: a call with {len(inputs)}."
            )
        cast = [
            self._cast(model, t, s, prefix) for t, s in zip(inputs, symbolic_inputs, strict=True)
        ]
        known = {id(s): t for s, t in zip(symbolic_inputs, cast, strict=True)}
        for node in _ordered_nodes(symbolic_inputs, symbolic_outputs, model):
            self._add(node, known, prefix)
        for layer, count in counts.values():
            # The symbolic call leaves the user's layers as it found them.
            del layer._inbound_nodes[count[0] :], layer._outbound_nodes[count[1] :]
        return tuple(known[id(s)] for s in symbolic_outputs)

    def _cast(self, model, tensor, symbolic, prefix):
        """The tensor as a nested graph model reads it: cast to the type of its own `Input`."""
        dtype = keras.backend.standardize_dtype(symbolic.dtype)
        if not is_graph(model) or dtype == tensor.dtype:
            return tensor
        name = self._unique(f"{prefix or model.name}cast to {dtype}")
        output = Tensor(name, 0, tensor.shape, dtype)
        operation = Cast(dtype)
        self.calls.append(Call(name, operation, (tensor,), {}, (tensor,), (output,)))
        return output

    def _add(self, node, known, prefix):
        operation = node.operation
        tensors = tuple(known[id(t)] for t in node.arguments.keras_tensors)
        args, kwargs = node.arguments.convert(lambda a: known.get(id(a), a))
        if kwargs.get("training") or _positional_training(operation, args):
            raise UnsupportedLayerError(
                f"A certificate holds at inference. Received: layer {operation.name!r} of type "
                f"{type(operation).__name__}, called with `training=True` in the model's graph. "
                "Leave `training` out of the call."
            )
        name = prefix + operation.name
        while type(operation) is keras.layers.SpectralNormalization:
            check_own_call(operation)
            operation = operation.layer  # at inference it calls the wrapped layer as it is
        check_own_call(operation)
        if isinstance(operation, keras.Model):
            check_arguments(operation, args, kwargs)
            structure = args[0] if args else next(iter(kwargs.values()), None)
            if len(tensors) > 1 and not isinstance(structure, (list, tuple)):
                raise UnsupportedLayerError(
                    "A nested model with several inputs must be called on a list of tensors. "
                    f"Received: model {name!r} called on {type(structure).__name__}."
                )
            outputs = self._open(operation, tensors, structure, name + "/")
        else:
            if isinstance(operation, keras.Layer):
                check_arguments(operation, args, kwargs)
                if self.traced:
                    self._check_owned(operation)
            _check_cast(operation)
            name = self._unique(name)
            shapes = _output_specs(operation, node, tensors, args, kwargs)
            outputs = tuple(Tensor(name, i, s, d) for i, (s, d) in enumerate(shapes))
            self.calls.append(Call(name, operation, args, kwargs, tensors, outputs))
        known.update({id(s): t for s, t in zip(node.outputs, outputs, strict=True)})

    def _check_owned(self, layer):
        if not all(id(v) in self.owned for v in layer.variables):
            raise UnsupportedLayerError(
                f"Model {self.model.name!r} creates or borrows layers in its `call`. Received: "
                f"layer {layer.name!r}, whose weights are not the model's. Create layers in "
                "`__init__`."
            )


class Cast(keras.Operation):
    """The cast that a nested graph model applies to its input, as an operation of its own."""

    def __init__(self, dtype):
        super().__init__(name=f"cast_to_{dtype}")
        self.dtype = dtype

    def call(self, x):
        return keras.ops.cast(x, self.dtype)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, dtype=self.dtype)


# What an instance may hold in place of its class's own method, and then computes something else.
_REPLACED = ("call", "__call__", "_call", "quantized_call")


def check_own_call(operation):
    """Refuses instances whose `call` is not that of their class.

    Raises:
        UnsupportedLayerError: naming the layer.
    """
    replaced = [name for name in _REPLACED if name in vars(operation)]
    if replaced:
        raise UnsupportedLayerError(
            f"A layer is read by its class. Received: layer {operation.name!r} of type "
            f"{type(operation).__name__}, whose `{replaced[0]}` was replaced on the instance. Put "
            "it into a class of its own, and declare its gain by `register_gain`."
        )


def check_arguments(layer, args, kwargs):
    """Refuses arguments of a layer call beside tensors of the graph: masks, constants, settings.

    Raises:
        UnsupportedLayerError: naming the layer and the argument.
    """
    named = list(kwargs.items())
    names = list(inspect.signature(layer.call).parameters)
    named += [(names[i] if i < len(names) else f"number {i + 1}", a) for i, a in enumerate(args)]
    for name, value in named:
        leaves = keras.tree.flatten(value)
        if name == "training" or all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
            continue
        kinds = sorted({type(v).__name__ for v in leaves if not isinstance(v, Tensor)})
        raise UnsupportedLayerError(
            "A layer's inputs must be tensors of the model's graph. Received: layer "
            f"{layer.name!r} of type {type(layer).__name__}, called with `{name}` of type "
            f"{', '.join(kinds)}. Make it an attribute of the layer, or an operation of keras.ops."
        )


def is_graph(model, also="__call__"):
    """Whether calling the model runs its Functional or Sequential graph and nothing else.

    `also` names one more method that the user must not have replaced.
    """

    def owner(method):
        return next(cls for cls in type(model).__mro__ if method in vars(cls))

    if any(name in vars(model) for name in (*_REPLACED, also)):
        return False
    return owner("call").__name__ in ("Functional", "Sequential") and all(
        owner(method).__module__.startswith("keras.") for method in ("call", "__call__", also)
    )


def _check_built(model):
    if not model.built:
        raise ValueError(
            f"A model must be built before it can be read. Received: unbuilt model "
            f"{model.name!r}. Call it on data or `model.build(input_shape)` first."
        )


def _built_input_shapes(model):
    if is_graph(model):
        return [tuple(t.shape) for t in model.inputs]
    config = model.get_build_config() or {}
    shape = config.get("input_shape")
    if shape is None or not all(n is None or isinstance(n, int) for n in shape):
        raise UnsupportedLayerError(
            f"The input shape of subclassed model {model.name!r} is not known, or it takes several "
            "inputs. Wrap it: `x = keras.Input(shape); keras.Model(x, model(x))`."
        )
    return [(None, *shape[1:])]


def _node_counts(model):
    layers = {id(layer): layer for layer in model._flatten_layers()}
    return {
        key: (layer, (len(layer._inbound_nodes), len(layer._outbound_nodes)))
        for key, layer in layers.items()
    }


def _trace(model, inputs, structure):
    """Symbolic inputs and outputs of one symbolic call of a subclassed model."""
    symbolic = [keras.Input(batch_shape=t.shape, dtype=t.dtype) for t in inputs]
    refusal = (
        f"Subclassed model {model.name!r} of type {type(model).__name__} cannot be read as a graph "
        "of layers. Use Keras layers and `keras.ops` only in `call`, or build a Functional model. "
    )
    for method in ("__call__", "build_from_config", "predict_step"):
        owner = next((cls for cls in type(model).__mro__ if method in vars(cls)), None)
        if owner is not None and not owner.__module__.startswith("keras."):
            if method != "build_from_config":
                raise UnsupportedLayerError(
                    refusal + f"Received: a model that overrides `{method}`."
                )
    if structure is None or not isinstance(structure, (list, tuple)):
        if len(symbolic) != 1:
            raise UnsupportedLayerError(refusal + f"Received: {len(symbolic)} inputs.")
        argument = symbolic[0]
    else:
        argument = type(structure)(symbolic)
    parameters = inspect.signature(model.call).parameters
    extra = {"training": False} if "training" in parameters else {}
    try:
        outputs = model.call(argument, **extra)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedLayerError(
            refusal + f"Received: {type(error).__name__}: {reason}"
        ) from error
    outputs = keras.tree.flatten(outputs)
    if not all(isinstance(t, keras.KerasTensor) for t in outputs):
        raise UnsupportedLayerError(refusal + "Received: an output that is not a symbolic tensor.")
    return symbolic, outputs


def _ordered_nodes(inputs, outputs, model):
    """Graph nodes between `inputs` and `outputs`, each after the nodes it depends on."""
    boundary = {id(t) for t in inputs}
    done, order = set(), []
    stack = [(t, False) for t in reversed(outputs)]
    while stack:
        tensor, expanded = stack.pop()
        if id(tensor) in boundary:
            continue
        history = getattr(tensor, "_keras_history", None)
        operation = None if history is None else history.operation
        node = None if operation is None else operation._inbound_nodes[history.node_index]
        if node is None or node.is_input:
            raise UnsupportedLayerError(
                f"The output of model {model.name!r} does not depend on its inputs alone. "
                "Received: a graph with a disconnected tensor."
            )
        if id(node) in done:
            continue
        if expanded:
            done.add(id(node))
            order.append(node)
        else:
            stack.append((tensor, True))
            stack.extend((t, False) for t in reversed(node.input_tensors))
    return order


def _check_cast(operation):
    """Without autocast it depends on the model around it whether weights are cast."""
    if isinstance(operation, keras.Layer) and operation.weights and not operation.autocast:
        if operation.compute_dtype != operation.variable_dtype:
            raise UnsupportedLayerError(
                "A layer in mixed precision must cast its weights. Received: layer "
                f"{operation.name!r} of dtype policy {operation.dtype_policy.name!r} with "
                "autocast=False. Leave `autocast` out, or use a single dtype."
            )


def _positional_training(operation, args):
    """`training` passed by position to a layer's `call`."""
    if not isinstance(operation, keras.Layer) or len(args) < 2:
        return False
    names = list(inspect.signature(operation.call).parameters)
    return "training" in names[: len(args)] and bool(args[names.index("training")])


def _output_specs(operation, node, tensors, args, kwargs):
    """Shapes and dtypes of a call's outputs at the sizes of this graph."""
    recorded = [tuple(t.shape) for t in node.arguments.keras_tensors]
    outputs = node.outputs
    if recorded != [t.shape for t in tensors]:

        def symbolic(a):
            return keras.KerasTensor(a.shape, dtype=a.dtype) if isinstance(a, Tensor) else a

        args, kwargs = keras.tree.map_structure(symbolic, (args, kwargs))
        outputs = keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
    return [(tuple(t.shape), keras.backend.standardize_dtype(t.dtype)) for t in outputs]
