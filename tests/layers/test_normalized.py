"""Layers divided by a norm: spectral, Frobenius and per-class normalisation."""

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

from tf_lyapunov.layers.normalized import (
    FrobeniusDense,
    NormalizedDense,
    SpectralConv1D,
    SpectralConv2D,
    SpectralDense,
)

DTYPES = st.sampled_from(["float32", "float32", "mixed_bfloat16", "mixed_float16", "float64"])
SCALES = st.sampled_from([0.0, 1e-25, 1e-3, 1.0, 1e6])
GAINS = st.sampled_from([1.0, 0.3, 7.0])


@settings(max_examples=EXAMPLES)
@given(
    st.sampled_from([SpectralDense, FrobeniusDense]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    DTYPES,
    SCALES,
    GAINS,
    st.integers(0, 999),
)
def test_dense_map_is_a_contraction(kind, a, b, shrink_only, dtype, scale, gain, seed):
    layer = kind(b, shrink_only=shrink_only, max_gain=gain, dtype=dtype)
    layer.build((None, a))
    set_kernel(layer, seed, scale)
    assert_within_gain(layer, (a,), training=seed % 2 == 0)


@settings(max_examples=EXAMPLES)
@given(
    st.integers(1, 2),
    st.tuples(st.integers(3, 6), st.integers(3, 6), st.integers(1, 3)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["same", "valid"]),
    st.booleans(),
    DTYPES,
    SCALES,
    GAINS,
    st.integers(0, 999),
)
def test_convolution_is_a_contraction_for_every_geometry(
    rank, shape, filters, k, stride, padding, shrink_only, dtype, scale, gain, seed
):
    shape = shape[2 - rank :]
    kind = SpectralConv1D if rank == 1 else SpectralConv2D
    if rank == 1 and seed % 3 == 0:
        padding = "causal"
    layer = kind(
        filters, k, shrink_only, strides=stride, padding=padding, max_gain=gain, dtype=dtype
    )
    layer.build((None, *shape))
    set_kernel(layer, seed, scale)
    assert_within_gain(layer, shape, training=seed % 2 == 0)
    assert layer(np.zeros((2, *shape))).shape == layer.compute_output_shape((2, *shape))


def test_normalised_kernels_reach_the_bound_and_shrunk_ones_stay_below_it():
    for layer, shape, least in [
        (SpectralDense(6), (9,), 0.99),
        (SpectralConv2D(4, 3, strides=2), (9, 8, 3), 0.9),
        (FrobeniusDense(1), (9,), 0.9999),
    ]:
        layer.build((None, *shape))
        set_kernel(layer, 1, 1e-2)
        assert least <= np.linalg.norm(exact_matrix(layer, shape), 2) <= 1.0
    layer = SpectralDense(6, shrink_only=True)
    layer.build((None, 9))
    set_kernel(layer, 1, 1e-2)
    np.testing.assert_array_equal(layer.effective_values()["kernel"], np.asarray(layer.kernel))


@pytest.mark.parametrize("initializer", ["orthogonal", "glorot_uniform"])
@pytest.mark.parametrize("shape", [(300, 128), (60, 300)])
def test_large_kernels_are_within_two_hundredths_of_the_gain(shape, initializer):
    """Equal singular values are the worst case of the bound."""
    layer = SpectralDense(shape[1], kernel_initializer=initializer)
    layer.build((None, shape[0]))
    assert 0.975 <= np.linalg.norm(layer.effective_values()["kernel"], 2) <= 1.0


def test_reshaped_norm_would_be_unsound():
    """Negative control: the all-ones 5×5 filter, normalised as a matrix, has a gain near 5."""
    layer = SpectralConv2D(1, 5)
    layer.build((None, 12, 12, 1))
    layer.kernel.assign(np.ones((5, 5, 1, 1)) / 5)
    raw = SpectralConv2D(1, 5, shrink_only=True, max_gain=100.0)
    raw.build((None, 12, 12, 1))
    raw.kernel.assign(layer.kernel.numpy())
    assert np.linalg.norm(exact_matrix(raw, (12, 12, 1)), 2) > 4
    assert_within_gain(layer, (12, 12, 1))


def test_unknown_sizes_use_a_bound_for_all_and_known_ones_refuse_others():
    free = SpectralConv2D(3, 3)
    free.build((None, None, None, 2))
    set_kernel(free, 3, 1.0)
    for shape in [(1, 1, 2), (4, 5, 2), (9, 8, 2)]:
        assert_within_gain(free, shape)
    fixed = SpectralConv2D(3, 3)
    fixed(np.zeros((1, 4, 4, 2), "float32"))
    with pytest.raises(ValueError, match="shape"):
        fixed(np.zeros((1, 8, 8, 2), "float32"))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SpectralDense(5), (7,)),
        (FrobeniusDense(5, shrink_only=True), (7,)),
        (SpectralConv2D(3, 3, strides=2), (5, 6, 2)),
        (SpectralConv1D(3, 3, padding="causal"), (6, 2)),
        (NormalizedDense(5), (7,)),
    ],
)
def test_bound_survives_training_at_an_absurd_rate(layer, shape):
    fit_briefly(layer, shape)
    assert_within_gain(layer, shape)
    assert_within_gain(layer, shape, training=True)


