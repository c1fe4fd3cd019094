"""Convolution bounds against the matrices of the Keras layers themselves."""

import dataclasses
import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_maps import convolution_layers, integer_kernel, true_norm

from tf_lyapunov.spectral.convolution import conv_norm_upper_bound, frequency_grid
from tf_lyapunov.spectral.reading import linear_maps
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap

# float64 SVD of an exact matrix of side ≤ 1000.
SVD_ROUNDING = 1 - 1000 * np.finfo(float).eps


def symbols(kernel, points):
    """Symbol Σ_t K[t]exp(iθt) on a dense grid, (grid, a, b)."""
    result = kernel.astype(complex)
    for axis in range(kernel.ndim - 2):
        angle = 2 * np.pi * np.outer(np.arange(points), np.arange(kernel.shape[axis])) / points
        result = np.moveaxis(np.tensordot(np.exp(1j * angle), result, (1, axis)), 0, axis)
    return result.reshape(-1, *kernel.shape[-2:])


@settings(max_examples=60)
@given(convolution_layers())
def test_bound_is_never_below_the_true_norm_for_any_kind_and_geometry(case):
    layer, input_shape = case
    truth = true_norm(layer, input_shape) * SVD_ROUNDING
    [(kernel, linear_map)] = linear_maps(layer)
    free = dataclasses.replace(linear_map, input_shape=None)
    for geometry in (linear_map, free, None):
        assert float(conv_norm_upper_bound(kernel, geometry, near=truth)) >= truth


@settings(max_examples=20)
@given(convolution_layers(rank=1), st.integers(5, 60))
def test_size_free_and_bare_bounds_hold_at_every_other_size(case, size):
    layer, input_shape = case
    [(kernel, linear_map)] = linear_maps(layer)
    truth = true_norm(layer, (size, *input_shape[1:])) if size >= kernel.shape[0] * 2 else 0.0
    free = dataclasses.replace(linear_map, input_shape=None)
    assert float(conv_norm_upper_bound(kernel, free)) >= truth * SVD_ROUNDING
    assert float(conv_norm_upper_bound(kernel)) >= truth * SVD_ROUNDING


@settings(max_examples=20)
@given(convolution_layers())
def test_known_size_bound_agrees_with_float64_on_the_same_frequencies(case):
    layer, _ = case
    [(kernel, linear_map)] = linear_maps(layer)
    grid = frequency_grid(kernel.shape, linear_map)
    truth = norm_upper_bound(np.asarray(kernel), linear_map, method="frequency").value
    bound = float(conv_norm_upper_bound(kernel, linear_map))
    if grid.factor == 1.0:
        assert (1 - 1e-6) * truth <= bound <= 1.005 * truth
    else:
        assert bound <= 1.005 * grid.factor * truth * 1.05


@pytest.mark.parametrize(
    "shape, linear_map",
    [
        ((3, 3, 2, 3), LinearMap("conv")),
        ((5, 5, 1, 1), LinearMap("conv")),
        ((2, 4, 3, 1), LinearMap("conv", dilation=2)),
        ((7, 2, 2), LinearMap("conv")),
        ((3, 3, 3, 2, 2), LinearMap("conv")),
        ((3, 3, 2, 4), LinearMap("conv", groups=2)),
        ((3, 3, 3, 2), LinearMap("depthwise")),
        ((4, 4, 2, 3), LinearMap("conv_transpose")),
    ],
)
def test_size_free_bound_is_within_five_percent_of_the_supremum(shape, linear_map):
    kernel = np.random.default_rng(0).standard_normal(shape).astype("float32")
    # The symbol's largest value on a fine grid is below the supremum over sizes.
    dense = symbols(kernel, {1: 512, 2: 64, 3: 20}[len(shape) - 2])
    if linear_map.kind == "depthwise":
        parts = [dense[:, c : c + 1] for c in range(shape[-2])]
    else:
        parts = np.split(dense, linear_map.groups, axis=-1)
    supremum = max(np.linalg.norm(p, 2, axis=(1, 2)).max() for p in parts)
    bound = float(conv_norm_upper_bound(kernel, linear_map))
    assert supremum * SVD_ROUNDING <= bound <= 1.05 * supremum


@pytest.mark.parametrize("strides", [(2, 2), (3, 1), (2, 3)])
def test_strided_size_free_bound_is_within_five_percent_of_a_large_image(strides):
    kernel = integer_kernel(0, (3, 3, 2, 3))
    known = LinearMap("conv", (48, 48, 2), strides=strides, padding="valid")
    large = norm_upper_bound(kernel, known, method="frequency").value
    bound = float(conv_norm_upper_bound(kernel, LinearMap("conv", strides=strides)))
    assert bound <= 1.05 * large
    assert bound <= float(conv_norm_upper_bound(kernel)) * 1.05


@pytest.mark.parametrize("degree, points", itertools.product((1, 2, 4, 6), (8, 9, 16)))
def test_grid_factor_is_valid_and_attained_by_riesz_extremal_polynomial(degree, points):
    """f(θ) = 1 + cos(D(θ - θ₀)), halfway between grid points, needs exactly the factor (2)."""
    half_step = math.pi / points
    nearest = (1 + math.cos(degree * half_step)) / 2
    assert nearest == pytest.approx(math.cos(math.pi * degree / (2 * points)) ** 2)
    # A polynomial of that degree drawn at random never needs more.
    rng = np.random.default_rng(degree * 100 + points)
    for _ in range(50):
        taps = rng.standard_normal(degree + 1)
        f = lambda t: np.abs(np.exp(1j * np.outer(t, np.arange(degree + 1))) @ taps) ** 2  # noqa: B023, E731
        on_grid = f(2 * np.pi * np.arange(points) / points).max()
        everywhere = f(np.linspace(0, 2 * np.pi, 4001)).max()
        assert everywhere * math.cos(math.pi * degree / (2 * points)) ** 2 <= on_grid * (1 + 1e-9)


