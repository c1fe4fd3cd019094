"""Gradient steps of convex potentials: g·(x - W t φ(Wᵀx + b))."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.layers import potential, sdp
from tf_lyapunov.layers.attention import SoftmaxPotential
from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import fused
from tf_lyapunov.program.families.effective import (
    activation_model,
    effective_gain,
    like,
    monotone_sector,
)
from tf_lyapunov.program.families.linear import (
    Linear,
    absolute_norm_upper_bound,
    bias_norm,
    map_affine,
)
from tf_lyapunov.program.families.merging import Weighted
from tf_lyapunov.program.families.scaling import scaled
from tf_lyapunov.program.gain import Affine
from tf_lyapunov.program.operation import Operation, frozen
from tf_lyapunov.program.weights import finite_value, finite_values
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.potential import flow_gain_upper_bound

_UNIT = rounding.UNIT_ROUNDOFF["float64"]


@dataclasses.dataclass(frozen=True)
class GradientStep(Operation):
    """y = x - branch(x).

    Attributes:
        branch: tuple of `Operation`, applied one after the other.
    """

    branch: tuple

    def forward(self, signals, precision):
        path = signals
        for operation in self.branch:
            path = [operation.forward(path, precision)]
        return Weighted((1.0, -1.0)).forward([*signals, *path], precision)

    @property
    def has_writer(self):
        return all(operation.has_writer for operation in self.branch)

    def write(self, graph, names):
        path = names
        for operation in self.branch:
            path = [graph.apply(operation, path)]
        return Weighted((1.0, -1.0)).write(graph, [*names, *path])


def _read(call):
    """Wᵀ and b, β for a softmax, φ, t, W: a branch that is subtracted; then g."""
    layer, tensor = call.operation, call.inputs[0]
    values = finite_values(layer)
    kernel, shape = frozen(values["kernel"]), (*tensor.shape[:-1], values["kernel"].shape[-1])
    there = back = LinearMap("dense", kernel.shape[:1])
    adjoint = kernel.T if not layer.spatial_axes else kernel
    if layer.spatial_axes:
        there = LinearMap("conv", tuple(tensor.shape[1:]), padding="same")
        # The adjoint of a convolution, in its own kernel.
        back = LinearMap("conv_transpose", shape[1:], padding="same")
    bias = None
    if layer.bias is not None:
        bias = frozen(finite_value(layer, layer.bias, layer.compute_dtype))
    sharpened = []
    if type(layer) is SoftmaxPotential:
        sharpened = [scaled(np.array(layer.sharpness), np.zeros(()))]
    branch = (
        Linear(kernel, bias, there),
        *sharpened,
        *fused.read(layer, like(tensor, shape[1:], layer.compute_dtype)),
        scaled(values["scale"], np.zeros(())),
        Linear(frozen(adjoint), None, back),
    )
    gain = rounded_down(layer.max_gain, layer.compute_dtype)
    end = [] if gain == 1 else [scaled(np.array(gain), np.zeros(()))]
    return [GradientStep(branch), *end]


def _steepness(layer):
    """Largest slope of φ, of a softmax the norm of its Jacobian."""
    return layer.sharpness / 2 if type(layer) is SoftmaxPotential else monotone_sector(layer).beta


def _potential_rule(call):
    """g·(x - W t φ(Wᵀx + b)): `theory.potential`, eq. (2), at the size of this call."""
    layer, tensor = call.operation, call.inputs[0]
    values, dtype = finite_values(layer), layer.compute_dtype
    kernel, scale = values["kernel"], values["scale"]
    beta = _steepness(layer)
    linear_map = LinearMap("dense", kernel.shape[:1])
    if layer.spatial_axes:
        linear_map = LinearMap("conv", tuple(tensor.shape[1:]), padding="same")
    g = rounded_down(layer.max_gain, dtype)
    value = flow_gain_upper_bound(kernel, scale, linear_map, beta=beta, gain=g)
    # ‖W√t‖² from the gain, max(1, β‖W√t‖² - 1); the maps err in proportion to ‖|W|‖, ‖|W|t‖.
    size = math.sqrt((value / g + 1) / beta) * (1 + 1e-12) if beta > 0 else math.inf
    first = absolute_norm_upper_bound(kernel, linear_map)
    last = absolute_norm_upper_bound(kernel * scale, linear_map) * (1 + 4 * _UNIT)
    smallest, largest = (math.sqrt(f(scale)) for f in (np.min, np.max))
    norms = (
        min(first, size / smallest) if smallest > 0 else first,
        min(last, size * largest),
    )
    taps, (inputs, width) = math.prod(kernel.shape[:-2]), kernel.shape[-2:]
    hidden = like(tensor, (*tensor.shape[1:-1], width), dtype)

    def model():
        path = map_affine(norms[0], first, bias_norm(layer, hidden, dtype), taps * inputs, dtype)
        if type(layer) is SoftmaxPotential:
            error = rounding.gamma(3, rounding.unit_roundoff(dtype))
            path = path.then(Affine(layer.sharpness, 0.0, error * layer.sharpness, 0.0))
        path = path.then(activation_model(layer, hidden, dtype))
        path = path.then(map_affine(norms[1], last, 0.0, taps * width + 1, dtype))
        e = rounding.gamma(4, rounding.unit_roundoff(dtype))
        slope = path.slope * (1 + e) + e * (1 + path.gain)
        constant = path.constant * (1 + e) + e * path.offset
        return Affine(value, g * path.offset, g * slope, g * constant)

    return effective_gain(call, value, "max(1, β‖W√t‖² - 1) from kernel and step", model)


_LAYERS = (
    potential.ConvexPotentialDense,
    potential.ConvexPotentialConv1D,
    potential.ConvexPotentialConv2D,
    sdp.SDPLipschitzDense,
    sdp.SDPLipschitzConv1D,
    sdp.SDPLipschitzConv2D,
    SoftmaxPotential,
)
READERS = dict.fromkeys(_LAYERS, _read)
RULES = dict.fromkeys(_LAYERS, _potential_rule)
