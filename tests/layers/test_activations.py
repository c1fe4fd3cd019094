"""Norm-preserving activations: their equations, their isometry, and weights that cannot escape."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lyapunov.layers.activations import (
    FullSort,
    GroupSort,
    Householder,
    LipschitzPReLU,
    MaxMin,
    TwoSidedReLU,
)

UNIT = 2.0**-24
ROWS = hnp.arrays(
    np.float32, (3, 12), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
)


def run(layer, x, **options):
    return keras.ops.convert_to_numpy(layer(np.asarray(x, "float32"), **options))


@settings(max_examples=25)
@given(ROWS)
def test_sorting_is_numpy_s_sort_of_the_groups(x):
    groups = np.sort(x.reshape(3, 4, 3), axis=-1).reshape(3, 12)
    pairs = np.sort(x.reshape(3, 6, 2), axis=-1).reshape(3, 12)
    halves = np.concatenate([np.maximum(*np.split(x, 2, 1)), np.minimum(*np.split(x, 2, 1))], 1)
    assert np.array_equal(run(GroupSort(3), x), groups)
    assert np.array_equal(run(GroupSort(2), x), pairs)
    assert np.array_equal(run(GroupSort(12), x), np.sort(x, axis=-1))
    assert np.array_equal(run(FullSort(), x), np.sort(x, axis=-1))
    assert np.array_equal(run(MaxMin(), x), halves)


@settings(max_examples=25)
@given(ROWS, st.integers(0, 10**6))
def test_householder_is_the_published_two_branch_formula(x, seed):
    layer = Householder()
    layer.build((None, 12))
    angle = np.random.default_rng(seed).uniform(-7, 7, 6).astype("float32")
    layer.angle.assign(angle)
    a, b = np.split(x.astype(np.float64), 2, axis=1)
    s, c = np.sin(angle.astype(float)), np.cos(angle.astype(float))
    reflects = a * np.sin(angle / 2.0) - b * np.cos(angle / 2.0) > 0
    expected = [np.where(reflects, a * c + b * s, a), np.where(reflects, a * s - b * c, b)]
    error = np.abs(run(layer, x) - np.concatenate(expected, axis=1))
    # The bound that certificates use, on pairs: 128 units.
    assert np.all(error <= 128 * UNIT * np.hypot(*np.split(np.tile(np.abs(x), 1), 2, 1)).max())


@settings(max_examples=25)
@given(ROWS)
def test_every_activation_but_prelu_keeps_the_norm(x):
    norms = np.linalg.norm(x.astype(float), axis=1)
    for layer in (MaxMin(), GroupSort(4), FullSort(), Householder(), TwoSidedReLU()):
        found = np.linalg.norm(run(layer, x).astype(float), axis=1)
        assert np.all(np.abs(found - norms) <= 128 * UNIT * norms)


def test_the_initial_householder_sorts_each_pair():
    x = np.random.default_rng(0).normal(size=(5, 8))
    sorted_pairs = np.sort(np.stack(np.split(x, 2, axis=1)), axis=0).reshape(2, 5, 4)
    assert np.allclose(run(Householder(), x), np.concatenate(sorted_pairs, axis=1), atol=1e-6)


@pytest.mark.parametrize("make", [MaxMin, GroupSort, FullSort, Householder, TwoSidedReLU])
def test_the_axis_is_where_the_layer_acts(make):
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 4)).astype("float32")
    last = run(make(), np.moveaxis(x, 1, -1))
    assert np.array_equal(run(make(axis=1), x), np.moveaxis(last, -1, 1))
    assert make(axis=1).compute_output_shape((None, 6, 3, 4)) == (
        None,
        12 if make is TwoSidedReLU else 6,
        3,
        4,
    )


@pytest.mark.parametrize("slope", [1e9, -1e9, 1.0, -1.0, 0.3])
def test_a_slope_never_leaves_the_unit_interval_whatever_is_assigned(slope):
    layer = LipschitzPReLU(shared_axes=(1,))
    layer.build((None, 5, 2))
    assert tuple(layer.slope.shape) == (1, 2)
    layer.slope.assign(np.full((1, 2), slope))
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype("float32")
    used = np.clip(slope, -1, 1)
    expected = np.where(x > 0, x, np.float32(used) * x)
    assert np.allclose(run(layer, x), expected, rtol=4 * UNIT, atol=0)


def test_slopes_stay_in_range_and_keep_learning_at_a_huge_learning_rate():
    model = keras.Sequential([keras.Input((4,)), LipschitzPReLU()])
    model.compile(keras.optimizers.SGD(50.0), "mse")
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    model.fit(x, 10 * x, epochs=1, verbose=0)
    slopes = keras.ops.convert_to_numpy(model.layers[0].slope)
    assert np.all(np.abs(slopes) <= 1) and np.any(np.abs(slopes) == 1)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, np.maximum(x, 0), epochs=1, verbose=0)
    assert np.any(keras.ops.convert_to_numpy(model.layers[0].slope) != slopes)


@pytest.mark.parametrize(
    "layer",
    [MaxMin(axis=1), GroupSort(3), FullSort(), Householder(), LipschitzPReLU(-0.5), TwoSidedReLU()],
    ids=lambda layer: type(layer).__name__,
)
def test_an_activation_survives_saving_in_a_model(layer, tmp_path):
    model = keras.Sequential([keras.Input((6,)), layer])
    for weight in model.weights:
        weight.assign(np.random.default_rng(0).uniform(-1, 1, weight.shape))
    path = tmp_path / "model.keras"
    model.save(path)
    x = np.random.default_rng(1).normal(size=(3, 6)).astype("float32")
    again = keras.models.load_model(path)
    assert np.array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(MaxMin(), (None, 5)), (Householder(), (None, 3)), (GroupSort(4), (None, 6))],
    ids=lambda v: type(v).__name__,
)
def test_a_width_that_does_not_divide_is_refused(layer, shape):
    with pytest.raises(ValueError, match="divisible by"):
        layer.build(shape)


def test_bad_axes_group_sizes_and_slopes_are_refused():
    for layer in (MaxMin(axis=0), FullSort(axis=3), TwoSidedReLU(axis=-2)):
        with pytest.raises(ValueError, match="other than the batch axis"):
            layer.build((None, 4))
    with pytest.raises(ValueError, match="group_size"):
        GroupSort(0)
    with pytest.raises(ValueError, match="must lie in"):
        LipschitzPReLU(1.5)
    with pytest.raises(TypeError, match="axis"):
        MaxMin(axis=1.0)


def test_a_reflection_starts_where_it_is_told_and_keeps_its_gain():
    layer = Householder(theta_initializer="ones")
    x = np.random.default_rng(0).normal(size=(9, 6)).astype("float32")
    y = run(layer, x)
    assert np.all(keras.ops.convert_to_numpy(layer.angle) == 1)
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    copy = Householder.from_config(layer.get_config())
    assert np.array_equal(run(copy, x), y)
    assert np.allclose(run(Householder(), x), run(Householder(theta_initializer=None), x))
