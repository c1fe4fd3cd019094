"""Chains read from a network: runs of linear nodes with elementwise functions between them."""

import dataclasses
import functools
import math

import numpy as np

from tf_lyapunov.bounds.chains import Chain, interval_slopes
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import pooling
from tf_lyapunov.program.families.moving import Moved
from tf_lyapunov.program.families.pooling import Pooled
from tf_lyapunov.program.families.scaling import BatchNormScale, Scaled
from tf_lyapunov.program.vocabulary import operations_of
from tf_lyapunov.program.weights import inference_value, kernel_maps
from tf_lyapunov.theory.operators import convolution_matrix
from tf_lyapunov.theory.sectors import Sector

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Kinds of nodes that have a matrix, if their own settings allow it.
_LINEAR = ("linear", "batch normalization")
_MOVING = ("pooling", "reshape", "scaling")
# Largest number of entries of a matrix that is written out.
MATERIALISED = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class LinearNode:
    """A linear node on row-major flattened samples: a matrix, written out where that is asked for.

    Attributes:
        shape: (outputs, inputs).
        make: function without arguments that gives the matrix, an array or a `scipy.sparse` one.
        bias: (outputs,), or None where it is not read.
        spread: the matrix that is meant differs from it by this share of every entry at most.
        kernel, linear_map: of a convolution, else None.
        scale: factor of every output of that convolution, or None.
    """

    shape: tuple
    make: object
    bias: np.ndarray | None
    spread: float = 0.0
    kernel: np.ndarray | None = None
    linear_map: object = None
    scale: np.ndarray | None = None

    @functools.cached_property
    def matrix(self):
        """The matrix, as `make` gives it."""
        return self.make()

    @functools.cached_property
    def dense(self):
        """The matrix as an array, or None if it is too large."""
        if math.prod(self.shape) > MATERIALISED and self.kernel is not None:
            return None
        if isinstance(self.matrix, np.ndarray):
            return self.matrix
        return self.matrix.toarray() if math.prod(self.shape) <= MATERIALISED else None


def _given(matrix, bias, spread=0.0):
    return LinearNode(matrix.shape, lambda: matrix, bias, spread)


class Reader:
    """Linear nodes of a network as matrices, each made once.

    Dense layers, convolutions (a batch normalization folded into them scales their rows), batch
    normalizations and other scales, average pools, and what pads by zeros, crops or reorders.

    Args:
        network: `Network`.
    """

    def __init__(self, network):
        self.network = network
        self.nodes = {node.name: node for node in network.nodes}
        self.calls = {call.name: call for call in network.graph.calls}
        self._kept = {}

    def linear(self, node):
        """`LinearNode` of a node, or None if it is not linear, or too large."""
        if node.name not in self._kept:
            self._kept[node.name] = self._read(node) if len(node.inputs) == 1 else None
        return self._kept[node.name]

    def is_linear(self, node):
        """Whether a node has a matrix that is not the identity."""
        if node.kind in _LINEAR:
            return True
        return node.kind in _MOVING and not keeps_order(node) and self.linear(node) is not None

    def is_readable(self, node, materialised=True):
        """Whether a node can be part of a chain: a matrix, a function, or the order.

        Args:
            node: `Node`.
            materialised: whether the matrix must be small enough to be written out.
        """
        if len(node.inputs) != 1:
            return False
        if node.kind == "activation":
            return node.sector is not None
        if node.kind == "identity" or keeps_order(node):
            return True
        found = self.linear(node)
        return found is not None and (not materialised or found.dense is not None)

    def _read(self, node):
        if node.kind == "linear":
            return self._weighted(node)
        if node.kind == "batch normalization":
            return _scaling(node)
        call = self.calls.get(node.call)
        shapes = self.nodes[node.inputs[0]].output_shape[1:], node.output_shape[1:]
        if node.kind not in _MOVING or call is None or any(None in s for s in shapes):
            return None
        if node.copies != 1 or self.nodes[node.inputs[0]].copies != 1:
            return None
        try:
            operations = operations_of(call)
        except UnsupportedLayerError:
            return None
        return _moving(operations[0], *shapes) if len(operations) == 1 else None

    def _weighted(self, node):
        """A dense layer or a convolution."""
        layer, reads = node.layer, self.nodes[node.inputs[0]]
        bias = None
        if not node.batch_norms:
            held = getattr(layer, "bias", None)
            bias = None if held is None else inference_value(held, layer.compute_dtype)
        spread = 5 * UNIT if node.batch_norms else 0.0
        if node.matrix is not None and len(node.output_shape) == 2:
            matrix = np.ascontiguousarray(node.matrix.T)
            if bias is None and not node.batch_norms:
                bias = np.zeros(len(matrix))
            return _given(matrix, bias, spread)
        shape = reads.output_shape
        if node.matrix is not None or None in shape[1:] or None in node.output_shape[1:]:
            return None
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            return None
        maps = kernel_maps(layer, shape)
        if len(maps) != 1:
            return None
        variable, linear_map = maps[0]
        kernel = inference_value(variable, layer.compute_dtype)
        size = math.prod(node.output_shape[1:]), math.prod(shape[1:])
        made = linear_map.output_shape(kernel.shape)
        if math.prod(made) != size[0] or math.prod(linear_map.input_shape) != size[1]:
            return None
        repeats, scale = size[0] // node.output_shape[-1], None
        if node.batch_norms:
            (norm,) = node.batch_norms
            scale = np.tile(BatchNormScale.of(norm).scale, repeats)
        else:
            bias = np.zeros(size[0]) if bias is None else np.tile(bias, repeats)

        def make():
            import scipy.sparse

            matrix = convolution_matrix(kernel, linear_map)
            return matrix if scale is None else scipy.sparse.diags(scale) @ matrix

        return LinearNode(size, make, bias, spread, kernel, linear_map, scale)


