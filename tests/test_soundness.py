"""No attack beats a certificate, no layer leaves its budget: trained models on real digits."""

import functools

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.bounds.stages import stages
from tf_lyapunov.theory.operators import convolution_matrix

layers = keras.layers
# Starts for each of six models and 1,797 digits, and the attacks that they make.
FEW, MANY = (1, 9_000), (12, 100_000)


@functools.cache
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return (data.images[..., None] / 16).astype("float32"), data.target


def flat_mlp():
    x = inputs = keras.Input((8, 8, 1))
    x = layers.Dense(32, activation="relu")(layers.Flatten()(x))
    x = layers.Dense(16)(x)
    x = layers.LeakyReLU(negative_slope=0.1)(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def residual():
    x = inputs = keras.Input((8, 8, 1))
    x = layers.Dense(24)(layers.Flatten()(x))
    x = layers.Add()([x, layers.Dense(24, activation="tanh")(x)])
    return keras.Model(inputs, layers.Dense(10)(x))


def batch_normalized():
    x = inputs = keras.Input((8, 8, 1))
    x = layers.Dense(24, use_bias=False)(layers.Flatten()(x))
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def convolutional():
    x = inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="elu")(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


# name: (builder, gain of each stage or None for a plainly trained model, method of certification).
# A product of convolutions is a loose bound: theirs is the closed form on the whole chain.
MODELS = {
    "mlp": (flat_mlp, 1.2, "composition"),
    "plain mlp": (flat_mlp, None, "closed_form"),
    "residual": (residual, 1.2, "composition"),
    "batch normalization": (batch_normalized, 1.2, "composition"),
    "plain batch normalization": (batch_normalized, None, "closed_form"),
    "convolutional": (convolutional, 1.2, "closed_form"),
}


@functools.cache
def trained(name, rate=0.01):
    build, budget, _ = MODELS[name]
    x, y = digits()
    keras.utils.set_random_seed(0)
    model = build()
    monitor = []
    if budget is not None:
        tfl.constrain(model, {stage.name: budget for stage in stages(model)})
        monitor = [tfl.callbacks.LyapunovMonitor(verbose=0)]
    loss = tfl.losses.TemperatureCrossEntropy(temperature=0.2)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(x, y, epochs=4, batch_size=64, verbose=0, callbacks=monitor)
    return model


@pytest.mark.parametrize("name", [name for name, (_, budget, _) in MODELS.items() if budget])
def test_after_training_at_a_large_rate_every_layers_true_norm_is_within_its_budget(name):
    model = trained(name, rate=0.1)
    budget = MODELS[name][1]
    for stage in stages(model):
        product = stage.pre_gain * stage.post_gain
        for kernel, linear_map in stage.maps:
            matrix = convolution_matrix(keras.ops.convert_to_numpy(kernel), linear_map).toarray()
            product *= np.linalg.svd(matrix, compute_uv=False)[0]
        assert 0.1 * budget < product <= budget * (1 + 4 * np.finfo(float).eps), stage.name


@functools.cache
def certified_and_attacked(name, restarts=FEW[0]):
    """Certificate, and what PGD finds just inside its radii."""
    model, (x, _) = trained(name), digits()
    proof = tfl.certify(model, x, method=MODELS[name][2])
    assert proof.radius.min() >= 0 and proof.radius.max() > 0
    inside = tfl.attacks.PGD(
        radius=tfl.L2(proof.radius * (1 - 1e-4)),
        steps=10,
        restarts=restarts,
        random_start=True,
        loss="margin",
        batch_size=600,
    )(model, x)
    return proof, inside


@pytest.mark.parametrize(
    "restarts, wanted", [FEW, pytest.param(*MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_thousands_of_attacks_break_no_certificate(restarts, wanted):
    runs = 0
    for name in MODELS:
        proof, inside = certified_and_attacked(name, restarts)
        broken = inside.success & (proof.radius > 0)
        assert not broken.any(), (name, proof.radius[broken], inside.distance[broken])
        runs += restarts * int(np.sum(proof.radius > 0))
    assert runs >= wanted


@pytest.mark.parametrize("name", MODELS)
def test_the_same_attack_breaks_twice_the_radii(name):
    """Else the attack would prove nothing."""
    model, (x, _) = trained(name), digits()
    radius = certified_and_attacked(name)[0].radius
    outside = tfl.attacks.PGD(radius=tfl.L2(2 * radius), steps=20, batch_size=600)(model, x)
    assert outside.success.any()
    assert np.all(outside.distance[outside.success] > radius[outside.success])
