"""Values that do not depend on a graph's inputs, computed once, their sizes checked before.

Arithmetic on shapes is done here; what needs a library's functions is run by onnxruntime itself, so
that it is what users of the file get.
"""

import math

import numpy as np

from tf_lyapunov.modelfile import sizes as memory
from tf_lyapunov.onnx import counting
from tf_lyapunov.onnx.foreign import BadGraph, NotRead, first_line
from tf_lyapunov.onnx.opening import packages
from tf_lyapunov.onnx.signals import BATCH, size_of

# Entries of a folded value, at most, and how often constants are held: by NumPy, Keras, a program.
_LARGEST, _COPIES = 2**28, 4
_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip


class Constants:
    """Arrays of a graph by name.

    Args:
        graph: `foreign.OnnxGraph`.
        batch: number of samples, or `signals.BATCH`.
    """

    def __init__(self, graph, batch):
        self.opset, self.batch = graph.opset, batch
        self._known = dict(graph.constants)
        # What depends on the number of samples, at one sample; and names of values of which one
        # copy stands for one per sample.
        self._alone, self._copies = {}, set()
        self._room = memory.available_memory()

    def get(self, name):
        """The array of this name, or None."""
        return self._known.get(name)

    def keep(self, name, array):
        """Keeps an array."""
        array = np.asarray(array)
        _room(array.shape)
        if self._room is not None:
            if _COPIES * array.nbytes > self._room:
                raise BadGraph("its constants need more memory than there is")
            self._room -= _COPIES * array.nbytes
        self._known[name] = array

    def shape(self, node, signal):
        """What a Shape or Size of a signal gives."""
        found, alone = (_sizes_of(node, signal.shape(n)) for n in (self.batch, 1))
        if self.batch == BATCH and np.any(found != alone):
            self._alone[node.outputs[0]] = alone
        return found

    def fold_early(self, nodes):
        """Folds what depends on no input's shape either, so that compositions show."""
        for node in nodes:
            if node.domain or node.since is None or len(node.outputs) != 1:
                continue
            values = [None if not n else self._known.get(n) for n in node.inputs]
            if any(v is None and n for v, n in zip(values, node.inputs, strict=True)):
                continue
            try:
                found = self.fold(node, values)
            except (NotRead, ValueError, TypeError, IndexError, MemoryError):
                continue  # told where it is needed
            self.keep(node.outputs[0], found)

    def fold(self, node, values):
        """What a node of constants gives: an array, or a list of arrays.

        Raises:
            NotRead: where it is not computed here, or would be computed of the number of samples.
            BadGraph: where it would be larger than any constant is.
        """
        if node.domain or node.since is None:
            raise NotRead("it is no operator of ONNX's own")
        if self._copies.intersection(node.inputs):
            if node.kind in ("Shape", "Size"):
                raise NotRead("it computes the size of as many copies as there are samples")
            self._copies.update(node.outputs)
        if not self._alone.keys() & set(node.inputs):
            return self._folded(node, values)
        alone = [self._alone.get(n, v) for n, v in zip(node.inputs, values, strict=True)]
        found, single = counting.folded(node, values, alone, self._folded)
        if node.kind in counting.SIZES:
            self._copies.update(node.outputs)
        pairs = (
            ((found, single),) if not isinstance(found, list) else zip(found, single, strict=True)
        )
        for name, (many, one) in zip(node.outputs, pairs, strict=True):
            if np.any(many != one):
                self._alone[name] = one
        return found

    def _folded(self, node, values):
        if node.kind in _FOLDS:
            with np.errstate(all="ignore"):
                found = _FOLDS[node.kind](node, *values)
            return found
        if node.kind in _BY_RUNTIME:
            return self._run(node, values)
        raise NotRead("it computes a constant, which is not done here")

    def _run(self, node, values):
        """By onnxruntime, whose result is no larger than its operands for these operators."""
        if node.kind in ("MatMul", "Gemm"):
            _room(_product_shape(node, values))
        onnx, runtime = packages()
        names = [f"i{k}" if v is not None else "" for k, v in enumerate(values)]
        attributes = {k: v for k, v in node.attributes.items() if v is not None}
        made = onnx.helper.make_node(node.kind, names, ["o"], **attributes)
        inputs = [
            onnx.helper.make_tensor_value_info(
                n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape
            )
            for n, v in zip(names, values, strict=True)
            if v is not None
        ]
        graph = onnx.helper.make_graph([made], "g", inputs, [onnx.ValueInfoProto(name="o")])
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = runtime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            feed = {n: v for n, v in zip(names, values, strict=True) if v is not None}
            return session.run(None, feed)[0]
        except Exception as error:  # onnxruntime raises many kinds
            line = first_line(error, 200)
            raise BadGraph(f"onnxruntime does not compute it ({line})") from error


