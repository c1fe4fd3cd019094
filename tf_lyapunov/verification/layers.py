"""What every known Keras layer does at inference, as `operations` on its weights.

Reads settings and weights; computes no bound. What is not in `RULES` is refused by name.
"""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.verification.arithmetic import SMALLEST, UNIT, rounded
from tf_lyapunov.verification.operations import (
    Activation,
    AveragePooling,
    Axis,
    Convolution,
    GlobalPooling,
    Identity,
    Linear,
    MaxPooling,
    Merge,
    Move,
    Scale,
)
from tf_lyapunov.verification.suspicion import activation_key, check_layer

_layers = keras.layers


@dataclasses.dataclass(frozen=True, eq=False)
class Final(Identity):
    """A final softmax: keeps the order of its inputs. Never before the logits."""

    decides: str = "softmax"

    def gain(self):
        """Of a softmax at most one; no bound that holds at any width for its logarithm."""
        return 1.0 if self.decides == "softmax" else math.inf


def stored(variable, dtype):
    """A variable as a layer of this compute dtype uses it; as stored for None."""
    # NumPy's casts: a backend may round, flush or compute otherwise.
    found = np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float64)
    if dtype is not None:
        found = rounded(found, dtype)
    if not np.all(np.isfinite(found)):
        name = getattr(variable, "path", "its settings")
        raise ValueError(f"Weights must be finite. Received: NaN or infinity in {name!r}.")
    return found


def refuse(layer, reason="the verifier does not know it"):
    known = ", ".join(cls.__name__ for cls in RULES)
    raise UnsupportedLayerError(
        f"This layer cannot be verified: {reason}. Received: layer {layer.name!r} of type "
        f"{type(layer).__name__}. Known: {known}."
    )


# Activations ------------------------------------------------------------------------------------


def is_linear(activation):
    return activation is None or activation_key(activation) == "linear"


def activation_name(activation):
    names = {"ReLU": "relu", "LeakyReLU": "leaky_relu", "ELU": "elu", "PReLU": "leaky_relu"}
    if isinstance(activation, keras.Layer):
        kind = type(activation).__name__
        return names.get(kind, kind.lower())
    return getattr(activation, "__name__", type(activation).__name__)


def activation_operation(activation, layer, shape):
    """`Activation` of a Keras function or layer; only Keras's own objects are known by name."""
    if isinstance(activation, keras.Layer):
        if type(activation) not in _ACTIVATION_LAYERS:
            refuse(layer, f"its activation {type(activation).__name__} is unknown")
        check_layer(activation)
        if activation.compute_dtype != layer.compute_dtype or not activation.autocast:
            refuse(layer, "its activation computes in another dtype")
        return _ACTIVATION_LAYERS[type(activation)](activation, shape)
    name = activation_key(activation)
    if name is None:
        held = getattr(activation, "__name__", type(activation).__name__)
        refuse(layer, f"its activation {held!r} is unknown: no function of keras.activations")
    if name in ("softmax", "log_softmax"):
        return Final(name)
    # `keras.activations.gelu` is the exact one by default; leaky_relu has slope 0.2.
    return Activation(name, {"negative_slope": 0.2} if name == "leaky_relu" else {})


def _relu(layer, shape):
    if float(layer.threshold or 0.0) != 0.0:
        refuse(layer, "a threshold makes it discontinuous")
    top = None if layer.max_value is None else float(layer.max_value)
    return Activation("relu", {"negative_slope": float(layer.negative_slope), "max_value": top})


def _prelu(layer, shape):
    alpha = np.broadcast_to(stored(layer.alpha, layer.compute_dtype), shape)
    return Activation("prelu", {}, np.array(alpha))


_ACTIVATION_LAYERS = {
    _layers.ReLU: _relu,
    _layers.LeakyReLU: lambda layer, shape: Activation(
        "leaky_relu", {"negative_slope": float(layer.negative_slope)}
    ),
    _layers.ELU: lambda layer, shape: Activation("elu", {"alpha": float(layer.alpha)}),
    _layers.PReLU: _prelu,
    _layers.Activation: lambda layer, shape: (
        Identity()
        if is_linear(layer.activation)
        else activation_operation(layer.activation, layer, shape)
    ),
}


