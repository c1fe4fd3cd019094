"""Steps on the manifold: what is kept orthogonal, what is left alone, and what is refused."""

import keras
import numpy as np
import pytest
from keras import ops

from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.layers import OrthogonalDense
from tf_lyapunov.optimizers import (
    Stiefel,
    check_orthogonal,
    is_marked,
    mark_orthogonal,
    restore_orthogonal,
)

RNG = np.random.default_rng(0)
START = np.linalg.qr(RNG.standard_normal((6, 3)))[0].astype("float32")
BIAS = np.arange(3, dtype="float32")
GRADS = [RNG.standard_normal(v.shape).astype("float32") for v in (START, BIAS)]


def variables():
    return [mark_orthogonal(keras.Variable(START, name="kernel")), keras.Variable(BIAS)]


def values(held):
    return [np.array(ops.convert_to_numpy(v.value)) for v in held]


def polar(x):
    left, _, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return left @ right


def applied(optimizer, steps=1, grads=GRADS):
    held = variables()
    for _ in range(steps):
        optimizer.apply([ops.convert_to_tensor(g) for g in grads], held)
    return values(held)


def departure(x):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x.T @ x - np.eye(x.shape[1]), 2)


def test_a_marked_kernel_takes_the_inner_step_and_returns_to_the_manifold():
    kernel, bias = applied(Stiefel(keras.optimizers.SGD(0.02)))
    assert np.allclose(kernel, polar(START - 0.02 * GRADS[0]), atol=1e-4)
    assert departure(kernel) < 1e-4
    # All others are the inner optimizer's, to the last bit.
    assert np.array_equal(bias, applied(keras.optimizers.SGD(0.02))[1])


@pytest.mark.parametrize("name", ["adam", "nadam", "lion", "rmsprop"])
def test_any_optimizer_stays_on_the_manifold(name):
    inner = keras.optimizers.get(name)
    inner.learning_rate = 0.05
    kernel, bias = applied(Stiefel(inner), steps=5)
    assert departure(kernel) < 1e-5
    assert np.max(np.abs(kernel - START)) > 0.05 and np.all(bias != BIAS)


def test_gradients_made_tangent_first_are_clipped_as_such():
    def stepped(tangent):
        optimizer = keras.optimizers.SGD(1.0, clipnorm=0.1)
        return applied(Stiefel(optimizer, project_gradients=tangent), grads=[START, BIAS])[0]

    # A gradient along the kernel turns nothing; clipped to a step of norm 0.1, or not there.
    assert np.allclose(stepped(True), START, atol=1e-6)
    flat = GRADS[0] - START @ (START.T @ GRADS[0] + GRADS[0].T @ START) / 2
    one = applied(Stiefel(keras.optimizers.SGD(0.01), project_gradients=True))[0]
    assert np.allclose(one, polar(START - 0.01 * flat), atol=1e-5)


def test_steps_that_only_accumulate_keep_every_bit():
    kernels = [
        applied(Stiefel(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)), steps)[0]
        for steps in (1, 2, 3)
    ]
    assert np.array_equal(kernels[0], START) and np.array_equal(kernels[1], START)
    once = applied(Stiefel(keras.optimizers.SGD(0.1)))[0]
    assert np.allclose(kernels[2], once, atol=1e-6)


def test_weight_decay_leaves_marked_kernels_out_and_no_others():
    plain = applied(Stiefel(keras.optimizers.SGD(0.1)))
    decayed = applied(Stiefel(keras.optimizers.SGD(0.1, weight_decay=0.5)))
    assert np.array_equal(plain[0], decayed[0])
    assert np.allclose(decayed[1], BIAS * 0.95 - 0.1 * GRADS[1], atol=1e-6)


def test_averaged_weights_are_projected_back():
    optimizer = Stiefel(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
    held = variables()
    for sign in (1, -1, 1):
        optimizer.apply([ops.convert_to_tensor(sign * g) for g in GRADS], held)
    average = optimizer.inner._model_variables_moving_average[0]
    average = np.array(ops.convert_to_numpy(average.value))
    optimizer.finalize_variable_values(held)
    assert departure(average) > 1e-2
    assert np.allclose(values(held)[0], polar(average), atol=1e-6)
    assert departure(values(held)[0]) < 1e-6


def test_averages_that_nobody_projected_back_are_refused_by_name_or_restored():
    model = keras.Sequential([keras.Input((6,)), OrthogonalDense(3), OrthogonalDense(2)])
    optimizer = Stiefel(keras.optimizers.SGD(0.1, use_ema=True))
    model.compile(optimizer, "mse", run_eagerly=True)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    with pytest.raises(ValueError, match="projected back before they are used"):
        model.fit(np.eye(6), np.zeros((6, 2)), verbose=0, callbacks=[swap])
    assert check_orthogonal(model) < 1e-5
    kernel = model.layers[0].kernel
    average = 0.5 * (values([kernel])[0] + START[:, ::-1])
    kernel.assign(average)
    with pytest.raises(ValueError, match=r"Received: .*kernel .*restore_orthogonal"):
        check_orthogonal(model)
    assert check_orthogonal(restore_orthogonal(model)) < 1e-5
    assert np.allclose(values([kernel])[0], polar(average), atol=1e-6)
    assert check_orthogonal(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])) == 0


