"""Properties against the exact extremes of tiny networks, attacks, and random inputs."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.local import verifying
from tf_lyapunov.local.property import Property
from tf_lyapunov.local.regions import Region


def perceptron(inputs=2, widths=(5, 4), seed=0, activation="relu", outputs=3):
    model = keras.Sequential([keras.Input((inputs,))])
    for width in widths:
        model.add(layers.Dense(width, activation=activation))
    model.add(layers.Dense(outputs))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    return model


def exact(model, x):
    """The function in float64, by NumPy alone."""
    *hidden, last = [[np.asarray(v, np.float64) for v in k.get_weights()] for k in model.layers]
    for w, b in hidden:
        x = np.maximum(x @ w + b, 0)
    return x @ last[0] + last[1]


def largest(model, region, value):
    """Largest value(outputs) over a region of the plane, by a grid refined around its best points.

    Piecewise linear functions are largest at a vertex, towards which their value rises at a steady
    slope: 10⁻⁷ of the step's end is far below what is asked.
    """
    best, step = -np.inf, float(region.reach().max())
    at = region.center[None]
    for _ in range(8):
        grid = np.stack(np.meshgrid(*[np.linspace(-step, step, 61)] * 2), -1).reshape(-1, 2)
        points = (at[:, None] + grid[None]).reshape(-1, 2)
        points = np.clip(points, region.low, region.high)
        away = points - region.center
        scale = np.minimum(1.0, region.radius / np.maximum(np.linalg.norm(away, axis=1), 1e-12))
        points = region.center + away * scale[:, None]
        found = value(exact(model, points))
        order = np.argsort(-found)[:8]
        at, step, best = points[order], step / 8, max(best, found[order[0]])
    return best


def check_counterexample(model, region, property, found):
    """What REFUTED promises, by means of its own."""
    x = found.counterexample.x
    assert x.dtype == np.dtype(model.inputs[0].dtype) and x.shape == region.center.shape
    wide = x.astype(np.float64)
    assert np.all(region.low <= wide) and np.all(wide <= region.high)
    assert np.linalg.norm(wide - region.center) <= region.radius * (1 + 1e-15)
    own = np.asarray(keras.ops.convert_to_numpy(model(x[None], training=False)), np.float64)
    assert np.allclose(own[0], found.counterexample.outputs, atol=1e-6)
    unsafe = property.resolved(own.shape[1])
    assert unsafe.breaks(own)[0] and unsafe.breaks(exact(model, wide[None]))[0]


REGIONS = {
    "linf": lambda x: Region.ball(x, 0.7, "linf"),
    "l2": lambda x: Region.ball(x, 0.8),
    "cut": lambda x: Region.ball(x, 0.8, bounds=(x.min() - 0.1, x.max() + 0.3)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", REGIONS)
def test_the_exact_maximum_divides_proved_from_refuted(kind, seed):
    model, rng = perceptron(seed=seed), np.random.default_rng(seed)
    region = REGIONS[kind](rng.normal(size=2))
    row = rng.normal(size=3)
    top = largest(model, region, lambda y: y @ row)
    above = tfl.verify_property(model, region, Property.linear(row, top + 1e-4), timeout=100)
    assert above.status == "PROVED" and 0 <= above.bound <= above.least
    # The margin at the maximum is the distance that was added.
    assert above.bound <= 1e-4 + 1e-6
    property = Property.linear(row, top - 1e-4)
    below = tfl.verify_property(model, region, property, timeout=100)
    assert below.status == "REFUTED" and below.bound <= 0
    check_counterexample(model, region, property, below)


@pytest.mark.parametrize("seed", range(3))
def test_splits_of_hidden_units_divide_them_too(seed):
    model, rng = perceptron(seed=seed), np.random.default_rng(seed)
    region, row = Region.ball(rng.normal(size=2), 0.4, "linf"), rng.normal(size=3)
    top = largest(model, region, lambda y: y @ row)
    for change, status in ((3e-2, "PROVED"), (-1e-4, "REFUTED")):
        found = tfl.verify_property(
            model, region, Property.linear(row, top + change), branching="units", timeout=100
        )
        assert found.status == status


@pytest.mark.parametrize("seed", range(4))
def test_disjunctions_and_conjunctions_are_decided_by_the_exact_margin(seed):
    model, rng = perceptron(seed=seed), np.random.default_rng(seed + 10)
    region = Region.ball(rng.normal(size=2), 0.5, "linf")
    rows, other = rng.normal(size=(2, 3)), rng.normal(size=3)
    # The least of max(A y) over the region: A y ≤ b·1 is met from there on.
    met = -largest(model, region, lambda y: -np.max(y @ rows.T, axis=1))
    top = largest(model, region, lambda y: y @ other)
    safe = Property.linear(other, top + 1e-3)
    for change, status in ((-1e-3, "PROVED"), (1e-3, "REFUTED")):
        property = Property.avoids(rows, met + change) & safe
        found = tfl.verify_property(model, region, property, timeout=100)
        assert found.status == status, str(found)
    # Either property is enough.
    either = Property.linear(other, top - 1.0) | Property.avoids(rows, met - 1e-3)
    assert tfl.verify_property(model, region, either, timeout=100).is_proved


def test_classes_of_wider_inputs_are_proved_by_units_where_attacks_end():
    model, rng = perceptron(20, (16, 12), seed=3), np.random.default_rng(3)
    x = rng.normal(size=20)
    label = int(exact(model, x[None]).argmax())
    statuses = []
    for radius in (0.02, 0.1, 0.2, 0.4):
        region = Region.ball(x, radius, "linf")
        property = Property.classified_as(label)
        found = tfl.verify_property(model, region, property, timeout=10)
        statuses.append(found.status)
        points = rng.uniform(region.low, region.high, (4000, 20))
        margins = property.resolved(3).margin(exact(model, points))
        assert found.bound <= margins.min() + 1e-12
        if found.is_refuted:
            check_counterexample(model, region, property, found)
    assert statuses[0] == "PROVED" and statuses[-1] == "REFUTED"


@pytest.mark.parametrize("activation", ["tanh", "leaky_relu", "sigmoid"])
def test_smooth_networks_are_decided_on_both_sides(activation):
    model, rng = perceptron(seed=1, activation=activation), np.random.default_rng(1)
    region, row = Region.ball(rng.normal(size=2), 0.6, "linf"), rng.normal(size=3)
    axis = [np.linspace(a, b, 401) for a, b in zip(region.low, region.high, strict=True)]
    grid = np.stack(np.meshgrid(*axis), -1).reshape(-1, 2)
    top = (np.asarray(model.predict(grid, verbose=0, batch_size=40000), np.float64) @ row).max()
    # The grid's step times the largest slope seen is below 0.01.
    for change, status in ((1e-2, "PROVED"), (-1e-3, "REFUTED")):
        found = tfl.verify_property(model, region, Property.linear(row, top + change), timeout=100)
        assert found.status == status


def residual():
    x = keras.Input((5, 5, 1))
    a = layers.Conv2D(3, 3, padding="same", activation="relu")(x)
    b = layers.Conv2D(3, 3, padding="same")(a)
    y = layers.ReLU()(layers.Add()([a, b]))
    y = layers.MaxPooling2D(2)(y)
    return keras.Model(x, layers.Softmax()(layers.Dense(3)(layers.Flatten()(y))))


def test_graphs_with_convolutions_sums_and_pools_are_decided():
    keras.utils.set_random_seed(0)
    model, rng = residual(), np.random.default_rng(0)
    x = rng.uniform(size=(5, 5, 1)).astype("float32")
    label = int(np.argmax(model(x[None])))
    near = Region.ball(x, 0.01, "linf", bounds=(0, 1))
    far = Region.box(np.zeros((5, 5, 1)) - 3, np.ones((5, 5, 1)) + 3)
    property = Property.classified_as(label)
    assert tfl.verify_property(model, near, property).is_proved
    found = tfl.verify_property(model, far, property)
    assert found.is_refuted
    assert int(np.argmax(model(found.counterexample.x[None]))) != label
    # Of probabilities too; the logits of a property are not the model's outputs.
    half = Property.linear([np.eye(3)[label]], 1.0)
    assert tfl.verify_property(model, near, half, outputs="model").is_proved


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("branching", ["inputs", "units"])
def test_no_sample_breaks_what_was_proved(branching, seed):
    """Random properties near what samples reach: a proof must survive all of them."""
    statuses, rng = [], np.random.default_rng(seed)
    inputs = int(rng.integers(1, 5))
    model = perceptron(inputs, (6, 5), seed)
    region = Region.ball(rng.normal(size=inputs), float(rng.uniform(0.05, 0.5)), "linf")
    points = rng.uniform(region.low, region.high, (3000, inputs))
    corners = np.where(rng.integers(0, 2, (64, inputs)), region.low, region.high)
    values = exact(model, np.concatenate([points, corners]))
    for change in (0.1, 0.02, 0.005, -0.005, -0.02, -0.1):
        row = rng.normal(size=3)
        size = np.ptp(values @ row)
        property = Property.linear(row, (values @ row).max() + change * size)
        found = tfl.verify_property(
            model, region, property, branching=branching, timeout=0.4, seed=seed
        )
        worst = property.resolved(3).margin(values).min()
        assert found.bound <= worst + 1e-12
        if found.is_proved:
            assert worst >= 0
        if found.is_refuted:
            check_counterexample(model, region, property, found)
        statuses.append(found.status)
    assert statuses[0] == "PROVED" and statuses[-1] == "REFUTED"
    # Samples come within a few hundredths of the maximum.
    assert "PROVED" not in statuses[3:] and statuses.count("UNKNOWN") <= 2


def test_a_tie_of_the_exact_function_is_neither_proved_nor_refuted():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2)])
    # y_0 - y_1 = x ≥ 0 on the region, zero at its end alone.
    model.layers[0].set_weights([np.array([[1.0, 0.0]]), np.zeros(2)])
    region = Region.box([0.0], [1.0])
    for property in (Property.classified_as(0), Property.linear([-1.0, 1.0], 0.0)):
        found = tfl.verify_property(model, region, property, timeout=0.5)
        assert found.status == "UNKNOWN" and -1e-9 < found.bound <= 0 == found.least


def test_a_point_that_the_format_does_not_hold_is_no_counterexample():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2)])
    model.layers[0].set_weights([np.array([[0.0, 1.0]]), np.zeros(2)])
    point = np.array([0.1])  # between two numbers of float32
    found = tfl.verify_property(
        model, Region.box(point, point), Property.classified_as(0), timeout=1
    )
    assert found.status == "UNKNOWN" and found.least == pytest.approx(-0.1)
    wider = Region.box(point - 1e-8, point + 1e-8)
    found = tfl.verify_property(model, wider, Property.classified_as(0), timeout=1)
    assert found.is_refuted and wider.low <= found.counterexample.x.astype(float) <= wider.high


def test_time_that_is_up_leaves_unknown_with_a_bound():
    model, rng = perceptron(6, (30, 30, 30), seed=0), np.random.default_rng(0)
    region, row = Region.ball(rng.normal(size=6), 2.0, "linf"), rng.normal(size=3)
    outputs = exact(model, rng.uniform(region.low, region.high, (20000, 6)))
    property = Property.linear(row, (outputs @ row).max() + 1.0)
    for branching in verifying.BRANCHING:
        found = tfl.verify_property(model, region, property, timeout=0.7, branching=branching)
        assert found.status in ("UNKNOWN", "PROVED", "REFUTED")
        assert found.timeout == 0.7 and found.bound <= property.resolved(3).margin(outputs).min()
    short = tfl.verify_property(model, region, property, timeout=1e-6)
    assert short.status == "UNKNOWN" and short.bound == -np.inf and short.open == 1


def test_ctrl_c_passes_through(monkeypatch):
    model = perceptron(4, (20, 20), seed=0)

    def interrupted(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(verifying.InputTree, "_bounded", interrupted)
    region = Region.ball(np.zeros(4), 1.0, "linf")
    points = np.random.default_rng(0).uniform(region.low, region.high, (2000, 4))
    property = Property.linear([1.0, 0.0, 0.0], exact(model, points)[:, 0].max() + 0.2)
    before = [np.array(w) for w in model.get_weights()]
    with pytest.raises(KeyboardInterrupt):
        tfl.verify_property(model, region, property, timeout=5)
    for a, b in zip(before, model.get_weights(), strict=True):
        assert np.array_equal(a, b)


def test_the_result_prints_as_one_table():
    model = perceptron(2, (4,), outputs=2)
    region = Region.ball(np.zeros(2), 0.5, "linf")
    found = tfl.verify_property(model, region, Property.linear([1.0, 0.0], -100.0))
    text = str(found)
    lines = text.splitlines()
    assert lines[0].split() == ["property", "1", "linear", "inequality"]
    assert "REFUTED" in lines[1] and lines[-1].startswith("counterexample")
    assert len({re.match(r"\S.*?  +", line).end() for line in lines}) == 1
