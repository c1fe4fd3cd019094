"""Building a Keras model of ordinary layers and operations, one ONNX node after the other."""

import dataclasses
import re

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.modelfile import sizes
from tf_lyapunov.onnx import folding, operators
from tf_lyapunov.onnx.foreign import BadGraph, NotRead, Port, first_line, needed
from tf_lyapunov.onnx.patterns import fused
from tf_lyapunov.onnx.ports import chosen_output, legal_name, read_ports
from tf_lyapunov.onnx.signals import BATCH, Signal, plain, size_of

_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D")
_TRANSPOSED = tuple(f"{name}Transpose" for name in _CONVOLUTIONS)
# Layers whose kernel is drawn by random, and the name of what draws it.
_INITIALIZED = {
    **{getattr(keras.layers, n): "kernel_initializer" for n in ("Dense", *_CONVOLUTIONS)},
    **{getattr(keras.layers, n): "kernel_initializer" for n in _TRANSPOSED},
    keras.layers.DepthwiseConv1D: "depthwise_initializer",
    keras.layers.DepthwiseConv2D: "depthwise_initializer",
}


@dataclasses.dataclass(frozen=True)
class Built:
    """A Keras model of a graph.

    Attributes:
        model: Keras Functional model.
        signals: dict from names of ONNX values to their `Signal`, inputs among them.
        givers: dict from names of ONNX values to the `OnnxNode` that gives them.
        inputs, outputs: tuples of `Port`.
        fixed: number of samples that the file fixes, or `signals.BATCH`.
    """

    model: object
    signals: dict
    givers: dict
    inputs: tuple
    outputs: tuple
    fixed: int