def _sizes_of(node, shape):
    if node.kind == "Size":
        return np.array(math.prod(shape), np.int64)
    start, end = node.get("start", 0), node.get("end", len(shape))
    return np.array(shape[start:end], np.int64)


# Sizes ------------------------------------------------------------------------------------------


def _room(shape):
    if any(n < 0 for n in shape) or math.prod(int(n) for n in shape) > _LARGEST:
        raise BadGraph(f"it makes a constant of shape {tuple(int(n) for n in shape)}")


def _sizes(value):
    """Sizes as integers; samples are broadcast, so that one stands for all of them."""
    return tuple(1 if n == BATCH else int(n) for n in np.asarray(value).ravel())


def _product_shape(node, values):
    a, b = (np.asarray(v) for v in values[:2])
    if node.kind == "Gemm":
        rows = a.shape[1 if node.get("transA", 0) else 0]
        return rows, b.shape[0 if node.get("transB", 0) else 1]
    rows, columns = a.shape[-2:-1] or (1,), b.shape[-1:] if b.ndim > 1 else (1,)
    return (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *rows, *columns)


# Operators --------------------------------------------------------------------------------------


def _constant(node):
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if node.attributes.get(name) is not None:
            dtype = {"value_float": "float32", "value_floats": "float32"}.get(name)
            return np.asarray(node.attributes[name], dtype)
    raise NotRead("its value is no array of numbers")


def _of_shape(node, shape):
    shape = _sizes(shape)
    _room(shape)
    value = node.get("value")
    value = np.zeros(1, np.float32) if value is None else value
    return np.full(shape, value.ravel()[0], value.dtype)


def _shape(node, value):
    return _sizes_of(node, value.shape)


def _gather(node, value, index):
    axis = node.get("axis", 0)
    _room((*value.shape, *index.shape))
    return np.take(value, index, axis=axis)


def _concat(node, *values):
    return np.concatenate(values, axis=node.get("axis"))


def _slice(node, value, starts=None, ends=None, axes=None, steps=None):
    if starts is None:
        starts, ends, axes = node.get("starts"), node.get("ends"), node.get("axes")
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    key = [slice(None)] * value.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = value.shape[axis]
        start, end, step = int(start), int(end), int(step)
        start += size if start < 0 else 0
        end += size if end < 0 else 0
        if step < 0:
            start, end = min(start, size - 1), None if end < 0 else end
        else:
            start, end = max(start, 0), max(end, 0)
        key[axis] = slice(start, end, step)
    return value[tuple(key)]


def _cast(node, value):
    kind = _TYPES.get(node.get("to"))
    if kind is None:
        raise NotRead("it casts to a type that is not read")
    return value.astype(kind)


def _axes(node, axes):
    return node.get("axes") if axes is None else [int(a) for a in np.ravel(axes)]


def _unsqueeze(node, value, axes=None):
    return np.expand_dims(value, tuple(_axes(node, axes)))


def _squeeze(node, value, axes=None):
    axes = _axes(node, axes)
    return np.squeeze(value, None if axes is None else tuple(axes))


