import dataclasses

import keras
import pytest

from tf_lyapunov import datasets, models
from tf_lyapunov.errors import ConfigError
from tf_lyapunov.experiments.reading import parse_config
from tf_lyapunov.planning import estimate, measuring, plan, plan_model
from tf_lyapunov.planning.bounds import bound_cost
from tf_lyapunov.planning.counting import layer_costs
from tf_lyapunov.planning.devices import DEVICES, Device, Efficiency, parse_devices
from tf_lyapunov.planning.steps import (
    bound_seconds,
    compute_seconds,
    layer_seconds,
    memory,
    moved_bytes,
    step,
)
from tf_lyapunov.theory.operators import LinearMap


def _config(text):
    return parse_config(text)


ALEXNET = (
    "{dataset: {name: cifar10}, model: {name: alexnet_cifar}, layers: {budgets: [1, 1, 1, 1, 1]}}"
)


@pytest.mark.parametrize("name", ["digits", "blobs"])
def test_sizes_are_those_of_the_data(name):
    data = datasets.load(name)
    expected = (len(data.x_train), data.input_shape, data.num_classes)
    model = "{name: mlp}"
    assert estimate.sizes(_config(f"{{dataset: {{name: {name}}}, model: {model}}}")) == expected


def test_every_prepared_data_set_has_sizes():
    assert set(datasets.NAMES) <= set(estimate.SIZES)


def test_validation_crop_and_limit_change_the_sizes():
    text = "{dataset: {name: svhn_cropped, validation: 57, crop: 24}, model: {name: mlp}}"
    assert estimate.sizes(_config(text)) == (73_200, (24, 24, 3), 10)
    text = "{dataset: {name: mnist, limit: 9}, model: {name: mlp}}"
    assert estimate.sizes(_config(text))[0] == 9
    with pytest.raises(ConfigError, match="validation"):
        estimate.sizes(_config("{dataset: {name: mnist, validation: 60000}, model: {name: mlp}}"))


def test_memory_is_counted_by_hand():
    costs = layer_costs(keras.Sequential([keras.Input((30,)), keras.layers.Dense(20)]))
    found = memory(costs, [], "adam", False, 8, "float32")
    assert (found.weights, found.gradients, found.optimizer) == (2480, 2480, 4960)
    # The input is kept, and three buffers of its and the output's size pass.
    assert found.activations == 8 * 4 * (30 + 3 * 50)
    half = memory(costs, [], "adam", False, 8, "mixed_bfloat16")
    assert half.weights == 2480 + 1240 and half.activations == found.activations / 2


def test_activations_are_within_a_factor_of_two_of_xlas():
    jax = pytest.importorskip("jax")
    depth, width, batch = 6, 64, 512
    model = keras.Sequential([keras.Input((width,))])
    for _ in range(depth):
        model.add(keras.layers.Dense(width, activation="tanh", use_bias=False))
    weights = [jax.ShapeDtypeStruct((width, width), "float32")] * depth

    def loss(weights, x):
        for w in weights:
            x = jax.numpy.tanh(x @ w)
        return jax.numpy.sum(x)

    x = jax.ShapeDtypeStruct((batch, width), "float32")
    compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    estimated = memory(layer_costs(model), [], "sgd", False, batch, "float32").activations
    assert found / 2 <= estimated <= 2 * found


def test_a_plan_names_the_quickest_setting_that_fits():
    found = plan(_config(ALEXNET), parse_devices("8xH100"))
    assert found.quickest.fits
    fitting = [s for s in found.settings if s.fits]
    assert found.quickest.epoch_seconds == min(s.epoch_seconds for s in fitting)
    assert {s.precision for s in fitting} == {"float32", "mixed_bfloat16"}
    assert {s.every for s in found.settings} == {1, 10, 100}


def test_a_model_too_large_does_not_fit():
    model = keras.Sequential([keras.Input((2048,)), keras.layers.Dense(2048)])
    cluster = parse_devices("T4")
    found = plan_model(model, cluster, examples=10**8, batch=2**20, every=1)
    assert found.chosen.memory.total > cluster.device.memory and not found.chosen.fits
    assert found.quickest is None or found.quickest.batch < 2**20


def test_baselines_have_no_constraint_cost():
    text = "{dataset: {name: mnist}, model: {name: mlp}}"
    found = plan(_config(text), parse_devices("cpu"))
    assert found.bounds == [] and found.least_every is None
    assert found.chosen.step.constraints == 0.0 and found.chosen.step.overhead == 1.0


