"""Parts of a region in batches: none is lost, none counts twice, whatever the order and threads."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.local import inputtree, verifying
from tf_lyapunov.local.domains import Domains
from tf_lyapunov.local.pool import Parts, Pool
from tf_lyapunov.local.property import Property
from tf_lyapunov.local.regions import Region


def parts(bounds, start=0):
    """Parts that are known by their numbers."""
    count = len(bounds)
    number = start + np.arange(count, dtype=np.float64)
    low = np.stack([number, number], axis=1)
    boxes = {2: (number[:, None].astype(np.float32), number[:, None].astype(np.float32) + 1)}
    mask = np.ones((count, 1), bool)
    return Parts(np.array(bounds, float), low, low + 1, mask, np.arange(count) % 2, boxes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-50, 50), max_size=30), max_size=8), st.data())
def test_a_pool_gives_the_worst_and_keeps_the_rest(pushes, data):
    pool, held, start = Pool(), {}, 0
    for bounds in pushes:
        pool.push(parts(bounds, start))
        held |= {start + i: b for i, b in enumerate(bounds)}
        start += len(bounds)
        worst, count = data.draw(st.booleans()), data.draw(st.integers(1, 12))
        found = pool.pop(count, worst)
        assert (found is None) == (not held)
        if found is None:
            continue
        expected = sorted(held.values(), reverse=not worst)[:count]
        assert sorted(found.bound, reverse=not worst) == expected
        for number, bound in zip(found.low[:, 0], found.bound, strict=True):
            assert held.pop(int(number)) == bound
        # All arrays moved together.
        assert np.array_equal(found.boxes[2][0][:, 0], found.low[:, 0])
        assert np.array_equal(found.boxes[2][1][:, 0], found.high[:, 1])
        assert len(pool) == len(held)
        assert pool.least == min(held.values(), default=np.inf)


def test_parts_without_a_bound_are_the_worst():
    pool = Pool()
    pool.push(parts([1.0, -np.inf, 0.0]))
    assert len(pool) == 3 and pool.least == -np.inf
    assert pool.pop(1).bound.tolist() == [-np.inf] and len(pool) == 2


def test_halves_part_a_box_along_one_input():
    whole = parts([0.0, 0.0, 0.0])
    halves = whole.halves()
    assert len(halves) == 6 and halves.boxes[2][0].dtype == np.float64
    for i in range(3):
        pair, at = halves.rows(slice(2 * i, 2 * i + 2)), whole.at[i]
        middle = whole.low[i, at] / 2 + whole.high[i, at] / 2
        assert pair.high[0, at] == middle == pair.low[1, at]
        other = 1 - at
        assert np.all(pair.low[:, other] == whole.low[i, other])
        assert np.all(pair.high[:, other] == whole.high[i, other])
        assert pair.low[0, at] == whole.low[i, at] and pair.high[1, at] == whole.high[i, at]


def network(seed=0):
    model = keras.Sequential([keras.Input((3,))])
    for width in (16, 16):
        model.add(layers.Dense(width, "relu"))
    model.add(layers.Dense(2))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) * 1.5 / np.sqrt(weight.shape[0]))
    return model


def near_the_maximum(model, region, room):
    """The first output stays below what a dense sample reaches, by some room."""
    points = np.random.default_rng(1).uniform(region.low, region.high, (20_000, 3))
    # Largest at a corner, more often than not.
    points[:8] = list(itertools.product(*zip(region.low, region.high, strict=True)))
    top = float(model.predict(points.astype("float32"), 4096, verbose=0)[:, 0].max())
    return Property.linear([1.0, 0.0], top + room)


@pytest.fixture
def setting():
    model, region = network(), Region.box(np.full(3, -1.0), np.array([1.0, 0.5, 0.25]))
    return model, region, near_the_maximum(model, region, 0.15)


def check_partition(region, leaves):
    """Boxes that fill a box: their volumes add up, and points inside lie in one of them."""
    low, high = (np.stack(ends) for ends in zip(*leaves, strict=True))
    assert np.all(low >= region.low) and np.all(high <= region.high)
    whole = np.prod(region.high - region.low)
    assert abs(np.prod(high - low, axis=1).sum() / whole - 1) < 1e-12
    points = np.random.default_rng(2).uniform(region.low, region.high, (500, 3))
    inside = np.all((low <= points[:, None]) & (points[:, None] <= high), axis=2)
    assert np.all(inside.sum(axis=1) == 1)


def test_threads_and_chunks_prove_the_same_partition(setting, monkeypatch):
    model, region, property = setting
    # Batches whose size depends on the time taken would differ from run to run.
    monkeypatch.setattr(inputtree, "_FIRST", 32)
    monkeypatch.setattr(inputtree, "_MOST", 32)
    monkeypatch.setattr(inputtree, "_SECONDS", 1e9)
    monkeypatch.setattr(inputtree, "_ATTACKED", 0.0)
    plain = tfl.verify_property(model, region, property, timeout=1e9)
    monkeypatch.setattr(inputtree, "_THREADED", 1)
    monkeypatch.setattr(Domains, "chunk", lambda self, rows: 5)
    threaded = tfl.verify_property(model, region, property, timeout=1e9)
    for found in (plain, threaded):
        assert found.is_proved and len(found.leaves) > 20
        check_partition(region, found.leaves)
        assert 0 <= found.bound <= found.least
    assert threaded.branches == plain.branches
    assert abs(threaded.bound - plain.bound) < 1e-9


def test_without_room_the_nearly_proved_come_first_and_all_is_proved(setting, monkeypatch):
    model, region, property = setting
    monkeypatch.setattr(inputtree, "_ROOM", 1)
    monkeypatch.setattr(inputtree, "_MOST", 8)
    found = tfl.verify_property(model, region, property, timeout=100)
    assert found.is_proved
    check_partition(region, found.leaves)


def test_too_many_boxes_are_no_reason_not_to_prove(setting, monkeypatch):
    model, region, property = setting
    monkeypatch.setattr(inputtree, "_LEAVES", 30)
    found = tfl.verify_property(model, region, property, timeout=100)
    assert found.is_proved and found.leaves is None
    with pytest.raises(ValueError, match="too many"):
        found.save("nothing.npz")


def test_boxes_that_are_searched_for_longer_are_smaller_and_hold_every_signal(monkeypatch):
    model, center = network(3), np.array([0.2, -0.1, 0.3])
    region = Region.ball(center, 0.4, "linf")
    kept = []

    class Kept(verifying.UnitTree):
        def __init__(self, around, *others):
            kept.append(around)
            super().__init__(around, *others)

    monkeypatch.setattr(verifying, "UnitTree", Kept)
    property = near_the_maximum(model, region, 0.05)
    for share in (0.0, 1.0):
        monkeypatch.setattr(verifying, "_SHARE", share)
        found = tfl.verify_property(model, region, property, branching="units", timeout=100)
        assert not found.is_refuted
    short, long = (around.box(around.flow.links[-2].inputs[0]) for around in kept)
    widths = [float(np.sum(high - low)) for low, high in (short, long)]
    assert widths[1] <= widths[0] * (1 + 1e-9)
    x = np.random.default_rng(4).uniform(region.low, region.high, (5000, 3))
    (w, b), (v, c) = [
        [np.asarray(a, np.float64) for a in layer.get_weights()] for layer in model.layers[:2]
    ]
    z = np.maximum(x @ w + b, 0.0) @ v + c
    assert np.all(z >= long[0] - 1e-12) and np.all(z <= long[1] + 1e-12)


@pytest.mark.parametrize("last", [1.6, 1.69])
def test_rows_that_can_never_hold_do_not_hold_the_others_up(last):
    """y = (s - relu(x₁ - x₂), s + ½), s = x₀ + x₁: y₀ ≥ 1.2 needs s ≥ 1.2, and so y₁ ≥ 1.7.

    Near s = 1.1 the row about y₁ is nearest to its proof, exact, and fails on one side of every
    such domain; only the other proves it, once x₂ is cut.
    """
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, "relu"), layers.Dense(2)])
    model.set_weights(
        [
            np.array([[1, 0], [1, 1], [0, -1]], np.float32), np.zeros(2, np.float32),
            np.array([[1, 1], [-1, 0]], np.float32), np.array([0, 0.5], np.float32),
        ]
    )  # fmt: skip
    unsafe = Property.avoids([[-1, 0], [0, 1]], [-1.2, last])
    region = Region.box(np.zeros(3), np.ones(3))
    found = tfl.verify_property(model, region, unsafe, timeout=60, branching="inputs")
    # A million domains were not enough.
    assert found.is_proved and found.branches < 20_000
    beyond = Property.avoids([[-1, 0], [0, 1]], [-1.2, 1.71])
    assert tfl.verify_property(model, region, beyond, timeout=60).is_refuted
