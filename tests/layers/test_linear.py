"""What all affine Lipschitz layers must do alike: cache, save, compile, run on every backend."""

import pathlib

import fresh_processes
import keras
import numpy as np
import pytest
from linear_layers import assert_within_gain, call_matrix, fit_briefly, gradients

from tf_lyapunov.layers.activations import GroupSort
from tf_lyapunov.layers.almost_orthogonal import AlmostOrthogonalConv2D, AlmostOrthogonalDense
from tf_lyapunov.layers.bjorck import BjorckDense
from tf_lyapunov.layers.condensing import condense
from tf_lyapunov.layers.normalized import FrobeniusDense, NormalizedDense, SpectralDense
from tf_lyapunov.layers.orthogonal import CayleyConv2D, CayleyDense
from tf_lyapunov.layers.sandwich import SandwichDense
from tf_lyapunov.layers.skew import SkewOrthogonalConv2D

ROOT = pathlib.Path(__file__).resolve().parents[2]


def mixed_model():
    """One layer of each parametrisation, on 4×5 images (the others share their code)."""
    return keras.Sequential(
        [
            keras.Input((4, 5, 2)),
            CayleyConv2D(4, 3, activation=GroupSort(2)),
            SkewOrthogonalConv2D(4, 3, terms=4, inference_terms=6),
            AlmostOrthogonalConv2D(3, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            BjorckDense(7, iterations=2, activation="tanh"),
            SpectralDense(6, shrink_only=True),
            NormalizedDense(3),
        ]
    )


def lipschitz(model):
    return [layer for layer in model.layers if hasattr(layer, "effective_values")]


def test_training_under_a_compiler_keeps_every_layer_within_its_bound(traced_twice):
    """TensorFlow under XLA, then eager inference from what it left."""
    model = mixed_model()
    rng = np.random.default_rng(0)
    model.compile(
        keras.optimizers.Adam(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() != "torch",
    )
    x, y = rng.standard_normal((8, 4, 5, 2)).astype("float32"), rng.integers(0, 3, 8)
    model.fit(x, y, epochs=1, batch_size=8, verbose=0)
    for layer in lipschitz(model):
        shape = tuple(layer.input.shape[1:])
        assert_within_gain(layer, shape)


def test_inference_changes_no_variable_and_uses_the_cache():
    model = mixed_model()
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 2)).astype("float32")
    uncached = keras.ops.convert_to_numpy(model(x, training=False))
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    model.predict(x, verbose=0)
    model(x, training=False)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(variable))
    for layer in lipschitz(model):
        layer.refresh()
    np.testing.assert_allclose(model(x, training=False), uncached, atol=1e-6)
    # A cache that belongs to the raw kernel is what is used.
    layer = lipschitz(model)[-1]
    layer._cache[0].assign(np.zeros(layer._cache[0].shape))
    assert not np.any(call_matrix(layer, (6,)))
    layer.kernel.assign(2 * layer.kernel.numpy())
    assert np.any(call_matrix(layer, (6,)))


@pytest.mark.parametrize("kind", [SpectralDense, FrobeniusDense, BjorckDense, SandwichDense])
def test_condensed_layers_keep_their_weights_in_training_too(kind):
    model = keras.Sequential([keras.Input((5,)), kind(4)])
    x = np.random.default_rng(0).standard_normal((3, 5)).astype("float32")
    free = keras.ops.convert_to_numpy(model(x, training=True))
    condense(model).layers[0].kernel.assign(np.ones(model.layers[0].kernel.shape))
    for training in (True, False):
        found = keras.ops.convert_to_numpy(model(x, training=training))
        np.testing.assert_allclose(found, free, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize(
    "kind",
    [
        SpectralDense,
        FrobeniusDense,
        NormalizedDense,
        AlmostOrthogonalDense,
        CayleyDense,
        BjorckDense,
        SandwichDense,
    ],
)
def test_factors_applied_in_training_have_the_outputs_and_gradients_of_the_weights(kind, shape):
    layer = kind(shape[1])
    layer.build((None, shape[0]))
    layer.kernel.assign(2 * np.random.default_rng(1).standard_normal(layer.kernel.shape))
    x = np.random.default_rng(0).standard_normal((3, shape[0])).astype("float32")
    found, expected = (keras.ops.convert_to_numpy(layer(x, training=t)) for t in (True, False))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    found, expected = (gradients(layer, x, training) for training in (True, False))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


_ELSEWHERE = """
import sys
import keras, numpy as np
sys.path.insert(0, sys.argv[1])
import linear_layers as maps
import tf_lyapunov.layers.bjorck, tf_lyapunov.layers.almost_orthogonal
import tf_lyapunov.layers.normalized, tf_lyapunov.layers.orthogonal, tf_lyapunov.layers.skew
data = np.load(sys.argv[3])
model = keras.saving.load_model(sys.argv[2])
np.testing.assert_allclose(model.predict(data["x"], verbose=0), data["y"], atol=1e-4)
model.compile(keras.optimizers.Adam(0.1),
              keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(data["x"], np.arange(len(data["x"])) % 3, epochs=1, batch_size=8, verbose=0)
layers = [layer for layer in model.layers if hasattr(layer, "effective_values")]
assert len(layers) == 6
for layer in layers:
    shape = tuple(layer.input.shape[1:])
    maps.assert_within_gain(layer, shape)
for name in ("real", "imag"):
    layers[0].kernel.assign(np.zeros(layers[0].kernel.shape))
    assert np.isfinite(layers[0].effective_values()[name]).all()
print("within bounds on", keras.backend.backend())
"""


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_saved_models_load_predict_and_train_in_a_new_process(tmp_path, backend):
    pytest.importorskip(backend)
    model = mixed_model()
    x = np.random.default_rng(0).standard_normal((8, 4, 5, 2)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=model.predict(x, verbose=0))
    model.save(tmp_path / "model.keras")
    files = [str(ROOT / "tests"), str(tmp_path / "model.keras"), str(tmp_path / "data.npz")]
    done = fresh_processes.output(_ELSEWHERE, *files, backend=backend)
    assert f"within bounds on {backend}" in done


def test_half_precision_training_keeps_the_stated_inflation():
    for dtype in ("mixed_bfloat16", "mixed_float16"):
        layer = CayleyConv2D(4, 3, dtype=dtype)
        fit_briefly(layer, (4, 5, 2), steps=2)
        assert layer.rounding_inflation > 1
        assert_within_gain(layer, (4, 5, 2))


def test_rounding_inflation_is_one_in_full_precision_only():
    for dtype, rounds in [("float32", False), ("mixed_bfloat16", True), ("mixed_float16", True)]:
        for layer in (SpectralDense(3, dtype=dtype), AlmostOrthogonalConv2D(3, 3, dtype=dtype)):
            layer.build((None, 5) if isinstance(layer, SpectralDense) else (None, 5, 5, 2))
            assert (layer.rounding_inflation > 1) == rounds
