"""Properties of outputs: what breaks them, how they combine, and what is refused."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.property import Property


def broken(property, values):
    return property.resolved(values.shape[1]).breaks(values)


def test_a_class_holds_where_its_output_alone_is_the_largest():
    values = np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.2], [1.0, 1.0, 0.2]])
    assert broken(Property.classified_as(0), values).tolist() == [False, True, True]
    margin = Property.classified_as(0).resolved(3).margin(values)
    assert margin.tolist() == [0.5, -0.5, 0.0]


def test_a_single_output_decides_by_its_sign():
    values = np.array([[1.0], [-1.0], [0.0]])
    assert broken(Property.classified_as(1), values).tolist() == [False, True, True]
    assert broken(Property.classified_as(0), values).tolist() == [True, False, True]


def test_linear_inequalities_hold_with_equality_and_unsafe_sets_are_closed():
    values = np.array([[1.0, 2.0], [1.0 + 1e-9, 2.0], [1.0, 2.1]])
    both = Property.linear(np.eye(2), [1.0, 2.0])
    assert broken(both, values).tolist() == [False, True, True]
    # Unsafe: y ≤ (1, 2) in both entries.
    outside = Property.avoids(np.eye(2), [1.0, 2.0])
    assert broken(outside, values).tolist() == [True, False, False]
    assert Property.avoids([1.0, 0.0], 1.0).resolved(2).margin(values)[0] == 0.0


def test_combinations_break_as_boolean_algebra_says():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 3))
    parts = [
        Property.classified_as(0),
        Property.linear(rng.normal(size=(2, 3)), rng.normal(size=2)),
        Property.avoids(rng.normal(size=(2, 3)), rng.normal(size=2)),
    ]
    for a, b in itertools.product(parts, parts):
        assert np.array_equal(broken(a & b, values), broken(a, values) | broken(b, values))
        assert np.array_equal(broken(a | b, values), broken(a, values) & broken(b, values))


def test_breaking_within_errors_is_breaking_at_every_corner_of_them():
    rng = np.random.default_rng(1)
    property = Property.linear([1.0, -1.0], 0.0) & Property.avoids(np.eye(2), 0.3)
    values, errors = rng.normal(size=(300, 2)), np.full((300, 2), 0.2)
    unsafe = property.resolved(2)
    found = unsafe.breaks(values, errors)
    corners = np.array(list(itertools.product((-1, 1), repeat=2)))
    every = np.all([unsafe.breaks(values + errors * c) for c in corners], axis=0)
    # A convex set holds a box if and only if it holds its corners; a union may do so in parts.
    assert np.all(every[found]) and 20 < found.sum() <= every.sum() < 300


def test_bounds_close_a_set_by_one_row_and_strict_rows_by_zero():
    unsafe = (Property.avoids(np.eye(2), 0.0) & Property.linear([1.0, 0.0], 0.0)).resolved(2)
    lower = np.array([[1.0, -5.0, 0.0], [0.0, 0.0, -1e-9], [-1.0, 2.0, 0.0]])
    assert unsafe.holds(lower).tolist() == [[True, True], [False, False], [True, True]]


def small():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3, activation="relu")])
    return model


UNIT = tfl.Region.ball(np.zeros(2), 1.0, "linf")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Property.classified_as(-1),
        lambda: Property.classified_as(True),
        lambda: Property.classified_as("cat"),
        lambda: Property.linear([[1.0, np.nan]], 0.0),
        lambda: Property.linear([[1.0, 1.0]], np.inf),
        lambda: Property.linear([[1.0, 1.0]], [0.0, 1.0]),
        lambda: Property.linear([], 0.0),
        lambda: Property.avoids([["a", "b"]], 0.0),
        lambda: Property.classified_as(3).resolved(3),
        lambda: Property.classified_as(2).resolved(1),
        lambda: Property.linear([1.0, 1.0], 0.0).resolved(3),
        lambda: (Property.linear([1.0, 1.0], 0.0) | Property.classified_as(0)).resolved(3),
        lambda: tfl.verify_property(small(), UNIT, Property.classified_as(3)),
        lambda: tfl.verify_property(small(), UNIT, Property.linear([1.0, 0.0], 1.0)),
        lambda: tfl.verify_property(small(), UNIT, Property.classified_as(0), timeout=0),
        lambda: tfl.verify_property(small(), UNIT, Property.classified_as(0), timeout=np.nan),
        lambda: tfl.verify_property(small(), UNIT, Property.classified_as(0), timeout=-1.0),
        lambda: tfl.verify_property(small(), UNIT, Property.classified_as(0), branching="both"),
        lambda: tfl.verify_property(small(), UNIT, Property.classified_as(0), outputs="all"),
        lambda: tfl.verify_property(
            small(), tfl.Region.ball(np.zeros(3), 1.0), Property.classified_as(0)
        ),
        lambda: tfl.verify_property(
            small(), tfl.Region.ball(np.zeros((1, 2)), 1.0), Property.classified_as(0)
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match="Received"):
        make()


@pytest.mark.parametrize("arguments", [(np.zeros(2), Property.classified_as(0)), (UNIT, 3)])
def test_other_types_are_refused(arguments):
    with pytest.raises(TypeError, match="Received"):
        tfl.verify_property(small(), *arguments)


def test_models_with_several_inputs_are_refused():
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([a, b], layers.Add()([a, b]))
    with pytest.raises(UnsupportedLayerError, match="one input"):
        tfl.verify_property(model, UNIT, Property.classified_as(0))


def test_too_many_unsafe_sets_are_refused_before_they_are_made():
    wide = Property.linear(np.ones((101, 2)), 0.0)
    with pytest.raises(ValueError, match="unsafe sets at most"):
        (wide | wide).resolved(2)


def test_the_class_of_a_single_probability_is_asked_of_its_logit():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, activation="sigmoid")])
    model.layers[0].set_weights([np.ones((2, 1)), np.full(1, 3.0)])
    with pytest.raises(ValueError, match="logit"):
        tfl.verify_property(model, UNIT, Property.classified_as(1), outputs="model")
    assert tfl.verify_property(model, UNIT, Property.classified_as(1)).is_proved
    # At (-1, -1) the logit is 1: the probability is at least 0.731.
    for bound, status in ((0.7310, "PROVED"), (0.7311, "REFUTED")):
        found = tfl.verify_property(
            model, UNIT, Property.linear([-1.0], -bound), outputs="model", timeout=20
        )
        assert found.status == status
