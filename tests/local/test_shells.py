"""Amplification on balls: above every sample and closed form, and near them."""

import time

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.local.flow import flow_of
from tf_lyapunov.local.shells import Shells
from tf_lyapunov.program.network import read_network


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def built(model, scale, seed):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        fan = max(int(np.prod(weight.shape[:-1])), 1)
        weight.assign(scale * rng.normal(size=weight.shape) / np.sqrt(fan))
    return model


def chain():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(6, "tanh"), layers.Dense(3)]
    )


def pooled():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("head", [None, "softmax"])
@pytest.mark.parametrize("build", [chain, pooled])
def test_no_sample_moves_the_outputs_by_more(build, head, norm):
    model = built(build(), 2.5, 0)
    network = read_network(model)
    rng = np.random.default_rng(1)
    x = rng.normal(size=model.input_shape[1:])
    radii = np.array([0.01, 0.1, 0.6, 3.0])
    known = np.full(4, 1e3)
    found = Shells(flow_of(network), norm, head).improved(x, radii, known)
    assert np.all(np.diff(found) >= 0)
    e = rng.normal(size=(6000, *x.shape))
    e[:3000] = np.sign(e[:3000])
    order = 2 if norm == "l2" else np.inf
    e /= np.linalg.norm(e.reshape(len(e), -1), order, axis=1).reshape(-1, *[1] * x.ndim)
    best = np.zeros(4)
    for share in (1e-3, 0.3, 1.0):
        for j, r in enumerate(radii):
            values = network.program.logits(np.concatenate([x[None], x + share * r * e]))
            values = softmax(values) if head else values
            moved = np.linalg.norm(values[1:] - values[0], order, axis=1)
            best[j] = max(best[j], (moved / (share * r)).max())
    assert np.all(best <= found)
    assert np.all(found[:2] <= (12 if build is chain else 40) * best[:2])
    if head and norm == "l2":
        # Probabilities are never further apart than √2: gains alone do not know.
        assert found[-1] < 40


def test_a_linear_map_has_its_norm():
    model = built(keras.Sequential([keras.Input((5,)), layers.Dense(3)]), 1.0, 3)
    weights = model.get_weights()[0].astype(np.float64)
    for norm, exact in (
        ("l2", np.linalg.norm(weights, 2)),
        ("linf", np.abs(weights).sum(axis=0).max()),
    ):
        shells = Shells(flow_of(read_network(model)), norm, None)
        found = shells.improved(np.ones(5), np.array([0.5]), np.array([100.0]))
        assert exact <= found[0] <= exact * (1 + 1e-6)


def test_a_sigmoid_far_from_its_middle_has_nearly_its_closed_form():
    """Around x = -8 the largest ratio is that of the outermost point."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.set_weights([np.ones((1, 1)), np.zeros(1)])
    shells = Shells(flow_of(read_network(model)), "l2", "sigmoid")

    def value(t):
        return 1 / (1 + np.exp(-t))

    for radius in (1.0, 4.0, 8.0, 20.0):
        along = np.linspace(1e-3, radius, 20001)
        exact = np.max((value(-8 + along) - value(-8.0)) / along)
        found = shells.improved(np.array([-8.0]), np.array([radius]), np.array([0.25]))[0]
        assert exact <= found < 2.2 * exact


def test_two_probabilities_of_one_likely_class_are_this_close():
    rng = np.random.default_rng(0)
    for count in (2, 3, 10):
        for q in (0.5, 0.8, 0.99, 0.0):
            rest = rng.dirichlet(np.full(count - 1, 0.05), size=(4000, 2))
            missing = (1 - q) * rng.integers(0, 2, size=(4000, 2, 1))
            p = np.concatenate([1 - missing, missing * rest], axis=2)
            distance = np.linalg.norm(p[:, 0] - p[:, 1], axis=1).max()
            assert distance <= np.sqrt(2) * (1 - q) * (1 + 1e-12)
            assert distance >= 0.99 * np.sqrt(2) * (1 - q)


def test_what_is_known_or_enough_stays_and_time_may_be_up():
    model = built(chain(), 2.0, 0)
    flow, x = flow_of(read_network(model)), np.ones(4)
    radii, known = np.array([0.1, 1.0]), np.array([0.01, 0.02])
    assert np.array_equal(Shells(flow, "l2", None).improved(x, radii, known), known)
    high = np.array([90.0, 100.0])
    assert np.array_equal(Shells(flow, "l2", None).improved(x, radii, high, high), high)
    late = Shells(flow, "l2", None, deadline=time.monotonic() - 1)
    assert np.array_equal(late.improved(x, radii, high), high)