def _reshape(node, value, shape):
    sizes = [int(n) for n in np.ravel(shape)]
    if not node.get("allowzero", 0):
        sizes = [value.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return value.reshape([1 if n == BATCH else n for n in sizes])


def _flatten(node, value):
    axis = node.get("axis", 1)
    axis += value.ndim if axis < 0 else 0
    return value.reshape(size_of(value.shape[:axis]), -1)


def _transpose(node, value):
    return np.transpose(value, node.get("perm"))


def _range(node, start, limit, step):
    count = (float(limit) - float(start)) / float(step) if float(step) else math.inf
    if not math.isfinite(count):
        raise BadGraph("its step is zero, or its limits are no numbers")
    _room((max(math.ceil(count), 0),))
    return np.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _expand(node, value, shape):
    shape = np.broadcast_shapes(value.shape, _sizes(shape))
    _room(shape)
    return np.array(np.broadcast_to(value, shape))


def _tile(node, value, times):
    times = _sizes(times)
    _room([n * t for n, t in zip(value.shape, times, strict=True)])
    return np.tile(value, times)


def _binary(function):
    def fold(node, a, b):
        _room(np.broadcast_shapes(a.shape, b.shape))
        return np.asarray(function(a, b), a.dtype if function in _ARITHMETIC else None)

    return fold


def _divide(a, b):
    if a.dtype.kind not in "iu":
        return a / b
    if np.any(b == 0):
        raise BadGraph("it divides by zero")
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


def _modulo(node, a, b):
    if a.dtype.kind in "iu" and np.any(b == 0):
        raise BadGraph("it divides by zero")
    return np.fmod(a, b) if node.get("fmod", 0) else np.mod(a, b)


def _where(node, condition, a, b):
    _room(np.broadcast_shapes(condition.shape, a.shape, b.shape))
    return np.where(condition, a, b)


def _unary(function):
    return lambda node, a: np.asarray(function(a), a.dtype)


def _many(function):
    def fold(node, *values):
        _room(np.broadcast_shapes(*(v.shape for v in values)))
        found = values[0]
        for value in values[1:]:
            found = function(found, value)
        return found

    return fold


def _reduced(function):
    def fold(node, value, axes=None):
        axes = _axes(node, axes)
        if axes is None and node.get("noop_with_empty_axes", 0):
            return value
        axes = None if axes is None else tuple(axes)
        keep = bool(node.get("keepdims", 1))
        return np.asarray(function(value, axis=axes, keepdims=keep), value.dtype)

    return fold


def _split(node, value, sizes=None):
    axis, count = node.get("axis", 0), len(node.outputs)
    sizes = node.get("split") if sizes is None else sizes
    if sizes is None:
        width = -(-value.shape[axis] // count)
        places = [width * i for i in range(1, count)]
    else:
        places = np.cumsum([int(n) for n in sizes])[:-1]
    return np.split(value, places, axis=axis)


_ARITHMETIC = (np.add, np.subtract, np.multiply, _divide)
_FOLDS = {
    "Constant": _constant,
    "ConstantOfShape": _of_shape,
    "Shape": _shape,
    "Size": _shape,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Cast": _cast,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Range": _range,
    "Expand": _expand,
    "Tile": _tile,
    "Split": _split,
    "Where": _where,
    "Mod": _modulo,
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _binary(_divide),
    "Equal": _binary(np.equal),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Not": _unary(np.logical_not),
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
    "Sqrt": _unary(np.sqrt),
    "Floor": _unary(np.floor),
    "Ceil": _unary(np.ceil),
    "Identity": _unary(np.asarray),
    "Max": _many(np.maximum),
    "Min": _many(np.minimum),
    "ReduceProd": _reduced(np.prod),
    "ReduceMax": _reduced(np.max),
    "ReduceMin": _reduced(np.min),
}
# Results of these are no larger than their operands, products of matrices aside.
_BY_RUNTIME = (
    *("Exp", "Log", "Erf", "Tanh", "Sigmoid", "Relu", "Softmax", "LogSoftmax", "Softplus", "Pow"),
    *("Sin", "Cos", "Reciprocal", "Sign", "Round", "Clip", "Elu", "LeakyRelu", "HardSigmoid"),
    *("ReduceL1", "ReduceL2", "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceLogSumExp"),
    *("MatMul", "Gemm", "CumSum", "Trilu", "DequantizeLinear", "Sum", "Mean", "Dropout"),
)
