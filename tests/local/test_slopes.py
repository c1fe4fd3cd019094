"""Local radii: sound under attack, exact where nothing switches, monotone in the radius."""

import chain_nets
import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.certification import certify, read_network
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.slopes import LocalGains


def perceptron(activation="relu", widths=(12, 10), seed=0):
    model = keras.Sequential(
        [keras.Input((3, 2)), layers.Flatten()]
        + [layers.Dense(w, activation=activation) for w in widths]
        + [layers.Dense(4)]
    )
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "bias" in weight.path:
            weight.assign(0.5 * rng.normal(size=weight.shape))
    return model


def convolutional():
    return keras.Sequential(
        [
            keras.Input((5, 5, 1)),
            layers.Conv2D(3, 3, strides=2, padding="same", bias_initializer="normal"),
            layers.LeakyReLU(0.2),
            layers.Flatten(),
            layers.Dense(6, activation="relu"),
            layers.Dense(3, activation="softmax"),
        ]
    )


@pytest.mark.parametrize(
    "build", [perceptron, lambda: perceptron("leaky_relu", (20,)), convolutional]
)
def test_no_attack_within_the_local_radius_changes_the_decision(build, attack, double_precision):
    model = build()
    shape = model.inputs[0].shape[1:]
    x = np.random.default_rng(1).normal(size=(40, *shape)).astype("float32")
    proof, composed = certify(model, x, method="local"), certify(model, x)
    assert np.all(proof.radius >= composed.radius)
    exact = double_precision(model, shape)
    held = proof.radius > 0  # a random model may tie
    x, labels, radius = x[held], proof.labels[held], proof.radius[held]
    assert len(x) > 30
    assert np.all(attack(exact, x, labels, radius * (1 - 1e-4)) > 0)
    assert np.any(attack(exact, x, labels, radius * 10) < 0)


def test_local_radii_exceed_the_global_ones_near_which_few_units_switch():
    model = perceptron(widths=(16,), seed=3)
    x = 2 * np.random.default_rng(1).normal(size=(60, 3, 2)).astype("float32")
    everywhere, local = certify(model, x, method="lipsdp"), certify(model, x, method="local")
    assert np.mean(local.radius > 1.01 * everywhere.radius) > 0.1
    assert any("Slopes on the ball" in text for text in local.assumptions)


def test_where_no_unit_switches_the_radius_is_the_distance_to_the_linear_boundary():
    model = perceptron(widths=(5,))
    model.layers[1].bias.assign(np.full(5, 100.0))  # always active
    x = np.random.default_rng(0).normal(size=(8, 3, 2)).astype("float32")
    proof = certify(model, x, method="local", precision="float64")
    matrix = (model.layers[1].kernel.numpy() @ model.layers[2].kernel.numpy()).astype(float)
    for radius, label, logits in zip(
        proof.radius, proof.labels, model.predict(x, verbose=0), strict=True
    ):
        others = [j for j in range(4) if j != label]
        distance = min(
            (logits[label] - logits[j]) / np.linalg.norm(matrix[:, label] - matrix[:, j])
            for j in others
        )
        assert radius == pytest.approx(distance, rel=1e-3)


def test_gains_on_the_ball_grow_with_it_and_bound_every_jacobian():
    model = perceptron(widths=(9, 8))
    gains = LocalGains(read_network(model))
    chain = gains.chain
    rng = np.random.default_rng(2)
    x = rng.normal(size=6)
    centers = gains.centers(x)
    differences = np.array([[1.0, -1.0, 0.0, 0.0], [0.0, 1.0, 0.0, -1.0]])
    values = [gains.pair_gains(centers, r, differences) for r in (0.0, 0.01, 0.1, 1.0, 10.0)]
    assert np.all(np.diff(values, axis=0) >= 0) and np.all(values[-1] > values[0])
    for radius, bound in zip((0.01, 0.1, 1.0), values[1:4], strict=True):
        for _ in range(300):
            step = rng.normal(size=6)
            signal = x + radius * step / np.linalg.norm(step) * rng.uniform() ** 0.1
            jacobian = np.eye(6)
            for layer, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True)):
                signal, jacobian = weight @ signal + bias, weight @ jacobian
                if layer < 2:
                    jacobian, signal = (signal > 0)[:, None] * jacobian, np.maximum(signal, 0)
            found = np.linalg.norm(differences @ jacobian, axis=1)
            assert np.all(found <= bound * (1 + 1e-12))


