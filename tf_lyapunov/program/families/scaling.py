"""Scales and shifts per entry: normalizations at inference, Rescaling, constants in the graph."""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.centering import BatchCentering
from tf_lyapunov.layers.position import PositionBias
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.constants import checked_constant, constants, repeats
from tf_lyapunov.program.gain import SLACK, Affine, Gain, Peak, layer_gain, with_cast
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.tensors import as_array
from tf_lyapunov.program.weights import finite_value, inference_value

_layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Scaled(Operation):
    """y = scale·x + shift, broadcast over a sample.

    Attributes:
        scale, shift: float64.
        size: float64, what the rounding of the shift is relative to, at least |shift|.
        single: whether it is computed in float32 or better, whatever the model's format.
    """

    scale: np.ndarray
    shift: np.ndarray
    size: np.ndarray

    def forward(self, signals, precision):
        (signal,) = signals
        value = signal.value * self.scale + self.shift

        def error():
            scaled = np.abs(self.scale) * (np.abs(signal.value) + signal.error)
            unit = max(precision.sum(8), precision.function)
            own = unit * (scaled + self.size) + 4 * precision.tiny * (1 + np.abs(self.scale))
            return np.abs(self.scale) * signal.error + own

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        # An array may repeat the signal, whatever its entries are.
        if self.scale.size > 1 or np.any(self.scale != 1):
            x = graph.pointwise("Mul", x, self.scale)
        if self.shift.size > 1 or np.any(self.shift != 0):
            x = graph.pointwise("Add", x, self.shift)
        return x


@dataclasses.dataclass(frozen=True)
class BatchNormalized(Scaled):
    """A batch normalization at inference: a scale and a shift, which remember what they are of.

    Attributes:
        axis: of the channels, batch axis 0.
        statistics: float64 (4, channels): γ, β, mean, variance, as stored.
        epsilon: positive float.
    """

    axis: int
    statistics: np.ndarray
    epsilon: float

    def settings(self):
        """Those of its scale and shift: what it was written from does not change the function."""
        return Scaled(self.scale, self.shift, self.size).settings()

    def write(self, graph, names):
        """As ONNX's operator, which knows numbers in float32 alone, channels second."""
        if graph.is_double or np.any(self.statistics.astype(np.float32) != self.statistics):
            return super().write(graph, names)
        rank = 1 + len(graph.sizes(names[0]))
        order = (0, self.axis, *(a for a in range(1, rank) if a != self.axis))
        x = graph.transposed(*names, order)
        y = graph.node("BatchNormalization", x, *self.statistics, epsilon=float(self.epsilon))
        return graph.transposed(y, np.argsort(order).tolist())


def scaled(scale, shift, size=None):
    """`Scaled` of arrays."""
    shift = np.asarray(shift, np.float64)
    return Scaled(frozen(scale), frozen(shift), frozen(np.abs(shift) if size is None else size))


def diagonal_gain(kind, method, scales, shifts, output, dtype):
    """`Gain` of y = scales·x + shifts with broadcastable float64 arrays."""
    value = float(np.max(np.abs(scales), initial=0.0))
    size = math.inf if output.size is None else output.size
    norm = float(rounding.euclidean_norms_up(shifts.reshape(1, -1))[0])
    offset = rounding.product_up(norm, math.sqrt(size / shifts.size))
    error = rounding.gamma(6, rounding.unit_roundoff(dtype))
    affine = Affine(value, offset, error * value, rounding.product_up(error, offset))
    return Gain(kind, value, method, affine)


