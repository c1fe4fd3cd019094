"""Soft clipping: no singular value is left above the bound, the small ones stay."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.spectral.clipping import CUT, FAR, NEAR, REACHES, _Rounding, soft_clip

U = np.finfo(np.float32).eps / 2


def matrix(singular_values, shape, seed=0):
    """Float32 matrix with the singular values given."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    left = np.linalg.qr(rng.normal(size=(shape[0], k)))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], k)))[0]
    return ((left * singular_values) @ right.T).astype(np.float32)


def singular_values(tensor):
    values = keras.ops.convert_to_numpy(tensor).astype(np.float64)
    return np.linalg.svd(values, compute_uv=False)


def refuse():
    raise AssertionError("the kernel is an ordinary one")


@pytest.mark.parametrize("curve", REACHES)
def test_no_singular_value_within_reach_leaves_the_ball_and_none_grows(curve):
    x = np.linspace(0, curve.reach, 400_001)[1:]
    degree = 2**curve.level
    polynomial = np.polynomial.chebyshev.Chebyshev.basis(degree)(2 * x / CUT - 1)
    factor = 1 - curve.a * (1 + polynomial)
    after = np.abs(np.sqrt(x) * factor)
    assert curve.top * (1 - 1e-6) <= after.max() <= curve.top < 1
    assert np.max(np.abs(factor)) <= 1
    assert np.min(factor[x <= CUT]) >= 1 - 2.001 * curve.a


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["uniform", "cluster", "decades", "equal"]),
    st.floats(1e-3, 1e3),
    st.integers(0, 10**6),
)
def test_no_singular_value_is_left_above_the_bound(m, n, kind, bound, seed):
    rng = np.random.default_rng(seed)
    k = min(m, n)
    spectrum = {
        "uniform": rng.uniform(0, 1.4, k),
        "cluster": 1 + 0.05 * rng.normal(size=k),
        "decades": np.exp(3 * rng.normal(size=k)),
        "equal": np.full(k, rng.choice([0.5, 0.99, 1.0, 1.05, 2.0, 1e4])),
    }[kind]
    kernel = matrix(np.abs(spectrum) * bound, (m, n), seed)
    before = singular_values(kernel)[0]
    after = singular_values(soft_clip(kernel, bound, lambda: keras.ops.zeros_like(kernel)))[0]
    assert after <= bound
    assert after <= before * (1 + 4 * U)


def test_small_singular_values_survive_where_scaling_shrinks_them():
    spectrum = np.array([1.2, 1.1, 1.0, 0.7, 0.5, 0.1])
    kernel = matrix(spectrum, (8, 6))
    clipped = singular_values(soft_clip(kernel, 1.0, refuse))
    np.testing.assert_allclose(clipped[3:], spectrum[3:], rtol=2e-3)
    assert 0.9 < clipped[0] <= 1.0
    scaled = singular_values(SpectralBound(1.0, shrink="scale")(kernel))
    np.testing.assert_allclose(scaled, spectrum / 1.2, rtol=2e-2)


@pytest.mark.parametrize(("largest", "curve"), [(1.02, NEAR), (1.2, FAR)])
def test_every_singular_value_follows_the_polynomial(largest, curve):
    spectrum = np.array([largest, 0.98, 0.9, 0.8])
    kernel = matrix(spectrum, (9, 4))
    basis = np.polynomial.chebyshev.Chebyshev.basis(2**curve.level)
    expected = spectrum * (1 - curve.a * (1 + basis(2 * spectrum**2 / CUT - 1)))
    clipped = singular_values(soft_clip(kernel, 1.0, refuse))
    np.testing.assert_allclose(clipped, np.sort(expected)[::-1], rtol=1e-3)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("curve", REACHES)
def test_the_rounding_that_is_allowed_for_covers_the_rounding_that_happens(curve, axis):
    shape = (300, 40) if axis == -2 else (40, 300)
    spectrum = np.linspace(0.1, 0.99, 40) * np.sqrt(curve.reach)
    kernel = matrix(spectrum, shape, seed=3)
    exact = kernel.astype(np.float64)
    left, sigma, right = np.linalg.svd(exact, full_matrices=False)
    basis = np.polynomial.chebyshev.Chebyshev.basis(2**curve.level)
    after = sigma * (1 - curve.a * (1 + basis(2 * sigma**2 / CUT - 1)))
    rounding = _Rounding.of(kernel, kernel, axis)
    allowed = rounding.excess(curve, float(sigma[0] ** 2), float(np.sum(sigma**2)))
    clipped = keras.ops.convert_to_numpy(soft_clip(kernel, 1.0, refuse)).astype(np.float64)
    error = np.linalg.norm(clipped - (left * after) @ right, 2)
    assert 1e-4 * allowed < error <= allowed < 0.1


def test_a_kernel_that_was_clipped_needs_no_clipping_for_a_while():
    kernel = matrix(np.r_[np.full(6, 0.99), np.linspace(0.1, 0.9, 20)], (60, 26))
    clipped = soft_clip(kernel, 1.0, refuse)
    assert singular_values(clipped)[0] < 0.98
    again = soft_clip(keras.ops.convert_to_numpy(clipped) * np.float32(1.002), 1.0, refuse)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(again), keras.ops.convert_to_numpy(clipped) * np.float32(1.002)
    )


def test_kernels_well_inside_keep_every_bit():
    kernel = matrix(np.linspace(0.1, 0.8, 5), (7, 5))
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(soft_clip(kernel, 1.0, refuse)), kernel
    )


def test_project_leaves_kernels_inside_alone_up_to_the_bound_itself():
    kernel = matrix(np.full(5, 0.99), (7, 5))
    projected = SpectralBound(1.0).project(kernel)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(projected), kernel)
    outside = SpectralBound(1.0).project(matrix(np.full(5, 1.01), (7, 5)))
    assert 0.95 < singular_values(outside)[0] <= 1.0


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15, np.nan, np.inf])
def test_extreme_kernels_take_the_other_way(scale):
    kernel = np.full((3, 2), scale, np.float32)
    marker = keras.ops.full((3, 2), 7.0)
    result = keras.ops.convert_to_numpy(soft_clip(kernel, 1.0, lambda: marker))
    taken = np.all(result == 7.0)
    assert taken or np.array_equal(result, kernel)
    assert taken == (not 0 < float(np.sum(kernel.astype(np.float32) ** 2)) < 1e12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_are_clipped_to_the_bound_as_stored(dtype):
    kernel = keras.ops.cast(matrix(np.linspace(0.2, 1.3, 6), (12, 6)), dtype)
    result = SpectralBound(1.0)(kernel)
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    stored = keras.ops.convert_to_numpy(keras.ops.cast(result, "float64"))
    assert 0.85 < np.linalg.norm(stored, 2) <= 1.0
