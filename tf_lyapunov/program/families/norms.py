"""Norms and scaled means over windows."""

import math

from tf_lyapunov.layers.pooling import (
    GlobalL2NormPooling2D,
    L2NormPooling2D,
    LpPooling2D,
    ScaledAveragePooling2D,
    ScaledGlobalAveragePooling2D,
    window_sum_bound,
)
from tf_lyapunov.program.families import pooling
from tf_lyapunov.program.gain import FUNCTION_ULPS, SLACK, layer_gain, widened


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
    return total ** (2 / p - 1) * overlap ** (2 - 2 / p) * SLACK


def _lp_error(p, cells, dtype):
    """Relative error of a p-norm of `cells` entries, scaled by the largest."""
    if p == math.inf:
        return widened(dtype, 0)
    if p == 1:
        return widened(dtype, cells)
    if p == 2:
        return widened(dtype, cells + FUNCTION_ULPS)
    # t^p of t ≤ 1 errs by FUNCTION_ULPS + p units relative to a sum ≥ 1, whose root divides by p.
    return widened(dtype, (FUNCTION_ULPS + 2) * cells + 2 * FUNCTION_ULPS)


def _lp_pooling_rule(call):
    layer = call.operation
    geometry = _geometry(call)
    value = lp_pooling_gain(layer.p, *geometry)
    error = _lp_error(layer.p, math.prod(layer.pool_size), layer.compute_dtype)
    method = f"{layer.p:g}-norm of windows, overlap counted"
    return layer_gain(call, "pooling", value, method, error)


def _norm_pooling_rule(call):
    layer = call.operation
    largest = math.prod(-(-q // s) for q, s in zip(layer.pool_size, layer.strides, strict=True))
    # The scale is the overlap on large images: never below that on this one.
    value = pooling.max_pooling_gain(*_geometry(call)) / math.sqrt(largest) * SLACK
    error = _lp_error(2, math.prod(layer.pool_size) + 2, layer.compute_dtype)
    return layer_gain(call, "pooling", min(value, 1.0), "2-norm of windows over √overlap", error)


def _scaled_average_rule(call):
    layer = call.operation
    scale = window_sum_bound(layer.pool_size, layer.strides)
    value = pooling.window_sum_gain(*_geometry(call)) / scale * SLACK
    # The scale is the norm for every size: never above 1.
    error = widened(layer.compute_dtype, math.prod(layer.pool_size) + 4)
    return layer_gain(call, "pooling", min(value, 1.0), "sum over windows over its norm", error)


def _global_rule(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    cells = math.inf if None in sizes else math.prod(sizes)
    is_norm = type(layer) is GlobalL2NormPooling2D
    error = widened(layer.compute_dtype, cells + FUNCTION_ULPS)
    method = "2-norm over all positions" if is_norm else "sum over N positions, 1/√N"
    return layer_gain(call, "pooling", 1.0, method, error)


def _geometry(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    return layer.pool_size, layer.strides, layer.padding, sizes


READERS = {}
RULES = {
    LpPooling2D: _lp_pooling_rule,
    L2NormPooling2D: _norm_pooling_rule,
    ScaledAveragePooling2D: _scaled_average_rule,
    ScaledGlobalAveragePooling2D: _global_rule,
    GlobalL2NormPooling2D: _global_rule,
}
