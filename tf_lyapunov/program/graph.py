"""Flattens a Keras model into the list of layer and operation calls that its output depends on.

Functional and Sequential models carry their graph; a subclassed model is called once on symbolic
tensors, which records the graph if its `call` uses Keras layers and operations only. Nested models
are opened in place, at the sizes they are called with, and so are layers of the user's own that are
made of known ones.
"""

import dataclasses
import inspect
import math

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import tracing, unrolling
from tf_lyapunov.program.inference import (
    as_used,
    at_inference,
    check_cast,
    is_composite,
    taken_as,
    without_open_sizes,
)
from tf_lyapunov.program.wrapping import Cast, Folded, Part, Refused, Unfolded


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the flattened graph: its producer's name, which output, and its shape.

    `copies` is how many items of a sample lie along the batch axis (the steps of a
    `TimeDistributed` layer, inside it).
    """

    producer: str
    index: int
    shape: tuple
    dtype: str
    copies: int = 1

    @property
    def size(self):
        """Number of entries per sample, or None where a size is unknown."""
        return None if None in self.shape[1:] else math.prod(self.shape[1:]) * self.copies


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a Keras layer or operation, with symbolic arguments replaced by `Tensor`.

    `owner` is the layer of the user's own in whose `call` it was found, or None.
    """

    name: str
    operation: object
    args: tuple
    kwargs: dict
    inputs: tuple
    outputs: tuple
    owner: object = None


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


