"""Orthogonal kernels of 16 bits: what float32 rounds to, on every backend."""

import keras
import numpy as np
import pytest
from keras import ops

from tf_lyapunov import layers

# Half a unit in the last place, times what a Gram matrix of 8 entries adds up.
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda d: layers.OrthogonalDense(4, dtype=d), (2, 8)),
        (lambda d: layers.OrthogonalConv2D(4, 2, strides=2, dtype=d), (2, 4, 4, 2)),
        (lambda d: layers.OrthogonalConv2DTranspose(2, 2, strides=2, dtype=d), (2, 4, 4, 8)),
        (lambda d: layers.BjorckDense(4, dtype=d), (2, 8)),
        (lambda d: layers.CayleyDense(4, kernel_initializer="orthogonal", dtype=d), (2, 8)),
        (
            lambda d: layers.SpectralDense(
                4, kernel_initializer=keras.initializers.Orthogonal(0.5, seed=1), dtype=d
            ),
            (2, 8),
        ),
    ],
)
def test_kernels_of_16_bits_are_built_and_saved(build, shape, dtype, tmp_path):
    layer = build(dtype)
    x = ops.cast(np.random.default_rng(0).normal(size=shape), dtype)
    y = np.asarray(ops.convert_to_numpy(ops.cast(layer(x), "float32")))
    assert np.all(np.isfinite(y)) and layer.variable_dtype == dtype
    model = keras.Sequential([keras.Input(shape[1:], dtype=dtype), layer])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    loaded = np.asarray(ops.convert_to_numpy(ops.cast(again(x), "float32")))
    np.testing.assert_array_equal(loaded, y)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_they_are_orthogonal_but_for_rounding(dtype):
    layer = layers.OrthogonalDense(4, dtype=dtype)
    layer.build((None, 8))
    kernel = np.asarray(ops.convert_to_numpy(ops.cast(layer.kernel, "float32")), np.float64)
    departure = np.linalg.norm(kernel.T @ kernel - np.eye(4), 2)
    # ‖E‖ ≤ u‖W‖_F for W + E, and the Gram matrix moves by 2‖E‖ + ‖E‖².
    moved = ROUNDING[dtype] * 2
    assert 0 < departure <= (2 * moved + moved**2) * (1 + 1e-3)
