"""`export_onnx`: a model as an ONNX file of standard operators, checked against its program."""

import dataclasses
from pathlib import Path

import numpy as np

from tf_lyapunov import __version__
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.onnx import comparing, running
from tf_lyapunov.onnx.graph import BATCH, Graph
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.network import Network, read_network
from tf_lyapunov.program.restoring import leaves_unchanged
from tf_lyapunov.writing import writable_target, write_bytes

DEFAULT_OPSET, SMALLEST_OPSET = 17, 13
DTYPES = ("float32", "float64")
# What a protocol buffer can hold.
_LARGEST_FILE = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Exported:
    """A written ONNX file.

    Attributes:
        path: of the file.
        opset: version of the standard operators.
        dtype: `"float32"` or `"float64"`.
        inputs: dict of names and shapes; the first axis, the batch, is open.
        output: name of the output.
        digest: of the model, as certificates state it.
        agreement: `Agreement` of the file with the program.
        unsupported: operators that onnxruntime lacks in this dtype, so that it cannot run the file.
    """

    path: Path
    opset: int
    dtype: str
    inputs: dict
    output: str
    digest: str
    agreement: comparing.Agreement
    unsupported: tuple = ()

    def explain(self):
        """What was written and how it was checked."""
        lines = [
            f"Written to {self.path}: opset {self.opset}, {self.dtype}.",
            *(f"Input {name!r}: {shape}." for name, shape in self.inputs.items()),
            f"Output {self.output!r}.",
            self.agreement.sentence(),
        ]
        if self.unsupported:
            lines.append(
                f"onnxruntime has no {self.dtype} kernel for {', '.join(self.unsupported)} and "
                "cannot run this file; export in float32 if it must."
            )
        return "\n".join(lines)

    def record(self):
        """The same for programs, of JSON types."""
        return {
            "written": str(self.path),
            "opset": self.opset,
            "dtype": self.dtype,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "output": self.output,
            "model_digest": self.digest,
            "checked_by": self.agreement.evaluator,
            "probes": self.agreement.inputs,
            "operations": self.agreement.operations,
            "largest_difference": self.agreement.difference,
            "unsupported_by_onnxruntime": list(self.unsupported),
        }


@takes_networks
def export_onnx(model, path, *, dtype="float32", opset=DEFAULT_OPSET, input_shapes=None, rng=None):
    """Writes a model as an ONNX file that gives its outputs, and checks the file first.

    The file computes what the model's program computes, y = f(x): inputs keep Keras' layout and
    shape (with an open batch axis), integer inputs their type; casts to 16 bits are left out. Every
    weight is an explicit number, those of 1-Lipschitz layers too. The file is run on random probes
    and compared with the program in float64, operation by operation, within bounds on its rounding.
    Equal models give equal bytes.

    Args:
        model: a built Keras model that `read_network` can read, what `load_onnx` returns, or a
            `Network`.
        path: file name, ending in .onnx; written whole or not at all.
        dtype: `"float32"` or `"float64"`, of weights and arithmetic.
        opset: version of the standard operators, at least 13.
        input_shapes: list of shapes with the batch axis, one per input, that fix sizes which the
            model leaves open.
        rng: `numpy.random.Generator` for the probes, or None for one that cannot be foreseen.

    Returns:
        `Exported`.

    Raises:
        ImportError: without the packages `onnx` and `onnxruntime`.
        UnsupportedLayerError: naming every step that has no ONNX form.
        ValueError: for another dtype, opset or suffix, an open size, weights that do not fit.
        UnfaithfulExport: if the file computes something else; nothing is written.

    Example:

    >>> import tempfile
    >>> import keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="relu")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, folder + "/net.onnx").agreement.operations
    2

    Reference: ONNX operator specification; the check is translation validation.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"`path` must end in .onnx. Received: path={str(path)!r}.")
    _check_settings(dtype, opset)
    running.require()
    writable_target(path)
    network = model if isinstance(model, Network) else _read(model, input_shapes)
    inputs = _inputs(network)
    graph, records, output = write_program(network.program, inputs, dtype, opset)
    digest = network.digest()
    properties = {
        "tf_lyapunov.version": __version__,
        "tf_lyapunov.model_digest": digest,
        "tf_lyapunov.program_digest": network.program.digest(),
    }
    shape = (BATCH, *graph.sizes(output))
    file = running.model_of(graph, [output], network.model.name, properties, shape)
    data = running.serialized(file)
    if len(data) > _LARGEST_FILE:
        raise ValueError(
            f"An ONNX file holds 2 GB at most. Received: a model of {len(data) / 2**30:.1f} GB."
        )
    found, lacking = check(network.program, graph, records, output, file, rng)
    write_bytes(path, data)
    named = {name: (None, *shape) for name, (_, shape) in graph.inputs.items()}
    last = graph.labelled(output)
    return Exported(path, opset, dtype, named, last, digest, found, lacking)


def _check_settings(dtype, opset):
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be 'float32' or 'float64'. Received: dtype={dtype!r}.")
    if isinstance(opset, bool) or not isinstance(opset, (int, np.integer)):
        raise TypeError(f"`opset` must be an integer. Received: opset={opset!r}.")
    largest = running.largest_opset()
    if not SMALLEST_OPSET <= opset <= largest:
        raise ValueError(
            f"`opset` must be {SMALLEST_OPSET} to {largest}, which the installed onnx and "
            f"onnxruntime know. Received: opset={opset}."
        )


@leaves_unchanged
def _read(model, input_shapes):
    network = read_network(model, input_shapes, bounded=False)
    network.program.check_read()
    return network


def _inputs(network):
    """List of (name, shape of a sample, dtype) of a network's inputs."""
    names = Inputs.of(network.model).names
    tensors = network.graph.inputs
    if len(names) != len(tensors):
        names = tuple(t.producer for t in tensors)
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.size is None:
            raise ValueError(
                "An ONNX file is written for a known input size. Received: input "
                f"{name!r} of shape {tensor.shape}. Pass `input_shapes`, e.g. [(None, 28, 28, 1)]."
            )
    return [(n, t.shape[1:], t.dtype) for n, t in zip(names, tensors, strict=True)]