# Batch normalization ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BatchNormScale:
    """A batch normalization at inference: y = scale·x + shift per channel.

    Attributes:
        scale: float64 (channels,), γ/√(var + e), signed.
        shift_bound: float64 (channels,), |β| + |mean·scale|, which rounding errors scale with.
        offset: float64 (channels,), β - mean·scale, the output at zero input.
    """

    scale: np.ndarray
    shift_bound: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, layer):
        """Reads a built `keras.layers.BatchNormalization` in inference mode."""

        def read(variable, default):
            if variable is None:
                return default
            return np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float64)

        variance = read(layer.moving_variance, None)
        mean = read(layer.moving_mean, None)
        gamma = read(layer.gamma, np.ones_like(variance))
        beta = read(layer.beta, np.zeros_like(variance))
        # The smaller of the stated constant and its float32 value gives the larger gain.
        constant = min(float(layer.epsilon), float(np.float32(layer.epsilon)))
        if not all(np.all(np.isfinite(v)) for v in (variance, mean, gamma, beta)):
            raise ValueError(
                f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}."
            )
        if np.any(variance + constant <= 0):
            raise ValueError(
                "A batch normalization needs var + epsilon > 0. "
                f"Received: layer {layer.name!r} with smallest variance {variance.min()!r}."
            )
        scale = gamma / np.sqrt(variance + constant)
        return cls(scale, np.abs(beta) + np.abs(mean * scale), beta - mean * scale)

    @property
    def gain(self):
        """max |γ|/√(var + e), rounded up (three roundings)."""
        largest = float(np.max(np.abs(self.scale), initial=0.0))
        return largest * (1 + 4 * rounding.UNIT_ROUNDOFF["float64"])

    @property
    def inverse_gain(self):
        """max √(var + e)/|γ|, rounded up; inf where a channel is switched off."""
        smallest = float(np.min(np.abs(self.scale), initial=np.inf))
        if not smallest > 0:
            return np.inf
        return (1 + 8 * rounding.UNIT_ROUNDOFF["float64"]) / smallest

    def fold(self, kernel, linear_map):
        """Kernel of the linear map followed by this normalization (without the shift)."""
        if linear_map.kind == "depthwise":
            return kernel * self.scale.reshape(kernel.shape[-2:])
        if linear_map.kind == "conv_transpose":
            return kernel * self.scale[:, None]
        return kernel * self.scale

    def affine(self, output):
        """Error model: Keras normalizes in float32 or better, by about ten operations."""
        repeats = math.inf if output.size is None else output.size / max(self.scale.size, 1)
        norms = rounding.euclidean_norms_up(np.stack([self.offset, self.shift_bound]))
        offset, shift = (rounding.product_up(float(v), math.sqrt(repeats)) for v in norms)
        single = rounding.unit_roundoff("float32")
        unit = rounding.gamma(10, single)
        out = rounding.unit_roundoff(output.dtype)
        error = unit + (out * (1 + unit) if out > single else 0.0)
        return Affine(
            self.gain, offset, error * self.gain, rounding.product_up(error, offset + shift)
        )


def _read_batch_norm(call):
    layer, rank = call.operation, len(call.inputs[0].shape)
    shape = [1] * (rank - 1)
    shape[layer.axis % rank - 1] = -1

    def value(variable, default):
        stored = getattr(variable, "dtype", None)
        found = default if variable is None else inference_value(variable, stored)
        return np.asarray(found, np.float64).reshape(shape)

    variance, mean = value(layer.moving_variance, None), value(layer.moving_mean, None)
    gamma = value(layer.gamma if layer.scale else None, [1.0])
    beta = value(layer.beta if layer.center else None, [0.0])
    scale = gamma / np.sqrt(variance + layer.epsilon)
    found = scaled(scale, beta - mean * scale, np.abs(beta) + np.abs(mean * scale))
    held = [np.broadcast_to(v, mean.shape).ravel() for v in (gamma, beta, mean, variance)]
    return [
        BatchNormalized(
            found.scale, found.shift, found.size, layer.axis % rank, frozen(held), layer.epsilon
        )
    ]


def _batch_norm_rule(call):
    layer, output = call.operation, call.outputs[0]
    if layer.axis % len(output.shape) == 0:
        refuse(layer, "it normalizes along the batch axis")
    scale = BatchNormScale.of(layer)
    method = "largest |γ|/√(var + e) (no linear layer directly before it)"
    return Gain("batch normalization", scale.gain, method, scale.affine(output))


# Layers -----------------------------------------------------------------------------------------


def _read_rescaling(call):
    layer = call.operation
    return [scaled(layer.scale, layer.offset)]


