"""Properties against the exact extremes of tiny networks, attacks, and random inputs."""

import itertools
import re
from fractions import Fraction

import keras
import numpy as np
import pytest
from keras import layers
from scipy.optimize import linprog

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local import verifying
from tf_lyapunov.local.boxes import CROWN, Memory, surround
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.leaves import Leaves
from tf_lyapunov.local.property import Property
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.relaxation import Elementwise
from tf_lyapunov.program.network import read_network


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


def largest_by_patterns(model, region, row):
    """Largest row·f over a box for one hidden layer, by a linear program per pattern of signs."""
    (w, b), (v, c) = [[np.asarray(x, np.float64) for x in k.get_weights()] for k in model.layers]
    ends = list(zip(region.low, region.high, strict=True))
    best = -np.inf
    for signs in itertools.product((1.0, -1.0), repeat=w.shape[1]):
        on = np.array(signs) > 0
        slope = (w[:, on] @ v[on]) @ row
        answer = linprog(-slope, -(w * signs).T, b * signs, bounds=ends)
        if answer.status == 0:
            best = max(best, slope @ answer.x + (b[on] @ v[on] + c) @ row)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_splits_of_hidden_units_divide_proved_from_refuted(seed):
    model, rng = perceptron(12, (6,), seed), np.random.default_rng(seed)
    region, row = Region.ball(rng.normal(size=12), 0.5, "linf"), rng.normal(size=3)
    top = largest_by_patterns(model, region, row)
    for change, status in ((1e-4, "PROVED"), (-1e-4, "REFUTED")):
        property = Property.linear(row, top + change)
        found = tfl.verify_property(model, region, property, timeout=100)
        assert found.status == status
        assert found.bound <= change + 1e-9
        if found.is_refuted:
            check_counterexample(model, region, property, found)


@pytest.mark.parametrize("seed", range(3))
def test_splits_of_hidden_units_are_complete_for_two_layers_and_several_rows(seed):
    model, rng = perceptron(seed=seed), np.random.default_rng(seed)
    region = Region.ball(rng.normal(size=2), 0.4, "linf")
    row, rows = rng.normal(size=3), rng.normal(size=(2, 3))
    top = largest(model, region, lambda y: y @ row)
    met = -largest(model, region, lambda y: -np.max(y @ rows.T, axis=1))
    for change, status in ((1e-4, "PROVED"), (-1e-4, "REFUTED")):
        for property in (Property.linear(row, top + change), Property.avoids(rows, met - change)):
            found = tfl.verify_property(model, region, property, branching="units", timeout=100)
            assert found.status == status


def branch_setting():
    model, rng = perceptron(4, (8, 6), seed=2), np.random.default_rng(2)
    flow, center = flow_of(read_network(model)), rng.normal(size=4)
    region = Region.ball(center, 1.6, "linf")
    memory, traced = Memory(), trace(flow, center)
    surround(flow, traced, region, CROWN, memory)
    around = surround(flow, traced, region, CROWN, memory, proof=True)
    points = rng.uniform(region.low, region.high, (30000, 4))
    return model, rng, around, points


def test_any_shifts_of_split_units_bound_what_is_on_their_side():
    model, rng, around, points = branch_setting()
    k, step = next((k, s) for k, s in around.steps.items() if len(s.columns) > 2)
    unit = int(step.columns[1])
    low, high = step.low.copy(), step.high.copy()
    low[0, unit] = 0.0
    center = step.center.reshape(1, -1)
    own = Elementwise(step.operation, center, low, high, columns=step.columns)
    assert np.array_equal(own.columns, step.columns)
    kernel, bias = (np.asarray(v, np.float64) for v in model.layers[0].get_weights())
    above = points[(points @ kernel + bias)[:, unit] >= 0]
    values, row = exact(model, above), rng.normal(size=(1, 3))
    assert len(above) > 1000
    bounds = []
    for size in (0.0, 0.1, 1.0, 10.0):
        multipliers = {}
        around.backward(row, around.flow.output, multipliers, split={k: own})
        held = multipliers[k]
        held.shift = rng.normal(size=held.share.shape) * size
        held.scale = np.ones((1, 1))
        bounds.append(around.lower(row, around.flow.output, multipliers, split={k: own})[0])
    assert max(bounds) <= (values @ row[0]).min() and len(set(bounds)) == 4


def test_the_derivative_by_shifts_is_that_of_the_bound():
    _, rng, around, _ = branch_setting()
    row, target = rng.normal(size=(1, 3)), around.flow.output
    multipliers = {}
    around.backward(row, target, multipliers)
    for held in multipliers.values():
        held.shift = 0.1 * rng.normal(size=held.share.shape)
        held.scale = np.ones((1, 1))
    _, _, memory = around.backward(row, target, multipliers, record=True)
    found = around.derivatives(target, memory, multipliers)
    for k, held in multipliers.items():
        for j in range(held.shift.shape[1]):
            ends = []
            for move in (1e-6, -2e-6):
                held.shift[0, j] += move
                ends.append(around.backward(row, target, multipliers)[0][0])
            held.shift[0, j] += 1e-6
            assert found[k][2][0, j] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-5)


