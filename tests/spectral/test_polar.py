"""Björck steps on Gram matrices: contractions as stored, their gradients, Gram matrices'."""

import math

import numpy as np
import pytest
from derivatives import gradient, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from tf_lyapunov.spectral import polar
from tf_lyapunov.theory import orthogonal as theory

SEEDS = st.integers(0, 10**6)


def array(x):
    return np.asarray(ops.convert_to_numpy(x)).astype(np.float64)


def gaussian(seed, shape, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.floats(1e-20, 1e15))
def test_bjorck_is_a_contraction_close_to_exact_iterations(seed, a, b, iterations, scale):
    kernel = gaussian(seed, (a, b), scale)
    found = array(polar.bjorck(kernel, iterations))
    assert np.linalg.norm(found, 2) <= 1.0
    exact = kernel.astype(float)
    sigma = np.linalg.norm(exact, 2)
    if sigma > 0:
        exact /= sigma
    # The first bound may lie 2% above the norm, and each step stretches that by 3/2 at most.
    error = np.linalg.norm(found - theory.bjorck(exact, iterations))
    assert error <= 0.03 * 1.5**iterations * math.sqrt(min(a, b))


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 24), st.floats(1e-20, 1e15))
def test_the_two_factors_of_a_bjorck_step_are_a_contraction_together(seed, a, b, steps, scale):
    kernel = gaussian(seed, (a, b), scale)
    if seed % 3 == 0:
        kernel[:] = kernel[:, :1]  # rank 1: G's rounding is of the size of its eigenvalues
    outer, inner = (array(v) for v in polar.bjorck_factors(kernel, steps))
    q = outer @ inner if a >= b else inner @ outer
    assert np.linalg.norm(q, 2) <= 1.0
    np.testing.assert_allclose(array(polar.bjorck(kernel, steps)), q, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 200), (40, 300)])
def test_the_factors_of_large_matrices_are_contractions_and_lose_little(shape):
    outer, inner = (array(v) for v in polar.bjorck_factors(gaussian(0, shape), 20))
    q = outer @ inner if shape[0] >= shape[1] else inner @ outer
    sigma = np.linalg.svd(q, compute_uv=False)
    assert 0.99 <= sigma[-1] and sigma[0] <= 1.0


def test_a_start_beyond_the_reach_of_a_step_is_shrunk(monkeypatch):
    """Without a bound on the raw kernel the last step meets singular values far above 2."""
    monkeypatch.setattr(polar, "eigenvalue_upper_bound", lenient_at_first())
    outer, inner = (array(v) for v in polar.bjorck_factors(gaussian(0, (9, 5)), 1))
    assert np.linalg.norm(outer, 2) > 3
    assert np.linalg.norm(outer @ inner, 2) <= 1.0


def lenient_at_first():
    """The bound, far too low in its first call: what a broken bound of the raw kernel would be."""
    true, calls = polar.eigenvalue_upper_bound, []

    def bound(*arguments, **options):
        calls.append(1)
        return true(*arguments, **options) * (1e-2 if len(calls) == 1 else 1.0)

    return bound


def steered(kernel, weights, function):
    """Σ weights·function(kernel), a scalar."""
    return ops.sum(function(kernel) * ops.cast(weights, kernel.dtype))


def test_the_gradient_of_bjorck_is_that_of_the_polar_factor_at_orthogonal_kernels():
    rng = np.random.default_rng(0)
    kernel = 1.7 * np.linalg.qr(rng.standard_normal((6, 4)))[0]
    weights = rng.standard_normal((6, 4))
    found = gradient(
        lambda w: steered(w, weights, lambda v: polar.bjorck(v, 8)), kernel.astype("float32")
    )

    def projected(w):
        u, _, vt = np.linalg.svd(w, full_matrices=False)
        return np.sum(weights * (u @ vt))

    # Entries of order 1, float32, about a hundred roundings of n = 6.
    np.testing.assert_allclose(found, numerical_gradient(projected, kernel, 1e-5), atol=2e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_step_along_the_gradient_of_bjorck_descends_as_stated(seed):
    """Along Q N S⁻¹ + (I - QQᵀ)Q̄S⁻¹ the loss falls at the rate Σ N²/(s s) + ‖(I - QQᵀ)Q̄S⁻¹‖²."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((7, 4)))[0]
    v = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    s = np.array([2.0, 1.5, 1.0, 0.6])
    kernel, weights = (u * s) @ v.T, rng.standard_normal((7, 4))
    found = gradient(
        lambda w: steered(w, weights, lambda k: polar.bjorck(k, 12)), kernel.astype("float32")
    )
    q = u @ v.T
    skew = v.T @ (q.T @ weights - weights.T @ q) @ v / 2
    rest = (weights - q @ (q.T @ weights)) @ v / s
    stated = np.sum(skew**2 / np.outer(s, s)) + np.sum(rest**2)

    def loss(t):
        left, _, right = np.linalg.svd(kernel - t * found, full_matrices=False)
        return np.sum(weights * (left @ right))

    rate = (loss(-1e-5) - loss(1e-5)) / 2e-5
    assert abs(rate - stated) <= 1e-3 * stated


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_gram_matrices_and_their_gradients_are_those_of_the_product(axis, pieces, scale):
    matrix, weights = gaussian(0, (7, 5)), gaussian(1, (7, 7) if axis == -1 else (5, 5))

    def gram(w):
        partner, unit = polar.partner_in_range(w)
        return polar.differentiable_gram(w, axis, partner, pieces), unit

    value, unit = (array(v) for v in gram(scale * matrix))
    exact = matrix.astype(float)
    product = exact @ exact.T if axis == -1 else exact.T @ exact
    np.testing.assert_allclose(value * (unit / scale) ** 2, product, rtol=1e-5, atol=1e-5)
    both = weights.astype(float) + weights.T
    expected = both @ exact if axis == -1 else exact @ both
    found = gradient(lambda w: steered(w, weights, lambda v: gram(v)[0]), scale * matrix)
    np.testing.assert_allclose(found * unit * (unit / scale), expected, rtol=1e-4, atol=1e-4)
