"""Bounds over many boxes at once lie below every value in them, and meet where boxes are small."""

from fractions import Fraction

import keras
import numpy as np
import pytest
from keras import layers

from tf_lyapunov.layers import L2NormPooling2D
from tf_lyapunov.local.boxes import CROWN, Memory, surround
from tf_lyapunov.local.domains import Domains
from tf_lyapunov.local.evaluating import Evaluation
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.lines import lines_of
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program.families.elementwise import FUNCTIONS, Elementwise
from tf_lyapunov.program.network import read_network
from tf_lyapunov.theory.sectors import Sector


def dense(activation, seed=0):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(8, activation=activation),
            layers.Dense(6, activation=activation),
            layers.Dense(2),
        ]
    )
    return randomised(model, seed)


def residual():
    x = keras.Input((6, 6, 1))
    a = layers.Conv2D(3, 3, padding="same", activation="relu")(x)
    b = layers.Conv2D(3, 3, padding="same")(a)
    y = layers.ReLU()(layers.Add()([a, b]))
    y = layers.Concatenate()([layers.MaxPooling2D(2)(y), layers.AveragePooling2D(2)(y)])
    return randomised(keras.Model(x, layers.Dense(2)(layers.Flatten()(y))), 1)


def pooled():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(2, 3),
            layers.MaxPooling2D(2),
            layers.LeakyReLU(negative_slope=0.1),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    return randomised(model, 2)


