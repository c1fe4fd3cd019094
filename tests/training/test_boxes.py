"""Differentiable boxes contain what they stand for, are exact where they can be, and agree with
those of float64."""

import keras
import numpy as np
import pytest
from box_models import branched, inputs, monotone, points, rectified, sorted_chain
from keras import layers, ops

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.training import initialize_for_bounds
from tf_lyapunov.training.boxes import region_around
from tf_lyapunov.training.boxflow import box_flow, margins

# Roundings of float32: signals of size 10, sums of a hundred terms, ten layers.
TOL = 2e-4
MODELS = {"branched": branched, "sorted": sorted_chain, "rectified": rectified}


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def bounds(model, x, radius, norm, limits=None, lines=False):
    """Box of the outputs, and lower bounds of all differences from the first output."""
    flow = box_flow(model)
    signals = flow.signals(region_around(ops.convert_to_tensor(x), radius, norm, limits))
    count = signals[-1].low.shape[-1]
    rows = np.eye(count)[:1] - np.eye(count)
    rows = ops.convert_to_tensor(np.repeat(rows[None], len(x), axis=0).astype("float32"))
    found = margins(flow, signals, rows, lines=lines)
    return array(signals[-1].low), array(signals[-1].high), array(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm, limits", [("linf", None), ("l2", (0.0, 1.0))])
def test_no_point_of_the_region_leaves_the_box_or_passes_a_margin(name, norm, limits):
    model = MODELS[name]()
    x, radius = inputs(model), 0.15 if norm == "linf" else 0.6
    low, high, ibp = bounds(model, x, radius, norm, limits)
    lines = bounds(model, x, radius, norm, limits, lines=True)[2]
    moved = points(x, radius, norm, limits)
    outputs = model.predict(moved.reshape(-1, *x.shape[1:]), verbose=0)
    outputs = outputs.reshape(*moved.shape[:2], -1)
    assert np.all(outputs >= low - TOL) and np.all(outputs <= high + TOL)
    assert np.all(high - low < 1e3)
    differences = outputs[..., :1] - outputs
    for found in (ibp, lines):
        assert np.all(differences >= found - TOL)
    # Pairs of classes share the last layer, which boxes of logits do not know.
    assert np.all(ibp >= low[:, :1] - high - TOL) or name != "rectified"


def test_boxes_of_a_growing_network_are_its_values_at_the_corners():
    model = monotone()
    x = inputs(model)
    low, high, _ = bounds(model, x, 0.2, "linf")
    assert np.allclose(low, model.predict(x - 0.2, verbose=0), atol=1e-6)
    assert np.allclose(high, model.predict(x + 0.2, verbose=0), atol=1e-6)


def test_bounds_of_one_layer_are_attained_in_both_norms():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    kernel = array(model.layers[0].kernel)
    x = inputs(model)
    for norm, dual in (("linf", 1), ("l2", 2)):
        away = 0.3 * np.linalg.norm(kernel[:, :1] - kernel, dual, axis=0)
        outputs = model.predict(x, verbose=0)
        found = bounds(model, x, 0.3, norm)[2]
        assert np.allclose(found, outputs[:, :1] - outputs - away, atol=1e-6)


def test_an_l2_ball_passes_flattening_and_enters_a_convolution_by_the_norms_of_its_rows():
    convolution = layers.Conv2D(2, 3, padding="same")
    model = keras.Sequential([keras.Input((5, 5, 1)), layers.Reshape((5, 5, 1)), convolution])
    x = inputs(model)
    flow = box_flow(model)
    box = flow.signals(region_around(ops.convert_to_tensor(x), 0.5, "l2"))[-1]
    jacobian = np.stack(
        [model.predict(e.reshape(1, 5, 5, 1), verbose=0)[0] for e in np.eye(25, dtype="float32")]
    )
    want = 0.5 * np.linalg.norm(jacobian, axis=0)  # no bias
    assert np.allclose(
        array(box.high - box.low) / 2, np.broadcast_to(want, (3, 5, 5, 2)), atol=1e-5
    )


def test_lines_are_tighter_than_boxes_where_units_are_decided():
    model = rectified()
    x = inputs(model, 8)
    ibp = bounds(model, x, 0.02, "linf")[2]
    lines = bounds(model, x, 0.02, "linf", lines=True)[2]
    assert np.mean(lines[:, 1:] - ibp[:, 1:]) > 0.01


def test_normalizations_take_the_clean_batch_or_what_is_stored():
    norm = layers.BatchNormalization(gamma_initializer=keras.initializers.Constant(2.0))
    model = keras.Sequential([keras.Input((3,)), norm])
    x = inputs(model, 16)
    flow, region = box_flow(model), region_around(ops.convert_to_tensor(x), 0.1, "linf")
    stored = flow.signals(region)[-1]
    batch = flow.signals(region, ops.convert_to_tensor(x))[-1]
    assert np.allclose(array(stored.high - stored.low), 0.4 / np.sqrt(1.001), rtol=1e-4)
    want = 0.4 / np.sqrt(x.var(axis=0) + 1e-3)
    assert np.allclose(array(batch.high - batch.low), np.broadcast_to(want, x.shape), rtol=1e-4)


def test_steps_without_a_rule_are_refused_by_name():
    x = keras.Input((4,))
    h = layers.LayerNormalization(name="levels")(layers.Dense(4, "relu")(x))
    model = keras.Model(x, layers.Dense(3, "softmax", name="shares")(h))
    with pytest.raises(UnsupportedLayerError, match=r"(?s)levels.*shares"):
        box_flow(model)
    with pytest.raises(UnsupportedLayerError, match="open sizes"):
        convolution = layers.Conv2D(2, 3)
        pool = layers.GlobalAveragePooling2D()
        box_flow(keras.Sequential([keras.Input((None, None, 1)), convolution, pool]))


def test_initial_kernels_keep_boxes_from_growing():
    model = keras.Sequential(
        [keras.Input((64,)), *[layers.Dense(64, "relu") for _ in range(6)], layers.Dense(3)]
    )
    x = inputs(model)

    def growth():
        signals = box_flow(model).signals(region_around(ops.convert_to_tensor(x), 0.1, "linf"))
        first, last = signals[1], signals[-3]
        return float(np.mean(array(last.high - last.low)) / np.mean(array(first.high - first.low)))

    before, last = growth(), array(model.layers[-1].kernel)
    initialize_for_bounds(model)
    assert growth() < 2 < before
    assert np.array_equal(array(model.layers[-1].kernel), last)
    with pytest.raises(ValueError, match="before its last one"):
        initialize_for_bounds(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
