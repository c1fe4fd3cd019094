"""A loss whose parameter is scheduled trains, step by step, by the loss that it says."""

import keras
import numpy as np
import pytest

from tf_lyapunov.callbacks import LossParamScheduler
from tf_lyapunov.losses import MulticlassHKR, TemperatureCrossEntropy

X = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")
Y = np.arange(12) % 3


def model_of(loss):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def fit(model, epochs=1, *callbacks, **options):
    return model.fit(
        X, Y, 12, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **options
    ).history


def test_each_epoch_trains_by_the_loss_of_its_value_and_validates_by_it():
    scheduled = model_of(MulticlassHKR(alpha=1.0))
    history = fit(
        scheduled,
        3,
        LossParamScheduler("alpha", lambda epoch: [1.0, 4.0, 4.0][epoch]),
        validation_data=(X, Y),
    )
    by_hand = model_of(MulticlassHKR(alpha=1.0))
    losses, validations = [], []
    for alpha in (1.0, 4.0, 4.0):
        by_hand.compile(by_hand.optimizer, MulticlassHKR(alpha=alpha))
        losses += fit(by_hand)["loss"]
        validations.append(by_hand.evaluate(X, Y, verbose=0))
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    assert history["val_loss"] == pytest.approx(validations, rel=1e-5)
    assert history["loss_alpha"] == [1.0, 4.0, 4.0]
    for a, b in zip(scheduled.get_weights(), by_hand.get_weights(), strict=True):
        assert np.abs(a - b).max() < 1e-6


def test_a_parameter_that_a_part_of_the_loss_holds_reaches_that_part():
    model = model_of(MulticlassHKR(min_margin=1.0))
    fit(model, 1, LossParamScheduler("min_margin", {0: 0.25}))
    assert model.loss.hinge.min_margin == 0.25
    assert model.loss.get_config()["min_margin"] == 0.25


def test_a_mapping_is_linear_between_its_epochs_and_constant_outside():
    schedule = LossParamScheduler("alpha", {2: 1.0, 6: 3.0}).schedule
    assert [schedule(epoch) for epoch in (0, 2, 4, 6, 9)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_an_epoch_that_changes_nothing_compiles_nothing():
    model = model_of(TemperatureCrossEntropy(0.5))
    fit(model)
    before = model.train_function
    fit(model, 2, LossParamScheduler("temperature", {0: 0.5}))
    assert model.train_function is before


def test_what_cannot_be_scheduled_is_refused(capsys):
    with pytest.raises(TypeError, match="Received: schedule=3"):
        LossParamScheduler("alpha", 3)
    for bad in ({}, {0: float("nan")}, {0: "a"}):
        with pytest.raises(ValueError, match="at least one epoch, and finite numbers"):
            LossParamScheduler("alpha", bad)
    with pytest.raises(
        ValueError, match=r"one of the loss: \['alpha', 'min_margin', 'soft_hinge_tau'\]"
    ):
        fit(model_of(MulticlassHKR()), 1, LossParamScheduler("temperature", {0: 1.0}))
    with pytest.raises(ValueError, match="must be compiled with one loss"):
        fit(model_of("sparse_categorical_crossentropy"), 1, LossParamScheduler("alpha", {0: 1.0}))
    with pytest.raises(ValueError, match="Received: alpha=-1"):
        fit(model_of(MulticlassHKR()), 1, LossParamScheduler("alpha", {0: -1.0}))
    fit(model_of(MulticlassHKR()), 1, LossParamScheduler("alpha", {0: 2.0}, verbose=1))
    assert capsys.readouterr().out == "Epoch 1: alpha of the loss is 2.\n"