def curved(*inner):
    """A hidden part of layers whose outputs depend on several inputs each."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(6), *inner, layers.Dense(2)])
    return randomised(model, 4)


def norms():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(4, 2),
            layers.GroupNormalization(2),
            L2NormPooling2D(2, strides=1),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    return randomised(model, 5)


def first(*stack):
    """An activation of the input itself, behind as many outputs as there are inputs."""
    return randomised(keras.Sequential([keras.Input((3,)), *stack]), 6)


def ended(layer):
    x = keras.Input((3,))
    y = layers.Dense(4, activation="relu")(x)
    z = layers.Dense(4)(x)
    return randomised(keras.Model(x, layer(y, z)), 3)


def randomised(model, seed):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        fan = max(int(np.prod(weight.shape[:-1])), 1)
        weight.assign(rng.normal(size=weight.shape) * 1.5 / np.sqrt(fan))
    return model


MODELS = {
    "relu": lambda: dense("relu"),
    "tanh": lambda: dense("tanh"),
    "gelu": lambda: dense("gelu"),
    "relu6": lambda: dense("relu6"),
    "elu": lambda: dense("elu"),
    "input first": lambda: first(layers.ReLU(), layers.Dense(3, "relu"), layers.Dense(3)),
    "residual": residual,
    "pooled": pooled,
    "normalised": lambda: curved(layers.LayerNormalization(), layers.ReLU(), layers.Dense(4)),
    "root mean square": lambda: curved(layers.RMSNormalization(), layers.Activation("tanh")),
    "softmax inside": lambda: curved(layers.Softmax(), layers.Dense(4), layers.ReLU()),
    "log-softmax": lambda: curved(layers.Activation("log_softmax")),
    "norms": norms,
    "softmax": lambda: ended(lambda y, z: layers.Softmax()(layers.Add()([y, z]))),
    "maximum": lambda: ended(lambda y, z: layers.Maximum()([y, z])),
}
REGIONS = {
    "box": lambda x: Region.ball(x, 0.4, "linf"),
    "l2": lambda x: Region.ball(x, 0.6),
    "cut": lambda x: Region.ball(x, 0.6, bounds=(-1.5, 0.7)),
    "l1": lambda x: Region.ball(x, 0.9, "l1"),
}


def setting(name, kind, seed=0):
    model, rng = MODELS[name](), np.random.default_rng(seed)
    flow = flow_of(read_network(model), decision=True)
    center = np.clip(rng.normal(size=model.input_shape[1:]) * 0.5, -1.2, 0.6)
    region = REGIONS[kind](center)
    memory, traced = Memory(), trace(flow, center)
    surround(flow, traced, region, CROWN, memory)
    around = surround(flow, traced, region, CROWN, memory, proof=True)
    return flow, region, Domains(around), rng


def parts(domains, region, count, rng, size):
    """Random boxes within the reach of a region."""
    reach = region.reach().ravel()
    low, high = domains.center - reach, domains.center + reach
    low, high = np.maximum(low, region.low.ravel()), np.minimum(high, region.high.ravel())
    ends = np.sort(rng.uniform(low, high, (2, count, len(low))), axis=0)
    middle = ends.mean(axis=0)
    return middle + size * (ends[0] - middle), middle + size * (ends[1] - middle)


def inside(region, points):
    away = (points - region.center).reshape(len(points), -1)
    return (np.linalg.norm(away, axis=1) <= region.radius) & (
        np.abs(away).sum(axis=1) <= region.radius_l1
    )


def values(flow, x):
    return Evaluation(flow, x).outputs


@pytest.mark.parametrize("kind", REGIONS)
@pytest.mark.parametrize("name", MODELS)
def test_no_sample_of_a_domain_lies_below_its_bound(name, kind):
    flow, region, domains, rng = setting(name, kind)
    outputs = int(np.prod(domains.shapes[-1]))
    rows = np.concatenate([rng.normal(size=(2, outputs)), np.eye(outputs)[:1]])
    low, high = parts(domains, region, 6, rng, 1.0)
    boxes = dict.fromkeys(domains.kept)
    wanted = np.ones((6, 3), bool)
    wanted[1, 2] = False
    lower = domains.bound(low, high, boxes, rows, wanted, lambda: None).lower
    # What was not asked for is not bounded, unless the domain is seen to be empty.
    assert lower.shape == (6, 3) and not np.isfinite(lower[1, 2])
    tested = 0
    for i in range(6):
        points = rng.uniform(low[i], high[i], (300, low.shape[1]))
        points[:40] = np.where(rng.integers(0, 2, (40, low.shape[1])), low[i], high[i])
        points = points.reshape(-1, *region.center.shape)
        points = points[inside(region, points)]
        if len(points):
            tested += 1
            assert np.all(values(flow, points) @ rows.T >= lower[i] - 1e-12)
    assert tested or kind in ("l1", "l2", "cut")


@pytest.mark.parametrize("name", MODELS)
def test_bounds_of_small_domains_meet_the_function(name):
    flow, region, domains, rng = setting(name, "box")
    outputs = int(np.prod(domains.shapes[-1]))
    rows = rng.normal(size=(2, outputs))
    gaps = []
    for size in (1e-1, 1e-2, 1e-3):
        low, high = parts(domains, region, 4, np.random.default_rng(5), size)
        boxes = dict.fromkeys(domains.kept)
        wanted = np.ones((4, 2), bool)
        lower = domains.bound(low, high, boxes, rows, wanted, lambda: None).lower
        middle = (low / 2 + high / 2).reshape(-1, *region.center.shape)
        gap = values(flow, middle) @ rows.T - lower
        assert np.all(gap >= -1e-9)
        gaps.append(gap.max())
    # Bounds of a Lipschitz function converge linearly at least.
    assert gaps[2] < 0.05 * gaps[0] and gaps[2] < 0.02


def test_boxes_of_a_domain_carry_over_to_its_parts():
    _, region, domains, rng = setting("relu", "box")
    rows, low, high = np.eye(2), *parts(domains, region, 1, rng, 1.0)
    boxes, wanted = dict.fromkeys(domains.kept), np.ones((1, 2), bool)
    whole = domains.bound(low, high, boxes, rows, wanted, lambda: None).lower
    halves = [np.concatenate([v, v]) for v in (low, high)]
    middle = (low[0, 0] + high[0, 0]) / 2
    halves[1][0, 0], halves[0][1, 0] = middle, middle
    inherited = {k: tuple(np.concatenate([v, v]) for v in boxes[k]) for k in domains.kept}
    wanted = np.ones((2, 2), bool)
    found = domains.bound(*halves, inherited, rows, wanted, lambda: None).lower
    for k in domains.kept:
        assert np.all(inherited[k][0] >= boxes[k][0] - 1e-12)
        assert np.all(inherited[k][1] <= boxes[k][1] + 1e-12)
    assert np.all(found.min(axis=0) >= whole[0] - 0.05 * np.abs(whole[0]))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "linear"])
def test_lines_enclose_every_activation_on_every_interval(name):
    rng = np.random.default_rng(len(name))
    low = rng.uniform(-6, 4, (5, 9))
    high = low + 10.0 ** rng.uniform(-4, 1, low.shape)
    low[0, 0], high[0, 0] = -1.0, -1.0
    lines = lines_of(Elementwise(name, (), Sector(-2.0, 2.0)), low, high, (9,))
    t = low + (high - low) * np.linspace(0, 1, 101)[:, None, None]
    value = FUNCTIONS[name](t)
    shift = 0.0 if lines.low_shift is None else lines.low_shift
    assert np.all(value >= lines.low_slope * t + shift - 1e-12)
    assert np.all(value <= lines.high_slope * t + lines.high_shift + 1e-12)
    # Both touch the function, up to what cells between knots miss.
    off = (value - lines.low_slope * t - shift).min(axis=0)
    assert np.all(off <= 0.02 + 0.15 * (high - low))


@pytest.mark.parametrize("name", ["relu", "relu6", "residual", "pooled"])
def test_units_begin_with_their_own_row_of_the_matrix(name, monkeypatch):
    _, region, domains, rng = setting(name, "box")
    low, high = parts(domains, region, 4, rng, 1.0)
    box, lines, _, _ = domains.propagated(low, high, dict.fromkeys(domains.kept), lambda: None)
    for target in domains.kept:
        at = rng.integers(0, len(domains.whole[target][0]), 9)
        own = np.sort(rng.integers(0, 4, 9))
        found, slopes = domains._units(at, own, target, box, lines)
        c = np.eye(len(domains.whole[target][0]))[at]
        plain, steep = domains.lower(np.concatenate([c, -c]), own, target, box, lines)
        size = np.abs(domains.whole[target]).max()
        assert np.allclose(found, plain, rtol=0, atol=1e-12 * size)
        assert np.allclose(slopes, steep, rtol=0, atol=1e-12 * np.abs(steep).max())


@pytest.mark.parametrize("scale", [1.0, 1e8])
def test_bounds_at_single_points_lie_below_the_exact_value(scale):
    """Where boxes have no width only rounding is left, of numbers that cancel."""
    flow, region, domains, rng = setting("relu", "box")
    low, _ = parts(domains, region, 20, rng, 1.0)
    rows = rng.normal(size=(3, 2)) * scale
    rows[2] = rows[0] * (1 + 2.0**-40)
    rows = np.concatenate([rows, rows[:1] - rows[2:]])
    boxes, wanted = dict.fromkeys(domains.kept), np.ones((20, 4), bool)
    found = domains.bound(low, low.copy(), boxes, rows, wanted, lambda: None).lower
    for x, lower in zip(low, found, strict=True):
        y = exactly(flow, x)
        for row, value in zip(rows, lower, strict=True):
            exact = sum(Fraction(float(a)) * b for a, b in zip(row, y, strict=True))
            assert Fraction(float(value)) <= exact
            assert float(exact) - value <= 1e-9 * np.abs(row).sum()


def exactly(flow, x):
    """The function of dense layers and ReLUs in rational numbers."""
    x = [Fraction(float(v)) for v in x]
    for link in flow.links:
        if hasattr(link.operation, "kernel"):
            kernel, bias = link.operation.kernel, link.operation.bias
            x = [
                sum(Fraction(float(w)) * v for w, v in zip(column, x, strict=True))
                + Fraction(float(b))
                for column, b in zip(kernel.T, bias, strict=True)
            ]
        else:
            x = [max(v, Fraction(0)) for v in x]
    return x


def test_a_box_that_all_rows_share_bounds_them_below_their_exact_minimum():
    flow, region, domains, rng = setting("relu", "box")
    kernel = flow.links[0].operation.kernel
    low, high = parts(domains, region, 1, rng, 1.0)
    c = rng.normal(size=(30, 3)) * 10.0 ** rng.integers(-8, 8, (30, 1))
    own = domains._at_input(c, np.zeros(30, int), low, high)
    assert kernel.shape[0] == 3
    center = domains.center
    for row, value in zip(c, own, strict=True):
        terms = [
            Fraction(float(a)) * (Fraction(float(start if a > 0 else end)) - Fraction(float(m)))
            for a, start, end, m in zip(row, low[0], high[0], center, strict=True)
        ]
        # What `lower` takes off for the input alone.
        lost = domains.rounding * float(np.abs(row) @ domains.sizes[0])
        assert Fraction(float(value - lost)) <= sum(terms)
        assert abs(float(sum(terms)) - value) <= 2 * lost
