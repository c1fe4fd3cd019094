"""Orthogonal parametrisations against float64: contractions as stored, close to orthogonal."""

import math

import keras
import numpy as np
import pytest
import scipy.linalg
from derivatives import gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from tf_lyapunov.spectral import orthogonal, polar
from tf_lyapunov.theory import orthogonal as theory
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix

SEEDS = st.integers(0, 10**6)


def array(x):
    return np.asarray(ops.convert_to_numpy(x)).astype(np.float64)


def gaussian(seed, shape, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 8), st.integers(0, 5), st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
def test_cayley_is_a_contraction_close_to_the_exact_transform(seed, side, more, scale):
    real = gaussian(seed, (3, side + more, side), scale)
    imag = gaussian(seed + 1, real.shape, scale)
    q_real, q_imag = (array(q) for q in orthogonal.cayley(real, imag))
    q = q_real + 1j * q_imag
    assert np.linalg.norm(q, 2, axis=(1, 2)).max() <= 1.0
    alone = array(orthogonal.cayley(real))
    assert np.linalg.norm(alone, 2, axis=(1, 2)).max() <= 1.0
    if scale <= 1.0:
        condition = (1 + np.linalg.norm(real + 1j * imag, axis=(1, 2)).max()) ** 2
        tol = 40 * side * condition * 2.0**-24
        np.testing.assert_allclose(q, theory.cayley(real + 1j * imag), atol=tol)
        np.testing.assert_allclose(alone, theory.cayley(real), atol=tol)


def test_cayley_limits_the_norm_of_its_argument_and_passes_on_nan():
    kernel = gaussian(0, (2, 5, 3), 1e8)
    limited = kernel.astype(float)
    limited *= 512.0 / np.linalg.norm(limited, axis=(1, 2), keepdims=True)
    found = array(orthogonal.cayley(kernel))
    np.testing.assert_allclose(found, theory.cayley(limited), atol=0.1)
    assert np.linalg.norm(found, 2, axis=(1, 2)).max() <= 1.0
    kernel[0, 0, 0] = np.nan
    found = array(orthogonal.cayley(kernel))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
    with pytest.raises(ValueError, match="as many rows"):
        orthogonal.cayley(np.zeros((2, 3), "float32"))


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 8), st.integers(0, 5), st.floats(0, 0.5), st.booleans())
def test_contraction_factor_holds_for_any_matrix_and_is_tight_for_orthogonal_ones(
    seed, side, more, noise, is_complex
):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((side + more, side)) + 1j * is_complex * rng.standard_normal(
        (side + more, side)
    )
    q = np.linalg.qr(q)[0] * (1 + noise)
    real, imag = q.real.astype("float32"), q.imag.astype("float32")
    parts = (real, imag) if is_complex else (real,)
    factor = orthogonal.contraction_factor(*(ops.convert_to_tensor(p) for p in parts))
    product = array(real * factor) + 1j * array(imag * factor) * is_complex
    norm = np.linalg.norm(product, 2)
    assert norm <= 1.0
    # ‖QᴴQ - I‖_F is at most √side times its norm.
    slack = math.sqrt(side) * ((1 + noise) ** 2 - 1)
    assert norm >= (1 + noise) / math.sqrt(1 + slack) - 1e-4


def steered(kernel, weights, function):
    """Σ weights·function(kernel), a scalar."""
    return ops.sum(function(kernel) * ops.cast(weights, kernel.dtype))


def test_inverses_by_halves_and_their_gradients_are_those_of_the_matrix():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((150, 150)) / 10
    matrix = np.eye(150) + matrix - matrix.T
    weights = rng.standard_normal((150, 150))
    inverse = np.linalg.inv(matrix)
    found = array(orthogonal.accretive_inverse(matrix.astype("float32")))
    # Norms of at most 1, 150 terms of 6e-8.
    np.testing.assert_allclose(found, inverse, atol=1e-5)
    found = gradient(
        lambda m: steered(m, weights, orthogonal.accretive_inverse), matrix.astype("float32")
    )
    expected = -inverse.T @ weights @ inverse.T
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 5]))
def test_skew_kernels_have_skew_zero_padded_maps_bit_for_bit(seed, high, wide, channels, k):
    kernel = gaussian(seed, (k, 3, channels, channels))
    skew = array(orthogonal.skew_kernel(kernel))
    matrix = convolution_matrix(skew, LinearMap("conv", (high, wide, channels), padding="same"))
    np.testing.assert_array_equal(matrix.toarray(), -matrix.toarray().T)
    # The skew part of the map is the map of the skew part.
    whole = convolution_matrix(
        kernel.astype(float), LinearMap("conv", (high, wide, channels), padding="same")
    ).toarray()
    np.testing.assert_allclose((whole - whole.T) / 2, matrix.toarray(), atol=1e-6)


