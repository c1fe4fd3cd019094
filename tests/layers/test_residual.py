"""Convex combinations, centering, padding, truncation and space to depth."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lyapunov.layers.activations import Householder
from tf_lyapunov.layers.centering import BatchCentering
from tf_lyapunov.layers.residual import ConvexCombination
from tf_lyapunov.layers.resizing import (
    ChannelPadding,
    InvertibleDownSampling,
    InvertibleUpSampling,
    Truncate,
)

UNIT = 2.0**-24


def run(layer, x, **options):
    return keras.ops.convert_to_numpy(layer(x, **options))


def batch(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# Convex combinations ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_the_outputs_and_not_the_maps(dtype):
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    angles = np.linspace(0, 2 * np.pi, 65).astype("float32")
    axis = np.stack([np.sin(angles / 2), -np.cos(angles / 2)]).astype("float64")
    x = np.concatenate(list(axis))[None]  # every pair along its normal, which is reflected
    x = np.asarray(keras.ops.cast(keras.ops.cast(x, dtype), "float32"), "float64")
    layer = Householder(dtype=f"mixed_{dtype}")
    layer.build(x.shape)
    layer.angle.assign(angles)
    z = x.reshape(2, -1)
    expected = (z - 2 * axis * np.maximum(np.sum(axis * z, axis=0), 0)).reshape(1, -1)
    found = keras.ops.cast(layer(keras.ops.cast(x, dtype)), "float32")
    error = np.abs(keras.ops.convert_to_numpy(found) - expected)
    assert np.all(error <= unit * np.abs(expected) + 16 * UNIT)

    for share in np.linspace(0, 1, 33).astype("float32"):
        layer = ConvexCombination(dtype=f"mixed_{dtype}")
        layer.build([(1, 1), (1, 1)])
        layer.mixture.assign([share])
        one = keras.ops.ones((1, 1), dtype)
        total = keras.ops.convert_to_numpy(keras.ops.cast(layer([one, one]), "float32"))
        assert total.item() == 1.0


@pytest.mark.parametrize("stored", [-3.0, 0.0, 0.3, 1.0, 7.0])
def test_a_combination_uses_its_weight_clipped_to_the_unit_interval(stored):
    layer = ConvexCombination()
    x, f = batch((4, 3)), batch((4, 3), 1)
    layer.build([x.shape, f.shape])
    layer.mixture.assign([stored])
    t = np.clip(np.float64(np.float32(stored)), 0, 1)
    tol = 6 * UNIT * (np.abs(x) + np.abs(f))
    assert np.all(np.abs(run(layer, [x, f]) - (t * f + (1 - t) * x)) <= tol)


def test_its_weight_is_learned_and_stays_in_range():
    x = keras.Input((4,))
    model = keras.Model(x, ConvexCombination(name="mix")([x, -x]))
    model.compile(keras.optimizers.SGD(10.0), "mse")
    data = batch((64, 4))
    model.fit(data, -5 * data, epochs=1, verbose=0)
    assert float(keras.ops.convert_to_numpy(model.get_layer("mix").mixture)[0]) == 1.0
    model.fit(data, 5 * data, epochs=1, verbose=0)
    assert float(keras.ops.convert_to_numpy(model.get_layer("mix").mixture)[0]) == 0.0


def test_a_combination_of_the_wrong_inputs_is_refused():
    with pytest.raises(ValueError, match="list of two"):
        ConvexCombination()(batch((2, 3)))
    with pytest.raises(ValueError, match="equal shapes"):
        ConvexCombination()([batch((2, 3)), batch((2, 1))])
    with pytest.raises(ValueError, match="initial"):
        ConvexCombination(1.5)


# Centering --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((6, 3), -1), ((4, 3, 5, 2), 1)])
def test_centering_subtracts_the_batch_mean_in_training_and_the_running_mean_after(shape, axis):
    layer = BatchCentering(axis=axis, momentum=0.75)
    x = batch(shape)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean = x.astype(np.float64).mean(axis=others, keepdims=True)
    assert np.allclose(run(layer, x, training=True), x - mean, atol=1e-6)
    running = keras.ops.convert_to_numpy(layer.moving_mean)
    assert np.allclose(running, 0.25 * mean.ravel(), atol=1e-6)
    layer.bias.assign(np.arange(1.0, 1 + running.size))
    shift = (np.arange(1.0, 1 + running.size) - running).reshape(mean.shape)
    assert np.allclose(run(layer, x), x + shift, atol=1e-6)
    layer.trainable = False
    assert np.array_equal(run(layer, x, training=True), run(layer, x))
    assert np.array_equal(keras.ops.convert_to_numpy(layer.moving_mean), running)


@settings(max_examples=20)
@given(
    hnp.arrays(np.float32, (5, 4), elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.float32, (5, 4), elements=st.floats(-100, 100, width=32)),
)
def test_in_training_no_two_batches_move_apart(a, b):
    layer = BatchCentering()
    before = np.linalg.norm(a.astype(float) - b)
    after = np.linalg.norm(
        run(layer, a, training=True) - run(layer, b, training=True).astype(float)
    )
    assert after <= before + 64 * UNIT * 100 * np.sqrt(a.size)


def test_a_batch_of_equal_shifts_is_not_moved_at_all_and_a_mean_free_one_fully():
    layer = BatchCentering(use_bias=False)
    x, e = batch((6, 2)), batch((6, 2), 1)
    e -= e.mean(axis=0)
    moved = run(layer, x + e, training=True) - run(layer, x, training=True)
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(e), rel=1e-5)
    assert np.allclose(run(layer, x + 5, training=True), run(layer, x, training=True), atol=1e-5)


def test_the_running_mean_does_not_stall_in_half_precision():
    layer = BatchCentering(momentum=0.999, dtype="mixed_bfloat16")
    for _ in range(50):
        layer(np.full((2, 1), 8.0, "float32"), training=True)
    expected = 8 * (1 - 0.999**50)
    assert float(keras.ops.convert_to_numpy(layer.moving_mean)[0]) == pytest.approx(
        expected, rel=1e-4
    )


def test_centering_learns_the_mean_in_fit():
    model = keras.Sequential([keras.Input((2,)), BatchCentering(momentum=0.5, use_bias=False)])
    model.compile("sgd", "mse")
    x = batch((256, 2)) + np.float32(3.0)
    model.fit(x, x, epochs=4, batch_size=32, verbose=0)
    assert np.allclose(keras.ops.convert_to_numpy(model.layers[0].moving_mean), 3.0, atol=0.5)


# Moving entries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_space_to_depth_is_tensorflow_s_order_and_invertible(data_format):
    x = batch((2, 4, 6, 3))
    a, b = 2, 3
    blocks = x.reshape(2, 2, a, 2, b, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 2, a * b * 3)
    if data_format == "channels_first":
        x, blocks = np.moveaxis(x, -1, 1), np.moveaxis(blocks, -1, 1)
    down = InvertibleDownSampling((a, b), data_format)
    up = InvertibleUpSampling((a, b), data_format)
    assert np.array_equal(run(down, x), blocks)
    assert np.array_equal(run(up, blocks), x)
    assert down.compute_output_shape(x.shape) == blocks.shape
    assert up.compute_output_shape(blocks.shape) == x.shape


def test_padding_appends_zeros_and_truncation_drops_the_end():
    x = batch((2, 3, 4))
    assert np.array_equal(run(ChannelPadding(6), x), np.pad(x, [(0, 0), (0, 0), (0, 2)]))
    assert np.array_equal(run(ChannelPadding(5, axis=1), x), np.pad(x, [(0, 0), (0, 2), (0, 0)]))
    assert np.array_equal(run(Truncate(2), x), x[..., :2])
    assert np.array_equal(run(Truncate(1, axis=1), x), x[:, :1])
    assert ChannelPadding(5, axis=1).compute_output_shape((None, 3, 4)) == (None, 5, 4)
    assert Truncate(2).compute_output_shape((None, 3, 4)) == (None, 3, 2)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="at least"):
        ChannelPadding(2).build((None, 3))
    with pytest.raises(ValueError, match="at most"):
        Truncate(4).build((None, 3))
    with pytest.raises(ValueError, match="divisible"):
        InvertibleDownSampling(2).build((None, 5, 4, 1))
    with pytest.raises(ValueError, match="divisible"):
        InvertibleUpSampling(2).build((None, 5, 4, 6))


@pytest.mark.parametrize(
    "layer",
    [
        BatchCentering(momentum=0.5),
        ChannelPadding(6),
        Truncate(2),
        InvertibleDownSampling(2),
        InvertibleUpSampling((2, 1)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_survives_saving_in_a_model(layer, tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 4)), layer])
    for weight in model.weights:
        weight.assign(batch(weight.shape))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = batch((3, 4, 4, 4))
    assert np.array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
