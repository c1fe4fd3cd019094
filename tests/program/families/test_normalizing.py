"""Normalizations by their own statistics: evaluation, gains on both sides, and what has none."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.certification import certify, lipschitz_upper_bound
from tf_lyapunov.errors import UnfaithfulReading, UnsupportedLayerError
from tf_lyapunov.program.families.normalizing import centred_scale_norm
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes

ON_TORCH = keras.backend.backend() == "torch"
CASES = [
    (layers.LayerNormalization, {"epsilon": 0.1}, (5,)),
    (layers.LayerNormalization, {"epsilon": 0.1, "scale": False}, (5,)),
    (layers.LayerNormalization, {"epsilon": 1e-3, "center": False}, (3, 5)),
    (layers.LayerNormalization, {"epsilon": 0.1, "axis": (1, 2)}, (3, 5)),
    (layers.LayerNormalization, {"epsilon": 0.1, "axis": 1}, (3, 5)),
    (layers.LayerNormalization, {"epsilon": 0.1}, (1,)),
    (layers.GroupNormalization, {"groups": 2, "epsilon": 0.2}, (6,)),
    (layers.GroupNormalization, {"groups": 2, "epsilon": 0.2}, (3, 6)),
    (layers.GroupNormalization, {"groups": 3, "epsilon": 0.2, "axis": 1}, (6, 2, 2)),
    (layers.GroupNormalization, {"groups": -1, "epsilon": 0.2}, (4, 3)),
    (layers.RMSNormalization, {"epsilon": 0.3}, (5,)),
    (layers.RMSNormalization, {"epsilon": 0.3}, (2, 5)),
]


def model_of(kind, settings, shape, dtype="float32"):
    model = keras.Sequential([keras.Input(shape), kind(**settings, dtype=dtype)])
    rng = np.random.default_rng(3)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model


def without_torch_axes(kind, settings):
    if ON_TORCH and settings.get("axis") == 1 and kind is layers.LayerNormalization:
        pytest.skip("Keras on PyTorch normalizes the last axis there")


def jacobian(network, x):
    """Central differences of the float64 evaluation."""
    step, size = 1e-5, x.size
    moves = np.eye(size).reshape(size, *x.shape) * step
    up, down = (network.program.logits(x + sign * moves).reshape(size, -1) for sign in (1, -1))
    return ((up - down) / (2 * step)).T


@pytest.mark.parametrize(("kind", "settings", "shape"), CASES)
def test_the_gain_is_the_jacobians_norm_where_all_entries_are_equal(kind, settings, shape):
    without_torch_axes(kind, settings)
    model = model_of(kind, settings, shape)
    network = read_network(model)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    equal = np.zeros(shape)
    if kind is not layers.RMSNormalization:
        equal = equal + 0.7
    truth = np.linalg.norm(jacobian(network, equal), 2)
    # Differences err by 1e-16/1e-5 and by the square of the step.
    assert truth <= bound * (1 + 1e-7) + 1e-9
    assert bound <= truth * (1 + 1e-7) + 1e-9
    rng = np.random.default_rng(4)
    for scale in (0.01, 0.3, 3.0):
        found = jacobian(network, rng.normal(size=shape) * scale)
        assert np.linalg.norm(found, 2) <= bound * (1 + 1e-7) + 1e-9


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize(("kind", "settings", "shape"), CASES)
def test_the_program_agrees_with_the_layer(kind, settings, shape, dtype):
    without_torch_axes(kind, settings)
    if dtype == "float64" and keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow computes in float64 as it is")
    validation = validate_on_probes(read_network(model_of(kind, settings, shape, dtype)))
    assert validation.steps >= 1


def test_another_epsilon_contradicts_the_model(monkeypatch):
    model = model_of(*CASES[0])
    network = read_network(model)
    assert network.program  # read now
    model.layers[0].epsilon = 0.11
    with pytest.raises(UnfaithfulReading):
        validate_on_probes(network)


def test_the_norm_of_a_centred_scale_matches_its_matrix():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 17, 100):
        for gamma in (rng.normal(size=n), np.ones(n), np.eye(n)[0], np.zeros(n)):
            truth = np.linalg.norm(np.diag(gamma) @ (np.eye(n) - 1 / n), 2)
            assert truth - 1e-12 <= centred_scale_norm(gamma) <= truth + 1e-7
    # Beyond the size up to which the matrix is formed, the largest entry is within √(1 - 1/n).
    gamma = rng.normal(size=600)
    truth = np.linalg.norm(np.diag(gamma) @ (np.eye(600) - 1 / 600), 2)
    assert truth <= centred_scale_norm(gamma) <= truth / np.sqrt(1 - 1 / 600)


def test_a_certificate_through_a_normalization_holds_along_the_gradient():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8),
            layers.LayerNormalization(epsilon=0.05),
            layers.ReLU(),
            layers.Dense(3),
        ]
    )
    x = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
    proof = certify(model, x)
    assert proof.verdict == "PROVED"
    logits = read_network(model).program.logits
    rng = np.random.default_rng(1)
    labels = logits(x).argmax(axis=1)
    for _ in range(200):
        step = rng.normal(size=x.shape)
        step *= (np.asarray(proof.radius) * 0.999 / np.linalg.norm(step, axis=1))[:, None]
        assert np.array_equal(logits(x + step).argmax(axis=1), labels)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: layers.LayerNormalization(epsilon=0.0), "positive epsilon"),
        (lambda: layers.LayerNormalization(rms_scaling=True), "rms_scaling"),
        (lambda: layers.UnitNormalization(), "norm of its own input"),
        (lambda: layers.RMSNormalization(epsilon=0), "positive epsilon"),
    ],
)
def test_normalizations_without_a_gain_are_refused_without_an_offer(layer, reason):
    model = keras.Sequential([keras.Input((4,)), layer()])
    with pytest.raises(UnsupportedLayerError, match=reason) as caught:
        lipschitz_upper_bound(model)
    assert "register_gain" not in str(caught.value)


def test_bare_normalizations_are_read():
    x = keras.Input((5,))
    y = keras.ops.layer_normalization(x, np.arange(1.0, 6.0, dtype="float32"), epsilon=0.5)
    y = keras.ops.rms_normalization(y, epsilon=0.25)
    bound = lipschitz_upper_bound(keras.Model(x, y)).gain_upper_bound
    exact = centred_scale_norm(np.arange(1.0, 6.0)) / np.sqrt(0.5) / np.sqrt(0.25)
    assert bound == pytest.approx(exact, rel=1e-7)


def test_positions_of_unknown_number_have_the_same_gain():
    model = keras.Sequential([keras.Input((None, 4)), layers.LayerNormalization(epsilon=0.1)])
    rows = lipschitz_upper_bound(model).gain_upper_bound
    assert rows == pytest.approx(1 / np.sqrt(0.1), rel=1e-6)
