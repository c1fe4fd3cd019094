"""Networks that a property file may be about: what decides, and what answers are replayed by."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tf_lyapunov import modelfile

_FLOATS = ("float16", "float32", "float64")


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A network with one input and one output, in the order of a property file.

    Attributes:
        model: the Keras model that is bounded and attacked.
        shape: of one input of it, without the batch.
        dtype: NumPy type of its inputs.
        replay: outputs for one input as the network's own runtime gives them, float64 (outputs,)
            for an array (inputs,) of this type; None where the model is that.
        runtime: its name, in words.
    """

    model: object
    shape: tuple
    dtype: np.dtype
    replay: Callable | None
    runtime: str


def open_subject(path):
    """The network of an `.onnx` or `.keras` file as a `Subject`.

    An ONNX file is read as a Keras model of the same weights, and onnxruntime replays answers on
    the file itself.

    Args:
        path: file name.

    Raises:
        ValueError: for another kind of file, several inputs or outputs, or open sizes.
        ModelFileError: if it cannot be read.
        ImportError: for an ONNX file without the extra `onnx`.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        from tf_lyapunov.onnx.load import load_onnx

        return subject_of(load_onnx(path).keras_model, onnx_replay(path))
    if path.suffix != ".keras":
        raise ValueError(f"A network is an .onnx or a .keras file. Received: {path}.")
    return subject_of(modelfile.load_model(path))


def subject_of(model, replay=None):
    """A Keras model as a `Subject`."""
    inputs, outputs = model.inputs, model.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            "A property is about a network with one input and one output. Received: "
            f"{len(inputs)} inputs and {len(outputs)} outputs."
        )
    shape = tuple(inputs[0].shape[1:])
    if any(n is None for n in (*shape, *outputs[0].shape[1:])):
        raise ValueError(
            "A property is about a network whose sizes are known. Received: inputs of shape "
            f"{shape}, outputs of shape {tuple(outputs[0].shape[1:])}."
        )
    dtype = str(inputs[0].dtype)
    if dtype not in _FLOATS:
        raise ValueError(
            f"A property is about inputs of the types {', '.join(_FLOATS)}. Received: {dtype}."
        )
    runtime = "Keras" if replay is None else "onnxruntime"
    return Subject(model, shape, np.dtype(dtype), replay, runtime)


def onnx_replay(path):
    """Function that runs an ONNX file in onnxruntime: float64 (outputs,) for an array (inputs,)."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "Answers about ONNX files are replayed by onnxruntime. Install it with: "
            "pip install 'tf_lyapunov[onnx]'"
        ) from error
    from tf_lyapunov.onnx.agreement import narrowed
    from tf_lyapunov.onnx.opening import open_onnx

    graph = open_onnx(path)
    model = narrowed(graph.model, [value.name for value in graph.outputs])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises many kinds of its own
        raise ValueError(
            f"onnxruntime does not open the network ({type(error).__name__}). Received: {path}."
        ) from error
    given, found = session.get_inputs(), session.get_outputs()
    if len(given) != 1 or len(found) != 1:
        raise ValueError(
            "A property is about a network with one input and one output. Received: "
            f"{len(given)} inputs and {len(found)} outputs, in {path}."
        )
    # Whatever the file leaves open is the batch.
    shape = tuple(n if isinstance(n, int) else 1 for n in given[0].shape)

    def run(x):
        if x.size != math.prod(shape):
            raise ValueError(
                f"onnxruntime needs {math.prod(shape)} inputs. Received: {x.size}, for {path}."
            )
        [y] = session.run(None, {given[0].name: x.reshape(shape)})
        return np.asarray(y, np.float64).ravel()

    return run
