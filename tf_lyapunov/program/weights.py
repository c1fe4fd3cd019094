"""Dense and convolution layers, and the weights that layers use at inference."""

import keras
import numpy as np

from tf_lyapunov.layers import (
    almost_orthogonal,
    bjorck,
    manifold,
    normalized,
    orthogonal,
    reflector,
)
from tf_lyapunov.layers.base import EffectiveLayer
from tf_lyapunov.layers.orthogonal_convolution import (
    OrthogonalConv2D,
    OrthogonalConv2DTranspose,
)
from tf_lyapunov.spectral.reading import SUPPORTED, linear_maps
from tf_lyapunov.theory.operators import LinearMap

# Layers of this library that apply one kernel: computed from their raw variables, or their own.
OWN_DENSE = (
    almost_orthogonal.AlmostOrthogonalDense,
    bjorck.BjorckDense,
    manifold.OrthogonalDense,
    normalized.FrobeniusDense,
    normalized.NormalizedDense,
    normalized.SpectralDense,
    orthogonal.CayleyDense,
    reflector.BlockReflectorDense,
)
OWN_CONVOLUTIONS = (
    almost_orthogonal.AlmostOrthogonalConv1D,
    almost_orthogonal.AlmostOrthogonalConv2D,
    normalized.SpectralConv1D,
    normalized.SpectralConv2D,
    OrthogonalConv2D,
    OrthogonalConv2DTranspose,
)
LINEAR_LAYERS = (*SUPPORTED, *OWN_DENSE, *OWN_CONVOLUTIONS)


def is_linear(layer):
    """Whether the layer is exactly one of Keras' or of our dense or convolution classes.

    Circular padding is none of a `LinearMap`.
    """
    return type(layer) in LINEAR_LAYERS and getattr(layer, "padding", None) != "circular"


def kernel_maps(layer, input_shape=None):
    """Variables that inference reads kernels from, with the geometry of their maps.

    As `spectral.reading.linear_maps`; for a layer of this library its cache of effective weights,
    brought up to date.

    Args:
        layer: a built layer for which `is_linear` holds.
        input_shape: shape of its input with the batch axis.

    Returns:
        List of `(variable, LinearMap)`.

    Raises:
        ValueError: if the effective weights are not finite.
    """
    if not isinstance(layer, EffectiveLayer):
        return linear_maps(layer, input_shape=input_shape)
    finite_values(layer)  # refreshes the cache
    (variable,) = layer._cache
    if type(layer) in OWN_DENSE:
        return [(variable, LinearMap("dense", (int(variable.shape[0]),)))]
    if input_shape is None and hasattr(layer, "linear_map"):
        return [(variable, layer.linear_map)]
    return [(variable, layer._map(input_shape))]


def finite_values(layer):
    """`effective_values()` of a layer of this library, refused where one is not finite."""
    values = layer.effective_values()
    if not all(np.all(np.isfinite(v)) for v in values.values()):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in the effective weights of layer "
            f"{layer.name!r}. The model has diverged; no certificate of it exists."
        )
    return values


def inference_value(variable, dtype):
    """A variable as a layer of this compute dtype uses it, in float64."""
    value = keras.ops.convert_to_tensor(variable)
    if keras.backend.standardize_dtype(value.dtype) == dtype and dtype in ("float32", "float64"):
        return np.asarray(keras.ops.convert_to_numpy(value)).astype(np.float64)
    value = keras.ops.cast(value, dtype)
    # A vector: NumPy cannot read a bfloat16 scalar of TensorFlow.
    entries = np.asarray(keras.ops.convert_to_numpy(keras.ops.reshape(value, (-1,))))
    return entries.astype(np.float64).reshape(tuple(value.shape))


def channel_axis(layer, rank):
    """Axis of the layer's output that holds its channels."""
    return 1 if getattr(layer, "data_format", "") == "channels_first" else rank - 1


def finite_value(layer, variable, dtype):
    """`inference_value`, refused where it is not finite."""
    value = inference_value(variable, dtype)
    if not np.all(np.isfinite(value)):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}."
        )
    return value
