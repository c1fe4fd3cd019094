"""Gains of this library's layers without a kernel: sorting, pooling, residuals, normalization."""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from tf_lyapunov.layers import activations, resizing
from tf_lyapunov.layers.centering import BatchCentering
from tf_lyapunov.layers.pooling import (
    GlobalL2NormPooling2D,
    L2NormPooling2D,
    LpPooling2D,
    ScaledAveragePooling2D,
    ScaledGlobalAveragePooling2D,
    window_sum_bound,
)
from tf_lyapunov.layers.residual import ConvexCombination
from tf_lyapunov.layers.response import LocalResponseNormalization
from tf_lyapunov.program import pooling, rounding
from tf_lyapunov.program.activations import FUNCTION_ULPS, elementwise_gain
from tf_lyapunov.program.gain import Affine, Gain, with_cast
from tf_lyapunov.program.linear import inference_value
from tf_lyapunov.theory.rounding import round_up
from tf_lyapunov.theory.sectors import Sector

# A handful of correctly rounded float64 operations.
_SLACK = 1 + 16 * rounding.UNIT_ROUNDOFF["float64"]


def _weights(layer, variable, dtype):
    value = inference_value(variable, dtype)
    if not np.all(np.isfinite(value)):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}."
        )
    return value


def _gain(call, kind, value, method, error, offset=0.0, constant=0.0):
    """`Gain` of a layer whose computed output errs by `error`·gain·‖u‖ + `constant`."""
    tensor, dtype = call.inputs[0], call.operation.compute_dtype
    affine = Affine(value, offset, rounding.product_up(error, value), constant)
    affine = with_cast(affine, tensor, dtype, rounding.unit_roundoff(dtype))
    return Gain(kind, value, method, affine)


def _widened(dtype, operations):
    """Relative error of some operations in float32 or better, rounded to `dtype` at the end."""
    work = rounding.unit_roundoff("float32" if dtype in ("float16", "bfloat16") else dtype)
    error, last = rounding.gamma(operations, work), rounding.unit_roundoff(dtype)
    return error if last == work else error + last * (1 + error)


# Activations and rearrangements -----------------------------------------------------------------


def _sorting_rule(call):
    return _gain(call, "activation", 1.0, "permutes entries", 0.0)


def _householder_rule(call):
    layer = call.operation
    _weights(layer, layer.angle, layer.angle.dtype)
    # |v| = 1 exactly; the sine and cosine of the angle are library functions. With e the error of
    # either, y errs by 2(2√2e + …)·‖z‖ from v and by fewer than ten further roundings.
    error = rounding.gamma(8 * FUNCTION_ULPS, rounding.unit_roundoff(layer.compute_dtype))
    return _gain(call, "activation", 1.0, "identity or reflection of each pair", error)


def _prelu_rule(call):
    layer = call.operation
    slopes = np.clip(_weights(layer, layer.slope, layer.compute_dtype), -1.0, 1.0)
    sector = Sector(float(np.min(slopes, initial=1.0)), 1.0)
    return elementwise_gain(
        "lipschitz_prelu", sector, call.inputs[0], layer.compute_dtype, value_at_zero=0.0
    )


def _two_sided_rule(call):
    return _gain(call, "activation", 1.0, "positive and negative parts, an isometry of norms", 0.0)


def _moving_rule(call):
    return _gain(call, "reshape", 1.0, "moves, drops or pads entries by zeros", 0.0)


# Pooling ----------------------------------------------------------------------------------------


def lp_pooling_gain(p, pool_size, strides, padding, sizes):
    """Gain of p-norm pooling from l2 to l2.

        p ≥ 2:      √m
        1 ≤ p < 2:  σ^(2/p - 1)·√m^(2 - 2/p)                                              (1)

    with m the largest number of windows that share a cell and σ the norm of the sum over windows.
    The reverse triangle inequality reduces it to Σ_w ‖v_w‖_p² ≤ gain²·‖v‖²; for p ≥ 2 use
    ‖v_w‖_p ≤ ‖v_w‖_2, else ‖v_w‖_p ≤ ‖v_w‖_1^(2/p-1)·‖v_w‖_2^(2-2/p) and Hölder's inequality.
    Attained for p ≥ 2 (one cell), for p = 1 (all entries positive), and without overlap.

    Args:
        p: float of at least 1.
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`, by zeros.
        sizes: spatial sizes, None where unknown.

    Returns:
        float, rounded up.

    Example:

    >>> lp_pooling_gain(2.0, (2, 2), (2, 2), "valid", (8, 8))
    1.0
    >>> round(lp_pooling_gain(1.0, (2, 2), (2, 2), "valid", (8, 8)), 9)
    2.0

    Reference: sound form of Peck et al. (2017), who use κ/(t·q^(2/p)).
    """
    overlap = pooling.max_pooling_gain(pool_size, strides, padding, sizes)
    if p >= 2:
        return overlap
    total = pooling.window_sum_gain(pool_size, strides, padding, sizes)
    if p == 1:
        return total
    return total ** (2 / p - 1) * overlap ** (2 - 2 / p) * _SLACK


