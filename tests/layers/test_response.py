"""Local response normalization: TensorFlow's and AlexNet's values, at every size."""

import keras
import numpy as np
import pytest
from derivatives import gradient

from tf_lyapunov.layers.response import LocalResponseNormalization

UNIT = 2.0**-24
SETTINGS = [
    {"depth_radius": 5, "bias": 1.0, "alpha": 1.0, "beta": 0.5},
    {"depth_radius": 4, "bias": 1.0, "alpha": 0.001 / 9, "beta": 0.75},
    {"depth_radius": 2, "bias": 2.0, "alpha": 1e-4, "beta": 0.75},
    {"depth_radius": 0, "bias": 0.5, "alpha": 2.0, "beta": 1.0},
    {"depth_radius": 1, "bias": 3.0, "alpha": 0.5, "beta": 0.6},
    {"depth_radius": 40, "bias": 1.0, "alpha": 0.1, "beta": 2.0},
]


def run(layer, x):
    return keras.ops.convert_to_numpy(layer(x))


def image(scale=3.0, shape=(2, 4, 5, 12)):
    return (scale * np.random.default_rng(0).normal(size=shape)).astype("float32")


def oracle(x, depth_radius, bias, alpha, beta):
    x = x.astype(np.float64)
    channels = np.arange(x.shape[-1])
    near = np.abs(channels[:, None] - channels) <= depth_radius
    return x / (bias + alpha * (x**2 @ near)) ** beta


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_its_equation(settings):
    found, expected = (
        run(LocalResponseNormalization(**settings), image()),
        oracle(image(), **settings),
    )
    assert np.all(np.abs(found - expected) <= 64 * UNIT * np.abs(expected))


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_tensorflow_s_to_rounding(settings):
    tf = pytest.importorskip("tensorflow")
    expected = tf.nn.local_response_normalization(image(), **settings).numpy()
    found = run(LocalResponseNormalization(**settings), image())
    assert np.all(np.abs(found - expected) <= 128 * UNIT * np.abs(expected))


def test_alexnet_s_parameters_are_a_window_and_its_constants():
    layer = LocalResponseNormalization.alexnet(size=5, bias=2.0, alpha=1e-4, beta=0.75)
    assert np.array_equal(
        run(layer, image(100.0)), run(LocalResponseNormalization(2, 2.0, 1e-4, 0.75), image(100.0))
    )
    with pytest.raises(ValueError, match="odd"):
        LocalResponseNormalization.alexnet(size=4)


def test_it_is_torch_s_with_alpha_times_the_width_of_the_window():
    if keras.backend.backend() != "torch":
        pytest.skip("torch is slow to import; compared where it is the backend")
    import torch

    peer = torch.nn.LocalResponseNorm(5, alpha=1e-2, beta=0.75, k=2.0)
    expected = peer(torch.from_numpy(np.moveaxis(image(), -1, 1).copy())).numpy()
    layer = LocalResponseNormalization.alexnet(alpha=1e-2 / 5, axis=1)
    assert np.allclose(run(layer, np.moveaxis(image(), -1, 1)), expected, rtol=1e-5)


def test_other_ranks_and_axes_are_the_same_map():
    layer = LocalResponseNormalization(2, 1.0, 0.5, 0.75)
    first = LocalResponseNormalization(2, 1.0, 0.5, 0.75, axis=1)
    x = image()
    assert np.array_equal(np.moveaxis(run(first, np.moveaxis(x, -1, 1)), 1, -1), run(layer, x))
    flat = x.reshape(-1, 12)
    assert np.array_equal(
        run(layer, flat), run(LocalResponseNormalization(2, 1.0, 0.5, 0.75), x).reshape(-1, 12)
    )


def test_its_gradient_is_the_derivative():
    layer = LocalResponseNormalization(1, 1.0, 0.7, 0.75)
    x, direction = image(1.0, (1, 6)), image(1.0, (2, 6))[1:]
    layer.build(x.shape)
    slope = np.sum(gradient(lambda x: keras.ops.sum(layer(x)), x) * direction)
    ends = [
        oracle(x + t * 1e-5 * direction.astype(float), 1, 1.0, 0.7, 0.75).sum() for t in (1, -1)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


def test_huge_inputs_end_in_zero_not_in_nan():
    x = np.full((1, 3), 1e25, "float32")
    assert np.all(run(LocalResponseNormalization(), x) == 0)


def test_half_precision_computes_in_single():
    x = image(300.0).astype("float16")  # squares overflow float16
    found = run(LocalResponseNormalization(2, dtype="float16"), x).astype(float)
    assert np.allclose(found, oracle(x.astype("float32"), 2, 1.0, 1.0, 0.5), rtol=2**-9)


def test_it_survives_serialisation():
    layer = LocalResponseNormalization(3, 2.0, 0.1, 0.6, axis=1)
    assert (
        LocalResponseNormalization.from_config(layer.get_config()).get_config()
        == layer.get_config()
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"bias": 0.0},
        {"bias": -1.0},
        {"alpha": -1.0},
        {"beta": 0.0},
        {"depth_radius": -1},
        {"depth_radius": 1.5},
    ],
)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}`"):
        LocalResponseNormalization(**bad)
