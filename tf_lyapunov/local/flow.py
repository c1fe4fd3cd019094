"""A program up to its logits as single operations, traced at one input."""

import dataclasses
import functools

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.gains import is_known
from tf_lyapunov.local.pairs import paired
from tf_lyapunov.program import rounding
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import EXACT, Signal
from tf_lyapunov.program.tensors import as_array, as_tensor
from tf_lyapunov.program.wrapping import Folded, Unfolded


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """One operation of a flow.

    Attributes:
        name: of the step that it belongs to.
        operation: an `Operation`, or `Whole`.
        inputs: positions in the flow of what it reads; 0 is the input itself.
    """

    name: str
    operation: object
    inputs: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """Steps known by their nodes' gains alone: one, or all that a layer does to time steps.

    Attributes:
        nodes: tuple of `network.Node` in topological order, the first of which takes all inputs.
        evaluate: function of float64 inputs (1, …) that gives `(value, l2 error)`.
    """

    nodes: tuple
    evaluate: object


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """Links in topological order; position 0 is the input, link k makes position k + 1.

    Attributes:
        links: tuple of `Link`.
        name: of the model, for messages.
        rank: axes of one input, None where that does not matter.
    """

    links: tuple
    name: str
    rank: int | None = None

    @property
    def output(self):
        """Position of the output."""
        return len(self.links)

    def consumers(self):
        """Numbers of links that read each position."""
        found = [0] * (len(self.links) + 1)
        for link in self.links:
            for k in link.inputs:
                found[k] += 1
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Values of a flow at one input, with the rounding of each link alone.

    Attributes:
        values: list of float64 (1, *shape), one per position.
        noise: list of float64 arrays of that shape, or a number: bounds on what the link's own
            evaluation errs by, from its inputs as computed.
    """

    values: list
    noise: list

    def shape(self, k):
        """Shape of a sample at position k."""
        return self.values[k].shape[1:]


def flow_of(network, *, decision=False):
    """`Flow` of a network's program.

    Args:
        network: `network.Network` with one input.
        decision: whether a final softmax or sigmoid takes part.

    Raises:
        UnsupportedLayerError: if the model has several inputs.
    """
    program = network.program
    if len(program.inputs) != 1:
        raise UnsupportedLayerError(
            "Bounds around an input need a model with one input. Received: "
            f"{len(program.inputs)} inputs. Concatenate them inside the model."
        )
    target = program.output
    end = program.decision if program.decision is not None and not decision else target
    steps = []
    needed = {end}
    for step in reversed(program.steps):
        if step.name in needed:
            needed.update(step.inputs)
            steps.append(step)
    places, links = {program.inputs[0]: 0}, []
    copies = {call.name: call.outputs[0].copies for call in network.graph.calls}
    inner = []
    for step in reversed(steps):
        if inner or copies[step.name] > 1 or isinstance(_layer(network, step), Folded):
            # Samples of time steps lie along the batch axis: together they are one link.
            inner.append(step)
            if copies[step.name] == 1 and isinstance(_layer(network, step), Unfolded):
                inputs = tuple(places[name] for name in inner[0].inputs)
                links.append(Link(step.name, _together(network, program, inner), inputs))
                places[step.name], inner = len(links), []
            continue
        inputs = tuple(places[name] for name in step.inputs)
        operations = step.operations
        if operations is not None and step.name == program.decision and not decision:
            operations = operations[:-1]
        if operations is None or not all(map(is_known, operations)):
            nodes = tuple(n for n in network.nodes if n.call == step.name)
            if step.name == program.decision and not decision:
                nodes = tuple(n for n in nodes if n.name != network.decision_node)
            if operations is None or step.is_declared:
                evaluate = _evaluation(network, step, nodes)
            else:
                evaluate = functools.partial(_exactly, operations)
            links.append(Link(step.name, Whole(nodes, evaluate), inputs))
            places[step.name] = len(links)
            continue
        for operation in _in_pairs(network, step, operations):
            links.append(Link(step.name, operation, inputs))
            inputs = (len(links),)
        places[step.name] = inputs[0]
    if places[end] != len(links):
        # The output is an earlier position: everything after it is no part of it.
        links = links[: places[end]]
    return Flow(tuple(links), network.model.name, len(network.graph.inputs[0].shape) - 1)


def portable(flow):
    """The flow without what belongs to Keras, so that another process can work with it.

    A step that the model evaluates is left without its evaluation: traces are then made here.
    """
    links = []
    for link in flow.links:
        operation = link.operation
        if isinstance(operation, Whole):
            evaluate = None if _by_model(operation) else operation.evaluate
            operation = Whole(tuple(node.bare() for node in operation.nodes), evaluate)
        links.append(dataclasses.replace(link, operation=operation))
    return dataclasses.replace(flow, links=tuple(links))


def needs_model(flow):
    """Whether a trace of the flow takes the model itself."""
    return any(isinstance(k.operation, Whole) and _by_model(k.operation) for k in flow.links)


def _by_model(whole):
    return not isinstance(whole.evaluate, functools.partial)


def _in_pairs(network, step, operations):
    """Operations of a step, with a max pool as maxima of two at a time where it has that form."""
    if not operations:
        return operations
    call = next((c for c in network.graph.calls if c.name == step.name), None)
    if call is None or not call.inputs or None in call.inputs[0].shape[1:]:
        return operations
    chain = paired(operations[0], call.inputs[0].shape[1:])
    return operations if chain is None else (*chain, *operations[1:])


def _layer(network, step):
    return next(c.operation for c in network.graph.calls if c.name == step.name)


def _together(network, program, steps):
    """`Whole` of steps that follow one another, from one signal to another."""
    names = [step.name for step in steps]
    if program.decision in names:
        raise UnsupportedLayerError(
            "Bounds around an input need logits of whole samples. Received: a model that ends with "
            f"{program.decision!r} on every time step."
        )
    nodes = {name: tuple(n for n in network.nodes if n.call == name) for name in names}
    alone = {
        step.name: _evaluation(network, step, nodes[step.name])
        for step in steps
        if step.operations is None or step.is_declared
    }

    def evaluate(values):
        signals = {
            name: Signal(v, np.zeros_like(v))
            for name, v in zip(steps[0].inputs, values, strict=True)
        }
        for step in steps:
            read = [signals[name] for name in step.inputs]
            if step.name in alone:
                value, own = alone[step.name]([s.value for s in read])
                moved = gain_of(nodes[step.name], [_norm(s.error) for s in read])
                error = np.full(value.shape, rounding.sum_up(moved, own))
                signals[step.name] = Signal(np.asarray(value, np.float64), error)
                continue
            for operation in step.operations:
                found = operation.forward(read, EXACT)
                error = np.inf if found.error is None else found.error
                read = [Signal(found.value, np.broadcast_to(error, found.value.shape))]
            (signals[step.name],) = read
        last = signals[steps[-1].name]
        return last.value, _norm(last.error)

    return Whole(tuple(n for name in names for n in nodes[name]), evaluate)


def _evaluation(network, step, nodes):
    """Evaluates one step by the model's own layer, with a bound on its rounding and its cast."""
    call = next(c for c in network.graph.calls if c.name == step.name)
    if not nodes or len(nodes) < sum(n.call == step.name for n in network.nodes):
        raise UnsupportedLayerError(
            "A step that holds the decision, or is folded into another, must be evaluated apart "
            f"from the model. Received: step {step.name!r}: {step.why}"
        )

    def evaluate(values):
        casts = [as_tensor(v, t.dtype) for v, t in zip(values, call.inputs, strict=True)]
        given = iter(casts)
        args, kwargs = keras.tree.map_structure(
            lambda a: next(given) if isinstance(a, Tensor) else a, (call.args, call.kwargs)
        )
        value = as_array(keras.tree.flatten(call.operation(*args, **kwargs))[0])
        casts = [as_array(c) for c in casts]
        moved = [_norm(c - v) for c, v in zip(casts, values, strict=True)]
        norms = [_norm(c) for c in casts]
        for node in nodes:
            reading = sum(w * (n + e) for w, n, e in zip(node.weights, norms, moved, strict=True))
            shifted = sum(w * e for w, e in zip(node.weights, moved, strict=True))
            gain, affine = node.gain_upper_bound, node.affine
            own = affine.slope * reading + affine.constant
            norms, moved = [gain * reading + affine.offset], [(gain * shifted + own) * (1 + 1e-9)]
        return value, moved[0]

    return evaluate


