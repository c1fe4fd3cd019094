"""The contract of Lipschitz layers: cache, gradients, saving, compilers, distribution, backends."""

import functools
import importlib.util
import math

import fresh_processes
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from tf_lyapunov.layers import base
from tf_lyapunov.layers.base import LipschitzLayer, refresh, representable, rounded_down
from tf_lyapunov.layers.normalized import SpectralDense
from tf_lyapunov.layers.orthogonal import CayleyDense
from tf_lyapunov.layers.potential import ConvexPotentialConv2D, ConvexPotentialDense
from tf_lyapunov.layers.sandwich import SandwichConv2D, SandwichDense
from tf_lyapunov.layers.sdp import SDPLipschitzConv2D, SDPLipschitzDense

IMAGE = (6, 6, 2)
FACTORIES = {
    "potential": lambda **k: (ConvexPotentialConv2D(3, 3, **k), ConvexPotentialDense(5, **k)),
    "power": lambda **k: (
        ConvexPotentialConv2D(3, 3, norm="power", **k),
        ConvexPotentialDense(5, norm="power", **k),
    ),
    "sdp": lambda **k: (SDPLipschitzConv2D(3, 3, **k), SDPLipschitzDense(5, **k)),
    "sandwich": lambda **k: (SandwichConv2D(3, 3, 2, **k), SandwichDense(5, **k)),
}


def network(family, **arguments):
    convolution, dense = FACTORIES[family](**arguments)
    layers = [convolution, keras.layers.Flatten(), dense, keras.layers.Dense(3)]
    return keras.Sequential([keras.Input(IMAGE), *layers])


def data(n=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, *IMAGE)).astype("float32"), rng.integers(0, 3, n)


def lipschitz_layers(model):
    return [v for v in model._flatten_layers() if isinstance(v, LipschitzLayer)]


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


@pytest.mark.parametrize("family", FACTORIES)
def test_inference_mutates_nothing(family):
    model, (x, _) = network(family), data()
    before = values(model.variables)
    model(x, training=False)
    model.predict(x, verbose=0)
    for a, b in zip(before, values(model.variables), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", FACTORIES)
def test_a_stale_cache_is_never_used_and_a_fresh_one_is(family):
    model, (x, _) = network(family), data()
    first = model.predict(x, verbose=0)
    assert refresh(model) == 2
    np.testing.assert_allclose(model.predict(x, verbose=0), first, atol=1e-5)
    layer = lipschitz_layers(model)[1]
    cached = layer._cache[0]
    kept = np.array(ops.convert_to_numpy(cached))
    cached.assign(kept * 0)  # as nobody should: shows that the cache is what inference reads
    assert np.abs(model.predict(x, verbose=0) - first).max() > 1e-3
    layer.kernel.assign(layer.kernel + 0.1)
    moved = model.predict(x, verbose=0)
    reference = model(x, training=True) if family != "power" else model(x)
    np.testing.assert_allclose(moved, ops.convert_to_numpy(reference), atol=1e-4)


def test_variables_of_zeros_have_no_cache_until_it_is_filled():
    layer = SandwichDense(2, kernel_initializer="zeros", dtype="float64")
    layer.build((None, 2))
    # A raw kernel of zeros is A = I, B = 0, and not the zeros of an empty cache.
    inner, outer = layer.effective(training=False)
    assert np.abs(ops.convert_to_numpy(outer)).max() > 1
    assert np.abs(ops.convert_to_numpy(inner)).max() == 0


def test_weights_that_are_not_finite_reach_the_output_and_never_the_cache():
    layer = ConvexPotentialDense(3)
    x = np.ones((2, 3), "float32")
    layer(x)
    layer.refresh()
    layer.kernel.assign(np.full((3, 3), np.nan))
    for _ in range(2):
        assert np.all(np.isnan(ops.convert_to_numpy(layer(x))))
        layer.refresh()
    with pytest.raises(ValueError, match="finite"):
        layer.gain_upper_bound()


@pytest.mark.parametrize("family", FACTORIES)
def test_weights_train_through_a_call_for_inference_from_a_fresh_cache(family):
    """Fine-tuning calls a model with `training=False`: its gradients must not be lost."""
    body, (x, y) = network(family), data()
    refresh(body)
    inputs = keras.Input(IMAGE)
    model = keras.Model(inputs, body(inputs, training=False))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(True))
    before = values(v for layer in lipschitz_layers(model) for v in layer.trainable_variables)
    model.fit(x, y, verbose=0)
    after = values(v for layer in lipschitz_layers(model) for v in layer.trainable_variables)
    moved = [np.abs(a - b).max() for a, b in zip(before, after, strict=True)]
    assert np.all(np.array(moved) > 0)


