"""Maps and adjoints of kernels on any backend and processor."""

import keras
import numpy as np
import pytest

from tf_lyapunov.spectral import operators
from tf_lyapunov.theory.operators import LinearMap, convolution_axes

CASES = [
    ((3, 2, 4), LinearMap("conv", (9, 2), dilation=2)),
    ((3, 2, 4), LinearMap("conv", (9, 2), dilation=2, padding="causal")),
    ((3, 2, 2, 4), LinearMap("conv", (7, 8, 2), dilation=(2, 3), padding="same")),
    ((3, 3, 2, 4), LinearMap("conv", (7, 7, 4), dilation=2, groups=2)),
    ((2, 2, 2, 1, 3), LinearMap("conv", (5, 5, 5, 1), dilation=2)),
    ((3, 3, 2, 4), LinearMap("conv", (8, 7, 2), strides=2, padding="same")),
    ((3, 3, 2, 2), LinearMap("depthwise", (8, 7, 2), dilation=2)),
    ((3, 3, 4, 2), LinearMap("conv_transpose", (5, 4, 2), strides=2)),
    ((3, 4, 2), LinearMap("conv_transpose", (5, 2), dilation=2)),
]


@pytest.mark.parametrize(("shape", "linear_map"), CASES)
def test_the_adjoint_has_the_inner_products_of_the_map(shape, linear_map):
    """⟨y, Wx⟩ = ⟨Wᵀy, x⟩, with dilation too, of which processors have no transposed convolution."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape).astype("float32")
    x = rng.normal(size=(2, *linear_map.input_shape)).astype("float32")
    value = np.asarray(keras.ops.convert_to_numpy(operators.apply(x, kernel, linear_map)))
    y = rng.normal(size=value.shape).astype("float32")
    back = keras.ops.convert_to_numpy(operators.adjoint(y, kernel, linear_map))
    assert back.shape == x.shape
    left, right = (np.sum(a.astype(float) * b) for a, b in ((y, value), (back, x)))
    # Sums of at most 2¹² products, rounded one by one in float32.
    size = np.linalg.norm(x) * np.linalg.norm(y) * np.linalg.norm(kernel)
    assert abs(left - right) <= 2.0**-12 * 2.0**-10 * size


@pytest.mark.parametrize("strides", [1, 2, (2, 3)])
def test_both_ways_to_transpose_agree(strides):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(3, 2, 2, 4)).astype("float32")
    axes = convolution_axes(kernel.shape, LinearMap("conv", (9, 8, 2), strides=strides))
    y = rng.normal(size=(2, *(a.output for a in axes), 4)).astype("float32")
    one, other = (
        keras.ops.convert_to_numpy(transposed(y, kernel, axes))
        for transposed in (operators._full, operators._full_spread)
    )
    rows = [slice(0, min(n, m)) for n, m in zip(one.shape, other.shape, strict=True)]
    np.testing.assert_allclose(one[tuple(rows)], other[tuple(rows)], atol=2.0**-18)
