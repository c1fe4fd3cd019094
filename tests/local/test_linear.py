"""Bounds around inputs: no sample, vertex or attack lies below one, on graphs of every kind."""

import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_lyapunov.certification import (
    Certificate,
    certify,
    lipschitz_upper_bound,
    read_network,
)
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.boxes import CROWN, Effort, surround
from tf_lyapunov.local.flow import flow_of, trace
from tf_lyapunov.local.linear import linear_radii
from tf_lyapunov.local.outputs import gain_on, output_bounds
from tf_lyapunov.local.radii import Answer, Prover
from tf_lyapunov.local.regions import Region
from tf_lyapunov.verification import verify

EFFORT = Effort(box_steps=2, margin_steps=6)


def dense(activation="relu"):
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation=activation),
            layers.Dense(5, activation=activation),
            layers.Dense(3),
        ]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, strides=2, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(2, activation="leaky_relu"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(4, activation="tanh"),
            layers.Dense(3, activation="softmax"),
        ]
    )


def residual():
    x = keras.Input((4,))
    h = layers.Dense(4, activation="relu")(x)
    h = layers.Add()([x, layers.Dense(4)(h)])
    h = layers.Concatenate()([layers.ReLU(max_value=1.0)(h), 2.0 * h])
    return keras.Model(x, layers.Dense(3)(h))


