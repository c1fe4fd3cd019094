"""Boxes in float64 contain what they stand for, and so do the radii that they prove."""

import keras
import numpy as np
import pytest
from box_models import branched, inputs, monotone, points, rectified, sorted_chain
from keras import layers

from tf_lyapunov import certify
from tf_lyapunov.certification.certificate import Certificate
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.intervals import _largest, box_radii, boxes_of, line_of, margins_at
from tf_lyapunov.program.network import read_network
from tf_lyapunov.training.boxes import region_around
from tf_lyapunov.training.boxflow import box_flow, margins

MODELS = {"branched": branched, "sorted": sorted_chain, "rectified": rectified}
# Roundings of float32 along ten layers of signals of size ten.
TOL = 2e-4
# Here functions that also fall are bounded piece by piece, there at their ends and their valley.
PIECES = 5e-3


def output_box(line, x, radius, norm):
    x = x.astype(float)
    ball = None if norm == "linf" else np.full(len(x), radius)
    return boxes_of(line, x, x - radius, x + radius, ball)[-1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_boxes_hold_every_point_and_are_those_that_trained(name, norm):
    model, radius = MODELS[name](), 0.1
    x = inputs(model)
    network = read_network(model)
    line = line_of(network)
    low, high = output_box(line, x, radius, norm)
    moved = points(x, radius, norm)
    flat = moved.reshape(-1, *x.shape[1:])
    outputs = network.program.logits(flat).reshape(*moved.shape[:2], -1)
    # Values of float64 themselves: no tolerance but that of their own rounding.
    assert np.all(outputs >= low - 1e-12) and np.all(outputs <= high + 1e-12)
    flow = box_flow(model)
    region = region_around(keras.ops.convert_to_tensor(x), radius, norm)
    trained = flow.signals(region)
    for want, found in ((low, trained[-1].low), (high, trained[-1].high)):
        if norm == "linf" or name != "branched":  # a rescaled ball is a box there, too
            tol = PIECES if name == "branched" else TOL
            assert np.allclose(keras.ops.convert_to_numpy(found), want, atol=tol, rtol=tol)
    labels = np.array([0, 1, 2])
    rows = (np.eye(3)[labels][:, None] - np.eye(3)[None]).astype("float32")
    lower = keras.ops.convert_to_numpy(
        margins(flow, trained, keras.ops.convert_to_tensor(rows), lines=False)
    )
    lower = np.where(np.arange(3) == labels[:, None], np.inf, lower).min(axis=1)
    proved = margins_at(line, x.astype(float), np.full(3, radius), labels, norm)
    assert np.all(proved <= lower + TOL)
    if norm == "linf":
        assert np.allclose(proved, lower, atol=tol, rtol=tol)


def test_boxes_of_a_growing_network_are_its_values_at_the_corners():
    model = monotone()
    line = line_of(read_network(model))
    x = inputs(model)
    low, high = output_box(line, x, 0.2, "linf")
    program = read_network(model).program
    assert np.allclose(low, program.logits(x.astype(float) - 0.2), atol=1e-12)
    assert np.allclose(high, program.logits(x.astype(float) + 0.2), atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_certified_radii_by_boxes_survive_every_sample_and_are_below_those_by_lines(norm):
    model = rectified(depth=2)
    x = inputs(model, 6)
    found = certify(model, x, method="box", norm=norm)
    plain = certify(model, x, norm=norm)
    assert np.all(found.radius >= plain.radius) and found.verdict == "PROVED"
    if norm == "linf":
        assert np.median(found.radius / plain.radius) > 1.2
        lines = certify(model, x, method="linear", norm=norm)
        assert np.all(found.radius <= lines.radius * 1.001)
    for i in range(6):
        moved = points(x[i : i + 1], found.radius[i], "linf" if norm == "linf" else "l2")[:, 0]
        if norm != "l1":
            assert np.all(model.predict(moved, verbose=0).argmax(1) == found.labels[i])
    assert "Boxes of every signal" in found.explain()
    again = Certificate.from_json(found.to_json())
    assert np.array_equal(again.radius, found.radius)


def test_radii_of_one_layer_are_exact_and_valid_inputs_end_them():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    kernel, bias = np.array([[1.0, -1], [0.5, 0], [0, 0.25], [0, 0]]), np.array([0.1, 0])
    model.layers[0].set_weights([kernel, bias])
    x = np.full((1, 4), 0.5)
    lead = float((x @ np.diff(-kernel))[0, 0]) + 0.1
    want = lead / np.abs(np.diff(kernel)).sum()
    found = certify(model, x, method="box", norm="linf", precision="float64").radius[0]
    assert want * (1 - 1e-3) <= found <= want
    cut = certify(model, x, method="box", norm="linf", bounds=(0.4, 1.0))
    assert cut.radius[0] > want and "within the bounds" in cut.explain()


def test_a_single_logit_and_a_softmax_are_looked_through():
    single = keras.Sequential([keras.Input((3,)), layers.Dense(4, "relu"), layers.Dense(1)])
    x = inputs(single)
    found = certify(single, x, method="box", norm="linf")
    assert np.all(found.radius > 0)
    shares = keras.Sequential([*rectified().layers, layers.Softmax()])
    plain = keras.Sequential([keras.Input((5,)), *shares.layers[:-1]])
    x = inputs(plain)
    radii = [certify(m, x, method="box", norm="linf").radius for m in (shares, plain)]
    assert np.allclose(*radii, rtol=1e-6)


def test_proof_files_hold_the_global_radii_and_say_so(tmp_path):
    model = rectified(depth=1)
    found = certify(model, inputs(model), method="box", norm="linf")
    found.save(tmp_path / "proof.npz")
    loaded = Certificate.load(tmp_path / "proof.npz")
    assert np.all(loaded.radius <= found.radius)
    assert any("method='box'" in text for text in loaded.assumptions)
    assert not any(text.startswith("Boxes of every") for text in loaded.assumptions)


def test_what_has_no_box_is_refused_by_name():
    x = keras.Input((4,))
    h = layers.LayerNormalization(name="levels")(layers.Dense(4, "relu")(x))
    model = keras.Model(x, layers.Dense(3)(h))
    with pytest.raises(UnsupportedLayerError, match="levels"):
        certify(model, inputs(model), method="box", norm="linf")
    with pytest.raises(ValueError, match="state"):
        certify(rectified(), np.zeros((1, 5)), method="box", state="kept.npz")
    a, b = keras.Input((2,)), keras.Input((2,))
    pair = keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([a, b])))
    with pytest.raises(UnsupportedLayerError, match="one input"):
        certify(pair, [np.zeros((1, 2))] * 2, method="box")


