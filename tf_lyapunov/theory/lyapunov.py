"""Lyapunov spectral design (Rahnama, Nguyen, Raff, CVPR 2020), as published, with its errors named.

The paper chooses (δ_l, ν_l) per layer, holds σ(W_l) ≤ λ_l (Theorem 2) and checks the cascade
(Theorem 3). Theorem 3 is sound; Theorem 2 is the converse of what can be proved, so nothing here
is a guarantee about weights. `tf_lyapunov.theory.cascade` and `dissipativity` hold the sound forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.cascade import cascade_matrix
from tf_lyapunov.theory.rounding import sqrt_up
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.theory.spectra import (
    QuasiDominance,
    Semidefiniteness,
    is_positive_semidefinite,
    quasi_dominance,
)
from tf_lyapunov.theory.supply import SupplyWitness

# Relative excess over the exact equal-diagonal design: makes -A ⪰ 0 decidable in float64.
_RESERVE = 2.0**-40


def check_claim(claim, *, positive_delta: bool = True) -> Indices:
    """`claim` if it is `Indices` with δ > 0, or an error that says so."""
    if not isinstance(claim, Indices):
        raise TypeError(f"`claim` must be `Indices(delta, nu)`. Received: {claim!r}.")
    if positive_delta and claim.delta <= 0:
        raise ValueError(
            "`claim.delta` must be positive, or the claim bounds no output. "
            f"Received: delta={claim.delta}."
        )
    return claim


def check_depth(depth) -> int:
    """`depth` as a positive integer."""
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 1:
        raise ValueError(f"`depth` must be a positive integer. Received: depth={depth!r}.")
    return int(depth)


def budget(layer: Indices, *, square_root: bool = False) -> float:
    """Published bound λ_l = 1/δ_l² + 2|ν_l|/δ_l on the spectral norm of a layer.

    The paper claims σ(W_l) ≤ λ_l ⇒ IIFOFP(δ_l, ν_l). **Not sound**: its derivation shows the
    converse, and for √λ_l. See `theorem_2_counterexample`.

    Args:
        layer: (δ_l, ν_l) with δ_l > 0.
        square_root: return √λ_l, which the derivation gives; text and released code use λ_l.

    Returns:
        λ_l or √λ_l, float64.

    Raises:
        ValueError: if δ_l ≤ 0.

    Example:
        >>> round(budget(Indices(0.74, 0.33)), 2)
        2.72

    Reference: Rahnama et al., Theorem 2, as published.
    """
    if layer.delta <= 0:
        raise ValueError(
            f"`delta` of a layer must be positive in Theorem 2. Received: delta={layer.delta}."
        )
    value = 1 / layer.delta**2 + 2 * abs(layer.nu) / layer.delta
    return math.sqrt(value) if square_root else value


def theorem_2_counterexample(layer: Indices, width: int = 1) -> SupplyWitness:
    """A linear layer within the published budget that is not IIFOFP(δ_l, ν_l), for ν_l ≥ 0.

    W = -tI with t = min(1/2, λ_l): ω = -(t + δt² + ν)‖Δu‖² < 0.

    Args:
        layer: (δ_l, ν_l), δ_l > 0 and ν_l ≥ 0.
        width: inputs and outputs of the layer.

    Returns:
        `SupplyWitness` with negative supply.

    Raises:
        ValueError: if ν_l < 0, where a small enough W does satisfy the supply rate.

    Example:
        >>> theorem_2_counterexample(Indices(1.0, 0.25)).supply
        -1.0

    Reference: erratum to Rahnama et al., Theorem 2.
    """
    if layer.nu < 0:
        raise ValueError(f"`nu` must not be negative here. Received: nu={layer.nu}.")
    weight = -min(0.5, budget(layer)) * np.eye(width)
    dx = np.eye(width)[0]
    dy = weight @ dx
    supply = float(dx @ dy - layer.delta * dy @ dy - layer.nu * dx @ dx)
    return SupplyWitness(supply, dx, dy, weight)


@dataclass(frozen=True)
class Theorem3:
    """Verdicts on the cascade, given that every layer satisfies its supply rate.

    Attributes:
        matrix: A, shape (n+1, n+1).
        quasi_dominance: Theorem 3 as printed, on -A.
        semidefinite: the weaker and sharper test -A ⪰ 0.
        margin: smallest eigenvalue of -A.
        margin_error: bound on the rounding error of `margin`.
    """

    matrix: np.ndarray
    quasi_dominance: QuasiDominance
    semidefinite: Semidefiniteness
    margin: float
    margin_error: float


def theorem_3(claim: Indices, layers: Sequence[Indices]) -> Theorem3:
    """Test whether layers (δ_l, ν_l) prove the network's (δ, ν): -A quasi-dominant, or -A ⪰ 0.

    Both are sufficient; see `cascade.scaled_cascade` for the sharper test with weights.

    Args:
        claim: (δ, ν) of the network.
        layers: (δ_l, ν_l) of its layers.

    Returns:
        `Theorem3`.

    Example:
        >>> layers = [Indices(0.74, 0.33)] * 4 + [Indices(0.86, 0.29)]
        >>> theorem_3(Indices(0.85, 0.29), layers).margin < -0.5
        True

    Reference: Rahnama et al., Theorem 3; Aquino et al., Theorem 3. As published.
    """
    matrix = cascade_matrix(claim, layers)
    verdict = is_positive_semidefinite(-matrix, entry_error=2.0**-53, equilibrate=False)
    return Theorem3(
        matrix, quasi_dominance(-matrix), verdict, verdict.value, verdict.rounding_bound
    )


def remark_4_holds(claim: Indices, layers: Sequence[Indices]) -> bool:
    """Dominance with P = I: δ_l + ν_{l+1} > 1 inside, ν_1 - ν ≥ 1 and δ_n - δ ≥ 1 outside.

    The paper prints only the interior rows; for n = 1 the off-diagonal entries cancel and the
    outer rows need ν_1 ≥ ν, δ_1 ≥ δ.

    Example:
        >>> remark_4_holds(Indices(0.5, -1.0), [Indices(1.0, 0.2), Indices(1.6, 0.1)])
        True

    Reference: Rahnama et al., Remark 4, completed by the outer rows.
    """
    layers = list(layers)
    outer = 1 if len(layers) > 1 else 0
    return (
        Fraction(layers[0].nu) - Fraction(claim.nu) >= outer
        and Fraction(layers[-1].delta) - Fraction(claim.delta) >= outer
        and all(
            Fraction(before.delta) + Fraction(after.nu) > 1 for before, after in pairwise(layers)
        )
    )


def _closed_form(claim: Indices, depth: int, reserve: float) -> tuple[Indices, ...] | None:
    diagonal = math.cos(math.pi / (depth + 1)) * (1 + reserve) if depth > 1 else 0.0
    nu, layers = claim.nu + diagonal, []
    for _ in range(depth - 1):
        if nu <= 0:
            return None
        layers.append(Indices(1 / (4 * nu), nu))
        nu = diagonal - layers[-1].delta
    delta = claim.delta + diagonal
    if nu < 0 or (depth > 1 and nu == 0 and claim.nu > 0):
        return None
    # On the boundary δν = 1/4 of claims the last product is 1/4 up to rounding.
    if 1 < 4 * delta * nu <= 1 + 2.0**-36:
        nu = 1 / (4 * delta)
    if 4 * Fraction(delta) * Fraction(nu) > 1 + Fraction(2.0**-50):
        return None
    return (*layers, Indices(delta, nu))


def closed_form_indices(
    claim: Indices, depth: int, *, reserve: float = _RESERVE
) -> tuple[Indices, ...]:
    """Layer indices for which -A has the equal diagonal d = cos(π/(n+1)), where it becomes PSD.

    With δ_lν_l = 1/4, from the input on:  ν_1 = ν+d,  δ_l = 1/(4ν_l),  ν_{l+1} = d-δ_l,
    δ_n = δ+d. Feasible for 0 ≤ ν ≤ 1/(4δ) and any n. Passes the PSD test only: quasi-dominance
    fails by d-1.

    Args:
        claim: (δ, ν) of the network, δ > 0, ν ≥ 0.
        depth: number of layers n.
        reserve: relative excess of d, which makes the PSD test decidable in float64. It is
            dropped where it makes the claim infeasible.

    Returns:
        n `Indices`.

    Raises:
        DesignInfeasible: if ν < 0, or an index leaves its range; `.nearest` holds claims with the
            same δ for which the design exists.

    Example:
        >>> layers = closed_form_indices(Indices(0.89, 0.28), 3)
        >>> [round(layer.nu, 3) for layer in layers]
        [0.987, 0.454, 0.156]

    Reference: this library's design for Rahnama et al., Theorem 3.
    """
    claim, depth = check_claim(claim), check_depth(depth)
    if claim.nu >= 0:
        for margin in (reserve, 0.0):
            layers = _closed_form(claim, depth, margin)
            if layers is not None:
                return layers
    candidates = [Indices(claim.delta, 0.0), Indices(claim.delta, 0.125 / claim.delta)]
    nearest = tuple(c for c in candidates if _closed_form(c, depth, reserve) is not None)
    raise DesignInfeasible(
        "The closed-form design needs 0 <= nu <= 1/(4 delta), and every layer's index in range. "
        f"Received: delta={claim.delta}, nu={claim.nu}, depth={depth}. Nearest feasible claims: "
        f"{list(nearest)}. For nu < 0 use rule='sound'.",
        nearest,
    )


def _remark_4_tail(delta: float, depth: int) -> list[Indices]:
    """Layers 2…n with the largest ν_l, from the output back, and δ_1 as a dangling first entry."""
    tail = []
    delta = delta * (1 + _RESERVE) + 1
    for _ in range(depth - 1):
        tail.insert(0, Indices(delta, 1 / (4 * delta)))
        delta = 1 + _RESERVE - tail[0].nu
    return [Indices(delta, 0.0), *tail]


def remark_4_indices(claim: Indices, depth: int) -> tuple[Indices, ...]:
    """Layer indices that satisfy Remark 4 (P = I) together with its two unprinted outer rows.

    From the output back δ_n = δ+1, ν_l = 1/(4δ_l), δ_{l-1} = 1-ν_l (and a strict reserve), then
    ν_1 = ν+1, which must not exceed 1/(4δ_1). Feasible only for ν well below zero when n ≥ 2.

    Args:
        claim: (δ, ν) of the network, δ > 0.
        depth: number of layers n.

    Returns:
        n `Indices`.

    Raises:
        DesignInfeasible: if no indices exist; `.nearest` holds the claim with the same δ and the
            largest feasible ν.

    Example:
        >>> layers = remark_4_indices(Indices(0.4, -2.0), 3)
        >>> remark_4_holds(Indices(0.4, -2.0), layers)
        True

    Reference: Rahnama et al., Remark 4, completed by the outer rows.
    """
    claim, depth = check_claim(claim), check_depth(depth)
    if depth == 1:
        return (claim,)
    first, *tail = _remark_4_tail(claim.delta, depth)
    largest_nu = 1 / (4 * first.delta)
    nu = math.nextafter(claim.nu + 1, math.inf)
    if nu <= largest_nu:
        return (Indices(first.delta, nu), *tail)
    nearest = Indices(claim.delta, (largest_nu - 1) * (1 + 2.0**-20))
    raise DesignInfeasible(
        "Remark 4 needs delta_l + nu_{l+1} > 1, nu_1 - nu >= 1 and delta_n - delta >= 1 with "
        f"delta_l*nu_l <= 1/4. Received: delta={claim.delta}, nu={claim.nu}, depth={depth}. "
        f"Nearest feasible claim: {nearest}.",
        (nearest,),
    )


def corollary_2(claim: Indices, radius: float) -> float:
    """Bound √(1/δ² + 2|ν|/δ)·ε on ‖Δ_n‖ for ‖Δ_1‖ ≤ ε, if the network is IIFOFP(δ, ν).

    Sound as an implication, but never better than `claim.gain` · ε.

    Args:
        claim: (δ, ν) of the network, δ > 0.
        radius: ε ≥ 0, in units of the input.

    Returns:
        The bound in units of the output, float64.

    Example:
        >>> round(corollary_2(Indices(0.89, 0.28), 0.1), 3)
        0.138

    Reference: Rahnama et al., Corollary 2, as published (there squared, and with 2ν for ν ≥ 0).
    """
    claim, radius = check_claim(claim), finite_float("radius", radius)
    if radius < 0:
        raise ValueError(f"`radius` must not be negative. Received: radius={radius}.")
    return claim.gain_as_published * radius


def table_2_bound(claim: Indices, radius: float) -> float:
    """Bound √(c·ε), c = 1/δ² + 2|ν|/δ, as printed in the paper's Table 2. **Not a bound.**

    ε is an l2 norm there, so the right value is `corollary_2`, √c·ε, which is smaller for ε < 1
    and which the paper's own measurements exceed.

    Args:
        claim: (δ, ν) of the network, δ > 0.
        radius: ε ≥ 0.

    Returns:
        √(c·ε), float64.

    Example:
        >>> round(table_2_bound(Indices(0.89, 0.28), 0.1), 3)
        0.435

    Reference: Rahnama et al., Table 2, as published.
    """
    claim, radius = check_claim(claim), finite_float("radius", radius)
    if radius < 0:
        raise ValueError(f"`radius` must not be negative. Received: radius={radius}.")
    delta, nu = Fraction(claim.delta), Fraction(claim.nu)
    return sqrt_up((1 / delta**2 + 2 * abs(nu) / delta) * Fraction(radius))
