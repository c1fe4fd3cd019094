"""Softmax, normalisations, 2-norms: (T) is a bound for all shares, of second order, with its
derivatives."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.local.curved import Curved
from tf_lyapunov.local.lines import curved_lines
from tf_lyapunov.local.relaxed import curve_of
from tf_lyapunov.local.softmax import softmax_range
from tf_lyapunov.program.families.normalizing import Normalized
from tf_lyapunov.program.families.norms import WindowNorm
from tf_lyapunov.program.families.products import by_entry, by_letters
from tf_lyapunov.program.families.softmax import Softmax
from tf_lyapunov.program.operation import EXACT, Signal

RNG = np.random.default_rng(0)
ONE, ZERO = np.ones((1, 1)), np.zeros((1, 1))
STEPS = {
    "softmax": (Softmax((1,)), (5,)),
    "softmax of an inner axis": (Softmax((1,)), (4, 3)),
    "log-softmax": (Softmax((2,), True), (2, 4)),
    "layer": (Normalized((1,), None, RNG.normal(size=6), RNG.normal(size=6), 1e-3, True), (6,)),
    "rms": (Normalized((2,), None, ONE, ZERO, 1e-6, False), (2, 3)),
    "group": (
        Normalized((1, 3), (2, 2, 2), RNG.normal(size=(1, 2, 2)), np.zeros((1, 1, 1)), 0.1, True),
        (2, 4),
    ),
    "norms": (WindowNorm(2.0, 0.7, (2, 2), (1, 1), "same", False), (3, 3, 2)),
    "norm of all": (WindowNorm(2.0, 1.0, None, None, "valid", True), (2, 3, 3)),
    "product": (by_entry([(4,), (4,)]), (8,)),
    "gates": (by_entry([(3, 2), (1, 2)]), (8,)),
    "matrices": (by_letters([(2, 3), (3, 2)], "ik", "kj", "ij"), (12,)),
    "heads": (by_letters([(2, 2, 3), (3, 2, 2)], "igk", "kgj", "jgi"), (24,)),
}
CASES = pytest.mark.parametrize(("operation", "shape"), STEPS.values(), ids=STEPS)


def value(operation, z):
    found = operation.forward([Signal(z)], EXACT).value
    return found.reshape(len(z), -1)


def box_of(shape, rng, width, place=2.0):
    low = place * rng.normal(size=(1, *shape))
    high = low + width * rng.random((1, *shape))
    return low + (high - low) * rng.random((1, *shape)), low, high


def points(center, low, high, radius, rng, count=600):
    """Of the box, its corners among them, drawn towards the centre into the ball."""
    share = np.clip(rng.normal(0.5, 0.8, size=(count, *center.shape[1:])), 0.0, 1.0)
    away = (low + (high - low) * share - center).reshape(count, -1)
    size = np.linalg.norm(away, axis=1)
    away *= np.minimum(radius / np.maximum(size, 1e-300), 1.0)[:, None] * (1 - 1e-12)
    return center + away.reshape(count, *center.shape[1:])


@CASES
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-6.0, 1.3),
    place=st.sampled_from([0.0, 1.0, 30.0]),
    ball=st.sampled_from([np.inf, 1.0, 0.2]),
)
def test_no_point_of_the_box_and_the_ball_lies_below(operation, shape, seed, exponent, place, ball):
    rng, width = np.random.default_rng(seed), 10.0**exponent
    center, low, high = box_of(shape, rng, width, place)
    radius = width * ball
    step = Curved(operation, center, low, high, radius)
    z = points(center, low, high, radius, rng)
    y, flat = value(operation, z), z.reshape(len(z), -1)
    c = rng.normal(size=(4, *step.out))
    rows = c.reshape(4, -1)
    for size in (None, 0.0, 1.0, 3.0):
        held = step.start(c)
        if size is not None:
            held.share = size * rng.normal(size=held.share.shape)
        g, h, _ = step.backward(c, held)
        room = 1e-13 * step.slack(c, g, held)
        assert np.all(y @ rows.T - flat @ g.reshape(4, -1).T >= h - room)
    ends = [v.reshape(-1) for v in step.range()]
    room = 1e-13 * (1 + np.abs(y))
    assert np.all(ends[0] - room <= y) and np.all(y <= ends[1] + room)
    # How far the outputs move, linearised and as a whole.
    moved = value(operation, z) - value(operation, center)
    away = flat - center.reshape(-1)
    mean = step.mean_back(np.eye(moved.shape[1])) @ away.T
    spread = step.spread()
    whole = np.sum((moved - mean.T) ** 2 / np.maximum(spread, 1e-300), axis=1)
    most = away**2 @ step.spread_back(spread)
    noise = 1e-12 * (1 + np.abs(y).max()) ** 2 / np.maximum(spread.min(), 1e-12)
    assert np.all(whole <= most * (1 + 1e-9) + noise)
    far = np.linalg.norm(away, axis=1)
    assert np.all(np.linalg.norm(moved, axis=1) <= step.gain * far * (1 + 1e-9) + 1e-11 * far.max())


@CASES
def test_what_is_lost_vanishes_with_the_square_of_the_radius(operation, shape):
    rng = np.random.default_rng(3)
    # Away from the corner of a norm.
    center = rng.choice([-1.0, 1.0], (1, *shape)) * (0.5 + rng.random((1, *shape)))
    c = rng.normal(size=(5, *Curved(operation, center, center, center).out))
    lost = []
    for radius in (1e-2, 1e-3):
        step = Curved(operation, center, center - radius, center + radius, radius)
        held = step.start(c)
        assert np.all(held.share == 1.0)
        g, h, _ = step.backward(c, held)
        at = h + g.reshape(5, -1) @ center.reshape(-1)
        lost.append(value(operation, center)[0] @ c.reshape(5, -1).T - at)
        # The ball counts: all entries may not be at their ends at once.
        alone = Curved(operation, center, center - radius, center + radius)
        assert np.all(alone.backward(c, held)[1] <= h)
    # Rows that bend up lose nothing but rounding.
    assert np.all(lost[0] > 0) and np.all(lost[1] > 0)
    assert np.all(lost[1] <= 0.012 * lost[0] + 1e-10) and np.any(lost[0] > 1e-6)


@CASES
def test_second_order_terms_are_not_far_from_the_largest_on_the_ball(operation, shape):
    rng = np.random.default_rng(4)
    center, radius = rng.normal(size=(1, *shape)), 1e-2
    step = Curved(operation, center, center - radius, center + radius, radius)
    c = rng.normal(size=(20, *step.out))
    g, h, _ = step.backward(c, step.start(c))
    away = rng.normal(size=(4000, center.size))
    away *= radius / np.linalg.norm(away, axis=1, keepdims=True)
    z = center + away.reshape(-1, *shape)
    gap = value(operation, z) @ c.reshape(20, -1).T - z.reshape(4000, -1) @ g.reshape(20, -1).T
    middle = value(operation, center)[0] @ c.reshape(20, -1).T - g.reshape(20, -1) @ center.reshape(
        -1
    )
    needed, lost = middle - gap.min(axis=0), middle - h
    assert np.all(lost >= needed)
    # Of those rows that bend down at all.
    assert np.median(lost / np.maximum(needed, 1e-2 * lost)) < 12


@CASES
@pytest.mark.parametrize("radius", [np.inf, 0.3])
def test_derivatives_are_those_of_differences(operation, shape, radius):
    rng = np.random.default_rng(5)
    step = Curved(operation, *box_of(shape, rng, 0.6), radius)
    c, y = rng.normal(size=(1, *step.out)), rng.normal(size=(1, *shape))
    held = step.start(c)
    held.share = 0.3 + rng.random(held.share.shape)
    _, _, memory = step.backward(c, held)
    by_c, by_share, _ = step.forward(y, memory)

    def found(c, share):
        own = step.start(c)
        own.share = share
        g, h, _ = step.backward(c, own, record=False)
        return float(h[0] + np.sum(g * y))

    d = 1e-6
    for i in range(c.size):
        e = np.zeros(c.size)
        e[i] = d
        moved = e.reshape(c.shape)
        slope = (found(c + moved, held.share) - found(c - moved, held.share)) / (2 * d)
        assert by_c.ravel()[i] == pytest.approx(slope, abs=1e-5)
        slope = (found(c, held.share + e) - found(c, held.share - e)) / (2 * d)
        assert by_share.ravel()[i] == pytest.approx(slope, abs=1e-5)


@CASES
def test_lines_of_many_boxes_enclose_the_function(operation, shape):
    rng = np.random.default_rng(6)
    low = rng.normal(size=(6, int(np.prod(shape))))
    high = low + 10.0 ** rng.uniform(-4, 1, (6, 1)) * rng.random(low.shape)
    lines = curved_lines(operation, shape, low, high)
    outputs = lines.curve.value.shape[1]
    c = rng.normal(size=(12, outputs))
    domain = np.arange(12) % 6
    (g,), shift = lines.through(c, domain)
    for i, k in enumerate(domain):
        share = np.clip(rng.normal(0.5, 0.8, size=(400, low.shape[1])), 0.0, 1.0)
        z = low[k] + (high[k] - low[k]) * share
        least = np.min(value(operation, z.reshape(-1, *shape)) @ c[i] - z @ g[i])
        assert shift[i] <= least + 1e-11
    # Slopes on narrow boxes, of every centre within the box.
    assert np.any(lines.use)
    eye = np.eye(outputs)
    whole = curve_of(operation, shape, low[:1], low[:1], high[:1])
    for t in (0.0, 0.5, 1.0):
        at = low[:1] + t * (high[:1] - low[:1])
        slopes = curve_of(operation, shape, at, at, at).pull(eye, None)
        sizes = rng.random(low.shape[1])
        assert np.all(np.abs(slopes) @ sizes <= whole.magnified(sizes) * (1 + 1e-9) + 1e-12)


@CASES
def test_a_point_is_exact_and_has_nothing_to_choose(operation, shape):
    center = np.random.default_rng(7).normal(size=(1, *shape))
    step = Curved(operation, center, center, center, 0.0)
    assert not len(step.units)
    c = np.random.default_rng(8).normal(size=(3, *step.out))
    g, h, _ = step.backward(c, step.start(c))
    exact = value(operation, center)[0] @ c.reshape(3, -1).T
    assert h + g.reshape(3, -1) @ center.reshape(-1) == pytest.approx(exact, abs=1e-9)


@CASES
@pytest.mark.parametrize("size", [1e-160, 1e-30, 1e30, 1e120])
def test_tiny_and_huge_numbers_stay_bounded_from_below(operation, shape, size):
    rng = np.random.default_rng(9)
    center, low, high = (size * v for v in box_of(shape, rng, 1.0))
    step = Curved(operation, center, low, high, size)
    c = rng.normal(size=(3, *step.out))
    z = points(center, low, high, size, rng)
    held = step.start(c)
    g, h, _ = step.backward(c, held)
    gap = value(operation, z) @ c.reshape(3, -1).T - z.reshape(len(z), -1) @ g.reshape(3, -1).T
    room = 1e-13 * step.slack(c, g, held)
    ok = np.isfinite(h)
    assert np.all((gap >= h - room)[:, ok])
    low_y, high_y = (v.reshape(-1) for v in step.range())
    y = value(operation, z)
    room = 1e-12 * (1 + np.abs(y))
    assert np.all(low_y <= y + room) and np.all(y <= high_y + room)
    # A range is one even where slopes are lost to overflow.
    assert np.all(np.isfinite(low_y)) and np.all(np.isfinite(high_y))


def test_the_mean_of_a_normalised_input_may_be_far_from_it():
    operation = STEPS["layer"][0]
    rng = np.random.default_rng(10)
    center = 1e7 + rng.normal(size=(1, 6))
    step = Curved(operation, center, center - 0.1, center + 0.1, 0.1)
    c = rng.normal(size=(4, 6))
    g, h, _ = step.backward(c, step.start(c))
    z = points(center, center - 0.1, center + 0.1, 0.1, rng)
    # Differences from the mean, exactly: integers and their fractions below 2⁻²⁴ are few.
    exact = (z - 1e7) - (z - 1e7).mean(axis=1, keepdims=True)
    s = np.sqrt((exact**2).mean(axis=1, keepdims=True) + operation.epsilon)
    y = operation.gamma * exact / s + operation.beta
    gap = y @ c.T - ((z - 1e7) @ g.T + 1e7 * g.sum(axis=1)) - h
    assert np.all(gap >= -1e-7 * np.abs(g).sum())


def test_balls_of_normalisations_shrink_by_the_deviation_not_by_epsilon():
    operation = Normalized((1,), None, np.ones(8), np.zeros(8), 1e-6, True)
    center = np.linspace(-1.0, 1.0, 8)[None]
    step = Curved(operation, center, center - 0.1, center + 0.1, 0.1)
    deviation = float(np.std(center))
    # Slopes are 1/s at most, and are attained.
    assert 1 / deviation <= step.gain <= 1 / (deviation - 0.1 / np.sqrt(8)) * (1 + 1e-6)


@pytest.mark.parametrize("logarithm", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 4e3])
def test_ranges_of_softmax_hold_where_logits_are_far_apart(logarithm, scale):
    """Terms that underflow beside another entry's upper end may decide all the same."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=(200, 4)) * scale
    high = low + np.abs(rng.normal(size=low.shape)) * scale
    least, most = softmax_range(Softmax((1,), logarithm=logarithm), low, high)
    for trial in range(20):
        at = rng.integers(0, 2, low.shape) if trial else rng.uniform(size=low.shape)
        z = low + (high - low) * at
        rest = z - z.max(axis=1, keepdims=True)
        value = rest - np.log(np.exp(rest).sum(axis=1, keepdims=True))
        value = value if logarithm else np.exp(value)
        room = 2.0**-45 * (1 + np.abs(z).max()) * (1 + np.abs(value) if logarithm else value)
        assert np.all(value >= least - room) and np.all(value <= most + room)
    alone = np.where(np.eye(4, dtype=bool), high[:, None], low[:, None])
    rest = alone - alone.max(axis=2, keepdims=True)
    value = rest - np.log(np.exp(rest).sum(axis=2, keepdims=True))
    reached = np.einsum("nii->ni", value if logarithm else np.exp(value))
    np.testing.assert_allclose(most, reached, rtol=1e-9, atol=2.0**-40 * (1 + 4 * scale))


