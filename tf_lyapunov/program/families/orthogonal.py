"""Orthogonal convolutions: plain ones with zeros, and circular ones, bounded as a whole."""

import math

import numpy as np

from tf_lyapunov.layers.orthogonal_convolution import OrthogonalConv2D
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import fused, linear
from tf_lyapunov.program.families.effective import biased, effective_gain, fused_value
from tf_lyapunov.program.families.moving import Moved
from tf_lyapunov.program.operation import frozen
from tf_lyapunov.program.weights import finite_value, finite_values
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.orthogonal import convolution_residual_upper_bound


def _read(call):
    layer, tensor = call.operation, call.inputs[0]
    if layer.padding != "circular":
        return linear.read(call)
    kernel = frozen(finite_values(layer)["kernel"])
    index = _wrapped(layer, tensor.shape)
    bias = None
    if layer.bias is not None:
        bias = frozen(finite_value(layer, layer.bias, layer.compute_dtype))
    first = layer.data_format == "channels_first"
    linear_map = layer._map((None, *index.shape))
    found = [Moved(index), linear.Linear(kernel, bias, linear_map, first)]
    return found + fused.read(layer, call.outputs[0])


def _wrapped(layer, shape):
    """Index of the padded image's entries, 0 for zeros."""
    index = np.arange(1, math.prod(shape[1:]) + 1).reshape(shape[1:])
    start = 1 if layer.data_format == "channels_first" else 0
    for axis, positions in enumerate(layer.wrapped_positions(shape)):
        pads = [(0, 0)] * 3
        pads[axis + start] = (0, 1)
        index = np.take(np.pad(index, pads), positions, axis=axis + start)
    index = np.ascontiguousarray(index)
    index.setflags(write=False)
    return index


def _rule(call):
    """(1 + ‖G - I‖)^½, which wrapping leaves as it is."""
    layer, output = call.operation, call.outputs[0]
    kernel = finite_values(layer)["kernel"]
    departure = convolution_residual_upper_bound(kernel, layer.strides, layer.groups)
    norm = rounding.sqrt_up(1 + departure)
    absolute = linear.absolute_norm_upper_bound(kernel, LinearMap("conv", groups=layer.groups))
    terms = math.prod(kernel.shape[:-1])

    def model():
        path = linear.map_affine(norm, absolute, 0.0, terms, layer.compute_dtype)
        return biased(layer, path, output)

    method = f"(1 + ‖G - I‖)^½, ‖G - I‖ ≤ {departure:.3g} at every frequency"
    return effective_gain(call, fused_value(layer, output, norm), method, model)


READERS = {OrthogonalConv2D: _read}
RULES = {OrthogonalConv2D: _rule}
