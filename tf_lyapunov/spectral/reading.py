"""Reads the linear maps of built Keras layers."""

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.theory.operators import LinearMap

_CONV = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
SUPPORTED = (keras.layers.Dense, *_CONV, *_DEPTHWISE, *_SEPARABLE, *_TRANSPOSED)


def is_linear(layer):
    """Whether `layer` holds a linear map that `linear_maps` can read."""
    return isinstance(layer, SUPPORTED)


def linear_maps(layer, input_shape=None):
    """Kernels of a built Keras layer with the geometry of the maps they stand for.

    Args:
        layer: a built Dense, Conv, DepthwiseConv, SeparableConv or ConvTranspose layer.
        input_shape: shape of the layer's input with the batch axis, in the layer's data format;
            by default the shape the layer was built with.

    Returns:
        List of `(kernel, LinearMap)`, two entries (depthwise, pointwise) for separable layers,
        else one. The norm of the layer's linear part is at most the product over the entries.

    Raises:
        UnsupportedLayerError: if the layer's type holds no kernel that is known here, or another
            one than inference uses (quantized, or with an adapter).
        ValueError: if the layer is not built.

    Example:

    >>> import keras
    >>> layer = keras.layers.Conv2D(4, 3, strides=2, padding="same")
    >>> layer.build((None, 8, 8, 3))
    >>> [(kernel, linear_map)] = linear_maps(layer)
    >>> linear_map.input_shape, linear_map.output_shape(kernel.shape)
    ((8, 8, 3), (4, 4, 4))
    """
    if not is_linear(layer):
        names = ", ".join(cls.__name__ for cls in SUPPORTED)
        raise UnsupportedLayerError(
            f"Only layers with a known linear map have a kernel to bound. Received: layer "
            f"{layer.name!r} of type {type(layer).__name__}. Supported: {names}."
        )
    if not layer.built:
        raise ValueError(
            f"A layer must be built before its kernel can be read. Received: unbuilt layer "
            f"{layer.name!r}. Call the model on data or `model.build(input_shape)` first."
        )
    if getattr(layer, "quantization_mode", None) is not None:
        raise UnsupportedLayerError(
            f"Quantized layers have no certificate. Received: layer {layer.name!r} in mode "
            f"{layer.quantization_mode!r}. Certify the model before quantizing it."
        )
    if getattr(layer, "lora_enabled", False):
        raise UnsupportedLayerError(
            f"A layer with LoRA adapters has no certificate. Received: layer {layer.name!r}. "
            "Merge the adapter into the kernel first."
        )
    if isinstance(layer, keras.layers.Dense):
        kernel = layer.kernel
        return [(kernel, LinearMap("dense", (int(kernel.shape[0]),)))]
    shape = _channels_last(layer, input_shape or _built_input_shape(layer))
    geometry = {"strides": layer.strides, "dilation": layer.dilation_rate}
    if isinstance(layer, _SEPARABLE):
        depthwise = LinearMap("depthwise", shape, padding=layer.padding, **geometry)
        between = depthwise.output_shape(tuple(layer.depthwise_kernel.shape))
        pointwise = LinearMap("conv", between, padding="valid")
        return [(layer.depthwise_kernel, depthwise), (layer.pointwise_kernel, pointwise)]
    if isinstance(layer, _TRANSPOSED):
        padding = layer.output_padding
        linear_map = LinearMap(
            "conv_transpose", shape, padding=layer.padding, output_padding=padding, **geometry
        )
        return [(layer.kernel, linear_map)]
    kind = "depthwise" if isinstance(layer, _DEPTHWISE) else "conv"
    groups = layer.groups if kind == "conv" else 1
    linear_map = LinearMap(kind, shape, padding=layer.padding, groups=groups, **geometry)
    return [(layer.kernel, linear_map)]


def _built_input_shape(layer):
    config = layer.get_build_config() or {}
    return config.get("input_shape") or next(iter((config.get("shapes_dict") or {}).values()), None)


def _channels_last(layer, input_shape):
    """`(*spatial, channels)` or None if any size is unknown."""
    if input_shape is None:
        return None
    shape = tuple(input_shape)[1:]
    if layer.data_format == "channels_first":
        shape = (*shape[1:], shape[0])
    return None if None in shape else shape
