"""Networks that PyTorch's exporters write, old and new, mean what PyTorch computes."""

import keras
import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting from PyTorch needs torch")
pytest.importorskip("onnxscript", reason="PyTorch's exporter needs onnxscript")

from pytorch_networks import NETWORKS, exported

from tf_lyapunov.onnx.load import load_onnx

QUICK = ("multilayer perceptron", "small ResNet")


def _means_the_same(name, path, **options):
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
