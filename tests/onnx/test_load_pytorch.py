"""Networks that PyTorch's exporters write, old and new, mean what PyTorch computes."""

import keras
import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting from PyTorch needs torch")
pytest.importorskip("onnxscript", reason="PyTorch's exporter needs onnxscript")

import onnx
from pytorch_networks import NETWORKS, exported, written
from test_load_tools import MATLAB

from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.onnx.load import load_onnx

QUICK = ("multilayer perceptron", "small ResNet")


def _means_the_same(name, path, **options):
    if options == {"dynamo": False}:
        data, inputs, outputs = written(name)
        path.write_bytes(data)
    else:
        _, inputs, outputs = exported(name, path, **options)
    program = load_onnx(path)
    model = program.to_keras()
    if not options.get("dynamic", True):
        assert program.inputs[0].shape[0] is None
    own = keras.ops.convert_to_numpy(model(inputs if len(inputs) > 1 else inputs[0]))
    assert own.shape == outputs.shape
    assert np.abs(own - outputs).max() <= 1e-4 * (1 + np.abs(outputs).max())
    logits = program.program.evaluate(inputs)[0]
    if program.program.decision is None:
        assert np.abs(logits - outputs.reshape(logits.shape)).max() <= 1e-4 * (
            1 + np.abs(outputs).max()
        )
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_the_old_exporter_is_read(name, tmp_path):
    _means_the_same(name, tmp_path / "net.onnx", dynamo=False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NETWORKS]
)
def test_a_network_of_the_new_exporter_is_read(name, tmp_path):
    _means_the_same(name, tmp_path / "net.onnx", dynamo=True)


@pytest.mark.parametrize("name", ["LeNet", "mixer"])
def test_a_network_that_is_exported_for_one_sample_is_read_for_many(name, tmp_path):
    _means_the_same(name, tmp_path / "net.onnx", dynamo=False, dynamic=False)


def test_layers_are_named_after_the_nodes_of_the_file_and_can_be_trained(tmp_path):
    model = _means_the_same("small ResNet", tmp_path / "net.onnx", dynamo=False)
    names = [layer.name for layer in model.layers if layer.weights]
    assert names == ["stem_Conv", "block_first_Conv", "block_second_Conv", "head_Gemm"]
    assert len(model.trainable_variables) == 8


def test_weights_beside_the_file_are_read(tmp_path):
    """The new exporter writes them so where they are large."""
    import torch

    network = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.ReLU(), torch.nn.Linear(60, 2))
    x = torch.randn(2, 40)
    path = tmp_path / "net.onnx"
    torch.onnx.export(network, (x,), str(path), dynamo=True, external_data=True, verbose=False)
    assert (tmp_path / "net.onnx.data").exists()
    program = load_onnx(path, batch_axis=0)
    own = keras.ops.convert_to_numpy(program.to_keras()(x.numpy()))
    assert np.abs(own - network(x).detach().numpy()).max() < 1e-5


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "shape, size",
    [((1, 5, 4), 5), pytest.param((1, 2, 6, 7), 3, marks=SLOW),
     pytest.param((1, 5, 2, 3, 2), 3, marks=SLOW)],
)  # fmt: skip
def test_a_local_response_normalization_of_the_new_exporter_is_read_whole(tmp_path, shape, size):
    import torch

    layer = torch.nn.LocalResponseNorm(size, alpha=0.3, beta=0.6, k=1.5)
    parts = [torch.nn.Conv2d(2, 5, 3), layer] if len(shape) == 4 else [torch.nn.Tanh(), layer]
    network, x = torch.nn.Sequential(*parts).eval(), torch.randn(*shape)
    path = tmp_path / "net.onnx"
    torch.onnx.export(network, (x,), str(path), dynamo=True, verbose=False)
    program = load_onnx(path)
    own = keras.ops.convert_to_numpy(program.to_keras()(x.numpy()))
    assert np.abs(own - network(x).detach().numpy()).max() < 1e-5
    kinds = [type(layer).__name__ for layer in program.to_keras().layers]
    assert kinds.count("LocalResponseNormalization") == 1
    assert 0 < lipschitz_upper_bound(program).gain_upper_bound < np.inf


def test_the_old_exporters_choice_of_branches_is_refused_by_name(tmp_path):
    """It writes an `If` into local response normalizations."""
    import torch

    path = tmp_path / "net.onnx"
    layer = torch.nn.LocalResponseNorm(3)
    torch.onnx.export(layer, (torch.randn(1, 4, 3, 3),), str(path), dynamo=False, verbose=False)
    with pytest.raises(UnsupportedLayerError, match="Mul"):
        load_onnx(path)


def test_an_even_window_of_channels_is_refused_by_name(tmp_path):
    import torch

    path = tmp_path / "net.onnx"
    layer = torch.nn.LocalResponseNorm(2)
    torch.onnx.export(layer, (torch.randn(1, 4, 3, 3),), str(path), dynamo=False, verbose=False)
    with pytest.raises(UnsupportedLayerError, match=r"Pow|Div|Mul|product"):
        load_onnx(path)


# What the reader is for, each in two networks at least: operators, and settings of them.
COVERED = [
    "Gemm", "MatMul + Add", "Conv", "Conv group", "Conv dilations", "Conv auto_pad",
    "ConvTranspose", "ConvTranspose group", "BatchNormalization", "MaxPool", "MaxPool ceil_mode",
    "AveragePool", "AveragePool count_include_pad", "GlobalAveragePool", "Pad", "Resize",
    "Reshape", "Flatten", "Transpose", "Slice", "Gather", "Split", "Concat", "Sub constant",
    "Mul constant", "Div constant", "ReduceMean", "Softmax", "LogSoftmax", "LayerNormalization",
    "LRN", "Clip", "Max", "Min", "Einsum", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu",
    "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Softplus", "Tanh",
]  # fmt: skip


def covered(graph):
    """Operators of a graph, and which of their settings it uses."""
    held = {c.name for c in graph.initializer}
    held.update(o for n in graph.node if n.op_type == "Constant" for o in n.output)
    givers = {name: node.op_type for node in graph.node for name in node.output}
    found = set()
    for node in graph.node:
        kind = node.op_type
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        found.add(kind)
        if kind in ("Sub", "Mul", "Div") and held.intersection(node.input):
            found.add(f"{kind} constant")
        if kind == "Add" and any(givers.get(name) == "MatMul" for name in node.input):
            found.add("MatMul + Add")
        for name, default in (("group", 1), ("ceil_mode", 0), ("count_include_pad", 0),
                              ("auto_pad", b"NOTSET")):  # fmt: skip
            if given.get(name, default) != default:
                found.add(f"{kind} {name}")
        if any(n > 1 for n in given.get("dilations", ())):
            found.add(f"{kind} dilations")
    return found


def test_thirty_networks_hold_every_operator_twice():
    graphs = [onnx.load_from_string(written(name)[0]).graph for name in NETWORKS]
    assert len(graphs) >= 30
    graphs += [made().graph for made in MATLAB.values()]
    counts = dict.fromkeys(COVERED, 0)
    for graph in graphs:
        for name in covered(graph).intersection(counts):
            counts[name] += 1
    assert {name: count for name, count in counts.items() if count < 2} == {}
