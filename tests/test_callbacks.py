"""`LyapunovMonitor` inside `fit`: what it logs, when it projects, and what it does on violation."""

import warnings

import keras
import numpy as np
import pytest

from tf_lyapunov.bounds.layer_indices import layer_indices
from tf_lyapunov.callbacks import ClaimLost, LyapunovMonitor
from tf_lyapunov.certification import register_gain
from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.design import spectral_design
from tf_lyapunov.projection import constrain
from tf_lyapunov.theory.sectors import Indices, Sector

layers = keras.layers
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 6)).astype("float32")
Y = np.arange(96) % 3
SECTORS = [Sector.of("leaky_relu", negative_slope=0.1), Sector.linear()]


def network(**compile_options):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, name="hidden"),
            layers.LeakyReLU(negative_slope=0.1),
            layers.Dense(3, name="head"),
        ]
    )
    options = {"optimizer": keras.optimizers.SGD(0.1), "loss": LOSS, **compile_options}
    model.compile(**options)
    return model


def sync(model):
    """JAX's trainer holds the weights itself while it trains, until it is asked for them."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def doubling(model):
    """A callback that doubles a kernel after each step."""

    def double(batch, logs):
        sync(model)
        kernel = model.get_layer("hidden").kernel
        kernel.assign(2 * kernel)

    return keras.callbacks.LambdaCallback(on_train_batch_end=double)


def sigma(model, name):
    sync(model)
    return np.linalg.norm(keras.ops.convert_to_numpy(model.get_layer(name).kernel).astype(float), 2)


def test_logs_hold_every_promised_entry_and_reach_history_and_csv(tmp_path):
    design = spectral_design(Indices(0.4, -2.0), SECTORS)
    model = constrain(network(), design)
    path = tmp_path / "log.csv"
    history = model.fit(
        X,
        Y,
        epochs=2,
        verbose=0,
        callbacks=[LyapunovMonitor(design, verbose=0), keras.callbacks.CSVLogger(path)],
    ).history
    for name in ("hidden", "head"):
        for entry in ("sigma", "sigma_upper_bound", "budget", "delta", "nu"):
            assert len(history[f"{entry}/{name}"]) == 2
        assert history[f"sigma/{name}"][-1] <= history[f"sigma_upper_bound/{name}"][-1] * (1 + 1e-6)
        truth = sigma(model, name)
        assert history[f"sigma_upper_bound/{name}"][-1] >= truth
        assert history[f"sigma/{name}"][-1] == pytest.approx(truth, rel=1e-2)
    assert history["cascade_margin"][-1] >= 0
    assert history["gain_upper_bound"][-1] <= design.gain * (1 + 1e-9)
    assert "gain_upper_bound" in path.read_text().splitlines()[0]


def test_the_gain_bound_is_never_below_a_measured_gain(traced_twice):
    design = spectral_design(gain=2.0, sectors=SECTORS)
    model = constrain(network(), design)
    monitor = LyapunovMonitor(design, verbose=0)
    model.fit(X, Y, epochs=3, verbose=0, callbacks=[monitor])
    u, v = RNG.normal(size=(2, 4000, 6)).astype("float32")
    dy = keras.ops.convert_to_numpy(model(u) - model(v)).astype(float)
    gains = np.linalg.norm(dy, axis=1) / np.linalg.norm((u - v).astype(float), axis=1)
    assert gains.max() <= monitor.readings[-1].gain_upper_bound <= 2.0 * (1 + 1e-6)


class NormAt(keras.callbacks.Callback):
    """Records a layer's norm at the hooks that other callbacks save or evaluate at."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_test_batch_begin(self, batch, logs=None):
        self.seen.append(sigma(self.model, "hidden"))

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(sigma(self.model, "hidden"))


def test_evaluation_checkpoints_and_the_end_see_projected_weights_in_amortised_mode():
    model = constrain(network(), [0.5, 0.5], guarantee="monitor", every=5)
    # Doubling the kernel after each step stands for an estimate that was too low.
    double, recorder = doubling(model), NormAt()
    callbacks = [double, LyapunovMonitor(verbose=0), recorder]
    model.fit(X, Y, epochs=2, batch_size=16, verbose=0, callbacks=callbacks, validation_data=(X, Y))
    assert recorder.seen and max(recorder.seen) <= 0.5 * (1 + 1e-6)
    assert sigma(model, "hidden") <= 0.5 * (1 + 1e-6)