def _scaling(node):
    """A batch normalization that is folded into no layer, as a diagonal matrix."""
    import scipy.sparse

    shape = node.output_shape
    if None in shape[1:] or node.layer.axis % len(shape) != len(shape) - 1:
        return None
    scale = BatchNormScale.of(node.layer).scale
    matrix = scipy.sparse.diags(np.tile(scale, math.prod(shape[1:-1])), format="csr")
    return _given(matrix, None, 5 * UNIT)


def _moving(operation, inputs, outputs):
    """What moves or scales entries or takes means of windows, for such samples; else None.

    A mean over windows is the Kronecker product of one matrix per spatial axis.
    """
    import scipy.sparse

    size, count = math.prod(inputs), math.prod(outputs)
    if isinstance(operation, Moved):
        index = operation.index.ravel()
        rows = np.flatnonzero(index)
        ones = np.ones(len(rows))
        matrix = scipy.sparse.csr_matrix((ones, (rows, index[rows] - 1)), shape=(count, size))
        return _given(matrix, np.zeros(count))
    if isinstance(operation, Scaled):
        if inputs != outputs or np.broadcast_shapes(operation.scale.shape, inputs) != inputs:
            return None
        matrix = scipy.sparse.diags(np.broadcast_to(operation.scale, inputs).ravel(), format="csr")
        return _given(matrix, np.broadcast_to(operation.shift, inputs).ravel(), 4 * UNIT)
    if not isinstance(operation, Pooled) or operation.kind == "max" or operation.channels_first:
        return None
    sizes, matrix = inputs[:-1], scipy.sparse.identity(1, format="csr")
    for axis, n in enumerate(sizes):
        if operation.sizes is None:
            part = np.full((1, n), 1.0 / n)
        else:
            window = operation.sizes[axis], operation.strides[axis], operation.padding
            part = pooling.along(np.eye(n), 1, *window, operation.kind).T
        matrix = scipy.sparse.kron(matrix, scipy.sparse.csr_matrix(part))
    matrix = scipy.sparse.kron(matrix, scipy.sparse.identity(inputs[-1]), format="csr")
    return _given(matrix, np.zeros(count), 8 * len(sizes) * UNIT)


@dataclasses.dataclass(frozen=True)
class Tail:
    """The longest dense chain that ends at the logits.

    Attributes:
        chain: `Chain`.
        start: name of the node that the chain reads; everything up to it is composed.
        after: gain of what follows the chain.
        end: name of the chain's last node.
    """

    chain: Chain
    start: str
    after: float = 1.0
    end: str = ""


def dense_tail(network, reader=None):
    """Longest chain of linear layers with small matrices that ends at a network's logits.

    Args:
        network: `Network`.
        reader: `Reader` of it, or None.

    Returns:
        `Tail`.

    Raises:
        UnsupportedLayerError: if the logits are not made by a dense or convolution layer.
    """
    reader = reader or Reader(network)
    run = run_before(reader, network.logits)
    ends = [node for node in run if node.kind == "activation" or reader.is_linear(node)]
    if not run or ends[-1].kind == "activation":
        raise UnsupportedLayerError(
            "This method needs logits made by a dense layer, without a function after it. "
            f"Received: node {network.logits!r}. Use method='composition'."
        )
    return Tail(chain_of(run, reader), run[0].inputs[0], end=run[-1].name)


