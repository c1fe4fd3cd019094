"""ONNX model files from graphs, and what runs them: onnxruntime, or the reference evaluator."""

import contextlib
import re

import numpy as np

from tf_lyapunov import __version__
from tf_lyapunov.errors import UnfaithfulExport
from tf_lyapunov.onnx.graph import BATCH


def require():
    """Imports `onnx` and `onnxruntime`.

    Raises:
        ImportError: naming the extra.
    """
    try:
        import onnx
        import onnx.reference
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "ONNX files need the packages `onnx` and `onnxruntime`. Received: "
            f"{error}. Install them: pip install tf_lyapunov[onnx]"
        ) from error
    return onnx, onnxruntime


def largest_opset():
    """The newest version of the standard operators that both packages know and were tried."""
    onnx, _ = require()
    return min(onnx.defs.onnx_opset_version(), 23)


def model_of(graph, outputs, name, properties=None, shape=None):
    """The `onnx.ModelProto` of a graph; with a shape, `onnx.checker` checks all of it.

    Args:
        graph: `Graph`.
        outputs: list of names of signals that are no views.
        name: of the model.
        properties: dict of texts.
        shape: of the outputs, or None where it is left open.
    """
    onnx, _ = require()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, constants = graph.needed(outputs)

    def typed(name, dtype, shape):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, kind, shape)

    made = helper.make_graph(
        [_node(onnx, node) for node in nodes],
        name,
        [typed(n, kind, (BATCH, *shape)) for n, (kind, shape) in graph.inputs.items()],
        [typed(graph.labelled(n), graph.dtype, shape) for n in outputs],
        [numpy_helper.from_array(array, n) for n, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", graph.opset)]
    model = helper.make_model(
        made,
        producer_name="tf_lyapunov",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    helper.set_model_props(model, properties or {})
    if shape is not None:
        with _accepting("onnx.checker"):
            onnx.checker.check_model(model, full_check=True)
    return model


@contextlib.contextmanager
def _accepting(judge):
    """What fails within is a file that would be wrong."""
    try:
        yield
    except (MemoryError, UnfaithfulExport):
        raise
    except Exception as error:  # each of the two packages has a dozen kinds of its own
        raise UnfaithfulExport(
            f"{judge} must accept the ONNX file. Received: {type(error).__name__}: "
            f"{str(error).strip()[:500]} Nothing was written. Please report this model, with the "
            "versions of onnx and onnxruntime."
        ) from error


def _node(onnx, node):
    attributes = dict(node.attributes)
    if node.kind == "Cast":
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(attributes["to"]))
        attributes["to"] = int(kind)
    for key, value in attributes.items():
        if isinstance(value, tuple):
            attributes[key] = [int(v) for v in value]
    return onnx.helper.make_node(
        node.kind, list(node.inputs), list(node.outputs), name=node.name, **attributes
    )


def serialized(model):
    """Bytes that are equal for equal models."""
    return model.SerializeToString(deterministic=True)


def runner(graph, names):
    """What gives the signals of a graph, node by node.

    Args:
        graph: `Graph`.
        names: of signals that are no views.

    Returns:
        `(function, evaluator, lacking)`: a function of a dict of inputs that gives a dict of
        float64 arrays by name, what evaluates, and the operators that onnxruntime lacks.
    """
    _, onnxruntime = require()
    given = [n for n in names if n in graph.inputs]
    asked = [n for n in names if n not in graph.inputs]
    model = model_of(graph, asked, "checked") if asked else None

    def values(fed, found):
        values = {n: np.asarray(fed[n], np.float64) for n in given}
        return values | {n: np.asarray(a, np.float64) for n, a in zip(asked, found, strict=True)}

    labels = [graph.labelled(n) for n in asked]
    lacking = _lacking(model) if asked else ()
    version = f"onnxruntime {onnxruntime.__version__}"
    if lacking:
        onnx, _ = require()
        version = f"the reference evaluator of onnx {onnx.__version__}"
    return lambda fed: values(fed, _run(model, labels, fed, lacking, False)), version, lacking


def outputs(model, fed, lacking=()):
    """float64 array of a file's one output."""
    (output,) = model.graph.output
    return np.asarray(_run(model, [output.name], fed, lacking, True)[0], np.float64)


def _session(model, optimized):
    _, onnxruntime = require()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not optimized:
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _lacking(model):
    """The first operator for which onnxruntime has no kernel in the model's format, if any."""
    _, onnxruntime = require()
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        with _accepting("onnxruntime"):
            _session(model, False)
    except UnfaithfulExport as error:
        if not isinstance(error.__cause__, errors.NotImplemented):
            raise
        found = re.search(r"implementation for (\w+)\(", str(error))
        return (found[1] if found else "an operator",)
    return ()


def _run(model, names, fed, lacking, optimized):
    onnx, _ = require()
    if lacking:
        with np.errstate(all="ignore"), _accepting("The reference evaluator of onnx"):
            return onnx.reference.ReferenceEvaluator(model, new_ops=[_erf()]).run(names, fed)
    with _accepting("onnxruntime"):
        return _session(model, optimized).run(names, fed)


def _erf():
    """The error function for the reference evaluator, whose own computes in float32."""
    from onnx.reference.op_run import OpRun

    class Erf(OpRun):
        op_domain = ""

        def _run(self, x):
            from scipy.special import erf

            return (erf(x).astype(x.dtype),)

    return Erf
