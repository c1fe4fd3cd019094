"""Truncated exponentials, Cayley transforms and Björck steps, against matrices and exact sums."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.theory import orthogonal

SEEDS = st.integers(0, 10**6)


def skew_matrix(seed, side, norm):
    matrix = np.random.default_rng(seed).standard_normal((side, side))
    matrix = matrix - matrix.T
    return matrix * (norm / np.linalg.norm(matrix, 2))


def polynomial(matrix, terms):
    total, power = np.eye(len(matrix)), np.eye(len(matrix))
    for k in range(1, terms):
        power = power @ matrix / k
        total = total + power
    return total


@given(SEEDS, st.integers(2, 7), st.integers(1, 14), st.floats(0.01, 3.0))
def test_truncated_exponentials_obey_both_bounds(seed, side, terms, norm):
    skew = skew_matrix(seed, side, norm)
    truncated = polynomial(skew, terms)
    rounding = 1e-13 * math.exp(norm)
    error = np.linalg.norm(scipy.linalg.expm(skew) - truncated, 2)
    assert error <= orthogonal.exponential_truncation_error_upper_bound(terms, norm) + rounding
    bound = orthogonal.truncated_exponential_norm_upper_bound(terms, norm)
    assert np.linalg.norm(truncated, 2) <= bound + rounding


@pytest.mark.parametrize("terms", range(1, 17))
def test_polynomial_is_a_contraction_exactly_for_terms_0_and_1_modulo_4(terms):
    bound = orthogonal.truncated_exponential_norm_upper_bound(terms, 1.0)
    assert (bound == 1.0) == (terms % 4 in (0, 1))
    theta = np.linspace(0, 1, 1001)
    modulus = np.abs(sum((1j * theta) ** k / math.factorial(k) for k in range(terms)))
    assert modulus.max() <= bound * (1 + 1e-15)
    # Tight on the side that matters: an expansion of this size does occur.
    assert bound <= 1 + 2 * max(modulus.max() - 1, 0.0) + 1e-15


def test_assuming_the_truncated_exponential_orthogonal_would_be_unsound():
    """Negative control: two and three terms of the exponential expand."""
    for terms in (2, 3, 6, 7):
        assert np.linalg.norm(polynomial(skew_matrix(0, 4, 1.0), terms), 2) > 1 + 1e-5


@pytest.mark.parametrize("norm", [-1.0, math.nan, math.inf])
def test_exponential_bounds_refuse_norms_that_are_none(norm):
    with pytest.raises(ValueError, match="finite"):
        orthogonal.truncated_exponential_norm_upper_bound(5, norm)
    with pytest.raises(ValueError, match="positive integer"):
        orthogonal.exponential_truncation_error_upper_bound(0, 1.0)


@given(SEEDS, st.integers(1, 6), st.integers(0, 4), st.booleans(), st.floats(1e-3, 1e3))
def test_cayley_columns_are_orthonormal(seed, side, more, is_complex, scale):
    rng = np.random.default_rng(seed)
    kernel = scale * rng.standard_normal((2, side + more, side))
    if is_complex:
        kernel = kernel + 1j * scale * rng.standard_normal(kernel.shape)
    q = orthogonal.cayley(kernel)
    # The solve loses the condition of I + A, at most 1 + ‖A‖.
    condition = 1 + np.linalg.norm(kernel, axis=(1, 2)).max() * (2 + np.abs(kernel).max() * 10)
    error = np.linalg.norm(np.conj(np.swapaxes(q, 1, 2)) @ q - np.eye(side), axis=(1, 2)).max()
    assert error <= 100 * condition * side * np.finfo(float).eps
    assert np.linalg.norm(q, 2, axis=(1, 2)).max() <= orthogonal.residual_norm_upper_bound(q)


def test_cayley_of_a_skew_matrix_is_the_classical_transform():
    skew = skew_matrix(1, 5, 2.0)
    classical = np.linalg.solve(np.eye(5) + skew, np.eye(5) - skew)
    np.testing.assert_allclose(orthogonal.cayley(skew / 2), classical, atol=1e-13)
    with pytest.raises(ValueError, match="as many rows"):
        orthogonal.cayley(np.zeros((2, 3)))


@given(SEEDS, st.floats(1e-6, 1.0))
def test_errors_in_the_skew_matrix_at_most_double(seed, size):
    skew, error = skew_matrix(seed, 4, 2.0), skew_matrix(seed + 1, 4, size)
    moved = orthogonal.cayley((skew + error) / 2) - orthogonal.cayley(skew / 2)
    assert np.linalg.norm(moved, 2) <= orthogonal.cayley_error_upper_bound(size) + 1e-13


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.floats(0.0, 2.0))
def test_residual_bounds_the_norm_of_any_matrix(seed, rows, columns, noise):
    rng = np.random.default_rng(seed)
    matrix = np.eye(rows, columns) + noise * rng.standard_normal((rows, columns))
    bound = orthogonal.residual_norm_upper_bound(matrix)
    assert np.linalg.norm(matrix, 2) <= bound
    with pytest.raises(ValueError, match="finite"):
        orthogonal.residual_norm_upper_bound(matrix * np.nan)


@given(SEEDS, st.floats(0.0, 3.0))
def test_one_bjorck_step_obeys_its_norm_bound(seed, norm):
    matrix = np.random.default_rng(seed).standard_normal((5, 3))
    matrix *= norm / np.linalg.norm(matrix, 2)
    after = np.linalg.norm(orthogonal.bjorck(matrix, 1), 2)
    assert after <= orthogonal.bjorck_norm_upper_bound(norm) * (1 + 1e-14) + 1e-300


@given(SEEDS, st.integers(1, 5), st.floats(0.0, 1.0), st.integers(0, 8))
def test_bjorck_defect_shrinks_as_stated(seed, side, defect, iterations):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((side, side)))
    v, _ = np.linalg.qr(rng.standard_normal((side, side)))
    matrix = u * rng.uniform(1 - defect, 1, side) @ v
    after = np.linalg.svd(orthogonal.bjorck(matrix, iterations), compute_uv=False)
    assert np.abs(1 - after).max() <= (
        orthogonal.bjorck_defect_upper_bound(defect, iterations) + 1e-13
    )


def test_bjorck_reaches_the_polar_factor():
    matrix = np.random.default_rng(0).standard_normal((7, 4))
    matrix /= np.linalg.norm(matrix, 2)
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    assert orthogonal.bjorck_defect_upper_bound(1 - sigma[-1], 30) < 1e-300
    np.testing.assert_allclose(orthogonal.bjorck(matrix, 30), u @ vt, atol=1e-12)
    with pytest.raises(ValueError, match="defect"):
        orthogonal.bjorck_defect_upper_bound(1.5, 1)
