"""Bare reductions, windows, stacks and clips: evaluation, and gains on both sides."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes

ON_TORCH = keras.backend.backend() == "torch"
LINEAR = {
    "mean": (lambda x: ops.mean(x, axis=(1, 2)), (4, 3, 2)),
    "mean kept": (lambda x: ops.mean(x, axis=-1, keepdims=True), (4, 3)),
    "sum": (lambda x: ops.sum(x, axis=1), (4, 3)),
    "average pool": (lambda x: ops.average_pool(x, 3, 2), (7, 2)),
    "average pool 2": (lambda x: ops.average_pool(x, (2, 3), 1), (4, 5, 1)),
    "stack": (lambda x: ops.stack([x, 2 * x], axis=1), (4,)),
    "maximum with a constant": (lambda x: ops.maximum(x, -1e6), (3,)),
}
EXTREME = {
    "max": (lambda x: ops.max(x, axis=1), (5, 2), 1.0),
    "amin": (lambda x: ops.amin(x, axis=(1, 2), keepdims=True), (3, 2), 1.0),
    "max pool": (lambda x: ops.max_pool(x, 3, 2), (5, 5, 1), 2.0),
    "max pool same": (lambda x: ops.max_pool(x, 2, 1, padding="same"), (4, 1), np.sqrt(2)),
    "clip": (lambda x: ops.clip(x, -0.5, 0.7), (4,), 1.0),
    "clip by an array": (lambda x: ops.clip(x, np.float32([-1, 0.1, -2]), 3.0), (3,), 1.0),
    "minimum": (lambda x: ops.minimum(x, np.float32([0.5, -0.5])), (2,), 1.0),
    "hstack": (lambda x: ops.hstack([x, ops.relu(x)]), (3,), np.sqrt(2)),
}


def model_of(function, shape):
    x = keras.Input(shape)
    return keras.Model(x, function(x))


def called(model, x):
    return np.asarray(keras.ops.convert_to_numpy(model(x)), np.float64)


@pytest.mark.parametrize("name", LINEAR)
def test_the_gain_of_a_linear_reduction_is_its_norm(name):
    function, shape = LINEAR[name]
    model = model_of(function, shape)
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps == len(network.graph.calls)
    eye = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    truth = np.linalg.norm(called(model, eye).reshape(len(eye), -1), 2)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert truth * (1 - 1e-6) <= bound <= truth * (1 + 1e-6)


@pytest.mark.parametrize("name", EXTREME)
def test_extremes_and_clips_keep_their_gain(name):
    function, shape, gain = EXTREME[name]
    model = model_of(function, shape)
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps == len(network.graph.calls)
    assert lipschitz_upper_bound(model).gain_upper_bound == pytest.approx(gain, rel=1e-12)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, *shape)).astype("float32")
    step = rng.normal(size=x.shape).astype("float32") * 10 ** rng.uniform(-3, 1)
    moved = called(model, x + step) - called(model, x)
    size = np.linalg.norm((x + step - x).reshape(300, -1), axis=1)
    assert np.all(np.linalg.norm(moved.reshape(300, -1), axis=1) <= gain * size * (1 + 1e-5))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: ops.mean(x, axis=0, keepdims=True) + x, "batch"),
        (lambda x: ops.sum(x) + x, "batch"),
        (lambda x: ops.max(x, axis=1, initial=0.0), "initial"),
        (lambda x: ops.stack([x, x], axis=0), "batch"),
        (lambda x: ops.concatenate([x, x], axis=0), "batch"),
    ],
)
def test_what_combines_samples_is_refused(function, reason):
    with pytest.raises(UnsupportedLayerError, match=reason):
        lipschitz_upper_bound(model_of(function, (3,)))


def test_reductions_over_open_sizes():
    x = keras.Input((None, 3))
    assert lipschitz_upper_bound(keras.Model(x, ops.mean(x, axis=1))).gain_upper_bound == 1.0
    assert lipschitz_upper_bound(keras.Model(x, ops.max(x, axis=1))).gain_upper_bound == 1.0
    with pytest.raises(UnsupportedLayerError, match="unknown"):
        lipschitz_upper_bound(keras.Model(x, ops.sum(x, axis=1)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_stays_within_its_allowance(policy):
    x = keras.Input((6, 4))
    y = layers.Dense(4, dtype=policy)(x)
    y = ops.concatenate([ops.mean(y, axis=1), ops.max(ops.clip(y, -0.3, 0.3), axis=1)], axis=1)
    assert validate_on_probes(read_network(keras.Model(x, y))).steps >= 4
