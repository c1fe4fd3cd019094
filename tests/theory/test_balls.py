"""Norms, projections and dual norms of the two balls."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lyapunov.theory.balls import L2, Ball, Linf

ULP = np.finfo(np.float64).eps
SUBNORMAL = np.finfo(np.float64).smallest_subnormal
vectors = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    elements=st.floats(-1e6, 1e6),
)
radii = st.floats(0, 1e3)
balls = pytest.mark.parametrize("ball", [L2, Linf])


@balls
@settings(deadline=None)
@given(x=vectors, radius=radii)
def test_projections_lie_in_the_ball_and_are_idempotent(ball, x, radius):
    projected = ball(radius).project(x)
    slack = x[0].size * (4 * ULP * radius + SUBNORMAL)
    assert np.all(ball(radius).norm(projected) <= radius + slack)
    np.testing.assert_allclose(
        ball(radius).project(projected), projected, rtol=8 * ULP, atol=SUBNORMAL
    )


@balls
@settings(deadline=None)
@given(x=vectors, radius=radii, seed=st.integers(0, 99))
def test_no_sampled_point_of_the_ball_is_nearer_than_the_projection(ball, x, radius, seed):
    point = np.random.default_rng(seed).uniform(-1, 1, x.shape)
    size = ball(0.0).norm(point).reshape(-1, 1, 1)
    point *= radius / np.where(size > 0, size, 1)
    best, other = L2(0).norm(x - ball(radius).project(x)), L2(0).norm(x - point)
    assert np.all(best <= other * (1 + 16 * ULP) + 16 * ULP * (1 + radius + L2(0).norm(x)))


@balls
@settings(deadline=None)
@given(g=vectors, radius=st.floats(1e-3, 1e3))
def test_the_maximizer_attains_the_dual_norm_inside_the_ball(ball, g, radius):
    v = ball(radius).maximizer(g)
    slack = 8 * g[0].size * ULP
    assert np.all(ball(radius).norm(v) <= radius * (1 + slack))
    attained = np.sum(g * v, axis=(1, 2))
    np.testing.assert_allclose(
        attained, radius * ball(radius).dual_norm(g), rtol=slack, atol=1e-300
    )


@balls
@pytest.mark.parametrize("power", [-1074, -1039, -600, 0, 900])
def test_gradients_of_any_size_point_the_same_way(ball, power):
    g = np.ldexp(np.array([[[1.0, 1.0, -2.0]]]), power)
    v = ball(1.0).maximizer(g)
    np.testing.assert_allclose(v, ball(1.0).maximizer([[[1.0, 1.0, -2.0]]]), rtol=4 * ULP)
    assert np.array_equal(ball(1.0).maximizer(np.zeros((2, 3))), np.zeros((2, 3)))


def test_norms_are_those_of_numpy_and_per_sample():
    x = np.random.default_rng(0).normal(size=(5, 3, 2))
    rows = x.reshape(5, -1)
    np.testing.assert_allclose(L2(1).norm(x), np.linalg.norm(rows, axis=1), rtol=8 * ULP)
    assert np.array_equal(Linf(1).norm(x), np.abs(rows).max(axis=1))
    np.testing.assert_allclose(Linf(1).dual_norm(x), np.abs(rows).sum(axis=1), rtol=8 * ULP)


def test_norms_of_huge_and_tiny_vectors_neither_overflow_nor_vanish():
    assert L2(1).norm([[3e200, 4e200]])[0] == pytest.approx(5e200, rel=8 * ULP)
    assert L2(1).norm([[3e-200, 4e-200]])[0] == pytest.approx(5e-200, rel=8 * ULP)
    assert L2(1).norm([[0.0, 0.0]])[0] == 0
    assert L2(1).norm([[np.inf, 1.0]])[0] == np.inf
    assert np.isnan(L2(1).norm([[np.nan, 1.0]])[0])


def test_dual_orders_are_conjugate():
    for ball in (L2, Linf):
        inverse = sum(0 if p == math.inf else 1 / p for p in (ball.order, ball.dual))
        assert inverse == 1


@balls
def test_each_sample_can_have_its_own_radius(ball):
    x = np.array([[3.0, 4.0], [3.0, 4.0]])
    projected = ball([1.0, 10.0]).project(x)
    assert ball(0).norm(projected[:1])[0] == pytest.approx(1.0, rel=8 * ULP)
    assert np.array_equal(projected[1], x[1])
    with pytest.raises(ValueError, match="one entry per sample, 3"):
        ball([1.0, 2.0]).per_sample(3)


@balls
@pytest.mark.parametrize("radius", [-1.0, math.nan, math.inf, [0.1, -0.1], [[1.0]]])
def test_impossible_radii_are_refused(ball, radius):
    with pytest.raises(ValueError, match="Received"):
        ball(radius)


@balls
def test_radii_that_are_no_numbers_are_refused(ball):
    for radius in ("large", None, object()):
        with pytest.raises((TypeError, ValueError), match="Received"):
            ball(radius)


def test_a_ball_without_a_norm_cannot_be_made():
    with pytest.raises(TypeError, match="no norm"):
        Ball(1.0)


def test_balls_are_values():
    assert L2(0.5) == L2(0.5) and L2(0.5) != Linf(0.5) and L2(0.5) != L2(0.6)
    assert hash(L2([1, 2])) == hash(L2([1.0, 2.0])) and repr(Linf(0.25)) == "Linf(0.25)"
    assert L2([1.0, 2.0]).scaled(2) == L2([2.0, 4.0])
    with pytest.raises(AttributeError):
        L2(0.5).radius = 1.0
    radii = np.array([1.0, 2.0])
    ball = L2(radii)
    radii[0] = 7
    assert ball.radius[0] == 1
    with pytest.raises(ValueError):
        ball.radius[0] = 7
