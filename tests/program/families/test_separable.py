"""Resizing, crops, upsampling and adaptive pooling, against the backend's own matrices."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes

BACKEND = keras.backend.backend()
LINEAR = {
    "bilinear up": (lambda: layers.Resizing(5, 7), (3, 4, 2)),
    "bilinear down": (lambda: layers.Resizing(2, 3), (5, 7, 1)),
    "bicubic": (lambda: layers.Resizing(6, 4, interpolation="bicubic"), (4, 5, 1)),
    "nearest": (lambda: layers.Resizing(5, 3, interpolation="nearest"), (4, 4, 2)),
    "antialias": (lambda: layers.Resizing(3, 3, antialias=True), (7, 6, 1)),
    "crop to aspect": (lambda: layers.Resizing(4, 4, crop_to_aspect_ratio=True), (4, 8, 1)),
    "pad to aspect": (lambda: layers.Resizing(4, 4, pad_to_aspect_ratio=True), (3, 6, 1)),
    "pad by a number": (
        lambda: layers.Resizing(4, 4, pad_to_aspect_ratio=True, fill_value=2.5),
        (3, 6, 2),
    ),
    "same size": (lambda: layers.Resizing(3, 4), (3, 4, 1)),
    "channels first": (
        lambda: layers.Resizing(4, 5, data_format="channels_first"),
        (2, 3, 3),
    ),
    "centre crop": (lambda: layers.CenterCrop(3, 2), (6, 5, 2)),
    "centre crop that resizes": (lambda: layers.CenterCrop(5, 3), (4, 6, 1)),
    "upsampling": (lambda: layers.UpSampling2D((2, 3), interpolation="bilinear"), (3, 2, 2)),
    "upsampling nearest": (lambda: layers.UpSampling2D((2, 3)), (3, 2, 2)),
    "adaptive 1": (lambda: layers.AdaptiveAveragePooling1D(3), (7, 2)),
    "adaptive 2": (lambda: layers.AdaptiveAveragePooling2D((2, 3)), (5, 7, 1)),
    "adaptive up": (lambda: layers.AdaptiveAveragePooling2D(4), (3, 4, 1)),
}
if BACKEND != "torch":
    LINEAR["lanczos"] = (lambda: layers.Resizing(5, 3, interpolation="lanczos3"), (4, 6, 1))


def model_of(layer, shape):
    return keras.Sequential([keras.Input(shape), layer])


def called(model, x):
    return np.asarray(keras.ops.convert_to_numpy(model(x, training=False)), np.float64)


@pytest.mark.parametrize("name", LINEAR)
def test_the_gain_is_the_norm_of_the_steps_own_matrix(name):
    make, shape = LINEAR[name]
    model = model_of(make(), shape)
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps == 1
    eye = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    matrix = (called(model, eye) - called(model, 0 * eye)).reshape(len(eye), -1)
    truth = np.linalg.norm(matrix, 2)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    # Weights of float32, of which a product has a few.
    assert truth * (1 - 1e-5) <= bound <= truth * (1 + 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["bilinear up", "centre crop", "adaptive 2", "pad by a number"])
def test_half_precision_agrees_within_its_allowance(name, policy):
    make, shape = LINEAR[name]
    layer = make()
    config = {**layer.get_config(), "dtype": policy}
    model = model_of(type(layer).from_config(config), shape)
    assert validate_on_probes(read_network(model)).steps == 1
    # Weights are rounded when they are read in half precision, never below those of float32.
    bound = lipschitz_upper_bound(model).gain_upper_bound
    exact = lipschitz_upper_bound(model_of(make(), shape)).gain_upper_bound
    assert exact * (1 - 1e-6) <= bound <= exact * 1.1


@pytest.mark.parametrize(
    ("layer", "shape", "gain"),
    [
        (layers.AdaptiveMaxPooling1D(3), (7, 2), np.sqrt(2)),
        (layers.AdaptiveMaxPooling2D((2, 2)), (4, 4, 1), 1.0),
        (layers.AdaptiveMaxPooling2D((2, 2)), (5, 5, 1), 2.0),
        (layers.AdaptiveMaxPooling1D(4), (2, 1), np.sqrt(2)),
    ],
)
def test_an_adaptive_maximum_reaches_its_gain(layer, shape, gain):
    model = model_of(layer, shape)
    assert validate_on_probes(read_network(model)).steps == 1
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert bound == pytest.approx(gain, rel=1e-12)
    eye = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    assert np.linalg.norm(called(model, eye).reshape(len(eye), -1), axis=1).max() == pytest.approx(
        gain, rel=1e-6
    )


def test_bare_resizing_is_read():
    x = keras.Input((4, 4, 1))
    model = keras.Model(x, ops.image.resize(x, (6, 3), interpolation="bilinear"))
    assert validate_on_probes(read_network(model)).steps == 1
    lipschitz_upper_bound(model)


def test_a_moved_coordinate_contradicts_the_model():
    model = model_of(layers.Resizing(6, 5), (4, 4, 1))
    network = read_network(model)
    assert network.program
    model.layers[0].antialias = True
    model.layers[0].interpolation = "bicubic"
    from tf_lyapunov.errors import UnfaithfulReading

    with pytest.raises(UnfaithfulReading):
        validate_on_probes(network)


def test_integers_and_unknown_sizes_are_refused():
    x = keras.Input((None, None, 3))
    with pytest.raises(UnsupportedLayerError, match="unknown"):
        lipschitz_upper_bound(keras.Model(x, layers.Resizing(4, 4)(x)))
    if BACKEND != "torch":
        x = keras.Input((4, 4, 3), dtype="uint8")
        y = layers.Rescaling(1 / 255)(layers.Resizing(3, 3)(x))
        if y.dtype == "float32" and layers.Resizing(3, 3)(x).dtype == "uint8":
            with pytest.raises(UnsupportedLayerError, match="rounds"):
                lipschitz_upper_bound(keras.Model(x, y))
