"""Models of Keras and of its examples that were refused once get a bound."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.applications.convnext import ConvNeXt

from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate_on_probes

PATCH, PATCHES, WIDTH = 4, 16, 12


class Patches(layers.Layer):
    """As in the Keras example "Image classification with modern MLP models"."""

    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def call(self, x):
        patches = ops.image.extract_patches(x, self.patch_size)
        batch_size = ops.shape(patches)[0]
        num_patches = ops.shape(patches)[1] * ops.shape(patches)[2]
        patch_dim = ops.shape(patches)[3]
        return ops.reshape(patches, (batch_size, num_patches, patch_dim))


class MLPMixerLayer(layers.Layer):
    """As there."""

    def __init__(self, num_patches, hidden_units, dropout_rate, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mlp1 = keras.Sequential(
            [
                layers.Dense(units=num_patches, activation="gelu"),
                layers.Dense(units=num_patches),
                layers.Dropout(rate=dropout_rate),
            ]
        )
        self.mlp2 = keras.Sequential(
            [
                layers.Dense(units=num_patches, activation="gelu"),
                layers.Dense(units=hidden_units),
                layers.Dropout(rate=dropout_rate),
            ]
        )
        self.normalize = layers.LayerNormalization(epsilon=1e-6)

    def build(self, input_shape):
        return super().build(input_shape)

    def call(self, inputs):
        x = self.normalize(inputs)
        x_channels = ops.transpose(x, axes=(0, 2, 1))
        mlp1_outputs = self.mlp1(x_channels)
        mlp1_outputs = ops.transpose(mlp1_outputs, axes=(0, 2, 1))
        x = mlp1_outputs + inputs
        x_patches = self.normalize(x)
        mlp2_outputs = self.mlp2(x_patches)
        return x + mlp2_outputs


def mixer():
    augmentation = keras.Sequential(
        [
            layers.Normalization(mean=[0.4] * 3, variance=[0.07] * 3),
            layers.Resizing(16, 16),
            layers.RandomFlip("horizontal"),
            layers.RandomZoom(height_factor=0.2, width_factor=0.2),
        ]
    )
    inputs = layers.Input(shape=(12, 12, 3))
    x = Patches(PATCH)(augmentation(inputs))
    x = layers.Dense(units=WIDTH)(x)
    x = keras.Sequential([MLPMixerLayer(PATCHES, WIDTH, 0.2) for _ in range(2)])(x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dropout(rate=0.2)(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def convnext():
    return ConvNeXt(
        depths=[1, 1, 1, 1],
        projection_dims=[4, 6, 8, 8],
        drop_path_rate=0.1,
        input_shape=(32, 32, 3),
        weights=None,
        classes=5,
        name="small",
    )


def convnext_tiny():
    return keras.applications.ConvNeXtTiny(input_shape=(32, 32, 3), weights=None, classes=10)


@pytest.mark.parametrize(
    "make", [mixer, convnext, pytest.param(convnext_tiny, marks=pytest.mark.slow)]
)
def test_the_model_gets_a_bound_that_no_pair_of_inputs_exceeds(make):
    model = make()
    network = read_network(model)
    assert not network.program.unread
    assert validate_on_probes(network).steps == len(network.graph.calls)
    bound = lipschitz_upper_bound(model).gain_upper_bound
    assert 0 < bound < np.inf
    rng = np.random.default_rng(0)
    shape = model.input_shape[1:]
    logits = network.program.logits
    for scale in (1e-3, 1.0, 100.0):
        x = rng.normal(size=(8, *shape)) * scale
        step = rng.normal(size=x.shape) * scale / 100
        moved = np.linalg.norm(logits(x + step) - logits(x), axis=1)
        assert np.all(moved <= bound * np.linalg.norm(step.reshape(8, -1), axis=1) * (1 + 1e-9))
