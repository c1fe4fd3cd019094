"""Small networks that bounds around inputs apply to, and points around their inputs."""

import functools

import keras
import numpy as np
from small_proofs import filled

from tf_lyapunov.verification.network import forward

layers = keras.layers


@functools.cache
def network_of(kind):
    """One of `KINDS`, with random weights."""
    return filled(KINDS[kind](), seed=len(kind))


def _dense():
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, activation="relu"),
            layers.Dense(5, activation="tanh"),
            layers.Dense(3, activation="softmax"),
        ]
    )


def _convolutional():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(3, 3, padding="same", activation="relu"),
            layers.Conv2D(4, 2, strides=2, use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(negative_slope=0.1),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def _residual():
    x = keras.Input((4,))
    h = layers.Dense(4, activation="relu")(x)
    h = layers.Add()([x, layers.Dense(4)(h)])
    h = layers.Concatenate()([layers.ReLU(max_value=1.0)(h), layers.Rescaling(2.0)(h)])
    return keras.Model(x, layers.Dense(1, activation="sigmoid")(h))


def _pooled():
    return keras.Sequential(
        [
            keras.Input((6, 5, 1)),
            layers.Rescaling(0.5, 0.1),
            layers.Conv2D(2, 3, padding="same"),
            layers.PReLU(shared_axes=[1, 2]),
            layers.MaxPooling2D(2),
            layers.Conv2D(3, 2, activation="elu"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(3),
        ]
    )


def _overlapping():
    return keras.Sequential(
        [
            keras.Input((11, 10, 1)),
            layers.Conv2D(2, 3, padding="same"),
            layers.MaxPooling2D(3, 2, padding="same"),
            layers.Conv2D(2, 2, activation="relu"),
            layers.MaxPooling2D((3, 1), 1),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


KINDS = {
    "dense": _dense,
    "convolutional": _convolutional,
    "residual": _residual,
    "pooled": _pooled,
    "overlapping": _overlapping,
}


def points(center, radius, norm, bounds, rng, count=400):
    """Points of a ball within bounds, most of them at its edge."""
    order = {"l2": 2, "linf": np.inf, "l1": 1}[norm]
    step = rng.normal(size=(count, center.size))
    step[: count // 2] = np.sign(step[: count // 2]) * (rng.random((count // 2, center.size)) < 0.5)
    size = np.maximum(np.linalg.norm(step, order, axis=1), 1e-12)
    share = np.where(rng.random(count) < 0.7, 1.0, rng.random(count)) * (1 - 1e-9)
    moved = center + (step * (radius * share / size)[:, None]).reshape(count, *center.shape)
    return moved if bounds is None else np.clip(moved, *bounds)


def signals(network, x):
    """Values of every step of the verifier's network up to the logits, at inputs (n, …)."""
    values = {network.steps[0].name: x}
    for step in network.steps[1:]:
        held = [(values[i], np.zeros_like(values[i])) for i in step.inputs]
        values[step.name] = forward(step, held)[0]
        if step.name == network.logits:
            return values
    raise AssertionError
