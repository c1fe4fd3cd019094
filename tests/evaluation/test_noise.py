"""Noise has exactly the strength that is asked for, and dropped features are really dropped."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tf_lyapunov.evaluation.noise import (
    gaussian_noise,
    linf_radius,
    signal_to_noise,
    with_dropped_features,
)


@given(snr=st.floats(-20, 60), seed=st.integers(0, 10**6), n=st.integers(1, 5))
def test_every_sample_has_exactly_the_ratio(snr, seed, n):
    x = np.random.default_rng(seed).uniform(-1, 1, (n, 4, 3)) * 10.0 ** np.arange(n)[:, None, None]
    noisy = gaussian_noise(x, snr, seed=seed)
    # The sum is rounded to float32: an error of 6e-8 of the signal beside noise of 1e-3 of it.
    assert noisy.dtype == np.float32
    assert np.allclose(signal_to_noise(x, noisy), snr, atol=2e-3)


def test_noise_is_gaussian_repeats_under_a_seed_and_prolongs():
    x = np.ones((600, 50))
    noisy = gaussian_noise(x, 10.0, seed=1)
    assert np.array_equal(noisy, gaussian_noise(x, 10.0, seed=1))
    assert not np.array_equal(noisy, gaussian_noise(x, 10.0, seed=2))
    assert np.array_equal(gaussian_noise(x[:512], 10.0, seed=1), noisy[:512])
    g = (noisy - x).ravel() / np.std(noisy - x)
    # 30,000 draws: standard errors of the mean and of the fourth moment are 0.006 and 0.06.
    assert abs(g.mean()) < 0.03 and abs(np.mean(g**4) - 3) < 0.3


def test_a_full_sign_step_of_the_radius_has_the_ratio():
    x = np.random.default_rng(0).random((7, 5, 5, 1))
    signs = np.sign(np.random.default_rng(1).normal(size=x.shape))
    moved = x + linf_radius(x, 33.0)[:, None, None, None] * signs
    assert np.allclose(signal_to_noise(x, moved), 33.0, atol=1e-9)


@pytest.mark.parametrize("function", [gaussian_noise, linf_radius])
def test_zero_inputs_nan_and_infinite_ratios_are_refused(function):
    x = np.ones((3, 4))
    x[1] = 0
    with pytest.raises(ValueError, match=r"zero.*\[1\]"):
        function(x, 20.0)
    with pytest.raises(ValueError, match="finite"):
        function(np.full((1, 2), np.nan), 20.0)
    with pytest.raises(ValueError, match="snr"):
        function(np.ones((1, 2)), np.inf)
    with pytest.raises(TypeError, match="snr"):
        function(np.ones((1, 2)), "20")


@pytest.mark.parametrize("functional", [False, True])
def test_dropped_features_vanish_at_the_rate_and_the_model_itself_stays(functional):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(400, name="h")])
    if functional:
        model = keras.Model(model.inputs[0], model.outputs[0])
    model.set_weights([np.ones((3, 400)), np.zeros(400)])
    x = np.ones((50, 3), "float32")
    dropped = with_dropped_features(model, ["h"], 0.25, seed=5)
    found = dropped.predict_on_batch(x)
    again = with_dropped_features(model, ["h"], 0.25, seed=5).predict_on_batch(x)
    assert np.array_equal(found, again)
    # 20,000 draws: standard error 0.003.
    assert abs(np.mean(found == 0) - 0.25) < 0.015
    assert np.allclose(found[found != 0], 3 / 0.75)
    assert np.array_equal(model.predict_on_batch(x), np.full((50, 400), 3.0))
    assert model.get_layer("h").output is not None  # still called once


@pytest.mark.parametrize(
    ("names", "rate", "message"),
    [(["h"], 0.0, "rate"), (["h"], 1, "rate"), (["g"], 0.5, "'g'"), ([], 0.5, "layers")],
)
def test_impossible_drops_are_refused(names, rate, message):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, name="h")])
    with pytest.raises(ValueError, match=message):
        with_dropped_features(model, names, rate)