def _softmax_rule(layer, shapes):
    axis = layer.axis if isinstance(layer.axis, int) else None
    if axis not in (-1, len(shapes[0])):
        refuse(layer, "a softmax must be over the last axis")
    return [("", Final("softmax"), shapes[0])]


# Linear layers ----------------------------------------------------------------------------------


def _bias(layer, size):
    held = layer.bias if type(layer) is _layers.Dense or layer.use_bias else None
    return np.zeros(size) if held is None else stored(held, layer.compute_dtype)


def _dense_rule(layer, shapes):
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        refuse(layer, "it is quantized or has an adapter")
    weight = np.ascontiguousarray(stored(layer.kernel, layer.compute_dtype).T)
    return [("", Linear(weight, _bias(layer, len(weight))), (*shapes[0][:-1], len(weight)))]


def _convolution(layer, shape, kernels, bias, padding=None, plain=False):
    _check_format(layer)
    axes = []
    for i, taps in enumerate(kernels.shape[1:-2]):
        stride = 1 if plain else layer.strides[i]
        dilation = 1 if plain else layer.dilation_rate[i]
        axes.append(Axis.of(taps, int(stride), int(dilation), shape[i], padding or layer.padding))
    operation = Convolution(kernels, tuple(axes), bias)
    return operation, operation.output_shape()


def _convolution_rule(layer, shapes):
    kernel = stored(layer.kernel, layer.compute_dtype)
    kernels = np.stack(np.split(kernel, layer.groups, axis=-1))
    bias = _bias(layer, kernel.shape[-1])
    return [("", *_convolution(layer, shapes[0], kernels, bias))]


def _depthwise_rule(layer, shapes):
    kernel = stored(layer.kernel, layer.compute_dtype)
    kernels = np.moveaxis(kernel, -2, 0)[..., None, :]
    bias = _bias(layer, kernel.shape[-1] * kernel.shape[-2])
    return [("", *_convolution(layer, shapes[0], kernels, bias))]


def _separable_rule(layer, shapes):
    depth = stored(layer.depthwise_kernel, layer.compute_dtype)
    point = stored(layer.pointwise_kernel, layer.compute_dtype)
    kernels = np.moveaxis(depth, -2, 0)[..., None, :]
    first, shape = _convolution(layer, shapes[0], kernels, np.zeros(point.shape[-2]))
    bias = _bias(layer, point.shape[-1])
    second, last = _convolution(layer, shape, point[None], bias, "valid", plain=True)
    return [("/depthwise", first, shape), ("/pointwise", second, last)]


def normalization(layer):
    """`Scale` of a batch normalization at inference."""
    variance, mean = stored(layer.moving_variance, None), stored(layer.moving_mean, None)
    gamma = np.ones_like(variance) if not layer.scale else stored(layer.gamma, None)
    beta = np.zeros_like(variance) if not layer.center else stored(layer.beta, None)
    if np.any(variance + float(layer.epsilon) <= 0):
        refuse(layer, "var + epsilon is not positive")
    scale = gamma / np.sqrt(variance + float(layer.epsilon))
    shift = beta - mean * scale
    error = 8 * UNIT * np.abs(scale)
    shift_error = np.abs(mean) * error + 4 * UNIT * (np.abs(shift) + np.abs(beta))
    return Scale(scale, shift, error, shift_error, np.abs(mean * scale) + np.abs(beta))


def _batch_norm_rule(layer, shapes):
    if layer.axis % (len(shapes[0]) + 1) != len(shapes[0]):
        refuse(layer, "it must normalize the last axis")
    return [("", normalization(layer), shapes[0])]


def folds(layer, node):
    """Whether a batch normalization is the only reader of a linear layer without activation."""
    if node is None or type(layer) not in LINEAR or not is_linear(layer.activation):
        return False
    norm = node.operation
    if type(norm) is not _layers.BatchNormalization or len(node.input_tensors) != 1:
        return False
    rank = len(node.input_tensors[0].shape)
    first = getattr(layer, "data_format", "channels_last") != "channels_last"
    return norm.axis % rank == rank - 1 and not first


