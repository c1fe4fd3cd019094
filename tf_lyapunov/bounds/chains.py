"""Dense chains: f(x) = W_n φ_{n-1}(… φ_1(W_1 x + b_1) …) + b_n."""

import dataclasses
import functools
import math

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.activations import innermost
from tf_lyapunov.theory.norms import norm_upper_bound, power_iteration
from tf_lyapunov.theory.operators import LinearMap

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Sectors are widened by this share of their slope where the bounds need α < β and α + β > 0:
# a superset, hence sound, at a relative cost of the same size.
_WIDENING = 2.0**-16


@dataclasses.dataclass(frozen=True)
class Chain:
    """A dense network: linear maps with elementwise functions between them.

    Args:
        weights: W_l, float64 arrays (outputs, inputs), from the input on.
        sectors: slope sector of φ_l, one per hidden layer.
        biases: b_l, one vector per layer, or None where only gains are wanted.
        names: names of the layers, for messages.
        errors: per layer, an array (outputs, inputs) that bounds the distance of every entry of
            W_l to the one that is meant (folded batch normalizations round), or 0.0.
        slopes: callables `(low, high) -> (alpha, beta)` per hidden layer that bound the slopes of
            φ_l on intervals, elementwise; None where unknown.

    Raises:
        ValueError: if shapes do not fit, or entries are not finite.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> Chain([np.ones((2, 3)), np.ones((1, 2))], [Sector(0.0, 1.0)]).widths
    (3, 2, 1)
    """

    weights: tuple
    sectors: tuple
    biases: tuple | None = None
    names: tuple = ()
    errors: tuple = ()
    slopes: tuple = ()

    def __post_init__(self):
        weights = tuple(np.asarray(w, dtype=np.float64) for w in self.weights)
        sectors = tuple(self.sectors)
        if not weights or any(w.ndim != 2 or 0 in w.shape for w in weights):
            raise ValueError(
                "`weights` must hold matrices (outputs, inputs). "
                f"Received: shapes {[w.shape for w in weights]}."
            )
        if any(a.shape[0] != b.shape[1] for a, b in zip(weights[:-1], weights[1:], strict=True)):
            raise ValueError(
                "Every layer must read what the one before it writes. "
                f"Received: shapes (outputs, inputs) {[w.shape for w in weights]}."
            )
        if len(sectors) != len(weights) - 1:
            raise ValueError(
                f"`sectors` must hold one sector per hidden layer, {len(weights) - 1}. "
                f"Received: {len(sectors)}."
            )
        if not all(np.all(np.isfinite(w)) for w in weights):
            raise ValueError("`weights` must be finite. Received: NaN or infinity.")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "sectors", sectors)
        object.__setattr__(self, "errors", tuple(self.errors) or (0.0,) * len(weights))

    @property
    def depth(self):
        """Number of linear layers n."""
        return len(self.weights)

    @property
    def widths(self):
        """Signal sizes from the input to the output."""
        return (self.weights[0].shape[1], *(w.shape[0] for w in self.weights))

    @property
    def nonlinear_widths(self):
        """Those sizes without the signals that no function acts on: what bounds are made of."""
        kept = [
            width
            for width, sector in zip(self.widths[1:-1], self.sectors, strict=True)
            if sector.alpha != sector.beta
        ]
        return (self.widths[0], *kept, self.widths[-1])

    @property
    def hidden_units(self):
        """Number of hidden units, that is of multipliers."""
        return sum(self.widths[1:-1])

    def with_output(self, rows):
        """The chain followed by the linear map `rows` (outputs, last width), its rounding noted."""
        rows = np.asarray(rows, dtype=np.float64)
        last, size = rows @ self.weights[-1], np.abs(rows) @ np.abs(self.weights[-1])
        error = np.abs(rows) @ np.broadcast_to(self.errors[-1], self.weights[-1].shape)
        error = (error + rounding.gamma(rows.shape[1] + 2, UNIT) * size) * (1 + 1e-9)
        return dataclasses.replace(
            self,
            weights=(*self.weights[:-1], last),
            biases=None,
            errors=(*self.errors[:-1], error),
        )


