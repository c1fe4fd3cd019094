"""Gains of flow steps and sandwiches, against sampled Jacobians and closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.theory.operators import LinearMap, convolution_matrix
from tf_lyapunov.theory.potential import (
    flow_gain_upper_bound,
    flow_step,
    flow_step_gain_upper_bound,
    sandwich_gain_upper_bound,
    schur_diagonal,
)

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))


def relu(x):
    return np.maximum(x, 0)


@given(SIZES, st.floats(0.0, 3.0))
def test_a_flow_step_never_expands_more_than_its_gain(sizes, factor):
    d, m, seed = sizes
    rng = np.random.default_rng(seed)
    kernel, bias = rng.standard_normal((d, m)), rng.standard_normal(m)
    scale = factor * 2 / np.linalg.norm(kernel, 2) ** 2
    bound = flow_gain_upper_bound(kernel, scale)
    x = rng.standard_normal((40, d))
    y = x + rng.standard_normal((40, d)) * 10.0 ** rng.uniform(-3, 1, (40, 1))
    moved = flow_step(x, kernel, bias, relu, scale) - flow_step(y, kernel, bias, relu, scale)
    ratios = np.linalg.norm(moved, axis=1) / np.linalg.norm(x - y, axis=1)
    assert np.all(ratios <= bound * (1 + 1e-9))
    np.testing.assert_allclose(bound, max(1.0, 2 * factor - 1), rtol=1e-9)


def test_the_gain_of_a_flow_step_is_attained():
    kernel = np.array([[2.0]])
    x, y = np.array([[3.0]]), np.array([[1.0]])
    z = [flow_step(v, kernel, 0.0, relu, 1.0) for v in (x, y)]
    assert abs(z[0] - z[1]) / abs(x - y) == flow_step_gain_upper_bound(2.0) == 3.0


@given(SIZES)
def test_the_published_step_has_gain_one(sizes):
    d, m, seed = sizes
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((d, m))
    x, y = rng.standard_normal((2, 10, d))
    moved = flow_step(x, kernel, 0.3, np.tanh) - flow_step(y, kernel, 0.3, np.tanh)
    assert np.all(np.linalg.norm(moved, axis=1) <= np.linalg.norm(x - y, axis=1) * (1 + 1e-12))


def test_a_step_from_a_norm_too_small_expands():
    """Negative control: power iteration underestimates, and 2/σ² is then too long."""
    bound = flow_gain_upper_bound(np.eye(3), 2 / 0.9**2)
    np.testing.assert_allclose(bound, 2 / 0.81 - 1, rtol=1e-12)


def test_convolutions_are_measured_as_maps_of_their_image():
    kernel = np.random.default_rng(0).standard_normal((3, 2, 2, 4))
    linear_map = LinearMap("conv", (4, 5, 2), padding="same")
    matrix = convolution_matrix(kernel, linear_map).toarray()
    scale = np.array([0.1, 0.2, 0.05, 0.3])
    weighted = matrix * np.sqrt(np.tile(scale, 20))[:, None]
    expected = np.linalg.norm(weighted, 2) ** 2 - 1
    np.testing.assert_allclose(flow_gain_upper_bound(kernel, scale, linear_map), expected, 1e-9)
    halved = flow_gain_upper_bound(kernel, scale, linear_map, gain=0.5)
    np.testing.assert_allclose(halved, expected / 2, 1e-9)


@given(SIZES)
def test_the_diagonal_dominates_the_gram_matrix(sizes):
    d, m, seed = sizes
    rng = np.random.default_rng(seed)
    kernel, q = rng.standard_normal((d, m)), np.exp(rng.standard_normal(m))
    diagonal = schur_diagonal(kernel.T @ kernel, q)
    lowest = np.linalg.eigvalsh(np.diag(diagonal) - kernel.T @ kernel)[0]
    assert lowest >= -1e-12 * diagonal.max()
    assert flow_gain_upper_bound(kernel, 2 / diagonal) <= 1 + 1e-12


@given(SIZES, st.integers(1, 6), st.sampled_from([0.25, 1.0]))
def test_no_activation_pattern_exceeds_the_gain_of_a_sandwich(sizes, k, beta):
    d, m, seed = sizes
    rng = np.random.default_rng(seed)
    inner, outer = rng.standard_normal((d, m)), rng.standard_normal((m, k))
    weights = np.exp(rng.standard_normal(m))
    bound = sandwich_gain_upper_bound(inner, outer, weights, beta=beta)
    patterns = [np.ones(m), *rng.integers(0, 2, (20, m)), *rng.uniform(0, 1, (20, m))]
    gains = [np.linalg.norm((inner * (beta * p)) @ outer, 2) for p in patterns]
    assert max(gains) <= bound * (1 + 1e-12)


def test_the_bound_of_a_sandwich_is_the_largest_over_frequencies_and_is_attained():
    blocks = np.stack([np.diag([1.0, 0.2]), np.diag([0.5, 2.0])])
    bound = sandwich_gain_upper_bound(blocks, blocks, np.ones(2), gain=0.5)
    np.testing.assert_allclose(bound, 0.5 * 4.0, rtol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: flow_step_gain_upper_bound(-1.0),
        lambda: flow_step_gain_upper_bound(1.0, beta=float("inf")),
        lambda: flow_gain_upper_bound(np.eye(2), -1.0),
        lambda: flow_gain_upper_bound(np.full((2, 2), np.nan), 1.0),
        lambda: flow_gain_upper_bound(np.eye(2), np.array([1.0, np.inf])),
        lambda: sandwich_gain_upper_bound(np.eye(2), np.eye(2), np.zeros(2)),
        lambda: sandwich_gain_upper_bound(np.full((2, 2), np.nan), np.eye(2), np.ones(2)),
    ],
)
def test_wrong_values_are_refused(call):
    with pytest.raises(ValueError, match="Received"):
        call()