@pytest.mark.slow
def test_ten_thousand_steps_in_float32_stay_on_the_manifold():
    held = [mark_orthogonal(keras.Variable(np.eye(16, 8, dtype="float32")))]
    goal = ops.convert_to_tensor(RNG.standard_normal((16, 8)).astype("float32"))
    optimizer = Stiefel(keras.optimizers.Adam(1e-2))
    optimizer.build(held)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        optimizer.apply = tf.function(optimizer.apply)
    largest, start = 0.0, values(held)[0]
    for step in range(10_000):
        # Of ‖W - goal‖², with noise that never lets it rest.
        noise = ops.convert_to_tensor(RNG.standard_normal((16, 8)).astype("float32"))
        optimizer.apply([held[0].value - goal + noise])
        if step % 100 == 99:
            largest = max(largest, departure(values(held)[0]))
    assert largest <= 1e-5
    assert np.abs(values(held)[0] - start).max() > 0.1


def test_settings_are_the_inner_optimizers():
    inner = keras.optimizers.Adam(0.01, loss_scale_factor=8.0)
    optimizer = Stiefel(inner, project_gradients=True, name="turning")
    assert float(optimizer.scale_loss(2.0)) == 16.0
    keras.optimizers.LossScaleOptimizer(optimizer)
    assert inner.loss_scale_factor is None and optimizer.loss_scale_factor is None
    optimizer.learning_rate = 0.5
    assert float(ops.convert_to_numpy(inner.learning_rate)) == 0.5
    applied(optimizer)
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 1
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    assert again.project_gradients and type(again.inner) is type(inner)


def test_what_cannot_be_kept_is_refused_by_name():
    with pytest.raises(ValueError, match="the loss scale goes outside"):
        Stiefel(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    with pytest.raises(ValueError, match="one `Stiefel` is enough"):
        Stiefel(Stiefel("sgd"))
    with pytest.raises(ValueError, match=r"Received: variable .*shape \(3,\)"):
        mark_orthogonal(keras.Variable(BIAS))
    dense = keras.layers.Dense(2, kernel_constraint=SpectralBound(1.0))
    dense.build((None, 3))
    with pytest.raises(ValueError, match="not both"):
        mark_orthogonal(dense.kernel)
    held = variables()
    held[0].constraint = SpectralBound(1.0)
    with pytest.raises(ValueError, match="constraint SpectralBound"):
        Stiefel("sgd").build(held)
    with pytest.warns(UserWarning, match="none of the model's is marked"):
        Stiefel("sgd").build(held[1:])
    assert is_marked(held[0]) and not is_marked(held[1])


def network(**options):
    keras.utils.set_random_seed(1)
    layers = [OrthogonalDense(8, "relu"), OrthogonalDense(12, "relu"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Stiefel(keras.optimizers.Adam(0.02)), loss, **options)
    return model


def trained(model, epochs=4):
    x = np.random.default_rng(3).standard_normal((32, 5)).astype("float32")
    y = (x[:, 0] * x[:, 1] > 0).astype("int32")
    return model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def test_a_saved_model_goes_on_bit_for_bit_and_learns(tmp_path):
    model = network()
    losses = trained(model)
    model.save(tmp_path / "half.keras")
    more = trained(model)
    again = keras.models.load_model(tmp_path / "half.keras")
    assert isinstance(again.optimizer, Stiefel)
    assert trained(again) == more
    for one, two in zip(model.weights, again.weights, strict=True):
        assert np.array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(two))
    assert more[-1] < 0.9 * losses[0]
    assert max(layer.departure_upper_bound() for layer in model.layers[:2]) < 1e-5


def test_half_precision_trains_under_a_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    trained(model, 2)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    kernel = ops.convert_to_numpy(ops.cast(model.layers[0].kernel, "float32"))
    assert departure(kernel.T if kernel.shape[0] < kernel.shape[1] else kernel) < 1e-5
