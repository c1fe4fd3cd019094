"""Convex potential layers: the map that is computed, its true norm, and what breaks it."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.activations import MaxMin
from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.potential import (
    ConvexPotentialConv1D,
    ConvexPotentialConv2D,
    ConvexPotentialDense,
    monotone_activation,
)
from tf_lyapunov.theory.operators import convolution_matrix

# Float64 eigenvalues of matrices with a few hundred rows.
FLOAT64 = 1 + 1e-12
DTYPES = ["float32", "float64", "mixed_bfloat16", "mixed_float16", "bfloat16"]


def randomise(layer, seed, scale):
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(rng.standard_normal(variable.shape) * scale)


def train(layer, input_shape, steps=2, learning_rate=0.1, seed=0):
    """A few steps of Adam at a large learning rate, on a random regression."""
    x = np.random.default_rng(seed).standard_normal((6, *input_shape)).astype("float32")
    model = keras.Sequential([keras.Input(input_shape), layer])
    model.compile(keras.optimizers.Adam(learning_rate), "mse", run_eagerly=True)
    y = np.ones(model.output_shape[1:], "float32") * 3
    model.fit(x, np.broadcast_to(y, (6, *y.shape)), batch_size=3, epochs=steps // 2, verbose=0)
    return model


def parts(layer):
    """The matrix W (hidden x inputs) and the scale t as inference uses them, and max_gain."""
    values = layer.effective_values()
    kernel, matrix = values["kernel"], values["kernel"].T
    scale = np.atleast_1d(values["scale"])
    if kernel.ndim > 2:
        matrix = convolution_matrix(kernel, layer.linear_map).toarray()
    scale = np.resize(scale, len(matrix)) if scale.size > 1 else np.full(len(matrix), scale[0])
    return matrix, scale


def true_gain(layer):
    """sup over diagonal 0 ≤ D ≤ I of ‖g(I - Wᵀ√t D √t W)‖: attained at D = 0 or D = I."""
    matrix, scale = parts(layer)
    weighted = matrix * np.sqrt(scale)[:, None]
    largest = np.linalg.eigvalsh(weighted @ weighted.T)[-1]
    return rounded_down(layer.max_gain, layer.compute_dtype) * max(1.0, largest - 1)


def reference(layer, x):
    """The layer in float64 NumPy, from the effective weights and the materialised map."""
    matrix, scale = parts(layer)
    hidden = x.reshape(len(x), -1).astype(np.float64) @ matrix.T
    if layer.bias is not None:
        bias = ops.convert_to_numpy(ops.cast(layer.bias, layer.compute_dtype)).astype(np.float64)
        hidden = hidden + np.resize(bias, len(matrix))
    hidden = np.maximum(hidden, 0) * scale
    return layer.max_gain * (x - (hidden @ matrix).reshape(x.shape))


@st.composite
def layers(draw, dense, conv1d, conv2d, **more):
    """`(maker, input_shape)` of one family: dense, 1-D and 2-D, odd and even kernel sides."""
    arguments = {
        "width": draw(st.sampled_from([None, 1, 2, 5])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "max_gain": draw(st.sampled_from([1.0, 1.0, 0.3, 2.5])),
        "use_bias": draw(st.booleans()),
        **{k: draw(v) for k, v in more.items()},
    }
    rank = draw(st.integers(0, 2))
    channels = draw(st.integers(1, 4))
    if rank == 0:
        return functools.partial(dense, **arguments), (channels,)
    size = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    shape = (*(draw(st.integers(1, 6)) for _ in range(rank)), channels)
    convolution = (conv1d, conv2d)[rank - 1]
    return functools.partial(convolution, kernel_size=size, **arguments), shape


POTENTIAL = layers(
    ConvexPotentialDense,
    ConvexPotentialConv1D,
    ConvexPotentialConv2D,
    step=st.sampled_from([1.0, 1.0, 0.25]),
)


@settings(max_examples=25)
@given(POTENTIAL, st.integers(0, 10**6), st.sampled_from([1e-12, 1e-3, 1.0, 30.0]))
def test_no_weights_make_a_layer_exceed_its_gain(built, seed, scale):
    layer, shape = built[0](), built[1]
    layer.build((None, *shape))
    randomise(layer, seed, scale)
    assert true_gain(layer) <= layer.max_gain * FLOAT64
    assert true_gain(layer) <= layer.gain_upper_bound() * FLOAT64
    assert layer.gain_upper_bound() <= layer.max_gain * (1 + 1e-9)


@settings(max_examples=6)
@given(POTENTIAL, st.integers(0, 10**6))
def test_the_gain_holds_after_training_at_a_large_learning_rate(built, seed):
    layer, shape = built[0](), built[1]
    train(layer, shape, seed=seed)
    assert true_gain(layer) <= layer.max_gain * FLOAT64


@settings(max_examples=12)
@given(POTENTIAL, st.integers(0, 10**6))
def test_the_layer_computes_the_map_that_its_weights_say(built, seed):
    layer, shape = built[0](), built[1]
    layer.build((None, *shape))
    randomise(layer, seed, 0.5)
    x = np.random.default_rng(seed).integers(-4, 5, (3, *shape)).astype("float64")
    y = np.asarray(ops.convert_to_numpy(layer(x))).astype(np.float64)
    terms = 4 * np.prod([*layer.kernel.shape, 8.0])
    u = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
    matrix, scale = parts(layer)
    size = 1 + np.abs(matrix.T) @ (scale * (np.abs(matrix) @ np.full(matrix.shape[1], 4) + 2))
    allowed = terms * u[layer.compute_dtype] * layer.max_gain * (4 + size.max())
    np.testing.assert_allclose(y, reference(layer, x), rtol=0, atol=allowed)


@pytest.mark.parametrize("layer", [ConvexPotentialDense(6), ConvexPotentialConv2D(6, 4)])
def test_training_and_inference_compute_the_same_map(layer):
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 3)).astype("float32")
    a, b = (ops.convert_to_numpy(layer(x, training=t)) for t in (True, False))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_step_is_close_to_the_longest_one():
    layer = ConvexPotentialConv2D(8, 3)
    layer.build((None, 8, 8, 4))
    matrix, scale = parts(layer)
    assert 1.95 < scale[0] * np.linalg.norm(matrix, 2) ** 2 <= 2.0


def test_images_of_any_size_are_safe_when_the_size_is_unknown():
    layer = ConvexPotentialConv2D(4, (3, 4))
    layer.build((None, None, None, 2))
    randomise(layer, 0, 1.0)
    values = layer.effective_values()
    for size in [(1, 1), (3, 9), (12, 12)]:
        other = ConvexPotentialConv2D(4, (3, 4))
        other.build((None, *size, 2))
        matrix = convolution_matrix(values["kernel"], other.linear_map).toarray()
        assert values["scale"] * np.linalg.norm(matrix, 2) ** 2 <= 2.0
    assert layer.gain_upper_bound() <= 1.0 + 1e-9
    assert tuple(layer(np.ones((1, 7, 5, 2))).shape) == (1, 7, 5, 2)


@pytest.mark.parametrize("norm", ["bound", "power"])
def test_no_image_is_larger_than_those_whose_norm_was_bounded(norm):
    # On 8×8 this kernel's norm is smaller than on 32×32, where the step would be too long.
    layer = ConvexPotentialConv2D(1, 3, activation="linear", use_bias=False, norm=norm)
    layer(np.zeros((1, 8, 8, 1), "float32"))
    with pytest.raises(ValueError, match="incompatible"):
        layer(np.zeros((1, 32, 32, 1), "float32"))
    with pytest.raises(ValueError, match="incompatible"):
        layer(keras.Input((9, 8, 1)))
    free = ConvexPotentialConv2D(1, 3, activation="linear", use_bias=False)
    free.build((None, None, None, 1))
    free.kernel.assign(np.reshape(np.outer([-1.0, 1, -1], [-1.0, 1, -1]), (3, 3, 1, 1)))
    board = np.indices((32, 32)).sum(0) % 2 * 2.0 - 1
    x = np.reshape(board, (1, 32, 32, 1)).astype("float32")
    assert np.linalg.norm(ops.convert_to_numpy(free(x))) <= np.linalg.norm(x)


def test_the_adjoint_is_that_of_the_zero_padded_map():
    for kernel_size in [(1, 1), (2, 3), (4, 2), (5, 5)]:
        layer = ConvexPotentialConv2D(3, kernel_size, dtype="float64")
        layer.build((None, 4, 5, 2))
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((1, 4, 5, 2)), rng.standard_normal((1, 4, 5, 3))
        kernel = ops.convert_to_tensor(layer.kernel)
        forward = np.sum(ops.convert_to_numpy(layer._map(x, kernel)) * y)
        backward = np.sum(ops.convert_to_numpy(layer._adjoint(y, kernel)) * x)
        np.testing.assert_allclose(forward, backward, rtol=1e-12)


def test_the_published_power_iteration_takes_too_long_a_step():
    """Negative control: the layer as published does exceed its gain, and its bound says so."""
    layer = ConvexPotentialConv2D(8, 3, norm="power", use_bias=False)
    layer.build((None, 12, 12, 8))
    x = np.random.default_rng(0).standard_normal((1, 12, 12, 8)).astype("float32")
    layer(x, training=True)
    kernel, scale = (np.asarray(ops.convert_to_numpy(v)) for v in layer.effective(training=True))
    matrix = convolution_matrix(kernel, layer.linear_map).toarray()
    assert scale * np.linalg.norm(matrix, 2) ** 2 > 2.05  # one step in training
    assert not layer.guaranteed and ConvexPotentialDense(3).guaranteed
    assert true_gain(layer) > 1 + 1e-6  # and a hundred in inference
    assert true_gain(layer) <= layer.gain_upper_bound() <= 1.2


def test_power_iteration_converges_over_training_steps_and_stays_still_in_inference():
    layer = ConvexPotentialDense(12, norm="power")
    x = np.random.default_rng(0).standard_normal((2, 8)).astype("float32")
    for _ in range(60):
        layer(x, training=True)
    before = np.array(ops.convert_to_numpy(layer.vector))
    layer(x, training=False)
    np.testing.assert_array_equal(before, ops.convert_to_numpy(layer.vector))
    sigma = np.linalg.norm(ops.convert_to_numpy(layer.kernel), 2)
    scale = float(layer.effective(training=True)[1])
    np.testing.assert_allclose(scale, 2 / sigma**2, rtol=1e-3)


def test_a_fixed_step_is_the_relaxed_layer_and_its_gain_is_read_from_its_weights():
    layer = ConvexPotentialDense(8, step=1.0, norm=None, use_bias=False)
    layer.build((None, 8))
    layer.kernel.assign(2 * np.eye(8))
    assert not layer.guaranteed
    np.testing.assert_allclose(layer.gain_upper_bound(), 3.0, rtol=1e-5)
    x = np.eye(8, dtype="float32")
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), -3 * x, rtol=1e-5)


def test_the_gradient_is_that_of_the_normalised_layer():
    """The map does not depend on the kernel's length (ReLU, no bias): nor may its gradient."""
    layer = ConvexPotentialDense(5, use_bias=False)
    x = np.random.default_rng(0).standard_normal((7, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    before = np.array(ops.convert_to_numpy(layer.kernel))
    model.fit(x, x * 0, batch_size=7, verbose=0, shuffle=False)
    step = np.asarray(ops.convert_to_numpy(layer.kernel)) - before
    cosine = np.sum(step * before) / np.linalg.norm(step) / np.linalg.norm(before)
    assert np.linalg.norm(step) > 1e-3 and abs(cosine) < 0.02


@pytest.mark.parametrize("activation", ["tanh", "elu", "softplus", "sigmoid", None, "leaky_relu"])
def test_non_decreasing_activations_are_accepted(activation):
    assert monotone_activation(activation) is keras.activations.get(activation)


def test_other_activations_are_refused_by_name():
    with pytest.raises(ValueError, match="'gelu'"):
        ConvexPotentialDense(4, activation="gelu")
    with pytest.raises(ValueError, match="slopes in"):
        ConvexPotentialDense(4, activation="selu")
    with pytest.raises(UnsupportedLayerError, match=r"elementwise.*MaxMin.*of its own"):
        ConvexPotentialDense(3, activation=MaxMin())
    with pytest.raises(UnsupportedLayerError):
        ConvexPotentialDense(4, activation="softmax")


@pytest.mark.parametrize(
    "arguments", [{"width": 0}, {"step": 0}, {"norm": "svd"}, {"max_gain": -1}, {"step": -1.0}]
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        ConvexPotentialDense(**arguments)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="2 spatial axes"):
        ConvexPotentialConv2D(4, 3).build((None, 8, 4))
    with pytest.raises(ValueError, match="kernel_size"):
        ConvexPotentialConv2D(4, (3, 3, 3))


def test_a_zero_kernel_is_the_identity():
    layer = ConvexPotentialDense(4)
    layer.build((None, 4))
    layer.kernel.assign(np.zeros((4, 4)))
    x = np.ones((2, 4), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), x)


def test_rematerialisation_changes_no_gradient():
    results = []
    for mode in (None, "full"):
        keras.utils.set_random_seed(0)
        with keras.RematScope(mode=mode):
            stack = [ConvexPotentialConv2D(3, 3) for _ in range(3)]
        model = keras.Sequential([keras.Input((5, 5, 2)), *stack])
        model.compile("sgd", "mse")
        x = np.random.default_rng(0).standard_normal((4, 5, 5, 2)).astype("float32")
        model.fit(x, x * 0, verbose=0, shuffle=False)
        results.append([np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_a_thousand_layers_train(kind):
    if kind == "dense":
        stack, shape = [ConvexPotentialDense(10) for _ in range(1000)], (10,)
    else:
        stack, shape = [ConvexPotentialConv2D(4, 3) for _ in range(1000)], (6, 6, 4)
    inputs = keras.Input(shape)
    x = inputs
    for i in range(0, 1000, 50):  # a flat model of this depth exceeds Python's recursion limit
        x = keras.Sequential(stack[i : i + 50])(x)
    outputs = keras.layers.Dense(3)(keras.layers.Flatten()(x))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, run_eagerly=True)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 32)
    data = rng.standard_normal((32, *shape)).astype("float32")
    data += y.reshape(-1, *(1 for _ in shape))
    losses = [model.train_on_batch(data, y) for _ in range(3)]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    assert all(true_gain(layer) <= FLOAT64 for layer in stack[::250])
