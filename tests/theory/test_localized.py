"""Distances between opposite classes, counted exactly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.theory import localized
from tf_lyapunov.theory.localized import compatibility_thresholds, pair_statistics


def brute_force(x, y, norm):
    """All distances of opposite-class pairs (i < j), and the matrix with infinity elsewhere."""
    difference = x[:, None, :] - x[None, :, :]
    if norm == 2:
        distance = np.sqrt(np.einsum("ijk,ijk->ij", difference, difference))
    else:
        distance = np.abs(difference).max(axis=2)
    opposite = y[:, None] != y[None, :]
    full = np.where(opposite, distance, np.inf)
    return full[np.triu(opposite, 1)], full


@pytest.mark.parametrize("norm", [2, math.inf])
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), classes=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_counts_equal_brute_force_to_the_last_pair(norm, seed, n, classes):
    rng = np.random.default_rng(seed)
    # Few levels per coordinate: many equal distances, some of them 0.
    x = rng.integers(0, 4, size=(n, 3)) / 3.0
    y = np.concatenate([[0, 1], rng.integers(0, classes, n - 2)])
    distances, full = brute_force(x, y, norm)
    limits = np.unique(np.concatenate([distances[distances > 0][:5], [0.1, 0.5, 1.0, 9.0]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localized, "_BLOCK", 7)
        patch.setattr(localized, "_FIRST_COORDINATES", 1)
        found = pair_statistics(x, y, limits, norm=norm)
    assert found.closer.tolist() == [int(np.sum(distances < t)) for t in limits]
    assert found.opposite_pairs == len(distances) and found.pairs == n * (n - 1) // 2
    assert found.duplicates == int(np.sum(distances == 0))
    assert np.array_equal(found.nearest, full.min(axis=1))
    assert np.array_equal(full[np.arange(n), found.nearest_index], found.nearest)


@pytest.mark.parametrize("norm", [2, math.inf])
def test_two_thousand_images_agree_with_brute_force(norm):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 10, 2000)
    base = rng.uniform(size=(10, 40))
    x = np.round(255 * np.clip(base[y] + 0.3 * rng.normal(size=(2000, 40)), 0, 1)) / 255
    full = np.full((2000, 2000), np.inf)
    for i in range(2000):
        row = x[i] - x
        own = np.sqrt(np.einsum("jk,jk->j", row, row)) if norm == 2 else np.abs(row).max(axis=1)
        full[i] = np.where(y != y[i], own, np.inf)
    distances = full[np.triu(np.isfinite(full), 1)]
    limits = np.concatenate([np.quantile(distances, [0.001, 0.1, 0.5, 0.9]), distances[:20]])
    found = pair_statistics(x, y, limits, norm=norm)
    assert found.closer.tolist() == [int(np.sum(distances < t)) for t in np.unique(limits)]
    assert np.array_equal(found.nearest, full.min(axis=1))


def test_an_offset_far_larger_than_the_distances_does_not_spoil_the_count():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 50, size=(200, 4)) + 2.0**40, rng.integers(0, 2, 200)
    far, near = (pair_statistics(v, y, [10.0, 20.0]) for v in (x, x - 2.0**40))
    assert np.array_equal(far.closer, near.closer) and np.array_equal(far.nearest, near.nearest)


def test_shares_follow_the_one_hot_distance():
    found = pair_statistics(
        [[0.0], [0.5], [2.0]], [0, 1, 1], compatibility_thresholds([1.0, 4.0], [0.3, 0.6])
    )
    # sqrt(2)/1 > 0.5 but < 2; sqrt(2)/4 < 0.5
    assert found.incompatible_share([1.0, 4.0]).tolist() == [0.5, 0.0]
    assert found.incompatible_share(1.0, within=0.6, of="all") == pytest.approx(1 / 3)
    assert found.incompatible_share(1.0, within=0.3) == 0.0
    with pytest.raises(ValueError, match="were not counted"):
        found.incompatible_share(3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [1, 1]}, "at least two"),
        ({"x": [[np.nan], [0.0]]}, "finite"),
        ({"y": [0]}, "one sample per label"),
        ({"y": [0.5, 1.0]}, "class numbers"),
        ({"thresholds": [0.0]}, "positive"),
        ({"thresholds": []}, "positive"),
        ({"norm": 1}, "2 or math.inf"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": [[0.0], [1.0]], "y": [0, 1], "thresholds": [1.0], "norm": 2, **change}
    with pytest.raises(ValueError, match=message):
        pair_statistics(
            arguments["x"], arguments["y"], arguments["thresholds"], norm=arguments["norm"]
        )
