"""`certify(method=…)`: sound for every method, ordered, explained, and refusing what it must."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.attacks import PGD
from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.bounds.choice import METHODS, choose
from tf_lyapunov.bounds.tails import dense_tail
from tf_lyapunov.certification import certify, read_network
from tf_lyapunov.certification.certificate import Certificate
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.theory.balls import L2
from tf_lyapunov.theory.sectors import Sector
from tf_lyapunov.verification import verify

TIGHTER = ("liplt", "closed_form", "eclipse", "lipsdp", "dissipativity", "auto")


def perceptron():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(12, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10, activation="gelu"),
            layers.BatchNormalization(),
            layers.Dense(4, activation="softmax"),
        ]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Rescaling(0.5),
            layers.Conv2D(2, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(3, 2, activation="elu"),
            layers.Flatten(),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.LeakyReLU(0.1),
            layers.Dense(3),
        ]
    )


def residual():
    x = keras.Input((5,))
    h = layers.Dense(5, activation="tanh")(x)
    h = layers.Add()([x, h])
    h = layers.Dense(7, activation="relu")(h)
    return keras.Model(x, layers.Dense(3)(h))


def single_logit():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(1, "sigmoid")]
    )


BUILDERS = [perceptron, convolutional, residual, single_logit]


def scramble(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "variance" in weight.path:
            weight.assign(rng.uniform(0.5, 2.0, size=weight.shape))
        elif "seed" not in weight.path and "kernel" not in weight.path:
            weight.assign(0.3 * rng.normal(size=weight.shape))
    return model


def data(model, n=30):
    return np.random.default_rng(1).normal(size=(n, *model.inputs[0].shape[1:])).astype("float32")


@pytest.mark.parametrize("build", BUILDERS[:3])
@pytest.mark.parametrize("method", ["liplt", "eclipse", "lipsdp"])
def test_no_attack_within_the_radius_changes_the_decision(build, method, attack, double_precision):
    model = scramble(build())
    x, shape = data(model), model.inputs[0].shape[1:]
    proof = certify(model, x, method=method)
    exact = double_precision(model, shape)
    held = proof.radius > 0
    assert np.any(held)
    margins = attack(exact, x[held], proof.labels[held], proof.radius[held] * (1 - 1e-4))
    assert np.all(margins > 0)


# The convolutional one takes a minute, the residual one twenty seconds: all other tests here have
# them, method by method.
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(b, marks=[pytest.mark.slow] * (b in (convolutional, residual)))
        for b in BUILDERS
    ],
)
def test_every_method_proves_at_least_the_composed_radius(build):
    model = scramble(build())
    x = data(model)
    composed = certify(model, x)
    for method in TIGHTER:
        proof = certify(model, x, method=method)
        assert proof.method == method and proof.verdict == "PROVED"
        assert np.all(proof.radius >= composed.radius)
        assert proof.gain_upper_bound <= composed.gain_upper_bound
        assert any(text.startswith("Method: ") for text in proof.assumptions)
        assert Certificate.from_json(proof.to_json()).method == method
    assert np.median(certify(model, x, method="lipsdp").radius) > np.median(composed.radius)


@pytest.mark.parametrize("build", BUILDERS)
def test_the_gain_is_above_every_jacobian(build, jacobian_norm):
    model = scramble(build())
    logits = keras.Model(model.inputs, model.layers[-1].output)
    if model.layers[-1].activation is not keras.activations.linear:
        model.layers[-1].activation = keras.activations.linear
        logits = keras.models.clone_model(model)
        logits.set_weights(model.get_weights())
    shape = model.inputs[0].shape[1:]
    found = jacobian_norm(lambda x: logits(x, training=False), shape, points=200)
    bound = certify(model, data(model), method="lipsdp").gain_upper_bound
    assert found <= bound * (1 + 1e-5)
    assert found > 0.05 * bound


def test_scaling_the_first_layer_is_noticed_by_every_method():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu"), layers.Dense(3)])
    x = data(model, 3)  # what is compared is the network's, whatever the inputs
    before = {m: certify(model, x, method=m).gain_upper_bound for m in METHODS}
    model.layers[0].kernel.assign(3.0 * model.layers[0].kernel)
    for method, gain in before.items():
        after = certify(model, x, method=method).gain_upper_bound
        assert after == pytest.approx(3 * gain, rel=1e-3)


def test_the_tail_is_the_longest_chain_and_small_convolutions_are_written_out():
    tail = dense_tail(read_network(scramble(convolutional())))
    # From after the max pooling: a convolution as its matrix, then both dense layers.
    assert tail.chain.widths == (18, 12, 8, 3)
    assert [s.alpha for s in tail.chain.sectors] == [0.0, 0.1]
    assert tail.chain.biases is None and np.any(tail.chain.errors[1])
    chain = dense_tail(read_network(perceptron())).chain
    # A batch normalization after an activation is a diagonal matrix of its own.
    assert chain.widths == (6, 12, 10, 10, 4)
    assert np.array_equal(chain.weights[2], np.diag(np.diag(chain.weights[2])))


def test_the_chain_computes_what_the_model_computes():
    model = keras.Sequential(
        [
            keras.Input((5, 4, 2)),
            layers.Conv2D(3, 2, padding="same", activation="relu", bias_initializer="normal"),
            layers.Conv2D(2, 3, activation="relu", bias_initializer="normal"),
            layers.Flatten(),
            layers.Dense(3, bias_initializer="normal"),
        ]
    )
    chain = dense_tail(read_network(model)).chain
    x = data(model, 5)
    signal = x.reshape(5, -1).astype(np.float64)
    for layer, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True)):
        signal = signal @ weight.T + bias
        signal = np.maximum(signal, 0) if layer < 2 else signal
    np.testing.assert_allclose(signal, model.predict(x, verbose=0), atol=1e-5)


def test_auto_says_what_it_chose_and_keeps_its_budget():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu"), layers.Dense(3)])
    texts = certify(model, data(model), method="auto").assumptions
    assert any("auto chose lipsdp" in text for text in texts)
    hurried = certify(model, data(model), method="auto", time_budget=1e-3).assumptions
    assert any("auto chose closed form" in text for text in hurried)
    wide = Chain((np.eye(2000),) * 4, (Sector(0, 1),) * 3)
    assert choose(wide, 60.0) == "closed_form"
    deep = Chain((np.eye(32),) * 80, (Sector(0, 1),) * 79)
    assert choose(deep, 60.0) == "lipsdp"  # linear in depth


def test_models_without_a_dense_layer_before_the_logits():
    model = keras.Sequential(
        [keras.Input((6, 2)), layers.Conv1D(3, 3), layers.GlobalMaxPooling1D()]
    )
    proof = certify(model, data(model), method="auto")
    assert any("auto chose composition" in text for text in proof.assumptions)
    with pytest.raises(UnsupportedLayerError, match="Use method='composition'"):
        certify(model, data(model), method="lipsdp")


def test_unknown_methods_and_budgets_are_refused():
    model = single_logit()
    with pytest.raises(ValueError, match="`method` must be one of"):
        certify(model, data(model), method="seqlip")
    with pytest.raises(ValueError, match="`time_budget` must be a positive"):
        certify(model, data(model), method="auto", time_budget=0)


def test_residual_blocks_are_bounded_as_wholes_and_no_attack_beats_them(tmp_path):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6,))
    for _ in range(2):
        branch = keras.layers.Dense(6)(keras.layers.Dense(8, activation="relu")(x))
        x = keras.layers.Add()([x, branch])
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    points = np.random.default_rng(0).normal(size=(100, 6)).astype("float32")
    composed, whole = certify(model, points), certify(model, points, method="closed_form")
    assert whole.gain_upper_bound < 0.8 * composed.gain_upper_bound
    assert np.all(whole.radius >= composed.radius) and "Residual blocks" in whole.explain()
    attack = PGD(radius=L2(whole.radius * (1 - 1e-4)), steps=20, loss="margin")
    assert not attack(model, points).success.any()
    whole.save(tmp_path / "blocks.npz")
    assert verify(tmp_path / "blocks.npz", model).holds
    joint = certify(model, points, method="lipsdp")
    assert joint.gain_upper_bound < 0.8 * whole.gain_upper_bound
    attack = PGD(radius=L2(joint.radius * (1 - 1e-4)), steps=20, loss="margin")
    assert not attack(model, points).success.any()
    composed.save(tmp_path / "proof.npz")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "composition"])
def test_flattening_channels_first_is_not_taken_for_row_major_order(method):
    """It swaps the two middle units: the row-major product of the matrices has norm 1, not 4."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, use_bias=False),
            layers.Reshape((2, 2)),
            layers.Flatten(data_format="channels_first"),
            layers.Dense(4, use_bias=False),
        ]
    )
    model.layers[0].set_weights([np.diag([1.0, 2.0, 0.1, 1.0])])
    model.layers[-1].set_weights([np.diag([1.0, 0.1, 2.0, 1.0])])
    if method == "local":
        with pytest.raises(UnsupportedLayerError):
            certify(model, np.ones((1, 4)), method=method)
    else:
        assert certify(model, np.ones((1, 4)), method=method).gain_upper_bound >= 4.0
