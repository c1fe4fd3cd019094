"""AOL layers: norms, equality for orthogonal kernels, the published formula."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_maps import layer_matrix
from linear_layers import EXAMPLES, assert_within_gain, fit_briefly, gradients, set_kernel

from tf_lyapunov.layers.almost_orthogonal import (
    AlmostOrthogonalConv1D,
    AlmostOrthogonalConv2D,
    AlmostOrthogonalDense,
    rescaled,
)

DTYPES = st.sampled_from(["float32", "float32", "mixed_bfloat16", "mixed_float16", "float64"])
SCALES = st.sampled_from([0.0, 1e-25, 0.1, 1.0, 1e6])
GAINS = st.sampled_from([1.0, 0.3, 7.0])


@settings(max_examples=EXAMPLES)
@given(st.integers(1, 9), st.integers(1, 9), DTYPES, SCALES, GAINS, st.integers(0, 999))
def test_dense_map_is_a_contraction(a, b, dtype, scale, gain, seed):
    layer = AlmostOrthogonalDense(b, max_gain=gain, dtype=dtype)
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
    DTYPES,
    SCALES,
    GAINS,
    st.integers(0, 999),
)
def test_convolution_is_a_contraction_for_every_geometry(
    rank, shape, filters, k, stride, padding, dtype, scale, gain, seed
):
    shape = shape[2 - rank :]
    kind = AlmostOrthogonalConv1D if rank == 1 else AlmostOrthogonalConv2D
    if rank == 1 and seed % 3 == 0:
        padding = "causal"
    layer = kind(filters, k, strides=stride, padding=padding, max_gain=gain, dtype=dtype)
    layer.build((None, *shape))
    set_kernel(layer, seed, scale)
    assert_within_gain(layer, shape, training=seed % 2 == 0)
    assert layer(np.zeros((2, *shape))).shape == layer.compute_output_shape((2, *shape))


def test_rescaling_is_the_published_one():
    """Theorem 2, from the definition: Σ over channels and shifts of absolute autocorrelations."""
    w = np.random.default_rng(0).standard_normal((3, 2, 4, 5))
    sums = np.zeros(4)
    for s in range(-2, 3):
        for t in range(-1, 2):
            total = np.zeros((4, 4))
            for i in range(3):
                for j in range(2):
                    if 0 <= i + s < 3 and 0 <= j + t < 2:
                        total += w[i, j] @ w[i + s, j + t].T
            sums += np.abs(total).sum(1)
    expected = w * sums[:, None] ** -0.5
    found = keras.ops.convert_to_numpy(rescaled(w.astype("float32")))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("a", "b"), [(7, 4), (4, 7), (5, 5)])
def test_dense_layers_rescale_the_side_with_the_smaller_gram_matrix(a, b):
    layer = AlmostOrthogonalDense(b)
    layer.build((None, a))
    set_kernel(layer, 1, 2.0)
    w = np.asarray(keras.ops.convert_to_numpy(layer.kernel)).astype(float)
    expected = w / np.sqrt(np.abs(w.T @ w).sum(0))
    if a < b:
        expected = w / np.sqrt(np.abs(w @ w.T).sum(0))[:, None]
    np.testing.assert_allclose(layer.effective_values()["kernel"], expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(700, 512), (40, 300)])
def test_large_orthogonal_kernels_lose_a_few_hundredths_at_most(shape):
    layer = AlmostOrthogonalDense(shape[1], kernel_initializer="orthogonal")
    layer.build((None, shape[0]))
    sigma = np.linalg.svd(layer.effective_values()["kernel"], compute_uv=False)
    assert 0.97 <= sigma[-1] and sigma[0] <= 1.0


def test_orthogonal_kernels_are_kept():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0].astype("float32")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(rescaled(q)), q, atol=1e-4)


def test_column_norms_alone_would_be_unsound():
    """Negative control: dividing columns by their norms lets equal columns add up."""
    w = np.ones((4, 1), "float32")
    assert np.linalg.norm(w / np.linalg.norm(w, axis=1, keepdims=True), 2) == 2.0
    assert np.linalg.norm(keras.ops.convert_to_numpy(rescaled(w)), 2) <= 1.0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (AlmostOrthogonalDense(5), (7,)),
        (AlmostOrthogonalConv2D(3, 3, strides=2), (5, 6, 2)),
        (AlmostOrthogonalConv2D(3, 2, padding="valid", dilation_rate=2), (5, 6, 2)),
    ],
)
def test_bound_survives_training_at_an_absurd_rate(layer, shape):
    fit_briefly(layer, shape)
    assert_within_gain(layer, shape)
    assert_within_gain(layer, shape, training=True)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e5])
def test_gradients_are_finite(scale):
    for layer, shape in [
        (AlmostOrthogonalDense(3), (5,)),
        (AlmostOrthogonalConv2D(3, 3), (4, 5, 2)),
    ]:
        layer.build((None, *shape))
        set_kernel(layer, 1, scale)
        x = np.random.default_rng(0).standard_normal((4, *shape)).astype("float32")
        assert np.isfinite(gradients(layer, x)).all()


def test_one_kernel_serves_every_image_size():
    layer = AlmostOrthogonalConv2D(3, 3, use_bias=False)
    layer.build((None, None, None, 2))
    for shape in [(1, 1, 2), (4, 5, 2), (7, 3, 2)]:
        assert np.linalg.norm(layer_matrix(layer, shape), 2) <= 1.0
