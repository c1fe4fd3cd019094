"""Maxima: (M) is a bound for all multipliers, the exact one of one window, with its derivatives."""

import numpy as np
import pytest

from tf_lyapunov.local.maxima import WindowMaximum, windows_of
from tf_lyapunov.program.families.pooling import Pooled

POOLS = [
    (Pooled("max", (2, 2), (2, 2), "valid", False), (5, 4, 2)),
    (Pooled("max", (3,), (2,), "same", False), (6, 2)),
    (Pooled("max", (2, 2), (1, 1), "same", True), (2, 3, 3)),
    (Pooled("max", None, None, "valid", False), (3, 2, 2)),
]


@pytest.mark.parametrize(("pool", "shape"), POOLS)
def test_windows_are_those_of_the_pool(pool, shape):
    x = np.random.default_rng(0).normal(size=(1, *shape))
    cells, out = windows_of(pool, shape)
    flat = np.append(x.ravel(), -np.inf)
    assert np.array_equal(flat[cells].max(axis=1).reshape(out), pool._pool(x, "max")[0])


def step_of(pool, shape, rng, radius=np.inf, width=2.0):
    low = rng.normal(size=(1, *shape))
    high = low + width * rng.random(size=(1, *shape))
    center = low + (high - low) * rng.random(size=(1, *shape))
    return WindowMaximum(pool, center, low, high, radius), center, low, high


def drawn(multipliers, rng):
    """Any shares, and any λ."""
    multipliers.share = 1.5 * rng.normal(size=multipliers.share.shape) + 0.5
    multipliers.log_lam = rng.normal(size=multipliers.log_lam.shape)
    return multipliers


@pytest.mark.parametrize("radius", [np.inf, 0.7])
@pytest.mark.parametrize(("pool", "shape"), POOLS)
def test_no_point_of_the_box_and_the_ball_lies_below(pool, shape, radius):
    rng = np.random.default_rng(1)
    step, center, low, high = step_of(pool, shape, rng, radius)
    c = rng.normal(size=(6, *step.out))
    share = rng.random(size=(4000, *shape))
    z = low + (high - low) * np.where(share < 0.3, 0, np.where(share > 0.7, 1, share))
    # All corners around the centre of random subsets, pulled into the ball.
    z = np.where(rng.random(z.shape) < rng.random((4000, *[1] * len(shape))), z, center)
    held = np.zeros(center.size, bool)
    held[step.units] = True
    away = (z - center).reshape(len(z), -1)
    size = np.linalg.norm(away[:, held], axis=1)
    factor = np.minimum(radius / np.maximum(size, 1e-12), 1.0) * (1 - 1e-12)
    away[:, held] *= factor[:, None]
    z = center + away.reshape(z.shape)
    value = pool._pool(z, "max").reshape(len(z), -1) @ c.reshape(6, -1).T
    for tried in (step.start(c), drawn(step.start(c), rng), drawn(step.start(c), rng)):
        g, h, _ = step.backward(c, tried)
        assert np.all(value - z.reshape(len(z), -1) @ g.reshape(6, -1).T >= h - 1e-12)
    low_y, high_y = step.range()
    pools = pool._pool(z, "max")
    assert np.all(low_y <= pools + 1e-12) and np.all(pools <= high_y + 1e-12)


def test_the_bound_of_one_window_is_the_minimum_over_its_box_and_penalty():
    pool = Pooled("max", (3,), (3,), "valid", False)
    rng = np.random.default_rng(4)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 41)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for _ in range(20):
        step, center, low, high = step_of(pool, (3, 1), rng, 0.8, 3.0)
        if not step.active.all():
            continue
        c = -np.ones((1, *step.out))
        held = drawn(step.start(c), rng)
        g, h, _ = step.backward(c, held)
        z = low.ravel() + (high - low).ravel() * grid
        lam = np.exp(held.log_lam[0])
        away = z - center.ravel()
        value = -z.max(axis=1) - z @ g.ravel() + lam / 2 * (away**2).sum(axis=1) - lam * 0.32
        # Below the minimum, for A_k leaves out that cell k is not the largest, but not far below.
        assert h[0] <= value.min() + 1e-9
        assert h[0] >= value.min() - 0.7 * np.ptp(value)
    # Where shares are those of the start and λ = 0, the two meet.
    step, center, low, high = step_of(pool, (3, 1), rng, 0.8, 3.0)
    c = -np.ones((1, *step.out))
    g, h, _ = step.backward(c, step.start(c))
    z = low.ravel() + (high - low).ravel() * grid
    assert h[0] == pytest.approx((-z.max(axis=1) - z @ g.ravel()).min(), abs=1e-9)


def test_the_start_is_the_level_that_is_best_amid_the_box():
    pool = Pooled("max", (4,), (4,), "valid", False)
    rng = np.random.default_rng(7)
    for _ in range(30):
        step, _, low, high = step_of(pool, (4, 1), rng, np.inf, 3.0)
        c = -np.ones((1, *step.out))
        g, h, _ = step.backward(c, step.start(c))
        found = -(h[0] + g.ravel() @ ((low + high) / 2).ravel())
        l, u = low.ravel(), high.ravel()  # noqa: E741
        levels = np.linspace(l.max(), u.max(), 2001)
        share = np.maximum(u - levels[:, None], 0) / (u - l)
        values = levels + np.sum(share * (u - l) / 2, axis=1)
        assert found == pytest.approx(values.min(), abs=1e-3)


