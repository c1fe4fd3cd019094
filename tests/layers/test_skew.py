"""Skew orthogonal convolutions: skewness, norms, orthogonality, geometry."""

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

from tf_lyapunov.layers.skew import SkewOrthogonalConv2D
from tf_lyapunov.theory.operators import convolution_matrix
from tf_lyapunov.theory.orthogonal import exponential_truncation_error_upper_bound

DTYPES = st.sampled_from(["float32", "float32", "mixed_bfloat16", "mixed_float16", "float64"])


@settings(max_examples=EXAMPLES)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)),
    st.integers(1, 5),
    st.sampled_from([1, 3, (3, 5), 5]),
    st.integers(1, 2),
    st.sampled_from([(5, 12), (5, 12), (2, 3), (1, 7), (6, 10)]),
    st.sampled_from([1.0, 0.4, 2.5]),
    DTYPES,
    st.sampled_from([0.0, 1e-20, 0.1, 1e6]),
    st.sampled_from([1.0, 0.3, 7.0]),
    st.integers(0, 999),
)
def test_map_is_a_contraction_and_its_filter_exactly_skew(
    shape, filters, k, stride, terms, skew_norm, dtype, scale, gain, seed
):
    layer = SkewOrthogonalConv2D(
        filters, k, stride, *terms, skew_norm, shrink_only=seed % 2 == 1, max_gain=gain, dtype=dtype
    )
    layer.build((None, *shape))
    set_kernel(layer, seed, scale)
    assert_within_gain(layer, shape, training=seed % 2 == 0)
    skew = convolution_matrix(layer.effective_values()["kernel"], layer.linear_map).toarray()
    np.testing.assert_array_equal(skew, -skew.T)
    if dtype in ("float32", "float64"):
        assert np.linalg.norm(skew, 2) <= skew_norm * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(4, 4, 3), (5, 4, 2), (4, 7, 1)])
@pytest.mark.parametrize(("filters", "stride"), [(3, 1), (4, 1), (12, 2), (13, 2)])
def test_map_keeps_norms_where_filters_suffice(shape, filters, stride):
    layer = SkewOrthogonalConv2D(filters, 3, stride)
    layer.build((None, *shape))
    set_kernel(layer, 1, 1.0)
    for training, terms in ((False, 12), (True, 5)):
        sigma = np.linalg.svd(exact_matrix(layer, shape, training), compute_uv=False)
        assert sigma.max() <= 1 + 1e-12
        assert sigma.min() >= 1 - exponential_truncation_error_upper_bound(terms, 1.0) - 1e-12


def test_fewer_filters_truncate_an_orthogonal_map():
    layer = SkewOrthogonalConv2D(2, 3)
    layer.build((None, 4, 5, 6))
    sigma = assert_within_gain(layer, (4, 5, 6))
    assert layer.kernel.shape == (3, 3, 6, 6) and len(sigma) == 40
    np.testing.assert_allclose(sigma, 1.0, atol=1e-6)


def test_filter_is_used_up_to_its_norm():
    layer = SkewOrthogonalConv2D(4, 3)
    layer.build((None, 8, 8, 4))
    skew = convolution_matrix(layer.effective_values()["kernel"], layer.linear_map).toarray()
    assert np.linalg.norm(skew, 2) >= 0.85


def test_dividing_by_the_reshaped_norm_would_be_unsound():
    """Negative control: the filter's reshaped norm, without its factor, lets ‖L‖ exceed 1."""
    kernel = np.ones((5, 5, 1, 1)) * np.sign(np.arange(25) - 12).reshape(5, 5, 1, 1)
    kernel /= np.linalg.norm(kernel.reshape(25, 1), 2)
    layer = SkewOrthogonalConv2D(1, 5)
    layer.build((None, 12, 12, 1))
    skew = convolution_matrix(kernel, layer.linear_map).toarray()
    assert np.array_equal(skew, -skew.T) and np.linalg.norm(skew, 2) > 1.5
    layer.kernel.assign(kernel)
    assert_within_gain(layer, (12, 12, 1))


def test_bound_survives_training_at_an_absurd_rate():
    layer = SkewOrthogonalConv2D(5, 3, 2)
    fit_briefly(layer, (5, 6, 2))
    assert_within_gain(layer, (5, 6, 2))
    assert_within_gain(layer, (5, 6, 2), training=True)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e5])
@pytest.mark.parametrize("shrink_only", [False, True])
def test_gradients_are_finite(scale, shrink_only):
    layer = SkewOrthogonalConv2D(3, 3, shrink_only=shrink_only)
    layer.build((None, 4, 5, 2))
    set_kernel(layer, 1, scale)
    x = np.random.default_rng(0).standard_normal((4, 4, 5, 2)).astype("float32")
    assert np.isfinite(gradients(layer, x)).all()


def test_arguments_are_checked_and_restored():
    with pytest.raises(ValueError, match="odd"):
        SkewOrthogonalConv2D(3, 4)
    with pytest.raises(ValueError, match="skew_norm"):
        SkewOrthogonalConv2D(3, skew_norm=0.0)
    with pytest.raises(ValueError, match="size of its images"):
        SkewOrthogonalConv2D(3).build((None, None, 5, 2))
    layer = SkewOrthogonalConv2D(3, (3, 5), 2, 4, 9, 0.5, activation="relu", use_bias=False)
    clone = SkewOrthogonalConv2D.from_config(layer.get_config())
    assert clone.get_config() == layer.get_config()
    symbolic = clone(keras.Input((7, 6, 2)))
    assert symbolic.shape == (None, 4, 3, 3) == clone.compute_output_shape((None, 7, 6, 2))
