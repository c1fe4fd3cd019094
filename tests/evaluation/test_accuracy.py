"""Accuracy under attack and measured gains, against models whose answers are known."""

import types

import keras
import numpy as np
import pytest

from tf_lyapunov.attacks import FGM, PGD
from tf_lyapunov.certification import certify
from tf_lyapunov.evaluation.accuracy import (
    accuracy_under_attack,
    largest_measured_gain,
    logits,
    measured_gain,
)
from tf_lyapunov.theory.balls import L2


def linear_model(head=None):
    """Logits (x_0, -x_0): inputs at distance |x_0| from the other class, gain √2."""
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, use_bias=False, activation=head)]
    )
    model.set_weights([np.array([[1.0, -1.0], [0.0, 0.0]])])
    return model


X = np.array([[0.25, 0.0], [0.5, 1.0], [1.0, 0.0], [-0.5, 0.0]], np.float32)
Y = np.array([0, 0, 0, 0])  # the last one is misclassified
ATTACKS = {"FGM": lambda radius: FGM(L2(radius)), "PGD": lambda radius: PGD(L2(radius), steps=5)}


def certificate(radius):
    radius = np.asarray(radius, float)
    return types.SimpleNamespace(
        radius=radius, certified_accuracy=lambda r: float(np.mean((radius >= r) & (radius > 0)))
    )


@pytest.mark.parametrize("head", [None, "softmax"])
def test_attacked_accuracy_of_a_linear_model_is_the_share_beyond_the_radius(head):
    rows = accuracy_under_attack(linear_model(head), X, Y, ATTACKS, [0.75, 0.0, 0.3])
    assert [row["radius"] for row in rows] == [0.0, 0.3, 0.75]
    assert [row["clean"] for row in rows] == [0.75] * 3
    for name in ATTACKS:
        assert [row["attacked"][name] for row in rows] == [0.75, 0.5, 0.25]
    assert all(row["certified"] is None and row["count"] == 4 for row in rows)


def test_true_certificates_are_not_broken_and_false_ones_are_counted():
    exact = certificate([0.25, 0.5, 1.0, 0.0])
    rows = accuracy_under_attack(linear_model(), X, Y, ATTACKS, [0.2, 0.3, 0.7], certificate=exact)
    assert all(not any(row["broken"].values()) for row in rows)
    assert [row["certified"] for row in rows] == [0.75, 0.5, 0.25]
    assert all(row["certified"] <= row["attacked"]["PGD"] <= row["clean"] for row in rows)
    wrong = certificate([0.5, 1.0, 2.0, 0.0])
    rows = accuracy_under_attack(linear_model(), X, Y, ATTACKS, [0.3, 0.7], certificate=wrong)
    assert [row["broken"]["PGD"] for row in rows] == [1, 1]


def test_a_decision_by_rounding_alone_contradicts_no_certificate_of_exact_arithmetic():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
    # float32 holds whole numbers there: 10⁷ ± 0.2 are equal, and equal logits mean class 0.
    model.set_weights([np.array([[1.0, -1.0]]), np.full(2, 1e7)])
    x, y = np.array([[-3.4]]), [1]
    exact = certify(model, x, y, precision="float64")
    assert exact.radius[0] > 3.3

    def found(place):
        made = types.SimpleNamespace(success=[True], x_adv=np.array([[place]], "float32"))
        return {"found": lambda radius: lambda *arguments: made}

    (row,) = accuracy_under_attack(model, x, y, found(-0.2), [3.25], certificate=exact)
    assert (row["attacked"]["found"], row["broken"]["found"]) == (0.0, 0)
    wrong = certificate([5.0])
    (row,) = accuracy_under_attack(model, x, y, found(0.6), [4.5], certificate=wrong)
    assert row["broken"]["found"] == 1


