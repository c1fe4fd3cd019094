"""What `LyapunovMonitor` says is true of the weights that compute, save and stay."""

import keras
import numpy as np
import pytest

from tf_lyapunov.callbacks import LyapunovMonitor
from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.design import spectral_design
from tf_lyapunov.growth import growth_upper_bounds
from tf_lyapunov.projection import constrain
from tf_lyapunov.theory.sectors import Sector

layers = keras.layers
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(320, 8)).astype("float32")
Y = np.arange(320) % 3
DESIGN = spectral_design(gain=2.0, sectors=[Sector.of("relu"), Sector.linear()])


not_torch = pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="one step an execution, and optimizers of which no bound is known",
)


def amortised(every, optimizer=None, **compile_options):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(8, "relu", name="hidden"),
            layers.Dense(3, name="head"),
        ]
    )
    model = constrain(model, [0.5, 0.5], guarantee="monitor", every=every)
    optimizer = optimizer or keras.optimizers.Adam(0.02)
    model.compile(optimizer, LOSS, **compile_options)
    return model


def norm(kernel):
    return np.linalg.norm(keras.ops.convert_to_numpy(kernel).astype(float), 2)


def hidden(model):
    return norm(model.get_layer("hidden").kernel)


def slope(model, x):
    y = keras.ops.convert_to_numpy(model(x, training=False)).astype(float)
    moved = x + (1e-3 * RNG.normal(size=x.shape)).astype("float32")
    dy = keras.ops.convert_to_numpy(model(moved, training=False)).astype(float) - y
    return (np.linalg.norm(dy, axis=1) / np.linalg.norm((moved - x).astype(float), axis=1)).max()


def with_early_normalization():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.BatchNormalization(momentum=0.5),
            layers.Dense(16, "relu"),
            layers.Dense(3),
        ]
    )


def test_a_normalization_before_the_first_layer_is_part_of_the_budget():
    model = constrain(with_early_normalization(), DESIGN)
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    monitor = LyapunovMonitor(DESIGN, verbose=0, on_violation="raise")
    model.fit(0.05 * X, Y, epochs=5, verbose=0, callbacks=[monitor])
    assert monitor.readings[-1].holds
    assert slope(model, 0.05 * X) <= monitor.readings[-1].gain_upper_bound <= 2 * (1 + 1e-6)


def test_an_early_normalization_that_nothing_bounds_proves_no_claim():
    model = constrain(with_early_normalization(), DESIGN)
    model.layers[0].gamma.constraint = None
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    monitor = LyapunovMonitor(DESIGN, verbose=0, on_violation="ignore")
    model.fit(0.05 * X, Y, epochs=5, verbose=0, callbacks=[monitor])
    assert not monitor.readings[-1].holds
    assert slope(model, 0.05 * X) <= monitor.readings[-1].gain_upper_bound


def test_normalization_adapted_again_after_training_began_is_read_again():
    scaling = layers.Normalization()
    scaling.adapt(X)
    model = keras.Sequential([keras.Input((8,)), scaling, layers.Dense(4, "relu"), layers.Dense(3)])
    model = constrain(model, DESIGN)
    model.compile("sgd", LOSS)
    monitor = LyapunovMonitor(DESIGN, verbose=0)
    model.fit(X, Y, verbose=0, callbacks=[monitor])
    assert monitor.readings[-1].holds
    scaling.adapt(0.05 * X)
    assert not monitor.read().holds


def test_an_activation_changed_during_training_is_read_again():
    model = constrain(
        keras.Sequential([keras.Input((8,)), layers.Dense(4, "relu"), layers.Dense(3)]), DESIGN
    )
    model.compile("sgd", LOSS)
    monitor = LyapunovMonitor(DESIGN, verbose=0)
    model.fit(X, Y, verbose=0, callbacks=[monitor])
    assert monitor.readings[-1].holds
    model.layers[0].activation = keras.activations.selu
    assert not monitor.read().holds


class Record(keras.callbacks.Callback):
    """The norm after every hook, and every promise about it."""

    def __init__(self, monitor):
        super().__init__()
        self.monitor, self.seen = monitor, []

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.seen.append((int(self.model.optimizer._iterations.numpy()), hidden(self.model)))


@not_torch
@pytest.mark.parametrize("accumulation", [None, 2])
@pytest.mark.parametrize(("execution", "every"), [(1, 10), (4, 10), (16, 10)])
def test_growth_covers_the_steps_until_the_next_projection(execution, every, accumulation):
    if accumulation and execution > 1:
        pytest.skip("one of the two is enough")
    optimizer = keras.optimizers.Adam(0.02, gradient_accumulation_steps=accumulation)
    model = amortised(every, optimizer, steps_per_execution=execution)
    monitor = LyapunovMonitor(every=1, verbose=0, on_violation="ignore")
    record = Record(monitor)
    for _ in range(2):  # the second `fit` starts where the first ended
        model.fit(X, Y, batch_size=6, verbose=0, callbacks=[monitor, record])
    bounds = [reading.growth["hidden"] for reading in monitor.readings]
    assert max(norm for _, norm in record.seen) <= min(bounds) * (1 + 1e-6)
    assert monitor._steps.limit == max(every, execution)