def test_balls_make_the_bound_tighter():
    pool = Pooled("max", (2, 2), (2, 2), "valid", False)
    rng = np.random.default_rng(5)
    center = rng.normal(size=(1, 8, 8, 1))
    step = WindowMaximum(pool, center, center - 0.5, center + 0.5, 0.5)
    c = -np.ones((1, *step.out))
    held = step.start(c)
    alone = step.backward(c, held)
    held.log_lam = np.full(1, np.log(6.0))
    joined = step.backward(c, held)
    at = [part[1][0] + part[0].ravel() @ center.ravel() for part in (alone, joined)]
    assert at[1] > 0.6 * at[0] + 0.4 * float(c.sum() * 0 - pool._pool(center, "max").sum())


@pytest.mark.parametrize(("pool", "shape"), POOLS)
def test_blank_multipliers_read_no_more_than_the_number_of_rows(pool, shape):
    rng = np.random.default_rng(6)
    step, *_ = step_of(pool, shape, rng)
    held = step.blank(np.zeros((5, 1)))
    assert held.share.shape == (5, len(step.columns)) and np.all(held.log_lam == -np.inf)
    c = np.abs(rng.normal(size=(5, *step.out)))
    assert np.all(step.backward(c, held)[1] == 0)  # a cell each, for c ≥ 0
    held.adopt(step.start(-c), np.arange(5), np.arange(5))
    assert np.all(held.share == step.start(-c).share)


def test_a_dominant_cell_makes_the_maximum_exact():
    pool = Pooled("max", (2,), (2,), "valid", False)
    low, high = np.array([[[3.0], [0.0]]]), np.array([[[4.0], [2.0]]])
    step = WindowMaximum(pool, low, low, high)
    assert not len(step.columns) and not len(step.units)
    for sign in (1.0, -1.0):
        c = np.full((1, 1, 1), sign)
        g, h, _ = step.backward(c, step.start(c))
        assert g.ravel().tolist() == [sign, 0.0] and h[0] == 0


@pytest.mark.parametrize(("pool", "shape"), POOLS)
def test_maxima_move_like_the_mean_of_candidates_up_to_their_spread(pool, shape):
    rng = np.random.default_rng(3)
    step, center, low, high = step_of(pool, shape, rng, width=5.0)
    z = low + (high - low) * (rng.random(size=(3000, *shape)) < 0.5)
    moved = (pool._pool(z, "max") - pool._pool(center, "max")).reshape(3000, -1)
    away = (z - center).reshape(3000, -1)
    eye = np.eye(moved.shape[1])
    mean = away @ step.mean_back(eye).T
    spread = step.spread()
    norm = np.sqrt(np.stack([away**2 @ step.spread_back(row) for row in eye * (spread > 0)], 1))
    assert np.all(np.abs(moved - mean) <= spread * norm + 1e-12)
    assert np.max(np.abs(moved - mean) / np.maximum(spread * norm, 1e-9)) > 0.4
    # All windows at once, with their weights.
    total = np.sum((spread > 0) * np.where(spread > 0, (moved - mean) ** 2 / np.maximum(spread, 1e-9), 0), 1)  # fmt: skip  # noqa: E501
    assert np.all(total <= away**2 @ step.spread_back(spread) + 1e-9)


@pytest.mark.parametrize("radius", [np.inf, 0.9])
@pytest.mark.parametrize(("pool", "shape"), POOLS[:2])
def test_derivatives_are_those_of_differences(pool, shape, radius):
    rng = np.random.default_rng(2)
    step, *_ = step_of(pool, shape, rng, radius)
    c, y = rng.normal(size=(1, *step.out)), rng.normal(size=(1, *shape))
    multipliers = step.start(c)
    multipliers.share = 0.2 + rng.random(multipliers.share.shape)
    multipliers.log_lam = np.array([0.3])

    def value(c, share, log_lam):
        held = step.start(c)
        held.share, held.log_lam = share, log_lam
        g, h, _ = step.backward(c, held)
        return float(h[0] + np.sum(g * y))

    _, _, memory = step.backward(c, multipliers)
    by_c, by_share, by_lam = step.forward(y, memory)
    d, own = 1e-6, (multipliers.share, multipliers.log_lam)
    for i in np.ndindex(*c.shape):
        e = np.zeros(c.shape)
        e[i] = d
        slope = value(c + e, *own) - value(c - e, *own)
        assert by_c[i] == pytest.approx(slope / (2 * d), abs=1e-5)
    for i in range(multipliers.share.shape[1]):
        e = np.zeros(multipliers.share.shape)
        e[0, i] = d
        slope = value(c, own[0] + e, own[1]) - value(c, own[0] - e, own[1])
        assert by_share[0, i] == pytest.approx(slope / (2 * d), abs=1e-5)
    slope = value(c, own[0], own[1] + d) - value(c, own[0], own[1] - d)
    assert by_lam[0] == pytest.approx(slope / (2 * d), abs=1e-5)


def test_cells_that_do_not_exist_never_are_the_largest():
    pool = Pooled("max", (2,), (2,), "valid", False)
    center = np.array([[[1.0], [5.0]], [[1.0], [0.5]]])
    exists = np.array([[[True], [False]], [[True], [True]]])
    low, high = center - 1, center + 1
    step = WindowMaximum(pool, center, low, high, exists=exists)
    c = -np.ones((2, 1, 1))
    g, h, _ = step.backward(c, step.start(c))
    # The first row's window holds its one cell; the second's both.
    assert g[0].ravel().tolist() == [-1.0, 0.0] and h[0] == 0
    assert g[1].ravel().min() < 0 and h[1] < 0