def _lp_error(p, cells, dtype):
    """Relative error of a p-norm of `cells` entries, scaled by the largest."""
    if p == math.inf:
        return _widened(dtype, 0)
    if p == 1:
        return _widened(dtype, cells)
    if p == 2:
        return _widened(dtype, cells + FUNCTION_ULPS)
    # t^p of t ≤ 1 errs by FUNCTION_ULPS + p units relative to a sum ≥ 1, whose root divides by p.
    return _widened(dtype, (FUNCTION_ULPS + 2) * cells + 2 * FUNCTION_ULPS)


def _lp_pooling_rule(call):
    layer = call.operation
    geometry = _geometry(call)
    value = lp_pooling_gain(layer.p, *geometry)
    error = _lp_error(layer.p, math.prod(layer.pool_size), layer.compute_dtype)
    return _gain(call, "pooling", value, f"{layer.p:g}-norm of windows, overlap counted", error)


def _norm_pooling_rule(call):
    layer = call.operation
    largest = math.prod(-(-q // s) for q, s in zip(layer.pool_size, layer.strides, strict=True))
    # The scale is the overlap on large images: never below that on this one.
    value = pooling.max_pooling_gain(*_geometry(call)) / math.sqrt(largest) * _SLACK
    error = _lp_error(2, math.prod(layer.pool_size) + 2, layer.compute_dtype)
    return _gain(call, "pooling", min(value, 1.0), "2-norm of windows over √overlap", error)


def _scaled_average_rule(call):
    layer = call.operation
    scale = window_sum_bound(layer.pool_size, layer.strides)
    value = pooling.window_sum_gain(*_geometry(call)) / scale * _SLACK
    # The scale is the norm for every size: never above 1.
    error = _widened(layer.compute_dtype, math.prod(layer.pool_size) + 4)
    return _gain(call, "pooling", min(value, 1.0), "sum over windows over its norm", error)


def _global_rule(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    cells = math.inf if None in sizes else math.prod(sizes)
    is_norm = type(layer) is GlobalL2NormPooling2D
    error = _widened(layer.compute_dtype, cells + FUNCTION_ULPS)
    method = "2-norm over all positions" if is_norm else "sum over N positions, 1/√N"
    return _gain(call, "pooling", 1.0, method, error)


def _geometry(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    return layer.pool_size, layer.strides, layer.padding, sizes


# Normalization ----------------------------------------------------------------------------------


def response_gain(depth_radius, bias, beta, channels):
    """Gain of local response normalization, for every input and every alpha.

    With D_c = k + αS_c, τ_c = αS_c/D_c and S_c the energy of the window of c, the Jacobian is
    J = diag(D^-β) - M, M_cj = 2αβ·D_c^(-β-1)·x_c x_j on windows. By Schur's test with weights |x|,

        Σ_j |J_cj||x_j| ≤ R·|x_c|,   R = k^-β·max_τ (1-τ)^β·(1 + 2βτ)
        Σ_c |J_cj||x_c| ≤ C·|x_j|,   C = 2k^-β·max_τ [½((1-τ)/(1+τ))^β + 2βτ(1-τ)^β]

    so that ‖J‖ ≤ √(R·C), whatever the width of the window: all channels in the same half of a
    window lie in each other's windows, hence each half adds at most αS/(k+αS)^(β+1) to a column.
    Where every window holds all channels, J has the eigenvalues D^-β·{1, 1-2βτ} and the gain is
    k^-β, as it is for windows of one channel. Never above k^-β·(1 + 2β·g·√w) with
    g = (β/(1+β))^(β+1)/β, the plain bound by ‖diag‖ + ‖M‖.

    Args:
        depth_radius: integer r ≥ 0; w = 2r + 1.
        bias: positive float k.
        beta: positive float.
        channels: number of channels.

    Returns:
        float, rounded up; k^-β ≤ gain ≤ 1.4·k^-β.

    Example:

    >>> response_gain(0, 1.0, 0.5, 8), round(response_gain(2, 1.0, 0.75, 32), 3)
    (1.0, 1.223)

    Reference: sound form of Peck et al. (2017), section 4.6, who take max λ.
    """
    scale = 1.0 if bias == 1.0 else bias**-beta * _SLACK
    if depth_radius == 0 or depth_radius >= channels - 1:
        return scale
    rows = ((2 * beta + 1) / (2 * beta + 2)) ** beta * (2 * beta + 1) / (beta + 1)
    ends = np.linspace(0.0, 1.0, 2**14 + 1)
    low, high = ends[:-1], ends[1:]
    # Each factor at the end of the interval where it is larger.
    columns = 0.5 * ((1 - low) / (1 + low)) ** beta + 2 * beta * high * (1 - low) ** beta
    sharp = math.sqrt(rows * 2 * columns.max())
    peak = (beta / (1 + beta)) ** (beta + 1) / beta
    plain = 1 + 2 * beta * peak * math.sqrt(min(2 * depth_radius + 1, channels))
    # A few rounded powers in float64.
    return min(sharp, plain) * scale * (1 + 1e-13)


def _response_rule(call):
    layer = call.operation
    channels = call.inputs[0].shape[layer.axis]
    if channels is None:
        raise ValueError(f"Layer {layer.name!r} needs a known number of channels.")
    value = response_gain(layer.depth_radius, layer.bias, layer.beta, channels)
    dtype, width = layer.compute_dtype, min(2 * layer.depth_radius + 1, channels)
    work = rounding.unit_roundoff("float32" if dtype in ("float16", "bfloat16") else dtype)
    # D errs by γ_(w+4); its power by β times that, and by the library's power, whose argument of
    # exp is as large as β·log D where no square root serves.
    inner = rounding.gamma(width + 8, work)
    exponent = math.log(2) * (1024 if work == rounding.UNIT_ROUNDOFF["float64"] else 128)
    ulps = FUNCTION_ULPS + (0 if layer.beta in (0.5, 0.75, 1.0) else 4 * layer.beta * exponent)
    error = math.inf
    if inner < 1 and ulps * work < 1:
        error = math.expm1(-layer.beta * math.log1p(-inner)) * 2 + rounding.gamma(ulps + 2, work)
    last = rounding.unit_roundoff(dtype)
    error += 0.0 if last == work else last * (1 + error)
    base, lost = layer.bias**-layer.beta * _SLACK, 0.0
    if layer.alpha > 0:
        # Where the squares overflow, 0 is computed in place of at most (α·2¹²⁶)^-β·|x|.
        lost = min(base, (min(layer.alpha, 1.0) * 2.0**126) ** -layer.beta * _SLACK)
    gain = _gain(call, "scaling", value, "local response normalization, Schur's test", 0.0)
    slope = gain.affine.slope + error * base + lost
    return dataclasses.replace(gain, affine=dataclasses.replace(gain.affine, slope=slope))


def _centering_rule(call):
    layer, output = call.operation, call.outputs[0]
    dtype = layer.compute_dtype
    mean = _weights(layer, layer.moving_mean, dtype)
    bias = np.zeros_like(mean) if layer.bias is None else _weights(layer, layer.bias, dtype)
    norms = rounding.euclidean_norms_up(np.stack([bias - mean, np.abs(bias) + np.abs(mean)]))
    positions = math.inf if output.size is None else output.size // mean.size
    offset, size = (rounding.product_up(float(n), rounding.sqrt_up(positions)) for n in norms)
    error = rounding.gamma(4, rounding.unit_roundoff(dtype))
    method = "subtracts stored means"
    return _gain(call, "scaling", 1.0, method, error, offset * _SLACK, error * size)


def _combination_rule(call):
    layer, dtype = call.operation, call.operation.compute_dtype
    share = float(np.clip(_weights(layer, layer.mixture, layer.mixture.dtype)[0], 0.0, 1.0))
    weights = (round_up(1 - Fraction(share)), share)
    unit = rounding.unit_roundoff(dtype)
    cast = sum(unit for t in call.inputs if t.dtype != dtype)
    error = rounding.gamma(6, unit) + cast
    method = f"t·L_f + (1 - t)·L_x, t = {share:.6g}"
    return Gain("merge", 1.0, method, Affine(1.0, 0.0, error), "sum", weights)


MERGING = (ConvexCombination,)
RULES = {
    **dict.fromkeys(
        (activations.MaxMin, activations.GroupSort, activations.FullSort), _sorting_rule
    ),
    activations.Householder: _householder_rule,
    activations.LipschitzPReLU: _prelu_rule,
    activations.TwoSidedReLU: _two_sided_rule,
    **dict.fromkeys(
        (
            resizing.InvertibleDownSampling,
            resizing.InvertibleUpSampling,
            resizing.ChannelPadding,
            resizing.Truncate,
        ),
        _moving_rule,
    ),
    LpPooling2D: _lp_pooling_rule,
    L2NormPooling2D: _norm_pooling_rule,
    ScaledAveragePooling2D: _scaled_average_rule,
    **dict.fromkeys((ScaledGlobalAveragePooling2D, GlobalL2NormPooling2D), _global_rule),
    LocalResponseNormalization: _response_rule,
    BatchCentering: _centering_rule,
    ConvexCombination: _combination_rule,
}
