"""Bounds on many boxes at once: lines and rows against samples, and the bounds of single boxes."""

import dataclasses
import functools
from fractions import Fraction

import keras
import numpy as np
import pytest
from small_networks import network_of
from small_proofs import filled

from tf_lyapunov.verification import activations
from tf_lyapunov.verification.around.batches import Batches, is_covered, lines
from tf_lyapunov.verification.around.surroundings import Surroundings
from tf_lyapunov.verification.boxtrees import LEAF, cut_of
from tf_lyapunov.verification.operations import Activation
from tf_lyapunov.verification.properties import Leaves, PropertyClaim, box_region, failures
from tf_lyapunov.verification.ranges import Passes
from tf_lyapunov.verification.reading import read

layers = keras.layers


def paired():
    stack = [keras.Input((6, 4, 1)), layers.Conv2D(2, 3, padding="same"), layers.PReLU()]
    return keras.Sequential([*stack, layers.MaxPooling2D(2), layers.Flatten(), layers.Dense(3)])


@functools.cache
def passes(kind):
    model = filled(paired(), seed=5) if kind == "paired" else network_of(kind)
    return Passes(read(model))


COVERED = ("dense", "convolutional", "residual", "paired")


def boxes(rng, shape, count, width):
    """Boxes within the box of half width `width` around 0.1."""
    size = int(np.prod(shape))
    ends = np.sort(rng.uniform(-width, width, (2, count, size)) + 0.1, axis=0)
    ends[:, 0] = np.array([[-width], [width]]) + 0.1
    ends[1, 1] = ends[0, 1]
    return ends[0], ends[1]


def region(shape, width):
    center = np.full(shape, 0.1)
    return box_region(center - width, center + width)


def rows_of(network, rng):
    return rng.normal(size=(4, int(np.prod(network[network.logits].shape))))


@pytest.mark.parametrize("kind", COVERED)
def test_no_sample_lies_below_and_bounds_are_like_those_of_one_box(kind):
    own, rng = passes(kind), np.random.default_rng(len(kind))
    network, shape = own.network, own.network.steps[0].shape
    assert is_covered(network)
    bounded = Batches(Surroundings(network, own.gains, region(shape, 0.5)))
    rows, (low, high) = rows_of(network, rng), boxes(rng, shape, 6, 0.5)
    whole = bounded.whole().take(np.zeros(6, int))
    known = bounded.renewed(low, high, whole)
    found = bounded.lower(low, high, known, rows)
    assert np.all(found >= bounded.lower(low, high, whole, rows) - 1e-9)
    for k in range(6):
        x = rng.uniform(low[k], high[k], (300, low.shape[1]))
        x[:100] = np.where(x[:100] > (low[k] + high[k]) / 2, high[k], low[k])
        values, _ = network.evaluate(x.reshape(-1, *shape))
        values = values.reshape(300, -1) @ rows.T
        assert np.all(found[k] <= values.min(axis=0) + 1e-12)
        ends = (v[k].reshape(shape) for v in (low, high))
        alone = own.lower(box_region(*ends), rows)[0]
        width = values.max(axis=0) - alone
        # Those have balls and intervals besides, and no boxes to inherit.
        assert np.all(found[k] >= alone - 0.5 * width - 1e-9)


def test_boxes_of_hidden_units_hold_every_sample():
    own, rng = passes("residual"), np.random.default_rng(1)
    network = own.network
    bounded = Batches(Surroundings(network, own.gains, region((4,), 0.5)))
    low, high = boxes(rng, (4,), 20, 0.5)
    known = bounded.renewed(low, high, bounded.whole().take(np.zeros(20, int)))
    x = rng.uniform(low, high, (200, 20, 4))
    for name, (least, most) in known.items():
        values = dataclasses.replace(network, logits=name).evaluate(x.reshape(-1, 4))[0]
        values = values.reshape(200, 20, -1)
        assert np.all(least <= values.min(axis=0) + 1e-12)
        assert np.all(values.max(axis=0) - 1e-12 <= most)


def intervals(rng, count):
    """Of all sizes, at and around zero, as (1, count)."""
    center = rng.normal(size=count) * 10.0 ** rng.uniform(-6, 1.5, count)
    width = 10.0 ** rng.uniform(-12, 1, count)
    low, high = center - width, center + width
    low[:5], high[:5] = [0, -1, 0, -2, 3], [0, 0, 1, 2, 3]
    return low[None], high[None]


