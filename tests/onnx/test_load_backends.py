"""Files are read alike on every backend, convolutions with channels first among them."""

import json

import fresh_processes
import numpy as np
import pytest
from onnx import helper
from onnx_files import model, run, saved

import tf_lyapunov as tfl

SCRIPT = """
import json, sys
import keras, numpy as np
import tf_lyapunov as tfl
found = {}
for path in sys.argv[1:]:
    read = tfl.load_onnx(path)
    x = np.load(path + ".npy")
    y = keras.ops.convert_to_numpy(read.to_keras()(x, training=False))
    proof = tfl.certify(read, x)
    found[path] = [y.ravel().tolist(), proof.gain_upper_bound, proof.radius.tolist()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of three networks, with inputs beside them."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)

    def weights(*shape):
        return rng.normal(size=shape).astype("float32") / 2

    held = {"k": weights(4, 3, 3, 3), "b": weights(4), "g": weights(4), "v": np.abs(weights(4)) + 1,
            "w": weights(4, 3), "d": weights(3), "t": weights(3, 2, 2, 2), "a": weights(24, 3),
            "s": np.array([0, -1])}  # fmt: skip
    node = helper.make_node
    made = {
        "image": [
            node("Conv", ["x", "k", "b"], ["c"], pads=[0, 1, 1, 0], strides=[2, 2]),
            node("BatchNormalization", ["c", "g", "b", "b", "v"], ["n"]),
            node("Relu", ["n"], ["r"]),
            node("AveragePool", ["r"], ["p"], kernel_shape=[2, 2]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w", "d"], ["y"]),
        ],
        "transposed": [
            node("ConvTranspose", ["x", "t"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
            node("MaxPool", ["c"], ["m"], kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1),
            node("Reshape", ["m", "s"], ["f"]),
            node("MatMul", ["f", "a"], ["y"]),
        ],
        "groups": [
            node("Conv", ["x", "q"], ["c"], group=3),
            node("Split", ["c"], ["h", "l"], axis=1),
            node("Max", ["h", "l"], ["m"]),
            node("GlobalAveragePool", ["m"], ["p"]),
            node("Flatten", ["p"], ["y"]),
        ],
    }
    held["q"] = weights(6, 1, 2, 2)
    paths = []
    for name, nodes in made.items():
        used = {n: a for n, a in held.items() if any(n in nd.input for nd in nodes)}
        path = saved(folder, model(nodes, {"x": ("n", 3, 5, 4)}, ["y"], used), f"{name}.onnx")
        np.save(f"{path}.npy", rng.normal(size=(3, 3, 5, 4)).astype("float32"))
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_file_means_the_same_on_every_backend(backend, files):
    pytest.importorskip(backend)
    found = json.loads(fresh_processes.output(SCRIPT, *files, backend=backend).splitlines()[-1])
    for path in files:
        outputs, gain, radii = found[path]
        x = np.load(f"{path}.npy")
        expected = run(path, x)
        assert np.abs(np.reshape(outputs, expected.shape) - expected).max() <= 1e-5
        proof = tfl.certify(tfl.load_onnx(path), x)
        assert np.isclose(gain, proof.gain_upper_bound, rtol=1e-6)
        assert np.allclose(radii, proof.radius, rtol=1e-4, atol=1e-6)
