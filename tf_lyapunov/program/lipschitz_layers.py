"""Gains of this library's layers whose weights are not one kernel, from those weights alone.

Potential, sandwich, Cayley and skew layers keep to `max_gain` by construction; nothing here relies
on it. What is read are the effective weights as inference uses them, whatever put them there. (The
affine layers with one kernel are read by `linear.kernel_maps`, as Keras's own are.)
"""

import dataclasses
import math
from fractions import Fraction

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import potential, sdp
from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.condensing import fix
from tf_lyapunov.layers.linear import space_to_depth_shape
from tf_lyapunov.layers.orthogonal import CayleyConv2D
from tf_lyapunov.layers.potential import PotentialLayer
from tf_lyapunov.layers.sandwich import SandwichConv2D, SandwichDense
from tf_lyapunov.layers.skew import SkewOrthogonalConv2D
from tf_lyapunov.program import own_layers, rounding
from tf_lyapunov.program.activations import activation_gain, activation_name
from tf_lyapunov.program.gain import Affine, Gain, with_cast
from tf_lyapunov.program.graph import Call, Tensor
from tf_lyapunov.program.linear import (
    absolute_norm_upper_bound,
    bias_norm,
    finite_values,
    map_affine,
)
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.orthogonal import truncated_exponential_norm_upper_bound
from tf_lyapunov.theory.potential import flow_gain_upper_bound
from tf_lyapunov.theory.rounding import round_up
from tf_lyapunov.theory.sectors import Sector

_UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Functions without a constant: backends round the others' to float32, also in float64.
_WITHOUT_CONSTANT = ("linear", "relu", "tanh", "sigmoid", "softplus", "softsign")


def fused_gain(layer, tensor):
    """`Gain` of the activation that a layer applies to `tensor` itself, or None for the identity.

    Args:
        layer: a layer with an `activation`: a function, a Keras layer or one of ours.
        tensor: `graph.Tensor` before the activation.
    """
    activation = layer.activation
    rule = own_layers.RULES.get(type(activation))
    if rule is None:
        return activation_gain(activation, tensor, layer.compute_dtype, layer)
    return rule(Call(layer.name, activation, (tensor,), {}, (tensor,), (tensor,)))


def float64_config(layer):
    """Configuration of a layer of this library for an evaluation in float64 (`fix_as_used`).

    Args:
        layer: a built `LipschitzLayer`.
    """
    config = {
        key: value for key, value in layer.get_config().items() if not key.endswith("initializer")
    }
    activation = getattr(layer, "activation", None)
    if type(activation) in own_layers.RULES:
        inner = type(activation).from_config({**activation.get_config(), "dtype": "float64"})
        config["activation"] = keras.saving.serialize_keras_object(inner)
    if isinstance(layer, PotentialLayer):
        config["max_gain"] = rounded_down(layer.max_gain, layer.compute_dtype)
    return config


def fix_as_used(copy, layer):
    """Makes a copy in float64 compute with the weights that `layer` uses at inference.

    Its own, computed from the raw variables in float64, would be others.

    Args:
        copy: the built copy, changed in place.
        layer: the original.
    """
    fix(copy, layer.effective_values())
    if isinstance(layer, SkewOrthogonalConv2D):
        scale = _skew_scale(layer)
        copy.output_scale = lambda terms: scale


def _two_models(model):
    """`(affine, affine64)` of a function that returns an error model in the present context."""
    own = model()
    with rounding.float64_evaluation():
        exact = model()
    # 0·∞, where a map vanishes and a size is unknown.
    return tuple(Affine(*(math.inf if v != v else v for v in dataclasses.astuple(a)))
                 for a in (own, exact))  # fmt: skip


def _gain(call, value, method, model):
    """`Gain` of a layer, its input cast to the compute dtype first."""
    tensor, dtype = call.inputs[0], call.operation.compute_dtype

    def with_input():
        affine = with_cast(model(), tensor, dtype, rounding.unit_roundoff(dtype))
        return dataclasses.replace(affine, gain=value)

    affine, affine64 = _two_models(with_input)
    return Gain("lipschitz", value, method, affine, affine64=affine64)


def _activation_model(layer, tensor, dtype):
    """Error model of a fused elementwise activation, computed in `dtype`."""
    gain = activation_gain(layer.activation, tensor, dtype, layer)
    if gain is None:
        return Affine()
    affine = gain.affine
    if activation_name(layer.activation) not in _WITHOUT_CONSTANT:
        extra = 2 * rounding.UNIT_ROUNDOFF["float32"]
        affine = dataclasses.replace(
            affine,
            slope=affine.slope + extra * max(affine.gain, 1.0),
            constant=affine.constant + extra * affine.offset,
        )
    return affine


