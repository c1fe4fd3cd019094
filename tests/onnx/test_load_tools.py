"""Networks of other tools: scikit-learn, tf2onnx and Keras, and graphs in MATLAB's style."""

import functools

import keras
import numpy as np
import pytest
from onnx import helper
from onnx_files import model, run, saved

from tf_lyapunov.onnx.load import load_onnx

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def agrees(path, want, x, **options):
    program = load_onnx(path, **options)
    own = keras.ops.convert_to_numpy(program.to_keras()(x))
    assert own.shape == want.shape
    assert np.abs(own - want).max() <= 1e-4 * (1 + np.abs(want).max())
    return program


# scikit-learn -----------------------------------------------------------------------------------


PERCEPTRONS = ["regressor", "classifier", "two classes", "tanh", "logistic"]


@pytest.mark.parametrize("kind", PERCEPTRONS)
def test_a_perceptron_of_scikit_learn_is_read(kind, tmp_path):
    pytest.importorskip("skl2onnx", reason="converting scikit-learn's models needs skl2onnx")
    pytest.importorskip("sklearn", reason="its models need scikit-learn")
    import skl2onnx
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    x = RNG.normal(size=(40, 4)).astype("float32")
    function = {"tanh": "tanh", "logistic": "logistic"}.get(kind, "relu")
    settings = {"hidden_layer_sizes": (6, 5), "max_iter": 20, "activation": function}
    if kind == "regressor":
        fitted = MLPRegressor(**settings).fit(x, x[:, 0])
        options, output, want = {}, "variable", fitted.predict(x[:5])[:, None]
    else:
        y = np.arange(40) % (2 if kind == "two classes" else 3)
        fitted = MLPClassifier(**settings).fit(x, y)
        options, output = {"zipmap": False}, "probabilities"
        want = fitted.predict_proba(x[:5])
    proto = skl2onnx.to_onnx(fitted, x[:1], options=options, target_opset=15)
    path = saved(tmp_path, proto)
    agrees(path, want, x[:5], output=output)


# TensorFlow -------------------------------------------------------------------------------------


def networks():
    layers = keras.layers
    yield [keras.Input((6,)), layers.Dense(5, activation="relu"), layers.Dense(3)]
    yield [
        keras.Input((8, 8, 3)), layers.Conv2D(4, 3, padding="same", strides=2),
        layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(), layers.Flatten(),
        layers.Dense(3, activation="softmax"),
    ]  # fmt: skip
    yield [
        keras.Input((9, 2)), layers.Conv1D(4, 3, activation="elu"), layers.GlobalAveragePooling1D(),
        layers.Dense(3, activation="tanh"),
    ]  # fmt: skip


@pytest.mark.parametrize("place", range(3))
def test_a_network_of_tf2onnx_is_read(place, tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf2onnx converts models of the TensorFlow backend")
    pytest.importorskip("tf2onnx", reason="exporting from TensorFlow needs tf2onnx")
    model = keras.Sequential(list(networks())[place])
    x = RNG.normal(size=(4, *model.input_shape[1:])).astype("float32")
    want = model.predict(x, verbose=0)
    path = tmp_path / "net.onnx"
    model.export(path, format="onnx", verbose=False)
    program = agrees(path, want, x)
    kinds = [type(layer).__name__ for layer in program.keras_model.layers]
    assert kinds.count("Permute") <= 1  # the layout that it turns and turns back is left alone


# MATLAB -----------------------------------------------------------------------------------------


def matlab(layers):
    """A graph as MATLAB's converter writes it: means subtracted, constants among the inputs."""
    nodes, constants, last = [helper.make_node("Sub", ["input", "Mean"], ["c"], name="c")], {}, "c"
    for i, (kind, values, attributes) in enumerate(layers):
        names = [f"{kind}_{i}_{k}" for k in range(len(values))]
        constants.update(zip(names, values, strict=True))
        out = f"{kind}_{i}"
        nodes.append(helper.make_node(kind, [last, *names], [out], name=out, **attributes))
        last = out
    return nodes, constants, last


def matlab_model(shape, layers):
    nodes, constants, last = matlab(layers)
    constants["Mean"] = normal(1, *shape)
    proto = model(nodes, {"input": (1, *shape)}, [last], constants, opset=8)
    proto.ir_version = 3
    for name, value in constants.items():
        proto.graph.input.append(helper.make_tensor_value_info(name, 1, value.shape))
    return proto


DENSE = [
    ("Flatten", [], {"axis": 1}),
    ("MatMul", [normal(5, 6)], {}),
    ("Add", [normal(6)], {}),
    ("Relu", [], {}),
    ("Gemm", [normal(3, 6), normal(3)], {"transB": 1}),
]
IMAGES = [
    ("Conv", [normal(4, 2, 3, 3), normal(4)], {"pads": [1, 1, 1, 1], "strides": [1, 1]}),
    ("BatchNormalization", [normal(4), normal(4), normal(4), np.abs(normal(4)) + 1], {}),
    ("Relu", [], {}),
    ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 0]}),
    ("Flatten", [], {"axis": 1}),
    ("MatMul", [normal(36, 3)], {}),
    ("Add", [normal(1, 3)], {}),
    ("Softmax", [], {"axis": 1}),
]
ALEXNET = [
    ("Conv", [normal(4, 2, 3, 3), normal(4)], {"strides": [2, 2], "group": 1}),
    ("LRN", [], {"size": 3, "alpha": 0.5, "beta": 0.75, "bias": 1.0}),
    ("LeakyRelu", [], {"alpha": 0.01}),
    ("Conv", [normal(4, 2, 2, 2), normal(4)], {"group": 2, "auto_pad": "SAME_UPPER"}),
    ("GlobalAveragePool", [], {}),
    ("Squeeze", [], {"axes": [2, 3]}),
]


GOOGLENET = [
    ("Conv", [normal(4, 2, 3, 3), normal(4)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Relu", [], {}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [1, 1], "auto_pad": "SAME_UPPER"}),
    ("LRN", [], {"size": 5, "alpha": 0.1, "beta": 0.75, "bias": 1.0}),
    ("AveragePool", [], {"kernel_shape": [4, 4], "strides": [1, 1], "pads": [0, 0, 0, 0]}),
    ("Flatten", [], {"axis": 1}),
    ("Gemm", [normal(3, 4), normal(3)], {"transB": 1}),
]
# Name -> function that makes a graph; and the shapes of their inputs.
SHAPES = {"dense": (1, 1, 5), "images": (2, 6, 6), "AlexNet": (2, 8, 8), "GoogLeNet": (2, 8, 8)}
MATLAB = {
    name: functools.partial(matlab_model, SHAPES[name], layers)
    for name, layers in zip(SHAPES, (DENSE, IMAGES, ALEXNET, GOOGLENET), strict=True)
}


@pytest.mark.parametrize("name", MATLAB)
def test_a_network_in_matlabs_style_is_read(name, tmp_path):
    path = saved(tmp_path, MATLAB[name]())
    x = normal(4, *SHAPES[name])
    program = agrees(path, run(path, x), x)
    assert program.opset == 8
    assert program.inputs[0].name == "input"


def test_ten_networks_are_of_other_tools_than_pytorch():
    assert len(PERCEPTRONS) + len(list(networks())) + len(MATLAB) >= 10
