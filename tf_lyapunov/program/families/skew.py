"""Skew orthogonal convolutions: the truncated exponential Σ Lᵏ/k! of a convolution."""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.skew import SkewOrthogonalConv2D
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.effective import biased, effective_gain, end_of, fused_value
from tf_lyapunov.program.families.linear import Linear, absolute_norm_upper_bound, map_affine
from tf_lyapunov.program.families.moving import Moved, space_to_depth_index
from tf_lyapunov.program.families.scaling import scaled
from tf_lyapunov.program.gain import Affine
from tf_lyapunov.program.operation import Operation, Signal, frozen
from tf_lyapunov.program.weights import finite_values
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.orthogonal import truncated_exponential_norm_upper_bound
from tf_lyapunov.theory.rounding import round_up


@dataclasses.dataclass(frozen=True)
class Exponential(Operation):
    """y = Σ_{k<n} Lᵏx/k!.

    Attributes:
        linear: `Linear` operation L, of equal input and output shape.
        terms: n.
    """

    linear: Linear
    terms: int

    def forward(self, signals, precision):
        (total,) = signals
        power = total
        for k in range(1, self.terms):
            power = self.linear.forward([power], precision)
            # By the reciprocal, a setting.
            power = scaled(np.array(1 / k), np.zeros(())).forward([power], precision)
            total = _sum(total, power, precision)
        return total

    def write(self, graph, names):
        (total,) = (power,) = names
        for k in range(1, self.terms):
            power = graph.apply(self.linear, [power])
            power = graph.apply(scaled(np.array(1 / k), np.zeros(())), [power])
            total = graph.pointwise("Add", total, power)
        return total


def _sum(a, b, precision):
    value = a.value + b.value
    if a.error is None or b.error is None:
        return Signal(value)
    moved = a.error + b.error
    own = precision.unit * (np.abs(value) + moved) + precision.tiny
    return Signal(value, (moved + own) * (1 + 1e-9))


def _read(call):
    layer, tensor = call.operation, call.inputs[0]
    kernel = frozen(finite_values(layer)["kernel"])
    width = kernel.shape[-1]
    # Blocks of pixels to channels, then zero channels up to the width of the filter.
    blocks = space_to_depth_index(tensor.shape[1:], layer.strides)
    channels = blocks.shape[-1]
    blocks = np.pad(blocks, [(0, 0), (0, 0), (0, width - channels)])
    found = [Moved(_kept(blocks))]
    found.append(Exponential(Linear(kernel, None, layer.linear_map), layer.inference_terms))
    if layer.filters < width:
        index = np.arange(1, blocks.size + 1).reshape(blocks.shape)
        found.append(Moved(_kept(index[..., : layer.filters])))
    scale = skew_scale(layer)
    found += [] if scale == 1.0 else [scaled(np.array(scale), np.zeros(()))]
    return found + end_of(call)


def _kept(index):
    index = np.ascontiguousarray(index)
    index.setflags(write=False)
    return index


def skew_scale(layer):
    """The factor that a call at inference multiplies the series by."""
    scale = layer.output_scale(layer.inference_terms)
    return 1.0 if scale == 1.0 else rounded_down(scale, layer.compute_dtype)


def _skew_rule(call):
    """Σ_{k<n} Lᵏ/k!: max |s_n(iθ)| for a skew L, else Σ ‖L‖ᵏ/k!."""
    layer, dtype, output = call.operation, call.operation.compute_dtype, call.outputs[0]
    kernel = finite_values(layer)["kernel"]
    terms, scale = layer.inference_terms, skew_scale(layer)
    norm = norm_upper_bound(kernel, layer.linear_map).value
    turned = -np.swapaxes(np.flip(kernel, axis=(0, 1)), -1, -2)
    if np.array_equal(kernel, turned):
        series = truncated_exponential_norm_upper_bound(terms, norm)
        method = f"‖Σ Lᵏ/k!‖, {terms} terms, L skew with ‖L‖ ≤ {norm:.6g}"
    else:
        exact = Fraction(norm)
        series = round_up(sum(exact**k / math.factorial(k) for k in range(terms)))
        method = f"Σ ‖L‖ᵏ/k!, {terms} terms, L not skew, ‖L‖ ≤ {norm:.6g}"
    absolute = absolute_norm_upper_bound(kernel, layer.linear_map)
    products = math.prod(kernel.shape[:-1])
    value = rounding.product_up(scale, series)

    def model():
        unit = rounding.unit_roundoff(dtype)
        own = map_affine(norm, absolute, 0.0, products + 4, dtype).slope
        power, error, powers, errors = 1.0, 0.0, 1.0, 0.0
        for k in range(1, terms):
            error = (norm * error + own * (power + error)) / k
            power = norm * power / k
            powers, errors = powers + power, errors + error
        summing = rounding.gamma(terms + 4, unit)
        slope = scale * (errors + summing * (powers + errors)) * (1 + 1e-9)
        return biased(layer, Affine(value, 0.0, slope, 0.0), output)

    return effective_gain(call, fused_value(layer, output, value), method, model)


READERS = {SkewOrthogonalConv2D: _read}
RULES = {SkewOrthogonalConv2D: _skew_rule}
