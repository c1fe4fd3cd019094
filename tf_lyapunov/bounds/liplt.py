"""LipLT: a Lipschitz bound from the norms of all products of neighbouring layers."""

import dataclasses
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
    bound = Products(as_chain(chain, sectors)).bound()
    return dataclasses.replace(bound, seconds=time.monotonic() - begin)


class Products:
    """Products of neighbouring layers of a chain, those that end at the outputs kept.

    Those that end at a hidden layer serve all differences of outputs alike, and those that end at
    the outputs hold the rows of all: W_l m … W_{j+1} of f_i - f_k is the difference of two rows.

    Args:
        chain: `Chain`.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> chain = as_chain([np.eye(2), np.diag([3.0, 4.0])], [Sector(0.0, 1.0)])
    >>> Products(chain).pair_gains().round(6).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """

    def __init__(self, chain):
        gains, self.exponent = [], 0
        self.weights, self.errors = [], []
        # Powers of two keep long products inside the range of floats.
        for weight, spread in zip(chain.weights, chain.errors, strict=True):
            size = float(rounding.euclidean_norms(weight.reshape(1, -1))[0])
            power = 0 if size == 0 else round(np.log2(size))
            self.weights.append(np.ldexp(weight, -power))
            self.errors.append(error_norm(np.ldexp(spread, -power), weight))
            self.exponent += power
        self.chain = chain
        for layer in range(chain.depth - 1):
            parts = self._ending_at(layer, gains)
            terms = (rounding.product_up(rounding.sum_up(norm_up(p), e), f) for p, e, f in parts)
            gains.append(rounding.sum_up(*terms))
        self.last = list(self._ending_at(chain.depth - 1, gains))

    def _ending_at(self, layer, gains):
        """Yields `(product, error, r_j·k_j)`, the product being W_l m_{l-1} … W_{j+1}."""
        product, error = self.weights[layer], self.errors[layer]
        for j in range(layer, -1, -1):
            if j == 0:
                yield product, error, 1.0
                return
            sector = self.chain.sectors[j - 1]
            spread = float(rounding.up((sector.beta - sector.alpha) / 2))
            yield product, error, rounding.product_up(spread, gains[j - 1])
            if sector.m == 0:
                return
            before = self.weights[j - 1]
            scaled = sector.m * product
            error = _product_error(product, before, error, self.errors[j - 1], sector.m)
            product = scaled @ before

    def bound(self):
        """`ChainBound` of all outputs together."""
        return ChainBound(min(self._gain(), product_gain(self.chain)), "liplt")

    def _gain(self):
        # Every layer was divided by its own power.
        terms = (rounding.product_up(rounding.sum_up(norm_up(p), e), f) for p, e, f in self.last)
        return rounding.ldexp_up(rounding.sum_up(*terms), self.exponent)

    def pair_gains(self):
        """Bounds for the differences of outputs, float64 (K, K)."""
        count = len(self.weights[-1])
        found = np.zeros((count, count))
        for i in range(count):
            for k in range(i):
                terms = []
                for product, error, factor in self.last:
                    # Two rows of an error of this norm differ by √2 times it at most.
                    row = product[i] - product[k]
                    size = float(rounding.euclidean_norms_up(row[None])[0]) * (1 + 4 * UNIT)
                    own = rounding.sum_up(size, rounding.product_up(1.5, error))
                    terms.append(rounding.product_up(own, factor))
                gain = rounding.ldexp_up(rounding.sum_up(*terms), self.exponent)
                found[i, k] = found[k, i] = gain
        return found


def _product_error(product, before, error, error_before, m):
    """Bound on ‖fl(m·P̃·W̃) - m·P·W‖ with ‖P̃ - P‖ ≤ error and ‖W̃ - W‖ ≤ error_before."""
    size, size_before = float(np.linalg.norm(product)), float(np.linalg.norm(before))
    own = rounding.gamma(len(before) + 4, UNIT) * size * size_before
    carried = error * (size_before + error_before) + size * error_before
    return abs(m) * (own + carried) * (1 + 1e-9)
