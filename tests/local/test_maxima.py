"""Maxima: (M) is a bound for every α, attained at its start, and derivatives are right."""

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


@pytest.mark.parametrize(("pool", "shape"), POOLS)
def test_no_point_of_the_box_lies_below(pool, shape):
    rng = np.random.default_rng(1)
    low = rng.normal(size=(1, *shape))
    high = low + 2 * rng.random(size=(1, *shape))
    step = WindowMaximum(pool, (low + high) / 2, low, high)
    c = rng.normal(size=(4, *step.out))
    multipliers = step.start(c)
    multipliers.share = 1.5 * rng.random(multipliers.share.shape)
    for tried in (step.start(c), multipliers):
        g, h, _ = step.backward(c, tried)
        share = rng.random(size=(3000, *shape))
        z = low + (high - low) * np.where(share < 0.3, 0, np.where(share > 0.7, 1, share))
        value = pool._pool(z, "max").reshape(3000, -1) @ c.reshape(4, -1).T
        value = value - z.reshape(3000, -1) @ g.reshape(4, -1).T
        assert np.all(value >= h - 1e-12)
    # Both parts of (M) are attained by one window alone: the bound is the minimum itself.
    one = np.zeros((1, int(np.prod(step.out))))
    one[0, step.columns[0]] = -1.0
    g, h, _ = step.backward(one.reshape(1, *step.out), step.start(one))
    cell, second = step.above[step.columns[0]], step.second[step.columns[0]]
    alpha = -g.reshape(-1)[cell]
    worst = max((1 - alpha) * high.ravel()[cell], second - alpha * low.ravel()[cell])
    assert h[0] == pytest.approx(-worst)


def test_a_dominant_cell_makes_the_maximum_exact():
    pool = Pooled("max", (2,), (2,), "valid", False)
    low, high = np.array([[[3.0], [0.0]]]), np.array([[[4.0], [2.0]]])
    step = WindowMaximum(pool, low, low, high)
    assert not len(step.columns)
    for sign in (1.0, -1.0):
        c = np.full((1, 1, 1), sign)
        g, h, _ = step.backward(c, step.start(c))
        assert g.ravel().tolist() == [sign, 0.0] and h[0] == 0


def test_derivatives_are_those_of_differences():
    pool, shape = POOLS[1]
    rng = np.random.default_rng(2)
    low = rng.normal(size=(1, *shape))
    high = low + 2 * rng.random(size=(1, *shape))
    step = WindowMaximum(pool, low, low, high)
    c, y = rng.normal(size=(1, *step.out)), rng.normal(size=(1, *shape))
    multipliers = step.start(c)
    multipliers.share = rng.random(multipliers.share.shape)

    def value(c, share):
        held = step.start(c)
        held.share = share
        g, h, _ = step.backward(c, held)
        return float(h[0] + np.sum(g * y))

    _, _, memory = step.backward(c, multipliers)
    by_c, by_share, _ = step.forward(y, memory)
    d = 1e-6
    for i in np.ndindex(*c.shape):
        e = np.zeros(c.shape)
        e[i] = d
        slope = value(c + e, multipliers.share) - value(c - e, multipliers.share)
        assert by_c[i] == pytest.approx(slope / (2 * d), abs=1e-5)
    for i in range(multipliers.share.shape[1]):
        e = np.zeros(multipliers.share.shape)
        e[0, i] = d
        slope = value(c, multipliers.share + e) - value(c, multipliers.share - e)
        assert by_share[0, i] == pytest.approx(slope / (2 * d), abs=1e-5)