@pytest.mark.parametrize("shrink_only", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1.0, 1e5])
def test_gradients_are_finite(scale, shrink_only):
    for kind, shape in [(SpectralDense, (5,)), (FrobeniusDense, (5,)), (NormalizedDense, (5,))]:
        layer = kind(3, shrink_only=shrink_only)
        layer.build((None, *shape))
        set_kernel(layer, 1, scale)
        x = np.random.default_rng(0).standard_normal((4, *shape)).astype("float32")
        assert np.isfinite(gradients(layer, x)).all()
    layer = SpectralConv2D(3, 3, shrink_only)
    layer.build((None, 4, 5, 2))
    set_kernel(layer, 1, scale)
    x = np.random.default_rng(0).standard_normal((4, 4, 5, 2)).astype("float32")
    assert np.isfinite(gradients(layer, x)).all()


def test_gradient_has_no_radial_part_as_that_of_a_scale_invariant_map():
    """⟨∂loss/∂W, W⟩ = 0 needs the norm's own gradient, not a bound held fixed."""
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    for kind in (SpectralDense, FrobeniusDense):
        layer = kind(5)
        layer.build((None, 6))
        kernel = np.diag(np.arange(6.0, 0.0, -1))[:, :5] + 0.1
        layer.kernel.assign(kernel)
        gradient = gradients(layer, x)
        size = np.linalg.norm(gradient) * np.linalg.norm(kernel)
        assert abs(np.sum(gradient * kernel)) <= 1e-2 * size


@settings(max_examples=EXAMPLES)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), DTYPES, SCALES, st.integers(0, 999))
def test_class_vectors_have_at_most_the_row_norm(a, b, shrink_only, dtype, scale, seed):
    layer = NormalizedDense(b, row_norm=0.7, shrink_only=shrink_only, dtype=dtype)
    layer.build((None, a))
    set_kernel(layer, seed, scale)
    norms = np.linalg.norm(layer.effective_values()["kernel"], axis=0)
    assert norms.max() <= 0.7 * layer.rounding_inflation * (1 + 1e-15)
    assert_within_gain(layer, (a,))
    if scale > 1e-20 and not shrink_only and dtype in ("float32", "float64"):
        assert norms.min() >= 0.7 * (1 - 1e-5)


def test_arguments_are_checked_and_restored():
    with pytest.raises(TypeError, match="row_norm"):
        NormalizedDense(3, max_gain=1.0)
    with pytest.raises(ValueError, match="padding"):
        SpectralConv2D(3, 3, padding="causal")
    with pytest.raises(ValueError, match="both exceed 1"):
        SpectralConv2D(3, 3, strides=2, dilation_rate=2)
    with pytest.raises(ValueError, match="last axis"):
        SpectralDense(3).build((None, None))
    for layer in (
        SpectralDense(3, shrink_only=True, activation="relu", max_gain=2.0),
        SpectralConv2D(3, (3, 2), strides=2, use_bias=False),
        SpectralConv1D(3, 2, padding="causal", dilation_rate=2),
        FrobeniusDense(3),
        NormalizedDense(3, row_norm=0.5),
    ):
        clone = type(layer).from_config(layer.get_config())
        assert clone.get_config() == layer.get_config()


def test_kernels_that_are_not_finite_give_nan_and_never_a_wrong_map():
    for kind in (SpectralDense, FrobeniusDense):
        layer = kind(3)
        layer.build((None, 3))
        kernel = np.ones((3, 3), "float32")
        kernel[0, 0] = np.inf
        layer.kernel.assign(kernel)
        y = keras.ops.convert_to_numpy(layer(np.ones((1, 3), "float32")))
        assert np.isnan(y).all()
