"""`Stiefel` in `fit` on the other backends, and on two replicas of TensorFlow."""

import importlib.util

import fresh_processes
import pytest

SCRIPT = """
import sys, keras, numpy as np
from tf_lyapunov.layers import OrthogonalDense
from tf_lyapunov.optimizers import Stiefel

X = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype("int32")

def made(**options):
    keras.utils.set_random_seed(0)
    layers = [OrthogonalDense(4, "relu"), OrthogonalDense(7, "relu"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    inner = keras.optimizers.Adam(0.02, clipnorm=1.0, **options)
    model.compile(Stiefel(inner, project_gradients=True), loss)
    return model

def fit(model, epochs=3):
    fitted = model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return fitted.history["loss"]

def check(model):
    for layer in model.layers[:2]:
        assert layer.departure_upper_bound() < 1e-5, layer.departure_upper_bound()

def main(path, several=False):
    model = made()
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]
    losses = fit(model, 6)
    check(model)
    assert losses[-1] < losses[0]
    for a, v in zip(before, model.trainable_variables):
        assert np.abs(a - keras.ops.convert_to_numpy(v)).max() > 1e-3, v.path
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 24
    moments = [np.abs(keras.ops.convert_to_numpy(v)).max() for v in model.optimizer.variables]
    assert len(moments) == 2 + 2 * len(before) and min(moments) > 0
    if not several:
        model.save(path)
        more = fit(model)
        again = keras.models.load_model(path)
        assert fit(again) == more
        for one, two in zip(model.variables, again.variables):
            one, two = keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(two)
            assert np.array_equal(one, two)
        model = made(gradient_accumulation_steps=2, weight_decay=0.1)
        fit(model)
        check(model)
        model = made(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5)
        fit(model)
        check(model)
    print("on the manifold on", keras.backend.backend())
"""
MIRRORED = """
import tensorflow as tf
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    main(None, several=True)
"""

SHARDED = """
import jax
devices = keras.distribution.list_devices("cpu")
assert len(devices) == 2
mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
if sys.argv[1] == "data":
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
else:
    layout = keras.distribution.LayoutMap(mesh)
    layout["orthogonal_dense.*kernel"] = (None, "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    )

def made(**options):
    keras.utils.set_random_seed(0)
    layers = [OrthogonalDense(4, "relu"), OrthogonalDense(8, "relu"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Stiefel(keras.optimizers.Adam(0.02, **options)), loss)
    return model

main(None, several=True)
"""


def run(backend, script, *arguments):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    flags = "--xla_force_host_platform_device_count=2"
    printed = fresh_processes.output(SCRIPT + script, *arguments, backend=backend, XLA_FLAGS=flags)
    assert f"on the manifold on {backend}" in printed


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_kernels_stay_on_the_manifold_and_training_goes_on_bit_for_bit(backend, tmp_path):
    run(backend, "main(sys.argv[1])", str(tmp_path / "half.keras"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "model"])
def test_kernels_that_jax_shards_stay_on_the_manifold(kind):
    """Over two devices: batches apart, or the columns of every kernel."""
    run("jax", SHARDED, kind)


@pytest.mark.slow
def test_replicas_keep_the_same_kernels_on_the_manifold():
    run("tensorflow", MIRRORED)