@pytest.mark.parametrize("slope", [0.0, 0.1, 0.25, 1.0])
def test_lines_of_kinks_hold_in_rational_arithmetic(slope):
    low, high = intervals(np.random.default_rng(3), 60)
    operation = Activation("leaky_relu", {"negative_slope": slope})
    found = lines(operation, low, high)
    for k, (a, b) in enumerate(zip(low[0], high[0], strict=True)):
        below, above = Fraction(found.low_slope[0, k]), Fraction(found.high_slope[0, k])
        shift = Fraction(found.high_shift[0, k])
        for t in (a, b, min(max(0.0, a), b)):
            t = Fraction(t)
            value = t if t > 0 else Fraction(slope) * t
            assert below * t <= value <= above * t + shift


@pytest.mark.parametrize("name", sorted(activations.TABLE))
def test_lines_of_activations_hold_between_the_ends(name):
    low, high = intervals(np.random.default_rng(len(name)), 40)
    found = lines(Activation(name, {}), low, high)
    t = low + (high - low) * np.linspace(0, 1, 101)[:, None]
    value, error = activations.evaluate(name, {}, t, np.zeros_like(t))
    shift = 0.0 if found.low_shift is None else found.low_shift
    room = error + 1e-15 * (1 + np.abs(t))
    assert np.all(found.low_slope * t + shift <= value + room)
    assert np.all(found.high_slope * t + found.high_shift >= value - room)


def test_lines_of_other_slopes_per_unit_hold():
    slopes = np.array([-1.0, 0.5, 1.5, 0.0])
    low, high = np.array([[-1.0] * 4, [-3.0, -2, -1, 0]]), np.array([[2.0] * 4, [1, 0, 3, 1.0]])
    found = lines(Activation("prelu", {}, slopes), low, high)
    t = low + (high - low) * np.linspace(0, 1, 101)[:, None, None]
    value = np.where(t > 0, t, slopes * t)
    assert np.all(found.low_slope * t + found.low_shift <= value)
    assert np.all(found.high_slope * t + found.high_shift >= value)


# Trees ------------------------------------------------------------------------------------------


def claim_of(rows, bounds, axes, points=(), shape=(4,), width=0.5):
    center = np.full(shape, 0.1)
    return PropertyClaim(
        center, center - width, center + width, np.full(2, np.inf), rows, bounds,
        np.zeros(len(bounds), np.int64), np.arange(len(bounds)), np.asarray(axes),
        np.asarray(points, np.float64),
    )  # fmt: skip


def deep(seed, nodes, size):
    """A random tree of halvings in preorder."""
    rng, axes, open_ = np.random.default_rng(seed), [], 1
    while open_:
        is_leaf = len(axes) + open_ >= nodes or (len(axes) > 3 and rng.uniform() < 0.4)
        axes.append(LEAF if is_leaf else int(rng.integers(size)))
        open_ += -1 if is_leaf else 1
    return np.array(axes)


def test_leaves_of_a_deep_tree_fill_the_box():
    claim = claim_of(np.ones((1, 1)), np.zeros(1), deep(0, 4001, 4))
    low, high = claim.leaves()
    assert len(low) == 2001 == claim.tree.leaves
    assert np.prod(high - low, axis=1).sum() == pytest.approx(1.0, rel=1e-9)
    x = np.random.default_rng(1).uniform(-0.4, 0.6, (300, 1, 4))
    assert np.all(np.any(np.all((low <= x) & (x <= high), axis=2), axis=1))
    # In preorder the lower half comes first, and another count at once changes nothing.
    nodes = np.flatnonzero(claim.axes == LEAF)
    for count in (1, 7):
        found = list(claim.tree.batches(claim.low, claim.high, count))
        order = np.argsort(np.concatenate([f[0] for f in found]))
        assert np.array_equal(np.concatenate([f[0] for f in found])[order], nodes)
        assert np.array_equal(np.concatenate([f[1] for f in found])[order], low)


def test_trees_that_are_none_are_refused():
    for axes, points in (
        ([0, LEAF], []), ([0, LEAF, LEAF, LEAF], []), ([LEAF, LEAF], []), ([4, LEAF, LEAF], []),
        ([cut_of(0), LEAF, LEAF], [0.7]), ([cut_of(0), LEAF, LEAF], [-0.5]),
        ([cut_of(0), LEAF, LEAF], []), ([0, LEAF, LEAF], [0.1]), ([cut_of(9), LEAF, LEAF], [0.1]),
        ([0, cut_of(0), LEAF, LEAF, LEAF], [0.3]),
    ):  # fmt: skip
        claim = claim_of(np.ones((1, 1)), np.full(1, -9.0), axes, points)
        with pytest.raises(ValueError, match=r"tree|split"):
            list(failures(passes("residual").network, claim, passes=passes("residual")))


