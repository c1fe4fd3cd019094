"""The one door from Keras to certificates: a model as a graph of nodes with proven gains.

`read_network` is the only reader of models in this package. Everything after it is float64
arithmetic on `Node.gain_upper_bound`.
"""

import dataclasses
import functools
import hashlib
import json

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.activations import activation_name, current_config
from tf_lyapunov.program.families import products
from tf_lyapunov.program.families.einsum import CLOSED_LAYERS
from tf_lyapunov.program.families.fused import fused_gain
from tf_lyapunov.program.families.linear import linear_gains
from tf_lyapunov.program.families.scaling import BatchNormScale
from tf_lyapunov.program.gain import Affine, Peak
from tf_lyapunov.program.graph import Graph, Tensor, read_graph
from tf_lyapunov.program.operation import hashed
from tf_lyapunov.program.program import read_program
from tf_lyapunov.program.refusal import raise_all
from tf_lyapunov.program.vocabulary import gain_of
from tf_lyapunov.program.weights import channel_axis, is_linear
from tf_lyapunov.progress import steps
from tf_lyapunov.theory.sectors import Sector


@dataclasses.dataclass(frozen=True)
class Node:
    """One step of the network with a proven gain.

    Attributes:
        name: unique; the layer's name, with the path of nested models and a suffix for the parts
            of a layer (`"dense/relu"`).
        kind: `"input"`, `"linear"`, `"activation"`, `"batch normalization"`, `"pooling"`,
            `"merge"`, `"reshape"`, `"scaling"`, `"softmax"`, `"identity"`, `"lipschitz"` (a layer
            with several maps or one without a kernel, bounded as a whole), `"product"` (of two
            signals: bounded on a region alone) or `"declared"`.
        layer: the Keras layer or operation, None for inputs.
        call: name of the layer call that the node is a part of.
        inputs: names of the nodes it reads.
        gain_upper_bound: upper bound on its l2 gain (see `rule`).
        method: how that bound was found.
        assumption: what the user declared by `register_gain`, or None.
        rule: `"single"`, `"sum"` (gain·Σ w L) or `"root_sum_squares"` (gain·√Σ(w L)²).
        weights: w, one per input.
        affine: model of its rounding error in the model's own precision.
        affine64: the same for an evaluation in float64.
        sector: slope sector of an elementwise activation, or None.
        decision: name of a softmax or sigmoid that keeps the order of its inputs, or None.
        matrix: float64 (in, out) of a dense map, batch normalization folded, else None.
        batch_norms: Keras layers folded into this node.
        output_shape: with the batch axis.
        peak: `Peak` of what it computes on its way to a smaller result.
        flushed: see `Gain`.
        copies: items of a sample that lie along the batch axis (see `graph.Tensor`).
    """

    name: str
    kind: str
    layer: object
    call: str
    inputs: tuple
    gain_upper_bound: float
    method: str
    assumption: str | None = None
    rule: str = "single"
    weights: tuple = (1.0,)
    affine: Affine = dataclasses.field(default_factory=Affine)
    affine64: Affine = dataclasses.field(default_factory=Affine)
    sector: Sector | None = None
    decision: str | None = None
    matrix: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    batch_norms: tuple = ()
    output_shape: tuple = ()
    copies: int = 1
    peak: Peak = dataclasses.field(default_factory=Peak)
    flushed: tuple = (0.0, 0.0)

    def bare(self):
        """The node's numbers without what belongs to Keras, and without its matrix."""
        return dataclasses.replace(self, layer=None, matrix=None, batch_norms=())


@dataclasses.dataclass(frozen=True)
class Bare:
    """A network's numbers alone, which another process can read.

    Attributes:
        nodes, inputs: as of `Network`.
        dtypes: dict from calls to the dtypes that they compute in.
    """

    nodes: tuple
    inputs: tuple
    dtypes: dict

    def __getitem__(self, name):
        """The node of this name."""
        return next(node for node in self.nodes if node.name == name)


