"""Tables of incompatible pairs and of ceilings equal brute force."""

import math

import numpy as np
import pytest

from tf_lyapunov.evaluation.incompatibility import (
    ceiling_figure,
    ceiling_rows,
    incompatibility_figure,
    incompatibility_rows,
)
from tf_lyapunov.theory.localized import compatibility_thresholds, pair_statistics

SLOPES, DISTANCES = [1.0, 2.0, 4.0], [0.3, 0.5]


@pytest.fixture(scope="module", params=[2, math.inf])
def found(request):
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 3)), rng.integers(0, 3, 40)
    limits = compatibility_thresholds(SLOPES, DISTANCES, norm=request.param)
    return x, y, pair_statistics(x, y, limits, norm=request.param)


def test_shares_equal_brute_force(found):
    x, y, statistics = found
    distance = np.linalg.norm(x[:, None] - x[None], ord=statistics.norm, axis=2)
    opposite = np.triu(y[:, None] != y[None])
    reach = math.sqrt(2) if statistics.norm == 2 else 1.0
    rows = incompatibility_rows(statistics, SLOPES, DISTANCES)
    assert len(rows) == 9
    for row in rows:
        bad = opposite & (distance < reach / row["slope"]) & (distance < row["within"])
        assert row["share"] == bad.sum() / opposite.sum()
    assert any(0 < row["share"] < 1 for row in rows)


def test_ceilings_count_every_sample_once(found):
    _, _, statistics = found
    rows = ceiling_rows(statistics, bins=7)
    assert sum(row["samples"] for row in rows) == 40
    inside = (statistics.nearest >= rows[1]["from"]) & (statistics.nearest < rows[1]["to"])
    assert rows[1]["samples"] == inside.sum()


def test_figures_have_a_line_for_each_distance(found):
    statistics = found[2]
    rows = incompatibility_rows(statistics, SLOPES, DISTANCES)
    lines = incompatibility_figure({"random": rows}).axes[0].lines
    assert [line.get_label() for line in lines] == ["random", "random, d < 0.3", "random, d < 0.5"]
    assert ceiling_figure(statistics, theme="dark").axes[0].patches


def test_distances_that_were_not_counted_are_refused(found):
    with pytest.raises(ValueError, match="not counted"):
        incompatibility_rows(found[2], [3.0])
