"""No attack finds a perturbation below a sound bound: 10⁵ pairs of models and inputs."""

import math

import keras
import numpy as np
import pytest

from tf_lyapunov.attacks import DDN, DeepFool, MinimalFGV
from tf_lyapunov.evaluation.bracket import bracket
from tf_lyapunov.layers import LocalResponseNormalization, LpPooling2D

layers = keras.layers
IMAGE = (8, 8, 2)


def mlp(activation):
    hidden = [layers.Dense(width, activation) for width in (8, 6)]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(4)])


def cnn(*middle):
    first, last = layers.Conv2D(4, 3, padding="same"), layers.Dense(4)
    return keras.Sequential([keras.Input(IMAGE), first, *middle, layers.Flatten(), last])


MODELS = {
    "linear": lambda: keras.Sequential([keras.Input((6,)), layers.Dense(4)]),
    "tanh": lambda: mlp("tanh"),
    "sigmoid": lambda: mlp("sigmoid"),
    "softplus": lambda: mlp("softplus"),
    "relu": lambda: mlp("relu"),
    "max pooling": lambda: cnn(layers.ReLU(), layers.MaxPooling2D(3, 2)),
    "average pooling": lambda: cnn(layers.ReLU(), layers.AveragePooling2D(3, 2, padding="same")),
    "Lp pooling": lambda: cnn(LpPooling2D(2, p=2.0)),
    "batch normalization": lambda: cnn(layers.BatchNormalization(), layers.ReLU()),
    "response normalization": lambda: cnn(
        LocalResponseNormalization(1, 1.0, 0.5, 0.75), layers.MaxPooling2D(2)
    ),
}
ATTACKS = {"FGV": MinimalFGV(), "DeepFool": DeepFool(), "DDN": DDN(steps=30)}


def redraw(model, seed):
    """New random weights; statistics and scales of batch normalization stay positive."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        arrays = [
            rng.normal(size=w.shape) / math.sqrt(max(1, w.size // w.shape[-1]))
            for w in layer.get_weights()
        ]
        if isinstance(layer, layers.BatchNormalization):
            arrays = [np.abs(a) + 0.1 for a in arrays]
        layer.set_weights(arrays)
    return rng


def pairs(name, draws, inputs, seconds=0.0):
    """Number of inputs on which a perturbation was found; `bracket` raises where below a bound."""
    model, count = MODELS[name](), 0
    for seed in range(draws):
        rng = redraw(model, seed)
        x = rng.normal(size=(inputs, *model.input_shape[1:])).astype("float32")
        # Or one class may win everywhere, and there is nothing to find.
        last = model.layers[-1].bias
        last.assign(last - np.mean(model.predict(x, verbose=0), axis=0))
        found = bracket(model, x, attacks=ATTACKS, batch_size=1024, time_budget=seconds)
        assert np.all(found.bound <= found.upper)
        # It is 0 for wrong inputs, and for those within rounding of the decision boundary.
        assert np.mean(found.bound[~found.wrong] > 0) > 0.99
        assert found.found.mean() > 0.5
        # Something is found near the bounds: attacks too weak to contradict would prove nothing.
        assert np.min(found.ratio[found.found]) < (1.001 if name == "linear" else 30)
        count += int(found.found.sum())
    return count


@pytest.mark.parametrize("name", ["softplus", "response normalization"])
def test_no_attack_finds_less_than_the_sound_bound(name):
    assert pairs(name, 1, 100, seconds=1.0) > 50


@pytest.mark.slow
def test_no_attack_finds_less_than_the_sound_bound_on_a_hundred_thousand_pairs():
    found = {name: pairs(name, 3, 4500) for name in MODELS}
    print(found, sum(found.values()))
    assert sum(found.values()) >= 100_000
