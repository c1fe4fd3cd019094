"""Bounds against exact enumeration, plain CROWN, windows against whole rows, and local gains."""

import importlib.util
import pathlib
from fractions import Fraction

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.local import boxes
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.boxes import CROWN, Effort, Memory, surround
from tf_lyapunov.local.branching import split_lower
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.radii import Prover
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program.network import read_network

PATH = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "local.py"


def perceptron(inputs=2, widths=(5, 4), seed=0):
    model = keras.Sequential([keras.Input((inputs,))])
    for width in widths:
        model.add(layers.Dense(width, activation="relu"))
    model.add(layers.Dense(3))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    return model


def plain_crown():
    spec = importlib.util.spec_from_file_location("local_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bound(flow, region, rows, effort):
    around = surround(flow, trace(flow, region.center), region, effort)
    multipliers, _ = tried(around, rows, flow.output, trials=effort.margin_trials)
    if effort.margin_steps:
        ascend(around, rows, flow.output, multipliers, effort.margin_steps)
    return around.lower(rows, flow.output, multipliers)


def exact_minimum(weights, center, radius, row):
    """Smallest row·f on a disc, from the minimum of every linear region's cell by a fine search.

    f is linear on cells; its minimum over a disc lies on the circle, at a vertex of two kinks or at
    a kink's point on a line: a grid of the disc refined around its best points finds it.
    """
    best, step = np.inf, radius
    at = np.zeros((1, 2))
    for _ in range(9):
        grid = np.stack(np.meshgrid(*[np.linspace(-step, step, 61)] * 2), -1).reshape(-1, 2)
        points = (at[:, None] + grid[None]).reshape(-1, 2)
        points *= np.minimum(1, radius / np.maximum(np.linalg.norm(points, axis=1), 1e-12))[:, None]
        z = points + center
        for w, b in weights[:-1]:
            z = np.maximum(z @ w + b, 0)
        value = z @ weights[-1][0] @ row + weights[-1][1] @ row
        order = np.argsort(value)[:8]
        at, step, best = points[order], step / 8, min(best, value[order[0]])
    return best


@pytest.mark.parametrize("seed", range(4))
def test_bounds_in_two_dimensions_lie_below_the_exact_minimum_and_near_it(seed):
    model, rng = perceptron(seed=seed), np.random.default_rng(seed)
    flow = flow_of(read_network(model))
    weights = [[np.asarray(v, np.float64) for v in k.get_weights()] for k in model.layers]
    center, rows = rng.normal(size=2), rng.normal(size=(3, 3))
    for radius in (0.2, 1.0):
        found = bound(flow, Region.ball(center, radius), rows, Effort(6, margin_steps=30))
        exact = np.array([exact_minimum(weights, center, radius, row) for row in rows])
        at_center = trace(flow, center).values[-1][0] @ rows.T
        assert np.all(found <= exact + 1e-9)
        # What the relaxation loses is a part of what the function moves.
        assert np.all(exact - found <= 0.5 * (at_center - exact) + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_contains_plain_crown_and_exceeds_it(seed):
    module = plain_crown()
    model, rng = perceptron(6, (12, 10), seed), np.random.default_rng(seed)
    flow = flow_of(read_network(model))
    center, rows = rng.normal(size=6), rng.normal(size=(4, 3))
    matrices = module.matrices(flow, center)
    for radius in (0.1, 0.5, 1.5):
        region = Region.ball(center, radius)
        crown = module.crown_margins(matrices, center, radius, rows)
        searched = bound(flow, region, rows, Effort(6, margin_steps=30))
        size = np.maximum(np.abs(crown), 1.0)
        # Tighter boxes may make CROWN choose another line: it is not monotone itself.
        assert np.all(searched >= crown - 1e-4 * size)
        assert radius < 1 or np.mean((searched - crown) / size) > 0.02
        # Without balls and search, only the choice of the lower line differs.
        assert np.all(bound(flow, region, rows, CROWN) >= crown - 0.35 * size)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_windows_give_the_boxes_of_whole_rows(norm, monkeypatch):
    model = keras.Sequential(
        [
            keras.Input((12, 12, 2)),
            layers.Conv2D(3, 3, strides=2, padding="same", activation="relu"),
            layers.Rescaling(0.9, 0.1),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Conv2D(4, 2, activation="relu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    flow = flow_of(read_network(model))
    x = np.random.default_rng(0).uniform(size=(12, 12, 2))
    region = Region.ball(x, 0.1 if norm == "linf" else 0.8, norm, bounds=(0, 1))
    traced = trace(flow, x)
    source = 5
    found = surround(flow, traced, region, CROWN)
    assert boxes.Windows(flow, traced, source).applies and source in found.tightened
    monkeypatch.setattr(boxes.Windows, "_plan", lambda self, traced: False)
    whole = surround(flow, traced, region, CROWN)
    for mine, theirs in zip(found.box(source), whole.box(source), strict=True):
        # Multipliers of the region's ball and box are searched on each their own.
        assert np.allclose(mine, theirs, atol=2e-3 * np.ptp(theirs))


def test_output_bounds_hold_and_are_attained_by_a_linear_model():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    region = Region.box(np.array([-1.0, 0.0, 2.0]), np.array([1.0, 0.5, 3.0]))
    found = tfl.output_bounds(model, region, np.array([[1.0, -1.0]]))
    kernel, bias = (np.asarray(v, np.float64) for v in model.get_weights())
    w, b = kernel[:, 0] - kernel[:, 1], bias[0] - bias[1]
    assert found.lower[0] == pytest.approx(b + np.minimum(w * region.low, w * region.high).sum())
    assert found.upper[0] == pytest.approx(b + np.maximum(w * region.low, w * region.high).sum())
    low, high = found.steps["dense"] if "dense" in found.steps else next(iter(found.steps.values()))
    assert low.shape == (2,) and np.all(low <= high)


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", np.inf)])
def test_local_gains_exceed_every_slope_and_are_exact_where_nothing_switches(norm, order):
    model, rng = perceptron(4, (8, 6), seed=1), np.random.default_rng(0)
    weights = [[np.asarray(v, np.float64) for v in k.get_weights()] for k in model.layers]
    x = rng.normal(size=(2, 4))

    def jacobian(point):
        z, matrix = point, np.eye(4)
        for w, b in weights[:-1]:
            z = z @ w + b
            matrix, z = matrix @ w * (z > 0), np.maximum(z, 0)
        return (matrix @ weights[-1][0]).T

    for radius in (1e-6, 0.5):
        found = tfl.gain_on(model, x, radius, norm=norm)
        for point, gain in zip(x, found, strict=True):
            moves = rng.normal(size=(300, 4))
            moves *= radius / np.linalg.norm(moves, order, axis=1)[:, None]
            slopes = [np.linalg.norm(jacobian(point + m), order) for m in moves]
            assert max(slopes) <= gain * (1 + 1e-9)
            assert radius > 1e-3 or gain <= max(slopes) * (1 + 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Region.ball(np.array([np.nan]), 1.0),
        lambda: Region.ball(np.zeros(2), np.nan),
        lambda: Region.ball(np.zeros(2), -1.0),
        lambda: Region.ball(np.zeros(2), 1.0, bounds=(1, 2)),
        lambda: Region.ball(np.zeros(2), 1.0, "l7"),
        lambda: Region.ball(np.zeros(2), np.inf),
        lambda: Region.box(np.ones(2), np.zeros(2)),
    ],
)
def test_regions_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match="Received"):
        make()


@pytest.mark.parametrize("seed", range(3))
def test_splits_of_units_tighten_bounds_and_stay_below_samples(seed):
    model, rng = perceptron(4, (8, 6), seed), np.random.default_rng(seed)
    network = read_network(model)
    flow, center, rows = flow_of(network), rng.normal(size=4), rng.normal(size=(3, 3))
    around = surround(flow, trace(flow, center), Region.ball(center, 1.0), Effort(6))
    multipliers, _ = tried(around, rows, flow.output)
    ascend(around, rows, flow.output, multipliers, 60)
    whole = around.lower(rows, flow.output, multipliers)
    found, _ = split_lower(around, rows, multipliers, 5, 60)
    moves = rng.normal(size=(20000, 4))
    moves /= np.maximum(np.linalg.norm(moves, axis=1), 1.0)[:, None]
    values = network.program.logits(center + moves) @ rows.T
    assert np.all(values.min(axis=0) >= found)
    gaps = values.min(axis=0) - whole, values.min(axis=0) - found
    assert np.all(gaps[1] <= gaps[0] + 1e-9) and gaps[1].sum() < 0.95 * gaps[0].sum()


@pytest.mark.parametrize("seed", range(3))
def test_splits_searched_on_the_reduced_flow_in_single_precision_are_as_good(seed):
    inner, rng = perceptron(20, (8, 6), seed), np.random.default_rng(seed)
    model = keras.Sequential([keras.Input((4, 5)), layers.Flatten(), *inner.layers])
    flow = flow_of(read_network(model))
    center, rows = rng.normal(size=(4, 5)), rng.normal(size=(1, 3))
    prover, region, memory = Prover(flow), Region.ball(center, 1.0), Memory()
    traced = trace(flow, center)
    surround(flow, traced, region, Effort(6), memory)
    around = surround(flow, traced, region, Effort(6), memory, proof=True)
    finder = prover._finder(prover.search.trace(traced), region, memory)
    assert finder.values[0].size < center.size and finder.dtype == np.float32
    multipliers, _ = tried(around, rows, flow.output)
    common = around, rows, multipliers, 5
    best, none = (split_lower(*common, steps)[0][0] for steps in (60, 0))
    (found,), _ = split_lower(*common, 60, finder)
    assert none < best and found > best - 0.01 * (best - none)
    # No step is made beyond a level that is enough.
    (early,), _ = split_lower(*common, 60, finder, stop=(best + none) / 2)
    assert (best + none) / 2 - 1e-5 < early < max(best, found)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_hidden_steps_hold_in_exact_arithmetic(seed):
    rng = np.random.default_rng(seed)
    model = keras.Sequential(
        [keras.Input((7,)), layers.Dense(40, name="sums"), layers.ReLU(), layers.Dense(2)]
    )
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    region = Region.ball(rng.normal(size=7), 0.37, "linf")
    low, high = tfl.output_bounds(model, region).steps["sums"]
    kernel, bias = model.layers[0].get_weights()
    for j in range(40):
        ends = [Fraction(float(bias[j]))] * 2
        for i in range(7):
            w = Fraction(float(kernel[i, j]))
            parts = [w * Fraction(float(v[i])) for v in (region.low, region.high)]
            ends = [ends[0] + min(parts), ends[1] + max(parts)]
        assert Fraction(float(low[j])) <= ends[0] and ends[1] <= Fraction(float(high[j]))
        # Intervals are widened by 10⁻⁹ of their size.
        assert max(ends[0] - Fraction(float(low[j])), Fraction(float(high[j])) - ends[1]) < 1e-7