def read_graph(model, input_shapes=None, *, refusals=None, on_region=False):
    """Flattened graph of a built model.

    Args:
        model: a built `keras.Model`.
        input_shapes: list with one shape per input, batch axis first; by default the shapes that
            the model was built with. Sizes that the model leaves open are taken from here.
        refusals: a dictionary that takes the errors of calls that cannot be read, by their names;
            by default the first one is raised.
        on_region: whether attention and recurrent layers are opened, see `unrolling`.

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
    return _Reader(model, input_shapes, refusals, on_region).read()


class _Reader:
    def __init__(self, model, input_shapes, refusals, on_region):
        self.model = model
        self.on_region = on_region
        self.input_shapes = input_shapes
        self.refusals = refusals
        self.calls = []
        self.names = set()
        self.traced = False
        self.owner = None
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
        """Adds the calls inside `model`, called on `inputs`; returns its output tensors.

        `model` may also be a layer whose `call` is made of layers and operations.
        """
        _check_built(model)
        counts, follows = [], is_graph(model)
        if follows:
            symbolic_inputs, symbolic_outputs = model.inputs, model.outputs
        else:
            self.traced |= not unrolling.is_opened(model)
            counts = tracing.node_counts(model)
            dtypes = [taken_as(model, t.dtype) for t in inputs]
            symbolic_inputs, symbolic_outputs = tracing.symbolic_call(
                model, structure, [(t.shape, d) for t, d in zip(inputs, dtypes, strict=True)]
            )
        if len(symbolic_inputs) != len(inputs):
            raise UnsupportedLayerError(
                f"Model {model.name!r} takes {len(symbolic_inputs)} tensors. "
                f"Received: a call with {len(inputs)}."
            )
        cast = [
            self._cast(model, t, s, prefix) for t, s in zip(inputs, symbolic_inputs, strict=True)
        ]
        known = {id(s): t for s, t in zip(symbolic_inputs, cast, strict=True)}
        before = self.owner
        self.owner = before if isinstance(model, keras.Model) else model
        try:
            for node in _ordered_nodes(symbolic_inputs, symbolic_outputs, model):
                self._add(node, known, prefix, None if follows else model)
        finally:
            self.owner = before
            tracing.forget_nodes(counts)
        return tuple(known[id(s)] for s in symbolic_outputs)

    def _cast(self, model, tensor, symbolic, prefix):
        """The tensor as a nested model reads it: cast to the type of its own input."""
        dtype = keras.backend.standardize_dtype(symbolic.dtype)
        if dtype == tensor.dtype:
            return tensor
        name = self._unique(f"{prefix or model.name}cast to {dtype}")
        output = dataclasses.replace(tensor, producer=name, index=0, dtype=dtype)
        operation = Cast(dtype, is_rounding=not is_graph(model))
        return self._record(name, operation, (tensor,), {}, (tensor,), [output])[0]

    def _record(self, name, operation, args, kwargs, tensors, outputs):
        call = Call(name, operation, args, kwargs, tensors, tuple(outputs), self.owner)
        self.calls.append(call)
        return tuple(outputs)

    def _add(self, node, known, prefix, around):
        """Adds one recorded call; `around` is the traced model or layer that makes it, or None."""
        tensors = tuple(known[id(t)] for t in node.arguments.keras_tensors)

        def fill(a):
            if isinstance(a, keras.Variable) and around is not None:
                return as_used(a, around)
            return known.get(id(a), a)

        args, kwargs = node.arguments.convert(fill)
        name = prefix + node.operation.name
        try:
            outputs = self._read(node, args, kwargs, tensors, name, around)
        except UnsupportedLayerError as error:
            if self.refusals is None:
                raise
            name = self._unique(name)
            self.refusals[name] = error
            copies = max((t.copies for t in tensors), default=1)
            outputs = [
                Tensor(name, i, tuple(t.shape), keras.backend.standardize_dtype(t.dtype), copies)
                for i, t in enumerate(node.outputs)
            ]
            self._record(name, Refused(node.operation), args, kwargs, tensors, outputs)
        known.update({id(s): t for s, t in zip(node.outputs, outputs, strict=True)})

    def _read(self, node, args, kwargs, tensors, name, around):
        """Output tensors of one recorded call."""
        operation = node.operation
        args, kwargs = at_inference(operation, args, kwargs, around is None)
        while type(operation) is keras.layers.SpectralNormalization:
            check_own_call(operation)
            operation = operation.layer  # at inference it calls the wrapped layer as it is
        check_own_call(operation)
        if isinstance(operation, keras.Layer):
            check_arguments(operation, args, kwargs)
        opened = self.on_region and unrolling.is_opened(operation)
        if isinstance(operation, keras.Model) or is_composite(operation) or opened:
            structure = args[0] if args else next(iter(kwargs.values()), None)
            if opened:
                structure = unrolling.inputs_of(operation, args, kwargs)
            if len(tensors) > 1 and not isinstance(structure, (list, tuple)):
                raise UnsupportedLayerError(
                    "A nested model with several inputs must be called on a list of tensors. "
                    f"Received: model {name!r} called on {type(structure).__name__}."
                )
            return self._open(operation, tensors, structure, name + "/")
        if type(operation) is keras.layers.TimeDistributed:
            return self._read_steps(operation, tensors, name)
        if isinstance(operation, keras.Layer):
            if self.traced:
                self._check_owned(operation)
            check_cast(operation)
        operation = without_open_sizes(operation)
        shapes = _output_specs(operation, node, tensors, args, kwargs)
        return self._recorded(name, operation, args, kwargs, tensors, shapes)

    def _recorded(self, name, operation, args, kwargs, tensors, shapes):
        copies = max((t.copies for t in tensors), default=1)
        if len(shapes) > 1 and not isinstance(operation, keras.Layer):
            # Each output is a call of its own.
            found = []
            for i, (shape, dtype) in enumerate(shapes):
                part = self._unique(f"{name}[{i}]")
                output = Tensor(part, 0, shape, dtype, copies)
                found += self._record(part, Part(operation, i), args, kwargs, tensors, [output])
            return tuple(found)
        name = self._unique(name)
        outputs = [Tensor(name, i, s, d, copies) for i, (s, d) in enumerate(shapes)]
        return self._record(name, operation, args, kwargs, tensors, outputs)

    def _read_steps(self, operation, tensors, name):
        """A `TimeDistributed` layer: its steps become samples of the layer inside."""
        if len(tensors) != 1 or tensors[0].shape[1] is None:
            raise UnsupportedLayerError(
                "A layer applied to every time step needs one input with a known number of steps. "
                f"Received: layer {operation.name!r} on shapes {[t.shape for t in tensors]}."
            )
        (tensor,), inner = tensors, operation.layer
        if inner.compute_dtype != operation.compute_dtype:
            raise UnsupportedLayerError(
                "A layer applied to every time step must compute in its wrapper's dtype. Received: "
                f"layer {operation.name!r} in {operation.compute_dtype} around {inner.name!r} in "
                f"{inner.compute_dtype}."
            )
        steps, shape = tensor.shape[1], (None, *tensor.shape[2:])
        folded = Folded(steps, tensor.shape[2:])
        part = self._unique(f"{name}/steps to samples")
        dtype = tensor.dtype
        if keras.backend.is_float_dtype(dtype):
            dtype = taken_as(operation, dtype)
        output = Tensor(part, 0, shape, tensor.dtype, tensor.copies * steps)
        (output,) = self._record(part, folded, (tensor,), {}, tensors, [output])
        if dtype != output.dtype:
            output = self._cast(operation, output, keras.KerasTensor(shape, dtype), f"{name}/")
        outputs = self._read_inner(inner, output, f"{name}/{inner.name}")
        if len(outputs) != 1:
            raise UnsupportedLayerError(
                "A layer applied to every time step must have one output. "
                f"Received: layer {operation.name!r} with {len(outputs)}."
            )
        (result,) = outputs
        back = Unfolded(steps, result.shape[1:])
        part = self._unique(f"{name}/samples to steps")
        shape = (tensor.shape[0], steps, *result.shape[1:])
        output = Tensor(part, 0, shape, result.dtype, tensor.copies)
        return self._record(part, back, (result,), {}, (result,), [output])

    def _read_inner(self, layer, tensor, name):
        check_own_call(layer)
        if isinstance(layer, keras.Model) or is_composite(layer):
            return self._open(layer, (tensor,), tensor, name + "/")
        if type(layer) is keras.layers.TimeDistributed:
            return self._read_steps(layer, (tensor,), name)
        if self.traced:
            self._check_owned(layer)
        check_cast(layer)
        spec = layer.compute_output_spec(keras.KerasTensor(tensor.shape, dtype=tensor.dtype))
        shapes = [
            (tuple(t.shape), keras.backend.standardize_dtype(t.dtype))
            for t in keras.tree.flatten(spec)
        ]
        return self._recorded(name, layer, (tensor,), {}, (tensor,), shapes)

    def _check_owned(self, layer):
        if not all(id(v) in self.owned for v in layer.variables):
            raise UnsupportedLayerError(
                f"Model {self.model.name!r} creates or borrows layers in its `call`. Received: "
                f"layer {layer.name!r}, whose weights are not the model's. Create layers in "
                "`__init__`."
            )


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


def _output_specs(operation, node, tensors, args, kwargs):
    """Shapes and dtypes of a call's outputs at the sizes of this graph."""
    recorded = [
        (tuple(t.shape), keras.backend.standardize_dtype(t.dtype))
        for t in node.arguments.keras_tensors
    ]
    outputs = node.outputs
    # A constant that was recorded as a variable may have been cast since.
    cast = any(map(keras.ops.is_tensor, keras.tree.flatten((args, kwargs))))
    if cast or recorded != [(t.shape, t.dtype) for t in tensors]:

        def symbolic(a):
            return keras.KerasTensor(a.shape, dtype=a.dtype) if isinstance(a, Tensor) else a

        args, kwargs = keras.tree.map_structure(symbolic, (args, kwargs))
        outputs = keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
    return [(tuple(t.shape), keras.backend.standardize_dtype(t.dtype)) for t in outputs]
