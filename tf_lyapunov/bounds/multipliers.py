"""From multipliers to a proven gain: the one place where a LipSDP-type bound becomes a guarantee.

For a chain with slopes in [α_l, β_l], m = (α+β)/2, p = αβ and diagonal Λ_l ≥ 0, the gain is at most
√ρ if the block tridiagonal matrix

    M_00 = ρI + p_1W_1ᵀΛ_1W_1,   M_ll = Λ_l + p_{l+1}W_{l+1}ᵀΛ_{l+1}W_{l+1},
    M_{n-1,n-1} = Λ_{n-1} - W_nᵀW_n,   M_{l,l-1} = -m_lΛ_lW_l                            (8.1)

is positive semidefinite. Any multipliers will do.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.bounds.budget import proof_flops
from tf_lyapunov.bounds.chains import Chain, ScaledChain, product_gain
from tf_lyapunov.bounds.programs.sdp import verified_block_semidefinite
from tf_lyapunov.program import rounding
from tf_lyapunov.verification.inequalities import Multipliers

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Largest growth per layer that is tried to move multipliers off the boundary.
_MOST_GROWTH = 2e-2
# Flops of one attempt above which fewer are made, in larger steps: they cost seconds each.
_DEAR, _COARSE = 1e11, 1e-6
# Relative difference of bounds below which a search has found what it fell back to.
_EQUAL = 1e-4


@dataclasses.dataclass(frozen=True)
class ChainBound:
    """A bound on the gain of a dense chain.

    Attributes:
        gain_upper_bound: float, proved; infinite if nothing was.
        method: `"lipsdp"`, `"lipsdp-layer"`, `"eclipse"`, `"closed form"`, `"liplt"`, `"product"`,
            `"residual"`.
        verdict: `"PROVED"`, or `"SOLVER_FAILED"`: the search failed and `gain_upper_bound` is the
            best proven fallback, named by `method`.
        multipliers: Λ_l of the scaled chain, one array per hidden layer; empty without any.
        scaled: the `ScaledChain` that they refer to, or None.
        solver: name, or `""`.
        seconds: wall time.
        least: value below which no multipliers of this kind prove a bound, as computed by the dual
            (8.2); 0 where it was not.
        cut_short: the time ran out before the search or the proof was done: more time may give a
            smaller bound.
    """

    gain_upper_bound: float
    method: str
    verdict: str = "PROVED"
    multipliers: tuple = dataclasses.field(default=(), repr=False)
    scaled: ScaledChain | None = dataclasses.field(default=None, repr=False)
    solver: str = ""
    seconds: float = 0.0
    least: float = 0.0
    cut_short: bool = False


def unscaled(bound):
    """`Multipliers` of the chain itself from a `ChainBound` that has some.

    With W_l = 2^{e_l}W'_l the form (8.1) of the scaled chain is that of the chain for
    Λ_l = 4^{e_{l+1} + … + e_n}·Λ'_l: a congruence by powers of two. Sectors are those in which
    each function and the layer after it may have changed sign together.
    """
    scaled = bound.scaled
    ahead = np.cumsum(scaled.powers[::-1])[::-1][1:]
    values = tuple(
        np.ldexp(lam, 2 * int(power)) for lam, power in zip(bound.multipliers, ahead, strict=True)
    )
    squared = float(rounding.up(bound.gain_upper_bound**2))
    return Multipliers(squared, values, tuple(zip(scaled.alphas, scaled.betas, strict=True)))


def as_chain(chain, sectors=None):
    """A `Chain` from a chain, or from weights (outputs, inputs) and sectors."""
    if isinstance(chain, Chain):
        return chain
    return Chain(tuple(chain), tuple(sectors or ()))


def blocks(scaled, multipliers, squared, *, with_errors=True):
    """Diagonal and lower blocks of (8.1), from the output to the input, with their errors.

    Args:
        scaled: `ScaledChain`.
        multipliers: one array per hidden layer.
        squared: ρ.
        with_errors: without it the errors are zeros, for steering.

    Returns:
        `(diagonal, lower, diagonal_errors, lower_errors)` for `verified_block_semidefinite`.
    """
    weights = scaled.weights
    hidden = len(weights) - 1
    diagonal, lower, errors, lower_errors = [], [], [], []
    for layer in range(hidden, -1, -1):
        after, spread = weights[layer], scaled.errors[layer]
        count, width = after.shape
        if layer == hidden:
            p, lam = -1.0, np.ones((count, 1))
        else:
            p, lam = scaled.alphas[layer] * scaled.betas[layer], multipliers[layer][:, None]
        own = multipliers[layer - 1] if layer else np.full(width, squared)
        block, error = np.zeros((width, width)), np.zeros((width, width))
        if p != 0:
            product = after.T @ (lam * after)
            block = p * (product + product.T) / 2
        if p != 0 and with_errors:
            size = np.abs(after)
            error = rounding.gamma(count + 8, UNIT) * (size.T @ (lam * size))
            if np.any(spread):
                cross = (lam * size).T @ np.broadcast_to(spread, after.shape)
                error = error + 1.01 * (cross + cross.T)
                error = error + np.transpose(spread * lam) @ np.broadcast_to(spread, after.shape)
            error = 1.01 * abs(p) * error
        block[np.diag_indices(width)] += own
        error[np.diag_indices(width)] += 4 * UNIT * (own + np.abs(np.diag(block)))
        diagonal.append(block)
        errors.append(error)
        if layer:
            m = (scaled.alphas[layer - 1] + scaled.betas[layer - 1]) / 2
            factor, before = m * multipliers[layer - 1][:, None], weights[layer - 1]
            lower.append(-(factor * before).T)
            drift = 1.01 * np.broadcast_to(scaled.errors[layer - 1], before.shape)
            lower_errors.append((np.abs(factor) * (6 * UNIT * np.abs(before) + drift)).T)
    return diagonal, lower, errors, lower_errors


def smallest_squared_gain(scaled, multipliers):
    """Smallest ρ for which (8.1) holds with these multipliers, as computed; inf if none does."""
    from scipy.linalg import solve_triangular

    diagonal, lower, _, _ = blocks(scaled, multipliers, 0.0, with_errors=False)
    reached = None
    for index, block in enumerate(diagonal):
        if reached is not None:
            block = block - reached
        if not np.all(np.isfinite(block)):
            return math.inf
        if index == len(lower):
            return max(float(np.linalg.eigvalsh(-block)[-1]), 0.0)
        try:
            factor = np.linalg.cholesky(block)
        except np.linalg.LinAlgError:
            return math.inf
        left = solve_triangular(factor, lower[index].T, lower=True, check_finite=False)
        reached = left.T @ left
    return math.inf


def certified_squared_gain(scaled, multipliers, budget=None):
    """Proven ρ near the smallest one for these multipliers, and the multipliers that prove it.

    The repair is Λ_l ← (1+s)^(n-l)Λ_l with the smallest s that works: if the Schur complements of
    (8.1) are nearly positive, growing the multipliers towards the input makes them so, at a
    relative cost of about n·s.

    Args:
        scaled: `ScaledChain`.
        multipliers: one array per hidden layer.
        budget: `Budget`; an attempt that does not fit it is not begun. None for no limit.

    Returns:
        `(squared, multipliers)`; `(inf, ())` if nothing could be proved.
    """
    depth, flops = len(scaled.weights), proof_flops(scaled.widths)
    if not all(np.all(np.isfinite(lam)) and np.all(lam >= 0) for lam in multipliers):
        return math.inf, ()
    # A zero multiplier would leave a zero on the diagonal; any positive one is as valid.
    floored = [np.maximum(lam, 1e-14 * max(float(lam.max()), 1e-290)) for lam in multipliers]
    # About the margin that a proof of this size needs; less than it is tried in vain.
    finest = 4 * UNIT * max(scaled.widths[:-1]) ** 2
    growth, excess, step = 0.0, 10 * finest, 10.0
    if flops > _DEAR:
        growth, excess, step = _COARSE, 10 * _COARSE, 100.0
    while growth <= _MOST_GROWTH:
        if budget is not None and not budget.fits(flops):
            break
        lam = [v * (1 + growth) ** (depth - 1 - k) for k, v in enumerate(floored)]
        squared = smallest_squared_gain(scaled, lam)
        if np.isfinite(squared):
            trial = squared * (1 + excess) + 1e-280
            if verified_block_semidefinite(*blocks(scaled, lam, trial)):
                return trial, tuple(lam)
        growth = step * growth or finest
        excess = 10 * growth
    return math.inf, ()


def proved(
    chain, scaled, multipliers, method, *, solver="", seconds=0.0, fallback=None, least=0.0,
    budget=None, cut_short=False,
):  # fmt: skip
    """`ChainBound` of these multipliers, or of a better or only proven fallback under its own name.

    Args:
        chain, scaled: `Chain` and its `ScaledChain`.
        multipliers: candidates, or None if the search failed.
        method: name.
        fallback: a proven `ChainBound`; the product of norms if None.
        solver, seconds, least, cut_short: see `ChainBound`.
        budget: `Budget` of the proof, or None.
    """
    if fallback is None:
        fallback = ChainBound(product_gain(chain), "product")
    squared, kept = math.inf, ()
    if multipliers is not None:
        squared, kept = certified_squared_gain(scaled, multipliers, budget)
    gain = scaled.gain(squared)
    late = cut_short
    if budget is not None and not math.isfinite(gain):
        late = late or not budget.fits(proof_flops(scaled.widths))
    if not math.isfinite(gain):
        verdict = "PROVED" if late else "SOLVER_FAILED"
        return dataclasses.replace(fallback, verdict=verdict, seconds=seconds, cut_short=late)
    if gain > fallback.gain_upper_bound:
        if gain <= fallback.gain_upper_bound * (1 + _EQUAL):  # equal up to the solver's accuracy
            fallback = dataclasses.replace(fallback, method=method, solver=solver)
        return dataclasses.replace(fallback, seconds=seconds, least=least, cut_short=late)
    return ChainBound(gain, method, "PROVED", kept, scaled, solver, seconds, least, late)