def pooled():
    return keras.Sequential(
        [
            keras.Input((5, 5, 1)),
            layers.Conv2D(2, 3, padding="same", activation="gelu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(4, activation="relu"),
            layers.Dense(3),
        ]
    )


def extremes():
    x = keras.Input((4,))
    a, b = layers.Dense(4)(x), layers.Dense(4)(x)
    h = layers.Maximum()([a, b])
    h = layers.Softmax()(layers.Dense(4, activation="silu")(h)) + layers.Minimum()([a, h])
    return keras.Model(x, layers.Dense(3)(ops.abs(h)))


def parametric():
    return keras.Sequential(
        [
            keras.Input((3, 2)),
            layers.Dense(4),
            layers.PReLU(alpha_initializer="uniform"),
            layers.Conv1D(3, 2, activation="softplus"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )


MODELS = [dense, convolutional, residual, pooled, extremes, parametric]


def scrambled(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "variance" not in weight.path and "seed" not in weight.path:
            fan = max(int(np.prod(weight.shape[:-1])), 1)
            weight.assign(rng.normal(size=weight.shape) * 1.5 / np.sqrt(fan))
    return model


def regions(x, radius):
    yield Region.ball(x, radius)
    yield Region.ball(x, radius / 3, norm="linf")
    yield Region.ball(x, radius, norm="l1")
    yield Region.ball(x, radius, bounds=(x.min() - 0.05, x.max() + 0.05))


def samples(region, rng, count=4000):
    """Points of a region, many of them at its edge."""
    shape = region.center.shape
    step = rng.normal(size=(count, *shape)) * rng.integers(0, 2, size=(count, *shape))
    step[: count // 2] = np.sign(step[: count // 2]) * (rng.random((count // 2, *shape)) < 0.5)
    flat = step.reshape(count, -1)
    size = np.full(count, np.inf)
    if np.isfinite(region.radius):
        size = region.radius / np.maximum(np.linalg.norm(flat, axis=1), 1e-300)
    elif np.isfinite(region.radius_l1):
        size = region.radius_l1 / np.maximum(np.abs(flat).sum(axis=1), 1e-300)
    else:
        size = region.reach().max() / np.maximum(np.abs(flat).max(axis=1), 1e-300)
    size = size * (1 - 1e-9) * np.where(rng.random(count) < 0.7, 1.0, rng.random(count))
    moved = region.center + (flat * size[:, None]).reshape(step.shape)
    return np.clip(moved, region.low, region.high)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("effort", [EFFORT, CROWN], ids=["searched", "crown"])
def test_no_point_of_a_region_gives_less_than_the_bound(build, effort):
    model = scrambled(build())
    network = read_network(model, bounded=True)
    flow, rng = flow_of(network), np.random.default_rng(1)
    x = rng.normal(size=model.inputs[0].shape[1:])
    traced = trace(flow, x)
    rows = rng.normal(size=(5, 3))
    for region in regions(x, 0.4):
        around = surround(flow, traced, region, effort)
        multipliers, _ = tried(around, rows, flow.output, trials=effort.margin_trials)
        ascend(around, rows, flow.output, multipliers, effort.margin_steps)
        bound = around.lower(rows, flow.output, multipliers)
        values = network.program.logits(samples(region, rng)) @ rows.T
        assert np.all(values.min(axis=0) >= bound)
        # The bound is about this region: it lies near what a search finds.
        scale = np.ptp(values, axis=0).max()
        assert np.all(values.min(axis=0) - bound < 60 * scale)


@pytest.mark.parametrize("build", MODELS)
def test_every_signal_stays_in_its_box_and_its_ball(build):
    model = scrambled(build(), seed=2)
    flow = flow_of(read_network(model))
    rng = np.random.default_rng(0)
    x = rng.normal(size=model.inputs[0].shape[1:])
    region = Region.ball(x, 0.3)
    traced = trace(flow, x)
    around = surround(flow, traced, region, EFFORT)
    for point in samples(region, rng, 200):
        found = trace(flow, point).values
        for k, value in enumerate(found):
            low, high = around.box(k)
            room = 1e-9 * (1 + np.abs(value))
            assert np.all(low - room <= value) and np.all(value <= high + room)
            moved = np.linalg.norm(value - traced.values[k])
            assert moved <= around.radii[k] * (1 + 1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("build", [dense, residual])
def test_radii_hold_against_samples_and_exceed_those_of_gains(build, norm):
    model = scrambled(build(), seed=3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *model.inputs[0].shape[1:])).astype("float32")
    plain = certify(model, x, norm=norm)
    proof = certify(model, x, method="linear", norm=norm)
    assert np.all(proof.radius >= plain.radius) and np.all(proof.radius > 1.1 * plain.radius)
    program = read_network(model, bounded=False).program
    for point, label, radius in zip(x, proof.labels, proof.radius, strict=True):
        region = Region.ball(point.astype(np.float64), radius, norm)
        assert np.all(np.argmax(program.logits(samples(region, rng)), axis=1) == label)


def test_the_norm_is_kept_and_said():
    model = scrambled(dense())
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    proof = certify(model, x, method="linear", norm="linf", bounds=(-10, 10))
    assert "l∞ norm" in proof.explain() and "-10.0 to 10.0" in proof.explain()
    copy = Certificate.from_json(proof.to_json())
    assert copy.norm == "linf" and np.array_equal(copy.radius, proof.radius)


def test_bounds_of_valid_inputs_enlarge_radii():
    model = scrambled(dense(), seed=5)
    x = np.random.default_rng(0).uniform(size=(3, 4)).astype("float32")
    free = certify(model, x, method="linear").radius
    cut = certify(model, x, method="linear", bounds=(0, 1)).radius
    assert np.all(cut >= free * 0.98) and np.any(cut > free * 1.05)


def test_the_search_starts_within_the_bounds():
    """At an input where nothing moves the linearisation knows no radius."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, "relu"), layers.Dense(1)])
    model.set_weights([np.ones((1, 1)), np.array([-0.5]), np.full((1, 1), -4.0), np.ones(1)])
    x = np.zeros((1, 1), "float32")
    found = certify(model, x, method="linear", bounds=(-1, 1)).radius[0]
    assert 0.7 < found <= 0.75  # 1 - 4·relu(x - 1/2) is zero at 3/4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"norm": "l3"}, "norm"),
        ({"bounds": (1, 0)}, "low ≤ high"),
        ({"bounds": (0, np.nan)}, "low ≤ high"),
        ({"bounds": 3}, "pair"),
        ({"bounds": (5, 6)}, "within `bounds`"),
        ({"bounds": (np.zeros((4, 4)), 1)}, "shape of one input"),
        ({"bounds": (0, np.ones(3))}, "shape of one input"),
    ],
)
def test_wrong_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        certify(scrambled(dense()), np.zeros((1, 4)), method="linear", **settings)


def test_bounds_of_one_sample_fit_the_inputs_and_the_file(tmp_path):
    model, x = scrambled(dense()), np.full((1, 4), 0.5, "float32")
    proof = certify(model, x, method="linear", bounds=(np.zeros((1, 4)), 1))
    assert proof.radius == certify(model, x, method="linear", bounds=(0, 1)).radius
    proof.save(tmp_path / "proof.npz")
    assert verify(tmp_path / "proof.npz", model)
    with pytest.raises(ValueError, match="shape of its centre"):
        Region(np.zeros(2), np.zeros((2, 2)), np.ones(2))


def steps(inner):
    x = keras.Input((2, 3))
    h = layers.Flatten()(layers.TimeDistributed(inner)(x))
    return scrambled(keras.Model(x, layers.Dense(2)(layers.Dense(4, "relu")(h))), seed=1)


def shortcut():
    x = keras.Input((3,))
    return keras.Model(x, layers.Add()([x, layers.Dense(3, activation="tanh")(x)]))


@pytest.mark.parametrize("inner", [lambda: layers.Dense(2, activation="relu"), shortcut])
def test_time_steps_pass_their_ball_together(inner):
    model = steps(inner())
    x = np.random.default_rng(0).normal(size=(2, 3))
    region = Region.ball(x, 0.3)
    found = output_bounds(model, region)
    values = ops.convert_to_numpy(
        model(samples(region, np.random.default_rng(1)).astype("float32"))
    )
    assert np.all(values >= found.lower - 1e-6) and np.all(values <= found.upper + 1e-6)
    plain = certify(model, x[None], method="composition").radius[0]
    assert certify(model, x[None], method="auto", time_budget=5).radius[0] >= plain > 0
    gain = float(np.max(lipschitz_upper_bound(model).gain_upper_bound))
    assert 0 < gain_on(model, x[None], 0.3)[0] <= gain * (1 + 1e-6)


def test_a_chain_that_stays_linear_is_bounded_exactly():
    """Where no unit switches the bound is attained, in every norm."""
    model = scrambled(dense())
    model.layers[0].bias.assign(np.full(6, 100.0))
    model.layers[1].kernel.assign(np.abs(model.layers[1].kernel))
    model.layers[1].bias.assign(np.full(5, 100.0))
    x = np.random.default_rng(0).normal(size=4)
    flow = flow_of(read_network(model))
    w = [np.asarray(layer.kernel, np.float64) for layer in model.layers]
    matrix = w[0] @ w[1] @ w[2]
    for norm, dual in (("l2", 2), ("linf", 1), ("l1", np.inf)):
        region = Region.ball(x, 0.5, norm)
        around = surround(flow, trace(flow, x), region, EFFORT)
        found = around.lower(np.eye(3), flow.output, {})
        exact = around.trace.values[-1][0] - 0.5 * np.linalg.norm(matrix, dual, axis=0)
        assert np.allclose(found, exact, rtol=1e-9) and np.all(found <= exact)


def test_splits_of_units_take_no_time_of_later_inputs(monkeypatch):
    seen = []

    def noted(self, *_, deadline, split_deadline, **__):
        seen.append((split_deadline, deadline))
        return Answer(0.0)

    monkeypatch.setattr(Prover, "radius", noted)
    network, end = read_network(dense()), time.monotonic() + 1000
    x, labels, none = np.ones((4, 4)), np.zeros(4, int), np.zeros(4)
    linear_radii(network, x, labels, 3, none, lambda i, r: 0.0, deadline=end)
    shares = np.array([end - share for share, _ in seen])
    assert np.allclose(shares, [750, 500, 250, 0], atol=50)
    assert all(abs(d - end) < 50 for _, d in seen)


@pytest.mark.parametrize("steepness", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("root", [0.9999, 0.99, 0.9])
def test_a_proof_that_fails_gives_way_by_what_the_bound_says(root, steepness):
    """Bounds that fall to zero at `root`: few proofs, and little of the radius is lost."""
    tries = []

    class Falling(Prover):
        def __init__(self):
            pass

        def prove(self, traced, radius, *rest, **settings):
            tries.append(radius)
            return np.array([2 * steepness * (root - radius) - (root - radius) ** 2])

    traced = SimpleNamespace(values=[np.ones((1, 1))])
    best = 1.0, None, None, None
    answer = Falling()._proved(traced, np.eye(1), lambda r: 0.0, best, 0.0, 0)
    assert root - 0.95 * (1 - root) - 1e-3 <= answer.radius < root
    assert len(tries) <= 4