@pytest.mark.parametrize("bend", [0.0, 0.5, 5.0, np.inf])
def test_radii_are_found_by_few_evaluations(bend):
    """Margins 1 - t - bend·t² of t = r/scale, or that end at once where bend is infinite."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 7))
    scale, asked = 10.0 ** rng.uniform(-6, 3, 50), [0]
    scale[:3] = 0.0  # decided wrongly

    def left(r, some):
        asked[0] += len(some)
        t = r / scale[some]
        value = np.where(t < 1, 1.0, -np.inf) if bend == np.inf else 1 - t - bend * t * t
        return np.where(scale[some] > 0, value, -1.0)

    with np.errstate(all="ignore"):
        found = _largest(left, x, np.zeros(50), None)
    root = 1.0 if bend in (0, np.inf) else (np.sqrt(1 + 4 * bend) - 1) / (2 * bend)
    exact = root * scale
    assert np.all(found <= exact) and np.all(found >= exact * (1 - 2.0**-11))
    assert asked[0] <= 50 * (60 if bend == np.inf else 18)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_margins_that_no_radius_changes_hold_everywhere_without_a_warning():
    constant = layers.Dense(2, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((3,)), constant])
    constant.bias.assign([1.0, 0.0])
    x, labels, nothing = np.ones((2, 3)), np.zeros(2, int), np.zeros(2)
    found, _ = box_radii(
        read_network(model), x, labels, nothing, lambda rows, r: 0 * r, norm="linf", bounds=(0, 1)
    )
    assert np.all(found >= np.sqrt(3))  # the whole box
