"""Networks from ONNX files."""

import functools

from tf_lyapunov.onnx import agreement, building
from tf_lyapunov.onnx.foreign import OnnxGraph
from tf_lyapunov.onnx.opening import open_onnx
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes


class OnnxProgram:
    """A network that was read from an ONNX file; see `load_onnx`.

    `certify`, `lipschitz_upper_bound`, the attacks, `bracket`, `verify_property`, `output_bounds`,
    `gain_on`, `localized_robustness` and `minimal_perturbation_lower_bound` take it in the place of
    a model.

    Attributes:
        path: str, of the file.
        keras_model: the Keras model that they read; do not train it, `to_keras()` makes others.
        inputs, outputs: tuples of ports with `name`, `shape` (as in the file, None for the axis
            that counts samples), `sample_shape`, `dtype` and `batch`.
        opset: version of ONNX's operator set.
        producer: name of the tool that wrote the file.
        validation: what was compared with onnxruntime, with `inputs` and `values`.
    """

    def __init__(self, path, graph: OnnxGraph, settings, built, network, validation):
        self.path = str(path)
        self.keras_model = built.model
        self.inputs, self.outputs = built.inputs, built.outputs
        self.opset, self.producer = graph.opset, graph.producer
        self.validation = validation
        self._graph, self._settings, self._network = graph, settings, network

    @functools.cached_property
    def program(self):
        """The `Program`: steps in float64 that bounds and certificates read."""
        return self._network.program

    def to_keras(self):
        """A new Keras model of this network, with the file's weights, to be trained.

        Its layers are named after the file's nodes. Signals keep the file's shapes, the number of
        samples aside; convolutions have their channels last, behind `Permute` layers.
        """
        return building.build(self._graph, **self._settings).model

    def __repr__(self):
        def shown(ports):
            return ", ".join(f"{p.name}{list(p.shape)}" for p in ports)

        return (
            f"OnnxProgram({shown(self.inputs)} -> {shown(self.outputs)}, "
            f"{len(self._graph.nodes)} nodes, opset {self.opset})"
        )


def load_onnx(path, *, batch_axis="auto", input_shapes=None, output=None):
    """Reads a network from an ONNX file, and compares what was read with onnxruntime.

    The graph becomes a Keras model of ordinary layers and operations, whose float64 `Program`
    bounds and certificates read. Every value within the graph is compared with onnxruntime's on
    random probes of several scales, within a proven bound on the rounding of the steps between two
    of them: a check of the reading, not a proof. Inputs and outputs keep the file's shapes and
    order of axes.

    Args:
        path: of the file; data beside it must lie in its folder.
        batch_axis: position of the axis that counts samples, None where the whole input is one
            sample, or `"auto"`: the first axis where it is open or of size one, none where the
            input is one vector.
        input_shapes: dict from names of inputs to shapes with the batch axis, for sizes that the
            file leaves open.
        output: name of the output to read where the graph has several.

    Returns:
        `OnnxProgram`.

    Raises:
        ModelFileError: the file is truncated, hostile or contradicts itself.
        UnsupportedLayerError: naming every node that is not read, with its operator set; or every
            layer without a proven gain.
        UnfaithfulReading: onnxruntime contradicts what was read, naming the first node that
            differs.
        ValueError: an argument does not fit the graph, or sizes are left open.
        ImportError: naming the extra, where onnx or onnxruntime is missing.

    Example:

    >>> import onnx, tempfile, pathlib
    >>> graph = onnx.parser.parse_graph('''
    ...     net (float[N, 3] x) => (float[N, 2] y)
    ...     <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { z = MatMul(x, w)  y = Relu(z) }''')
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name, "net.onnx")
    >>> onnx.save(onnx.helper.make_model(graph, ir_version=8), path)
    >>> load_onnx(path)
    OnnxProgram(x[None, 3] -> y[None, 2], 2 nodes, opset 28)

    Reference: ONNX operator specifications, https://onnx.ai/onnx/operators/.
    """
    settings = {"batch_axis": batch_axis, "input_shapes": input_shapes, "output": output}
    graph = open_onnx(path)
    built = building.build(graph, **settings)
    network = read_network(built.model, bounded=False)
    validation = agreement.compare(graph, built, network, built.fixed)
    validate_on_probes(network)
    return OnnxProgram(path, graph, settings, built, network, validation)


__all__ = ["OnnxProgram", "load_onnx"]
