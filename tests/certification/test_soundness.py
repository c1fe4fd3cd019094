"""No attack breaks a certificate, and no rounding error exceeds its allowance."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.bounds.composition import rounding_errors
from tf_lyapunov.certification import certify, read_network
from tf_lyapunov.program.logits import Float64Logits


def scramble(model, seed=0):
    """Random weights and statistics everywhere, of moderate size."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "variance" in weight.path:
            weight.assign(rng.uniform(0.5, 2.0, size=weight.shape))
        elif "seed" not in weight.path and "kernel" not in weight.path:
            weight.assign(0.3 * rng.normal(size=weight.shape))
    return model


def perceptron():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(16, activation="gelu"),
            layers.Dense(4, activation="softmax"),
        ]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(0.5, offset=-0.25),
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.PReLU(),
            layers.MaxPooling2D(3, 2),
            layers.DepthwiseConv2D(2, activation="silu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def residual():
    x = keras.Input((6, 6, 2))
    h = layers.Conv2D(4, 3, padding="same", activation="elu")(x)
    f = layers.BatchNormalization()(h)
    f = layers.Conv2D(4, 3, padding="same", activation="leaky_relu")(f)
    h = layers.Add()([h, f])
    h = layers.Concatenate()([h, layers.AveragePooling2D(2, 1, padding="same")(h)])
    h = layers.GlobalAveragePooling2D()(h)
    return keras.Model(x, layers.Dense(3)(h))


BUILDERS = [perceptron, convolutional, residual]


@pytest.mark.parametrize("build", BUILDERS)
def test_no_attack_within_the_radius_changes_the_decision(build, attack, double_precision):
    model = scramble(build())
    shape = model.inputs[0].shape[1:]
    x = np.random.default_rng(1).normal(size=(60, *shape)).astype("float32")
    proof = certify(model, x)
    assert np.all(proof.radius[proof.margins > 1e-2] > 0)
    exact = double_precision(model, shape)
    held = proof.radius > 0
    radius = proof.radius[held]
    margins = attack(exact, x[held], proof.labels[held], radius * (1 - 1e-4))
    assert np.all(margins > 0)
    # Power: the same attack at a larger radius does break some of them, so it is no idle test.
    assert np.any(attack(exact, x[held], proof.labels[held], radius * 40) < 0)


def test_the_radius_of_a_linear_model_is_broken_just_outside(attack, double_precision):
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4)])
    x = np.random.default_rng(1).normal(size=(40, 5)).astype("float32")
    proof = certify(model, x)
    exact = double_precision(model, (5,))
    assert np.all(attack(exact, x, proof.labels, proof.radius * (1 - 1e-4)) > 0)
    # Gradient ascent may stop at a boundary that is not the nearest one.
    assert np.mean(attack(exact, x, proof.labels, proof.radius * 1.05, steps=60) < 0) > 0.8


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_computed_logits_lie_within_the_allowance_of_exact_ones(build, scale, double_precision):
    model = scramble(build())
    shape = model.inputs[0].shape[1:]
    x = scale * np.random.default_rng(2).normal(size=(20, *shape)).astype("float32")
    network = read_network(model)
    norms = np.linalg.norm(x.reshape(20, -1).astype(np.float64), axis=1)
    allowance = rounding_errors(network, norms, network.logits)
    computed = model
    if network.decision is not None:
        layer = model.layers[-1]
        layer.activation = keras.activations.linear
        computed = keras.Sequential([keras.Input(shape), *model.layers])
    exact = double_precision(computed, shape).predict(x.astype(np.float64), verbose=0)
    error = np.linalg.norm(computed.predict(x, verbose=0) - exact, axis=1)
    assert np.all(error <= allowance)
    assert np.all(allowance < 1e-2 * np.linalg.norm(exact, axis=1) + 2e-2 * scale)
    assert np.all(error > 0)


def test_a_long_dot_product_that_loses_digits_is_covered():
    # Cancelling terms: the exact logit is tiny beside the rounding of the sum.
    n = 4096
    dense = layers.Dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((n,)), dense])
    rng = np.random.default_rng(0)
    column = rng.normal(size=n).astype("float32")
    dense.kernel.assign(np.stack([column, -column], axis=1))
    x = rng.normal(size=(30, n))
    x -= np.outer(x @ column, column) / (column.astype(np.float64) @ column)
    x = (1e3 * x).astype("float32")
    exact = x.astype(np.float64) @ column.astype(np.float64)
    proof = certify(model, x, precision="model")
    truth = np.abs(exact) / np.linalg.norm(column.astype(np.float64))
    assert np.all(proof.radius <= truth)
    # The allowance is what keeps this sound: computed margins alone exceed the true distance.
    computed = np.abs(proof.margins) / (2 * np.linalg.norm(column.astype(np.float64)))
    assert np.any(computed > truth)


def test_low_precision_gives_a_large_allowance_not_a_wrong_certificate():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6)).astype("float32")
    single = perceptron()
    half = keras.models.clone_model(
        single,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "dtype": "mixed_bfloat16"}
        ),
    )
    half.set_weights(single.get_weights())
    low = certify(half, x)
    proof = certify(single, x, precision="model")
    assert low.float_allowance > 1e4 * proof.float_allowance
    assert np.all(low.radius <= proof.radius + 1e-2)
    assert any("bfloat16" in text for text in low.assumptions)
    wide = keras.Sequential([keras.Input((600,)), layers.Dense(2, dtype="mixed_bfloat16")])
    hopeless = certify(wide, rng.normal(size=(3, 600)))
    assert hopeless.verdict == "NOT_PROVED"
    assert hopeless.float_allowance == np.inf
    assert "float32" in hopeless.explain()
    exact = certify(wide, np.ones((3, 600)), precision="float64")
    assert exact.float_allowance < 1e-9 and exact.verdict == "PROVED"
    assert any("its own decision may differ" in text for text in exact.assumptions)


@pytest.mark.parametrize("build", BUILDERS)
def test_float64_logits_are_those_of_the_weights_in_use(build, double_precision):
    model = scramble(build())
    shape = model.inputs[0].shape[1:]
    x = np.random.default_rng(2).normal(size=(20, *shape)).astype("float32")
    network = read_network(model)
    computed = Float64Logits(network).predict(x, 32)
    norms = np.linalg.norm(x.reshape(20, -1).astype(np.float64), axis=1)
    allowance = rounding_errors(network, norms, network.logits, "float64")
    assert np.all(allowance < 1e-8)
    if network.decision is not None:
        model.layers[-1].activation = keras.activations.linear
    exact = double_precision(model, shape).predict(x.astype(np.float64), verbose=0)
    assert np.all(np.linalg.norm(computed - exact, axis=1) <= 2 * allowance)


def test_the_precision_is_chosen_by_what_rounding_costs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 6)).astype("float32")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4)])
    assert certify(model, x).float_allowance > 1e-8
    model.layers[0].bias.assign([1e5, 1e5, 1e5, 1e5])
    costly, exact = certify(model, x, precision="model"), certify(model, x)
    assert exact.float_allowance < 1e-8 < costly.float_allowance
    assert np.all(exact.radius >= costly.radius)
    assert np.array_equal(exact.radius, certify(model, x, precision="float64").radius)
    with pytest.raises(ValueError, match="precision"):
        certify(model, x, precision="double")