@dataclasses.dataclass(frozen=True)
class ScaledChain:
    """A chain with the same gain up to 2^exponent, in a form fit for optimisation.

    Inputs wider than the first hidden layer are replaced by a square factor R with
    RRᵀ ⪰ W_1W_1ᵀ: W_1 = RT with ‖T‖ ≤ 1. Outputs wider than the last hidden layer likewise.
    Every W_l is divided by a power of two near its gain.

    Attributes:
        weights: tuple of arrays.
        alphas, betas: tuples of float, with 0 < β, |α| < β.
        exponent: int.
        errors: per layer, entrywise error bounds, arrays or 0.0.
        is_zero: some layer is constant, so that the gain is zero.
        powers: exponents of the layers, of which `exponent` is the sum.
    """

    weights: tuple
    alphas: tuple
    betas: tuple
    exponent: int
    errors: tuple
    is_zero: bool = False
    powers: tuple = ()

    @property
    def widths(self):
        return (self.weights[0].shape[1], *(w.shape[0] for w in self.weights))

    def gain(self, squared):
        """Gain of the original chain from a proven ρ ≥ (gain of this one)², rounded up."""
        if not math.isfinite(squared):
            return math.inf
        return rounding.ldexp_up(rounding.sqrt_up(squared), self.exponent)


def gram_factor(weight, entry_error):
    """Square R with RRᵀ ⪰ WWᵀ for every W within the entry error, W wide."""
    gram = weight @ weight.T
    gram = (gram + gram.T) / 2
    total = float(np.sum(weight * weight)) * (1 + 1e-9)
    side, terms = weight.shape
    # Forming G, the entries' own errors, and the factor's residual, in the Frobenius norm.
    own = error_norm(entry_error, weight)
    error = rounding.gamma(terms + 4, UNIT) * total + 2.01 * own * (math.sqrt(total) + own)
    shift = 2 * error + 8 * rounding.gamma(side + 8, UNIT) * total
    factor = np.linalg.cholesky(gram + shift * np.eye(side))
    residual = np.linalg.norm(factor @ factor.T - gram - shift * np.eye(side))
    residual += rounding.gamma(side + 8, UNIT) * (float(np.sum(factor**2)) + total + side * shift)
    if not residual * (1 + 1e-9) + error <= shift:
        raise np.linalg.LinAlgError("the factor's residual exceeds its shift")
    return factor


def with_narrow_input(chain):
    """A chain of at least the same gain whose input is no wider than its first hidden layer."""
    weight = chain.weights[0]
    if chain.depth < 2 or weight.shape[1] <= weight.shape[0]:
        return chain
    size = float(np.max(np.abs(weight)))
    power = round(math.log2(size)) if size > 0 else 0
    try:
        factor = gram_factor(np.ldexp(weight, -power), np.ldexp(chain.errors[0], -power))
    except np.linalg.LinAlgError:
        return chain
    return dataclasses.replace(
        chain,
        weights=(np.ldexp(factor, power), *chain.weights[1:]),
        errors=(0.0, *chain.errors[1:]),
        biases=None,
    )


def error_norm(error, weight):
    """Upper bound on the norm of an entrywise error of `weight`."""
    if np.ndim(error) == 0:
        return float(error) * math.sqrt(weight.size) * (1 + 1e-9)
    return float(np.linalg.norm(error)) * (1 + 1e-9)


def _merged(chain):
    """Weights, sectors and errors with linear layers multiplied into the next ones."""
    weights, errors, sectors = [chain.weights[0]], [chain.errors[0]], []
    for weight, error, sector in zip(
        chain.weights[1:], chain.errors[1:], chain.sectors, strict=True
    ):
        tiny = math.prod(map(_smallest_entry, (weight, weights[-1], sector.alpha))) < 2.0**-900
        if sector.alpha != sector.beta or tiny:  # a product might underflow
            weights.append(weight)
            errors.append(error)
            sectors.append(sector)
            continue
        slope, before = sector.alpha, weights[-1]
        size, spread = np.abs(weight), np.broadcast_to(error, weight.shape)
        spread_before = np.broadcast_to(errors[-1], before.shape)
        bound = rounding.gamma(weight.shape[1] + 4, UNIT) * (size @ np.abs(before))
        bound = bound + size @ spread_before + spread @ (np.abs(before) + spread_before)
        weights[-1] = slope * (weight @ before)
        errors[-1] = abs(slope) * bound * (1 + 1e-9)
    return weights, sectors, errors


