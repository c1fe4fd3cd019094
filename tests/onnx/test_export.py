"""`export_onnx`: files that onnxruntime runs as the model computes, or none."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
L = keras.layers


def outputs(path, *arrays):
    """What onnxruntime gives for the arrays."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)}
    (found,) = session.run(None, fed)
    return found


def drawn(model, seed=0):
    """The model with random weights, variances positive."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = rng.normal(size=weight.shape) * 0.4
        if "variance" in weight.path:
            value = rng.uniform(0.5, 2.0, size=weight.shape)
        weight.assign(value)
    return model


def digits():
    layers = [
        keras.Input((8, 8, 3)),
        L.Conv2D(4, 3, padding="same", activation="relu"),
        L.BatchNormalization(),
        L.LeakyReLU(),
        L.MaxPooling2D(),
        L.Conv2D(5, 3, strides=2, padding="same"),
        L.AveragePooling2D(2, 1, "same"),
        L.Flatten(),
        L.Dense(3, activation="softmax"),
    ]
    return drawn(keras.Sequential(layers, name="digits"))


def test_a_file_gives_the_models_outputs_for_any_batch(tmp_path):
    model, path = digits(), tmp_path / "net.onnx"
    tfl.export_onnx(model, path)
    x = np.random.default_rng(1).normal(size=(5, 8, 8, 3)).astype("float32")
    for count in (1, 5):
        expected = keras.ops.convert_to_numpy(model(x[:count], training=False))
        np.testing.assert_allclose(outputs(path, x[:count]), expected, atol=1e-5)
