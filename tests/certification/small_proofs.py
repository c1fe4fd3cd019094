"""Small models and their proof files."""

import functools

import keras
import numpy as np

from tf_lyapunov.certification import certify

layers = keras.layers


def filled(model, seed=0):
    """The model with random weights, moving variances above zero."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed_generator" in variable.path:
            continue
        value = rng.normal(size=variable.shape) / np.sqrt(max([*variable.shape, 1][0], 1))
        variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)
    return model


@functools.cache
def dense_model(seed=0, slope=0.1):
    return filled(
        keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(5, activation="relu", name="first"),
                layers.Dense(4, name="second"),
                layers.LeakyReLU(negative_slope=slope, name="leak"),
                layers.Dense(3, name="logits"),
            ]
        ),
        seed,
    )


@functools.cache
def convolution_model():
    x = inputs = keras.Input((6, 5, 2))
    x = layers.Rescaling(0.5, 0.1)(x)
    x = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU(max_value=2.0)(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(2, padding="same", activation="silu")(x)
    x = layers.Add()([x, layers.Dropout(0.5)(y)])
    x = layers.MaxPooling2D(2, 1)(x)
    x = layers.SeparableConv2D(3, 2, padding="same", activation="elu")(x)
    x = layers.AveragePooling2D(2, padding="same")(layers.ZeroPadding2D(1)(x))
    x = layers.PReLU(shared_axes=[1])(x)
    x = layers.Dense(4, activation="tanh")(layers.Flatten()(x))
    return filled(keras.Model(inputs, layers.Dense(3, activation="softmax")(x)))


def inputs_of(model, count=12, seed=1):
    shape = tuple(model.inputs[0].shape[1:])
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype("float32")


def saved(model, path, method="composition", count=12):
    """A certificate and the proof file it was saved to."""
    certificate = certify(model, inputs_of(model, count), method=method)
    certificate.save(path)
    return certificate