def _smallest_entry(values):
    """Smallest magnitude but zero; 1 for zeros alone."""
    return float(np.min(np.abs(values), where=np.not_equal(values, 0), initial=1.0))


def normal_form(chain):
    """`(weights, alphas, betas, errors)`, lists, with linear layers merged and |α| < β."""
    weights, sectors, errors = _merged(chain)
    alphas, betas = [], []
    for index, sector in enumerate(sectors):
        alpha, beta = sector.alpha, sector.beta
        if -alpha > beta:  # φ and the next layer change sign together
            alpha, beta = -beta, -alpha
            weights[index + 1] = -weights[index + 1]
        if alpha <= -beta * (1 - _WIDENING):
            beta = -alpha * (1 + _WIDENING)
        alphas.append(min(alpha, beta * (1 - _WIDENING)))
        betas.append(beta)
    return weights, alphas, betas, errors


def scaled_chain(chain):
    """`ScaledChain` of a chain."""
    weights, alphas, betas, errors = normal_form(chain)
    if any(not np.any(w) and not np.any(e) for w, e in zip(weights, errors, strict=True)):
        return ScaledChain(tuple(weights), (), (), 0, tuple(errors), is_zero=True)
    powers = [0] * len(weights)
    for index, weight in enumerate(weights):
        # Steering only: any power of two is exact.
        beta = betas[index] if index < len(betas) else 1.0
        largest = float(np.max(np.abs(weight)))
        if largest == 0:
            continue
        norm = power_iteration(weight.T / largest, 5)[0] or 1.0
        power = round(math.log2(norm) + math.log2(largest) + math.log2(beta))
        weights[index] = np.ldexp(weight, -power)
        errors[index] = np.ldexp(errors[index], -power)
        powers[index] = power
    try:
        if len(weights) > 1 and weights[0].shape[1] > weights[0].shape[0]:
            weights[0], errors[0] = gram_factor(weights[0], errors[0]), 0.0
        if len(weights) > 1 and weights[-1].shape[0] > weights[-1].shape[1]:
            transposed = np.transpose(np.broadcast_to(errors[-1], weights[-1].shape))
            weights[-1], errors[-1] = gram_factor(weights[-1].T, transposed).T, 0.0
    except np.linalg.LinAlgError:
        pass  # larger matrices, the same bound
    return ScaledChain(
        tuple(weights), tuple(alphas), tuple(betas), sum(powers), tuple(errors), False,
        tuple(powers),
    )  # fmt: skip


def layer_norms(chain):
    """Upper bounds on ‖W_l‖, with the entry error."""
    norms = []
    for weight, error in zip(chain.weights, chain.errors, strict=True):
        norms.append(rounding.sum_up(norm_up(weight), error_norm(error, weight)))
    return norms


def norm_up(matrix):
    """Upper bound on the largest singular value of a matrix (outputs, inputs)."""
    return norm_upper_bound(np.transpose(matrix), LinearMap("dense", (matrix.shape[1],))).value


def product_gain(chain):
    """Product of the layers' norms and largest slopes, rounded up.

    Example:

    >>> from tf_lyapunov.theory.sectors import Sector
    >>> round(product_gain(Chain([np.eye(2), 3 * np.eye(2)], [Sector(0.0, 1.0)])), 9)
    3.0
    """
    slopes = [sector.magnitude for sector in chain.sectors]
    return rounding.product_up(*layer_norms(chain), *slopes)


def interval_slopes(node):
    """Slopes on an interval of piecewise linear functions with one kink at zero."""
    sector, method, layer = node.sector, node.method, innermost(node.layer)
    if getattr(layer, "max_value", None) is not None:
        return None  # a second kink
    if method.startswith("relu,") and (sector.alpha, sector.beta) == (0.0, 1.0):
        return _kinked(0.0, 1.0)
    if method.startswith("leaky_relu,") and sector.beta == 1.0:
        if type(layer).__name__ != "PReLU":
            return _kinked(sector.alpha, 1.0)
    return None


def _kinked(negative, positive):
    return functools.partial(_kinked_slopes, negative, positive)  # which can be pickled


def _kinked_slopes(negative, positive, low, high):
    alpha = np.where(low > 0, positive, min(negative, positive))
    beta = np.where(high < 0, negative, max(negative, positive))
    alpha = np.where(high < 0, negative, alpha)
    return alpha, np.where(low > 0, positive, beta)
