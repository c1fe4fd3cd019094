"""The door, the estimates that steer, and what rounding and backends may not change."""

import math

import fresh_processes
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from keras import ops
from layer_maps import convolution_layers, integer_kernel, true_norm

from tf_lyapunov.spectral import precision
from tf_lyapunov.spectral.norms import (
    kernel_norm_upper_bound,
    measured_map,
    norm_estimate,
    spectral_norm,
)
from tf_lyapunov.spectral.reading import linear_maps
from tf_lyapunov.theory.operators import LinearMap


def test_door_takes_matrices_convolutions_and_variables():
    matrix = keras.Variable(np.diag([2.0, 1.0]).astype("float32"))
    assert 2.0 <= float(kernel_norm_upper_bound(matrix)) <= 2.01
    assert 9.0 <= float(kernel_norm_upper_bound(np.ones((3, 3, 1, 1), "float32"))) <= 9.45


def test_door_refuses_kernels_that_do_not_fit():
    with pytest.raises(ValueError, match="must be a matrix"):
        kernel_norm_upper_bound(np.zeros(3, "float32"))
    with pytest.raises(ValueError, match="fit"):
        kernel_norm_upper_bound(np.zeros((3, 3), "float32"), LinearMap("conv"))
    with pytest.raises(ValueError, match="fit"):
        kernel_norm_upper_bound(np.zeros((3, 2, 2), "float32"), LinearMap("dense"))


@settings(max_examples=12)
@given(convolution_layers())
def test_estimate_approaches_the_true_norm_from_below(case):
    layer, input_shape = case
    [(kernel, linear_map)] = linear_maps(layer)
    truth = true_norm(layer, input_shape)
    coarse, vector = norm_estimate(kernel, linear_map, iterations=2)
    fine, _ = norm_estimate(kernel, linear_map, iterations=12, start=vector)
    rounding = 1e-5 * truth + 1e-12
    assert float(coarse) <= float(fine) + rounding <= truth + 2 * rounding
    assert float(fine) >= 0.85 * truth


def test_warm_start_continues_where_it_stopped():
    kernel = np.random.default_rng(0).standard_normal((40, 30)).astype("float32")
    _, vector = norm_estimate(kernel, iterations=10)
    warm, _ = norm_estimate(kernel, iterations=10, start=vector)
    cold, _ = norm_estimate(kernel, iterations=20)
    assert float(warm) == pytest.approx(float(cold), rel=1e-5)


def test_estimate_of_a_kernel_of_unknown_size_uses_a_nominal_one():
    linear_map = measured_map((3, 3, 2, 4), LinearMap("conv", strides=2, groups=2))
    assert linear_map.input_shape == (12, 12, 4) and linear_map.strides == (2,)
    kernel = integer_kernel(0, (3, 3, 2, 4))
    estimate, _ = norm_estimate(kernel, iterations=30)
    assert 0.8 * float(kernel_norm_upper_bound(kernel)) <= float(estimate)
    assert float(estimate) <= float(kernel_norm_upper_bound(kernel))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_estimate_is_finite_at_every_scale(scale):
    kernel = (np.diag([3.0, 1.0, 1.0]) * scale).astype("float32")
    for steps in (1, 20):
        sigma, vector = norm_estimate(kernel, iterations=steps)
        assert math.isfinite(float(sigma)) and np.isfinite(ops.convert_to_numpy(vector)).all()
    assert float(sigma) == pytest.approx(3.0 * scale, rel=1e-4)
    assert float(spectral_norm(kernel)) == pytest.approx(3.0 * scale, rel=1e-4)


def test_reduced_precision_products_are_computed_in_float64(monkeypatch):
    kernel = ops.convert_to_tensor(np.ones((3, 3), "float32"))
    assert precision.work_dtype(kernel) == "float32"
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    if keras.backend.backend() != "jax":
        assert precision.work_dtype(kernel) == "float64"
        bound = kernel_norm_upper_bound(kernel)
        assert keras.backend.standardize_dtype(bound.dtype) == "float64"
        assert 3.0 <= float(bound) <= 3.01
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    assert precision.work_dtype(kernel) == "float32"