def test_exponential_moving_averages_are_projected_at_the_end():
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
    model = constrain(network(optimizer=optimizer), [0.5, 0.5])
    model.get_layer("hidden").kernel.assign(10 * model.get_layer("hidden").kernel)
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[LyapunovMonitor(verbose=0)])
    assert sigma(model, "hidden") <= 0.5 * (1 + 1e-6)


def test_a_conic_claim_is_watched_by_the_distances_to_its_balls():
    leaky = Sector.of("leaky_relu", negative_slope=0.5)
    design = spectral_design(Indices(0.3, 0.05), [leaky, Sector.linear()])
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3),
            layers.LeakyReLU(negative_slope=0.5),
            layers.Dense(3),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    constrain(model, design)
    monitor = LyapunovMonitor(design, verbose=0, on_violation="raise")
    model.fit(X[:, :3], Y, epochs=2, verbose=0, callbacks=[monitor])
    assert monitor.readings[-1].holds
    model.layers[0].kernel.constraint = None
    model.layers[0].kernel.assign(-model.layers[0].kernel)  # same norm, outside every cone
    assert not monitor.read().holds


def unconstrained_claim():
    design = spectral_design(gain=1e-3, sectors=SECTORS)
    return design, network()


def test_a_lost_claim_warns_by_default():
    design, model = unconstrained_claim()
    with pytest.warns(UserWarning, match="NOT PROVED"):
        model.fit(X, Y, verbose=0, callbacks=[LyapunovMonitor(design, verbose=0)])


def test_a_lost_claim_can_stop_training():
    design, model = unconstrained_claim()
    monitor = LyapunovMonitor(design, verbose=0, on_violation="stop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = model.fit(X, Y, epochs=5, verbose=0, callbacks=[monitor])
    assert len(history.epoch) == 1


def test_a_lost_claim_can_raise_or_be_ignored():
    design, model = unconstrained_claim()
    with pytest.raises(ClaimLost, match="NOT PROVED"):
        monitor = LyapunovMonitor(design, verbose=0, on_violation="raise")
        model.fit(X, Y, verbose=0, callbacks=[monitor])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        monitor = LyapunovMonitor(design, verbose=0, on_violation="ignore")
        model.fit(X, Y, verbose=0, callbacks=[monitor])
    assert not monitor.readings[-1].holds


def test_readings_every_k_steps_are_kept():
    design = spectral_design(gain=2.0, sectors=SECTORS)
    model = constrain(network(), design)
    monitor = LyapunovMonitor(design, every=2, verbose=0)
    model.fit(X, Y, batch_size=16, epochs=1, verbose=0, callbacks=[monitor])
    assert len(monitor.readings) == 3 + 1  # six steps, and the epoch's end


def test_periods_count_steps_and_not_executions():
    design = spectral_design(gain=2.0, sectors=SECTORS)
    model = constrain(network(steps_per_execution=3), design)
    monitor = LyapunovMonitor(design, every=2, verbose=0)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[monitor])
    # Twelve steps an epoch in executions of three: each crosses a multiple of two.
    assert len(monitor.readings) == 2 * (4 + 1)


def test_early_stopping_can_watch_the_gain():
    model = constrain(network(), [0.5, 0.5])
    stop = keras.callbacks.EarlyStopping("gain_upper_bound", patience=1, mode="min", min_delta=10)
    history = model.fit(X, Y, epochs=9, verbose=0, callbacks=[LyapunovMonitor(verbose=0), stop])
    assert len(history.epoch) == 2


def test_the_summary_line_names_the_tightest_layer(capsys):
    design = spectral_design(gain=2.0, sectors=SECTORS)
    model = constrain(network(), design)
    model.fit(X, Y, verbose=0, callbacks=[LyapunovMonitor(design)])
    line = capsys.readouterr().out
    assert "claim proved" in line and "tightest h" in line


def test_state_round_trips_so_that_a_resumed_run_reads_the_same():
    model = constrain(network(), [0.5, 0.5])
    first = LyapunovMonitor(verbose=0)
    model.fit(X, Y, verbose=0, callbacks=[first])
    second = LyapunovMonitor(verbose=0)
    second.set_model(model)
    second.set_state(first.get_state())
    assert second.read().sigma == first.read().sigma


