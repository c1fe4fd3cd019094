"""Losses: their equations in NumPy, their limits, and the Keras contract."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lyapunov.losses import MultiMargin, TemperatureCrossEntropy

# One rounding of a float32 per operation on numbers of size 10, some tens of operations.
TOL = 64 * 10 * np.finfo("float32").eps
LOGITS = hnp.arrays(np.float32, (4, 5), elements=st.floats(-10, 10, width=32))
LABELS = hnp.arrays(np.int64, (4,), elements=st.integers(0, 4))


def value(loss, labels, logits):
    return float(keras.ops.convert_to_numpy(loss(labels, logits)))


@given(LOGITS, LABELS, st.floats(0.05, 5.0), st.floats(0.0, 2.0))
def test_temperature_cross_entropy_is_its_equation(logits, labels, temperature, margin):
    rows = []
    for f, y in zip(logits.astype(float), labels, strict=True):
        shifted = [(f[j] - f[y] + margin * (j != y)) / temperature for j in range(5)]
        top = max(shifted)
        rows.append(temperature * (top + np.log(np.sum(np.exp(np.array(shifted) - top)))))
    loss = TemperatureCrossEntropy(temperature, margin)
    assert abs(value(loss, labels, logits) - np.mean(rows)) <= TOL


@given(LOGITS, LABELS)
def test_without_temperature_and_margin_it_is_cross_entropy(logits, labels):
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert (
        abs(value(TemperatureCrossEntropy(), labels, logits) - value(plain, labels, logits)) <= TOL
    )


@given(LOGITS, LABELS)
def test_a_cold_loss_is_the_hinge_of_the_margin(logits, labels):
    temperature, margin = 1e-3, 0.5
    own = logits[np.arange(4), labels][:, None]
    hinge = logits - own + margin * (np.arange(5) != labels[:, None])
    expected = np.mean(np.max(hinge, axis=1))
    # T·log K is the exact largest difference between a soft and a hard maximum of K numbers.
    cold = value(TemperatureCrossEntropy(temperature, margin), labels, logits)
    assert abs(cold - expected) <= temperature * np.log(5) + TOL


def test_the_gradient_is_at_most_the_root_of_two_at_every_temperature():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("written with TensorFlow's tape")
    import tensorflow as tf

    logits = tf.Variable(np.random.default_rng(0).normal(size=(64, 5)).astype("float32"))
    norms = []
    for temperature in (1e-3, 0.1, 1.0, 10.0):
        with tf.GradientTape() as tape:
            loss = TemperatureCrossEntropy(temperature, reduction="sum")(np.zeros(64), logits)
        norms.append(np.linalg.norm(tape.gradient(loss, logits).numpy(), axis=1).max())
    assert max(norms) <= np.sqrt(2) * (1 + 1e-5)
    assert norms[0] > 1.4  # and it does not vanish when the temperature is low


@given(LOGITS, LABELS, st.floats(0.05, 2.0))
def test_multi_margin_is_its_equation(logits, labels, margin):
    rows = [
        sum(max(0.0, margin - f[y] + f[j]) for j in range(5) if j != y) / 5
        for f, y in zip(logits.astype(float), labels, strict=True)
    ]
    assert abs(value(MultiMargin(margin), labels, logits) - np.mean(rows)) <= TOL


@pytest.mark.parametrize("loss", [TemperatureCrossEntropy(0.3, 0.2), MultiMargin(0.4)])
def test_labels_may_be_integers_columns_or_one_hot_rows(loss):
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], "float32")
    expected = value(loss, np.array([1, 2]), logits)
    assert value(loss, np.array([[1], [2]]), logits) == expected
    assert value(loss, np.eye(3)[[1, 2]], logits) == expected


@pytest.mark.parametrize("loss", [TemperatureCrossEntropy(0.3, 0.2), MultiMargin(0.4)])
def test_a_loss_survives_serialisation(loss):
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(copy) is type(loss)
    assert copy.get_config() == loss.get_config()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_and_margins_are_refused(bad):
    with pytest.raises(ValueError, match="Received: temperature="):
        TemperatureCrossEntropy(temperature=bad)
    with pytest.raises(ValueError, match="Received: margin="):
        MultiMargin(margin=bad)
    if bad != 0.0:
        with pytest.raises(ValueError, match="Received: margin="):
            TemperatureCrossEntropy(margin=bad)


def test_a_single_logit_is_refused():
    with pytest.raises(ValueError, match="at least two logits"):
        MultiMargin()(np.array([0]), np.array([[1.0]]))
