"""The true maps of the Lipschitz layers that are linear up to bias and activation.

`call_matrix` is what the layer computes, `exact_matrix` the same map put together in float64 from
its effective weights by other means (loops, NumPy, sparse matrices).
"""

import itertools
import os
from unittest import mock

import keras
import numpy as np

from tf_lyapunov.theory.operators import convolution_matrix

# Random configurations per property; more where the variable asks for them.
EXAMPLES = int(os.environ.get("LIPSCHITZ_EXAMPLES", "6"))
# SVD and sums in float64 of matrices below a thousand rows.
FLOAT64_SLACK = 1 + 1e-12
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def call_matrix(layer, input_shape, training=False):
    """The layer without its activation on zero and on the identity basis, the bias subtracted."""
    size = int(np.prod(input_shape))
    basis = np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *input_shape)
    with mock.patch.object(type(layer), "_activated", _biased):
        outputs = layer(keras.ops.cast(basis, layer.compute_dtype), training=training)
    outputs = keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float64"))
    outputs = np.asarray(outputs, np.float64).reshape(size + 1, -1)
    return (outputs[1:] - outputs[0]).T


def _biased(layer, y):
    return y if layer.bias is None else y + keras.ops.cast(layer.bias, y.dtype)


def effective(layer, training=False):
    """Effective weights in float64, by name."""
    values = [
        # JAX casts to float32 at most, unless told otherwise.
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(v, "float64")), np.float64)
        for v in layer.effective(training)
    ]
    return dict(zip(layer._effective_names, values, strict=True))


def exact_matrix(layer, input_shape, training=False):
    weights = effective(layer, training)
    name = type(layer).__name__
    if name in ("CayleyConv2D", "BlockReflectorConv2D"):
        return _cayley_matrix(layer, weights, input_shape)
    if name == "SkewOrthogonalConv2D":
        return _skew_matrix(layer, weights["kernel"], input_shape, training)
    if name.endswith("Dense"):
        return weights["kernel"].T
    return convolution_matrix(weights["kernel"], layer._map((None, *input_shape))).toarray()


def blocks_to_channels(input_shape, strides):
    """Matrix of `space_to_depth`, entry by entry."""
    (high, wide, channels), (s, t) = input_shape, strides
    rows, columns = -(-high // s), -(-wide // t)
    matrix = np.zeros((rows * columns * s * t * channels, high * wide * channels))
    for h, w, c in itertools.product(range(high), range(wide), range(channels)):
        depth = ((h % s) * t + w % t) * channels + c
        target = ((h // s) * columns + w // t) * s * t * channels + depth
        matrix[target, (h * wide + w) * channels + c] = 1.0
    return matrix


def _cayley_matrix(layer, weights, input_shape):
    q = weights["real"] + 1j * weights["imag"]
    high, wide = layer.sizes
    channels, filters = q.shape[1:]
    q = q.reshape(high, wide // 2 + 1, channels, filters)
    size = high * wide * channels
    spectra = np.fft.rfft2(np.eye(size).reshape(size, high, wide, channels), axes=(1, 2))
    images = np.fft.irfft2(np.einsum("ngfa,gfab->ngfb", spectra, q), s=(high, wide), axes=(1, 2))
    return images.reshape(size, -1).T @ blocks_to_channels(input_shape, layer.strides)


def _skew_matrix(layer, kernel, input_shape, training):
    skew = convolution_matrix(kernel, layer.linear_map).toarray()
    total = power = np.eye(len(skew))
    for k in range(1, layer.terms if training else layer.inference_terms):
        power = skew @ power / k
        total = total + power
    width = kernel.shape[-1]
    sites = len(skew) // width
    rearranged = blocks_to_channels(input_shape, layer.strides)
    channels = len(rearranged) // sites
    embed = np.kron(np.eye(sites), np.eye(width, channels))
    crop = np.kron(np.eye(sites), np.eye(layer.filters, width))
    scale = layer.output_scale(layer.terms if training else layer.inference_terms)
    return scale * crop @ total @ embed @ rearranged


def set_kernel(layer, seed, scale):
    """Gaussian raw kernel; every seventh seed repeats one column, so that it is degenerate."""
    kernel = scale * np.random.default_rng(seed).standard_normal(layer.kernel.shape)
    if seed % 7 == 0:
        kernel[...] = kernel[..., :1]
    layer.kernel.assign(kernel.astype(keras.backend.standardize_dtype(layer.kernel.dtype)))
    if layer.bias is not None:
        layer.bias.assign(np.random.default_rng(seed + 1).standard_normal(layer.bias.shape))


def assert_within_gain(layer, input_shape, training=False):
    """The exact matrix obeys the bound but for the stated inflation; `call` computes that matrix.

    Returns the singular values of the exact matrix.
    """
    matrix = exact_matrix(layer, input_shape, training)
    norm = np.linalg.norm(matrix, 2)
    limit = layer.max_gain * layer.rounding_inflation * FLOAT64_SLACK
    assert norm <= limit, (norm, limit)
    computed = call_matrix(layer, input_shape, training)
    error = evaluation_error(layer, matrix)
    np.testing.assert_allclose(computed, matrix, atol=error, rtol=0)
    if type(layer).__name__ == "BjorckDense":  # training and inference divide by other excesses
        roundings = 8 * UNIT_ROUNDOFF[layer.compute_dtype] * max(matrix.shape)
        assert np.linalg.norm(computed, 2) <= limit * (1 + roundings) + error / max(matrix.shape)
    return np.linalg.svd(matrix, compute_uv=False)


def evaluation_error(layer, matrix):
    """Rounding of an output for a unit input; of a kernel, that of adding the bias alone."""
    u = UNIT_ROUNDOFF[layer.compute_dtype]
    steps = dict.fromkeys(("CayleyConv2D", "BlockReflectorConv2D", "SkewOrthogonalConv2D"), 64)
    steps = steps.get(type(layer).__name__, 2)
    if type(layer).__name__ == "BjorckDense":
        # A bound of the product of its factors: γ‖X‖_F‖C‖_F ≤ 2u·m·√m·√m.
        steps = 16 + 4 * min(matrix.shape) ** 2
    bias = 0.0 if layer.bias is None else np.abs(keras.ops.convert_to_numpy(layer.bias)).max()
    return steps * u * (np.linalg.norm(matrix, 2) + 2 * bias) + 1e-30


def gradients(layer, x, training=True):
    """Gradient of a quadratic of the output in the raw kernel (TensorFlow)."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        y = layer(x, training=training)
        loss = tf.reduce_sum(tf.cast(y, "float32") ** 2 * tf.range(1.0, 1.0 + y.shape[-1]))
    return tape.gradient(loss, layer.kernel).numpy()


def fit_briefly(layer, input_shape, steps=4, jit_compile=False, filters=3):
    """Trains the layer in a small classifier by Adam at the absurd rate 0.1."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, *input_shape)).astype("float32")
    model = keras.Sequential(
        [keras.Input(input_shape), layer, keras.layers.Flatten(), keras.layers.Dense(filters)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss, jit_compile=jit_compile)
    model.fit(x, rng.integers(0, filters, 16), epochs=steps, batch_size=16, verbose=0)
    return model