def test_the_gradient_is_the_same_with_and_without_a_cache():
    import tensorflow as tf

    layer, x = SDPLipschitzDense(4), np.ones((2, 3), "float32")
    layer(x)

    def gradient(training):
        with tf.GradientTape() as tape:
            loss = ops.sum(ops.square(layer(x, training=training)))
        return values(tape.gradient(loss, layer.trainable_variables))

    stale, training = gradient(False), gradient(True)
    layer.refresh()
    for a, b, c in zip(stale, training, gradient(False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_allclose(c, b, rtol=1e-6)


def test_no_two_variables_share_memory():
    layer = ConvexPotentialDense(3)
    layer.build((None, 3))
    layer.refresh()
    copy = values(layer._copies)[0]
    layer.kernel.assign(layer.kernel + 1.0)
    np.testing.assert_array_equal(values(layer._copies)[0], copy)


@pytest.mark.parametrize("family", FACTORIES)
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_and_keeps_its_gain(family, dtype):
    model, (x, y) = network(family, dtype=dtype), data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss, run_eagerly=True)
    model.fit(x, y, epochs=2, verbose=0)
    assert np.all(np.isfinite(model.predict(x, verbose=0)))
    for layer in lipschitz_layers(model):
        assert layer.kernel.dtype == "float32"
        if family != "power":
            assert layer.gain_upper_bound() <= layer.rounding_inflation * (1 + 1e-9)


@pytest.mark.parametrize(
    "family",
    ["potential", *(pytest.param(n, marks=pytest.mark.slow) for n in ("power", "sdp", "sandwich"))],
)
def test_xla_computes_the_same_model(family):
    (x, y), results = data(), []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model = network(family)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit)
        model.fit(x, y, verbose=0, shuffle=False)
        results.append(model.predict(x, verbose=0))
    np.testing.assert_allclose(*results, atol=1e-4)


LOAD = """
import sys, numpy as np, keras
import tf_lyapunov.layers.potential, tf_lyapunov.layers.sandwich, tf_lyapunov.layers.sdp
folder = sys.argv[1]
for name in sys.argv[2:]:
    model = keras.models.load_model(f"{folder}/{name}.keras")
    saved = np.load(f"{folder}/{name}.npz")
    assert np.abs(model.predict(saved["x"], verbose=0) - saved["y"]).max() < 1e-5, name
    for layer in (model.layers[0], model.layers[2]):
        assert bool(layer._is_fresh(layer._sources))
        bound = layer.gain_upper_bound() if name != "power" else 1.0
        assert bound <= 1 + 1e-9, (name, bound)
print("loaded on", keras.backend.backend())
"""


@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.slow)])
def test_models_load_in_a_new_process(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    x, y = data()
    for name in FACTORIES:
        model = network(name)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.1), loss, run_eagerly=True)
        model.fit(x, y, verbose=0)
        model.save(tmp_path / f"{name}.keras")
        np.savez(tmp_path / f"{name}.npz", x=x, y=model.predict(x, verbose=0))
    output = run(backend, LOAD, tmp_path, *FACTORIES)
    assert f"loaded on {backend}" in output


def run(backend, script, *arguments):
    return fresh_processes.output(script, *arguments, backend=backend)


def test_weights_files_hold_no_cache_and_fill_it_when_loaded(tmp_path):
    model, other = network("sdp"), network("sdp")
    model.save_weights(tmp_path / "a.weights.h5")
    other.load_weights(tmp_path / "a.weights.h5")
    x, _ = data()
    np.testing.assert_allclose(other.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    for layer in lipschitz_layers(other):
        assert bool(layer._is_fresh(layer._sources))
        with pytest.raises(ValueError, match="must be given 3 variables"):
            layer.load_own_variables({"0": np.zeros(3)})


def test_set_weights_makes_the_cache_stale():
    model, other, (x, _) = network("sdp"), network("sdp"), data()
    refresh(model), refresh(other)
    raw = [values(v.trainable_variables) for v in lipschitz_layers(other)]
    for layer, given_values in zip(lipschitz_layers(model), raw, strict=True):
        for variable, value in zip(layer.trainable_variables, given_values, strict=True):
            variable.assign(value)
    model.layers[-1].set_weights(other.layers[-1].get_weights())
    expected = other.predict(x, verbose=0)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    model.set_weights(other.get_weights())
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)