@dataclasses.dataclass(frozen=True)
class Network:
    """A Keras model as nodes in topological order.

    Attributes:
        model: the Keras model.
        nodes: tuple of `Node`, inputs first.
        inputs: names of the input nodes.
        output: name of the last node.
        logits: name of the node before a final softmax or sigmoid; `output` if there is none.
        decision_node: name of that final node, or None.
        graph: the flattened Keras graph, for evaluating the logits.
    """

    model: object
    nodes: tuple
    inputs: tuple
    output: str
    logits: str
    decision_node: str | None
    graph: Graph = dataclasses.field(repr=False)

    def __getitem__(self, name):
        """The node of this name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    @functools.cached_property
    def program(self):
        """The `Program` of this network, read once."""
        return read_program(self)

    @property
    def dtypes(self):
        """dtype that every call computes in, by its name."""
        return {
            call.name: getattr(call.operation, "compute_dtype", None) or call.outputs[0].dtype
            for call in self.graph.calls
        }

    def bare(self):
        """`Bare`: what bounds on rounding read."""
        return Bare(tuple(node.bare() for node in self.nodes), self.inputs, self.dtypes)

    @property
    def decision(self):
        """Name of the final function that is looked through (`"softmax"`, …), or None."""
        return None if self.decision_node is None else self[self.decision_node].decision

    @property
    def is_chain(self):
        """Whether every node reads exactly the node before it."""
        return len(self.inputs) == 1 and all(
            node.inputs == (previous.name,)
            for previous, node in zip(self.nodes[:-1], self.nodes[1:], strict=True)
        )

    @property
    def products(self):
        """Names of the calls that multiply two signals, which only a region bounds."""
        return tuple(node.call for node in self.nodes if node.kind == "product")

    def consumers(self):
        """Names of the nodes that read each node."""
        found = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node.name)
        return found

    def digest(self):
        """SHA-256 of the layers' types, settings and weights, independent of names."""
        state = hashlib.sha256()
        names = [t.producer for t in self.graph.inputs] + [c.name for c in self.graph.calls]
        positions = {name: i for i, name in reversed(list(enumerate(names)))}
        for call in self.graph.calls:
            wiring = [positions[t.producer] for t in call.inputs]
            settings = [_settings(call.operation), wiring, _constants(call)]
            state.update(json.dumps(settings, default=str).encode())
        for step in self.program.steps:
            for operation in step.operations or ():
                operation.enter(state)
        for layer in self.graph.layers:
            for variable in layer.variables:
                if "seed_generator" in variable.path:
                    continue  # dropout's counter moves in training and is unused at inference
                value = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
                state.update(f"{value.dtype}{value.shape}".encode())
                state.update(hashed(value))
        return "sha256:" + state.hexdigest()


def read_network(model, input_shapes=None, *, bounded=True, on_region=False):
    """Reads a built Keras model into nodes with proven gains.

    Args:
        model: a Functional or Sequential model, or a subclassed one whose `call` uses Keras layers
            and operations only; nested models are opened.
        input_shapes: list of shapes with the batch axis, one per input, that fix sizes which the
            model leaves open; by default those that it was built with.
        bounded: whether to bound the linear nodes; without, their gains are infinite and the
            structure alone is read, which takes no time.
        on_region: whether steps are read that only bounds on a region know: products of two
            signals, attention, `SimpleRNN`, `GRU` and `LSTM` unrolled over the input's length.
            Products have an infinite gain then.

    Returns:
        `Network`.

    Raises:
        UnsupportedLayerError: naming every layer and operation without a proven gain.
        ValueError: if the model is not built, or holds NaN or infinite weights.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="relu")])
    >>> [node.kind for node in read_network(model).nodes]
    ['input', 'linear', 'activation']
    """
    refusals = {}
    graph = read_graph(model, input_shapes, refusals=refusals, on_region=on_region)
    folds = _foldable_batch_norms(graph)
    nodes, last = [], {}
    for tensor in graph.inputs:
        nodes.append(Node(tensor.producer, "input", None, tensor.producer, (), 1.0, "model input"))
        nodes[-1] = dataclasses.replace(nodes[-1], output_shape=tensor.shape)
        last[tensor.producer] = tensor.producer
    cache = {}
    for call in steps(graph.calls, "layers"):
        inputs = tuple(last.get(t.producer, t.producer) for t in call.inputs)
        if call.name in refusals:
            continue
        if call.name in folds.values():
            last[call.name] = inputs[0]  # already part of the linear node before it
            continue
        try:
            if is_linear(call.operation) and len(call.inputs) == 1:
                fold = next((c for c in graph.calls if c.name == folds.get(call.name)), None)
                # No norm is computed for a model that is refused.
                new = _linear_nodes(call, inputs, fold, cache, bounded and not refusals)
            elif on_region and products.is_product(call):
                gain = products.gain(call)
                new = [_node(call, inputs, gain, gain)]
            else:
                new = [_other_node(call, inputs)]
                if type(call.operation) in CLOSED_LAYERS:
                    new += _activation_nodes(call, (new[0].name,))
        except UnsupportedLayerError as error:
            refusals[call.name] = error
            continue
        nodes.extend(new)
        last[call.name] = new[-1].name
    raise_all(
        {call.name: refusals[call.name] for call in graph.calls if call.name in refusals},
        {call.name: call.owner for call in graph.calls},
    )
    output = last[graph.output.producer]
    by_name = {node.name: node for node in nodes}
    final = by_name[output]
    while final.kind == "identity":
        final = by_name[final.inputs[0]]
    logits, decided = output, None
    if final.decision is not None:
        logits, decided = final.inputs[0], final.name
    inputs = tuple(t.producer for t in graph.inputs)
    return Network(model, tuple(nodes), inputs, output, logits, decided, graph)


