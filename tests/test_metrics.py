"""Metrics of certified robustness: their equations, the constants they measure, and safe sides."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lyapunov.attacks import FGM
from tf_lyapunov.certification import certify, lipschitz_upper_bound
from tf_lyapunov.losses import HKR, TemperatureCrossEntropy
from tf_lyapunov.metrics import CertifiedAccuracy, ProvableAverageRobustness
from tf_lyapunov.theory.balls import L2

UNIT = 2.0**-24
LOGITS = hnp.arrays(np.float32, (6, 4), elements=st.floats(-10, 10, width=32))
LABELS = hnp.arrays(np.int64, (6,), elements=st.integers(0, 3))


def value(metric):
    return float(keras.ops.convert_to_numpy(metric.result()))


def radii(logits, labels, gain):
    rows = np.arange(len(labels))
    others = logits.astype(np.float64).copy()
    others[rows, labels] = -np.inf
    return (logits[rows, labels].astype(float) - others.max(axis=1)) / (math.sqrt(2) * gain)


@settings(max_examples=30)
@given(LOGITS, LABELS, st.floats(0.1, 10.0), st.floats(0.0, 3.0))
def test_certified_accuracy_counts_radii_above_the_threshold(logits, labels, gain, radius):
    metric = CertifiedAccuracy(radius, gain=gain)
    metric.update_state(labels, logits)
    exact = radii(logits, labels, gain)
    slack = 32 * UNIT * (radius + np.abs(logits).max() / gain)
    assert np.mean(exact > radius + slack) <= value(metric) + 1e-6
    assert value(metric) <= np.mean(exact > radius) + 1e-6  # never more than is true


@settings(max_examples=30)
@given(LOGITS, LABELS, st.floats(0.1, 10.0), st.booleans())
def test_average_robustness_is_the_mean_radius(logits, labels, gain, signed):
    metric = ProvableAverageRobustness(gain=gain, signed=signed)
    metric.update_state(labels, logits)
    exact = radii(logits, labels, gain)
    expected = np.mean(exact if signed else np.maximum(exact, 0))
    assert value(metric) == pytest.approx(expected, rel=64 * UNIT, abs=64 * UNIT * 10 / gain)


def test_batches_and_sample_weights_add_up():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(10, 3)).astype("float32"), rng.integers(0, 3, 10)
    weights = rng.uniform(0, 2, 10).astype("float32")
    for metric in (CertifiedAccuracy(0.2, 1.0), ProvableAverageRobustness(1.0)):
        for part in (slice(0, 4), slice(4, 10)):
            metric.update_state(labels[part], logits[part], sample_weight=weights[part])
        exact = radii(logits, labels, 1.0)
        single = exact > 0.2 if isinstance(metric, CertifiedAccuracy) else np.maximum(exact, 0)
        assert value(metric) == pytest.approx(np.average(single, weights=weights), rel=1e-5)
        metric.reset_state()
        assert value(metric) == 0


def test_one_logit_decides_by_its_sign():
    logits = np.array([[2.0], [-3.0], [1.0], [0.5]], "float32")
    for labels in (np.array([1, 0, 0, 1]), np.array([[1], [-1], [-1], [1]])):
        metric = CertifiedAccuracy(0.9, gain=2.0)
        metric.update_state(labels, logits)
        assert value(metric) == 0.5
        average = ProvableAverageRobustness(gain=2.0)
        average.update_state(labels, logits)
        assert value(average) == pytest.approx((1.0 + 1.5 + 0.25) / 4, rel=1e-5)


def test_labels_may_be_one_hot():
    logits, labels = np.eye(3, dtype="float32"), np.array([0, 1, 1])
    metrics = [CertifiedAccuracy(0.5, gain=1.0) for _ in range(3)]
    metrics[0].update_state(labels, logits)
    metrics[1].update_state(np.eye(3)[labels], logits)
    metrics[2].update_state(labels[:, None], logits)
    assert [value(m) for m in metrics] == pytest.approx([2 / 3] * 3)


def test_overflow_and_nan_certify_nothing():
    logits = np.array([[np.inf, 0.0], [np.nan, 0.0], [np.inf, -np.inf], [9.0, 0.0]], "float32")
    metric, average = CertifiedAccuracy(0.1, gain=1.0), ProvableAverageRobustness(gain=1.0)
    for m in (metric, average):
        m.update_state(np.zeros(4, "int64"), logits)
    assert value(metric) == 0.25
    assert value(average) == pytest.approx(9 / math.sqrt(2) / 4, rel=1e-5)


def test_without_a_constant_nothing_is_certified():
    metric, average = CertifiedAccuracy(1e-6), ProvableAverageRobustness()
    for m in (metric, average):
        m.update_state(np.array([0]), np.array([[1e6, 0.0]]))
        assert value(m) == 0
        m.reset_state()
        m.update_state(np.array([0]), np.array([[1e6, 0.0]]))
        assert value(m) == 0
    metric.bind(lambda: 1.0).reset_state()
    metric.update_state(np.array([0]), np.array([[1e6, 0.0]]))
    assert value(metric) == 1


def classifier(final=None):
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3, activation=final)]
    )


def data(n=64):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    return (rng.normal(size=(n, 6)) + 2 * np.eye(3, 6)[y]).astype("float32"), y


def test_evaluate_measures_the_constant_of_the_present_weights():
    model = classifier()
    x, y = data()
    metrics = [CertifiedAccuracy(0.1, model), ProvableAverageRobustness(model)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=metrics)
    model.fit(x, y, epochs=3, verbose=0, validation_data=(x, y))
    for factor in (1.0, 3.0):
        for weight in model.weights:
            weight.assign(keras.ops.convert_to_numpy(weight) * factor)
        gain = lipschitz_upper_bound(model).gain_upper_bound
        exact = radii(model.predict(x, verbose=0), y, gain)
        scores = model.evaluate(x, y, verbose=0, return_dict=True)
        assert scores["certified_accuracy_0.1"] == pytest.approx(np.mean(exact > 0.1), abs=1e-6)
        average = np.mean(np.maximum(exact, 0))
        assert scores["provable_average_robustness"] == pytest.approx(average, rel=1e-4)
        measured = float(keras.ops.convert_to_numpy(metrics[0].gain))
        assert gain <= measured <= gain * (1 + 2**-22)
    assert 0 < np.mean(exact > 0.1) <= certify(model, x, y).certified_accuracy(0.1) + 1e-9


def test_validation_in_fit_is_that_of_the_weights_at_the_end_of_the_epoch():
    model = classifier()
    x, y = data()
    model.compile("adam", "mse", metrics=[CertifiedAccuracy(0.01, model)])
    history = model.fit(x, np.eye(3)[y], epochs=2, verbose=0, validation_data=(x, np.eye(3)[y]))
    exact = radii(model.predict(x, verbose=0), y, lipschitz_upper_bound(model).gain_upper_bound)
    found = history.history["val_certified_accuracy_0.01"][-1]
    assert found == pytest.approx(np.mean(exact > 0.01), abs=1e-6)


def test_the_constant_is_that_of_the_outputs_not_of_the_logits():
    model = classifier("softmax")
    metric = CertifiedAccuracy(0.1, model)
    metric.reset_state()
    expected = lipschitz_upper_bound(model, outputs="model").gain_upper_bound
    assert float(keras.ops.convert_to_numpy(metric.gain)) == pytest.approx(expected, rel=1e-6)


def test_a_metric_survives_saving_and_asks_for_its_model_again(tmp_path):
    model = classifier()
    x, y = data()
    model.compile(
        "sgd", "mse", metrics=[CertifiedAccuracy(0.1, model), ProvableAverageRobustness(2.0)]
    )
    model.fit(x, np.eye(3)[y], verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    scores = again.evaluate(x, np.eye(3)[y], verbose=0, return_dict=True)
    assert scores["certified_accuracy_0.1"] == 0
    assert scores["provable_average_robustness"] > 0
    bound = CertifiedAccuracy.from_config(CertifiedAccuracy(0.1, model).get_config()).bind(again)
    bound.reset_state()
    assert math.isfinite(float(keras.ops.convert_to_numpy(bound.gain)))


def test_bad_arguments_are_refused():
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`radius`"):
            CertifiedAccuracy(bad)
        with pytest.raises(ValueError, match="`gain`"):
            ProvableAverageRobustness(bad)
    with pytest.raises(TypeError, match="`gain`"):
        CertifiedAccuracy(0.1, "model")
    with pytest.raises(ValueError, match="Lipschitz constant"):
        CertifiedAccuracy(0.1, lambda: math.nan).reset_state()


def test_a_single_probability_decides_at_one_half():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, activation="sigmoid")])
    model.layers[0].set_weights([np.ones((1, 1)), np.zeros(1)])
    metric = CertifiedAccuracy(radius=0.1, gain=model)
    metric.reset_state()
    x = np.array([[-1.0], [1.0], [-1.0], [0.05]])  # sigmoid(0.05) is within 0.25·0.1 of 1/2
    metric.update_state(np.array([1, 1, 0, 1]), model.predict(x, verbose=0))
    assert float(metric.result()) == 0.5


def test_a_probability_with_a_given_constant_keeps_its_threshold():
    outputs = np.array([[0.45], [0.9], [0.2]], "float32")  # wrong, right, right
    labels = np.array([1, 1, 0])
    for coding in (None, False):
        metric = CertifiedAccuracy(0.2, gain=1.0, from_logits=coding)
        metric.update_state(labels, outputs)
        # Unknown outputs count where both meanings agree, which the last does not.
        assert value(metric) == pytest.approx(1 / 3 if coding is None else 2 / 3)
    again = CertifiedAccuracy.from_config(metric.get_config())
    again.update_state(labels, outputs)
    assert value(again) == pytest.approx(2 / 3)
    logits = CertifiedAccuracy(0.2, gain=1.0, from_logits=True)
    logits.update_state(labels, outputs)
    assert value(logits) == pytest.approx(2 / 3)
    with pytest.raises(TypeError, match="`from_logits`"):
        CertifiedAccuracy(0.2, gain=1.0, from_logits="sigmoid")


@pytest.mark.parametrize("eagerly", [False, True])
def test_the_first_evaluation_after_every_compilation_measures_the_constant(eagerly):
    model = classifier()
    x, y = data()
    for factor in (1.0, 0.25):
        for weight in model.weights:
            weight.assign(keras.ops.convert_to_numpy(weight) * factor)
        exact = radii(model.predict(x, verbose=0), y, lipschitz_upper_bound(model).gain_upper_bound)
        metric = CertifiedAccuracy(0.05, model)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, metrics=[metric], run_eagerly=eagerly)
        first = model.evaluate(x, y, verbose=0, return_dict=True)["certified_accuracy_0.05"]
        assert first == pytest.approx(np.mean(exact > 0.05), abs=1e-6)
        assert first > 0


def test_the_first_epoch_counts_what_is_certified():
    model = classifier()
    x, y = data()
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[CertifiedAccuracy(0.05, model)],
    )
    history = model.fit(x, y, epochs=2, verbose=0).history["certified_accuracy_0.05"]
    assert history[0] == history[1] > 0


def test_rows_of_minus_one_and_one_mean_what_one_hot_rows_mean():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 3)).astype("float32"), rng.integers(0, 3, 9)
    rows = np.eye(3, dtype="float32")[labels]
    for metric in (CertifiedAccuracy(0.1, 1.0), ProvableAverageRobustness(1.0, signed=True)):
        found = []
        for coded in (labels, rows, 2 * rows - 1):
            metric.reset_state()
            metric.update_state(coded, logits)
            found.append(value(metric))
        assert found[0] == found[1] == found[2]
    wrong = CertifiedAccuracy(0.1, 1.0)
    wrong.update_state(-np.ones((4, 3)) + 2 * np.eye(3)[[0] * 4], np.eye(3)[[1] * 4])
    assert value(wrong) == 0


@pytest.mark.parametrize(
    "labels", [[-1, -1], [3, 3], [0.5, 0.5], [[0, 0, 0]] * 2, [[1, 1, 0]] * 2, [[0.9, 0.1, 0]] * 2]
)
def test_labels_that_name_no_class_make_the_result_nan(labels):
    labels, logits = np.array(labels, "float32"), np.array([[-5.0, -5.1, -5.2]] * 2, "float32")
    metric = CertifiedAccuracy(0.01, gain=1.0)
    metric.update_state(labels, logits)
    assert math.isnan(value(metric))
    metric.reset_state()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Activation("linear")])
    model.compile(loss=lambda y, f: keras.ops.mean(f), metrics=[metric])
    found = model.evaluate(logits, labels, verbose=0, return_dict=True)
    assert math.isnan(found["certified_accuracy_0.01"])
    ignored = CertifiedAccuracy(0.01, gain=1.0)
    ignored.update_state(labels, logits, sample_weight=np.zeros(2))
    assert value(ignored) == 0


def test_every_reader_of_labels_means_the_same_by_a_coding_or_refuses_it():
    rng = np.random.default_rng(0)
    model = classifier()
    x, y = data(12)
    logits, rows = model.predict(x, verbose=0), np.eye(3)[y]
    loss = TemperatureCrossEntropy(0.5, margin=0.2)
    numbers = float(loss(y, logits))
    assert float(loss(rows, logits)) == float(loss(2 * rows - 1, logits))
    assert numbers == pytest.approx(float(loss(rows, logits)), rel=1e-6)
    exact = certify(model, x, y).radius
    attacked = FGM(L2(0.3))(model, x, y).success
    for coded in (rows, 2 * rows - 1):
        assert np.array_equal(certify(model, x, coded).radius, exact)
        assert np.array_equal(FGM(L2(0.3))(model, x, coded).success, attacked)
    single = rng.normal(size=(12, 1)).astype("float32")
    zero_one = rng.integers(0, 2, 12)
    for one in (HKR(), TemperatureCrossEntropy()):
        values = [float(one(c.astype("float32"), single)) for c in (zero_one, 2 * zero_one - 1)]
        assert values[0] == values[1]
    found = []
    for coded in (zero_one, 2 * zero_one - 1):
        metric = CertifiedAccuracy(0.1, gain=1.0, from_logits=True)
        metric.update_state(coded, single)
        found.append(value(metric))
    assert found[0] == found[1]
    scalar = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    ours, signed = (certify(scalar, x, c).radius for c in (zero_one, 2 * zero_one - 1))
    assert np.array_equal(ours, signed)
    ours, signed = (FGM(L2(0.3))(scalar, x, c).success for c in (zero_one, 2 * zero_one - 1))
    assert np.array_equal(ours, signed)