def test_float16_policies_are_monitored_on_the_float32_master():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = constrain(network(), [0.5, 0.5])
    finally:
        keras.config.set_dtype_policy("float32")
    model.fit(X, Y, verbose=0, callbacks=[LyapunovMonitor(verbose=0)])
    assert isinstance(model.get_layer("hidden").kernel_constraint, SpectralBound)
    assert sigma(model, "hidden") <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": "step"},
        {"on_violation": "panic"},
        {"iterations": 0},
        {"indices_every": 0},
        {"indices_every": 1},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError):
        LyapunovMonitor(**arguments)


def test_a_design_with_another_number_of_layers_is_refused():
    design = spectral_design(gain=2.0, sectors=[*SECTORS, Sector.linear()])
    with pytest.raises(ValueError, match="one budget per stage"):
        network().fit(X, Y, verbose=0, callbacks=[LyapunovMonitor(design)])


def test_true_indices_are_measured_every_k_epochs_and_beat_those_of_the_norms(capsys):
    design = spectral_design(Indices(0.4, -2.0), SECTORS)
    model = constrain(network(), design)
    monitor = LyapunovMonitor(design, indices_every=2, verbose=2)
    history = model.fit(X, Y, epochs=3, verbose=0, callbacks=[monitor]).history
    for name in ("hidden", "head"):
        first, second, third = history[f"true_nu/{name}"]
        assert first == second != third  # measured after the first and the third epoch
        assert first >= history[f"nu/{name}"][0]
        assert history[f"true_delta/{name}"][0] == history[f"delta/{name}"][0]
    assert "true nu of" in capsys.readouterr().out.splitlines()[0]
    resumed = LyapunovMonitor(design, verbose=0)
    resumed.set_model(model)
    resumed.set_state(monitor.get_state())
    assert resumed.read().true_indices == monitor.readings[-1].true_indices


def test_true_indices_are_those_of_the_layers_weights():
    claims = [Indices(0.5, -0.4), Indices(0.5, -0.4)]
    design = spectral_design(Indices(0.1, -2.0), SECTORS, layer_indices=claims)
    model = constrain(network(), design)
    monitor = LyapunovMonitor(design, verbose=0, indices_every=1)
    model.fit(X, Y, verbose=0, callbacks=[monitor])
    kernel = keras.ops.convert_to_numpy(model.get_layer("hidden").kernel).astype(float)
    found = monitor.readings[-1].true_indices["hidden"]
    expected = layer_indices(kernel, SECTORS[0], delta=found.delta).nu
    assert found.nu == expected >= monitor.readings[-1].check.indices[0].nu
    assert found.nu < layer_indices(0.5 * kernel, SECTORS[0], delta=found.delta).nu


def test_the_amortised_enforcement_between_epochs_bounds_the_true_norm():
    model = constrain(network(), [0.5, 0.5], guarantee="monitor", every=2)
    double, seen = doubling(model), []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(sigma(model, "hidden"))
    )
    callbacks = [double, LyapunovMonitor(verbose=0), record]
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=callbacks)
    assert max(seen[1::2]) <= 0.5 < min(seen[0::2])


def test_growth_is_not_promised_where_something_else_moves_with_the_kernel():
    """A batch normalization, or a kernel without a bound beside the bounded one."""

    def growth(*middle):
        model = keras.Sequential([keras.Input((4, 1)), *middle, keras.layers.Dense(2, name="last")])
        constrain(model, [0.5, 0.5], guarantee="monitor", every=5)
        for layer in model.layers:
            if hasattr(layer, "pointwise_kernel"):
                layer.pointwise_kernel.constraint = None
        model.compile("adam", "mse")
        monitor = LyapunovMonitor()
        monitor.set_model(model)
        monitor.on_train_begin()
        return monitor.read().growth

    assert list(growth(keras.layers.Dense(3, name="first"))) == ["first", "last"]
    normalized = [keras.layers.Dense(3, name="first"), keras.layers.BatchNormalization()]
    assert "first" not in growth(*normalized)
    assert "first" not in growth(keras.layers.SeparableConv1D(2, 3, name="first"))


def watched(model, design=None):
    model.compile("sgd", "mse")
    monitor = LyapunovMonitor(design, on_violation="ignore")
    monitor.set_model(model)
    monitor.on_train_begin()
    return monitor


