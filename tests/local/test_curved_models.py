"""Models with softmax, normalisations and norms inside: radii, ranges, gains and properties."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.layers import GlobalL2NormPooling2D, ScaledAveragePooling2D
from tf_lyapunov.local.flow import flow_of
from tf_lyapunov.local.linear import passed
from tf_lyapunov.local.outputs import gain_on, output_bounds
from tf_lyapunov.local.property import Property
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.verifying import verify_property
from tf_lyapunov.program.network import read_network


def normalised():
    x = keras.Input((6,))
    y = layers.LayerNormalization()(layers.Dense(8)(x))
    return keras.Model(x, layers.Dense(3)(layers.ReLU()(y)))


def mixed():
    x = keras.Input((3, 4))
    y = layers.Permute((2, 1))(layers.LayerNormalization()(x))
    y = layers.Permute((2, 1))(layers.Dense(3, activation="gelu")(y))
    y = layers.GlobalAveragePooling1D()(layers.RMSNormalization()(layers.Add()([x, y])))
    return keras.Model(x, layers.Dense(3)(y))


def softened():
    x = keras.Input((6,))
    y = layers.Dense(5, activation="softmax")(layers.Dense(8, activation="relu")(x))
    return keras.Model(x, layers.Dense(3)(layers.Dense(6, activation="relu")(y)))


def pooled():
    x = keras.Input((5, 5, 2))
    y = layers.GroupNormalization(2)(layers.Conv2D(4, 3)(x))
    y = ScaledAveragePooling2D(2, strides=1)(layers.ReLU()(y))
    return keras.Model(x, layers.Dense(3)(GlobalL2NormPooling2D()(y)))


MODELS = {"normalised": normalised, "mixed": mixed, "softened": softened, "pooled": pooled}


def made(name):
    model, rng = MODELS[name](), np.random.default_rng(len(name))
    for weight in model.weights:
        fan = max(int(np.prod(weight.shape[:-1])), 1)
        if "gamma" in weight.path or "scale" in weight.path:
            weight.assign(1 + 0.3 * rng.normal(size=weight.shape))
        else:
            weight.assign(rng.normal(size=weight.shape) * 1.2 / np.sqrt(fan))
    return model, rng.normal(size=(3, *model.input_shape[1:])).astype("float32")


def around(x, radius, rng, count=400):
    """Points of the sphere, in random directions and along single entries."""
    away = rng.normal(size=(count, x.size))
    away[: x.size] = np.eye(x.size)
    away *= radius / np.linalg.norm(away, axis=1, keepdims=True)
    return (x + np.concatenate([away, -away]).reshape(-1, *x.shape)).astype("float32")


@pytest.mark.parametrize("name", MODELS)
def test_no_step_passes_its_ball_by_its_gain_alone(name):
    flow = flow_of(read_network(made(name)[0]))
    assert passed(flow) == []


@pytest.mark.parametrize("name", MODELS)
def test_ranges_hold_all_samples_and_are_not_far_from_them(name):
    model, x = made(name)
    rng = np.random.default_rng(1)
    for radius, most in ((0.01, 3.0), (0.5, 200.0)):
        found = output_bounds(model, Region.ball(x[0].astype(np.float64), radius))
        y = np.asarray(model(around(x[0], radius, rng)))
        assert np.all(found.lower <= y + 1e-5) and np.all(y <= found.upper + 1e-5)
        assert np.all(found.upper - found.lower <= most * np.ptp(y, axis=0))


SLOW = [pytest.param(n, marks=pytest.mark.slow) if n in ("mixed", "pooled") else n for n in MODELS]


@pytest.mark.parametrize("name", SLOW)
def test_radii_are_far_above_those_of_gains_and_no_sample_breaks_them(name):
    model, x = made(name)
    x = x[:2]
    by_gain = tfl.certify(model, x, method="composition").radius
    proof = tfl.certify(model, x, method="linear", time_budget=60)
    assert np.all(proof.radius > 1.5 * by_gain)
    rng = np.random.default_rng(2)
    for point, radius, label in zip(x, proof.radius, proof.predictions, strict=True):
        y = np.asarray(model(around(point, radius * (1 - 1e-5), rng)))
        assert np.all(y.argmax(axis=1) == label)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", MODELS)
def test_gains_bound_how_far_any_two_points_are_taken(name, norm):
    model, x = made(name)
    found = gain_on(model, x[:1], 0.1, norm=norm)[0]
    rng, order = np.random.default_rng(3), 2 if norm == "l2" else np.inf
    points = x[0].astype(np.float64) + 0.1 * rng.uniform(-1, 1, (200, *x.shape[1:])) / (
        np.sqrt(x[0].size) if norm == "l2" else 1
    )
    y = np.asarray(model(points.astype("float32")), np.float64)
    apart = (points.astype("float32")[:100] - points.astype("float32")[100:]).reshape(100, -1)
    moved = np.linalg.norm(y[:100] - y[100:], order, axis=1)
    reached = np.max(moved / np.linalg.norm(apart, order, axis=1))
    assert reached <= found * (1 + 1e-3)
    assert norm == "linf" or found <= 30 * reached


@pytest.mark.parametrize("branching", ["inputs", "units"])
def test_properties_behind_a_normalisation_are_proved_and_refuted(branching):
    x = keras.Input((2,))
    y = layers.LayerNormalization(epsilon=0.1)(layers.Dense(4)(x))
    model = keras.Model(x, layers.Dense(1)(layers.ReLU()(y)))
    rng = np.random.default_rng(4)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    center = np.array([0.3, -0.2])
    region = Region.ball(center, 0.2, "linf")
    grid = np.stack(np.meshgrid(*[np.linspace(-0.2, 0.2, 81)] * 2), -1).reshape(-1, 2)
    largest = float(np.max(np.asarray(model((center + grid).astype("float32")))))
    common = dict(branching=branching, timeout=30)
    above = Property.linear([1.0], largest + (0.02 if branching == "inputs" else 2.0))
    assert verify_property(model, region, above, **common).is_proved
    below = Property.linear([1.0], largest - 0.02)
    assert verify_property(model, region, below, **common).is_refuted