def _monotone_sector(layer):
    sector = Sector.of(layer.activation)
    if sector.alpha < 0:
        raise UnsupportedLayerError(
            f"A {type(layer).__name__} needs an activation that does not decrease. Received: "
            f"layer {layer.name!r} with slopes from {sector.alpha:.4g}."
        )
    return sector


def _like(tensor, shape, dtype):
    return Tensor(tensor.producer, 0, (tensor.shape[0], *shape), dtype)


# Potential layers -------------------------------------------------------------------------------


def _potential_rule(call):
    """g·(x - W t φ(Wᵀx + b)): `theory.potential`, eq. (2), at the size of this call."""
    layer, tensor = call.operation, call.inputs[0]
    values, dtype = finite_values(layer), layer.compute_dtype
    kernel, scale = values["kernel"], values["scale"]
    beta = _monotone_sector(layer).beta
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
    hidden = _like(tensor, (*tensor.shape[1:-1], width), dtype)

    def model():
        path = map_affine(norms[0], first, bias_norm(layer, hidden, dtype), taps * inputs, dtype)
        path = path.then(_activation_model(layer, hidden, dtype))
        path = path.then(map_affine(norms[1], last, 0.0, taps * width + 1, dtype))
        e = rounding.gamma(4, rounding.unit_roundoff(dtype))
        slope = path.slope * (1 + e) + e * (1 + path.gain)
        constant = path.constant * (1 + e) + e * path.offset
        return Affine(value, g * path.offset, g * slope, g * constant)

    return _gain(call, value, "max(1, β‖W√t‖² - 1) from kernel and step", model)


# Sandwich layers --------------------------------------------------------------------------------


def _sandwich_gain(layer):
    """`gain_upper_bound` is linear in the largest slope, which it takes to be 1."""
    return rounding.product_up(layer.gain_upper_bound(), _monotone_sector(layer).beta)


def _sandwich_rule(call):
    layer, tensor, dtype = call.operation, call.inputs[0], call.operation.compute_dtype
    values = finite_values(layer)
    maps = [(values[name], LinearMap("dense", values[name].shape[:1]))
            for name in ("inner", "outer")]  # fmt: skip
    norms = [norm_upper_bound(*m).value for m in maps]
    absolutes = [absolute_norm_upper_bound(*m) for m in maps]
    inputs, width = values["inner"].shape
    hidden = _like(tensor, (*tensor.shape[1:-1], width), dtype)

    def model():
        bias = bias_norm(layer, hidden, dtype)
        path = map_affine(norms[0], absolutes[0], bias, inputs, dtype)
        path = path.then(_activation_model(layer, hidden, dtype))
        return path.then(map_affine(norms[1], absolutes[1], 0.0, width, dtype))

    return _gain(call, _sandwich_gain(layer), "(β/2)‖[θ⁻¹Pᵀ, θQ]‖² of both maps", model)


def _sandwich_convolution_rule(call):
    layer, tensor, dtype = call.operation, call.inputs[0], call.operation.compute_dtype
    values, work = finite_values(layer), layer.work_dtype
    sizes = space_to_depth_shape(tensor.shape[1:], layer.strides)[:2]
    width = layer.filters
    norms = [_stack_norm_upper_bound(values[name]) for name in ("inner", "outer")]
    hidden = _like(tensor, (*sizes, width), work)

    def model():
        # The bias has been cast to the compute dtype, and is added in the other one.
        bias = bias_norm(layer, hidden, dtype)
        path = _fourier_affine(norms[0], values["inner"], sizes, work)
        path = path.then(_translation(bias, work))
        path = path.then(_activation_model(layer, hidden, work))
        path = path.then(_fourier_affine(norms[1], values["outer"], sizes, work))
        return path.then(Affine(1.0, 0.0, rounding.unit_roundoff(dtype), 0.0))

    method = "(β/2)‖[θ⁻¹Pᵀ, θQ]‖² of both maps, largest over frequencies"
    return _gain(call, _sandwich_gain(layer), method, model)


# Cayley convolutions ----------------------------------------------------------------------------


def _stack_norm_upper_bound(blocks):
    """Largest norm in a stack of matrices (…, n, m), real or complex, from their Gram matrices."""
    if blocks.shape[-2] < blocks.shape[-1]:
        blocks = np.swapaxes(blocks, -1, -2)
    adjoint = np.conj(np.swapaxes(blocks, -1, -2))
    gram = adjoint @ blocks
    n, side = blocks.shape[-2:]
    top = np.maximum(np.linalg.eigvalsh(gram)[..., -1], 0.0)
    trace = np.trace(gram, axis1=-2, axis2=-1).real
    # Forming the Gram matrix (four real products a term), then LAPACK.
    error = 1.01 * _UNIT * ((4 * n + 8) * trace + 8 * side * top)
    return float(np.max(np.sqrt(top + error))) * (1 + 4 * _UNIT)