def test_ranges_of_log_softmax_hold_where_probabilities_underflow():
    for gap in (743.5, 744.2, 745.0, 760.0):
        center = np.array([[0.0, -gap]])
        step = Curved(Softmax((1,), True), center, center - 200.0, center + 200.0, 200.0)
        # The ball reaches √2·200 in the difference of two entries.
        z = center + 200.0 * np.sqrt(0.5) * np.array([[1.0, -1.0], [-1.0, 1.0]]) * (1 - 1e-12)
        low, high = step.range()
        y = value(step.operation, z)
        assert np.all(low <= y) and np.all(y <= high)


@pytest.mark.parametrize("size", [1e-139, 1e-156, 1e-170, 1e-250])
def test_norms_of_entries_whose_squares_underflow_are_bounded(size):
    zero = np.zeros((1, 1, 1, 1))
    operation = WindowNorm(2.0, 1.0, None, None, "valid", False)
    step = Curved(operation, zero, zero - size, zero + size, size)
    held = step.start(-np.ones((1, 1)))
    held.share[:] = 1.0
    _, h, _ = step.backward(-np.ones((1, 1)), held)
    assert -size * (1 + 1e-8) <= h[0] <= -size * (1 - 1e-12)


def test_slopes_of_normalizations_hold_where_the_mean_takes_all_digits():
    rng = np.random.default_rng(8)
    for n in (2, 3, 5):
        operation = Normalized((1,), None, np.ones(n), np.zeros(n), 1e-12, True)
        for place in (7.3e14, 2.0**50 + 1, 1e16):
            # Computed means miss entries that are nearly all equal by a few of their units.
            center = place + np.spacing(place) * rng.integers(-1, 2, size=(1, n))
            step = Curved(operation, center, center, center, 1e-9)
            whole = [int(v) for v in center[0]]
            z = np.array([n * v - sum(whole) for v in whole]) / n
            s = np.sqrt(np.mean(z * z) + 1e-12)
            exact = (np.eye(n) - 1 / n - np.outer(z, z) / (n * s * s)) / s
            error = np.linalg.norm(step.mean_back(np.eye(n)) - exact, 2)
            assert error <= step.spread().min()


def test_least_mixtures_lose_their_rounding():
    center = np.array([[0.0, -40.0, -41.0]])
    curve = Curved(Softmax((1,)), center, center - 1, center + 1).curve
    c = np.array([[1.0, 1e30, 3e30], [3e30, 1e30, 1.0]])
    found, point = curve.least(c, None)
    exact = [sum(Fraction(a) * Fraction(p) for a, p in zip(*v, strict=True))
             for v in zip(c, point, strict=True)]  # fmt: skip
    assert all(Fraction(f) <= e for f, e in zip(found, exact, strict=True))
