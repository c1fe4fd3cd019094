"""Sandwich layers: √2·Aᵀψ φ(√2·ψ⁻¹Bx + b), two maps around an activation."""

import numpy as np

from tf_lyapunov.layers.linear import space_to_depth_shape
from tf_lyapunov.layers.sandwich import SandwichConv2D, SandwichDense
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import fused
from tf_lyapunov.program.families.effective import (
    activation_model,
    effective_gain,
    like,
    monotone_sector,
    translation,
)
from tf_lyapunov.program.families.fourier import (
    Fourier,
    fourier_affine,
    moved_blocks,
    stack_norm_upper_bound,
)
from tf_lyapunov.program.families.linear import (
    Linear,
    absolute_norm_upper_bound,
    bias_norm,
    map_affine,
)
from tf_lyapunov.program.families.scaling import scaled
from tf_lyapunov.program.gain import Affine
from tf_lyapunov.program.operation import frozen
from tf_lyapunov.program.weights import finite_value, finite_values
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap


def _bias(layer):
    if layer.bias is None:
        return None
    return frozen(finite_value(layer, layer.bias, layer.compute_dtype))


def _read(call):
    layer, values = call.operation, finite_values(call.operation)
    inner, outer = (
        (frozen(values[name]), bias, LinearMap("dense", values[name].shape[:1]))
        for name, bias in (("inner", _bias(layer)), ("outer", None))
    )
    return [Linear(*inner), *fused.read(layer, call.outputs[0]), Linear(*outer)]


def _read_convolution(call):
    layer, tensor, bias = call.operation, call.inputs[0], _bias(call.operation)
    values = finite_values(layer)
    sizes = space_to_depth_shape(tensor.shape[1:], layer.strides)[:2]
    inner, outer = (Fourier(frozen(values[name]), sizes) for name in ("inner", "outer"))
    shift = [] if bias is None else [scaled(np.ones(()), bias)]
    activation = fused.read(layer, call.outputs[0])
    return [*moved_blocks(tensor, layer.strides), inner, *shift, *activation, outer]


def _sandwich_gain(layer):
    """`gain_upper_bound` is linear in the largest slope, which it takes to be 1."""
    return rounding.product_up(layer.gain_upper_bound(), monotone_sector(layer).beta)


def _sandwich_rule(call):
    layer, tensor, dtype = call.operation, call.inputs[0], call.operation.compute_dtype
    values = finite_values(layer)
    maps = [(values[name], LinearMap("dense", values[name].shape[:1]))
            for name in ("inner", "outer")]  # fmt: skip
    norms = [norm_upper_bound(*m).value for m in maps]
    absolutes = [absolute_norm_upper_bound(*m) for m in maps]
    inputs, width = values["inner"].shape
    hidden = like(tensor, (*tensor.shape[1:-1], width), dtype)

    def model():
        bias = bias_norm(layer, hidden, dtype)
        path = map_affine(norms[0], absolutes[0], bias, inputs, dtype)
        path = path.then(activation_model(layer, hidden, dtype))
        return path.then(map_affine(norms[1], absolutes[1], 0.0, width, dtype))

    return effective_gain(call, _sandwich_gain(layer), "(β/2)‖[θ⁻¹Pᵀ, θQ]‖² of both maps", model)


def _sandwich_convolution_rule(call):
    layer, tensor, dtype = call.operation, call.inputs[0], call.operation.compute_dtype
    values, work = finite_values(layer), layer.work_dtype
    sizes = space_to_depth_shape(tensor.shape[1:], layer.strides)[:2]
    width = layer.filters
    norms = [stack_norm_upper_bound(values[name]) for name in ("inner", "outer")]
    hidden = like(tensor, (*sizes, width), work)

    def model():
        # The bias has been cast to the compute dtype, and is added in the other one.
        bias = bias_norm(layer, hidden, dtype)
        path = fourier_affine(norms[0], values["inner"], sizes, work)
        path = path.then(translation(bias, work))
        path = path.then(activation_model(layer, hidden, work))
        path = path.then(fourier_affine(norms[1], values["outer"], sizes, work))
        return path.then(Affine(1.0, 0.0, rounding.unit_roundoff(dtype), 0.0))

    method = "(β/2)‖[θ⁻¹Pᵀ, θQ]‖² of both maps, largest over frequencies"
    return effective_gain(call, _sandwich_gain(layer), method, model)


READERS = {SandwichDense: _read, SandwichConv2D: _read_convolution}
RULES = {SandwichDense: _sandwich_rule, SandwichConv2D: _sandwich_convolution_rule}