def test_even_kernels_have_no_skew_part_under_same_padding():
    """Negative control: Keras pads even kernels unevenly, and the skew formula fails for them."""
    with pytest.raises(ValueError, match="odd"):
        orthogonal.skew_kernel(np.zeros((2, 3, 1, 1), "float32"))
    kernel = np.array([1.0, -1.0]).reshape(2, 1, 1)
    matrix = convolution_matrix(kernel, LinearMap("conv", (4, 1), padding="same")).toarray()
    assert not np.allclose(matrix, -matrix.T)


def test_exponential_action_is_the_taylor_polynomial():
    skew = gaussian(0, (5, 5))
    skew = (skew - skew.T) / np.linalg.norm(skew - skew.T, 2)
    x = gaussian(1, (3, 5))
    found = array(orthogonal.exponential_action(x, lambda v: ops.matmul(v, skew), 12))
    np.testing.assert_allclose(found, x @ scipy.linalg.expm(skew.astype(float)), atol=1e-5)
    assert array(orthogonal.exponential_action(x, lambda v: 0 / 0, 1)).shape == x.shape


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3))
def test_block_fourier_multiplies_the_spectrum_and_keeps_the_blocks_norm(seed, high, wide, a, b):
    frequencies = high * (wide // 2 + 1)
    real, imag = gaussian(seed, (frequencies, a, b)), gaussian(seed + 1, (frequencies, a, b))
    block = np.concatenate(
        [np.concatenate([real, imag], -1), np.concatenate([-imag, real], -1)], axis=-2
    )
    bases = [m.astype("float32") for m in orthogonal.fourier_bases((high, wide))]
    size = high * wide * a
    basis = np.eye(size, dtype="float32").reshape(size, high, wide, a)
    matrix = array(orthogonal.block_fourier(basis, block, bases)).reshape(size, -1)
    # Any blocks: they need not be conjugate at opposite frequencies.
    largest = np.linalg.norm(real + 1j * imag, 2, axis=(1, 2)).max()
    assert np.linalg.norm(matrix, 2) <= largest * (1 + 1e-5)


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_symbol_of_a_kernel_gives_its_circular_convolution(seed, high, wide, k, m):
    kernel = gaussian(seed, (k, m, 2, 3))
    real, imag = (array(p) for p in orthogonal.circular_symbol(kernel, (high, wide)))
    block = np.concatenate(
        [np.concatenate([real, imag], -1), np.concatenate([-imag, real], -1)], axis=-2
    )
    x = gaussian(seed + 1, (2, high, wide, 2)).astype(float)
    found = array(orthogonal.block_fourier(x, block, orthogonal.fourier_bases((high, wide))))
    expected = np.zeros((2, high, wide, 3))
    for s in range(k):
        for t in range(m):
            moved = np.roll(x, (k // 2 - s, m // 2 - t), axis=(1, 2))
            expected += moved @ kernel[s, t].astype(float)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_fourier_bases_are_unitary_in_float64():
    for sizes in [(1, 1), (4, 6), (5, 7), (8, 1)]:
        cosine, sine, tall_cos, tall_sin = orthogonal.fourier_bases(sizes)
        np.testing.assert_allclose(cosine @ cosine.T + sine @ sine.T, np.eye(sizes[1]), atol=1e-14)
        tall = tall_cos + 1j * tall_sin
        np.testing.assert_allclose(np.conj(tall.T) @ tall, np.eye(sizes[0]), atol=1e-14)


def test_float64_is_kept_in_float64():
    kernel = np.random.default_rng(0).standard_normal((6, 4))
    for found in (orthogonal.cayley(kernel), polar.bjorck(kernel, 25)):
        if keras.backend.standardize_dtype(found.dtype) == "float64":  # JAX has it on request
            found = array(found)
            np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-12)
