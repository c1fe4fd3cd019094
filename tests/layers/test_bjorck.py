"""Björck layers: norms for any number of iterations, and orthogonality for enough."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_layers import EXAMPLES, assert_within_gain, fit_briefly, gradients, set_kernel

from tf_lyapunov.layers.bjorck import BjorckDense

DTYPES = st.sampled_from(["float32", "float32", "mixed_bfloat16", "mixed_float16", "float64"])


@settings(max_examples=EXAMPLES)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 20),
    DTYPES,
    st.sampled_from([0.0, 1e-25, 0.1, 1.0, 1e6]),
    st.sampled_from([1.0, 0.3, 7.0]),
    st.integers(0, 999),
)
def test_map_is_a_contraction_for_any_number_of_iterations(
    a, b, iterations, dtype, scale, gain, seed
):
    layer = BjorckDense(b, iterations, max_gain=gain, dtype=dtype)
    layer.build((None, a))
    set_kernel(layer, seed, scale)
    assert_within_gain(layer, (a,), training=seed % 2 == 0)


def test_enough_iterations_reach_the_polar_factor():
    layer = BjorckDense(4, iterations=30)
    layer.build((None, 9))
    set_kernel(layer, 1, 5.0)
    assert_within_gain(layer, (9,))
    raw = np.asarray(layer.kernel).astype(float)
    u, _, vt = np.linalg.svd(raw, full_matrices=False)
    np.testing.assert_allclose(layer.effective_values()["kernel"], u @ vt, atol=1e-4)


def test_unnormalised_iterations_would_diverge():
    """Negative control: beyond σ = √5 the iteration grows without bound."""
    w = np.diag([2.5, 1.0])
    for _ in range(4):
        w = w @ (3 * np.eye(2) - w.T @ w) / 2
    assert np.linalg.norm(w, 2) > 1e3


def test_large_kernels_lose_less_than_a_hundredth():
    layer = BjorckDense(128)
    layer.build((None, 300))
    sigma = np.linalg.svd(layer.effective_values()["kernel"], compute_uv=False)
    assert 0.99 <= sigma[-1] and sigma[0] <= 1.0


def test_bound_survives_training_at_an_absurd_rate():
    layer = BjorckDense(5)
    fit_briefly(layer, (7,))
    assert_within_gain(layer, (7,))
    assert_within_gain(layer, (7,), training=True)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e5])
def test_gradients_are_finite(scale):
    layer = BjorckDense(3)
    layer.build((None, 5))
    set_kernel(layer, 1, scale)
    x = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")
    assert np.isfinite(gradients(layer, x)).all()


def test_iterations_are_checked_and_restored():
    with pytest.raises(ValueError, match="iterations"):
        BjorckDense(3, iterations=0)
    layer = BjorckDense(3, iterations=7, use_bias=False, max_gain=0.5)
    assert BjorckDense.from_config(layer.get_config()).get_config() == layer.get_config()
