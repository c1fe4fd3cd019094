"""Chains as they are read: pools, padding and folded normalizations are matrices like others."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.bounds.liplt import liplt
from tf_lyapunov.bounds.lipsdp import lipsdp
from tf_lyapunov.bounds.tails import dense_tail
from tf_lyapunov.certification import certify, read_network
from tf_lyapunov.verification import verify


def pooled(pool, shape=(8, 8, 2), normalized=False):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(shape),
            layers.ZeroPadding2D(((1, 0), (2, 1))),
            layers.Conv2D(3, 3, strides=2, use_bias=not normalized, bias_initializer="normal"),
            *([layers.BatchNormalization()] if normalized else []),
            layers.ReLU(),
            pool,
            layers.Conv2D(4, 2, bias_initializer="normal", activation="relu"),
            layers.Cropping2D(((0, 1), (0, 0))),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, bias_initializer="normal"),
        ]
    )
    for weight in model.weights:
        if "variance" in weight.path:
            weight.assign(np.random.default_rng(1).uniform(0.5, 2.0, weight.shape))
    return model


POOLS = [
    lambda: layers.AveragePooling2D(2, 1),
    lambda: layers.AveragePooling2D(2, 1, padding="same"),
    lambda: layers.AveragePooling2D((1, 2), (1, 2)),
]


@pytest.mark.parametrize("pool", POOLS)
def test_pools_padding_and_cropping_stay_in_the_chain_and_compute_what_the_model_does(pool):
    model = pooled(pool())
    tail = dense_tail(read_network(model))
    assert tail.start == "input"
    x = np.random.default_rng(0).normal(size=(5, 8, 8, 2)).astype("float32")
    signal = x.reshape(5, -1).astype(np.float64)
    sectors = (*tail.chain.sectors, None)
    for weight, bias, sector in zip(tail.chain.weights, tail.chain.biases, sectors, strict=True):
        signal = signal @ weight.T + bias
        if sector is not None and sector.alpha != sector.beta:
            signal = np.maximum(signal, 0)
    np.testing.assert_allclose(signal, model.predict(x, verbose=0), atol=1e-5)


def test_a_folded_normalization_scales_a_convolution_in_the_chain():
    model = pooled(layers.AveragePooling2D(2, 1), normalized=True)
    tail = dense_tail(read_network(model))
    assert tail.start == "input" and np.any(tail.chain.errors[1])
    # Slopes of the model itself, at random points and where they were largest.
    found = 0.0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8, 8, 2)).astype("float32")
    moved = 1e-2 * rng.normal(size=x.shape).astype("float32")
    change = model.predict(x + moved, verbose=0) - model.predict(x, verbose=0)
    found = np.max(np.linalg.norm(change, axis=1) / np.linalg.norm(moved.reshape(400, -1), axis=1))
    bound = lipsdp(tail.chain).gain_upper_bound
    assert found <= bound * (1 + 1e-3) and found > 0.05 * bound
    assert bound <= liplt(tail.chain).gain_upper_bound * (1 + 1e-6)


def test_a_pool_no_longer_costs_what_it_would_alone(tmp_path):
    model = pooled(layers.AveragePooling2D(2, 1))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype("float32")
    composed, tight = certify(model, x), certify(model, x, method="lipsdp")
    assert tight.gain_upper_bound < 0.5 * composed.gain_upper_bound
    # The verifier reads the same chain from the model.
    tight.save(tmp_path / "proof.npz")
    assert verify(tmp_path / "proof.npz", model).holds
