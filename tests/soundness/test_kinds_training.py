"""The monitor, its enforcement and the metric: kinds of false words found.

The rule: an odd but legal model is either read rightly, and no perturbation within a certified
radius changes its decision nor does a secant exceed its proven gain, or it is refused by an error
that names what could not be read. `xfail` marks faults that are known and not yet removed.
"""

import keras
import numpy as np
import pytest
from soundness import oracles
from soundness.expectations import L, assert_refusal_names, dense

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError

# The monitor and what it believes ----------------------------------------------------------------


def budgeted(before=(), gain=2.0, units=(8, 2)):
    """A constrained model behind `before`, compiled, and its design."""
    hidden, last = units
    model = keras.Sequential([keras.Input((4,)), *before, L.Dense(hidden, "relu"), L.Dense(last)])
    design = tfl.spectral_design(gain=gain, sectors=[tfl.Sector.of("relu"), tfl.Sector.linear()])
    tfl.constrain(model, design)
    return model, design


def assert_monitor_is_right(model, reading):
    """If the claim is called proved, no secant of the model exceeds the gain it states."""

    def function(x):
        return oracles.evaluate(model, x)

    function.precision = "float32"
    found = oracles.measured_gain(function, model.inputs[0].shape[1:], dtype="float32")
    assert found <= reading.gain_upper_bound * (1 + oracles.GAIN_SLACK)


@pytest.mark.parametrize(
    "first",
    [L.BatchNormalization, L.PReLU, lambda: L.Dense(4, use_bias=False)],
    ids=["batch normalization", "prelu", "free dense"],
)
def test_trainable_scale_before_the_first_stage_is_part_of_the_monitors_gain(first, request):
    rng = np.random.default_rng(0)
    x = (0.05 * rng.normal(size=(256, 4))).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    if first is L.PReLU or first is L.BatchNormalization:
        model, design = budgeted([first()])
        monitor = tfl.callbacks.LyapunovMonitor(design, verbose=0, on_violation="ignore")
    else:
        model, _ = budgeted([])
        model = keras.Sequential([keras.Input((4,)), first(), *model.layers])
        monitor = tfl.callbacks.LyapunovMonitor(None, verbose=0, on_violation="ignore")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss)
    model.fit(x, y, epochs=8, batch_size=32, verbose=0, callbacks=[monitor])
    assert_monitor_is_right(model, monitor.readings[-1])


def test_steps_per_execution_does_not_stretch_the_projection_period():
    model = keras.Sequential([keras.Input((4,)), L.Dense(4, use_bias=False), L.Dense(2)])
    tfl.constrain(model, [1.0, 1.0], guarantee="monitor", every=10)
    model.compile(keras.optimizers.SGD(5.0, clipnorm=1.0), "mse", steps_per_execution=16)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64 * 4, 4)), 100 * rng.normal(size=(64 * 4, 2))
    proven = []

    class Watch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.bounds = tfl.growth_upper_bounds(model)

        def on_train_batch_end(self, batch, logs=None):
            for layer in model.layers:
                norm = np.linalg.norm(np.asarray(layer.kernel, dtype=np.float64), 2)
                proven.append(norm <= self.bounds[layer.kernel.path] * (1 + 1e-6))
            self.bounds = tfl.growth_upper_bounds(model)

    monitor = tfl.callbacks.LyapunovMonitor(verbose=0)
    try:
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[Watch(), monitor])
    except ValueError as error:
        assert "steps_per_execution" in str(error)
        return
    assert all(proven)


def test_checkpoints_by_save_freq_hold_the_budget_in_the_amortised_mode(tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(6, "relu"), L.Dense(2)])
    tfl.constrain(model, [1.0, 1.0], guarantee="monitor", every=50)
    model.compile(keras.optimizers.Adam(0.3), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), 50 * rng.normal(size=(80, 2))
    path = tmp_path / "{epoch}-{batch}.keras"
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_freq=7)
    monitor = tfl.callbacks.LyapunovMonitor(verbose=0)
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[monitor, checkpoint])
    norms = [
        np.linalg.norm(np.asarray(layer.kernel, dtype=np.float64), 2)
        for file in tmp_path.iterdir()
        for layer in keras.models.load_model(file).layers
    ]
    assert norms
    assert max(norms) <= 1 + 1e-6


def test_spectral_bound_on_an_einsum_kernel_is_enforced_or_refused():
    layer = L.EinsumDense(
        "abc,cde->abde",
        (None, 2, 3),
        kernel_constraint=tfl.constraints.SpectralBound(1.0),
    )
    model = keras.Sequential([keras.Input((3, 4)), layer])
    layer.kernel.assign(3 * np.random.default_rng(0).normal(size=layer.kernel.shape))
    try:
        tfl.project(model)
    except (UnsupportedLayerError, ValueError) as error:
        assert_refusal_names(error, [layer.name, "kernel", "EinsumDense"])
        return
    matrix = np.asarray(layer.kernel, dtype=np.float64).reshape(4, -1)
    assert np.linalg.norm(matrix, 2) <= 1 + 1e-6


# The metric --------------------------------------------------------------------------------------


def test_certified_accuracy_of_one_sigmoid_unit_decides_at_one_half():
    model = keras.Sequential([keras.Input((1,)), dense([[0.5]], activation="sigmoid")])
    metric = tfl.metrics.CertifiedAccuracy(0.5, gain=1.0)
    model.compile("sgd", "binary_crossentropy", metrics=[metric])
    x = np.array([[-3.0], [0.1]], dtype="float32")
    found = model.evaluate(x, np.array([1.0, 1.0]), verbose=0, return_dict=True)
    assert found[metric.name] == 0.0  # one decision is wrong, the other 0.2 from its boundary


def test_certified_accuracy_is_right_in_the_first_evaluation_after_compile():
    model = keras.Sequential([keras.Input((2,)), dense(np.eye(2))])
    metric = tfl.metrics.CertifiedAccuracy(0.5, gain=model)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True), metrics=[metric])
    x, y = np.array([[3.0, 0.0], [0.0, 3.0]], dtype="float32"), np.array([0, 1])
    first = model.evaluate(x, y, verbose=0, return_dict=True)[metric.name]
    second = model.evaluate(x, y, verbose=0, return_dict=True)[metric.name]
    assert first == second == 1.0


def test_certified_accuracy_counts_no_wrong_decision_in_the_coding_of_plus_and_minus_one():
    metric = tfl.metrics.CertifiedAccuracy(0.1, gain=1.0)
    rows = np.array([[-1.0, 1.0, -1.0], [1.0, -1.0, -1.0]])
    wrong = np.array([[5.0, 0.0, 1.0], [0.0, 1.0, 5.0]])
    try:
        metric.update_state(rows, wrong)
    except ValueError:
        return
    assert float(metric.result()) == 0.0


def test_certified_accuracy_counts_no_label_out_of_range():
    metric = tfl.metrics.CertifiedAccuracy(0.1, gain=1.0)
    try:
        metric.update_state(np.array([-1, 7]), np.array([[-5.0, -4.0], [-5.0, -4.0]]))
    except ValueError:
        return
    assert not float(metric.result()) > 0.0  # NaN says that there is no such class