def mixed(name, first, second):
    """Variables of two models put together as tools do."""
    if name == "average":
        return [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    if name == "moving average":
        return [a + 1e-3 * (b - a) for a, b in zip(first, second, strict=True)]
    one_by_one = {
        "scaled": lambda a: 2 * a,
        "rounded": lambda a: np.round(a, 2),
        "pruned": lambda a: a * (np.abs(a) > 1e-3),
        "clipped": lambda a: np.clip(a, -0.5, 0.5),
        "16 bits": lambda a: np.clip(a, -6e4, 6e4).astype("float16").astype(a.dtype),
    }
    if name in one_by_one:
        return [one_by_one[name](a) for a in first]
    return second


def mixed_layers(factor, gain):
    """A model of four kinds of layers whose raw kernels are `factor` as large, its cache full."""
    kinds = [
        functools.partial(ConvexPotentialDense, 5),
        functools.partial(SpectralDense, 4),
        functools.partial(SandwichDense, 6),
        functools.partial(CayleyDense, 3),
    ]
    model = keras.Sequential([keras.Input((6,)), *(make(max_gain=gain) for make in kinds)])
    for layer in model.layers:
        layer.kernel.assign(layer.kernel * factor)
    refresh(model)
    return model


@functools.cache
def states():
    """Variables of the two models that are mixed, by the attribute that names them."""
    models = [mixed_layers(factor, 1.0) for factor in (10.0, 0.1)]
    return {
        attribute: [values(getattr(model, attribute)) for model in models]
        for attribute in ("weights", "variables")
    }


@functools.cache
def kept_target(gain):
    """A model that takes the mixed variables, and its own: `predict` is traced once a gain."""
    model = mixed_layers(1.0, gain)
    return model, values(model.variables)


@pytest.mark.parametrize("attribute", ["weights", "variables"])
@pytest.mark.parametrize(
    "how",
    ["average", "moving average", "scaled", "rounded", "pruned", "clipped", "16 bits", "copied"],
)
def test_mixed_variables_of_models_leave_no_wrong_cache(how, attribute):
    state = states()[attribute]
    gain = 0.25 if how == "copied" else 1.0
    target, own = kept_target(gain)
    for variable, value in zip(target.variables, own, strict=True):
        variable.assign(value)
    assert all(bool(v._is_fresh(v._sources)) for v in target.layers)
    for variable, value in zip(getattr(target, attribute), mixed(how, *state), strict=True):
        variable.assign(value)
    assert not any(bool(v._is_fresh(v._sources)) for v in target.layers)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    cached = target.predict(x, verbose=0)
    np.testing.assert_allclose(cached, values([target(x, training=True)])[0], atol=1e-5)
    for layer in target.layers:
        if hasattr(layer, "gain_upper_bound"):
            found = layer.gain_upper_bound()
        else:
            found = np.linalg.norm(layer.effective_values()["kernel"], 2)
        assert found <= gain * layer.rounding_inflation * (1 + 1e-9)


def test_a_changed_setting_makes_the_cache_stale():
    layer = SpectralDense(3)
    layer.build((None, 4))
    assert np.linalg.norm(layer.effective_values()["kernel"], 2) > 0.9
    layer.max_gain = 0.5
    assert np.linalg.norm(layer.effective_values()["kernel"], 2) <= 0.5


def test_the_cache_is_no_weight():
    model = network("sdp")
    refresh(model)
    trainable, every = (
        sum(math.prod(v.shape) for v in variables)
        for variables in (model.trainable_variables, model.variables)
    )
    assert model.count_params() == trainable < every


BACKENDS = """
import keras, numpy as np, sys
from tf_lyapunov.layers.base import LipschitzLayer, refresh
from tf_lyapunov.layers.potential import *
from tf_lyapunov.layers.sandwich import *
from tf_lyapunov.layers.sdp import *

def main(layers):
    x = np.random.default_rng(0).standard_normal((12, 6, 6, 2)).astype("float32")
    y = np.arange(12) % 3
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(True)
    model.compile(keras.optimizers.Adam(0.1), loss)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    for a, v in zip(before, model.trainable_variables):
        assert np.abs(a - keras.ops.convert_to_numpy(v)).max() > 0, v.path
    logits = model.predict(x, verbose=0)
    state = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    assert np.array_equal(logits, model.predict(x, verbose=0)) and np.all(np.isfinite(logits))
    for a, v in zip(state, model.variables):
        assert np.array_equal(a, keras.ops.convert_to_numpy(v)), v.path
    own = [v for v in layers if isinstance(v, LipschitzLayer)]
    assert refresh(model) == len(own)
    assert np.abs(model.predict(x, verbose=0) - logits).max() < 2e-2
    for layer in own:
        if getattr(layer, "guaranteed", True):
            bound = layer.gain_upper_bound()
            assert bound <= layer.rounding_inflation * (1 + 1e-9), (layer.name, bound)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]
    model.fit(x, y, batch_size=4, verbose=0)  # with full caches, which do not train
    for a, v in zip(before, model.trainable_variables):
        assert np.abs(a - keras.ops.convert_to_numpy(v)).max() > 0, v.path
    print("trains on", keras.backend.backend())

def few():
    return [ConvexPotentialConv2D(3, (2, 3)), keras.layers.Flatten(), SDPLipschitzDense(5),
            SandwichDense(4, dtype="mixed_bfloat16")]

def every():
    return [*few()[:1], ConvexPotentialConv2D(2, norm="power"), SDPLipschitzConv2D(3),
            SandwichConv2D(3, 3, 2), keras.layers.Flatten(), ConvexPotentialDense(5), *few()[2:]]
"""

MIRRORED = """
import tensorflow as tf
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    main(few())
"""


@pytest.mark.parametrize(
    "backend, layers",
    [
        ("torch", "few"),
        pytest.param("jax", "few", marks=pytest.mark.slow),
        pytest.param("torch", "every", marks=pytest.mark.slow),
        pytest.param("jax", "every", marks=pytest.mark.slow),
    ],
)
def test_layers_train_on_every_backend(backend, layers):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    assert f"trains on {backend}" in run(backend, f"{BACKENDS}\nmain({layers}())")


@pytest.mark.slow
def test_layers_train_under_a_mirrored_strategy():
    assert "trains on tensorflow" in run("tensorflow", BACKENDS + MIRRORED)


@given(
    st.floats(-6e4, 6e4, width=32),
    st.sampled_from(["bfloat16", "float16"]),
)
def test_representable_values_survive_their_cast(value, dtype):
    x = np.float32(value)
    rounded = np.asarray(representable(x, dtype))
    cast = ops.convert_to_numpy(ops.cast(ops.cast(rounded, dtype), "float32"))
    assert rounded == cast
    nearest = ops.convert_to_numpy(ops.cast(ops.cast(x, dtype), "float32"))
    assert abs(rounded - x) <= abs(nearest - x) * (1 + 1e-6) or abs(x) < 1e-30


@given(st.floats(1e-12, 1e12), st.sampled_from(["float32", "bfloat16", "float16", "float64"]))
def test_rounded_down_is_the_float_below(value, dtype):
    below, bits = rounded_down(value, dtype), base._bits(dtype)
    assert value * (1 - 2.0 ** (1 - bits)) <= below <= value
    mantissa, _ = np.frexp(below)
    assert float(mantissa * 2.0**bits).is_integer()


def test_a_bare_layer_has_a_gain_to_validate_and_to_save():
    layer = ConvexPotentialDense(3, max_gain=0.5, dtype="mixed_bfloat16", activation="tanh")
    again = ConvexPotentialDense.from_config(layer.get_config())
    assert again.get_config() == layer.get_config() and again.max_gain == 0.5
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_gain"):
            SandwichDense(3, max_gain=value)
    with pytest.raises(ValueError, match="unbuilt"):
        layer.refresh()


@pytest.mark.parametrize("family", FACTORIES)
def test_configurations_are_complete(family):
    for layer in FACTORIES[family](max_gain=2.0):
        assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()


def test_refresh_reaches_nested_models_and_counts():
    inner = keras.Sequential([keras.Input((3,)), ConvexPotentialDense(2), SandwichDense(3)])
    outer = keras.Sequential([keras.Input((3,)), inner, SDPLipschitzDense(2)])
    assert refresh(outer) == 3
