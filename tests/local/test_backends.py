"""Bounds around inputs are the same numbers on every backend, in either order of the channels."""

import importlib.util
import json

import fresh_processes
import keras
import pytest

SCRIPT = """
import keras, numpy as np
from keras import layers
import tf_lyapunov as tfl
from tf_lyapunov.local import radii
from tf_lyapunov.local.boxes import Effort

effort = Effort(2, (0.0, 0.3), 10, (0.0, 0.1))
held = radii._SMALL, radii._MANY, radii._ENOUGH

def model_of(order):
    # The same function of images whose channels come last or first.
    first = order == "channels_first"
    image = keras.Input((2, 6, 5) if first else (6, 5, 2))
    axis, given = (1 if first else -1), dict(data_format=order)
    h = layers.Conv2D(3, 3, strides=2, padding="same", activation="relu", **given)(image)
    h = layers.BatchNormalization(axis=axis)(h)
    h = layers.Add()([h, layers.Conv2D(3, 1, activation="leaky_relu", **given)(h)])
    h = layers.MaxPooling2D(2, 1, **given)(h)
    h = layers.DepthwiseConv2D(2, padding="same", **given)(h)
    h = layers.AveragePooling2D((2, 1), 1, **given)(layers.ReLU()(h))
    h = layers.Dense(4, activation="tanh")(layers.Flatten(**given)(h))
    model = keras.Model(image, layers.Dense(3)(h))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        value = rng.normal(size=variable.shape) / 1.5
        variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)
    return model

def numbers(order):
    model = model_of(order)
    x = np.random.default_rng(1).random((2, 6, 5, 2)).astype("float32")
    x = x.transpose(0, 3, 1, 2) if order == "channels_first" else x
    logits = keras.ops.convert_to_numpy(model(x)).astype(float)
    found = {"order": order}
    for name, given in dict(l2={}, linf=dict(norm="linf", bounds=(0, 1))).items():
        found[name] = tfl.certify(model, x, method="linear", **given).radius.tolist()
    region = tfl.Region.ball(x[0], 0.3, "linf", bounds=(0, 1))
    bounds = tfl.output_bounds(model, region, effort=effort)
    found["bounds"] = [*bounds.lower.tolist(), *bounds.upper.tolist()]
    moved = np.clip(x[0] + np.random.default_rng(2).uniform(-0.3, 0.3, (200, *x[0].shape)), 0, 1)
    moved = keras.ops.convert_to_numpy(model(moved.astype("float32")))
    assert np.all(moved > bounds.lower - 1e-5) and np.all(moved < bounds.upper + 1e-5)
    found["gain"] = np.asarray(tfl.gain_on(model, x, 0.2)).tolist()
    label = int(logits[0].argmax())
    # Beyond what relaxations prove by themselves, so that units are split behind the sum.
    ball = tfl.Region.ball(x[0], 1.1 * found["linf"][0], "linf", bounds=(0, 1))
    for shift in (0, 1):
        wanted = tfl.Property.classified_as((label + shift) % 3)
        found[f"property {shift}"] = tfl.verify_property(model, ball, wanted, timeout=60).status
    return found

radii._SMALL, radii._MANY, radii._ENOUGH = (effort, effort), 0, 0
try:
    found = [numbers(order) for order in orders]
finally:
    radii._SMALL, radii._MANY, radii._ENOUGH = held
"""
CHILD = "import json, sys\norders = sys.argv[1:]\n" + SCRIPT + "\nprint(json.dumps(found))"


@pytest.fixture(scope="module")
def expected():
    scope = {"orders": ["channels_last"]}
    exec(SCRIPT, scope)
    return scope["found"][0]


@pytest.fixture(scope="module")
def first():
    """Numbers with the channels first, by the backend that was asked before."""
    return {}


def run(backend, *arguments):
    if importlib.util.find_spec(backend) is None or backend == keras.backend.backend():
        pytest.skip(f"{backend} is not installed, or at work already")
    found = fresh_processes.output(CHILD, *arguments, backend=backend)
    return json.loads(found.splitlines()[-1])


def check(found, expected, tolerance):
    for name in found.keys() - {"order"}:
        value = expected[name]
        same = value
        if not isinstance(value, str):  # to the size of all of them: some bounds lie near zero
            same = pytest.approx(value, abs=tolerance * max(map(abs, value)))
        assert found[name] == same, (found["order"], name)


def test_the_numbers_say_something(expected):
    assert min(expected["l2"] + expected["linf"]) > 0
    assert expected["property 0"] == "PROVED" and expected["property 1"] == "REFUTED"


# Searches are NumPy's everywhere; that of windows is for channels that come last.
OTHER_ORDER = 0.03


@pytest.mark.parametrize(
    "orders",
    [
        ["channels_first"],
        pytest.param(["channels_last", "channels_first"], marks=pytest.mark.slow),
    ],
)
def test_torch_gives_the_same_in_either_order_of_the_channels(orders, expected, first):
    found = run("torch", *orders)
    assert [numbers["order"] for numbers in found] == orders
    for numbers in found:
        check(numbers, expected, 1e-6 if numbers["order"] == expected["order"] else OTHER_ORDER)
    first["torch"] = found[-1]


@pytest.mark.slow
def test_jax_gives_the_same(expected, first):
    """It compiles every operation of every model by itself, which takes long."""
    (other,) = run("jax", "channels_first")
    check(other, expected, OTHER_ORDER)
    if "torch" in first:
        check(other, first["torch"], 1e-6)