def test_wide_inputs_are_reduced_without_loss():
    model = keras.Sequential(
        [keras.Input((50,)), layers.Dense(6, activation="relu"), layers.Dense(3)]
    )
    gains = LocalGains(read_network(model))
    assert gains.reduced[0].shape == (6, 6)
    centers = gains.centers(np.random.default_rng(0).normal(size=50))
    reduced = gains.pair_gains(centers, 0.3, np.eye(3))
    gains.reduced[0] = gains.chain.weights[0]
    full = gains.pair_gains(centers, 0.3, np.eye(3))
    np.testing.assert_allclose(reduced, full, rtol=1e-8)


@pytest.mark.parametrize(
    "layer",
    [layers.Dense(4, activation="gelu"), layers.Dense(4, activation=layers.ReLU(max_value=1.0))],
)
def test_models_without_known_kinks_are_refused(layer):
    model = keras.Sequential([keras.Input((3,)), layer, layers.Dense(2)])
    with pytest.raises(UnsupportedLayerError, match="ReLU or leaky ReLU"):
        certify(model, np.zeros((1, 3)), method="local")


def test_inputs_that_are_rescaled_first_are_refused_by_name():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Rescaling(2.0, name="pre"),
            layers.Dense(4, "relu"),
            layers.Dense(2),
        ]
    )
    with pytest.raises(UnsupportedLayerError, match="'pre'"):
        certify(model, np.zeros((1, 3)), method="local")


def test_chain_nets_helper_and_reader_agree():
    chain = LocalGains(read_network(perceptron())).chain
    assert chain.widths == (6, 12, 10, 4)
    assert chain_nets.sampled_gain(chain, starts=2, rounds=2) > 0


def test_a_cap_inside_an_activation_layer_is_seen():
    """f_0 - f_1 = 1.5 + min(x, 1) - 10·min(0.1x, 1) vanishes at 2.5; without the cap never."""
    capped = layers.Activation(layers.ReLU(max_value=1.0))
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2), capped, layers.Dense(2)])
    model.layers[0].set_weights([np.array([[1.0, 0.1]]), np.zeros(2)])
    model.layers[2].set_weights([np.array([[1.0, 0.0], [-10.0, 0.0]]), np.array([1.5, 0.0])])
    with pytest.raises(UnsupportedLayerError, match="ReLU or leaky ReLU"):
        certify(model, np.array([[2.0]]), method="local")


def test_inputs_that_are_flattened_in_another_order_are_refused():
    flat = layers.Flatten(data_format="channels_first", name="turned")
    model = keras.Sequential([keras.Input((3, 2)), flat, layers.Dense(4, "relu"), layers.Dense(2)])
    with pytest.raises(UnsupportedLayerError, match="'turned'"):
        certify(model, np.zeros((1, 3, 2)), method="local")


def test_deep_networks_have_their_jacobian_on_small_balls_and_liplt_on_large_ones():
    """What rounding may have moved grows with the norms, not with those of absolute values."""
    rng = np.random.default_rng(0)
    hidden = [keras.layers.Dense(32, "relu") for _ in range(14)]
    model = keras.Sequential([keras.Input((20,)), *hidden, keras.layers.Dense(5)])
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) * np.sqrt(2 / weight.shape[0]))
    x = rng.normal(size=(1, 20))
    values, jacobian = x[0], np.eye(20)
    held = [np.asarray(w, np.float64) for w in model.get_weights()]
    for number in range(0, len(held), 2):
        values, jacobian = values @ held[number] + held[number + 1], jacobian @ held[number]
        if number + 2 < len(held):
            jacobian, values = jacobian * (values > 0), np.maximum(values, 0)
    exact = np.linalg.norm(jacobian, 2)
    (found,) = tfl.gain_on(model, x, 1e-9)
    # 10⁻¹² of a product of fourteen norms of 2.8.
    assert exact <= found <= exact * (1 + 1e-4)
    (found,) = tfl.gain_on(model, x, 1e6)
    liplt = tfl.lipschitz_upper_bound(model, method="liplt").gain_upper_bound
    assert found <= liplt * (1 + 1e-3)
