"""Dense bounds: never below the truth, tight, and finite at every scale."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from tf_lyapunov.spectral import gram
from tf_lyapunov.spectral.gram import dense_norm_upper_bound, gram_norm_upper_bound

U = 2.0**-24


def norm(matrix):
    return np.linalg.norm(np.asarray(matrix, dtype=np.float64), 2)


def with_singular_values(values, rows, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return ((left * values) @ right).astype("float32")


SPECTRA = {
    "flat": np.ones(96),
    "one large": np.r_[1.0, np.full(95, 1e-3)],
    "one large over a floor": np.r_[1.0, np.full(95, 0.25)],
    "clustered": np.r_[np.ones(12), np.linspace(0.99, 0, 84)],
    "rank one": np.r_[1.0, np.zeros(95)],
    "geometric": 0.9 ** np.arange(96),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("near", [None, 1e-3, 0.5, 1.0, 2.0, 1e3])
def test_bound_holds_for_every_spectrum_and_every_guess(name, near):
    kernel = with_singular_values(SPECTRA[name], 200)
    assert float(dense_norm_upper_bound(kernel, near=near)) >= norm(kernel)


@pytest.mark.parametrize("name", SPECTRA)
def test_bound_is_within_one_percent_without_a_guess(name):
    kernel = with_singular_values(SPECTRA[name], 200)
    assert float(dense_norm_upper_bound(kernel)) <= 1.01 * norm(kernel)


@pytest.mark.parametrize("name", SPECTRA)
def test_bound_is_within_its_documented_looseness_with_the_right_guess(name):
    kernel = with_singular_values(SPECTRA[name], 200)
    # (1) costs φ and, for a cluster of r eigenvalues above c, about acosh(√r) more in the angle.
    assert float(dense_norm_upper_bound(kernel, near=1.0)) <= 1.012 * norm(kernel)


@settings(max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]),
    st.sampled_from([None, 0.5, 1.0]),
)
def test_bound_is_never_below_the_float64_norm_at_any_scale(rows, columns, seed, scale, near):
    kernel = np.random.default_rng(seed).standard_normal((rows, columns)) * scale
    kernel = kernel.astype("float32")
    truth = norm(kernel)
    bound = float(dense_norm_upper_bound(kernel, near=None if near is None else near * truth))
    assert truth <= bound <= 1.02 * truth


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_kernels_of_other_types_are_bounded_as_stored(dtype):
    kernel = ops.cast(np.random.default_rng(0).standard_normal((30, 20)), dtype)
    stored = ops.convert_to_numpy(ops.cast(kernel, "float64"))
    bound = dense_norm_upper_bound(kernel)
    assert norm(stored) <= float(bound) <= 1.01 * norm(stored)
    expected = "float64" if dtype == "float64" else "float32"
    assert keras.backend.standardize_dtype(bound.dtype) == expected


def test_float64_bound_is_as_tight_as_its_squarings():
    kernel = np.diag([3.0, 1.0]) + 0.0
    bound = float(dense_norm_upper_bound(ops.convert_to_tensor(kernel, "float64"), squarings=6))
    # acosh(√2)²/(8·4⁶) = 2.4e-5
    assert 3.0 <= bound <= 3.0 * (1 + 3e-5)


def test_zero_kernel_has_bound_zero():
    assert float(dense_norm_upper_bound(np.zeros((5, 3), "float32"))) == 0.0
    assert float(dense_norm_upper_bound(np.zeros((5, 3), "float32"), near=1.0)) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_kernels_give_nan_and_never_a_number(bad):
    kernel = np.ones((4, 3), "float32")
    kernel[1, 1] = bad
    assert math.isnan(float(dense_norm_upper_bound(kernel)))
    assert math.isnan(float(dense_norm_upper_bound(kernel, near=1.0)))


def test_a_guess_that_overflows_the_recursion_falls_back_on_another_bound():
    # λ_max/c = 90 makes T_16 about 1e36; the bound must stay finite and true.
    values = np.r_[1.0, np.full(2000, 1 / math.sqrt(2000))]
    matrix = np.diag(values).astype("float32")
    bound = float(dense_norm_upper_bound(matrix, near=1e-6))
    assert 1.0 <= bound < 1.2


def test_rounding_allowance_covers_the_worst_rounding_of_a_product():
    """A matrix product that rounds every term down by u is still bounded."""
    kernel = np.abs(np.random.default_rng(0).standard_normal((3000, 4))).astype("float32")
    exact = kernel.astype(np.float64).T @ kernel.astype(np.float64)
    terms = gram.product_terms(3000)
    worst = (exact * (1 - terms * U)).astype("float32")
    top, trace = np.linalg.norm(exact, 2), ops.convert_to_tensor(np.float32(np.trace(worst)))
    sigma, _ = gram._dense_bounds(
        ops.convert_to_tensor(kernel), -2, ops.convert_to_tensor(worst), trace, None, None
    )
    assert float(sigma) >= math.sqrt(top)


def test_plain_power_iteration_would_fail_the_same_test():
    """Negative control: an estimate from below is below."""
    kernel = with_singular_values(SPECTRA["clustered"], 200)
    v = np.ones(96) / math.sqrt(96)
    for _ in range(10):
        v = kernel.T @ (kernel @ v)
        v /= np.linalg.norm(v)
    assert np.linalg.norm(kernel @ v) < norm(kernel)


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_complex_bound_covers_a_batch_of_complex_matrices(batch, rows, columns, seed):
    rng = np.random.default_rng(seed)
    real, imag = rng.standard_normal((2, batch, rows, columns)).astype("float32")
    truth = np.linalg.norm(real + 1j * imag.astype(np.float64), 2, axis=(1, 2)).max()
    for near in (None, truth):
        bound = float(gram_norm_upper_bound(real, imag, near=near))
        assert truth <= bound <= 1.01 * truth


def test_paired_storage_squares_hermitian_matrices():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((7, 7)) + 1j * rng.standard_normal((7, 7))
    h = a + a.conj().T
    z = ops.convert_to_tensor(h.real + h.imag, "float64")
    squared = ops.convert_to_numpy(gram._double_and_square(z, True, np.zeros((7, 7))))
    expected = h @ h
    np.testing.assert_allclose(squared, expected.real + expected.imag, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (300, 2), (2, 300), (600, 300)])
def test_thin_long_and_chunked_kernels_are_bounded(shape):
    kernel = np.random.default_rng(1).standard_normal(shape).astype("float32")
    for near in (None, norm(kernel)):
        assert norm(kernel) <= float(dense_norm_upper_bound(kernel, near=near))
        assert float(dense_norm_upper_bound(kernel, near=near)) <= 1.015 * norm(kernel)


def test_pieces_of_a_product_sum_to_the_product():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 2 * gram.PIECE + 3))
    total = ops.convert_to_numpy(gram.product(ops.convert_to_tensor(a), ops.convert_to_tensor(b)))
    np.testing.assert_allclose(total, a @ b.T, atol=1e-10)
    turned = gram.product(ops.convert_to_tensor(a.T.copy()), ops.convert_to_tensor(b.T.copy()), -2)
    np.testing.assert_allclose(ops.convert_to_numpy(turned), a @ b.T, atol=1e-10)


def test_wrong_kernels_are_refused():
    with pytest.raises(ValueError, match="must be a matrix"):
        dense_norm_upper_bound(np.zeros(3, "float32"))
    with pytest.raises(TypeError, match="floating-point"):
        dense_norm_upper_bound(np.zeros((3, 3), "int32"))
