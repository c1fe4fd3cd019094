"""Convolutions in float64 are products with their matrices, by patches and tap by tap."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tf_lyapunov.program.families import linear
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 2))
    taps = [draw(st.integers(1, 4)) for _ in range(rank)]
    dilation = draw(st.sampled_from([1, 1, 2, 3]))
    strides = 1 if dilation > 1 else draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid", "causal"] if rank == 1 else ["same", "valid"]))
    least = [(t - 1) * dilation + 1 if padding == "valid" else 1 for t in taps]
    sizes = [draw(st.integers(n, n + 6)) for n in least]
    channels, filters = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    linear_map = LinearMap(
        "conv", (*sizes, channels), strides=strides, dilation=dilation, padding=padding
    )
    return (*taps, channels, filters), linear_map


@pytest.mark.parametrize("largest", [0, linear._LARGEST])
@hypothesis.settings(max_examples=100)
@hypothesis.given(case=convolutions(), seed=st.integers(0, 99), samples=st.integers(1, 5))
def test_both_ways_are_the_product_with_the_matrix(largest, case, seed, samples):
    shape, linear_map = case
    rng = np.random.default_rng(seed)
    kernel, x = rng.normal(size=shape), rng.normal(size=(samples, *linear_map.input_shape))
    matrix = convolution_matrix(kernel, linear_map)
    expected = (matrix @ x.reshape(samples, -1).T).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_LARGEST", largest)
        patch.setattr(linear, "_PATCHES", 4096)  # several blocks
        found = linear.convolved(x, kernel, linear_map)
    # Sums of at most 48 products, in two orders.
    bound = 2 * 48 * 2.0**-53 * (abs(matrix) @ abs(x).reshape(samples, -1).T).T
    assert np.all(np.abs(found.reshape(samples, -1) - expected) <= bound)


def test_padding_does_not_meet_infinite_weights():
    kernel = np.array([np.inf, 1.0, 1.0]).reshape(3, 1, 1)
    found = linear.convolved(np.ones((1, 2, 1)), kernel, LinearMap("conv", (2, 1), padding="same"))
    assert found.ravel().tolist() == [2.0, np.inf]