def test_an_empty_branch_is_proved_by_its_linear_program():
    model, _, around, points = branch_setting()
    kernel, bias = (np.asarray(v, np.float64) for v in model.layers[0].get_weights())
    (k, step), *_ = around.steps.items()
    z = points @ kernel + bias
    # Two units that are never so small together: the smallest sum, halved between them.
    pairs = list(itertools.combinations(step.columns, 2))
    a, b = max(pairs, key=lambda p: np.min(z[:, p[0]] + z[:, p[1]]) - step.low[0, list(p)].sum())
    middle = np.min(z[:, a] + z[:, b]) - 0.3
    share = middle - step.low[0, [a, b]].sum()
    assert share > 0.1
    low, high = step.low.copy(), step.high.copy()
    high[0, a], high[0, b] = step.low[0, a] + share / 2, step.low[0, b] + share / 2
    others = [u for u in step.columns if u not in (a, b)]
    low[0, others] = np.maximum(low[0, others], 0.0)
    own = Elementwise(step.operation, step.center.reshape(1, -1), low, high, columns=step.columns)
    leaves = Leaves(around, {k: step.columns})
    row, need, target = np.array([[1.0, 0.0, 0.0]]), np.array([1e3]), around.flow.output
    best = -np.inf
    region = around.region
    for weights, multipliers, _ in leaves.solve(row, need, region.low, region.high, {k: own}):
        c = weights[:, None] * row
        found = around.lower(c, target, multipliers, split={k: own}) - weights @ need
        best = max(best, found[0])
    # Outputs are below 10³ by far: nothing but emptiness proves y ≥ 10³.
    assert best > 0


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
        found = tfl.verify_property(model, region, property, timeout=100)
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
    label = int(np.argmax(model.predict(x[None], verbose=0)))
    near = Region.ball(x, 0.01, "linf", bounds=(0, 1))
    far = Region.box(np.zeros((5, 5, 1)) - 3, np.ones((5, 5, 1)) + 3)
    property = Property.classified_as(label)
    assert tfl.verify_property(model, near, property).is_proved
    found = tfl.verify_property(model, far, property)
    assert found.is_refuted
    assert int(np.argmax(model.predict(found.counterexample.x[None], verbose=0))) != label
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
            model, region, property, branching=branching, timeout=60, seed=seed
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
        found = tfl.verify_property(model, region, property, timeout=60)
        assert found.status == "UNKNOWN" and -1e-9 < found.bound <= 0 == found.least
        # What is left is a matter of rounding, and not split any more.
        assert found.branches < 1000 and found.open > 0


def test_a_point_that_the_format_does_not_hold_is_no_counterexample():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2)])
    model.layers[0].set_weights([np.array([[0.0, 1.0]]), np.zeros(2)])
    point = np.array([0.1])  # between two numbers of float32
    found = tfl.verify_property(
        model, Region.box(point, point), Property.classified_as(0), timeout=60
    )
    assert found.status == "UNKNOWN" and found.least == pytest.approx(-0.1)
    wider = Region.box(point - 1e-8, point + 1e-8)
    found = tfl.verify_property(model, wider, Property.classified_as(0), timeout=60)
    assert found.is_refuted and wider.low <= found.counterexample.x.astype(float) <= wider.high


def test_time_that_is_up_leaves_unknown_with_a_bound():
    model, rng = perceptron(6, (30, 30, 30), seed=0), np.random.default_rng(0)
    region, row = Region.ball(rng.normal(size=6), 2.0, "linf"), rng.normal(size=3)
    outputs = exact(model, rng.uniform(region.low, region.high, (20000, 6)))
    property = Property.linear(row, (outputs @ row).max() + 1.0)
    for branching in verifying.BRANCHING:
        found = tfl.verify_property(model, region, property, timeout=0.3, branching=branching)
        assert found.status in ("UNKNOWN", "PROVED", "REFUTED")
        assert found.timeout == 0.3 and found.bound <= property.resolved(3).margin(outputs).min()
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


def test_the_class_of_a_probability_that_does_not_end_with_a_sigmoid_is_refused():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, activation="hard_sigmoid")])
    model.set_weights([np.ones((1, 1)), np.zeros(1)])
    with pytest.raises(UnsupportedLayerError, match="as a probability is"):
        tfl.verify_property(model, Region.ball(np.array([-1.0]), 0.5), Property.classified_as(1))


@pytest.mark.parametrize("seed", range(6))
def test_sets_whose_rows_cancel_are_not_missed_where_one_point_lies_in_them(seed):
    rng = np.random.default_rng(seed)
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, kernel_initializer="identity", use_bias=False)]
    )
    x = np.float32(1000 * (1 + rng.random(3))).astype(float)
    rows = rng.normal(size=(4, 3)) * 10.0 ** rng.uniform(0, 6)
    rows -= np.outer(rows @ x, x) / (x @ x)
    rows[-1] = -(rng.random(3) @ rows[:-1])
    # x itself lies in the set: its rows' exact values, rounded up.
    exact = [sum(Fraction(a) * Fraction(b) for a, b in zip(row, x, strict=True)) for row in rows]
    bounds = np.nextafter([float(v) for v in exact], np.inf)
    assert all(v <= Fraction(float(b)) for v, b in zip(exact, bounds, strict=True))
    found = tfl.verify_property(
        model, Region.box(x - 1, x + 1), Property.avoids(rows, bounds), branching="units", timeout=1
    )
    assert found.status != "PROVED"
