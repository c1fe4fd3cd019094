"""Projections: inside stays bit for bit, outside ends inside after rounding."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from layer_maps import convolution_layers, set_kernel, true_norm

from tf_lyapunov.spectral.projections import (
    project_to_conic_ball,
    project_to_norm_ball,
    rounded_down,
)
from tf_lyapunov.spectral.reading import linear_maps


def norm(matrix):
    return np.linalg.norm(np.asarray(matrix, dtype=np.float64), 2)


def array(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float64"))


matrices = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))


@settings(max_examples=30)
@given(matrices, st.floats(1e-3, 1e3), st.booleans())
def test_projected_matrix_is_inside_and_close_to_the_bound(case, max_gain, steer):
    rows, columns, seed = case
    kernel = np.random.default_rng(seed).standard_normal((rows, columns)).astype("float32")
    projected = array(project_to_norm_ball(kernel, max_gain, steer=steer))
    assert norm(projected) <= max_gain
    if norm(kernel) > max_gain and not steer:
        assert norm(projected) >= 0.985 * max_gain
    # The direction is kept: only a factor changes.
    factor = norm(projected) / norm(kernel)
    np.testing.assert_allclose(projected, factor * kernel, rtol=1e-5, atol=1e-6 * max_gain)


@settings(max_examples=20)
@given(matrices, st.booleans())
def test_kernel_inside_keeps_every_bit_and_projecting_twice_changes_nothing(case, steer):
    rows, columns, seed = case
    kernel = np.random.default_rng(seed).standard_normal((rows, columns)).astype("float32")
    inside = array(project_to_norm_ball(kernel, norm(kernel) * 1.02, steer=steer))
    np.testing.assert_array_equal(inside, kernel)
    once = project_to_norm_ball(kernel, 0.3 * norm(kernel), steer=False)
    twice = project_to_norm_ball(once, 0.3 * norm(kernel), steer=False)
    np.testing.assert_array_equal(array(once), array(twice))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(5))
def test_stored_half_precision_kernel_is_inside(dtype, seed):
    kernel = ops.cast(np.random.default_rng(seed).standard_normal((64, 48)), dtype)
    projected = project_to_norm_ball(kernel, 1.0)
    assert projected.dtype == kernel.dtype
    assert norm(array(projected)) <= 1.0


@settings(max_examples=25)
@given(convolution_layers(), st.floats(0.05, 20.0))
def test_projected_convolution_has_a_true_norm_within_the_bound(case, max_gain):
    layer, input_shape = case
    [(kernel, linear_map)] = linear_maps(layer)
    projected = project_to_norm_ball(kernel, max_gain, linear_map)
    set_kernel(layer, projected)
    # The layer's own float32 products err by at most this when the matrix is read off.
    assert true_norm(layer, input_shape) <= max_gain * (1 + 1e-12)


def test_zero_stays_zero_and_nan_stays_nan():
    zero = np.zeros((4, 3), "float32")
    np.testing.assert_array_equal(array(project_to_norm_ball(zero, 1.0)), zero)
    zero[1, 1] = np.nan
    assert np.isnan(array(project_to_norm_ball(zero, 1.0))).all()


@pytest.mark.parametrize("value", [0.1, 0.9, 1.1, 1.0, 2.5231])
def test_the_bound_is_never_rounded_up(value):
    assert rounded_down(value, "float32") <= value
    assert rounded_down(value, "float32") >= value * (1 - 2.0**-23)
    assert rounded_down(value, "float64") == value


@settings(max_examples=30)
@given(
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.floats(-5, 5),
    st.floats(0.01, 5),
    st.booleans(),
)
def test_conic_projection_ends_within_the_radius_of_the_centre(size, seed, center, radius, steer):
    kernel = np.random.default_rng(seed).standard_normal((size, size)).astype("float32")
    identity = np.eye(size)
    projected = array(project_to_conic_ball(kernel, center, radius, steer=steer))
    assert norm(projected - center * identity) <= radius
    if norm(kernel - center * identity) < 0.97 * radius:
        np.testing.assert_array_equal(projected, kernel)


def test_conic_projection_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="square"):
        project_to_conic_ball(np.zeros((3, 2), "float32"), 1.0, 0.5)
    with pytest.raises(ValueError, match="rounding"):
        project_to_conic_ball(np.zeros((2, 2), "float32"), 1e6, 0.1)


def test_kernels_with_a_norm_just_below_the_bound_are_left_alone():
    """φ of the documentation: 4 squarings accept σ ≤ max_gain/√φ."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((200, 100)))
    right, _ = np.linalg.qr(rng.standard_normal((100, 100)))
    phi = (1 + math.cosh(math.acosh(10.0) / 16)) / 2
    kernel = (left @ right / math.sqrt(phi) * (1 - 1e-3)).astype("float32")
    np.testing.assert_array_equal(array(project_to_norm_ball(kernel, 1.0)), kernel)
