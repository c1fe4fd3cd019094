"""The spectral penalty: its value, its gradient, and the places where σ is not smooth."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from keras import layers, ops
from layer_maps import convolution_layers, layer_matrix, set_kernel

from tf_lyapunov.regularizers import OrthogonalityPenalty, SpectralPenalty
from tf_lyapunov.spectral.reading import linear_maps


def value_and_gradient(function, kernel):
    kernel = np.asarray(kernel, dtype="float32")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        variable = tf.Variable(kernel)
        with tf.GradientTape() as tape:
            value = function(tf.convert_to_tensor(variable))
        return float(value), tape.gradient(value, variable).numpy()
    if keras.backend.backend() == "jax":
        import jax

        value, gradient = jax.value_and_grad(function)(kernel)
        return float(value), np.asarray(gradient)
    import torch

    tensor = torch.tensor(kernel, requires_grad=True)
    value = function(tensor)
    value.backward()
    return float(value), tensor.grad.numpy()


def matrix(seed=0, shape=(6, 4), gap=2.0):
    left, s, right = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), False)
    s[0] = gap * s[1]
    return (left * s) @ right


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("max_gain", [None, 1.0])
def test_gradient_is_the_outer_product_of_the_top_singular_vectors(power, max_gain):
    kernel = matrix()
    left, s, right = np.linalg.svd(kernel)
    excess = s[0] - (max_gain or 0.0)
    value, gradient = value_and_gradient(SpectralPenalty(max_gain, 0.1, power), kernel)
    assert value == pytest.approx(0.1 * excess**power, rel=1e-4)
    expected = 0.1 * power * excess ** (power - 1) * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


@settings(max_examples=8)
@given(convolution_layers())
def test_convolution_gradient_agrees_with_finite_differences(case):
    layer, input_shape = case
    [(kernel, linear_map)] = linear_maps(layer)
    start = np.asarray(kernel)
    singular = np.linalg.svd(layer_matrix(layer, input_shape), compute_uv=False)
    penalty = SpectralPenalty.for_map(linear_map, factor=1.0, power=1.0, iterations=40)
    value, gradient = value_and_gradient(penalty, start)
    assert value <= singular[0] * (1 + 1e-5)
    separated = len(singular) == 1 or singular[0] > 1.3 * singular[1]
    if not (separated and singular[0] > 0):
        assert np.isfinite(gradient).all()
        return
    direction = np.random.default_rng(0).standard_normal(start.shape)
    step = 1e-2 / np.linalg.norm(direction)
    norms = []
    for sign in (-1, 1):
        set_kernel(layer, (start + sign * step * direction).astype("float32"))
        norms.append(np.linalg.norm(layer_matrix(layer, input_shape), 2))
    slope = (norms[1] - norms[0]) / (2 * step)
    scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
    assert float(np.sum(gradient * direction)) == pytest.approx(slope, abs=5e-3 * scale)


@pytest.mark.parametrize("shape", [(4, 3), (3, 3, 2, 2)])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_gradient_at_zero_is_finite_and_zero(shape, power):
    value, gradient = value_and_gradient(SpectralPenalty(None, 1.0, power), np.zeros(shape))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros(shape))


def test_gradient_at_repeated_singular_values_is_a_subgradient():
    _, gradient = value_and_gradient(SpectralPenalty(None, 1.0, 1.0), np.eye(4))
    # A subgradient of σ at I is any PSD matrix of trace 1.
    eigenvalues = np.linalg.eigvalsh((gradient + gradient.T) / 2)
    assert np.isfinite(gradient).all()
    assert np.trace(gradient) == pytest.approx(1.0, abs=1e-5)
    assert eigenvalues.min() >= -1e-6


def test_below_max_gain_nothing_is_penalised():
    value, gradient = value_and_gradient(SpectralPenalty(5.0, 1.0), np.eye(3))
    assert value == 0.0 and not gradient.any()


@pytest.mark.parametrize("kernel", [np.full((3, 3), 1e-25), np.full((3, 3), 1e15)])
def test_tiny_and_large_kernels_have_finite_gradients(kernel):
    value, gradient = value_and_gradient(SpectralPenalty(None, 1.0, 1.0), kernel)
    assert value == pytest.approx(3 * kernel[0, 0], rel=1e-4)
    np.testing.assert_allclose(gradient, np.full((3, 3), 1 / 3), rtol=1e-3)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_with_the_penalty_lowers_the_norm(jit_compile):
    norms = {}
    for factor in (0.0, 1.0):
        keras.utils.set_random_seed(0)
        conv = layers.Conv2D(4, 3, padding="same", kernel_regularizer=SpectralPenalty(0.5, factor))
        dense = layers.Dense(3, kernel_regularizer=SpectralPenalty(0.5, factor))
        model = keras.Sequential([keras.Input((6, 6, 1)), conv, layers.Flatten(), dense])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=jit_compile)
        x = np.random.default_rng(0).standard_normal((64, 6, 6, 1))
        model.fit(x, np.arange(64) % 3, batch_size=16, epochs=4, verbose=0)
        norms[factor] = np.linalg.norm(ops.convert_to_numpy(dense.kernel), 2)
    assert norms[1.0] < 0.8 * norms[0.0]


def test_config_round_trip_and_bad_arguments():
    layer = layers.Conv2D(4, 3, strides=2)
    layer.build((None, 8, 8, 2))
    penalty = SpectralPenalty.for_layer(layer, 0.7, factor=0.2)
    again = keras.regularizers.deserialize(keras.regularizers.serialize(penalty))
    assert again.get_config() == penalty.get_config()
    for arguments, message in (
        ({"max_gain": -1.0}, "positive"),
        ({"factor": -0.1}, "negative"),
        ({"power": 0.5}, "at least 1"),
        ({"iterations": 0}, "`iterations`"),
    ):
        with pytest.raises(ValueError, match=message):
            SpectralPenalty(**arguments)
    with pytest.raises(ValueError, match="2 \\(dense\\) to 5"):
        SpectralPenalty()(np.zeros(3, "float32"))
    with pytest.raises(ValueError, match="must hold only"):
        SpectralPenalty.from_config({"alpha": 1})


def periodic(kernel, strides, positions):
    """Matrix of a 1-D convolution on a periodic signal of `positions` outputs."""
    size, inputs, outputs = kernel.shape
    matrix = np.zeros((positions, outputs, positions * strides, inputs))
    for p in range(positions):
        for t in range(size):
            matrix[p, :, (p * strides + t) % (positions * strides)] += kernel[t].T
    return matrix.reshape(positions * outputs, -1)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("outputs", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_orthogonality_penalty_is_that_of_the_periodic_convolution(size, outputs, strides):
    kernel = np.random.default_rng(0).normal(size=(size, 3, outputs)).astype("float32")
    positions = 9
    matrix = periodic(kernel.astype(float), strides, positions)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    expected = 0.5 * np.sum((gram - np.eye(len(gram))) ** 2) / positions
    found = float(OrthogonalityPenalty(0.5, strides)(kernel))
    # Sums of up to 10³ float32 products, relative to the sum of the larger Gram matrix.
    whole = np.sum((matrix @ matrix.T) ** 2) / positions
    assert abs(found - expected) <= 1e3 * np.finfo("float32").eps * whole


def test_the_orthogonality_penalty_drives_singular_values_to_one():
    keras.utils.set_random_seed(0)
    kernel = np.random.default_rng(1).normal(size=(5, 3)).astype("float32") / 2
    before = np.linalg.svd(kernel, compute_uv=False)
    penalty = OrthogonalityPenalty(1.0)
    for _ in range(200):
        kernel = kernel - 0.02 * value_and_gradient(penalty, kernel)[1]
    after = np.linalg.svd(kernel, compute_uv=False)
    assert np.max(np.abs(before - 1)) > 0.3 and np.max(np.abs(after - 1)) < 1e-3


def test_planar_kernels_of_isometries_are_not_penalised():
    shift = np.zeros((3, 2, 4, 4), "float32")
    shift[0, 1] = np.eye(4)
    blocks = np.eye(4, dtype="float32").reshape(2, 2, 1, 4)  # space to depth
    assert float(OrthogonalityPenalty()(shift)) == 0
    assert float(OrthogonalityPenalty(strides=2)(blocks)) == 0
    assert float(OrthogonalityPenalty(strides=(2, 2))(2 * blocks)) == pytest.approx(0.01 * 36)


def test_the_orthogonality_penalty_names_kernels_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"for every axis. Received: a kernel of shape \(3,"):
        OrthogonalityPenalty(strides=(1, 1))(np.zeros((3, 2, 2), "float32"))
    with pytest.raises(ValueError, match="dense layer or a convolution"):
        OrthogonalityPenalty()(np.zeros(3, "float32"))
    with pytest.raises(ValueError, match="factor"):
        OrthogonalityPenalty(-1.0)


def test_the_orthogonality_penalty_is_saved_with_its_layer(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, 2, kernel_regularizer=OrthogonalityPenalty(0.1, (2, 2))),
        ]
    )
    loss = float(model.losses[0])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.layers[0].kernel_regularizer.get_config() == {"factor": 0.1, "strides": (2, 2)}
    assert float(again.losses[0]) == pytest.approx(loss, rel=1e-6)
