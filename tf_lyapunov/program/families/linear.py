"""Dense and convolution layers: y = Wx + b, computed kernel tap by kernel tap."""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.program.linear import LINEAR_LAYERS, inference_value, kernel_maps
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.theory.operators import LinearMap, convolution_axes


@dataclasses.dataclass(frozen=True)
class Linear(Operation):
    """y = Wx + b for a kernel in Keras' layout; `linear_map` says what it does.

    Attributes:
        kernel: float64, as cast for inference.
        bias: float64 (channels,), or None.
        linear_map: `LinearMap`, with the size of the input where it is a convolution.
        channels_first: whether signals have their channels before their positions.
    """

    kernel: np.ndarray
    bias: np.ndarray | None
    linear_map: LinearMap
    channels_first: bool = False

    def forward(self, signals, precision):
        (signal,) = signals
        value = self._map(signal.value, self.kernel)
        if self.bias is not None:
            value = value + self._shaped(self.bias, value.ndim)

        def error():
            size, taps = np.abs(self.kernel), self._terms()
            largest = np.abs(signal.value) + signal.error
            found = self._map(signal.error, size) + precision.sum(taps) * self._map(largest, size)
            # Operands and products that are flushed to zero.
            flushed = 1 + float(size.max(initial=0.0)) + np.max(largest, initial=0.0)
            found = found + precision.tiny * taps * flushed
            if self.bias is not None:
                bias = self._shaped(np.abs(self.bias), value.ndim)
                found = found + precision.sum(taps) * bias
            return found

        return with_error(signals, value, error)

    def _terms(self):
        taps = math.prod(self.kernel.shape[:-2])
        if self.linear_map.kind == "depthwise":
            return taps
        return taps * self.kernel.shape[-1 if self.linear_map.kind == "conv_transpose" else -2]

    def _shaped(self, vector, rank):
        return vector.reshape(-1, *[1] * (rank - 2)) if self.channels_first else vector

    def _map(self, x, kernel):
        if self.linear_map.kind == "dense":
            return x @ kernel
        if self.channels_first:
            x = np.moveaxis(x, 1, -1)
        value = convolved(x, kernel, self.linear_map)
        return np.moveaxis(value, -1, 1) if self.channels_first else value


def convolved(x, kernel, linear_map):
    """The convolution of channels-last signals (n, *sizes, channels), one product per tap.

    Args:
        x: float64.
        kernel: float64 in Keras' layout.
        linear_map: `LinearMap` of a convolution, at the size of `x`.

    Example:

    >>> kernel = np.array([1.0, -1.0]).reshape(2, 1, 1)
    >>> x = np.array([[[1.0], [4.0], [9.0]]])
    >>> convolved(x, kernel, LinearMap("conv", (3, 1))).ravel().tolist()
    [-3.0, -5.0]
    """
    linear_map = dataclasses.replace(linear_map, input_shape=tuple(x.shape[1:]))
    axes = convolution_axes(kernel.shape, linear_map)
    out = np.zeros((len(x), *linear_map.output_shape(kernel.shape)))
    turned = linear_map.kind == "conv_transpose"
    for tap in np.ndindex(*(a.taps for a in axes)):
        narrow, wide = [slice(None)], [slice(None)]
        for axis, t in zip(axes, tap, strict=True):
            # Positions i of the narrow grid whose partner i·s + t·d - left is in the wide one.
            shift = t * axis.dilation - axis.left
            first = max(-(shift // axis.stride), 0)
            last = min((axis.size - 1 - shift) // axis.stride, axis.output - 1)
            narrow.append(slice(first, last + 1))
            begin = first * axis.stride + shift
            wide.append(slice(begin, last * axis.stride + shift + 1, axis.stride))
            if last < first:
                break
        else:
            read, write = (narrow, wide) if turned else (wide, narrow)
            part = _tap(x[tuple(read)], kernel[tap], linear_map)
            out[tuple(write)] += part
    return out


def _tap(x, matrix, linear_map):
    if linear_map.kind == "conv_transpose":
        return x @ matrix.T
    if linear_map.kind == "depthwise":
        value = x[..., None] * matrix
        return value.reshape(*x.shape[:-1], -1)
    if linear_map.groups == 1:
        return x @ matrix
    groups = linear_map.groups
    parts = x.reshape(*x.shape[:-1], groups, -1)
    blocks = matrix.reshape(len(matrix), groups, -1)
    return np.einsum("...gi,igo->...go", parts, blocks).reshape(*x.shape[:-1], -1)


def read(call):
    """The maps of a dense or convolution layer; its activation is read by `elementwise`."""
    layer, tensor = call.operation, call.inputs[0]
    dtype, found = layer.compute_dtype, []
    first = getattr(layer, "data_format", "") == "channels_first"
    maps = kernel_maps(layer, tensor.shape)
    held = getattr(layer, "bias", None)
    for i, (variable, linear_map) in enumerate(maps):
        bias = None
        if i == len(maps) - 1 and held is not None:
            bias = frozen(inference_value(held, dtype))
        kernel = frozen(inference_value(variable, dtype))
        found.append(Linear(kernel, bias, linear_map, first))
    return found


READERS = dict.fromkeys(LINEAR_LAYERS, read)
FUSED = tuple(layer for layer in LINEAR_LAYERS if issubclass(layer, keras.Layer))
