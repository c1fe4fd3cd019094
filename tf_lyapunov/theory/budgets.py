"""Budgets on the layers' linear maps that prove a network's claim: the sound rules, assembled.

Each function returns budgets together with everything a reader needs to check them again: layer
indices, cascade weights, and for cones the balls of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.cascade import (
    allowed_gain_product,
    cone_weights,
    gain_cascade,
    scaled_cascade,
)
from tf_lyapunov.theory.dissipativity import conic_ball, conic_rule_holds, gain_rule_holds
from tf_lyapunov.theory.lyapunov import check_claim
from tf_lyapunov.theory.rounding import round_up
from tf_lyapunov.theory.sectors import Indices, Sector

# Relative reserves tried, smallest first; the accepted one is doubled, so that measured gains a
# few roundings above the budgets still verify.
_RESERVES = tuple(2.0**-k for k in range(37, 3, -1))


@dataclass(frozen=True)
class Budgets:
    """Budgets and the material of their proof.

    Attributes:
        budgets: bounds on σ(W_l), one per layer.
        indices: (δ_l, ν_l) that the budgets imply.
        scaling: weights p_l of the scaled cascade.
        balls: `(center, radius)` per layer, ‖W_l - center·I‖ ≤ radius, or `None`.
    """

    budgets: tuple[float, ...]
    indices: tuple[Indices, ...]
    scaling: tuple[float, ...]
    balls: tuple[tuple[float, float], ...] | None = None


def check_sectors(sectors) -> tuple[Sector, ...]:
    """`sectors` as a non-empty tuple of `Sector`; names of activations are looked up."""
    if isinstance(sectors, (str, Sector)):
        raise TypeError(f"`sectors` must be a sequence, one per layer. Received: {sectors!r}.")
    found = tuple(Sector.of(sector) for sector in sectors)
    if not found:
        raise ValueError("`sectors` must hold at least one sector. Received: none.")
    for number, sector in enumerate(found, 1):
        if sector.magnitude == 0:
            raise ValueError(
                f"Sector {number} must not be [0, 0]: that layer is constant for every weight."
            )
    return found


def check_shares(weights, count: int) -> tuple[float, ...]:
    """`weights` as positive numbers, one per layer; equal if `None`."""
    if weights is None:
        return (1.0,) * count
    shares = tuple(finite_float("weights", weight) for weight in weights)
    if len(shares) != count or min(shares, default=0.0) <= 0:
        raise ValueError(
            f"`weights` must be {count} positive numbers, one per layer. Received: {shares}."
        )
    return shares


def stage_gain(sigma: float, sector: Sector, post_gain: float = 1.0) -> Fraction:
    """Exact gain of a stage: σ·max(|α|,|β|)·(gain of what follows)."""
    return Fraction(float(sigma)) * Fraction(sector.magnitude) * Fraction(float(post_gain))


def gain_budgets(
    claim: Indices, sectors: Sequence[Sector], weights: Sequence[float] | None = None
) -> Budgets:
    """Budgets with Π max(|α_l|,|β_l|)·σ_l as large as norms alone can prove: -a(δ, ν).

    r_l = w_l·(-a/Πw)^{1/n}, lowered by the smallest relative reserve (about 1e-8) with which the
    scaled cascade is verified in float64. Every split of the product is equally good for the
    proof.

    Args:
        claim: (δ, ν), δ > 0 and ν < 0.
        sectors: one per layer.
        weights: relative sizes of the stage gains r_l; equal by default.

    Returns:
        `Budgets`.

    Raises:
        DesignInfeasible: if ν ≥ 0; `.nearest` holds claims that were designed and verified.

    Example:
        >>> found = gain_budgets(Indices(0.4, -2.0), [Sector(0.1, 1.0)] * 2)
        >>> round(found.budgets[0] ** 2, 3)  # -a = 1.3117…
        1.312

    Reference: sound form, equations (2.1) and (2.3).
    """
    claim, sectors = check_claim(claim), check_sectors(sectors)
    shares = check_shares(weights, len(sectors))
    allowed = allowed_gain_product(claim)
    if allowed <= 0:
        nearest = nearest_gain_claims(claim, sectors)
        raise DesignInfeasible(
            "Norms alone prove no claim with nu >= 0: W = -t*I is within every norm bound. "
            f"Received: {claim}. Nearest feasible claims: {list(nearest)}. "
            "Square layers with increasing activations can use the conic rule.",
            nearest,
        )
    mean_log = sum(math.log(share) for share in shares) / len(shares)
    level = math.log(allowed) / len(sectors)
    found = None
    for reserve in _RESERVES:
        shrink = (level + math.log1p(-reserve) / len(sectors)) - mean_log
        budgets = tuple(
            math.exp(shrink + math.log(share)) / sector.magnitude
            for share, sector in zip(shares, sectors, strict=True)
        )
        # Rounding the gain up before choosing the indices makes rule (2.1) exact for the budget.
        gains = [round_up(stage_gain(b, s)) for b, s in zip(budgets, sectors, strict=True)]
        indices, verdict = gain_cascade(claim, gains)
        proved = verdict.holds and all(
            gain_rule_holds(*layer) for layer in zip(budgets, sectors, indices, strict=True)
        )
        if proved and found is not None:
            return Budgets(budgets, indices, verdict.weights)
        found = reserve if proved else None
    raise DesignInfeasible(
        f"The claim is too close to nu = 0 to be verified in float64. Received: {claim}, "
        f"{len(sectors)} layers.",
        nearest_gain_claims(Indices(claim.delta, 0.0), sectors),
    )


def nearest_gain_claims(claim: Indices, sectors: Sequence[Sector]) -> tuple[Indices, ...]:
    """Claims near one with ν ≥ 0 that `gain_budgets` can prove, each designed to make sure.

    The same δ with a slightly negative ν (small budgets), and the same gain b with a = -b/2.

    Example:
        >>> [c.nu < 0 for c in nearest_gain_claims(Indices(0.89, 0.28), [Sector.linear()])]
        [True, True]
    """
    candidates = [
        Indices(claim.delta, -(2.0**-6) / claim.delta),
        Indices.from_slopes(-claim.gain / 2, claim.gain),
    ]
    if claim.nu < 0:
        candidates = [claim, *candidates]
    return tuple(c for c in candidates if _designed(gain_budgets, c, sectors))


def _designed(rule, claim, sectors) -> bool:
    try:
        rule(claim, sectors)
    except DesignInfeasible:
        return False
    return True


def sector_half_angle(sector: Sector) -> float:
    """Half-angle arcsin((β-α)/(β+α)) of an increasing activation; π/2 or more if α ≤ 0.

    Example:
        >>> sector_half_angle(Sector.linear())
        0.0

    Reference: sound form, equation (2.2) with v = 0.
    """
    if sector.alpha <= 0:
        return math.pi / 2 if sector.alpha == 0 else math.pi
    product = math.sqrt(sector.alpha) * math.sqrt(sector.beta)
    return math.atan2(sector.beta - sector.alpha, 2 * product)


def conic_budgets(
    claim: Indices, sectors: Sequence[Sector], weights: Sequence[float] | None = None
) -> Budgets:
    """Balls of square weights that prove a claim with ν ≥ 0.

    A cone with positive slopes has half-angle θ = arcsin((b-a)/(b+a)) and slope √(ab). In a
    cascade half-angles add and slopes multiply, so layer l gets θ_l = arcsin((β-α)/(β+α)) + its
    share of what the claim's angle leaves, and slope (ν/δ)^{1/(2n)}; rule (2.2) turns the cone into
    a ball around (c/m)I. The scaled cascade is then verified, with the smallest relative reserve
    in the spare angle for which it is.

    Args:
        claim: (δ, ν), δ > 0 and 0 ≤ ν ≤ 1/(4δ).
        sectors: one per layer, 0 < α ≤ β.
        weights: relative shares of the spare angle; equal by default.

    Returns:
        `Budgets` with balls; the budget of a layer is center + radius.

    Raises:
        DesignInfeasible: if the activations alone are wider than the claim's cone; `.nearest`
            holds claims that were designed and verified.

    Example:
        >>> found = conic_budgets(Indices.from_slopes(0.2, 2.0), [Sector(0.8, 1.0)] * 2)
        >>> [ball[1] > 0 for ball in found.balls]
        [True, True]

    Reference: sound form, equations (2.2) and (2.3).
    """
    claim, sectors = check_claim(claim), check_sectors(sectors)
    shares = check_shares(weights, len(sectors))
    if claim.nu < 0:
        raise ValueError(f"The conic rule is for nu >= 0. Received: {claim}. Use rule='sound'.")
    # IIFOFP(δ, ν) implies the same with a smaller ν, and ν = 0 has no slope √(ab) to divide up.
    target = claim if claim.nu > 0 else Indices(claim.delta, 2.0**-30 / claim.delta)
    smallest = [sector_half_angle(sector) for sector in sectors]
    spare = target.half_angle - sum(smallest)
    slope = (target.nu / target.delta) ** (1 / (2 * len(sectors)))
    verified_before = False
    for reserve in _RESERVES if spare > 0 else ():
        angles = [
            angle + spare * (1 - reserve) * share / sum(shares)
            for angle, share in zip(smallest, shares, strict=True)
        ]
        found = _cones(claim, sectors, angles, slope)
        if found is not None and verified_before:
            return found
        verified_before = found is not None
    nearest = _nearest_conic_claims(claim, sectors, sum(smallest))
    raise DesignInfeasible(
        "The activations' half-angles must sum to less than the claim's. Received: "
        f"{math.degrees(sum(smallest)):.3f} degrees against "
        f"{math.degrees(target.half_angle):.3f} for {claim}. "
        f"Nearest feasible claims: {list(nearest)}.",
        nearest,
    )


def _cones(claim, sectors, angles, slope) -> Budgets | None:
    """Budgets for given half-angles, if every step of the proof is verified."""
    try:
        indices = tuple(
            Indices.from_slopes(
                slope * math.tan(math.pi / 4 - angle / 2), slope * math.tan(math.pi / 4 + angle / 2)
            )
            for angle in angles
        )
        balls = tuple(conic_ball(i, s) for i, s in zip(indices, sectors, strict=True))
        verdict = scaled_cascade(claim, indices, cone_weights(indices))
    except ValueError:  # a cone too thin for float64; DesignInfeasible is one of them
        return None
    fine = verdict.holds and all(
        conic_rule_holds(*ball, sector, layer)
        for ball, sector, layer in zip(balls, sectors, indices, strict=True)
    )
    budgets = tuple(round_up(Fraction(c) + Fraction(v)) for c, v in balls)
    return Budgets(budgets, indices, verdict.weights, balls) if fine else None


def _nearest_conic_claims(claim, sectors, angle) -> tuple[Indices, ...]:
    candidates = []
    if angle < math.pi / 2:
        # A cone with the same δ, wider than the activations by a 64th of what is left.
        cosine = math.cos(angle + (math.pi / 2 - angle) / 64)
        candidates.append(Indices(claim.delta, cosine**2 / (4 * claim.delta)))
    near = tuple(c for c in candidates if c != claim and _designed(conic_budgets, c, sectors))
    return near + nearest_gain_claims(claim, sectors)