def test_gamma_refuses_sums_that_it_cannot_bound():
    assert precision.gamma(100, 2.0**-24) > 100 * 2.0**-24
    with pytest.raises(ValueError, match="too long"):
        precision.gamma(2**24, 2.0**-24)


def test_unrounded_float32_bound_can_fall_below_the_truth():
    """Negative control: without the allowance, float32 products do fall below."""
    below = 0
    for seed in range(20):
        kernel = np.random.default_rng(seed).standard_normal((300, 4)).astype("float32")
        gram = kernel.T @ kernel
        plain = math.sqrt(np.linalg.norm(gram.astype(np.float64), 2))
        truth = np.linalg.norm(kernel.astype(np.float64), 2)
        below += plain < truth
        assert float(kernel_norm_upper_bound(kernel)) >= truth
    assert below > 0


_COMPILED = """
import numpy as np, keras
from keras import ops
from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.regularizers import SpectralPenalty
from tf_lyapunov.spectral.norms import kernel_norm_upper_bound
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap
rng = np.random.default_rng(0)
strided = LinearMap("conv", (7, 7, 2), strides=2, padding="same")
cases = [((30, 20), None), ((3, 3, 2, 4), strided), ((3, 2, 3), None)]
compiled = lambda f: f
if keras.backend.backend() == "jax":
    import jax
    compiled = jax.jit
if keras.backend.backend() == "tensorflow":
    import tensorflow
    compiled = lambda f: tensorflow.function(f, jit_compile=True)
for shape, linear_map in cases:
    kernel = rng.standard_normal(shape).astype("float32")
    geometry = linear_map or LinearMap("dense" if len(shape) == 2 else "conv")
    truth = norm_upper_bound(kernel, geometry).value
    if geometry.input_shape is None and len(shape) > 2:
        truth /= 1.05
    measure = compiled(lambda k: kernel_norm_upper_bound(k, linear_map, near=truth))
    bound = float(measure(ops.convert_to_tensor(kernel)))
    assert truth * (1 - 1e-12) <= bound <= 1.2 * truth, (shape, truth, bound)
kernel = rng.standard_normal((20, 10)).astype("float32")
measure = compiled(kernel_norm_upper_bound)
for scale in (1e-25, 1e25):
    scaled = kernel * np.float32(scale)
    truth = np.linalg.norm(scaled.astype(float), 2)
    bound = float(measure(ops.convert_to_tensor(scaled)))
    assert truth <= bound <= 1.01 * truth, (scale, truth, bound)
kernel[0, 0] = np.nan
assert np.isnan(float(measure(ops.convert_to_tensor(kernel))))

steered = SpectralBound(1.1, guarantee="monitor")
layers = [keras.layers.Conv2D(4, 3, strides=2, kernel_constraint=SpectralBound(0.7)),
          keras.layers.Flatten(),
          keras.layers.Dense(8, "relu", kernel_constraint=SpectralBound(0.9)),
          keras.layers.Dense(3, kernel_constraint=steered,
                             kernel_regularizer=SpectralPenalty(1.0, 0.1))]
model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
model.compile(keras.optimizers.SGD(0.1, momentum=0.9),
              keras.losses.SparseCategoricalCrossentropy(from_logits=True))
steered.warm_up(layers[3].kernel)
model.fit(rng.standard_normal((64, 8, 8, 1)), rng.integers(0, 3, 64), epochs=2, verbose=0)
dense = np.linalg.norm(ops.convert_to_numpy(layers[2].kernel).astype(float), 2)
assert dense <= 0.9, dense
conv = norm_upper_bound(ops.convert_to_numpy(layers[0].kernel),
                        LinearMap("conv", (8, 8, 1), strides=2)).value
assert conv <= 0.7, conv
near = np.linalg.norm(ops.convert_to_numpy(layers[3].kernel).astype(float), 2)
assert near <= 1.1 * 1.3, near
print("ok", keras.backend.backend())
"""


@pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow"])
def test_bounds_and_training_under_every_backend_and_compiler(backend):
    """JAX under jit, TensorFlow under XLA, PyTorch eagerly."""
    pytest.importorskip(backend)
    assert f"ok {backend}" in fresh_processes.output(_COMPILED, backend=backend)