def fold(operation, norm):
    """A linear operation followed by a normalization."""
    bias = operation.bias * norm.scale + norm.shift
    size = np.abs(operation.bias) * (np.abs(norm.scale) * 4 * UNIT + norm.scale_error)
    bias_error = size + norm.shift_error + 4 * UNIT * np.abs(bias)
    parts = np.abs(operation.bias * norm.scale) + norm.shift_size
    after = np.maximum(np.abs(norm.scale), 1.0)
    if isinstance(operation, Linear):
        weight = operation.weight * norm.scale[:, None]
        error = norm.scale_error[:, None]
        spread = _spread(operation.weight, weight, error)
        return Linear(weight, bias, spread, bias_error, parts, after)
    groups, out = operation.kernels.shape[0], operation.kernels.shape[-1]
    shape = (groups, *(1,) * (operation.kernels.ndim - 2), out)
    kernels = operation.kernels * norm.scale.reshape(shape)
    spread = _spread(operation.kernels, kernels, norm.scale_error.reshape(shape))
    return Convolution(kernels, operation.axes, bias, spread, bias_error, parts, after)


def _spread(before, after, error):
    """Entrywise error of weights that were multiplied by numbers with this error."""
    spread = np.abs(before) * error + 2 * UNIT * np.abs(after)
    # What underflows, of zeros nothing.
    return np.where(before != 0, spread + 2 * SMALLEST, 0.0) * (1 + 2.0**-30)


# Other layers -----------------------------------------------------------------------------------


def _check_format(layer):
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        refuse(layer, "only channels_last is known")


def _identity_rule(layer, shapes):
    return [("", Identity(), shapes[0])]


def _activation_rule(layer, shapes):
    return [("", _ACTIVATION_LAYERS[type(layer)](layer, shapes[0]), shapes[0])]


def _pool_axes(layer, shape):
    _check_format(layer)
    sizes = zip(layer.pool_size, layer.strides, shape, strict=False)
    return tuple(Axis.of(int(q), int(s), 1, n, layer.padding) for q, s, n in sizes)


def _max_rule(layer, shapes):
    axes = _pool_axes(layer, shapes[0])
    return [("", MaxPooling(axes), (*(a.output for a in axes), shapes[0][-1]))]


def _average_rule(layer, shapes):
    axes = _pool_axes(layer, shapes[0])
    if keras.backend.backend() == "torch" and any(a.left or a.last >= a.size for a in axes):
        refuse(layer, "padded averages differ on torch")
    return [("", AveragePooling(axes), (*(a.output for a in axes), shapes[0][-1]))]


def _global_rule(layer, shapes):
    _check_format(layer)
    if layer.keepdims:
        refuse(layer, "keepdims is not known")
    positions = math.prod(shapes[0][:-1])
    mean = "Average" in type(layer).__name__
    return [("", GlobalPooling(mean, positions), shapes[0][-1:])]


def _reshape_rule(layer, shapes):
    _check_format(layer)
    size = math.prod(shapes[0])
    if type(layer) is _layers.Flatten:
        return [("", Move((size,)), (size,))]
    shape = list(layer.target_shape)
    if -1 in shape:
        shape[shape.index(-1)] = size // max(-math.prod(shape), 1)
    return [("", Move(tuple(shape)), tuple(shape))]


def _pads_rule(layer, shapes):
    _check_format(layer)
    sign = 1 if "Padding" in type(layer).__name__ else -1
    held = layer.padding if sign == 1 else layer.cropping
    pairs = [held] if isinstance(held[0], int) else list(held)
    pads = [(sign * int(a), sign * int(b)) for a, b in pairs] + [(0, 0)]
    shape = tuple(n + a + b for n, (a, b) in zip(shapes[0], pads, strict=True))
    return [("", Move(shape, tuple(pads)), shape)]


def _merge_rule(layer, shapes):
    kind = type(layer).__name__.lower()
    axis = getattr(layer, "axis", -1)
    if kind == "concatenate":
        axis %= len(shapes[0]) + 1
        if axis == 0:
            refuse(layer, "it joins along the batch axis")
        shape = list(shapes[0])
        shape[axis - 1] = sum(s[axis - 1] for s in shapes)
        return [("", Merge(kind, axis), tuple(shape))]
    if any(s != shapes[0] for s in shapes):
        refuse(layer, "its inputs have different shapes")
    return [("", Merge(kind), shapes[0])]