@not_torch
def test_growth_by_default_covers_one_execution_of_keras():
    few, many = (amortised(10, steps_per_execution=k) for k in (1, 16))
    for model in (few, many):
        model.get_layer("hidden").set_weights([0.4 * np.eye(8), np.zeros(8)])
    path = many.get_layer("hidden").kernel.path
    expected = growth_upper_bounds(many, 16)[path]
    assert growth_upper_bounds(many)[path] == expected
    assert growth_upper_bounds(few)[few.get_layer("hidden").kernel.path] < expected


@not_torch
def test_no_gap_between_projections_exceeds_the_period():
    model = amortised(10, steps_per_execution=4)
    monitor = LyapunovMonitor(verbose=0)
    enforced = []
    original = monitor._steps.enforced

    def spy(model):
        enforced.append(int(model.optimizer._iterations.numpy()))
        original(model)

    monitor._steps.enforced = spy
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[monitor])
    assert np.diff(enforced).max() <= 10


class Spy(keras.callbacks.ModelCheckpoint):
    """Keeps the norms of what it would write."""

    def _save_model(self, epoch=None, batch=None, logs=None):
        self.norms = [*getattr(self, "norms", []), hidden(self.model)]


def test_a_checkpoint_between_epochs_sees_enforced_kernels(tmp_path):
    model = amortised(1000)
    kernel = model.get_layer("hidden").kernel

    def doubled(batch, logs):
        if hasattr(model, "jax_state_sync"):
            model.jax_state_sync()
        kernel.assign(2 * kernel)

    double = keras.callbacks.LambdaCallback(on_train_batch_end=doubled)
    saver = Spy(tmp_path / "model.keras", save_freq=7)
    callbacks = [double, LyapunovMonitor(verbose=0), saver]
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    assert len(saver.norms) == 80 // 7 and max(saver.norms) <= 0.5 * (1 + 1e-6)


def test_a_callback_that_saves_between_epochs_may_not_stand_before_the_monitor(tmp_path):
    model = amortised(1000)
    savers = [
        keras.callbacks.ModelCheckpoint(tmp_path / "model.keras", save_freq=7),
        keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=7),
    ]
    for saver in savers:
        with pytest.raises(ValueError, match="must stand after `LyapunovMonitor`"):
            model.fit(X, Y, verbose=0, callbacks=[saver, LyapunovMonitor(verbose=0)])


def test_weights_restored_after_the_last_epoch_are_enforced_and_reported(capsys):
    model = amortised(1000)
    wild = [5 * w for w in model.get_weights()]
    restore = keras.callbacks.LambdaCallback(on_train_end=lambda logs: model.set_weights(wild))
    monitor = LyapunovMonitor()
    model.fit(X, Y, verbose=0, callbacks=[monitor, restore])
    assert hidden(model) <= 0.5 * (1 + 1e-6)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "weights changed after the last epoch: budgets kept" in last
    assert monitor.readings[-1].sigma["hidden"] == pytest.approx(hidden(model), rel=1e-2)


def test_a_claim_lost_by_restored_weights_warns():
    model = amortised(1000)
    constrain(model, DESIGN)
    free = model.get_layer("head").kernel

    def restore(logs):
        free.constraint = None
        free.assign(9 * free)

    late = keras.callbacks.LambdaCallback(on_train_end=restore)
    with pytest.warns(UserWarning, match="NOT PROVED"):
        model.fit(X, Y, verbose=0, callbacks=[LyapunovMonitor(DESIGN, verbose=0), late])


def test_averaged_weights_and_the_best_ones_are_within_their_budgets(capsys):
    best = keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True)
    for optimizer, more in (
        (keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9), []),
        (keras.optimizers.Adam(0.05), [best]),
    ):
        model = amortised(1000, optimizer)
        monitor = LyapunovMonitor()
        model.fit(X, Y, epochs=3, verbose=0, callbacks=[monitor, *more])
        assert hidden(model) <= 0.5 * (1 + 1e-6)
        bound = monitor.readings[-1].sigma_upper_bound["hidden"]
        assert monitor.readings[-1].sigma["hidden"] <= bound * (1 + 1e-6)
        assert hidden(model) == pytest.approx(monitor.readings[-1].sigma["hidden"], rel=1e-2)


def test_a_layer_that_starts_above_its_bound_keeps_no_budget_before_it_is_projected():
    layer = layers.Conv2DTranspose(3, 3, kernel_constraint=SpectralBound(0.1), name="up")
    model = keras.Sequential([keras.Input((4, 4, 2)), layer])
    model.compile("sgd", "mse")
    monitor = LyapunovMonitor(verbose=0, on_violation="ignore")
    monitor.set_model(model)
    assert not monitor.read().holds
    x = np.zeros((4, 4, 4, 2), "float32")
    model.fit(x, model.predict(x, verbose=0), verbose=0, callbacks=[monitor])
    assert monitor.readings[-1].holds
