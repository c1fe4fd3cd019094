"""Padding by copies: NumPy's, with a gain that is attained, counted by every certificate."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.layers import Padding2D, SpectralConv2D
from tf_lyapunov.layers.padding import MODES

PADS = [(1, ((1, 1), (1, 1))), ((0, 2), ((0, 0), (2, 2))), (((1, 0), (2, 3)),) * 2]


@pytest.mark.parametrize("mode", MODES)
def test_it_is_numpy_s_padding_and_its_gain_is_the_norm_of_its_matrix(mode):
    x = np.arange(2 * 4 * 5 * 3, dtype="float32").reshape(2, 4, 5, 3)
    for given, pairs in PADS:
        layer = Padding2D(given, mode)
        expected = np.pad(x, [(0, 0), *pairs, (0, 0)], mode=MODES[mode])
        assert np.array_equal(keras.ops.convert_to_numpy(layer(x)), expected)
        assert layer.compute_output_shape((None, 4, 5, 3)) == (None, *expected.shape[1:])
        first = Padding2D(given, mode, "channels_first")(x.transpose(0, 3, 1, 2))
        assert np.array_equal(keras.ops.convert_to_numpy(first).transpose(0, 2, 3, 1), expected)
        basis = np.eye(20, dtype="float32").reshape(20, 4, 5, 1)
        matrix = keras.ops.convert_to_numpy(layer(basis)).reshape(20, -1)
        norm = np.linalg.norm(matrix.astype(float), 2)
        assert norm * (1 - 1e-12) <= layer.gain_upper_bound(x.shape) <= norm * (1 + 1e-12)


def test_a_model_counts_it_and_a_gain_that_makes_room_for_it_is_kept():
    padding = Padding2D(1, "reflect")
    gain = padding.gain_upper_bound((None, 6, 6, 1))
    assert gain == pytest.approx(2.0)  # a pixel beside a corner appears twice along each axis
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            padding,
            SpectralConv2D(2, 3, padding="valid", max_gain=0.99 / gain),
            keras.layers.Flatten(),
        ]
    )
    proved = float(tfl.lipschitz_upper_bound(model, outputs="model"))
    x, y = np.random.default_rng(0).normal(size=(2, 8, 6, 6, 1)).astype("float32")
    change = np.linalg.norm(model.predict(x, verbose=0) - model.predict(y, verbose=0), axis=1)
    assert np.all(change <= proved * np.linalg.norm((x - y).reshape(8, -1), axis=1) * (1 + 1e-5))
    assert 0.5 < proved <= 0.99 * (1 + 1e-6)


def test_bad_arguments_are_refused_and_a_layer_survives_its_configuration():
    for padding in (-1, (1, 2, 3), ((1, 2), (3,)), 1.5, True):
        with pytest.raises(ValueError, match="Received: padding="):
            Padding2D(padding)
    with pytest.raises(ValueError, match="Received: mode='constant'"):
        Padding2D(1, "constant")
    with pytest.raises(ValueError, match="Received: mode='zero'"):
        Padding2D(1, "zero")
    with pytest.raises(ValueError):
        Padding2D(1).build((None, None, 4, 1))
    layer = Padding2D(((1, 2), (0, 3)), "edge", "channels_first")
    assert Padding2D.from_config(layer.get_config()).get_config() == layer.get_config()
