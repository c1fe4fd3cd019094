"""Layers of every kind, and their true matrices, for the tests of bounds and constraints."""

import functools

import keras
import numpy as np
from hypothesis import strategies as st

KINDS = ("conv", "depthwise", "conv_transpose")


def layer_matrix(layer, input_shape):
    """The matrix of a bias-free layer: the layer itself applied to the identity basis."""
    size = int(np.prod(input_shape))
    basis = np.eye(size, dtype="float32").reshape(size, *input_shape)
    outputs = keras.ops.convert_to_numpy(layer(basis))
    return outputs.reshape(size, -1).T.astype(np.float64)


@functools.cache
def transposes_dilated():
    """Whether Keras has dilated transposed convolutions here: TensorFlow needs oneDNN for them."""
    try:
        keras.layers.Conv1DTranspose(1, 2, dilation_rate=2)(np.zeros((1, 3, 1), "float32"))
    except Exception as error:
        if "dilation" not in str(error):
            raise
        return False
    return True


def true_norm(layer, input_shape):
    return np.linalg.norm(layer_matrix(layer, input_shape), 2)


def integer_kernel(seed, shape):
    """Small integers: the layer's matrix is then exact in float32, and so is its oracle."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype("float32")


@st.composite
def convolution_layers(draw, rank=None):
    """`(layer, input_shape)`: a built layer with an integer kernel, of any kind and geometry."""
    kind = draw(st.sampled_from(KINDS))
    rank = rank or draw(st.sampled_from((1, 1, 2, 2, 2, 3)))
    rank = min(rank, 2) if kind == "depthwise" else rank
    kernel_size = tuple(draw(st.integers(1, 4 if rank < 3 else 2)) for _ in range(rank))
    strides, dilation = draw(st.integers(1, 3)), 1
    if strides == 1 and (kind != "conv_transpose" or transposes_dilated()):  # Keras refuses both
        dilation = draw(st.integers(1, 2))
    paddings = ("valid", "same", "causal") if kind == "conv" and rank == 1 else ("valid", "same")
    arguments = {
        "kernel_size": kernel_size,
        "strides": strides,
        "dilation_rate": dilation,
        "padding": draw(st.sampled_from(paddings)),
        "use_bias": False,
    }
    if kind != "depthwise":
        arguments["kernel_initializer"] = "zeros"
    groups = draw(st.sampled_from((1, 1, 2))) if kind == "conv" else 1
    channels = groups * draw(st.integers(1, 2))
    if kind == "depthwise":
        arguments["depth_multiplier"] = draw(st.integers(1, 2))
        arguments["depthwise_initializer"] = "zeros"
        layer = getattr(keras.layers, f"DepthwiseConv{rank}D")(**arguments)
    elif kind == "conv_transpose":
        layer = getattr(keras.layers, f"Conv{rank}DTranspose")(draw(st.integers(1, 3)), **arguments)
    else:
        filters = groups * draw(st.integers(1, 2))
        layer = getattr(keras.layers, f"Conv{rank}D")(filters, groups=groups, **arguments)
    smallest = max((k - 1) * dilation + 1 for k in kernel_size)
    sizes = tuple(draw(st.integers(smallest, smallest + 4)) for _ in range(rank))
    if rank == 3:
        sizes = tuple(min(n, 4) for n in sizes)
    input_shape = (*sizes, channels)
    layer.build((None, *input_shape))
    set_kernel(layer, integer_kernel(draw(st.integers(0, 10**6)), layer.kernel.shape))
    return layer, input_shape


def set_kernel(layer, value):
    layer.kernel.assign(value)