def _rescaling_rule(call):
    layer, dtype = call.operation, call.operation.compute_dtype
    scales = np.asarray(layer.scale, dtype=np.float64)
    shifts = np.asarray(layer.offset, dtype=np.float64)
    if not (np.all(np.isfinite(scales)) and np.all(np.isfinite(shifts))):
        raise ValueError(f"Layer {layer.name!r} must have finite numbers. Received: {layer.scale}.")
    tensor = call.inputs[0]
    if scales.ndim and keras.config.image_data_format() == "channels_first":
        refuse(layer, "Keras turns its numbers where images have channels first")
    # Keras records the input's shape, whatever the numbers broadcast it to.
    unknown = tuple(n or 2**31 for n in tensor.shape[1:])
    try:
        fits = np.broadcast_shapes(unknown, scales.shape, shifts.shape) == unknown
    except ValueError:
        fits = False
    if not fits:
        refuse(layer, f"its numbers do not fit inputs of shape {tensor.shape}")
    gain = diagonal_gain("scaling", "largest |scale|", scales, shifts, call.outputs[0], dtype)
    return _input_cast(gain, tensor, dtype)


def _read_normalization(call):
    layer = call.operation
    mean, variance = layer.mean, layer.variance
    if layer.input_mean is None:
        for name, held, variable in (
            ("mean", mean, layer.adapt_mean),
            ("variance", variance, layer.adapt_variance),
        ):
            stored = as_array(keras.ops.cast(variable, held.dtype)).ravel()
            if not np.array_equal(as_array(held).ravel(), stored):
                raise UnsupportedLayerError(
                    "A Normalization computes with tensors that it keeps beside its weights. "
                    f"Received: layer {layer.name!r}, whose kept {name} differs from its weight. "
                    "Call `layer.finalize_state()`, or load the model from its file."
                )
        mean, variance = (inference_value(v, layer.compute_dtype) for v in (mean, variance))
    mean, variance = (
        as_array(v) if keras.ops.is_tensor(v) else np.asarray(v, np.float64)
        for v in (mean, variance)
    )
    mean, variance = (v.reshape(v.shape[1:]) if v.ndim else v for v in (mean, variance))
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return [scaled(deviation, mean)]
    return [scaled(1 / deviation, -mean / deviation)]


def _normalization_rule(call):
    layer, dtype = call.operation, call.operation.compute_dtype
    if layer.mean is None:
        raise ValueError(f"Layer {layer.name!r} must be adapted or given a mean and a variance.")
    mean, variance = layer.input_mean, layer.input_variance
    if mean is None:  # adapted to data: weights, cast at inference
        mean, variance = (inference_value(v, dtype) for v in (layer.mean, layer.variance))
    mean, variance = (np.asarray(v, dtype=np.float64) for v in (mean, variance))
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance)) and np.all(variance >= 0)):
        raise ValueError(f"Layer {layer.name!r} must have a finite mean and variance ≥ 0.")
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        scales, shifts, method = deviation, mean, "largest standard deviation"
    else:
        scales, shifts, method = 1 / deviation, mean / deviation, "1 / smallest standard deviation"
    # Root, floor and quotient each round once in float64.
    scales = scales * (1 + 4 * rounding.UNIT_ROUNDOFF["float64"])
    gain = diagonal_gain("scaling", method, scales, shifts, call.outputs[0], dtype)
    # The mean is subtracted before the quotient makes the difference smaller.
    gain = dataclasses.replace(gain, peak=Peak(1.0, offset=float(np.max(np.abs(mean)))))
    return _input_cast(gain, call.inputs[0], dtype)


def _input_cast(gain, tensor, dtype):
    unit = rounding.unit_roundoff(dtype)
    return dataclasses.replace(gain, affine=with_cast(gain.affine, tensor, dtype, unit))


