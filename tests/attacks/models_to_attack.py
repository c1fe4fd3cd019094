"""Small classifiers whose robustness is known in closed form."""

import keras
import numpy as np

layers = keras.layers


def linear(weights, bias=None, activation=None):
    """f(x) = xᵀW + b as a Keras model."""
    weights = np.asarray(weights, np.float32)
    model = keras.Sequential(
        [keras.Input((weights.shape[0],)), layers.Dense(weights.shape[1], activation=activation)]
    )
    bias = np.zeros(weights.shape[1]) if bias is None else bias
    model.set_weights([weights, np.asarray(bias, np.float32)])
    return model


def linear_radius(weights, bias, x, labels, dual):
    """Distance of each input to the nearest other class of a linear classifier."""
    weights, bias = np.asarray(weights, np.float64), np.asarray(bias, np.float64)
    logits = np.asarray(x, np.float64) @ weights + bias
    best = np.full(len(x), np.inf)
    for j in range(weights.shape[1]):
        for i, y in enumerate(labels):
            if j != y:
                gap = logits[i, y] - logits[i, j]
                best[i] = min(best[i], gap / np.linalg.norm(weights[:, y] - weights[:, j], dual))
    return best


def mlp(width=16, inputs=6, classes=3, head=None):
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(width, activation="tanh", kernel_initializer="glorot_normal"),
            layers.Dense(classes, activation=head),
        ]
    )


def cnn(classes=3):
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(classes),
        ]
    )


def points(n, *shape, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).normal(size=(n, *shape))).astype(np.float32)