def _fourier_affine(gain, blocks, sizes, dtype):
    """Error model of `spectral.orthogonal.block_fourier` with these real blocks (F, 2a, 2b).

    Five unitary or block stages, each with the error γ·‖|M|‖ ≤ γ·max|M_ij|·√entries; entries of
    the bases are computed to 16 roundoffs of their largest.
    """
    (high, wide), unit = sizes, rounding.unit_roundoff(dtype)
    operands = rounding.operand_roundoff() if dtype == "float32" else 0.0
    products = 2 * operands + operands**2

    def stage(terms, size):
        e = rounding.gamma(terms + 28, unit)
        return (e * (1 + products) + products) * size

    rows = stage(wide + 2, math.sqrt(2 * (wide + 2)))
    columns = stage(2 * high, 2 * math.sqrt(high))
    frobenius = float(np.max(np.linalg.norm(blocks, axis=(-2, -1)))) * (1 + blocks.size * _UNIT)
    middle = stage(blocks.shape[-2], frobenius)
    around = math.expm1(2 * math.log1p(rows) + 2 * math.log1p(columns))
    return Affine(gain, 0.0, (around * (gain + middle) + middle) * (1 + 1e-12), 0.0)


def _translation(bias, dtype):
    error = rounding.gamma(2, rounding.unit_roundoff(dtype))
    return Affine(1.0, bias, error, rounding.product_up(error, bias))


def _biased(layer, path, output):
    """Error model of φ(y + b) in the compute dtype after `path`, and φ's gain."""
    dtype = layer.compute_dtype
    path = path.then(_translation(bias_norm(layer, output, dtype), dtype))
    activation = fused_gain(layer, dataclasses.replace(output, dtype=dtype))
    if activation is None:
        return path
    name = activation_name(layer.activation)
    own = type(layer.activation) in own_layers.RULES or name in _WITHOUT_CONSTANT
    return path.then(
        activation.affine
        if own
        else _activation_model(layer, dataclasses.replace(output, dtype=dtype), dtype)
    )


def _fused_value(layer, output, value):
    activation = fused_gain(layer, dataclasses.replace(output, dtype=layer.compute_dtype))
    return value if activation is None else rounding.product_up(value, activation.value)


def _cayley_rule(call):
    """‖T*·diag(Q)·T‖ ≤ max ‖Q(θ)‖, because the transform T keeps norms."""
    layer, tensor, output = call.operation, call.inputs[0], call.outputs[0]
    values, work = finite_values(layer), layer.work_dtype
    real, imag = values["real"], values["imag"]
    norm = _stack_norm_upper_bound(real + 1j * imag)
    # Real blocks [[R, J], [-J, R]] have twice the squared entries.
    blocks = np.concatenate(
        [np.concatenate([real, imag], -1), np.concatenate([-imag, real], -1)], -2
    )
    sizes = space_to_depth_shape(tensor.shape[1:], layer.strides)[:2]

    def model():
        path = _fourier_affine(norm, blocks, sizes, work)
        path = path.then(Affine(1.0, 0.0, rounding.unit_roundoff(layer.compute_dtype), 0.0))
        return _biased(layer, path, output)

    method = f"operator norm, largest of {len(real)} frequencies"
    return _gain(call, _fused_value(layer, output, norm), method, model)


# Skew orthogonal convolutions -------------------------------------------------------------------


def _skew_scale(layer):
    """The factor that a call at inference multiplies the series by."""
    scale = layer.output_scale(layer.inference_terms)
    return 1.0 if scale == 1.0 else rounded_down(scale, layer.compute_dtype)


def _skew_rule(call):
    """Σ_{k<n} Lᵏ/k!: max |s_n(iθ)| for a skew L, else Σ ‖L‖ᵏ/k!."""
    layer, dtype, output = call.operation, call.operation.compute_dtype, call.outputs[0]
    kernel = finite_values(layer)["kernel"]
    terms, scale = layer.inference_terms, _skew_scale(layer)
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
        return _biased(layer, Affine(value, 0.0, slope, 0.0), output)

    return _gain(call, _fused_value(layer, output, value), method, model)


RULES = {
    **dict.fromkeys(
        (
            potential.ConvexPotentialDense,
            potential.ConvexPotentialConv1D,
            potential.ConvexPotentialConv2D,
            sdp.SDPLipschitzDense,
            sdp.SDPLipschitzConv1D,
            sdp.SDPLipschitzConv2D,
        ),
        _potential_rule,
    ),
    SandwichDense: _sandwich_rule,
    SandwichConv2D: _sandwich_convolution_rule,
    CayleyConv2D: _cayley_rule,
    SkewOrthogonalConv2D: _skew_rule,
}