def _exactly(operations, values):
    """Operations one after the other in float64, and an l2 bound on their rounding."""
    signals = [Signal(v, np.zeros_like(v)) for v in values]
    for operation in operations:
        signals = [operation.forward(signals, EXACT)]
    if signals[0].error is None:
        return signals[0].value, np.inf
    return signals[0].value, _norm(signals[0].error)


def _norm(array):
    return float(rounding.euclidean_norms_up(array.reshape(1, -1))[0])


def gain_of(nodes, radii):
    """How far the last of some nodes moves if the inputs of the first move by `radii`."""
    moved = dict(zip(nodes[0].inputs, radii, strict=True))
    for node in nodes:
        read = radii if node is nodes[0] else [moved[name] for name in node.inputs]
        weighted = [rounding.product_up(w, r) for w, r in zip(node.weights, read, strict=True)]
        combine = (
            rounding.root_sum_squares_up if node.rule == "root_sum_squares" else rounding.sum_up
        )
        moved[node.name] = rounding.product_up(node.gain_upper_bound, combine(*weighted))
    return moved[nodes[-1].name]


def trace(flow, x):
    """`Trace` of a flow at one input x of the program's shape."""
    values, noise = [np.asarray(x, np.float64)[None]], [0.0]
    for link in flow.links:
        read = [values[k] for k in link.inputs]
        if isinstance(link.operation, Whole):
            value, error = link.operation.evaluate(read)
        else:
            signals = [Signal(v, np.zeros_like(v)) for v in read]
            found = link.operation.forward(signals, EXACT)
            value, error = found.value, found.error
        if not np.all(np.isfinite(value)):
            raise ValueError(
                "The program's values must be finite at the centre of a region. Received: NaN or "
                f"infinity at step {link.name!r}."
            )
        values.append(np.asarray(value, np.float64))
        noise.append(error)
    return Trace(values, noise)
