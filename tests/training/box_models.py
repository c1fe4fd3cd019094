"""Small models with every kind of step that boxes pass, and samples of regions."""

import keras
import numpy as np
from keras import layers

from tf_lyapunov.layers import GroupSort, MaxMin, SpectralDense, TwoSidedReLU


def branched(normalized=True):
    """Convolutions of several kinds, activations that fall, branches, pools, moves."""
    x = keras.Input((6, 6, 2))
    h = layers.Rescaling(-0.5, offset=0.2)(x)
    h = layers.Conv2D(4, 3, padding="same", activation="gelu", bias_initializer="normal")(h)
    if normalized:
        h = layers.BatchNormalization(
            beta_initializer="normal", gamma_initializer=keras.initializers.Constant(-0.7)
        )(h)
    h = layers.DepthwiseConv2D(3, padding="same", activation="silu")(h)
    h = layers.PReLU(alpha_initializer=keras.initializers.Constant(-0.3))(h)
    near = layers.SeparableConv2D(4, 3, padding="same", activation="leaky_relu")(h)
    h = layers.Subtract()([layers.Add()([h, near]), layers.ZeroPadding2D(1)(near)[:, 1:-1, 1:-1]])
    h = layers.Concatenate()([h, layers.Conv2DTranspose(2, 3, padding="same")(h)])
    h = layers.AveragePooling2D(2)(layers.MaxPooling2D(2, strides=1)(h))
    h = keras.ops.abs(layers.Flatten()(h))
    h = MaxMin()(layers.Dense(6, "tanh")(h))
    return keras.Model(x, layers.Dense(3, bias_initializer="normal")(h))


def sorted_chain():
    """Layers of this library."""
    return keras.Sequential(
        [
            keras.Input((5,)),
            SpectralDense(8, activation=GroupSort()),
            TwoSidedReLU(),
            layers.Dense(4, "relu"),
            layers.Dense(3),
        ]
    )


def monotone():
    """Weights of one sign: every signal grows, so that boxes are exact."""
    positive = keras.initializers.RandomUniform(0.1, 1.0)
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(3, 2, activation="relu", kernel_initializer=positive),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(3, "sigmoid", kernel_initializer=positive),
        ]
    )


def convolved():
    """A convolution, a normalization, a pool."""
    return keras.Sequential(
        [
            keras.Input((5, 5, 1)),
            layers.Conv2D(3, 2, strides=2, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(2, strides=1),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def rectified(width=5, depth=3):
    """A chain of ReLUs."""
    hidden = [layers.Dense(16, "relu", bias_initializer="normal") for _ in range(depth)]
    return keras.Sequential([keras.Input((width,)), *hidden, layers.Dense(3)])


def inputs(model, n=3):
    return np.random.default_rng(0).random((n, *model.input_shape[1:])).astype("float32")


def points(x, radius, norm, limits=None, count=200, seed=1):
    """(count, n, …) points of the ball of a norm around each of n inputs, corners among them."""
    rng = np.random.default_rng(seed)
    away = rng.normal(size=(count, *x.shape))
    if norm == "linf":
        away = np.where(rng.random((count, 1)) < 0.5, np.sign(away.reshape(count, -1)),
                        rng.uniform(-1, 1, (count, x.size))).reshape(away.shape)  # fmt: skip
    else:
        size = np.linalg.norm(away.reshape(*away.shape[:2], -1), axis=-1)
        away = away / size.reshape(*size.shape, *[1] * (x.ndim - 1))
    found = x + radius * away
    return found if limits is None else np.clip(found, *limits)
