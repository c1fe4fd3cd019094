"""Smallest singular values of layers: how much of a change they keep at least."""

import math

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.linear import LipschitzConv, LipschitzDense
from tf_lyapunov.program.weights import inference_value
from tf_lyapunov.spectral.reading import SUPPORTED, linear_maps
from tf_lyapunov.theory.operators import LinearMap, convolution_matrix
from tf_lyapunov.theory.singular_values import smallest_singular_value_lower_bound

# A pseudoinverse of more entries takes minutes, and a gigabyte.
MOST_ENTRIES = 2**22


def smallest_singular_value(layer):
    """Proved lower bound on the smallest singular value of a layer's linear map.

    The smallest of the min(inputs, outputs) singular values of the map W of a dense layer or a
    convolution at its own input size, zero padding and strides included, as inference uses its
    weights; activation and bias left out. Where there are at least as many outputs as inputs,
    ‖W x - W x'‖ ≥ σ·‖x - x'‖; else the same holds for the transpose. Its largest is
    `lipschitz_upper_bound`'s: both are 1 for an orthogonal layer.

    Args:
        layer: built Dense, Conv, DepthwiseConv or ConvTranspose layer of Keras, or a dense layer or
            convolution of this library with a kernel.

    Returns:
        float; 0 where nothing more can be proved.

    Raises:
        UnsupportedLayerError: if the layer is another, the size of its input is unknown, or its
            matrix has more than 2²² entries.
        ValueError: if it is not built, or its kernel is not finite.

    Example:

    >>> import keras
    >>> layer = keras.layers.Dense(2, kernel_initializer=keras.initializers.Identity(0.5))
    >>> layer.build((None, 2))
    >>> round(smallest_singular_value(layer), 6)
    0.5
    """
    kernel, linear_map = _map_of(layer)
    if linear_map.kind == "dense":
        _check_size(layer, *kernel.shape)
        return smallest_singular_value_lower_bound(kernel)
    if linear_map.input_shape is None:
        raise UnsupportedLayerError(
            "The smallest singular value of a convolution is that at a size of its input. "
            f"Received: layer {layer.name!r}, built for any size."
        )
    _check_size(
        layer,
        math.prod(linear_map.input_shape),
        math.prod(linear_map.output_shape(kernel.shape)),
    )
    return smallest_singular_value_lower_bound(convolution_matrix(kernel, linear_map).toarray())


def _calls_as(layer, bases):
    """Whether a layer is one of these and its `call` is theirs, neither replaced nor extended."""
    own = any(isinstance(layer, base) and type(layer).call is base.call for base in bases)
    return own and "call" not in vars(layer)


def _map_of(layer):
    """The kernel that inference uses, float64, and its `LinearMap`."""
    if _calls_as(layer, (LipschitzDense, LipschitzConv)):
        if not layer.built:
            raise ValueError(
                f"A layer must be built before its kernel can be read. Received: {layer.name!r}."
            )
        # Asked for by name: other parametrisations apply several maps.
        kernel = layer.effective_values().get("kernel")
        if kernel is not None and isinstance(layer, LipschitzConv):
            return kernel, layer.linear_map
        if kernel is not None:
            return kernel, LinearMap("dense", (len(kernel),))
    if not _calls_as(layer, SUPPORTED):
        raise UnsupportedLayerError(
            "A layer must be one linear map with a kernel that is known. Received: layer "
            f"{layer.name!r} of type {type(layer).__name__}. Supported: Dense, Conv, "
            "DepthwiseConv, ConvTranspose, and dense layers and convolutions of `layers`."
        )
    maps = linear_maps(layer)
    if len(maps) != 1:
        raise UnsupportedLayerError(
            "A layer of two kernels is two maps. Received: layer "
            f"{layer.name!r} of type {type(layer).__name__}."
        )
    variable, linear_map = maps[0]
    return np.asarray(inference_value(variable, layer.compute_dtype), np.float64), linear_map


def _check_size(layer, rows, columns):
    if rows * columns > MOST_ENTRIES:
        raise UnsupportedLayerError(
            f"The matrix of a layer must have at most {MOST_ENTRIES} entries. Received: layer "
            f"{layer.name!r} with {rows} × {columns}. Build it on a smaller input."
        )