def _scale(layer, shape, scale, shift, roundings):
    scale, shift = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (scale, shift))
    try:
        fits = np.broadcast_shapes(shape, scale.shape, shift.shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        refuse(layer, f"its numbers do not fit inputs of shape {tuple(shape)}")
    size = np.abs(shift)
    return Scale(scale, shift, roundings * UNIT * np.abs(scale), roundings * UNIT * size, size)


def _rescaling_rule(layer, shapes):
    if np.ndim(layer.scale) and keras.config.image_data_format() == "channels_first":
        refuse(layer, "Keras turns its numbers where images have channels first")
    return [("", _scale(layer, shapes[0], layer.scale, layer.offset, 0.0), shapes[0])]


def _whitening_rule(layer, shapes):
    if layer.invert or layer.mean is None:
        refuse(layer, "it must be adapted, and not inverted")
    # The tensors that compute; loading the model again makes them anew from what is stored.
    mean, variance = stored(layer.mean, None), stored(layer.variance, None)
    kept = (layer.input_mean, layer.input_variance)
    if layer.input_mean is None:
        kept = [stored(v, layer.compute_dtype) for v in (layer.adapt_mean, layer.adapt_variance)]
    for used, value in zip((mean, variance), kept, strict=True):
        value = rounded(np.asarray(value, dtype=np.float64), layer.compute_dtype)
        used = used if value.size == used.size else np.unique(used)
        if value.size != used.size or np.any(value.ravel() != used.ravel()):
            refuse(layer, "its mean and variance are not those that it computes with; "
                   "call its `finalize_state()`, or load it again")  # fmt: skip
    if layer.input_mean is not None:
        mean, variance = (np.asarray(v, dtype=np.float64) for v in kept)
    rank = len(shapes[0]) + 1
    if mean.size > 1 and {a % rank for a in layer.axis} != {rank - 1}:
        refuse(layer, "it must normalize the last axis")
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    scale, shift = 1 / deviation.ravel(), -(mean / deviation).ravel()
    return [("", _scale(layer, shapes[0], scale, shift, 8.0), shapes[0])]


LINEAR = (
    _layers.Dense,
    _layers.Conv1D,
    _layers.Conv2D,
    _layers.Conv3D,
    _layers.DepthwiseConv1D,
    _layers.DepthwiseConv2D,
    _layers.SeparableConv1D,
    _layers.SeparableConv2D,
)


MERGES = (_layers.Add, _layers.Subtract, _layers.Average, _layers.Concatenate)


# Integers pass the first unchanged, and become floats in the second.
KEEP_INTEGERS = (_layers.Identity, _layers.Flatten, _layers.Reshape)
TAKE_INTEGERS = (_layers.Rescaling, _layers.Normalization, _layers.Dense)


def _family(name, *ranks):
    return [getattr(_layers, name.format(rank)) for rank in ranks or (1, 2, 3)]


RULES = {
    _layers.Dense: _dense_rule,
    **dict.fromkeys(_family("Conv{}D"), _convolution_rule),
    **dict.fromkeys(_family("DepthwiseConv{}D", 1, 2), _depthwise_rule),
    **dict.fromkeys(_family("SeparableConv{}D", 1, 2), _separable_rule),
    _layers.BatchNormalization: _batch_norm_rule,
    **dict.fromkeys(_ACTIVATION_LAYERS, _activation_rule),
    _layers.Softmax: _softmax_rule,
    **dict.fromkeys(_family("MaxPooling{}D"), _max_rule),
    **dict.fromkeys(_family("AveragePooling{}D"), _average_rule),
    **dict.fromkeys(_family("GlobalMaxPooling{}D"), _global_rule),
    **dict.fromkeys(_family("GlobalAveragePooling{}D"), _global_rule),
    **dict.fromkeys((_layers.Flatten, _layers.Reshape), _reshape_rule),
    **dict.fromkeys(_family("ZeroPadding{}D"), _pads_rule),
    **dict.fromkeys(_family("Cropping{}D"), _pads_rule),
    **dict.fromkeys(MERGES, _merge_rule),
    _layers.Rescaling: _rescaling_rule,
    _layers.Normalization: _whitening_rule,
    **dict.fromkeys(
        (
            _layers.Identity,
            _layers.Dropout,
            *_family("SpatialDropout{}D"),
            _layers.AlphaDropout,
            _layers.GaussianDropout,
            _layers.GaussianNoise,
            _layers.ActivityRegularization,
        ),
        _identity_rule,
    ),
}