def _other_node(call, inputs):
    """Node of a call that is no dense or convolution layer."""
    gain = gain_of(call)
    if gain.affine64 is not None:
        gain64 = dataclasses.replace(gain, affine=gain.affine64)
    else:
        with rounding.float64_evaluation():
            # A user's own layer keeps its precision.
            gain64 = gain if gain.assumption else gain_of(call)
    return _node(call, inputs, gain, gain64)


def _node(call, inputs, gain, gain64, name=None, layer=None):
    return Node(
        name or call.name,
        gain.kind,
        layer or call.operation,
        call.name,
        inputs,
        gain.value,
        gain.method,
        gain.assumption,
        gain.rule,
        gain.weights,
        gain.affine,
        gain64.affine,
        gain.sector,
        gain.decision,
        peak=gain.peak,
        flushed=gain.flushed,
        output_shape=call.outputs[0].shape,
        copies=call.outputs[0].copies,
    )


def _linear_nodes(call, inputs, fold, cache, bounded):
    """Nodes of a dense or convolution call: its maps, then its activation."""
    layer, output = call.operation, call.outputs[0]
    scale = BatchNormScale.of(fold.operation) if fold is not None else None
    tensor = call.inputs[0]
    key = (id(layer), tensor.shape, tensor.dtype, tensor.copies, fold and id(fold.operation))
    if key not in cache:
        cache[key] = linear_gains(layer, call.inputs[0], output, scale, bounded=bounded)
    nodes = []
    for i, gain in enumerate(cache[key]):
        is_last = i == len(cache[key]) - 1
        node = Node(
            call.name + gain.suffix,
            "linear",
            layer,
            call.name,
            inputs,
            gain.value,
            gain.method,
            affine=gain.affine,
            affine64=gain.affine64,
            matrix=gain.matrix,
            batch_norms=(fold.operation,) if fold is not None and is_last else (),
            output_shape=output.shape,
            copies=output.copies,
        )
        nodes.append(node)
        inputs = (node.name,)
    return [*nodes, *_activation_nodes(call, inputs)]


def _activation_nodes(call, inputs):
    """The node of the activation that a layer applies to its own result, if it has one."""
    layer = call.operation
    tensor = dataclasses.replace(call.outputs[0], dtype=layer.compute_dtype)
    activation = fused_gain(layer, tensor)
    if activation is None:
        return []
    with rounding.float64_evaluation():
        activation64 = fused_gain(layer, tensor)
    name = f"{call.name}/{activation_name(layer.activation)}"
    held = layer.activation if isinstance(layer.activation, keras.Layer) else layer
    return [_node(call, inputs, activation, activation64, name, held)]


def _foldable_batch_norms(graph):
    """Linear call -> the batch normalization that alone reads it, along its channel axis."""
    readers, calls = {}, {c.name: c for c in graph.calls}
    for call in graph.calls:
        for tensor in call.inputs:
            readers.setdefault(tensor.producer, []).append(call)
    folds = {}
    for name, users in readers.items():
        call = calls.get(name)
        if call is None or not is_linear(call.operation) or len(users) != 1:
            continue
        layer, norm = call.operation, users[0].operation
        if type(norm) is not keras.layers.BatchNormalization or len(users[0].inputs) != 1:
            continue
        rank = len(call.outputs[0].shape)
        same_axis = norm.axis % rank == channel_axis(layer, rank)
        if same_axis and activation_name(layer.activation) == "linear":
            folds[name] = users[0].name
    return folds


def _constants(call):
    """Arguments of a call that are no tensors of the graph, such as 2 in `2 * x`."""
    found = []
    for argument in keras.tree.flatten((call.args, call.kwargs)):
        if isinstance(argument, np.ndarray | keras.Variable) or keras.ops.is_tensor(argument):
            found.append(np.asarray(keras.ops.convert_to_numpy(argument)).tolist())
        elif not isinstance(argument, Tensor):
            found.append(repr(argument))
    return found


def _settings(operation):
    """Type and settings of a layer or operation, without names."""
    kind = f"{type(operation).__module__}.{type(operation).__qualname__}"
    try:
        config = current_config(operation)
    except Exception:  # custom layers need not be serialisable to be certified
        config = {}
    skipped = ("name", "trainable", "build_config")
    ignored = ("initializer", "regularizer", "constraint")
    kept = {k: v for k, v in config.items() if k not in skipped and not k.endswith(ignored)}
    return [kind, kept]
