"""Geometry of linear maps against the Keras layers themselves, and norm bounds against SVD."""

import functools
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_maps import transposes_dilated

from tf_lyapunov.spectral.operators import adjoint, apply
from tf_lyapunov.spectral.reading import linear_maps
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix

layers = keras.layers
F32 = np.finfo(np.float32).eps


def materialised(layer, shape):
    """Matrix of a Keras layer without bias or activation: apply it to the identity basis."""
    size = math.prod(shape)
    basis = np.eye(size, dtype="float32").reshape(size, *shape)
    return keras.ops.convert_to_numpy(layer(basis)).reshape(size, -1).T.astype(float)


@st.composite
def convolutions(draw):
    """A Keras convolution of any kind and the shape of its input."""
    kind = draw(st.sampled_from(["conv", "depthwise", "separable", "transpose", "causal"]))
    rank = 1 if kind == "causal" else draw(st.sampled_from([1, 2, 3] if kind == "conv" else [1, 2]))
    k = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    stride = draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2)) if stride == 1 else 1
    padding = "causal" if kind == "causal" else draw(st.sampled_from(["same", "valid"]))
    extents = [(a - 1) * dilation + 1 for a in k]
    n = tuple(draw(st.integers(e, max(e, 8 if rank < 3 else 6))) for e in extents)
    common = {
        "strides": stride,
        "dilation_rate": dilation,
        "padding": padding,
        "use_bias": False,
    }
    channels = 2
    if kind in ("conv", "causal"):
        groups = draw(st.sampled_from([1, 2]))
        cls = [layers.Conv1D, layers.Conv2D, layers.Conv3D][rank - 1]
        return functools.partial(cls, 2 * draw(st.integers(1, 2)), k, groups=groups, **common), (
            *n,
            channels,
        )
    if kind == "depthwise":
        # Keras' depthwise layers take one stride for all axes.
        cls = [layers.DepthwiseConv1D, layers.DepthwiseConv2D][rank - 1]
        return functools.partial(cls, k, depth_multiplier=draw(st.integers(1, 2)), **common), (
            *n,
            channels,
        )
    if kind == "separable":
        cls = [layers.SeparableConv1D, layers.SeparableConv2D][rank - 1]
        return functools.partial(cls, 3, k, depth_multiplier=draw(st.integers(1, 2)), **common), (
            *n,
            channels,
        )
    cls = [layers.Conv1DTranspose, layers.Conv2DTranspose][rank - 1]
    if not transposes_dilated():
        common["dilation_rate"] = 1
    return functools.partial(cls, 3, k, **common), (*n, channels)


@settings(max_examples=150)
@given(convolutions())
def test_the_matrix_of_every_convolution_is_that_of_the_keras_layer(case):
    make, shape = case
    layer = make()
    layer.build((None, *shape))
    truth = materialised(layer, shape)
    matrix = 1.0
    for kernel, linear_map in linear_maps(layer):
        factor = convolution_matrix(keras.ops.convert_to_numpy(kernel), linear_map)
        matrix = factor @ matrix if np.ndim(matrix) else factor
    scale = np.abs(truth).sum(1).max() + 1
    np.testing.assert_allclose(matrix.toarray(), truth, atol=50 * F32 * scale)


@settings(max_examples=150)
@given(convolutions())
def test_no_bound_lies_below_the_singular_value_and_the_materialised_one_equals_it(case):
    make, shape = case
    layer = make()
    layer.build((None, *shape))
    for kernel, linear_map in linear_maps(layer):
        kernel = keras.ops.convert_to_numpy(kernel)
        truth = np.linalg.norm(convolution_matrix(kernel, linear_map).toarray(), 2)
        for method in ("materialised", "frequency", "size_free"):
            bound = norm_upper_bound(kernel, linear_map, method=method)
            assert bound.value >= truth * (1 - 1e-14), method
            if bound.exact:
                assert bound.value <= truth * (1 + 1e-9)