def test_all_ones_filter_has_gain_twenty_five_on_large_images():
    kernel = np.ones((5, 5, 1, 1), "float32")
    assert 25.0 <= float(conv_norm_upper_bound(kernel)) <= 26.25
    layer = keras.layers.Conv2D(1, 5, use_bias=False, kernel_initializer="ones")
    layer.build((None, 28, 28, 1))
    [(variable, linear_map)] = linear_maps(layer)
    truth = norm_upper_bound(kernel, linear_map).value
    assert truth <= float(conv_norm_upper_bound(variable, linear_map)) <= 25.0 * 1.01
    # Negative control: the reshaped kernel's norm is no bound.
    assert np.linalg.norm(kernel.reshape(25, 1), 2) < truth / 4


def test_circulant_at_the_image_size_is_no_bound_but_ours_is():
    """Negative control of theory.md, section 7: wrapping at n instead of n + k//2."""
    violated = 0
    for seed in range(60):
        kernel = integer_kernel(seed, (3, 1, 1))
        layer = keras.layers.Conv1D(1, 3, padding="same", use_bias=False)
        layer.build((None, 4, 1))
        layer.kernel.assign(kernel)
        truth = true_norm(layer, (4, 1))
        [(variable, linear_map)] = linear_maps(layer)
        assert float(conv_norm_upper_bound(variable, linear_map)) >= truth * SVD_ROUNDING
        at_image_size = np.abs(symbols(kernel, 4)).max()
        violated += at_image_size < truth * (1 - 1e-9)
    assert violated > 0


def test_pointwise_convolution_is_its_matrix():
    kernel = np.random.default_rng(0).standard_normal((1, 1, 8, 5)).astype("float32")
    truth = np.linalg.norm(kernel[0, 0].astype(float), 2)
    for linear_map in (None, LinearMap("conv", (9, 9, 8), strides=2)):
        assert truth <= float(conv_norm_upper_bound(kernel, linear_map)) <= 1.002 * truth
    assert len(frequency_grid(kernel.shape).angles) == 1


def test_half_of_the_frequencies_suffices_for_real_kernels():
    grid = frequency_grid((3, 3, 1, 1), LinearMap("conv", (6, 5, 1)))
    assert len(grid.angles) == (30 + 2) // 2  # 2 of 30 points are their own opposite
    both = np.exp(1j * np.concatenate([grid.angles, -grid.angles]))
    assert len({tuple(np.round(point, 9) + 0) for point in both}) == 30


def test_dilation_does_not_add_frequencies_without_a_size():
    plain, dilated = (frequency_grid((3, 3, 2, 2), LinearMap("conv", dilation=d)) for d in (1, 5))
    assert len(plain.angles) == len(dilated.angles)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12, 1e30])
def test_convolution_bound_survives_every_scale(scale):
    kernel = (integer_kernel(3, (3, 3, 2, 2)) * scale).astype("float32")
    unit = float(conv_norm_upper_bound(integer_kernel(3, (3, 3, 2, 2))))
    bound = float(conv_norm_upper_bound(kernel))
    assert bound == pytest.approx(unit * scale, rel=1e-4) if scale else bound == 0.0


def test_non_finite_convolution_kernels_give_nan():
    kernel = np.ones((3, 3, 2, 2), "float32")
    for bad in (np.nan, np.inf):
        kernel[1, 1, 0, 0] = bad
        assert math.isnan(float(conv_norm_upper_bound(kernel)))


def test_frequencies_in_chunks_give_the_same_bound(monkeypatch):
    kernel = integer_kernel(0, (3, 3, 4, 5))
    whole = float(conv_norm_upper_bound(kernel))
    monkeypatch.setattr("tf_lyapunov.spectral.convolution.CHUNK_FLOATS", 100)
    assert float(conv_norm_upper_bound(kernel)) == pytest.approx(whole, rel=1e-3)


def test_channels_first_layers_are_bounded_by_the_same_map():
    layer = keras.layers.Conv2D(3, 3, padding="same", data_format="channels_first", use_bias=False)
    layer.build((None, 2, 6, 7))
    layer.kernel.assign(integer_kernel(0, (3, 3, 2, 3)))
    [(kernel, linear_map)] = linear_maps(layer)
    last = keras.layers.Conv2D(3, 3, padding="same", use_bias=False)
    last.build((None, 6, 7, 2))
    last.kernel.assign(integer_kernel(0, (3, 3, 2, 3)))
    assert linear_map == linear_maps(last)[0][1]
    truth = true_norm(last, (6, 7, 2)) * SVD_ROUNDING
    assert float(conv_norm_upper_bound(kernel, linear_map)) >= truth


def test_wrong_geometry_is_refused():
    with pytest.raises(ValueError, match="groups"):
        conv_norm_upper_bound(np.zeros((3, 3, 2, 3), "float32"), LinearMap("conv", groups=2))
    with pytest.raises(ValueError, match="spatial axis"):
        conv_norm_upper_bound(np.zeros((3, 3), "float32"))
