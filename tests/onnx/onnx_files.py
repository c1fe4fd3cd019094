"""Makes small ONNX files, and runs files by onnxruntime."""

import numpy as np
import onnx
from onnx import helper

TYPES = {"float32": 1, "float64": 11, "int64": 7, "uint8": 2}


def constant(name, value):
    """An initialiser."""
    return onnx.numpy_helper.from_array(np.asarray(value), name)


def model(nodes, inputs, outputs, constants=(), *, opset=17, declared=()):
    """A `ModelProto`.

    Args:
        nodes: list of nodes of `helper.make_node`.
        inputs: dict from names to shapes, or to (shape, dtype).
        outputs: names, or a dict from names to shapes.
        constants: dict from names to arrays.
        opset: version of ONNX's operator set.
        declared: value infos of values within.
    """
    found = []
    for name, shape in inputs.items():
        dtype = "float32"
        if shape and isinstance(shape[-1], str) and shape[-1] in TYPES:
            shape, dtype = shape
        found.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
    ends = []
    for name in outputs:
        shape = outputs[name] if isinstance(outputs, dict) else None
        dtype = next(iter(inputs.values()))
        kind = TYPES.get(dtype[-1] if dtype else None, 1) if isinstance(dtype[-1], str) else 1
        ends.append(helper.make_tensor_value_info(name, kind, shape))
    held = [constant(n, v) for n, v in dict(constants).items()]
    graph = helper.make_graph(nodes, "net", found, ends, held, value_info=list(declared))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(folder, proto, name="net.onnx"):
    """The path of a saved model."""
    path = folder / name
    onnx.save(proto, path)
    return path


def run(path, *arrays, output=None):
    """onnxruntime's results, sample by sample where the file fixes one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = session.get_inputs()
    wanted = None if output is None else [output]
    if given[0].shape and given[0].shape[0] == 1:
        rows = [
            session.run(wanted, {g.name: a[i : i + 1] for g, a in zip(given, arrays, strict=True)})
            for i in range(len(arrays[0]))
        ]
        return np.concatenate([row[0] for row in rows])
    return session.run(wanted, {g.name: a for g, a in zip(given, arrays, strict=True)})[0]


def form(path):
    """What a file computes, names aside: its nodes in order, with their constants."""
    graph = onnx.load(path).graph
    held = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    numbers = {}

    def shown(name):
        if name in held:
            return held[name].dtype.name, held[name].shape, held[name].tobytes()
        return numbers.setdefault(name, len(numbers)) if name else ""

    found = [(shown(i.name), i.type.SerializeToString()) for i in graph.input]
    for node in graph.node:
        attributes = sorted(a.SerializeToString() for a in node.attribute)
        ends = [tuple(map(shown, names)) for names in (node.input, node.output)]
        found.append((node.op_type, *ends, attributes))
    return found
