"""Incremental dissipativity of layers (Aquino et al.), as published, and sound layer rules.

Each rule turns a bound on a layer's linear map W into a supply rate of the whole layer
y = φ(Wx + b), φ with slopes in [α, β]. The cascade test of `cascade` then joins the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tf_lyapunov.errors import DesignInfeasible
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.theory.cascade import (
    ScaledCascade,
    allowed_gain_product,
    cascade_matrix,
    cone_weights,
    gain_cascade,
    gain_indices,
    scaled_cascade,
    scaled_cascade_matrix,
    unscaled_gain_product,
)
from tf_lyapunov.theory.lyapunov import check_claim
from tf_lyapunov.theory.rounding import round_down
from tf_lyapunov.theory.sectors import Indices, Sector
from tf_lyapunov.theory.supply import (
    SupplyWitness,
    finite_matrix,
    null_coordinate_counterexample,
    supply,
    worst_supply,
)

__all__ = [
    "ScaledCascade", "SupplyWitness", "allowed_gain_product", "cascade_matrix", "cone_weights",
    "conic_ball", "conic_margin", "conic_rule_holds", "equal_diagonal_indices", "gain_budget",
    "gain_cascade", "gain_indices", "gain_rule_holds", "get_indexes_budget",
    "null_coordinate_counterexample", "residual_indices", "scaled_cascade",
    "scaled_cascade_matrix", "supply", "theorem_1_matrix", "theorem_4_budget",
    "theorem_4_budgets", "theorem_4_multiplier", "unscaled_gain_product", "worst_supply",
]  # fmt: skip

# Relative excess of the cascade's diagonal, so that its semidefiniteness can be decided.
_RESERVE = 2.0**-40


# Layer rules, sound forms.


def gain_budget(indices: Indices, sector: Sector) -> float:
    """Largest σ(W) that proves a layer IIFOFP(δ, ν) from its norm alone, rule (2.1).

    σ ≤ (√(1-4δν) - 1)/(2δ·max(|α|,|β|)) for δ > 0, ν < 0. Necessary and sufficient: a layer with
    W = ∓tI beyond it violates the supply rate, and no norm bound exists for ν ≥ 0.

    Args:
        indices: (δ, ν) with δ > 0 and ν < 0.
        sector: slopes of the activation.

    Returns:
        The bound on σ, float64, rounded down.

    Raises:
        ValueError: if δ ≤ 0, ν ≥ 0, or the activation is constant.

    Example:
        >>> gain_budget(Indices(1.0, -6.0), Sector(0.0, 1.0))
        2.0

    Reference: sound form, equation (2.1).
    """
    if indices.delta <= 0 or indices.nu >= 0:
        raise ValueError(
            "A norm bound proves a layer's indices only for delta > 0 and nu < 0: W = -t*I "
            f"violates nu >= 0 for every t > 0. Received: {indices}. Use the conic rule for nu > 0."
        )
    if sector.magnitude == 0:
        raise ValueError("`sector` must not be [0, 0]: the layer is constant for every weight.")
    bound = allowed_gain_product(indices) / sector.magnitude
    # The formula above is within a few units in the last place; step down to the proved side.
    while bound > 0 and not gain_rule_holds(bound, sector, indices):
        bound = math.nextafter(bound, 0.0)
    return bound


def gain_rule_holds(sigma: float, sector: Sector, indices: Indices) -> bool:
    """Whether σ(W) ≤ `sigma` implies IIFOFP(δ, ν): δr² + r + ν ≤ 0 with r = σ·max(|α|,|β|), δ ≥ 0.

    Decided without rounding.

    Example:
        >>> gain_rule_holds(2.0, Sector(0.0, 1.0), Indices(1.0, -6.0))
        True

    Reference: sound form, equation (2.1).
    """
    r = Fraction(float(sigma)) * Fraction(sector.magnitude)
    return (
        indices.delta >= 0
        and r >= 0
        and Fraction(indices.delta) * r * r + r + Fraction(indices.nu) <= 0
    )


def conic_margin(weight, sector: Sector, indices: Indices) -> float:
    """Slack r - ‖mW - cI‖ - ½(β-α)σ(W) of the conic layer rule; ≥ 0 proves IIFOFP(δ, ν).

    c = 1/(2δ), r = √(c² - ν/δ); W is zero-padded to at least the input width (with full I). The
    rule holds for ν > 0 too. Sufficient; computed by SVD in float64 without a rounding bound.

    Args:
        weight: W, shape (outputs, inputs).
        sector: slopes of the activation.
        indices: (δ, ν), δ > 0.

    Returns:
        The slack, float64, in units of gain.

    Example:
        >>> round(conic_margin(np.eye(2), Sector.linear(), Indices.from_slopes(0.5, 1.5)), 12)
        0.5

    Reference: sound form, equation (2.2).
    """
    weight = finite_matrix(weight)
    outputs, inputs = weight.shape
    a, b = indices.slopes
    padded = np.zeros((max(outputs, inputs), inputs))
    padded[:outputs] = weight
    distance = np.linalg.norm(sector.m * padded - (a + b) / 2 * np.eye(*padded.shape), 2)
    spread = (sector.beta - sector.alpha) / 2 * np.linalg.norm(weight, 2)
    return float((b - a) / 2 - distance - spread)


def conic_ball(indices: Indices, sector: Sector) -> tuple[float, float]:
    """Ball of square W that the conic rule accepts: ‖W - (c/m)I‖ ≤ v.

    v = (r - (β-α)c/(2m))/β with c, r the cone's centre and radius, m = (α+β)/2 > 0; then
    σ(W) ≤ c/m + v.

    Args:
        indices: (δ, ν) of the layer, δ > 0.
        sector: slopes of the activation, α + β > 0.

    Returns:
        `(center, radius)`: c/m and v, both in units of gain; the radius is rounded down.

    Raises:
        DesignInfeasible: if v < 0: the activation alone is wider than the cone.

    Example:
        >>> conic_ball(Indices.from_slopes(0.5, 1.5), Sector.linear())
        (1.0, 0.5)

    Reference: sound form, equation (2.2).
    """
    if sector.alpha + sector.beta <= 0:
        raise ValueError(f"`sector` must have alpha + beta > 0. Received: {sector}.")
    a, b = indices.slopes
    center = (a + b) / 2 / sector.m
    radius = ((b - a) / 2 - (sector.beta - sector.alpha) / 2 * center) / sector.beta
    for _ in range(64):
        if radius < 0 or conic_rule_holds(center, radius, sector, indices):
            break
        radius -= 2.0**-52 * max(abs(center), radius)
    if radius < 0:
        raise DesignInfeasible(
            "The activation's sector is wider than the layer's cone: arcsin((beta-alpha)/"
            f"(beta+alpha)) exceeds its half-angle. Received: {sector}, {indices}."
        )
    return center, radius


def conic_rule_holds(center: float, radius: float, sector: Sector, indices: Indices) -> bool:
    """Whether ‖W - center·I‖ ≤ `radius` implies IIFOFP(δ, ν) for a square W, without rounding.

    |m|·radius + |m·center - c| + ½(β-α)(|center| + radius) ≤ r, squared, with c = 1/(2δ) and
    r² = c² - ν/δ.

    Example:
        >>> conic_rule_holds(1.0, 0.5, Sector.linear(), Indices.from_slopes(0.5, 1.5))
        True

    Reference: sound form, equation (2.2).
    """
    if indices.delta <= 0 or radius < 0:
        return False
    alpha, beta = Fraction(sector.alpha), Fraction(sector.beta)
    w, v, delta = Fraction(float(center)), Fraction(float(radius)), Fraction(indices.delta)
    c, m = 1 / (2 * delta), (alpha + beta) / 2
    reach = abs(m) * v + abs(m * w - c) + (beta - alpha) / 2 * (abs(w) + v)
    return reach * reach <= c * c - Fraction(indices.nu) / delta


def residual_indices(skip: float, gain: float) -> Indices:
    """Indices of a residual block y = s·x + f(x), equal widths: (1/(2s), (s²-g²)/(2s)).

    The block's gain is at most s + g; ν > 0 exactly when g < s.

    Args:
        skip: s > 0.
        gain: g ≥ 0, l2 gain of f.

    Returns:
        `Indices`, rounded so that the block is inside the cone.

    Example:
        >>> residual_indices(1.0, 0.5)
        Indices(delta=0.5, nu=0.375)

    Reference: sound form, equation (2.4); replaces Rahnama et al., Appendix D.
    """
    skip, gain = finite_float("skip", skip), finite_float("gain", gain)
    if skip <= 0 or gain < 0:
        raise ValueError(
            "`skip` must be positive and `gain` must not be negative. "
            f"Received: skip={skip}, gain={gain}."
        )
    s, g = Fraction(skip), Fraction(gain)
    delta = Fraction(round_down(1 / (2 * s)))
    # With δ rounded the disc around 1/(2δ) must still hold the one around s: g + |s - 1/(2δ)|.
    center = 1 / (2 * delta)
    reach = g + abs(s - center)
    return Indices(float(delta), round_down(delta * (center**2 - reach**2)))


# Layer rules, as published.


def theorem_1_matrix(weight, sector: Sector, indices: Indices, multipliers) -> np.ndarray:
    """Matrix of Theorem 1; if it is PSD for some Λ ≥ 0 the layer is IIFOFP(δ, ν).

    [Q S; Sᵀ R] + [Λ, -mΛW; -mWᵀΛ, pWᵀΛW],  Q = -δI, S = I/2 (rectangular), R = -νI.

    Args:
        weight: W, shape (outputs, inputs).
        sector: slopes [α, β], m = (α+β)/2, p = αβ.
        indices: (δ, ν).
        multipliers: diagonal of Λ, shape (outputs,), or one number for all.

    Returns:
        Shape (outputs+inputs, outputs+inputs), float64.

    Example:
        >>> theorem_1_matrix([[0.0]], Sector(0.0, 1.0), Indices(1.0, -1.0), 2.0)
        array([[1. , 0.5],
               [0.5, 1. ]])

    Reference: Aquino et al., Theorem 1, as published.
    """
    weight = finite_matrix(weight)
    outputs, inputs = weight.shape
    lam = np.broadcast_to(np.asarray(multipliers, dtype=np.float64), (outputs,))
    if np.any(lam < 0) or not np.all(np.isfinite(lam)):
        raise ValueError("`multipliers` must be finite and not negative.")
    scaled = lam[:, None] * weight
    corner = np.eye(outputs, inputs) / 2 - sector.m * scaled
    bottom = sector.p * weight.T @ scaled - indices.nu * np.eye(inputs)
    top = np.diag(lam) - indices.delta * np.eye(outputs)
    return np.block([[top, corner], [corner.T, (bottom + bottom.T) / 2]])


def theorem_4_budget(
    indices: Indices,
    sector: Sector,
    smallest_singular_value: float = 0.0,
    *,
    check_assumptions: bool = True,
) -> float:
    """Bound of Theorem 4 on σ(W), which proves a layer IIFOFP(δ, ν).

    σ ≤ (1/|m|)·(1 - (δ+½)(1-|p|s²)/(δ-ν)). Sound for δ > 0, δ > ν, 0 ≤ α ≤ β, m > 0, ps² < 1:
    Λ = λI with λ = (δ+½)/(1-mσ) then makes the matrix of Theorem 1 PSD, since
    (λ-δ)(λps²-ν) ≥ (½+λmσ)² is this inequality. Sufficient only: rule (2.1) never allows less,
    also with s, because W = -σI has all singular values equal.

    Args:
        indices: (δ, ν) of the layer.
        sector: slopes [α, β].
        smallest_singular_value: a lower bound s of ‖Wx‖/‖x‖ over **all** inputs (so 0 for
            wide-to-narrow layers, which then need ν < -½).
        check_assumptions: `False` evaluates the printed formula where it proves nothing.

    Returns:
        The bound on σ, float64, rounded down; not positive if no weight is allowed.

    Raises:
        ValueError: outside the assumptions.

    Example:
        >>> round(theorem_4_budget(Indices(0.5, -1.5), Sector(0.0, 1.0)), 6)
        1.0

    Reference: Aquino et al., Theorem 4, as published, with the assumptions its proof needs.
    """
    s = finite_float("smallest_singular_value", smallest_singular_value)
    delta, nu = Fraction(indices.delta), Fraction(indices.nu)
    alpha, beta = Fraction(sector.alpha), Fraction(sector.beta)
    m, p_s2 = (alpha + beta) / 2, alpha * beta * Fraction(s) ** 2
    broken = [
        text
        for text, fine in (
            ("delta > 0", delta > 0),
            ("delta > nu", delta > nu),
            ("alpha >= 0", alpha >= 0),
            ("alpha + beta > 0", m > 0),
            ("smallest_singular_value >= 0", s >= 0),
            ("alpha*beta*s**2 < 1", p_s2 < 1),
        )
        if not fine
    ]
    if check_assumptions and broken:
        raise ValueError(
            f"Theorem 4 fails without {' and '.join(broken)}. Received: {indices}, {sector}, "
            f"smallest_singular_value={s}. Use rule='sound'."
        )
    if m == 0 or delta == nu:
        raise ValueError(
            f"Theorem 4 divides by alpha+beta and delta-nu. Received: {sector}, {indices}."
        )
    return round_down((1 - (delta + Fraction(1, 2)) * (1 - abs(p_s2)) / (delta - nu)) / abs(m))


def theorem_4_multiplier(indices: Indices, sector: Sector, sigma: float) -> float:
    """Multiplier λ = (δ+½)/(1-mσ) with which Theorem 4 satisfies Theorem 1.

    Example:
        >>> theorem_4_multiplier(Indices(0.5, -1.5), Sector(0.0, 1.0), 1.0)
        2.0

    Reference: proof of `theorem_4_budget`; (18) of Aquino et al. has δ-ν over 1-|p|s², the same
    at the bound.
    """
    if sector.m * sigma >= 1:
        raise ValueError(f"Theorem 4 needs m*sigma < 1. Received: {sector}, sigma={sigma}.")
    return (indices.delta + 0.5) / (1 - sector.m * sigma)


def get_indexes_budget(indices: Indices, sector: Sector) -> float:
    """Spectral bound of the released get_indexes.m. **Unsound**: not Theorem 4.

    D/(mD + δ + ½),  D = (1/m)((1-p)|δν|/(|δ|-|ν|) - ½). For leaky slope 0.1 and
    (δ, ν) = (.525, -.476) it gives 1.454, and W = -1.454·I violates the supply rate; for linear
    layers (p = 1) it is negative.

    Args:
        indices: (δ, ν), |δ| ≠ |ν|.
        sector: slopes [α, β], α + β ≠ 0.

    Returns:
        The published bound, float64; may be negative.

    Example:
        >>> round(get_indexes_budget(Indices(0.525, -0.476), Sector(0.1, 1.0)), 3)
        1.454

    Reference: code of Aquino et al., get_indexes.m, as released.
    """
    delta, nu = abs(indices.delta), abs(indices.nu)
    if delta == nu or sector.m == 0:
        raise ValueError(
            f"The released formula divides by |delta|-|nu| and m. Received: {indices}, {sector}."
        )
    d = ((1 - sector.p) * delta * nu / (delta - nu) - 0.5) / sector.m
    return d / (sector.m * d + indices.delta + 0.5)


def equal_diagonal_indices(claim: Indices, depth: int) -> tuple[Indices, ...]:
    """Layer indices for Theorem 4 that pass the papers' cascade test and allow large budgets.

    -A has the equal diagonal d = cos(π/(n+1)): ν_1 = ν+d, δ_l = d-ν_{l+1}, δ_n = δ+d. The free
    ν_l = -t_l maximise the product of the bounds of Theorem 4 at s = 0, whose stationary points
    are t_l = ½ + √((δ_l+½)(δ_{l-1}'+½)) with δ_{l-1}' = d+t_{l-1}; solved by iteration.

    Args:
        claim: (δ, ν) of the network, δ > 0 and ν + d < -½.
        depth: number of layers n.

    Returns:
        n `Indices` with ν_l < -½.

    Raises:
        DesignInfeasible: if ν is too large; `.nearest` holds the claim with the same δ and the
            largest ν that is clearly feasible.

    Example:
        >>> layers = equal_diagonal_indices(Indices(0.4, -2.0), 3)
        >>> [layer.nu < -0.5 for layer in layers]
        [True, True, True]

    Reference: this library's choice for Aquino et al., Theorems 3 and 4.
    """
    claim = check_claim(claim)
    n = int(depth)
    d = math.cos(math.pi / (n + 1)) * (1 + _RESERVE) if n > 1 else 0.0
    first = -(claim.nu + d)
    if first <= 0.5:
        nearest = Indices(claim.delta, -(0.5 + d) * (1 + 2.0**-10))
        raise DesignInfeasible(
            f"Theorem 4 needs nu_1 = nu + cos(pi/(n+1)) < -1/2. Received: {claim}, depth={n}. "
            f"Nearest feasible claim: {nearest}.",
            (nearest,),
        )
    t = np.full(n, first)
    last = claim.delta + d
    for _ in range(200):
        after = np.append(d + t[2:], last)  # δ_l of layers 2…n
        t[1:] = 0.5 + np.sqrt((after + 0.5) * (d + t[:-1] + 0.5))
    deltas = np.append(d + t[1:], last)
    return tuple(Indices(float(a), float(-b)) for a, b in zip(deltas, t, strict=True))


def theorem_4_budgets(
    layers: Sequence[Indices], sectors: Sequence[Sector], smallest_singular_values=None
) -> tuple[float, ...]:
    """Bounds of Theorem 4 for a sequence of layers; see `theorem_4_budget`.

    Raises:
        ValueError: outside its assumptions, naming the layer.
    """
    values = smallest_singular_values or [0.0] * len(layers)
    budgets = []
    for number, (layer, sector, s) in enumerate(zip(layers, sectors, values, strict=True), 1):
        try:
            budgets.append(theorem_4_budget(layer, sector, s))
        except ValueError as error:
            raise ValueError(f"Layer {number}: {error}") from None
    return tuple(budgets)