def test_counts_by_class_are_of_what_every_attack_leaves_and_are_proved_apart():
    exact = certificate([0.25, 0.5, 1.0, 0.0])
    labels = np.array([0, 0, 0, 1])
    rows = accuracy_under_attack(
        linear_model(), X, labels, ATTACKS, [0.0, 0.3], certificate=exact, by_class=True
    )
    assert [row["by_class"] for row in rows] == [
        {"certified": [3, 0], "attacked": [3, 1]},
        {"certified": [2, 0], "attacked": [2, 1]},
    ]
    (row,) = accuracy_under_attack(linear_model(), X, labels, {}, [0.3], by_class=True)
    assert row["by_class"] == {"certified": None, "attacked": None}
    assert "by_class" not in accuracy_under_attack(linear_model(), X, labels, {}, [0.3])[0]


def test_inputs_broken_at_a_smaller_radius_count_at_larger_ones():
    class OnlySmall:
        def __init__(self, radius):
            self.radius = radius

        def __call__(self, model, x, y):
            return types.SimpleNamespace(success=np.full(len(x), self.radius < 0.2), x_adv=x)

    for cumulative, last in ((True, 0.0), (False, 0.75)):
        rows = accuracy_under_attack(
            linear_model(), X, Y, {"a": OnlySmall}, [0.1, 0.5], cumulative=cumulative
        )
        assert [row["attacked"]["a"] for row in rows] == [0.0, last]


@pytest.mark.parametrize("head", [None, "softmax"])
def test_the_measured_gain_of_a_linear_model_is_its_norm_along_the_pair(head):
    x = np.zeros((3, 2), np.float32)
    x_adv = np.array([[0.5, 0.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
    found = measured_gain(linear_model(head), x, x_adv, batch_size=1)
    assert found.count == 2
    u = float(np.finfo(np.float32).eps)
    assert found.maximum == pytest.approx(np.sqrt(2), rel=4 * u)
    assert found.mean == pytest.approx(np.sqrt(2) / 2, rel=4 * u)
    assert found.change_maximum == pytest.approx(np.sqrt(2) / 2, rel=4 * u)


def test_pairs_that_do_not_differ_measure_nothing():
    found = measured_gain(linear_model(), X, X)
    assert found.count == 0 and np.isnan(found.maximum)


def test_gains_under_attack_reach_the_gain_of_a_linear_model():
    rows = accuracy_under_attack(linear_model(), X, Y, ATTACKS, [0.1])
    gain = largest_measured_gain(rows)
    # Float32 outputs near 1 leave an error of about u/radius in a ratio.
    assert gain["measured_max"] == pytest.approx(
        np.sqrt(2), rel=100 * float(np.finfo(np.float32).eps)
    )
    assert gain["measured_by"].endswith("at radius 0.1")
    assert largest_measured_gain([]) == {}


def test_a_single_logit_and_one_hot_or_column_labels_are_understood():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[1.0], [0.0]])])
    rows = accuracy_under_attack(model, X, Y[:, None], ATTACKS, [0.3])
    assert rows[0]["clean"] == 0.25 and rows[0]["attacked"]["FGM"] == 0.25
    one_hot = np.eye(2)[Y]
    rows = accuracy_under_attack(linear_model(), X, one_hot, ATTACKS, [0.3])
    assert rows[0]["attacked"]["FGM"] == 0.5


def test_logits_are_the_same_with_and_without_softmax():
    np.testing.assert_array_equal(logits(linear_model("softmax"), X), logits(linear_model(), X))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"radii": [-0.1]}, ValueError, "not negative"),
        ({"radii": [float("nan")]}, ValueError, "finite"),
        ({"radii": []}, ValueError, "at least one"),
        ({"radii": 0.1}, TypeError, "radii"),
        ({"attacks": FGM(L2(0.1))}, TypeError, "must map names"),
        ({"attacks": {"FGM": 3}}, TypeError, "must map names"),
        ({"y": Y[:2]}, ValueError, "one label each"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "at least one input"),
        ({"certificate": certificate([0.1])}, ValueError, "same 4 inputs"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, match):
    arguments = {"x": X, "y": Y, "attacks": ATTACKS, "radii": [0.1], **changes}
    with pytest.raises(error, match=match):
        accuracy_under_attack(linear_model(), **arguments)


def test_pairs_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        measured_gain(linear_model(), X, X[:2])