@pytest.mark.parametrize("kind", ["residual", "convolutional"])
def test_a_leaf_whose_bound_is_just_not_enough_is_named(kind):
    """Both ways of bounding a leaf decide, to the last few digits, and no other leaf is named."""
    own, rng = passes(kind), np.random.default_rng(7)
    network, shape = own.network, own.network.steps[0].shape
    rows, axes = rows_of(network, rng)[:2], deep(2, 15, int(np.prod(shape)))
    claim = claim_of(rows, np.zeros(2), axes, shape=shape)
    low, high = claim.leaves()
    alone = np.array([own.lower(box_region(*e), rows)[0] for e in zip(low, high, strict=True)])
    leaves, nodes = Leaves(own, claim), np.flatnonzero(axes == LEAF)

    def at_once(bound):
        leaves.wanted = dataclasses.replace(claim, bounds=np.full(2, bound))
        left = [n for found in leaves.unproved(claim.tree) for n in found[0]]
        return ~np.isin(nodes, left)

    def either(bound):
        asked = dataclasses.replace(claim, bounds=np.full(2, bound))
        return ~np.isin(np.arange(len(nodes)), list(failures(network, asked, passes=own)))

    # The largest bound that is proved at once of every leaf, by bisection.
    a, b = -100.0, 100.0
    for _ in range(50):
        m = a / 2 + b / 2
        a, b = (m, b) if at_once(m).all() else (a, m)
    worst = alone.min()
    assert b - a < 1e-12 and abs(a - worst) < 0.5
    assert either(a).all() and either(max(a, worst) - 1e-9).all()
    left = ~either(max(b, worst) + 1e-9)
    assert 0 < left.sum() < len(nodes) and not np.any(left & at_once(max(b, worst) + 1e-9))


def test_swapped_halves_prove_nothing_of_each_other():
    """y = relu(2x - 1) - relu(2x - 1): zero, and proved so once the upper half is cut at 1/2."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2, "relu"), layers.Dense(1)])
    model.set_weights([np.full((1, 2), 2.0), -np.ones(2), np.array([[1.0], [-1.0]]), np.zeros(1)])
    own = Passes(read(model))
    for axes, left in (
        ([0, LEAF, 0, LEAF, LEAF], []),
        ([0, 0, LEAF, LEAF, LEAF], [2]),
        ([0, LEAF, LEAF], [1]),
        ([0, LEAF, cut_of(0), LEAF, LEAF], [2]),
        ([0, LEAF, cut_of(0), 0, LEAF, LEAF, LEAF], [3]),
    ):
        claim = claim_of(np.ones((1, 1)), np.full(1, -0.25), axes, shape=(1,))
        points = np.full(int(np.sum(claim.axes < LEAF)), 0.1)
        ends = {"center": np.zeros(1), "low": -np.ones(1), "high": np.ones(1), "points": points}
        claim = dataclasses.replace(claim, **ends)
        assert list(failures(own.network, claim, passes=own)) == left, axes


def test_files_are_bounded_alike_at_once_and_one_by_one(monkeypatch):
    own, rng = passes("residual"), np.random.default_rng(11)
    rows = rows_of(own.network, rng)[:1]
    claim = claim_of(rows, np.zeros(1), deep(3, 21, 4))
    alone = np.array(
        [own.lower(box_region(*e), rows)[0][0] for e in zip(*claim.leaves(), strict=True)]
    )
    for bound in np.quantile(alone, [0, 0.3, 0.7]) + 1e-6:
        asked = dataclasses.replace(claim, bounds=np.array([bound]))
        expected = set(np.flatnonzero(alone <= bound))
        found = set(failures(own.network, asked, passes=own))
        # What is proved one by one is proved.
        assert found <= expected
        with monkeypatch.context() as held:
            held.setattr("tf_lyapunov.verification.properties.is_covered", lambda network: False)
            assert set(failures(own.network, asked, passes=own)) == expected


def test_bounds_of_points_lie_below_by_what_rounding_may_take():
    own, rng = passes("residual"), np.random.default_rng(5)
    bounded = Batches(Surroundings(own.network, own.gains, region((4,), 0.5)))
    rows = rows_of(own.network, rng)
    x = rng.uniform(-0.4, 0.6, (50, 4))
    found = bounded.lower(x, x, bounded.whole().take(np.zeros(50, int)), rows)
    value, _ = own.network.evaluate(x)
    exact = value.reshape(50, -1) @ rows.T
    assert np.all(found < exact) and np.all(found > exact - 1e-9)
