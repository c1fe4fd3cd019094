"""Opening an ONNX file without trusting what it declares.

What the file says of sizes is compared with what it holds, and with memory, before anything of that
size is allocated. Data beside the file must lie in its folder.
"""

import contextlib
import importlib
import math
from pathlib import Path

import numpy as np

from tf_lyapunov.errors import ModelFileError
from tf_lyapunov.modelfile import sizes
from tf_lyapunov.onnx.foreign import BadGraph, Declared, OnnxGraph, OnnxNode, first_line

# A serialised message, which onnxruntime takes, is no larger.
_LARGEST = 2**31 - 1
# What a file's values may take beside the file itself: the message, the arrays, the session.
_COPIES = 4
# Oldest operator set that onnxruntime runs.
OLDEST_OPSET = 7
# ONNX's number of a type: NumPy's name, and the field that holds values that are not raw bytes.
_TYPES = {
    1: ("float32", "float_data"),
    2: ("uint8", "int32_data"),
    3: ("int8", "int32_data"),
    4: ("uint16", "int32_data"),
    5: ("int16", "int32_data"),
    6: ("int32", "int32_data"),
    7: ("int64", "int64_data"),
    9: ("bool", "int32_data"),
    10: ("float16", "int32_data"),
    11: ("float64", "double_data"),
    12: ("uint32", "uint64_data"),
    13: ("uint64", "uint64_data"),
}
_GRAPHS = ("graph", "graphs")


def packages():
    """`(onnx, onnxruntime)`, or an error that names the extra."""
    try:
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(
            "Reading ONNX files needs the packages onnx and onnxruntime. Received: an installation "
            "without them. Install them by `pip install tf_lyapunov[onnx]`."
        ) from error


def open_onnx(path):
    """A checked graph of an ONNX file.

    Args:
        path: of the file.

    Returns:
        `OnnxGraph`.

    Raises:
        ModelFileError: the file is missing, truncated or no ONNX file; it asks for more than it
            holds or than memory has; its data lie outside its folder; its graph has a cycle, nodes
            out of order, a name twice or a value that nothing gives; it holds functions.
        ImportError: naming the extra, where onnx or onnxruntime is missing.
    """
    onnx, _ = packages()
    path = Path(path)
    if not path.is_file():
        refuse(path, "there is no such file")
    memory = sizes.available_memory()
    size = path.stat().st_size
    if size > _LARGEST or (memory is not None and _COPIES * size > memory):
        refuse(path, f"its {size} bytes are more than can be read here")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own kinds differ by its implementation
        refuse(path, "it is truncated or no ONNX file", error)
    try:
        return _graph(onnx, model, path, memory)
    except BadGraph as error:
        refuse(path, str(error), error)


def refuse(path, reason, error=None):
    """Raises a `ModelFileError` about a file."""
    raise ModelFileError(
        f"The ONNX file is refused: {reason}. Received: {path}. Export the network once more, or "
        "correct the file."
    ) from error


def _graph(onnx, model, path, memory):
    if not model.HasField("graph") or (not model.graph.node and not model.graph.output):
        raise BadGraph("it holds no graph, hence is truncated or no ONNX file")
    opset = _opset(model)
    if model.functions:
        raise BadGraph(
            "it holds functions of its own, which are not read; replace their calls first, by "
            "`onnx.inliner.inline_local_functions`"
        )
    graph = model.graph
    if graph.sparse_initializer:
        raise BadGraph("it holds sparse constants, which are not read")
    _bring_inside(model, path, memory)
    constants = {}
    for tensor in graph.initializer:
        if tensor.name in constants or not tensor.name:
            raise BadGraph(f"the constant {tensor.name!r} is there twice, or has no name")
        constants[tensor.name] = array_of(tensor, onnx)
    inputs = tuple(_declared(v) for v in graph.input if v.name not in constants)
    outputs = tuple(_declared(v) for v in graph.output)
    nodes = tuple(_nodes(onnx, graph.node, opset))
    _check_order(nodes, constants, inputs, outputs)
    if all(node.since is not None for node in nodes):
        _check(onnx, model)
    values = (_declared(v) for v in graph.value_info)
    declared = {v.name: v.shape for v in (*values, *outputs) if v.shape is not None}
    return OnnxGraph(nodes, constants, inputs, outputs, declared, opset, model.producer_name, model)


def _opset(model):
    found = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(found) != 1:
        raise BadGraph("it does not state the version of ONNX's operator set once")
    if found[0] < OLDEST_OPSET:
        raise BadGraph(
            f"it uses operator set {found[0]}, older than {OLDEST_OPSET}, which onnxruntime does "
            "not run; convert it by `onnx.version_converter`"
        )
    return found[0]


def _check(onnx, model):
    # An output without a shape is legal elsewhere, and its shape is found here.
    types = [v.type.tensor_type for v in model.graph.output if v.type.HasField("tensor_type")]
    bare = [t for t in types if not t.HasField("shape")]
    for tensor in bare:
        tensor.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, and others from below
        raise BadGraph(f"ONNX's own checker says: {first_line(error)}") from error
    finally:
        for tensor in bare:
            tensor.ClearField("shape")


# Values -----------------------------------------------------------------------------------------


