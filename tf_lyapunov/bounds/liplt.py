"""LipLT: a Lipschitz bound from the norms of all products of neighbouring layers."""

import time

import numpy as np

from tf_lyapunov.bounds.chains import error_norm, norm_up, product_gain
from tf_lyapunov.bounds.multipliers import ChainBound, as_chain
from tf_lyapunov.program import rounding

UNIT = rounding.UNIT_ROUNDOFF["float64"]


def liplt(chain, sectors=None):
    """Bound on the gain of a dense chain by pairwise products of its layers.

    φ_l(t) = m_l t + r_l ψ_l(t) with m = (α+β)/2, r = (β-α)/2 and ψ_l of gain 1, so that the
    signals v_l = W_l x_{l-1} have gains

        k_l = ‖W_l m_{l-1}W_{l-1} … m_1W_1‖ + Σ_{j<l} ‖W_l m_{l-1}W_{l-1} … m_{j+1}W_{j+1}‖ r_j k_j.

    Sufficient; never above the product of norms. Cost: n²/2 products of matrices.

    Args:
        chain: `Chain`, or weights (outputs, inputs) from the input on.
        sectors: one `Sector` per hidden layer where weights are given.

    Returns:
        `ChainBound`, rounded up.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> round(liplt([np.eye(2), np.eye(2)], [Sector(0.0, 1.0)]).gain_upper_bound, 9)
    1.0

    Reference: Fazlyab et al., Certified robustness via dynamic margin maximization and improved
    Lipschitz regularization (2023), in sound form.
    """
    begin = time.monotonic()
    chain = as_chain(chain, sectors)
    gains = []
    exponents = [0]
    weights, errors = [], []
    # Powers of two keep long products inside the range of floats.
    for weight, spread in zip(chain.weights, chain.errors, strict=True):
        size = float(np.linalg.norm(weight))
        power = 0 if size == 0 else round(np.log2(size))
        weights.append(np.ldexp(weight, -power))
        errors.append(error_norm(np.ldexp(spread, -power), weight))
        exponents.append(exponents[-1] + power)
    for layer in range(chain.depth):
        product, error = weights[layer], errors[layer]
        terms = []
        for j in range(layer, -1, -1):
            # `product` is W_l m_{l-1} W_{l-1} … m_{j+1} W_{j+1}, counted from zero.
            norm = rounding.sum_up(norm_up(product), error)
            if j == 0:
                terms.append(norm)
                break
            sector = chain.sectors[j - 1]
            spread = float(rounding.up((sector.beta - sector.alpha) / 2))
            terms.append(rounding.product_up(norm, spread, gains[j - 1]))
            if sector.m == 0:
                break
            before = weights[j - 1]
            scaled = sector.m * product
            error = _product_error(product, before, error, errors[j - 1], sector.m)
            product = scaled @ before
        gains.append(rounding.sum_up(*terms))
    # gains[l] bounds v_l / 2^exponent, since every layer was divided by its own power.
    gain = min(rounding.ldexp_up(gains[-1], exponents[-1]), product_gain(chain))
    return ChainBound(gain, "liplt", seconds=time.monotonic() - begin)


def _product_error(product, before, error, error_before, m):
    """Bound on ‖fl(m·P̃·W̃) - m·P·W‖ with ‖P̃ - P‖ ≤ error and ‖W̃ - W‖ ≤ error_before."""
    size, size_before = float(np.linalg.norm(product)), float(np.linalg.norm(before))
    own = rounding.gamma(len(before) + 4, UNIT) * size * size_before
    carried = error * (size_before + error_before) + size * error_before
    return abs(m) * (own + carried) * (1 + 1e-9)
