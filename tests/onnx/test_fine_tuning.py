"""What was read of a file is an ordinary model: constrained, trained, certified, written again."""

import keras
import numpy as np
import pytest
from onnx import helper
from onnx_files import model, run, saved

import tf_lyapunov as tfl

pytest.importorskip("onnxruntime")


@pytest.fixture
def path(tmp_path):
    """An image network whose gain is far above one."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["c"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="bend"),
        helper.make_node("Flatten", ["r"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w", "d"], ["y"], name="/head/head.0/Gemm", transB=1),
    ]
    held = {"k": rng.normal(size=(3, 1, 3, 3)), "b": np.zeros(3), "w": rng.normal(size=(2, 48)),
            "d": np.zeros(2)}  # fmt: skip
    held = {name: value.astype("float32") for name, value in held.items()}
    return saved(tmp_path, model(nodes, {"x": ("n", 1, 4, 4)}, ["y"], held))


def test_a_network_that_was_read_is_constrained_trained_and_certified(path, tmp_path):
    read = tfl.load_onnx(path)
    net = read.to_keras()
    assert [layer.name for layer in net.layers if layer.weights] == [
        "first",
        "head_head_0_Gemm",  # PyTorch knows no dots in names
    ]
    rng = np.random.default_rng(1)
    y = np.arange(64) % 2
    x = (rng.normal(size=(64, 1, 4, 4)) / 4 + y[:, None, None, None]).astype("float32")
    assert tfl.lipschitz_upper_bound(net).gain_upper_bound > 2
    tfl.constrain(net, 1.0)
    net.compile(keras.optimizers.Adam(0.01), tfl.losses.TemperatureCrossEntropy(temperature=0.1))
    history = net.fit(x, y, epochs=4, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < history[0]
    # A budget of one per layer, up to the rounding of the projection's last step.
    proof = tfl.certify(net, x, y)
    assert 0 < proof.gain_upper_bound <= 1 + 1e-5
    assert np.mean(proof.radius > 0) > 0.9
    # What was read is left as it is; what was trained is a file of its own.
    assert tfl.lipschitz_upper_bound(read).gain_upper_bound > 2
    tfl.export_onnx(net, tmp_path / "robust.onnx")
    own = keras.ops.convert_to_numpy(net(x[:4]))
    assert np.allclose(run(tmp_path / "robust.onnx", x[:4]), own, atol=1e-5)