@settings(max_examples=30)
@given(convolutions(), st.integers(0, 2**31))
def test_adjoint_is_the_transpose_of_apply(case, seed):
    make, shape = case
    layer = make()
    layer.build((None, *shape))
    rng = np.random.default_rng(seed)
    for kernel, linear_map in linear_maps(layer):
        matrix = convolution_matrix(keras.ops.convert_to_numpy(kernel), linear_map)
        kernel = keras.ops.convert_to_tensor(kernel)
        x = rng.normal(size=(2, *linear_map.input_shape)).astype("float32")
        y = keras.ops.convert_to_numpy(apply(x, kernel, linear_map))
        size = np.abs(matrix).sum() + 1
        np.testing.assert_allclose(
            y.reshape(2, -1), x.reshape(2, -1) @ matrix.T, atol=50 * F32 * size
        )
        z = rng.normal(size=y.shape).astype("float32")
        back = keras.ops.convert_to_numpy(adjoint(z, kernel, linear_map))
        np.testing.assert_allclose(
            back.reshape(2, -1), z.reshape(2, -1) @ matrix, atol=50 * F32 * size
        )


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_output_padding_of_transposed_convolutions_is_read(padding, output_padding):
    layer = layers.Conv2DTranspose(
        2, 3, strides=2, padding=padding, output_padding=output_padding, use_bias=False
    )
    layer.build((None, 4, 5, 2))
    [(kernel, linear_map)] = linear_maps(layer)
    matrix = convolution_matrix(keras.ops.convert_to_numpy(kernel), linear_map).toarray()
    np.testing.assert_allclose(matrix, materialised(layer, (4, 5, 2)), atol=1e3 * F32)


def test_the_all_ones_kernel_has_the_norm_of_its_materialised_matrix():
    ones = np.ones((5, 5, 1, 1))
    linear_map = LinearMap("conv", (28, 28, 1))
    truth = np.linalg.norm(convolution_matrix(ones, linear_map).toarray(), 2)
    # A Cholesky factor of side 784 leaves n²u ≈ 7e-11 of the eigenvalue open.
    assert truth <= norm_upper_bound(ones, linear_map).value <= truth * (1 + 1e-10)
    # The paper's claim ‖W*R‖_F ≤ ‖W‖_F ‖R‖_F would need truth ≤ 5.
    assert truth / 5 == pytest.approx(4.86, abs=0.01)


def test_the_circulant_of_the_image_size_itself_is_no_bound_for_zero_padding():
    """Negative control: the shortcut of the literature falls below the truth at this size."""
    rng = np.random.default_rng(0)
    n, below = 6, 0
    linear_map = LinearMap("conv", (n, 1), padding="same")
    for _ in range(100):
        kernel = rng.normal(size=(3, 1, 1))
        truth = np.linalg.norm(convolution_matrix(kernel, linear_map).toarray(), 2)
        circular = np.abs(np.fft.fft(kernel[:, 0, 0], n)).max()
        below += circular < truth
        assert norm_upper_bound(kernel, linear_map, method="frequency").value >= truth
    assert below > 10


@pytest.mark.parametrize("stride", [1, 2])
def test_a_size_free_bound_is_within_five_percent_of_the_supremum_over_sizes(stride):
    rng = np.random.default_rng(1)
    for k in (2, 3, 5):
        kernel = rng.normal(size=(k, 3, 2))
        free = norm_upper_bound(kernel, LinearMap("conv", strides=stride, padding="same")).value
        large = LinearMap("conv", (600, 3), strides=stride, padding="same")
        truth = np.linalg.norm(convolution_matrix(kernel, large).toarray(), 2)
        assert truth <= free <= 1.05 * truth


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_bounds_survive_tiny_and_huge_kernels(scale):
    kernel = np.array([[3.0, 0.0], [0.0, 4.0]]) * scale
    value = norm_upper_bound(kernel, LinearMap("dense", (2,))).value
    assert 4 * scale <= value <= 4 * scale * (1 + 1e-12)


def test_zero_kernels_have_norm_zero_and_nan_kernels_are_refused():
    assert norm_upper_bound(np.zeros((3, 2)), LinearMap("dense", (3,))).value == 0.0
    with pytest.raises(ValueError, match="finite"):
        norm_upper_bound(np.full((3, 2), np.nan), LinearMap("dense", (3,)))
    with pytest.raises(ValueError, match="input_shape"):
        convolution_matrix(np.ones((3, 1, 1)), LinearMap("conv"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "fourier"},
        {"kind": "conv", "padding": "reflect"},
        {"kind": "conv", "strides": (0,)},
        {"kind": "conv", "groups": 0},
    ],
)
def test_impossible_geometries_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        LinearMap(**arguments)


def test_geometries_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        LinearMap("conv", (2, 2, 1)).output_shape((3, 3, 1, 1))
    with pytest.raises(ValueError, match="sizes and the channels"):
        LinearMap("conv", (4, 1)).output_shape((3, 3, 1, 1))