def tail_before(network, name, reader=None):
    """Longest such chain before any node, whose outputs may have any shape.

    Functions at its end belong to it; what else follows, one node after the other, is composed.

    Args:
        network: `Network`.
        name: of the node.
        reader: `Reader` of it, or None.

    Returns:
        `Tail`.

    Raises:
        UnsupportedLayerError: naming the node behind which no such chain ends.
    """
    reader = reader or Reader(network)
    node, after = reader.nodes[name], 1.0
    run = run_before(reader, node.name)
    while not run and node.kind != "input" and len(node.inputs) == 1:
        after = rounding.product_up(after, node.gain_upper_bound, *node.weights)
        node = reader.nodes[node.inputs[0]]
        run = run_before(reader, node.name)
    if not run:
        raise UnsupportedLayerError(
            "This method needs outputs that a dense layer or a small convolution makes, with "
            "functions of one input after it. "
            f"Received: node {node.name!r} of kind {node.kind!r}. Use method='composition'."
        )
    return Tail(chain_of(run, reader), run[0].inputs[0], after, run[-1].name)


def run_before(reader, name, materialised=True):
    """Nodes of the longest chain that ends at a node, from its first linear one on.

    Args:
        reader: `Reader`.
        name: of the node.
        materialised: see `Reader.is_readable`.
    """
    consumers = reader.network.consumers()
    run, node = [], reader.nodes[name]
    while reader.is_readable(node, materialised):
        if run and len(consumers[node.name]) > 1:
            break
        run.append(node)
        node = reader.nodes[node.inputs[0]]
    run.reverse()
    while run and (not reader.is_linear(run[0]) or _is_multiple(reader, run[0])):
        run.pop(0)
    return run if any(node.kind in _LINEAR for node in run) else []


def _is_multiple(reader, node):
    """Whether a node is a multiple of the identity, whose gain loses nothing in a product."""
    if node.kind != "scaling":
        return False
    diagonal = reader.linear(node).matrix.diagonal()
    return bool(np.all(diagonal == diagonal[0]))


def chain_of(run, reader, size=None):
    """`Chain` of a run of nodes; identities stand before and after functions at its ends.

    Args:
        run: list of `Node`, each reading the one before it, of which `Reader.is_readable` holds.
        reader: `Reader`.
        size: entries of the signal that the run reads, needed if it starts with a function.
    """
    weights, biases, sectors, slopes, names, errors = [], [], [], [], [], []
    pending, bounds = None, None
    for node in run:
        if node.kind == "activation":
            if not weights:
                weights, biases, errors = [np.eye(size)], [np.zeros(size)], [0.0]
                names.append(f"before {node.name}")
            pending, bounds = followed(pending, node)
        elif reader.is_linear(node):
            if weights:
                sectors.append(pending or Sector.linear())
                slopes.append(bounds)
            pending, bounds = None, None
            found = reader.linear(node)
            weights.append(found.dense)
            biases.append(found.bias)
            names.append(node.name)
            errors.append(found.spread * np.abs(found.dense) if found.spread else 0.0)
    if pending is not None:
        last = len(weights[-1])
        weights, biases, errors = (
            [*weights, np.eye(last)],
            [*biases, np.zeros(last)],
            [*errors, 0.0],
        )
        sectors, slopes = [*sectors, pending], [*slopes, bounds]
        names.append(f"after {run[-1].name}")
    known = None if any(b is None for b in biases) else tuple(biases)
    return Chain(tuple(weights), tuple(sectors), known, tuple(names), tuple(errors), tuple(slopes))


def followed(pending, node):
    """`(sector, slopes on intervals)` of a function after the one that is pending, or after none.

    Two functions in a row: the chain rule on sectors.
    """
    if pending is None:
        return node.sector, interval_slopes(node)
    ends = [a * b for a in (pending.alpha, pending.beta)
            for b in (node.sector.alpha, node.sector.beta)]  # fmt: skip
    return Sector(float(rounding.down(min(ends))), float(rounding.up(max(ends)))), None


def keeps_order(node):
    """Whether a node only reshapes, row-major (Keras' Flatten of channels_first moves entries)."""
    is_row_major = getattr(node.layer, "data_format", "channels_last") == "channels_last"
    known = type(node.layer).__name__ in ("Flatten", "Reshape") and node.kind == "reshape"
    return known and is_row_major
