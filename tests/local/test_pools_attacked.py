"""Radii of small networks with max pools, against attacks from inside and from outside."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.local import radii
from tf_lyapunov.local.boxes import Effort
from tf_lyapunov.local.evaluating import Evaluation
from tf_lyapunov.local.flow import flow_of
from tf_lyapunov.local.radii import Prover, margin_rows
from tf_lyapunov.program.network import read_network

STEPS = 40


def overlapping():
    x = keras.Input((8, 7, 2))
    h = layers.Conv2D(4, 3, padding="same")(x)
    h = layers.LeakyReLU(negative_slope=0.2)(layers.MaxPooling2D(3, 2, padding="same")(h))
    h = layers.MaxPooling2D(2, 1)(layers.Conv2D(3, 2, activation="relu")(h))
    return x, h


def pairs():
    x = keras.Input((9, 8, 1))
    h = layers.MaxPooling2D(2)(layers.Conv2D(4, 2)(x))
    h = layers.MaxPooling2D((1, 2), padding="same")(layers.Conv2D(4, 2, padding="same")(h))
    return x, layers.ReLU()(h)


def residual():
    x = keras.Input((8, 8, 1))
    h = layers.Conv2D(3, 3, strides=2, padding="same", activation="relu")(x)
    g = layers.Conv2D(3, 3, padding="same")(layers.ReLU()(h))
    h = layers.MaxPooling2D(4)(layers.Add()([h, g]))
    return x, layers.Concatenate()([h, layers.Reshape((1, 1, 3))(layers.GlobalMaxPooling2D()(g))])


def thirds():
    x = keras.Input((13, 2))
    h = layers.MaxPooling1D(3)(layers.Conv1D(4, 3, padding="same", activation="relu")(x))
    return x, layers.MaxPooling1D(2, padding="same")(layers.Conv1D(3, 2, dilation_rate=2)(h))


KINDS = {"overlapping": overlapping, "pairs": pairs, "residual": residual, "thirds": thirds}


def built(kind, seed):
    x, h = KINDS[kind]()
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(h)))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        size = np.prod(weight.shape[:-1])
        weight.assign(1.5 * rng.normal(size=weight.shape) / np.sqrt(size))
    return model


def within(e, radius, norm):
    """Steps cut to a ball, sample by sample."""
    if norm == "linf":
        return np.clip(e, -radius, radius)
    size = np.linalg.norm(e.reshape(len(e), -1), axis=1)
    return e * np.minimum(1, radius / np.maximum(size, 1e-300)).reshape(-1, *[1] * (e.ndim - 1))


def least_margin(model, flow, x, label, radius, norm, rng, starts=16):
    """The least margin that gradient descent finds on a ball, by the model's own program."""
    program = read_network(model).program
    rivals = np.repeat([j for j in range(3) if j != label], starts)
    c = np.zeros((len(rivals), 3))
    c[:, label], c[np.arange(len(c)), rivals] = 1.0, -1.0
    e = within(rng.normal(size=(len(c), *x.shape)) * radius, radius, norm)
    best = np.inf
    for i in range(STEPS):
        logits = program.logits(x + e)
        best = min(best, np.min(np.sum(c * logits, axis=1)))
        g = Evaluation(flow, x + e).gradient(c)
        if norm == "linf":
            g = np.sign(g)
        else:
            size = np.linalg.norm(g.reshape(len(g), -1), axis=1)
            g = g / np.maximum(size, 1e-300).reshape(-1, *[1] * x.ndim)
        e = within(e - radius * 0.5 * (1 - i / STEPS) * g, radius, norm)
    return best


def checked(kind, norm, seed, efforts, beyond=3.0):
    """A proved radius holds against the attack, which succeeds a little further out."""
    model, rng = built(kind, seed), np.random.default_rng(seed)
    flow = flow_of(read_network(model))
    # Of several inputs one that lies near a boundary, where bounds are close to the truth.
    x = rng.normal(size=(20, *model.input_shape[1:]))
    logits = np.sort(read_network(model).program.logits(x), axis=1)
    x = x[np.argsort(logits[:, -1] - logits[:, -2])[5]]
    label = int(np.argmax(read_network(model).program.logits(x[None])[0]))
    answer = Prover(flow, norm, efforts=efforts).radius(x, margin_rows(3, label), lambda r: 0.0)
    assert answer.radius > 0
    assert least_margin(model, flow, x, label, answer.radius, norm, rng) >= 0
    assert least_margin(model, flow, x, label, beyond * answer.radius, norm, rng) < 0
    return answer


@pytest.mark.parametrize(
    ("kind", "norm"),
    [("overlapping", "l2"), ("overlapping", "linf"), ("pairs", "l2"), ("residual", "l2"),
     ("residual", "linf"), ("thirds", "l2")],
)  # fmt: skip
def test_no_attack_breaks_a_radius_and_one_succeeds_beyond_it(kind, norm, monkeypatch):
    if kind != "thirds":  # splits of units take most of the time
        monkeypatch.setattr(radii, "_MANY", 0)
        monkeypatch.setattr(radii, "_ENOUGH", 0)
    answer = checked(kind, norm, 1, (Effort(4, margin_steps=20), Effort(2, margin_steps=10)))
    assert bool(answer.splits) == (kind == "thirds")
