"""Ranges, slopes and distances of softmax outputs: above every sample, and near the worst."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.local.probabilities import Margins, distance, slope

ORDER = {"l2": 2, "linf": np.inf}


def outputs(margins, head="softmax"):
    """Probabilities of margins (…, k): of the other classes, then of c; of one class its own."""
    if head == "sigmoid":
        return 1 / (1 + np.exp(margins))
    logits = np.concatenate([-margins, np.zeros((*margins.shape[:-1], 1))], axis=-1)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@st.composite
def boxes(draw):
    count = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    middle = rng.normal(size=count) * draw(st.sampled_from([0.1, 1.0, 5.0, 40.0]))
    width = rng.exponential(size=count) * draw(st.sampled_from([1e-6, 0.1, 1.0, 10.0]))
    return rng, middle - width, middle + width


def sampled(rng, low, high, count=400):
    """Points of a box, half of them corners."""
    share = rng.uniform(size=(count, len(low)))
    share[: count // 2] = np.round(share[: count // 2])
    return low + share * (high - low)


def shortened(box, head):
    """`(points, low, high, rng)`, of one margin alone behind a sigmoid."""
    rng, low, high = box
    if head == "sigmoid":
        low, high = low[:1], high[:1]
    return sampled(rng, low, high), low, high, rng


@given(boxes())
@settings(deadline=None)
def test_probabilities_stay_in_their_ranges(box):
    rng, low, high = box
    p = outputs(sampled(rng, low, high))
    least, most = Margins(low, high).probabilities()
    assert np.all(least <= p) and np.all(p <= most)
    assert np.all(1 - p[:, -1] <= Margins(low, high).missing * (1 + 1e-9) + 1e-15)


def test_each_range_is_reached():
    """By the corner that puts the class against all others."""
    low, high = np.array([-1.0, 0.5, 2.0]), np.array([0.5, 1.0, 4.0])
    least, most = Margins(low, high).probabilities()
    # p_k is largest alone against c, which all others are far below.
    assert most[0] == pytest.approx(1 / (1 + np.exp(low[0])))
    for k in range(3):
        corner = low.copy()
        corner[k] = high[k]
        assert outputs(corner)[k] == pytest.approx(least[k], rel=1e-9)
    assert outputs(high)[-1] == pytest.approx(most[-1], rel=1e-9)
    assert outputs(low)[-1] == pytest.approx(least[-1], rel=1e-9)


@given(boxes(), st.sampled_from(["l2", "linf"]), st.sampled_from(["softmax", "sigmoid"]))
@settings(deadline=None, max_examples=200)
def test_no_two_points_are_further_apart(box, norm, head):
    m, low, high, _ = shortened(box, head)
    centre, p = m[0], outputs(m, head)
    found = distance(Margins(low, high), Margins(centre, centre), norm, head)
    assert np.linalg.norm(p - p[0], ORDER[norm], axis=-1).max() <= found
    assert found <= (np.sqrt(2) if norm == "l2" else 1) * (1 + 1e-9)


@given(boxes(), st.sampled_from(["l2", "linf"]), st.sampled_from(["softmax", "sigmoid"]))
@settings(deadline=None, max_examples=200)
def test_no_change_is_steeper(box, norm, head):
    """Changes within the box from one point to others, per unit of what moves the margins."""
    m, low, high, rng = shortened(box, head)
    gains = rng.exponential(size=m.shape[1]) + 0.01
    moved = np.max(np.abs(m[1:] - m[0]) / gains, axis=1)
    change = np.linalg.norm(outputs(m[1:], head) - outputs(m[0], head), ORDER[norm], axis=-1)
    found = slope(Margins(low, high), gains, norm, head)
    # Of samples that differ by more than the rounding of exponentials.
    far = moved > 1e-3
    assert np.all(change[far] <= moved[far] * found + 1e-13)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_competitor_has_its_closed_form(norm):
    factor = np.sqrt(2) if norm == "l2" else 1.0
    near, far = (
        Margins(np.array([-1.0]), np.array([1.0])),
        Margins(np.array([3.0]), np.array([9.0])),
    )
    p = 1 / (1 + np.exp(3.0))
    gains = np.array([2.0])
    assert slope(near, gains, norm, "softmax") == pytest.approx(2 * factor / 4)
    assert slope(far, gains, norm, "softmax") == pytest.approx(2 * factor * p * (1 - p))
    assert slope(far, gains, norm, "sigmoid") == pytest.approx(2 * p * (1 - p))


def test_competitors_share_what_is_missing():
    """Each alone could have all of it; a price on probability finds that not all can."""
    low = np.full(5, 2.0)
    margins, gains = Margins(low, low + 9), np.array([1.0, 1.0, 1.0, 3.0, 3.0])
    u, total = 1 / (1 + np.exp(2.0)), margins.missing
    best = 0.0
    rng = np.random.default_rng(0)
    for _ in range(20000):
        p = rng.uniform(0, u, 5)
        p *= min(1.0, total / p.sum())
        best = max(best, float(np.sum(gains * p * (1 - p))))
    found = slope(margins, gains, "linf", "softmax")
    assert best <= found <= 1.05 * best


def test_a_centre_on_the_boundary_moves_less_than_the_diameter():
    anywhere = Margins(np.array([-np.inf]), np.array([np.inf]))
    even = Margins(np.array([0.0]), np.array([0.0]))
    assert distance(anywhere, even, "l2", "softmax") == pytest.approx(np.sqrt(0.5))
    sure = Margins(np.array([50.0]), np.array([50.0]))
    assert distance(anywhere, sure, "l2", "softmax") == pytest.approx(np.sqrt(2))
    assert distance(anywhere, even, "linf", "sigmoid") == pytest.approx(0.5)
