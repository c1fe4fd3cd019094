"""(L) is a bound for every g and λ, is attained, and has CROWN and SDP-CROWN as special cases."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tf_lyapunov.local.pieces import Columns, pieces
from tf_lyapunov.local.relaxation import Elementwise, Multipliers
from tf_lyapunov.program.families import elementwise
from tf_lyapunov.theory.activations import supported_activations

NAMES = sorted(n for n in elementwise.FUNCTIONS if n in supported_activations() or n == "abs")


def operation(name, **parameters):
    return elementwise.named(name, parameters, None)


def relaxation(op, center, low, high, radius=np.inf, weights=None):
    arrays = (np.asarray(v, np.float64)[None] for v in (center, low, high))
    return Elementwise(op, *arrays, radius, weights)


def given(step, share, lam):
    rows = len(share)
    log = np.full(rows, -np.inf) if lam == 0 else np.full(rows, np.log(lam))
    return Multipliers(np.array(share), log, step.columns)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_hold_the_function_and_its_slopes(name):
    op, rng = operation(name), np.random.default_rng(0)
    center, width = 3 * rng.normal(size=200), np.exp(rng.uniform(-6, 3, size=200))
    low, high = center - width * rng.random(200), center + width * rng.random(200)
    found = pieces(op, low[None], high[None], Columns(np.arange(200), (200,)))
    t = np.clip(low + (high - low) * np.linspace(0, 1, 301)[:, None], low, high)
    value = elementwise.FUNCTIONS[name](t, **dict(op.parameters))
    bottom, top = found.range()
    assert np.all(value >= bottom[0] - 1e-12) and np.all(value <= top[0] + 1e-12)
    covered = np.zeros(t.shape, bool)
    for k in range(len(found.slope)):
        inside = (t >= found.start[k]) & (t <= found.stop[k])
        line = found.slope[k] * t + found.intercept[k]
        assert np.all((np.abs(value - line) <= found.error[k] + 1e-12)[inside])
        covered |= inside
    assert covered.all()
    least, most = found.slopes()
    slope = np.diff(value, axis=0) / np.diff(t, axis=0)
    noise = 1e-13 * (1 + np.abs(value[1:]) + np.abs(t[1:])) / np.diff(t, axis=0)
    assert np.all(slope >= least[0] - noise) and np.all(slope <= most[0] + noise)
    # Both sides: on the narrow half of the intervals the pieces are close to the function.
    narrow = width < np.median(width)
    assert np.max(found.error[..., narrow]) < 0.05


@hypothesis.given(st.integers(0, 10**6), st.sampled_from(NAMES))
@hypothesis.settings(max_examples=60)
def test_no_point_of_ball_and_box_lies_below(seed, name):
    rng = np.random.default_rng(seed)
    n, op = 5, operation(name)
    center = rng.normal(size=n)
    low, high = center - 2 * rng.random(n), center + 2 * rng.random(n)
    radius, weights = 2 * rng.random(), rng.random(n)
    step = relaxation(op, center, low, high, radius, weights)
    c = rng.normal(size=(3, n))
    share = rng.normal(size=(3, len(step.columns)))
    lam = float(np.exp(rng.normal())) if rng.random() < 0.7 else 0.0
    multipliers = given(step, share, lam)
    g, h, _ = step.backward(c, multipliers)
    slack = 1e-13 * step.slack(c, g, multipliers)
    z = low + (high - low) * rng.random((3000, n))
    away = np.sqrt(np.sum(weights * (z - center) ** 2, axis=1))
    z = center + (z - center) * np.minimum(1, radius / np.maximum(away, 1e-300))[:, None]
    value = elementwise.FUNCTIONS[op.name](z, **dict(op.parameters)) @ c.T - z @ g.T
    assert np.all(value >= (h - slack)[None])


@pytest.mark.parametrize("name", ["relu", "abs", "hard_tanh", "soft_shrink", "relu6"])
def test_the_minimum_of_one_unit_is_attained(name):
    rng, op = np.random.default_rng(1), operation(name)
    for _ in range(50):
        center, c = rng.normal(), rng.normal()
        low, high = center - 3 * rng.random(), center + 3 * rng.random()
        step = relaxation(op, [center], [low], [high], 1.0)
        if not len(step.columns):
            continue
        lam, share = np.exp(rng.normal()), rng.normal()
        _, h, _ = step.backward(np.array([[c]]), given(step, [[share]], lam))
        t = np.linspace(low, high, 200001)
        phi = elementwise.FUNCTIONS[op.name](t, **dict(op.parameters))
        value = c * phi - share * c * t + lam / 2 * (t - center) ** 2
        # The grid misses the minimum by half a cell times the steepest slope.
        steepest = abs(c) * (1 + abs(share)) + lam * (high - low)
        assert -1e-12 <= value.min() - (h[0] + lam / 2) <= steepest * (t[1] - t[0])


def test_sdp_crown_is_the_case_without_a_box():
    """Theorem 4.1 of Chiu et al. (2025): c, g, λ and ρ give its offset."""
    rng, n = np.random.default_rng(0), 6
    center, radius = rng.normal(size=n), 1.3
    step = relaxation(operation("relu"), center, np.full(n, -1e3), np.full(n, 1e3), radius)
    c, share = rng.normal(size=(1, n)), rng.random((1, n))
    lam = 0.7
    g, h, _ = step.backward(c, given(step, share, lam))
    inner = np.minimum(np.minimum(c - g - lam * center, g + lam * center), 0)
    theirs = -0.5 * (lam * (radius**2 - center @ center) + np.sum(inner**2) / lam)
    assert h[0] == pytest.approx(theirs, rel=1e-12)


def test_crown_is_the_case_without_a_ball():
    low, high = np.array([-1.0, -3.0, -2.0, 0.5]), np.array([2.0, 1.0, -1.0, 1.0])
    step = relaxation(operation("relu"), (low + high) / 2, low, high)
    c = np.array([[-1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    g, h, _ = step.backward(c, step.start(c))
    assert np.allclose(g[0], [-2 / 3, -1 / 4, 0, -1]) and h[0] == pytest.approx(-2 / 3 - 3 / 4)
    assert np.allclose(g[1], [1, 0, 0, 1]) and h[1] == 0


def test_derivatives_are_those_of_differences():
    rng, n = np.random.default_rng(0), 7
    center = rng.normal(size=n)
    step = relaxation(operation("relu"), center, center - 1.5, center + 1.5, 1.0)
    c, share = rng.normal(size=(1, n)), rng.random((1, len(step.columns)))
    weight = rng.normal(size=n)

    def value(c, share, log):
        m = Multipliers(share, np.array([log]), step.columns)
        g, h, _ = step.backward(c, m)
        return float(h[0] + g[0] @ weight)

    multipliers = Multipliers(share, np.array([-0.5]), step.columns)
    _, _, memory = step.backward(c, multipliers)
    by_c, by_share, by_log = step.forward(weight[None], memory)
    d = 1e-6
    for i in range(n):
        e = np.eye(n)[i : i + 1] * d
        slope = (value(c + e, share, -0.5) - value(c - e, share, -0.5)) / (2 * d)
        assert by_c[0, i] == pytest.approx(slope, abs=1e-5)
    for i in range(len(step.columns)):
        e = np.eye(len(step.columns))[i : i + 1] * d
        slope = (value(c, share + e, -0.5) - value(c, share - e, -0.5)) / (2 * d)
        assert by_share[0, i] == pytest.approx(slope, abs=1e-5)
    slope = (value(c, share, -0.5 + d) - value(c, share, -0.5 - d)) / (2 * d)
    assert by_log[0] == pytest.approx(slope, abs=1e-5)
