"""Eigenvalue verdicts against exact rational arithmetic, and quasi-dominance."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.theory.spectra import (
    comparison_matrix,
    equilibrated,
    is_positive_semidefinite,
    maximize_smallest_eigenvalue,
    quasi_dominance,
    smallest_eigenvalue,
)


def is_positive_definite_exactly(matrix, shift=0.0):
    """LDLᵀ in rational arithmetic: the oracle."""
    m = [[Fraction(float(entry)) for entry in row] for row in matrix]
    for index in range(len(m)):
        m[index][index] -= Fraction(float(shift))
    for pivot in range(len(m)):
        if m[pivot][pivot] <= 0:
            return False
        for row in range(pivot + 1, len(m)):
            factor = m[row][pivot] / m[pivot][pivot]
            for column in range(pivot, len(m)):
                m[row][column] -= factor * m[pivot][column]
    return True


def random_symmetric(seed, size, rank=None, scale=1.0):
    factor = np.random.default_rng(seed).normal(size=(size, rank or size)) * scale
    matrix = factor @ factor.T
    return (matrix + matrix.T) / 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(-40, 40))
def test_the_true_smallest_eigenvalue_is_within_the_rounding_bound(seed, size, exponent):
    matrix = random_symmetric(seed, size) - np.eye(size)
    matrix = np.ldexp(matrix, exponent)
    value, bound = smallest_eigenvalue(matrix)
    assert is_positive_definite_exactly(matrix, np.nextafter(value - bound, -np.inf))
    assert not is_positive_definite_exactly(matrix, np.nextafter(value + bound, np.inf))
    # Not vacuous: some hundred units in the last place of the norm.
    assert bound <= 100 * size**2 * 2.0**-53 * np.linalg.norm(matrix)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(-1e-12, 1e-12))
def test_a_proved_matrix_is_positive_semidefinite_in_exact_arithmetic(seed, size, shift):
    matrix = random_symmetric(seed, size, rank=size - 1) + shift * np.eye(size)
    verdict = is_positive_semidefinite(matrix)
    if verdict.holds:
        # PSD but perhaps singular: definite once shifted by anything.
        assert is_positive_definite_exactly(matrix, -1e-300)
    if verdict.refuted:
        assert not is_positive_definite_exactly(matrix)


def test_a_singular_matrix_is_too_close_to_call():
    verdict = is_positive_semidefinite([[1.0, 1.0], [1.0, 1.0]])
    assert not verdict.holds
    assert not verdict.refuted


def test_a_slightly_negative_matrix_is_never_proved():
    for exponent in range(20, 60):
        gap = 2.0**-exponent
        assert not is_positive_semidefinite([[1.0, 1.0 + gap], [1.0 + gap, 1.0]]).holds


def test_entry_errors_widen_the_bound():
    matrix = [[1.0, 0.999999], [0.999999, 1.0]]
    assert is_positive_semidefinite(matrix).holds
    assert not is_positive_semidefinite(matrix, entry_error=1e-5).holds


def test_badly_scaled_matrices_are_decided_after_equilibration():
    matrix = np.array([[1e12, 0.5], [0.5, 1e-12]])
    assert is_positive_semidefinite(matrix).holds
    assert not is_positive_semidefinite(matrix, equilibrate=False).holds


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_equilibration_is_an_exact_congruence(seed, size):
    matrix = random_symmetric(seed, size) * 1e5 + np.eye(size)
    scaled = equilibrated(matrix)
    ratio = np.diag(scaled) / np.diag(matrix)
    assert np.all(np.log2(ratio) % 2 == 0)
    d = np.sqrt(ratio)
    assert np.array_equal(scaled, d[:, None] * matrix * d[None, :])


@pytest.mark.parametrize(
    "matrix", [np.ones((2, 3)), [[1.0, 2.0], [3.0, 1.0]], [[np.nan]], [[np.inf]], np.zeros((0, 0))]
)
def test_bad_matrices_are_refused(matrix):
    with pytest.raises(ValueError, match="Received"):
        smallest_eigenvalue(matrix)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.1, 4.0))
def test_quasi_dominance_agrees_with_the_m_matrix_test_and_the_comparison_spectrum(seed, n, size):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(n, n))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, size * rng.uniform(0.5, 2.0, n))
    result = quasi_dominance(matrix)
    spectrum = np.linalg.eigvalsh(comparison_matrix(matrix))[0]
    if abs(spectrum) > 1e-7:
        assert result.holds == (spectrum > 0) == result.is_m_matrix
    if result.holds:
        p = np.array(result.p)
        off = np.abs(matrix) - np.diag(np.diag(np.abs(matrix)))
        assert np.all(p > 0)
        assert np.all(np.diag(matrix) * p >= off @ p - 1e-9)
        assert np.linalg.eigvalsh(matrix)[0] >= -1e-12


def test_semidefinite_does_not_mean_quasi_dominant():
    # Equal diagonal cos(π/4) of the three-layer cascade: PSD, dominance fails by d - 1.
    d = np.cos(np.pi / 4) * (1 + 1e-9)
    matrix = np.diag([d] * 4) - np.diag([0.5] * 3, 1) - np.diag([0.5] * 3, -1)
    matrix[0, 3] = matrix[3, 0] = 0.5
    assert is_positive_semidefinite(matrix).holds
    result = quasi_dominance(matrix)
    assert not result.holds
    assert result.margin == pytest.approx(d - 1)


def test_a_dominance_that_needs_weights_is_found():
    matrix = np.array([[1.0, 2.0], [2.0, 9.0]])
    result = quasi_dominance(matrix)
    assert result.holds
    assert matrix[0, 0] * result.p[0] >= 2.0 * result.p[1]
    assert matrix[1, 1] * result.p[1] >= 2.0 * result.p[0]


def test_the_barrier_finds_a_known_optimum():
    # λ_min(diag(x - 1, 2 - x)) is largest, 1/2, at x = 3/2.
    x = maximize_smallest_eigenvalue(np.diag([-1.0, 2.0]), [np.diag([1.0, -1.0])])
    assert x[0] == pytest.approx(1.5, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_barrier_is_not_beaten_by_random_weights(seed):
    rng = np.random.default_rng(seed)
    constant = np.diag(rng.normal(size=3))
    directions = []
    for _ in range(2):
        block = rng.normal(size=(3, 3))
        directions.append(block + block.T - np.diag([0.5, 0.5, 4.0]))
    directions = np.array(directions)
    # Bounded only if no combination of the directions is positive definite.
    sums = [d + t * e for d, e in (directions, directions[::-1]) for t in np.linspace(0, 1, 50)]
    if max(np.linalg.eigvalsh(s)[0] for s in sums) >= 0:
        return
    best = maximize_smallest_eigenvalue(constant, directions)

    def value(x):
        return np.linalg.eigvalsh(constant + np.tensordot(x, directions, 1))[0]

    tries = np.exp(rng.normal(scale=2.0, size=(200, 2)))
    assert value(best) >= max(value(x) for x in tries) - 1e-9
