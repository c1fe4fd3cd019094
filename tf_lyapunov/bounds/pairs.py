"""Gains of the differences f_i - f_j of a chain's outputs: all pairs share all layers but the last.

Multipliers of the hidden layers leave a matrix X = VᵀV with

    ‖V Δx‖ ≤ √ρ·‖Δx_0‖   for the signal x that the last layer reads:

this is (8.1) for the chain that ends in V, proved once. For a difference w of two rows of the last
layer, any z gives w = Vᵀz + r, hence

    |wΔx| ≤ (‖z‖√ρ + ‖r‖·k)·‖Δx_0‖,   k any bound on the gain to x,                         (P)

so that a pair costs one triangular solve. Times ‖z‖², the same multipliers prove it by themselves.
A search for a pair alone gets the first layer's square factor and these multipliers as given.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.bounds.budget import proof_flops
from tf_lyapunov.bounds.chains import (
    ScaledChain,
    error_norm,
    norm_up,
    normal_form,
    with_narrow_input,
)
from tf_lyapunov.bounds.eclipse import eclipse, next_form
from tf_lyapunov.bounds.lipsdp import lipsdp
from tf_lyapunov.bounds.multipliers import ChainBound, certified_squared_gain
from tf_lyapunov.bounds.programs import first_order
from tf_lyapunov.program import rounding
from tf_lyapunov.progress import steps

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# More outputs than this get no bound per pair.
LARGEST = 40
SHARED = "the multipliers of all logits"
_ALL = "√2 times the gain of all logits"
# Pairs named one by one in a sentence.
_NAMED = 24


@dataclasses.dataclass(frozen=True, eq=False)
class PairGains:
    """Gains of all differences of outputs.

    Attributes:
        gains: float64 (K, K), symmetric, zero on the diagonal; (1, 1) for a single output.
        bounds: dict (i, j), i > j -> `ChainBound`, where a proof of its own was found.
        methods: dict (i, j), i > j -> what bounded the pair, in words.
        cut_short: whether pairs were left without a search of their own as the time was up.
    """

    gains: np.ndarray
    bounds: dict
    methods: dict
    cut_short: bool = False


def named_pairs(methods):
    """Which pairs were bounded by what, in words.

    Args:
        methods: dict (i, j) -> name.

    Example:

    >>> named_pairs({(1, 0): "lipsdp", (2, 0): "liplt", (2, 1): "liplt"})
    'of 3, 1 by lipsdp (1-0), the other 2 by liplt'
    """
    groups = {}
    for pair, name in sorted(methods.items()):
        groups.setdefault(name, []).append(pair)
    if len(groups) == 1:
        (name,) = groups
        return f"each of {len(methods)} by {name}"
    order = sorted(groups, key=lambda name: len(groups[name]))
    parts = [f"{len(groups[n])} by {n} ({_named(groups[n])})" for n in order[:-1]]
    parts.append(f"the other {len(groups[order[-1]])} by {order[-1]}")
    return f"of {len(methods)}, {', '.join(parts)}"


def _named(pairs):
    text = ", ".join(f"{i}-{j}" for i, j in pairs[:_NAMED])
    return text if len(pairs) <= _NAMED else f"{text}, … {pairs[-1][0]}-{pairs[-1][1]}"


def pair_gains(chain, method, budget, solver, whole, products=None):
    """`PairGains` of a chain, or None where its pairs are not bounded apart.

    Args:
        chain: `Chain`.
        method: one of `choice.METHODS` that bounds chains; `"closed_form"` and cheaper ones search
            nothing for a pair alone.
        budget: `Budget` for all pairs together.
        solver: see `lipsdp`.
        whole: `ChainBound` of all outputs.
        products: `liplt.Products` of the chain, if they may be better than what `method` finds.
    """
    classes = chain.widths[-1]
    if classes > LARGEST or chain.depth < 2:
        return None
    if classes == 1:
        return PairGains(np.full((1, 1), whole.gain_upper_bound), {}, {})
    found = _Found(classes, whole.gain_upper_bound)
    if products is not None:
        gains = products.pair_gains()
        bounds = {pair: ChainBound(float(gains[pair]), "liplt") for pair in found.pairs}
        found.take(gains, bounds, "liplt")
    shared = SharedLayers.of(whole, budget) if whole.multipliers else None
    if shared is not None:
        found.take(*shared.pairs(chain), SHARED)
    search, done = {"lipsdp": _lipsdp, "eclipse": _eclipse}.get(method), True
    if search is not None:
        done = _searched(found, search, chain, budget, solver, whole)
    return PairGains(found.gains, found.bounds, found.methods, not done)


class _Found:
    """Best bound of every pair so far."""

    def __init__(self, classes, whole):
        cap = rounding.product_up(float(rounding.up(math.sqrt(2.0))), whole)
        self.gains = np.where(np.eye(classes, dtype=bool), 0.0, cap)
        self.pairs = list(zip(*map(np.ndarray.tolist, np.tril_indices(classes, -1)), strict=True))
        self.bounds, self.methods = {}, dict.fromkeys(self.pairs, _ALL)

    def take(self, gains, bounds, name):
        """Keeps what is smaller."""
        for i, j in self.pairs:
            if gains[i, j] < self.gains[i, j]:
                self.put((i, j), bounds[i, j], name)

    def put(self, pair, bound, name):
        i, j = pair
        if bound.gain_upper_bound < self.gains[i, j]:
            self.gains[i, j] = self.gains[j, i] = bound.gain_upper_bound
            self.bounds[pair], self.methods[pair] = bound, name


def _searched(found, search, chain, budget, solver, whole):
    """Searches pair by pair while the time lasts, the loosest first; whether it lasted."""
    order = sorted(found.pairs, key=lambda pair: -found.gains[pair])
    chain = with_narrow_input(chain)
    lasted, flops = 0.0, _SEARCHES[search](chain.nonlinear_widths)
    for pair in steps(order, "pairs of classes"):
        left = budget.left()
        if left <= lasted or not budget.fits(flops):
            return False
        row = np.zeros((1, chain.widths[-1]))
        row[0, pair[0]], row[0, pair[1]] = 1.0, -1.0
        bound = search(chain.with_output(row), left, solver, whole, found.bounds.get(pair))
        lasted = max(lasted, left - budget.left())
        found.put(pair, bound, bound.method)
    return True


def _lipsdp(part, seconds, solver, whole, fallback):
    return lipsdp(part, solver=solver, seconds=_limit(seconds), fallback=fallback)


def _eclipse(part, seconds, solver, whole, fallback):
    return eclipse(part, solver=solver, seconds=_limit(seconds), fallback=fallback, known=whole)


_SEARCHES = {
    _lipsdp: lambda widths: first_order.estimated_flops((*widths[:-1], 1)),
    # One program, of the last hidden layer, and the proof of all.
    _eclipse: lambda widths: (
        first_order.estimated_flops((widths[-2], widths[-2], 1)) + 2 * proof_flops(widths)
    ),
}


def _limit(seconds):
    return None if math.isinf(seconds) else seconds


@dataclasses.dataclass(frozen=True, eq=False)
class SharedLayers:
    """(P): what the hidden layers prove once for every row of the last one.

    Attributes:
        scaled: `ScaledChain` of the hidden layers followed by V.
        squared: ρ, proved.
        multipliers: that prove it.
        reach: k, in the units of `scaled`.
    """

    scaled: ScaledChain
    squared: float
    multipliers: tuple
    reach: float

    @classmethod
    def of(cls, whole, budget=None):
        """From a `ChainBound` with multipliers; None if nothing could be proved in time.

        Args:
            whole: `ChainBound` with `scaled` and `multipliers`.
            budget: `Budget` of the proof, or None.
        """
        scaled, depth = whole.scaled, len(whole.multipliers)
        size = rounding.ldexp_up(whole.gain_upper_bound, -scaled.exponent)
        size = size * size
        if not 0 < size < math.inf:
            return None
        if budget is not None and not budget.fits(2 * proof_flops(scaled.widths)):
            return None
        for growth in (0.0, 1e-9, 1e-6, 1e-4):
            lam = [(1 + growth) ** (depth - k) * v / size for k, v in enumerate(whole.multipliers)]
            x = np.eye(scaled.widths[0])
            try:
                for layer, own in enumerate(lam):
                    x = next_form(
                        x, scaled.weights[layer], own, scaled.alphas[layer], scaled.betas[layer]
                    )
                root = np.linalg.cholesky(x).T
            except np.linalg.LinAlgError:
                continue
            ended = dataclasses.replace(
                scaled, weights=(*scaled.weights[:-1], root), errors=(*scaled.errors[:-1], 0.0)
            )
            squared, kept = certified_squared_gain(ended, lam, budget)
            if math.isfinite(squared):
                return cls(ended, squared, kept, _reach(scaled))
        return None

    def pairs(self, chain):
        """`(gains (K, K), {(i, j): ChainBound})` of the differences of a chain's outputs.

        Args:
            chain: the `Chain` whose hidden layers these are.
        """
        from scipy.linalg import solve_triangular

        weights, _, _, errors = normal_form(chain)
        power = self.scaled.powers[-1]
        last = np.ldexp(weights[-1], -power)
        spread = np.ldexp(np.broadcast_to(errors[-1], last.shape), -power)
        left, right = np.tril_indices(len(last), -1)
        rows = last[left] - last[right]
        drift = (spread[left] + spread[right] + 2 * UNIT * np.abs(rows)) * (1 + 4 * UNIT)
        root = self.scaled.weights[-1]
        z = solve_triangular(root.T, rows.T, lower=True, check_finite=False).T
        rest = np.abs(rows - z @ root)
        rest += rounding.gamma(len(root) + 4, UNIT) * (np.abs(z) @ np.abs(root) + np.abs(rows))
        off = rounding.euclidean_norms_up(rest * (1 + 1e-9) + drift)
        size = rounding.euclidean_norms_up(z) * (1 + 4 * UNIT)
        gains, bounds = np.zeros((len(last), len(last))), {}
        for k, (i, j) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
            if not math.isfinite(float(size[k]) + float(off[k])):
                gains[i, j] = gains[j, i] = math.inf
                bounds[i, j] = ChainBound(math.inf, "closed form")
                continue
            through = rounding.product_up(size[k], rounding.sqrt_up(self.squared))
            total = rounding.sum_up(through, rounding.product_up(off[k], self.reach))
            gain = rounding.ldexp_up(total, self.scaled.exponent)
            gains[i, j] = gains[j, i] = gain
            ended = dataclasses.replace(
                self.scaled,
                weights=(*self.scaled.weights[:-1], rows[k : k + 1]),
                errors=(*self.scaled.errors[:-1], drift[k : k + 1]),
            )
            share = float(size[k]) ** 2 * (1 + 8 * UNIT)
            bounds[i, j] = ChainBound(
                gain, "closed form", multipliers=tuple(share * v for v in self.multipliers),
                scaled=ended,
            )  # fmt: skip
        return gains, bounds


def _reach(scaled):
    """Bound on the gain to the signal that the last layer reads."""
    layers = zip(scaled.weights[:-1], scaled.errors[:-1], scaled.betas, strict=True)
    gains = (
        rounding.product_up(rounding.sum_up(norm_up(w), error_norm(e, w)), b) for w, e, b in layers
    )
    return rounding.product_up(*gains)
