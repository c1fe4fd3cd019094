"""Builders: architectures of the papers, logits, and names that do not depend on the process."""

import keras
import numpy as np
import pytest

from tf_lyapunov import models


def test_the_papers_mnist_network_has_its_layers():
    model = models.mlp((28, 28, 1), 10)
    shapes = [tuple(layer.kernel.shape) for layer in model.layers if hasattr(layer, "kernel")]
    assert shapes == [(784, 50), (50, 20), (20, 10)]


def test_the_papers_alexnet_has_its_layers():
    model = models.alexnet_cifar()
    shapes = [tuple(layer.kernel.shape) for layer in model.layers if hasattr(layer, "kernel")]
    assert shapes == [(5, 5, 3, 96), (5, 5, 96, 256), (9216, 384), (384, 192), (192, 10)]
    slopes = [x.negative_slope for x in model.layers if isinstance(x, keras.layers.LeakyReLU)]
    assert np.allclose(slopes, 0.1) and len(slopes) == 4


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "mlp", "widths": [4], "batch_norm": True, "dropout": 0.1},
        {"name": "mlp", "widths": [], "activation": "linear"},
        {"name": "residual_mlp", "width": 4, "blocks": 2},
        {"name": "cnn", "filters": [2], "kernel_size": 3, "widths": [4], "batch_norm": True},
        {"name": "alexnet_cifar"},
        "cnn",
    ],
)
def test_every_model_ends_in_logits(spec):
    model = models.build(spec, (16, 16, 3), 7, seed=1)
    outputs = keras.ops.convert_to_numpy(model(np.ones((2, 16, 16, 3), "float32")))
    assert outputs.shape == (2, 7)
    # A softmax or sigmoid would make every output non-negative.
    random = np.random.default_rng(0).normal(size=(64, 16, 16, 3)).astype("float32")
    assert (keras.ops.convert_to_numpy(model(random)) < 0).any()


def test_the_seed_alone_decides_the_weights_and_names():
    spec = {"name": "mlp", "widths": [4], "dropout": 0.5}
    first = models.build(spec, (6,), 3, seed=3)
    second = models.build(spec, (6,), 3, seed=3)
    other = models.build(spec, (6,), 3, seed=4)
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    pairs = zip(first.get_weights(), second.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert not np.array_equal(first.get_weights()[0], other.get_weights()[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mpl"}, "must be one of mlp"),
        ({"name": "mlp", "width": 3}, "does not fit"),
        ({"name": "mlp", "widths": [0]}, "positive integers"),
        ({"name": "mlp", "activation": "softmax"}, "activation='softmax'"),
        ({"name": "mlp", "dropout": 1.0}, "dropout=1.0"),
        ({"name": "cnn"}, "height, width, channels"),
        ({"name": "residual_mlp", "blocks": -1}, "positive integers"),
    ],
)
def test_impossible_models_are_refused_with_the_received_value(spec, message):
    with pytest.raises(ValueError, match=message):
        models.build(spec, (6,), 3)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="input_shape"):
        models.build("mlp", (0,), 3)
    with pytest.raises(ValueError, match="num_classes"):
        models.build("mlp", (3,), 0)