def _read_centering(call):
    layer = call.operation
    mean = inference_value(layer.moving_mean, layer.compute_dtype)
    bias = 0.0 * mean
    if layer.bias is not None:
        bias = inference_value(layer.bias, layer.compute_dtype)
    axis, rank = getattr(layer, "axis", -1), len(call.inputs[0].shape)
    shape = [1] * (rank - 1)
    shape[axis % rank - 1] = -1
    return [
        scaled(
            np.ones(()),
            (bias - mean).reshape(shape),
            (np.abs(bias) + np.abs(mean)).reshape(shape),
        )
    ]


def _read_position(call):
    bias = inference_value(call.operation.bias, call.operation.compute_dtype)
    return [scaled(np.ones(()), bias, np.abs(bias))]


def _position_rule(call):
    layer = call.operation
    bias = finite_value(layer, layer.bias, layer.compute_dtype)
    offset = float(rounding.euclidean_norms_up(bias.reshape(1, -1))[0])
    error = rounding.gamma(2, rounding.unit_roundoff(layer.compute_dtype))
    method = "adds a number at every position"
    return layer_gain(call, "scaling", 1.0, method, error, offset * SLACK, error * offset)


def _centering_rule(call):
    layer, output = call.operation, call.outputs[0]
    dtype = layer.compute_dtype
    mean = finite_value(layer, layer.moving_mean, dtype)
    bias = np.zeros_like(mean) if layer.bias is None else finite_value(layer, layer.bias, dtype)
    norms = rounding.euclidean_norms_up(np.stack([bias - mean, np.abs(bias) + np.abs(mean)]))
    positions = math.inf if output.size is None else output.size // mean.size
    offset, size = (rounding.product_up(float(n), rounding.sqrt_up(positions)) for n in norms)
    error = rounding.gamma(4, rounding.unit_roundoff(dtype))
    method = "subtracts stored means"
    return layer_gain(call, "scaling", 1.0, method, error, offset * SLACK, error * size)


# Bare operations --------------------------------------------------------------------------------


def _read_multiply(call):
    ((_, value),) = constants(call)
    divides = type(call.operation).__name__ in ("TrueDivide", "Divide")
    return [scaled(1 / value if divides else value, np.zeros(()))]


def _multiply_rule(call):
    output = call.outputs[0]
    arguments = list(call.args) + list(call.kwargs.values())
    if len(call.inputs) != 1 or len(arguments) != 2:
        refuse(call.operation, "a product of two inputs has no global Lipschitz constant")
    divides = type(call.operation).__name__ in ("TrueDivide", "Divide")
    if divides and not isinstance(arguments[0], Tensor):
        refuse(call.operation, "a division by an input has no global Lipschitz constant")
    constant = next(c for c in (checked_constant(call, a) for a in arguments) if c is not None)
    if divides:
        if np.any(constant == 0):
            raise ValueError(f"Operation {call.operation.name!r} divides by zero.")
        constant = 1 / constant
    largest = float(np.max(np.abs(constant)))
    largest = float(rounding.up(largest)) if divides else largest
    largest = np.array(rounding.product_up(largest, repeats(call)))
    method = "divides by a constant" if divides else "multiplies by a constant"
    return diagonal_gain("scaling", method, largest, np.zeros(1), output, output.dtype)


def _read_negative(call):
    return [scaled(np.array(-1.0), np.zeros(()))]


def _negative_rule(call):
    return Gain("scaling", 1.0, "changes signs")


READERS = {
    _layers.BatchNormalization: _read_batch_norm,
    _layers.Rescaling: _read_rescaling,
    _layers.Normalization: _read_normalization,
    BatchCentering: _read_centering,
    PositionBias: _read_position,
}
RULES = {
    _layers.BatchNormalization: _batch_norm_rule,
    _layers.Rescaling: _rescaling_rule,
    _layers.Normalization: _normalization_rule,
    BatchCentering: _centering_rule,
    PositionBias: _position_rule,
}
_PRODUCTS = ("Multiply", "TrueDivide", "Divide")
BARE_READERS = {**dict.fromkeys(_PRODUCTS, _read_multiply), "Negative": _read_negative}
BARE_RULES = {**dict.fromkeys(_PRODUCTS, _multiply_rule), "Negative": _negative_rule}
