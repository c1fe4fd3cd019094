"""Losses and schedules that a configuration can name."""

import typing

import keras
import numpy as np
import pytest

from tf_lyapunov import losses
from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments.config import Loss
from tf_lyapunov.experiments.objectives import LOSSES, make_loss, make_optimizer, make_ramps
from tf_lyapunov.experiments.reading import parse_config

BASE = "{dataset: {name: digits}, model: {name: mlp}, training: {epochs: 10, %s}}"


def configured(text):
    return parse_config(BASE % text)


def test_every_loss_of_the_library_can_be_named():
    assert set(LOSSES.values()) == {getattr(losses, name) for name in losses.__all__}
    names = {
        member.model_fields["name"].annotation.__args__[0]
        for member in typing.get_args(typing.get_args(Loss)[0])
    }
    assert names == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_its_defaults_are_those_of_the_class(name):
    made = make_loss(configured(f"loss: {{name: {name}}}"))
    assert made.get_config() == LOSSES[name]().get_config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cross_entropy, temperature: 0.2, margin: 0.5", losses.TemperatureCrossEntropy(0.2, 0.5)),
        ("hkr, alpha: 3, min_margin: 0.5", losses.HKR(3.0, 0.5)),
        ("multiclass_hkr, alpha: 3, soft_hinge_tau: 2", losses.MulticlassHKR(3.0, 1.0, 2.0)),
        ("loss_annealing, temperature: 1, offset: 0, beta: 1", losses.LossAnnealing(1.0, 0.0, 1.0)),
        (
            "certificate_regularization, gamma: 0.2, loss: {name: multi_margin, margin: 1}",
            losses.CertificateRegularization(0.2, loss=losses.MultiMargin(1.0)),
        ),
    ],
)
def test_its_arguments_reach_it(text, expected):
    made = make_loss(configured(f"loss: {{name: {text}}}"))
    assert made.get_config() == expected.get_config()
    y, logits = np.array([0, 2]), np.array([[0.5, 0.1, -1.0], [0.0, 0.3, 0.2]], "float32")
    assert float(made(y, logits)) == float(expected(y, logits))


@pytest.mark.parametrize("name", ["efficient_margin", "offset_cross_entropy"])
def test_margins_of_pairs_are_read_from_the_model(name):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss = make_loss(configured(f"loss: {{name: {name}, radius: 0.2}}"), model)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    first = float(loss(np.arange(5) % 3, model(x)))
    model.layers[-1].kernel.assign(3 * model.layers[-1].kernel)
    assert float(loss(np.arange(5) % 3, model(x))) != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("name", ["efficient_margin", "offset_cross_entropy"])
def test_a_ramp_raises_the_radius_and_then_the_epochs_decide_the_weights(name):
    ramped = configured(f"loss: {{name: {name}, radius: 0.2, ramp: true}}")
    loss = make_loss(ramped)
    (ramp,) = make_ramps(ramped, loss)
    assert ramp.loss is loss and ramp.radius_at(9, 10) == pytest.approx(0.6)
    plain = configured(f"loss: {{name: {name}, radius: 0.2}}")
    assert make_ramps(plain, loss) == [] == make_ramps(configured("loss: {name: kr}"), loss)
    assert ramped.training_identity()["training"]["epochs"] == 10
    # A run from before there were ramps goes on.
    assert "ramp" not in plain.training_identity()["training"]["loss"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {name: loss_annealing, beta: 0.5}", "beta"),
        ("loss: {name: hkr, alpha: -1}", "alpha"),
        (
            "loss: {name: certificate_regularization, loss: {name: multi_margin, margn: 1}}",
            "Did you mean `margin`",
        ),
        ("optimizer: {schedule: {name: multistep, milestones: [0.7, 0.5]}}", "milestones"),
        ("optimizer: {schedule: {name: multistep, factor: 2}}", "factor"),
        ("augmentation: {crop: -1}", "crop"),
    ],
)
def test_wrong_values_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        configured(text)


def rates(schedule, steps):
    optimizer = make_optimizer(
        configured(f"optimizer: {{learning_rate: 0.1, schedule: {{name: {schedule}}}}}"), 10
    )
    return [float(keras.ops.convert_to_numpy(optimizer._learning_rate(s))) for s in steps]


def test_a_multistep_schedule_drops_after_each_share_of_the_steps():
    found = rates("multistep, milestones: [0.5, 0.75]", (0, 49, 50, 74, 75, 99))
    np.testing.assert_allclose(found, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)
    found = rates("multistep, milestones: [0.2], factor: 0.5", (19, 20, 99))
    np.testing.assert_allclose(found, [0.1, 0.05, 0.05], rtol=1e-6)


def test_the_triangular_schedule_is_the_published_one():
    steps = np.arange(101)
    published = np.interp(steps, [0, 40, 80, 100], [0, 0.1, 0.005, 0])
    found = rates("triangular", steps)
    np.testing.assert_allclose(found, published, atol=1e-8)
    assert min(found) == 0
