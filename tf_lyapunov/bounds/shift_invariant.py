"""Indices of convolutions that keep their shape, with one multiplier for all units."""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.linear import absolute_norm_upper_bound
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import convolution_axes
from tf_lyapunov.theory.rounding import round_down

UNIT = rounding.UNIT_ROUNDOFF["float64"]
_GOLDEN = (math.sqrt(5) - 1) / 2
# Signals up to which the search itself uses the exact size.
_SMALL = 400


def identity_tap(kernel, linear_map):
    """Index of the kernel tap that copies the input, or None if the map changes its shape."""
    if linear_map.kind not in ("conv", "depthwise") or linear_map.padding != "same":
        return None
    known = dataclasses.replace(linear_map)
    rank = linear_map.rank(kernel.shape)
    if linear_map.input_shape is None:
        size = tuple((k - 1) * 8 + 1 for k in kernel.shape[:rank])
        channels = kernel.shape[-2] * (linear_map.groups if linear_map.kind == "conv" else 1)
        known = dataclasses.replace(linear_map, input_shape=(*size, channels))
    if known.output_shape(kernel.shape) != known.input_shape:
        return None
    taps = []
    for axis in convolution_axes(kernel.shape, known):
        if axis.stride != 1 or axis.left % axis.dilation:
            return None
        taps.append(axis.left // axis.dilation)
    return tuple(taps)


def scalar_indices(kernel, linear_map, sector, delta, tap):
    """Largest ν for Λ = λI: concave in λ, each value one norm of a convolution, rounded up.

    Args:
        kernel: float64, in Keras' layout.
        linear_map: `LinearMap` that keeps its shape.
        sector: `Sector` with alpha < beta.
        delta: δ.
        tap: from `identity_tap`.

    Returns:
        `(ν, λ)`, proved, or None.
    """
    size = norm_upper_bound(kernel, linear_map).value * sector.magnitude
    if size == 0 or math.isinf(size):
        return None
    floor = max(delta, 0.0)
    # Steering only: at real sizes by the bound for all sizes, which is cheaper.
    known = linear_map.input_shape
    is_small = known is not None and math.prod(known) <= _SMALL
    coarse = linear_map if is_small else dataclasses.replace(linear_map, input_shape=None)

    def multiplier(log_excess):
        return floor + math.exp(log_excess) / size

    def nu(log_excess, geometry=coarse):
        lam = multiplier(log_excess)
        return _nu_of_scalar(kernel, geometry, sector, delta, lam, size, tap)

    reach = math.log(1e4 * (1 + floor * size))
    best = concave_argmax(nu, math.log(1e-4 * (1 + floor * size)), reach, 18)
    value = nu(best, linear_map)
    return None if value == -math.inf else (value, multiplier(best))


def concave_argmax(value, low, high, steps):
    """Where a concave function of one number is largest, by golden section.

    Example:

    >>> round(concave_argmax(lambda x: -(x - 2) ** 2, 0.0, 5.0, 40), 6)
    2.0
    """
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = value(left), value(right)
    for _ in range(steps):
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = value(right)
    return (low + high) / 2


def _nu_of_scalar(kernel, linear_map, sector, delta, lam, sigma, tap):
    """Proven ν for Λ = λI, rounded down; -inf if this λ proves nothing.

    With a = pλ - m²λ²/(λ-δ), b = mλ/(2(λ-δ)) and any c, d, the condition
    aTᵀT + b(T + Tᵀ) - (ν + 1/(4(λ-δ)))I ⪰ 0 follows from

        ν ≤ d² - 1/(4(λ-δ)) - ‖cT - dI‖² - max(0, -(a + c²))σ² - 2|b - cd|σ.
    """
    if not math.isfinite(lam):
        return -math.inf
    lam_exact, delta_exact = Fraction(lam), Fraction(delta)
    excess = lam_exact - delta_exact
    alpha, beta = Fraction(sector.alpha), Fraction(sector.beta)
    m, p = (alpha + beta) / 2, alpha * beta
    if excess <= 0 or lam < 0:
        return -math.inf
    a, b = p * lam_exact - m**2 * lam_exact**2 / excess, m * lam_exact / (2 * excess)
    if a >= 0:
        return -math.inf
    try:
        c = math.sqrt(float(-a))
        d = float(b) / c
    except (OverflowError, ZeroDivisionError):
        return -math.inf
    shifted = c * kernel
    if linear_map.kind == "conv":
        index = np.arange(kernel.shape[-1])
        shifted[(*tap, index % kernel.shape[-2], index)] -= d
    else:
        shifted[(*tap, slice(None), 0)] -= d
    if not np.all(np.isfinite(shifted)):
        return -math.inf
    norm = norm_upper_bound(shifted, linear_map).value
    rounded = 3 * UNIT * (c * absolute_norm_upper_bound(kernel, linear_map) + abs(d))
    norm = rounding.sum_up(norm, rounded * (1 + 1e-6))
    if not math.isfinite(norm):
        return -math.inf
    norm = Fraction(norm)
    sigma = Fraction(sigma) * Fraction(1 + 2.0**-40) / Fraction(sector.magnitude or 1.0)
    c, d = Fraction(c), Fraction(d)
    drift = max(Fraction(0), -(a + c * c)) * sigma**2 + 2 * abs(b - c * d) * sigma
    return round_down(d * d - 1 / (4 * excess) - norm**2 - drift)