def test_amortising_lowers_the_cost_towards_the_power_steps():
    model, cluster = models.alexnet_cifar(), parse_devices("cpu")
    cost = {
        every: plan_model(model, cluster, examples=1000, batch=128, every=every).chosen.step
        for every in (1, 10, 100)
    }
    assert cost[1].constraints > cost[10].constraints > cost[100].constraints > 0
    assert cost[1].compute == cost[100].compute


def test_the_least_period_keeps_the_overhead_at_the_goal():
    found = plan_model(models.alexnet_cifar(), parse_devices("cpu"), examples=1000, batch=128)
    assert found.least_every is not None
    made = step(found.costs, found.bounds, found.cluster, 128, "float32", found.least_every)
    assert made.overhead <= estimate.GOAL


def test_more_devices_take_less_time_per_epoch_and_communicate():
    text = ALEXNET.replace("layers", "training: {batch_size: 4096}, layers")
    one, eight = (plan(_config(text), parse_devices(d)) for d in ("H100", "8xH100"))
    assert eight.chosen.epoch_seconds < one.chosen.epoch_seconds
    assert one.chosen.step.all_reduce == 0 < eight.chosen.step.all_reduce
    assert eight.chosen.memory.activations == one.chosen.memory.activations / 8


def test_a_batch_smaller_than_the_devices_is_refused():
    with pytest.raises(ConfigError, match="at least one sample"):
        plan(
            _config(ALEXNET.replace("layers", "training: {batch_size: 4}, layers")),
            parse_devices("8xH100"),
        )


@pytest.mark.parametrize(
    "wrong",
    [{"precision": "float8"}, {"optimizer": "lion"}, {"batch": 0}, {"examples": 0}, {"epochs": 0}],
)
def test_arguments_out_of_range_are_refused(wrong):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="Received"):
        plan_model(model, parse_devices("cpu"), **{"examples": 10, "batch": 2, **wrong})


def test_a_machine_does_not_measure_what_it_has_not():
    here = measuring.present_device()
    other = next(name for name in DEVICES if name != here)
    with pytest.raises(ValueError, match="its own devices"):
        measuring.measure(other)


def _device(**efficiency):
    shares = dataclasses.replace(Efficiency(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0), **efficiency)
    return Device("one", 1e9, 1e9, {"float32": 1e9}, 1e9, shares)


def test_products_and_passes_of_a_convolution_add_up():
    layer = keras.layers.Conv2D(2, 3, padding="same", use_bias=False)
    (cost,) = layer_costs(keras.Sequential([keras.Input((4, 4, 3)), layer]))
    flops, moved = 5 * (cost.forward + cost.backward), moved_bytes(cost, 5, "float32")
    assert moved == 4 * (5 * (48 + 32) * 3 + 3 * 54)
    for shares, expected in (
        ({}, flops + moved),
        ({"convolution": 0.5}, 2 * flops + moved),
        ({"layout": 0.25}, flops + 4 * moved),
    ):
        assert layer_seconds(cost, _device(**shares), 5, "float32") == pytest.approx(expected / 1e9)


def test_normalization_has_a_rate_of_its_own_and_bounds_and_inputs_their_overhead():
    model = keras.Sequential([keras.Input((6,)), keras.layers.BatchNormalization()])
    (cost,) = layer_costs(model)
    moved = moved_bytes(cost, 8, "float32")
    half = layer_seconds(cost, _device(normalization=0.5), 8, "float32")
    assert half == pytest.approx(2 * moved / 1e9)
    assert layer_seconds(cost, _device(bandwidth=0.5), 8, "float32") == pytest.approx(moved / 1e9)
    without, fed = (compute_seconds([cost], _device(feed=f), 8, "float32") for f in (0.0, 1.0))
    assert fed - without == pytest.approx(4 * 8 * 6)
    bound = bound_cost((3, 2), LinearMap("dense", (3,)))
    times = [bound_seconds(bound, _device(bound=b)) for b in (0.0, 1.0)]
    assert times[1] - times[0] == pytest.approx(1.0)


@pytest.mark.slow  # two minutes
def test_the_rates_of_this_machine_are_measured():
    found = measuring.measure()
    shares = found.efficiency
    assert shares.source == "measured here" and found.name == measuring.present_device()
    rates = dataclasses.asdict(shares)
    del rates["source"]
    assert all(0 < rate < float("inf") for rate in rates.values()), rates
    # Other figures than those that `DEVICES` lists, and of a real machine.
    assert 1e9 < found.peaks["float32"] < 1e15 and 1e8 < found.bandwidth < 1e14
    assert shares.step < 1 and shares.call < shares.step and 0.1 <= shares.factor < 10