def _bring_inside(model, path, memory):
    """Reads data that lie beside the file into the message."""
    folder, total = path.resolve().parent, model.ByteSize()
    for tensor in _tensors(model.graph):
        if tensor.data_location != 1:  # TensorProto.EXTERNAL
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        try:
            # A link, or `..`, may lead out of the folder.
            file = (folder / location).resolve()
            missing = not file.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, links around
            raise BadGraph(
                f"{location[:80]!r}, where the data of {tensor.name!r} lie, is no path"
            ) from error
        if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise BadGraph(
                f"the data of {tensor.name!r} lie outside its folder ({location!r}); move them "
                "beside the file"
            )
        if missing:
            raise BadGraph(f"the file {location!r} with the data of {tensor.name!r} is missing")
        count, itemsize = _count(tensor), np.dtype(_kind(tensor)[0]).itemsize
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", count * itemsize))
        except ValueError as error:
            raise BadGraph(f"where the data of {tensor.name!r} lie is no number") from error
        if length != count * itemsize or offset < 0 or offset + length > file.stat().st_size:
            raise BadGraph(
                f"{tensor.name!r} declares {count} values, and its data are not there in "
                f"{location!r}"
            )
        total += length
        if total > _LARGEST or (memory is not None and _COPIES * total > memory):
            raise BadGraph(f"its {total} bytes are more than can be read here")
        with file.open("rb") as held:
            held.seek(offset)
            tensor.raw_data = held.read(length)
        tensor.ClearField("external_data")
        tensor.data_location = 0


def _tensors(graph):
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _count(tensor):
    if any(n < 0 for n in tensor.dims):
        raise BadGraph(f"the constant {tensor.name!r} has a negative size")
    return math.prod(tensor.dims)


def _kind(tensor):
    if tensor.data_type not in _TYPES:
        raise BadGraph(
            f"the constant {tensor.name!r} has a type that is not read (number "
            f"{tensor.data_type} of TensorProto.DataType)"
        )
    return _TYPES[tensor.data_type]


def array_of(tensor, onnx):
    """The values of a `TensorProto` whose declared size is what it holds."""
    count, (dtype, field) = _count(tensor), _kind(tensor)
    held = len(tensor.raw_data) / np.dtype(dtype).itemsize
    if not tensor.HasField("raw_data"):
        held = len(getattr(tensor, field))
    if held != count:
        raise BadGraph(
            f"the constant {tensor.name!r} of shape {tuple(tensor.dims)} declares {count} values "
            f"and holds {held:g}"
        )
    array = np.array(onnx.numpy_helper.to_array(tensor))
    array.setflags(write=False)
    return array


def _declared(value):
    if value.type.HasField("tensor_type"):
        tensor = value.type.tensor_type
        dtype = _TYPES.get(tensor.elem_type, (f"type {tensor.elem_type}",))[0]
        if not tensor.HasField("shape"):
            return Declared(value.name, None, dtype)
        sizes_ = []
        for dim in tensor.shape.dim:
            known = dim.HasField("dim_value")
            sizes_.append(int(dim.dim_value) if known else dim.dim_param or None)
        return Declared(value.name, tuple(sizes_), dtype)
    return Declared(value.name, None, "no tensor")


# Nodes ------------------------------------------------------------------------------------------


def _nodes(onnx, found, opset):
    for node in found:
        domain = "" if node.domain == "ai.onnx" else node.domain
        name = node.name or f"{node.op_type}:{next(iter(node.output), '')}"
        yield OnnxNode(
            name,
            node.op_type,
            domain,
            tuple(node.input),
            tuple(node.output),
            dict(_attributes(onnx, node, name)),
            _since(onnx, node.op_type, domain, opset),
        )


def _since(onnx, kind, domain, opset):
    if domain:
        return None
    with contextlib.suppress(Exception):  # onnx raises its own kind for what it does not know
        schema = onnx.defs.get_schema(kind, opset, domain)
        return schema.since_version
    return None


def _attributes(onnx, node, name):
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            raise BadGraph(f"node {name!r} refers to an attribute of a function")
        if attribute.HasField("g") or attribute.graphs:
            yield attribute.name, _GRAPHS
        elif attribute.HasField("t"):
            yield attribute.name, array_of(attribute.t, onnx)
        elif attribute.tensors or attribute.HasField("sparse_tensor"):
            yield attribute.name, None
        else:
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], bytes):
                value = [v.decode("utf-8", "replace") for v in value]
            elif not isinstance(value, (int, float, str)):
                value = list(value)
            yield attribute.name, value


def _check_order(nodes, constants, inputs, outputs):
    """Every value is given once, before it is read."""
    given = {v.name for v in inputs} | set(constants)
    if len({v.name for v in inputs}) != len(inputs):
        raise BadGraph("an input is there twice")
    later = {}
    for i, node in enumerate(nodes):
        for output in filter(None, node.outputs):
            if output in later or output in given:
                raise BadGraph(f"the value {output!r} is given twice")
            later[output] = i
    known = set(given)
    for node in nodes:
        for name in filter(None, node.inputs):
            if name in known:
                continue
            if name in later:
                raise BadGraph(
                    f"{node.what} reads {name!r} before it is given: its nodes have a cycle or are "
                    "out of order; sort them"
                )
            raise BadGraph(
                f"{node.what} reads {name!r}, which is no input, no constant and no result"
            )
        known.update(filter(None, node.outputs))
    for output in outputs:
        if output.name not in known:
            raise BadGraph(f"the output {output.name!r} is given by nothing")
    if not outputs:
        raise BadGraph("it has no output")
