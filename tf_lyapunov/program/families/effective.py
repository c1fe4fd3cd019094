"""Gains of layers whose weights are not one kernel, from the weights that inference uses.

Potential, sandwich, Cayley and skew layers keep to `max_gain` by construction; nothing here relies
on it.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.activations import activation_name, is_exact, settings_of
from tf_lyapunov.program.families.fused import HELD, activation_gain, fused_gain, read
from tf_lyapunov.program.families.linear import bias_norm
from tf_lyapunov.program.families.scaling import scaled
from tf_lyapunov.program.gain import Affine, Gain, with_cast
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.weights import finite_value
from tf_lyapunov.theory.sectors import Sector


def _two_models(model):
    """`(affine, affine64)` of a function that returns an error model in the present context."""
    own = model()
    with rounding.float64_evaluation():
        exact = model()
    # 0·∞, where a map vanishes and a size is unknown.
    return tuple(Affine(*(math.inf if v != v else v for v in dataclasses.astuple(a)))
                 for a in (own, exact))  # fmt: skip


def effective_gain(call, value, method, model):
    """`Gain` of a layer, its input cast to the compute dtype first."""
    tensor, dtype = call.inputs[0], call.operation.compute_dtype

    def with_input():
        affine = with_cast(model(), tensor, dtype, rounding.unit_roundoff(dtype))
        return dataclasses.replace(affine, gain=value)

    affine, affine64 = _two_models(with_input)
    return Gain("lipschitz", value, method, affine, affine64=affine64)


def activation_model(layer, tensor, dtype):
    """Error model of a fused elementwise activation, computed in `dtype`."""
    gain = activation_gain(layer.activation, tensor, dtype, layer)
    if gain is None:
        return Affine()
    affine = gain.affine
    if not is_exact(activation_name(layer.activation), layer):
        extra = 2 * rounding.UNIT_ROUNDOFF["float32"]
        shift, capped = affine.offset, settings_of(layer).get("max_value", 0.0)
        if capped:
            shift += math.inf if tensor.size is None else math.sqrt(tensor.size) * abs(capped)
        affine = dataclasses.replace(
            affine,
            slope=affine.slope + extra * max(affine.gain, 1.0),
            constant=affine.constant + extra * shift,
        )
    return affine


def monotone_sector(layer):
    sector = Sector.of(layer.activation)
    if sector.alpha < 0:
        raise UnsupportedLayerError(
            f"A {type(layer).__name__} needs an activation that does not decrease. Received: "
            f"layer {layer.name!r} with slopes from {sector.alpha:.4g}."
        )
    return sector


def like(tensor, shape, dtype):
    return Tensor(tensor.producer, 0, (tensor.shape[0], *shape), dtype)


def translation(bias, dtype):
    error = rounding.gamma(2, rounding.unit_roundoff(dtype))
    return Affine(1.0, bias, error, rounding.product_up(error, bias))


def biased(layer, path, output):
    """Error model of φ(y + b) in the compute dtype after `path`, and φ's gain."""
    dtype = layer.compute_dtype
    path = path.then(translation(bias_norm(layer, output, dtype), dtype))
    activation = fused_gain(layer, dataclasses.replace(output, dtype=dtype))
    if activation is None:
        return path
    name = activation_name(layer.activation)
    own = type(layer.activation) in HELD or is_exact(name, layer)
    return path.then(
        activation.affine
        if own
        else activation_model(layer, dataclasses.replace(output, dtype=dtype), dtype)
    )


def end_of(call):
    """Operations of `biased`: the bias, then the activation."""
    layer, dtype = call.operation, call.operation.compute_dtype
    found = []
    if layer.bias is not None:
        bias = finite_value(layer, layer.bias, dtype)
        found.append(scaled(np.ones(()), bias))
    return found + read(layer, dataclasses.replace(call.outputs[0], dtype=dtype))


def fused_value(layer, output, value):
    activation = fused_gain(layer, dataclasses.replace(output, dtype=layer.compute_dtype))
    return value if activation is None else rounding.product_up(value, activation.value)
