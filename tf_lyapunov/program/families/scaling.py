"""Scales and shifts per entry: normalizations at inference, Rescaling, constants in the graph."""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.centering import BatchCentering
from tf_lyapunov.program.linear import inference_value
from tf_lyapunov.program.operation import Operation, frozen, with_error

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


def scaled(scale, shift, size=None):
    """`Scaled` of arrays."""
    shift = np.asarray(shift, np.float64)
    return Scaled(frozen(scale), frozen(shift), frozen(np.abs(shift) if size is None else size))


def _batch_norm(call):
    layer, rank = call.operation, len(call.inputs[0].shape)
    shape = [1] * (rank - 1)
    shape[layer.axis % rank - 1] = -1

    def value(variable, default):
        stored = getattr(variable, "dtype", None)
        found = default if variable is None else inference_value(variable, stored)
        return np.asarray(found, np.float64).reshape(shape)

    scale = value(layer.gamma if layer.scale else None, [1.0]) / np.sqrt(
        value(layer.moving_variance, None) + layer.epsilon
    )
    mean, beta = value(layer.moving_mean, None), value(layer.beta if layer.center else None, [0.0])
    return [scaled(scale, beta - mean * scale, np.abs(beta) + np.abs(mean * scale))]


def _rescaling(call):
    layer = call.operation
    return [scaled(layer.scale, layer.offset)]


def _normalization(call):
    layer = call.operation
    mean, variance = layer.mean, layer.variance
    if layer.input_mean is None:
        for name, held, variable in (
            ("mean", mean, layer.adapt_mean),
            ("variance", variance, layer.adapt_variance),
        ):
            stored = np.asarray(keras.ops.convert_to_numpy(variable), np.float64).ravel()
            used = np.asarray(keras.ops.convert_to_numpy(held), np.float64).ravel()
            if not np.array_equal(used, np.asarray(stored, used.dtype)):
                raise UnsupportedLayerError(
                    "A Normalization computes with tensors that it keeps beside its weights. "
                    f"Received: layer {layer.name!r}, whose kept {name} differs from its weight. "
                    "Call `layer.finalize_state()`, or load the model from its file."
                )
        mean, variance = (inference_value(v, layer.compute_dtype) for v in (mean, variance))
    mean, variance = (np.asarray(v, np.float64) for v in (mean, variance))
    mean, variance = (v.reshape(v.shape[1:]) if v.ndim else v for v in (mean, variance))
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return [scaled(deviation, mean)]
    return [scaled(1 / deviation, -mean / deviation)]


def _centering(call):
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


READERS = {
    _layers.BatchNormalization: _batch_norm,
    _layers.Rescaling: _rescaling,
    _layers.Normalization: _normalization,
    BatchCentering: _centering,
}