def write_program(program, inputs, dtype, opset):
    """A program as a graph of ONNX nodes.

    Args:
        program: `Program`.
        inputs: list of (name, shape of a sample, dtype), one per input of the program.
        dtype, opset: of the graph.

    Returns:
        `(graph, records, output)`: `Graph`, what `comparing.compare` reads, and the name of the
        output.

    Raises:
        UnsupportedLayerError: naming every step without an ONNX form.
    """
    program.check_read()
    graph = Graph(dtype, opset)
    names, records, refused = {}, [], []
    for key, (name, shape, kind) in zip(program.inputs, inputs, strict=True):
        names[key] = graph.input(name, shape, kind)
    for step in program.steps:
        lacking = [type(o).__name__ for o in step.operations if not o.has_writer]
        if lacking:
            refused.append(f"{step.name!r} ({', '.join(lacking)})")
    if refused:
        raise UnsupportedLayerError(
            "Only steps that this library evaluates itself have an ONNX form. Received: step "
            f"{', step '.join(refused)}. A layer of your own can be exported if its `call` is made "
            "of Keras layers and `keras.ops`."
        )
    for step in program.steps:
        graph.scope = step.name
        read = [names[n] for n in step.inputs]
        for operation in step.operations:
            name = graph.apply(operation, read)
            records.append([step.name, operation, tuple(read), name])
            read = [name]
        graph.label(read[0], step.name)
        names[step.name] = read[0]
    graph.scope = ""
    output = graph.output(names[program.output])
    for record in records:
        record.append(graph.labelled(graph.beneath(record[3])[0]))
    return graph, records, output


def check(program, graph, records, output, file, rng=None):
    """Runs a file on probes and compares it with its program; see `comparing`.

    Returns:
        `(Agreement, operators that onnxruntime lacks)`.

    Raises:
        UnfaithfulExport: naming the first step that differs.
    """
    rng = np.random.default_rng() if rng is None else rng
    kinds = list(graph.inputs.items())
    drawn = comparing.probes([(shape, kind) for _, (kind, shape) in kinds], rng)
    fed = dict(zip(graph.inputs, drawn, strict=True))
    precision = comparing.precision_of(graph.dtype)
    seen = [n for _, _, read, last, _ in records for n in (*read, last)]
    beneath = sorted({graph.beneath(n)[0] for n in seen} | {output})
    run, evaluator, lacking = running.runner(graph, beneath)
    values = run(fed)
    for name in seen:
        base, axes = graph.beneath(name)
        if axes is not None:
            values[name] = np.transpose(values[base], axes)
    count = comparing.compare(records, values, precision)
    alone = values[output]
    whole = running.outputs(file, fed, lacking)
    comparing.check_same(alone, whole, graph.dtype, "the whole file")
    one = running.outputs(file, {n: x[1:2] for n, x in fed.items()}, lacking)
    comparing.check_same(whole[1:2], one, graph.dtype, "a batch of one")
    exact = _evaluated(program, [fed[n] for n in graph.inputs])
    finite = np.isfinite(exact) & np.isfinite(whole)
    difference = float(np.max(np.abs(exact - whole)[finite], initial=0.0))
    return comparing.Agreement(evaluator, len(drawn[0]), count, difference), lacking


def _evaluated(program, arrays):
    """The program's output in float64, a final softmax included."""
    whole = dataclasses.replace(program, decision=None)
    return whole.evaluate([np.asarray(a, np.float64) for a in arrays], (program.output,))[1][
        program.output
    ]
