"""`RecurrentEquilibrium` beside Keras' own layers: its supply rate holds at every step of `fit`."""

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov.dynamics import Contracting, L2Gain, Supply, certify_dynamics
from tf_lyapunov.layers import RecurrentEquilibrium, RecurrentEquilibriumCell, refresh
from tf_lyapunov.theory.sectors import Indices


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(8, 6, 2)).astype("float32")


@pytest.mark.parametrize(
    ("supply", "arguments"),
    [
        (L2Gain(0.5), {"train_supply": True}),
        pytest.param(
            Indices(0.5, 0.2), {"activation": "tanh", "train_supply": True}, marks=pytest.mark.slow
        ),
        pytest.param(Contracting(0.9), {"feedthrough": True}, marks=pytest.mark.slow),
    ],
    ids=["gain", "indices", "contracting"],
)
def test_every_step_of_training_keeps_the_rate(x, supply, arguments):
    layer = RecurrentEquilibrium(2, 3, supply, neurons=5, return_sequences=True, **arguments)
    model = keras.Sequential([keras.Input((6, 2)), layer])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    proved, supplies = [], []

    class Judge(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if hasattr(self.model, "jax_state_sync"):  # JAX holds the weights while it trains
                self.model.jax_state_sync()
            claim = layer.current_supply
            supplies.append(claim)
            proved.append(certify_dynamics(layer, claim=claim, optimise=False).proved)

    target = np.cumsum(x, axis=1)
    history = model.fit(x, target, epochs=20, batch_size=8, verbose=0, callbacks=[Judge()])
    assert len(proved) == 20 and all(proved)
    assert history.history["loss"][-1] < history.history["loss"][0]
    if arguments.get("train_supply"):
        assert supplies[0] != supplies[-1]


def test_the_layer_is_its_cell_step_by_step_and_saves_as_it_is(x, tmp_path):
    layer = RecurrentEquilibrium(
        2, 3, Supply(-np.eye(2), np.zeros((2, 2)), 2 * np.eye(2)), neurons=5, blocks=2,
        return_sequences=True,
    )  # fmt: skip
    model = keras.Sequential([keras.Input((6, 2)), layer])
    refresh(model)  # else a compiled call computes the weights, in another order of sums
    own = model.predict(x, verbose=0)
    slow = array(keras.layers.RNN(layer.cell, return_sequences=True)(x))
    np.testing.assert_allclose(own, slow, atol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), own)
    config = layer.get_config()
    assert RecurrentEquilibrium.from_config(config).get_config() == config
    cell = layer.cell.get_config()
    assert RecurrentEquilibriumCell.from_config(cell).get_config() == cell


@pytest.mark.parametrize("backwards", [False, True])
def test_the_last_output_is_the_last_of_all_outputs(x, backwards):
    layer = RecurrentEquilibrium(2, 3, L2Gain(1.0), return_sequences=True, go_backwards=backwards)
    every = array(layer(x))
    layer.return_sequences = False
    np.testing.assert_allclose(array(layer(x)), every[:, -1], atol=1e-6)
    turned = RecurrentEquilibrium(2, 3, L2Gain(1.0), return_sequences=True)
    turned.build(x.shape)
    turned.cell.set_weights(layer.cell.get_weights())
    wanted = array(turned(x[:, ::-1].copy() if backwards else x))
    np.testing.assert_allclose(wanted, every, atol=1e-6)


def test_states_are_kept_between_batches_and_can_be_given(x):
    layer = RecurrentEquilibrium(2, 3, L2Gain(1.0), return_sequences=True, return_state=True)
    whole, final = (array(v) for v in layer(x))
    first, middle = layer(x[:, :3])
    second, last = layer(x[:, 3:], initial_state=middle)
    np.testing.assert_allclose(np.hstack([array(first), array(second)]), whole, atol=1e-5)
    np.testing.assert_allclose(array(last), final, atol=1e-5)
    kept = RecurrentEquilibrium(2, 3, L2Gain(1.0), return_sequences=True, stateful=True)
    kept.build(x[:, :3].shape)
    kept.cell.set_weights(layer.cell.get_weights())
    parts = [array(kept(x[:, :3])), array(kept(x[:, 3:]))]
    np.testing.assert_allclose(np.hstack(parts), whole, atol=1e-5)


def test_masks_and_16_bits_are_refused_by_name(x):
    layer = RecurrentEquilibrium(2, 3, L2Gain(1.0))
    with pytest.raises(ValueError, match="no masks"):
        layer(x, mask=np.ones((8, 6), bool))
    with pytest.raises(ValueError, match="no masks"):
        keras.Sequential([keras.Input((6, 2)), keras.layers.Masking(), layer])
    with pytest.raises(ValueError, match=r"must be one tensor \(batch, 3\)"):
        layer(x, initial_state=np.ones((8, 5), "float32"))
    with pytest.raises(ValueError, match="mixed_float16"):
        RecurrentEquilibrium(2, 3, L2Gain(1.0), dtype="mixed_float16")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RecurrentEquilibrium(0, 3, L2Gain(1.0)), "units"),
        (lambda: RecurrentEquilibrium(2, 3, 1.0), "supply=1.0"),
        (lambda: RecurrentEquilibrium(2, 3, L2Gain(1.0), activation="gelu"), "slopes"),
        (lambda: RecurrentEquilibrium(2, 3, L2Gain(1.0), memory=1.0), "memory"),
        (lambda: RecurrentEquilibrium(2, 3, Contracting(0.5), train_supply=True), "train_supply"),
        (
            lambda: RecurrentEquilibrium(2, 3, Indices(0.5, 0.1), feedthrough=False).build(
                (None, 4, 2)
            ),
            "feedthrough=True",
        ),
        (lambda: RecurrentEquilibrium(1, 3, Indices(0.5, 0.1)).build((None, 4, 2)), "negative"),
        (lambda: RecurrentEquilibrium(1, 3, L2Gain(1.0)).build((None, 4, None)), "known size"),
    ],
)
def test_arguments_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_float64_layers_keep_the_rate_with_a_smaller_margin():
    layer = RecurrentEquilibrium(2, 3, L2Gain(1.0), dtype="float64", return_sequences=True)
    layer.build((None, 4, 2))
    assert layer.cell.work_dtype == "float64"
    assert certify_dynamics(layer, claim=L2Gain(1.0), optimise=False).proved


def test_the_monitor_shows_the_gain_over_sequences(x):
    layer = RecurrentEquilibrium(2, 3, L2Gain(0.5), neurons=5, name="memory")
    model = keras.Sequential([keras.Input((6, 2)), layer, keras.layers.Dense(1, name="head")])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    monitor = tfl.callbacks.LyapunovMonitor(verbose=0, on_violation="raise")
    history = model.fit(x, x[:, 0, :1], epochs=2, verbose=0, callbacks=[monitor]).history
    assert history["budget/memory"] == [0.5, 0.5]
    assert history["sigma_upper_bound/memory"][-1] <= 0.5
    proved = certify_dynamics(model, optimise=False).gain_upper_bound
    assert history["gain_upper_bound"][-1] == proved