class Builder:
    """What readers of operators make their layers with.

    Attributes:
        names: names of layers that are taken.
        batch: number of samples that the file fixes, `BATCH` where it leaves it open.
        wanted: names of the values that nodes read, or that is the output.
    """

    def __init__(self, batch):
        self.names, self.wanted = set(), set()
        self.batch = batch
        self._memory = sizes.available_memory()
        self._arranged = {}

    # Layers and operations ----------------------------------------------------------------------

    def name(self, node, suffix=""):
        """A legal name of a layer that no other has, after the node's."""
        # Keras on PyTorch cannot build layers with a dot in their names.
        text = re.sub(r"[^A-Za-z0-9_-]+", "_", node.name).strip("_-")
        kind = node.kind.rpartition(".")[2]
        text = (text or kind) + suffix
        if not re.match(r"[A-Za-z0-9]", text):
            text = f"{kind}_{text}"
        candidate, count = text, 1
        while candidate in self.names:
            count += 1
            candidate = f"{text}_{count}"
        self.names.add(candidate)
        return candidate

    def layer(self, node, kind, tensor, suffix="", weights=None, **settings):
        """The result of a new layer.

        Args:
            node: that it is named after.
            kind: class of the layer.
            tensor: what it is called on, or a list of tensors.
            suffix: of its name.
            weights: values of its weights, in their order.
            settings: of the layer.
        """
        first = tensor[0] if isinstance(tensor, list) else tensor
        settings.setdefault("dtype", str(first.dtype))
        drawn = _INITIALIZED.get(kind)
        if drawn is not None:
            settings[drawn] = "zeros"  # no random numbers, which are replaced at once
        layer = kind(name=self.name(node, suffix), **settings)
        result = layer(tensor)
        if drawn is not None:
            setattr(layer, drawn, keras.initializers.GlorotUniform())
        self.check_room(result)
        if weights is not None:
            layer.set_weights([np.asarray(w) for w in weights])
        return result

    def operation(self, node, tensor, suffix=""):
        """Names the operation that a tensor of `keras.ops` is the result of."""
        tensor._keras_history.operation.name = self.name(node, suffix)
        self.check_room(tensor)
        return tensor

    def check_room(self, tensor):
        """Refuses signals that memory cannot hold."""
        shape = tuple(tensor.shape[1:])
        if None in shape:
            raise NotRead("the sizes of its result are not known")
        self.check_bytes(size_of(shape) * np.dtype(str(tensor.dtype)).itemsize)

    def check_bytes(self, taken):
        """Refuses what memory cannot hold, before it is made."""
        if self._memory is not None and taken * 4 > self._memory:
            raise BadGraph(f"it makes {taken} bytes of one sample, more than there is memory")

    # Orders of axes -----------------------------------------------------------------------------

    def arranged(self, node, signal, order):
        """The signal with its tensor's axes in this order of a sample's axes."""
        order = tuple(order)
        if order == signal.order:
            return signal
        key = (id(signal.tensor), signal.order, order)
        if key not in self._arranged:
            dims = [1 + signal.order.index(axis) for axis in order]
            long = [d for d in dims if signal.tensor.shape[d] != 1]
            if long == sorted(long):  # nothing moves but axes of one
                shape = tuple(signal.tensor.shape[d] for d in dims)
                kind, settings = keras.layers.Reshape, {"target_shape": shape}
            else:
                kind, settings = keras.layers.Permute, {"dims": dims}
            tensor = self.layer(node, kind, signal.tensor, "_order", **settings)
            self._arranged[key] = (signal, tensor)
        return dataclasses.replace(signal, tensor=self._arranged[key][1], order=order)

    def plain(self, node, signal):
        """The signal with its tensor's axes in logical order."""
        return self.arranged(node, signal, range(len(signal.order)))

    def channels_last(self, node, signal):
        """The signal of a logical `(batch, channels, …)` with its channels last."""
        if signal.batch != 0 or signal.rank < 3:
            raise NotRead("its input must have the axes batch, channels and positions")
        return self.arranged(node, signal, (*range(1, len(signal.order)), 0))

    def with_last(self, node, signal, place):
        """The signal whose tensor has axis `place` of a sample last."""
        if signal.order[-1] == place:
            return signal
        return self.arranged(node, signal, [*(a for a in signal.order if a != place), place])

    def reshaped(self, node, signal, shape, batch, suffix=""):
        """The signal of another logical sample shape, entries in the same order."""
        shape = tuple(int(n) for n in shape)
        if size_of(shape) != size_of(signal.sample):
            raise BadGraph(
                f"it reshapes samples of shape {signal.sample} to {shape}, which has another size"
            )
        if shape == signal.sample:
            return dataclasses.replace(signal, batch=batch)
        long = [axis for axis in signal.order if signal.sample[axis] != 1]
        if long != sorted(long):  # axes of one may stand where they are
            signal = self.plain(node, signal)
        tensor = signal.tensor
        if shape == tuple(tensor.shape[1:]):
            return plain(tensor, batch, signal.nonnegative)
        if len(shape) == 1:
            tensor = self.layer(node, keras.layers.Flatten, tensor, suffix)
        else:
            tensor = self.layer(node, keras.layers.Reshape, tensor, suffix, target_shape=shape)
        return plain(tensor, batch, signal.nonnegative)

    def refitted(self, node, signal, axes, batch, suffix="_axes"):
        """The signal with axes of one added or dropped, the others in the tensor's own order.

        Args:
            node: that layers are named after.
            signal: `Signal`.
            axes: per axis of a new sample the axis that it was, or None for a new one of one.
            batch: new position of the batch axis, or None.
            suffix: of the layer's name.
        """
        places = [axes.index(a) for a in signal.order if a in axes]
        for new in range(len(axes) - 1, -1, -1):
            if axes[new] is None:  # beside the axis that follows it
                where = places.index(new + 1) if new + 1 in places else len(places)
                places.insert(where, new)
        sample = signal.sample
        shape = tuple(1 if axes[p] is None else sample[axes[p]] for p in places)
        tensor = signal.tensor
        if shape != tuple(tensor.shape[1:]):
            tensor = self.layer(node, keras.layers.Reshape, tensor, suffix, target_shape=shape)
        return Signal(tensor, tuple(places), batch, signal.nonnegative)

    def lifted(self, node, signal, rank):
        """The signal with leading axes of one until it has so many."""
        missing = rank - signal.rank
        if missing <= 0:
            return signal
        batch = None if signal.batch is None else signal.batch + missing
        return self.refitted(node, signal, [None] * missing + list(range(len(signal.order))), batch)

    # Constants ----------------------------------------------------------------------------------

    def against(self, node, signal, constant):
        """`(signal, array)`: the constant as it broadcasts against the signal's tensor, and the
        signal repeated to the shape that they have together."""
        constant = np.asarray(constant)
        signal = self.lifted(node, signal, constant.ndim)
        constant = constant.reshape((1,) * (signal.rank - constant.ndim) + constant.shape)
        if signal.batch is None:
            constant = constant[None]
        else:
            constant = np.moveaxis(constant, signal.batch, 0)
        if constant.shape[0] != 1:
            if np.any(constant != constant[:1]):
                raise NotRead("its constant differs from sample to sample")
            constant = constant[:1]
        constant = constant[0]
        shape = np.broadcast_shapes(signal.sample, constant.shape)
        signal = self.repeated(node, signal, shape)
        return signal, np.transpose(constant, signal.order)

    def repeated(self, node, signal, shape):
        """The signal with axes of one repeated to a sample's `shape`."""
        shape = tuple(shape)
        if shape == signal.sample:
            return signal
        times = [shape[a] // n for a, n in enumerate(signal.sample)]
        self.check_bytes(size_of(shape) * np.dtype(signal.dtype).itemsize)
        # One step for all axes: it is written as the one Expand that it was read from.
        tensor = keras.ops.tile(signal.tensor, [1, *(times[a] for a in signal.order)])
        tensor = self.operation(node, tensor, "_repeat")
        return signal.like(tensor, nonnegative=signal.nonnegative)

    def scaled(self, node, signal, scale, offset, suffix=""):
        """scale·x + offset with arrays that `against` gave, or numbers."""
        scale, offset = (self.setting(signal, value) for value in (scale, offset))
        tensor = self.layer(
            node, keras.layers.Rescaling, signal.tensor, suffix, scale=scale, offset=offset
        )
        return signal.like(tensor)

    def setting(self, signal, value):
        """A number or array in the signal's type; leading axes of one are dropped."""
        value = np.asarray(value, signal.dtype)
        if not np.all(np.isfinite(value)):
            raise BadGraph("its constant holds NaN or infinite values")
        if value.size == 1:
            return float(value.reshape(()))
        return value

    def of_batch(self, value):
        """The number of samples as the file knows it."""
        return self.batch if value == BATCH else value


# The walk ---------------------------------------------------------------------------------------


def build(graph, *, batch_axis="auto", input_shapes=None, output=None):
    """A Keras model of a checked graph.

    Args:
        graph: `foreign.OnnxGraph`.
        batch_axis, input_shapes, output: as of `load_onnx`.

    Returns:
        `Built`.

    Raises:
        UnsupportedLayerError: naming every node that is not read.
        ValueError: for arguments that do not fit the graph, and graphs whose shapes do not fit.
    """
    ports, batch = read_ports(graph, batch_axis, input_shapes)
    target = chosen_output(graph, output)
    builder = Builder(batch)
    for port in ports:
        try:
            builder.check_bytes(8 * size_of(port.sample_shape))
        except BadGraph as error:
            raise ValueError(
                f"Inputs must fit in memory. Received: input {port.name!r} of shape {port.shape}."
            ) from error
    constants = folding.Constants(graph, builder.batch)
    constants.fold_early(needed(graph.nodes, (target,)))
    nodes = needed(fused(graph, constants), (target,))
    builder.wanted = {target, *(name for node in nodes for name in node.inputs)}
    known, givers, refused = {}, {}, []
    tensors = []
    for port in ports:
        name = legal_name(port.name, builder.names)
        tensor = keras.Input(shape=port.sample_shape, dtype=port.dtype, name=name)
        tensors.append(tensor)
        known[port.name] = plain(tensor, port.batch)
    for node in nodes:
        try:
            _read(builder, node, constants, known)
        except NotRead as error:
            refused.append((node, str(error)))
        except (BadGraph, ValueError, TypeError, IndexError) as error:
            if isinstance(error, UnsupportedLayerError):
                raise
            raise ValueError(
                f"The graph contradicts itself, or asks for what cannot be. Received: {node.what}: "
                f"{first_line(error)}. Correct the file."
            ) from error
        for name in filter(None, node.outputs):
            givers[name] = node
            _check_declared(graph, node, name, known.get(name), builder)
    _raise_refused(refused, graph.opset)
    result = known.get(target)
    if not isinstance(result, Signal):
        raise ValueError(
            f"A network's output must depend on its input. Received: output {target!r}, a constant."
        )
    end = dataclasses.replace(givers[target], name=target) if target in givers else None
    result = builder.plain(end or _input_node(target), result)
    known[target] = result
    try:
        model = keras.Model(tensors if len(tensors) > 1 else tensors[0], result.tensor)
    except RecursionError as error:
        raise UnsupportedLayerError(
            "Keras follows the operations of a model one within the other, about a thousand deep. "
            f"Received: a network of {len(nodes)} nodes with a longer chain. Raise "
            "`sys.setrecursionlimit`."
        ) from error
    declared = next((v for v in graph.outputs if v.name == target), None)
    shape = list(result.sample)
    if result.batch is not None:
        shape.insert(result.batch, None)
    dtype = result.dtype if declared is None else declared.dtype
    outputs = (Port(target, tuple(shape), dtype, result.batch),)
    signals = {name: value for name, value in known.items() if isinstance(value, Signal)}
    return Built(model, signals, givers, ports, outputs, batch)


def _input_node(name):
    from tf_lyapunov.onnx.foreign import OnnxNode

    return OnnxNode(name, "Identity", "", (), (name,), {})


def _read(builder, node, constants, known):
    """Adds what a node gives to the constants or to `known`; None where it cannot be known."""
    names = [n for n in node.inputs if n]
    if any(n in known and known[n] is None for n in names):
        for output in node.outputs:
            known[output] = None  # behind what was refused
        return
    values = [None if not n else known[n] if n in known else constants.get(n) for n in node.inputs]
    for output in filter(None, node.outputs):
        known[output] = None
    if node.kind in ("Shape", "Size") and isinstance(values[0], Signal):
        found = [constants.shape(node, values[0])]
    elif not any(isinstance(v, Signal) for v in values):
        found = [constants.fold(node, values)]
        if isinstance(found[0], list):
            found = found[0]
    else:
        found = operators.read(builder, node, values)
        found = found if isinstance(found, list) else [found]
    for output, value in zip(node.outputs, found, strict=False):
        if not output:
            continue
        if isinstance(value, Signal):
            known[output] = value
        else:
            del known[output]
            constants.keep(output, value)


def _check_declared(graph, node, name, value, builder):
    """Declared shapes must be those that the graph gives, the number of samples aside."""
    shape = graph.declared.get(name)
    if shape is None or not isinstance(value, Signal):
        return
    own = value.shape(builder.batch)
    fits = len(own) == len(shape) and all(
        not isinstance(n, int) or n == m or i == value.batch
        for i, (n, m) in enumerate(zip(shape, own, strict=True))
    )
    if not fits:
        shown = tuple("batch" if n == BATCH else n for n in own)
        raise ValueError(
            f"The file declares a shape that the graph does not give. Received: {name!r} of "
            f"{node.what}, declared {shape}, which has {shown}. Correct the file, or remove what "
            "it declares of values within."
        )


def _raise_refused(refused, opset):
    if not refused:
        return
    lines = "\n".join(
        f"  {i}. {node.what} of operator set {node.since or opset}: {reason}."
        for i, (node, reason) in enumerate(refused, 1)
    )
    raise UnsupportedLayerError(
        f"{len(refused)} node{'s are' if len(refused) > 1 else ' is'} not read. Received (operator "
        f"set {opset}):\n{lines}\nOperators that are read: {', '.join(operators.names())}."
    )
