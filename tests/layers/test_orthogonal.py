"""Cayley layers: norms, orthogonality, geometry."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_layers import (
    EXAMPLES,
    assert_within_gain,
    exact_matrix,
    fit_briefly,
    gradients,
    set_kernel,
)

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.activations import GroupSort, TwoSidedReLU
from tf_lyapunov.layers.orthogonal import CayleyConv2D, CayleyDense
from tf_lyapunov.theory.orthogonal import cayley

DTYPES = st.sampled_from(["float32", "float32", "mixed_bfloat16", "mixed_float16", "float64"])
SCALES = st.sampled_from([0.0, 1e-12, 0.1, 1.0, 30.0, 1e4])
GAINS = st.sampled_from([1.0, 0.3, 7.0])


@settings(max_examples=EXAMPLES)
@given(st.integers(1, 9), st.integers(1, 9), DTYPES, SCALES, GAINS, st.integers(0, 999))
def test_dense_map_is_a_contraction_with_orthonormal_columns(a, b, dtype, scale, gain, seed):
    layer = CayleyDense(b, max_gain=gain, dtype=dtype)
    layer.build((None, a))
    set_kernel(layer, seed, scale)
    sigma = assert_within_gain(layer, (a,), training=seed % 2 == 0)
    if scale <= 30:
        # The solve loses the condition number 1 + ‖A‖ of I + A.
        coarse = {"mixed_bfloat16": 2.0**-6, "mixed_float16": 2.0**-8}.get(dtype, 2e-3)
        assert sigma.min() >= gain * (1 - coarse)


@settings(max_examples=EXAMPLES)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 2),
    DTYPES,
    SCALES,
    GAINS,
    st.integers(0, 999),
)
def test_convolution_is_a_contraction(shape, filters, k, stride, dtype, scale, gain, seed):
    layer = CayleyConv2D(filters, k, stride, max_gain=gain, dtype=dtype)
    layer.build((None, *shape))
    set_kernel(layer, seed, scale)
    assert_within_gain(layer, shape, training=seed % 2 == 0)
    values = layer.effective_values()
    norms = np.linalg.norm(values["real"] + 1j * values["imag"], 2, axis=(1, 2))
    assert norms.max() <= gain * layer.rounding_inflation


@pytest.mark.parametrize("shape", [(4, 4, 3), (5, 4, 2), (4, 7, 3), (1, 3, 1)])
@pytest.mark.parametrize(("filters", "stride"), [(3, 1), (12, 2), (16, 2)])
def test_convolution_keeps_norms_where_filters_suffice(shape, filters, stride):
    layer = CayleyConv2D(filters, 3, stride)
    layer.build((None, *shape))
    sigma = np.linalg.svd(exact_matrix(layer, shape), compute_uv=False)
    np.testing.assert_allclose(sigma, 1.0, atol=1e-4)


def test_frequencies_are_those_of_the_published_transform():
    layer = CayleyConv2D(2, 3)
    layer.build((None, 5, 6, 3))
    kernel = keras.ops.convert_to_numpy(layer.kernel).astype(float)
    padded = np.zeros((5, 6, 3, 2))
    for i in range(3):
        for j in range(3):
            padded[(1 - i) % 5, (1 - j) % 6] += kernel[i, j]
    symbol = np.fft.fft2(padded, axes=(0, 1))[:, :4].reshape(-1, 3, 2)
    values = layer.effective_values()
    np.testing.assert_allclose(values["real"] + 1j * values["imag"], cayley(symbol), atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape"), [(CayleyDense(5), (7,)), (CayleyConv2D(3, 3, 2), (5, 6, 2))]
)
def test_bound_survives_training_at_an_absurd_rate(layer, shape):
    before = keras.ops.convert_to_numpy(layer.kernel) if layer.built else None
    fit_briefly(layer, shape)
    assert before is None and np.abs(keras.ops.convert_to_numpy(layer.kernel)).max() > 0.2
    assert_within_gain(layer, shape)
    assert_within_gain(layer, shape, training=True)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e5])
def test_gradients_are_finite(scale):
    for layer, shape in [
        (CayleyDense(3), (5,)),
        (CayleyDense(5), (3,)),
        (CayleyConv2D(3, 3), (4, 5, 2)),
    ]:
        layer.build((None, *shape))
        set_kernel(layer, 1, scale)
        x = np.random.default_rng(0).standard_normal((4, *shape)).astype("float32")
        assert np.isfinite(gradients(layer, x)).all()


def test_activation_and_bias_are_applied_and_steep_activations_refused():
    layer = CayleyDense(4, activation=GroupSort(2), bias_initializer="ones")
    x = np.random.default_rng(0).standard_normal((3, 4)).astype("float32")
    y = keras.ops.convert_to_numpy(layer(x))
    plain = x @ layer.effective_values()["kernel"] + 1
    np.testing.assert_allclose(np.sort(y), np.sort(plain), atol=1e-5)
    clone = CayleyDense.from_config(layer.get_config())
    assert isinstance(clone.activation, GroupSort)
    with pytest.raises(ValueError, match="steeper than 1"):
        CayleyDense(4, activation="gelu")
    with pytest.raises(ValueError, match="softmax"):
        CayleyDense(4, activation="softmax")
    for activation in (TwoSidedReLU(), keras.layers.PReLU()):
        name = type(activation).__name__
        with pytest.raises(UnsupportedLayerError, match=f"MaxMin.*{name}.*of its own"):
            CayleyDense(4, activation=activation)


def test_images_of_unknown_or_other_size_are_refused():
    with pytest.raises(ValueError, match="size of its images"):
        CayleyConv2D(3, 3).build((None, None, 5, 2))
    layer = CayleyConv2D(3, 3)
    layer(np.zeros((1, 4, 4, 2), "float32"))
    with pytest.raises(ValueError, match="shape"):
        layer(np.zeros((1, 5, 4, 2), "float32"))
    with pytest.raises(ValueError, match="strides"):
        CayleyConv2D(3, 3, strides=(1, 2, 3))


def test_kernels_that_are_not_finite_give_nan_and_never_a_wrong_map():
    layer = CayleyDense(3)
    layer.build((None, 3))
    layer.kernel.assign(np.full((3, 3), np.nan, "float32"))
    assert np.isnan(keras.ops.convert_to_numpy(layer(np.ones((1, 3), "float32")))).all()