def test_learned_slopes_are_read_again_and_may_lose_the_claim():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, use_bias=False)])
    model.add(keras.layers.PReLU())
    model.add(keras.layers.Dense(3, use_bias=False))
    design = spectral_design(gain=1.0, sectors=[Sector(0.0, 1.0), Sector.linear()])
    monitor = watched(constrain(model, design), design)
    assert monitor.read().holds
    model.layers[1].alpha.assign(np.full(3, 10.0))
    reading = monitor.read()
    assert not reading.holds and "sectors" in monitor.summary(reading)
    assert reading.gain_upper_bound >= 9.9 * np.prod(
        [np.linalg.norm(model.layers[i].get_weights()[0], 2) for i in (0, 2)]
    )


def test_a_steeper_activation_than_the_design_assumes_proves_no_claim():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(3, "selu"), keras.layers.Dense(3)]
    )
    for layer in model.layers:
        layer.set_weights([0.7 * np.eye(3), np.zeros(3)])
    design = spectral_design(gain=0.5, sectors=[Sector(0.0, 1.0), Sector.linear()])
    reading = watched(model, design).read()
    assert not reading.holds and reading.gain_upper_bound > 0.86


def test_a_design_for_a_chain_proves_nothing_about_a_branched_model_or_a_part_of_one():
    x = keras.Input((3,))
    h = keras.layers.Dense(3, "relu", name="a")(x)
    branched = keras.Model(x, keras.layers.Add()([x, keras.layers.Dense(3, name="b")(h)]))
    design = spectral_design(gain=0.5, sectors=[Sector(0.0, 1.0), Sector.linear()])
    reading = watched(constrain(branched, design), design).read()
    assert not reading.holds and reading.gain_upper_bound >= 1.0


def test_the_gain_of_a_model_without_stages_is_not_one():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Rescaling(5.0)])
    assert watched(model).read().gain_upper_bound == 5.0


def test_declared_gains_are_asked_again():
    class Amplifier(keras.layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            return self.factor * x

    register_gain(Amplifier, lambda layer: abs(float(layer.factor)), assumption="It scales.")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), Amplifier()])
    model.layers[0].set_weights([np.eye(3), np.zeros(3)])
    monitor = watched(model)
    assert monitor.read().gain_upper_bound < 1.1
    model.layers[1].factor.assign(4.0)
    assert monitor.read().gain_upper_bound >= 4.0
    register_gain(Amplifier, None)


def test_a_change_of_sign_between_layers_loses_a_conic_claim():
    """Its gain is 1, so that no budget sees it; the network is then -W₂(-W₁) no more."""
    x = keras.Input((3,))
    y = layers.Dense(3)(keras.ops.negative(layers.Dense(3)(x)))
    model = keras.Model(x, y)
    design = spectral_design(Indices(0.3, 0.05), [Sector.linear()] * 2)
    with pytest.raises(ValueError, match="nothing but an activation"):
        constrain(model, design)
    centers = [center for center, _ in design.balls]
    for layer, center in zip((model.layers[1], model.layers[-1]), centers, strict=True):
        layer.set_weights([center * np.eye(3), np.zeros(3)])
    assert not watched(model, design).read().holds


def test_without_a_claim_none_is_called_proved():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    monitor = watched(model)
    assert "no claim" in monitor.summary(monitor.read())
    monitor = watched(constrain(model, [0.5]))
    assert "budgets kept" in monitor.summary(monitor.read())


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e30])
def test_estimates_are_of_the_kernel_that_computes_and_never_above_its_bound(policy, size):
    if policy == "mixed_float16" and size != 1.0:
        pytest.skip("float16 holds no such numbers")
    dense = keras.layers.Dense(4, dtype=policy, name="dense")
    model = keras.Sequential([keras.Input((6,)), dense])
    monitor = LyapunovMonitor(verbose=0)
    monitor.set_model(model)
    for seed in range(5):
        dense.kernel.assign(np.random.default_rng(seed).normal(size=(6, 4)) * size)
        reading = monitor.read()
        bound = reading.sigma_upper_bound["dense"]
        # Within what float32 rounds, and near it after some steps.
        assert 0.5 * bound < reading.sigma["dense"] <= bound * (1 + 1e-6)
