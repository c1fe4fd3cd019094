"""From layers to the network: the papers' cascade matrix and its sharper, scaled form.

Layer l maps the change x[l-1] to x[l] and satisfies ω_l ≥ 0. The network's ω is a quadratic form
in the same signals, so ω - Σ p_l ω_l ⪰ 0 for some p > 0 proves ω ≥ 0. Signals of different widths
are padded with zeros, as in the definition of ω.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF, exact_product, round_down
from tf_lyapunov.theory.sectors import Indices
from tf_lyapunov.theory.spectra import is_positive_semidefinite, maximize_smallest_eigenvalue

# Output index given to a layer of which only the gain counts, in units of 1/gain: its cone
# [-r, r + r/2³⁰] then differs from the disc [-r, r] by 1e-9.
_DISC_SHARPNESS = 2.0**30


def _exact_cascade(claim: Indices, layers: Sequence[Indices], weights) -> dict:
    """Upper triangle of M(p), equation (2.3), as rationals by position; the rest is zero."""
    n = len(layers)
    p = [Fraction(float(weight)) for weight in weights]
    diagonal = [Fraction(0)] * (n + 1)
    diagonal[0] -= Fraction(claim.nu)
    diagonal[n] -= Fraction(claim.delta)
    for index, (weight, layer) in enumerate(zip(p, layers, strict=True)):
        diagonal[index] += weight * Fraction(layer.nu)
        diagonal[index + 1] += weight * Fraction(layer.delta)
    entries = {(index, index): value for index, value in enumerate(diagonal)}
    entries |= {(index, index + 1): -weight / 2 for index, weight in enumerate(p)}
    entries[0, n] = entries.get((0, n), Fraction(0)) + Fraction(1, 2)
    return entries


def _symmetric(entries: dict, sign: int = 1) -> np.ndarray:
    """The full matrix, every entry correctly rounded."""
    size = 1 + max(row for row, _ in entries)
    matrix = np.zeros((size, size))
    for (row, column), value in entries.items():
        matrix[row, column] = matrix[column, row] = float(sign * value)
    return matrix


def _check_layers(layers) -> tuple[Indices, ...]:
    layers = tuple(layers)
    if not layers:
        raise ValueError("`layers` must hold at least one layer. Received: none.")
    for layer in layers:
        if not isinstance(layer, Indices):
            raise TypeError(f"`layers` must hold `Indices`. Received: {layer!r}.")
    return layers


def _check_weights(weights, count: int) -> tuple[float, ...]:
    weights = tuple(float(weight) for weight in weights)
    if len(weights) != count or not all(w > 0 and math.isfinite(w) for w in weights):
        raise ValueError(
            f"`weights` must be {count} positive finite numbers, one per layer. "
            f"Received: {weights}."
        )
    return weights


def cascade_matrix(claim: Indices, layers: Sequence[Indices]) -> np.ndarray:
    """Cascade matrix A: the network is IIFOFP(δ, ν) if -A ⪰ 0 (or is quasi-dominant).

    A[0,0] = ν-ν_1,  A[l,l] = -δ_l-ν_{l+1},  A[n,n] = δ-δ_n,  A[l,l+1] = 1/2,  A[0,n] += -1/2.
    Sufficient, given that every layer is IIFOFP(δ_l, ν_l); `scaled_cascade` is sharper.

    Args:
        claim: (δ, ν) of the network.
        layers: (δ_l, ν_l) of its n layers, from the input on.

    Returns:
        Shape (n+1, n+1), float64.

    Example:
        >>> cascade_matrix(Indices(1.0, 0.0), [Indices(1.0, 0.1), Indices(2.0, 0.1)])[1, 1]
        np.float64(-1.1)

    Reference: Rahnama et al., Theorem 3; Aquino et al., Theorem 3 with the sign of "-ν_2+δ_1"
    corrected. As published.
    """
    layers = _check_layers(layers)
    return _symmetric(_exact_cascade(claim, layers, [1.0] * len(layers)), sign=-1)


def scaled_cascade_matrix(
    claim: Indices, layers: Sequence[Indices], weights: Sequence[float]
) -> np.ndarray:
    """Matrix M(p) of ω - Σ p_l ω_l, equation (2.3); M(1) = -A.

    M[0,0] = p_1ν_1-ν,  M[l,l] = p_lδ_l+p_{l+1}ν_{l+1},  M[n,n] = p_nδ_n-δ,  M[l-1,l] -= p_l/2,
    M[0,n] += 1/2.

    Args:
        claim: (δ, ν) of the network.
        layers: (δ_l, ν_l) of its n layers.
        weights: p_l > 0.

    Returns:
        Shape (n+1, n+1), float64, every entry correctly rounded.

    Example:
        >>> layers = [Indices(1.0, -1.0)] * 2
        >>> float(scaled_cascade_matrix(Indices(0.5, -2.0), layers, [0.5, 2.0])[1, 1])
        -1.5

    Reference: sound form, equation (2.3).
    """
    layers = _check_layers(layers)
    return _symmetric(_exact_cascade(claim, layers, _check_weights(weights, len(layers))))


@dataclass(frozen=True)
class ScaledCascade:
    """Verdict of the scaled cascade test.

    Attributes:
        holds: M(p) ⪰ 0 was proved for `weights` by eigenvalue, rounding included.
        weights: p_l, one per layer.
        matrix: M(p), shape (n+1, n+1).
        margin: smallest eigenvalue of M(p) scaled to a unit diagonal (dimensionless).
        rounding_bound: bound on the error of `margin`.
    """

    holds: bool
    weights: tuple[float, ...]
    matrix: np.ndarray
    margin: float
    rounding_bound: float

    def __bool__(self) -> bool:
        return self.holds


def _with_weights(claim, layers, weights) -> ScaledCascade:
    matrix = scaled_cascade_matrix(claim, layers, weights)
    verdict = is_positive_semidefinite(matrix, entry_error=UNIT_ROUNDOFF)
    return ScaledCascade(verdict.holds, weights, matrix, verdict.value, verdict.rounding_bound)


def _layer_scales(layers) -> list[float]:
    """A typical slope per layer, by which signals are rescaled before optimising."""
    return [
        max(abs(layer.slopes[0]), abs(layer.slopes[1])) ** 0.5
        * max(min(abs(layer.slopes[0]), abs(layer.slopes[1])), 1e-3 * layer.slopes[1]) ** 0.5
        if layer.delta > 0
        else max(abs(layer.nu), 1e-3)
        for layer in layers
    ]


def _unscale(weights, scales) -> tuple[float, ...]:
    """Weights for the original signals from those for x[l]/Π_{k≤l} s_k."""
    cumulative = np.concatenate([[0.0], np.cumsum(np.log(scales))])
    logs = np.log(weights) + cumulative[-1] - cumulative[:-1] - cumulative[1:]
    return tuple(float(w) for w in np.exp(np.clip(logs, -600.0, 600.0)))


def scaled_cascade(
    claim: Indices, layers: Sequence[Indices], weights: Sequence[float] | None = None
) -> ScaledCascade:
    """Weights p > 0 for which ω - Σ p_l ω_l ⪰ 0, if they can be found, and the proof.

    Maximises the smallest eigenvalue of M(p), a small semidefinite program, unless `weights` are
    given; then decides M(p) ⪰ 0 by eigenvalue with a rounding bound. Sufficient for the network
    to be IIFOFP(δ, ν). p = 1 is the papers' test.

    Args:
        claim: (δ, ν) of the network.
        layers: (δ_l, ν_l) of its n layers, each known to hold.
        weights: p_l to check; `None` to search.

    Returns:
        `ScaledCascade`.

    Example:
        >>> layers = [Indices(1.0, -0.6), Indices(1.0, -0.6)]
        >>> scaled_cascade(Indices(0.2, -1.0), layers).holds
        True

    Reference: sound form, equation (2.3).
    """
    layers = _check_layers(layers)
    if weights is not None:
        return _with_weights(claim, layers, _check_weights(weights, len(layers)))
    n = len(layers)
    scales = np.array(_layer_scales(layers))
    total = float(np.exp(np.sum(np.log(scales))))
    directions = np.zeros((n, n + 1, n + 1))
    sizes = np.zeros(n)
    for index, (layer, scale) in enumerate(zip(layers, scales, strict=True)):
        delta, nu = layer.delta * scale, layer.nu / scale
        sizes[index] = max(abs(delta), abs(nu), 1.0)
        block = np.array([[nu, -0.5], [-0.5, delta]]) / sizes[index]
        directions[index, index : index + 2, index : index + 2] = block
    constant = np.diag(
        np.concatenate([[-claim.nu / total], np.zeros(n - 1), [-claim.delta * total]])
    )
    constant[0, n] = constant[n, 0] = 0.5
    found = maximize_smallest_eigenvalue(constant, directions) / sizes
    best = _with_weights(claim, layers, _unscale(found, scales))
    papers = _with_weights(claim, layers, (1.0,) * n)
    return papers if papers.margin > best.margin and not best.holds else best


def allowed_gain_product(claim: Indices) -> float:
    """Largest product of layer gains that proves IIFOFP(δ, ν) when only gains are known: -a(δ,ν).

    Π r_l ≤ -a = (√(1-4δν) - 1)/(2δ); necessary and sufficient for δ > 0; not positive for ν ≥ 0,
    where no product is small enough.

    Args:
        claim: (δ, ν) of the network, δ > 0.

    Returns:
        -a, float64.

    Example:
        >>> round(allowed_gain_product(Indices(0.4, -2.0)), 2)
        1.31

    Reference: sound form, limit of equation (2.3).
    """
    return -claim.slopes[0]


def gain_indices(gain: float, delta: float) -> Indices:
    """Indices of every map with l2 gain r, for a chosen δ: ν = -(δr² + r), rounded down.

    The largest ν for which ‖Δy‖ ≤ r‖Δu‖ implies IIFOFP(δ, ν), δ ≥ 0: rule (2.1) solved for ν.

    Args:
        gain: r ≥ 0.
        delta: δ > 0.

    Returns:
        `Indices`.

    Example:
        >>> gain_indices(2.0, delta=1.0)
        Indices(delta=1.0, nu=-6.0)

    Reference: sound form, equation (2.1).
    """
    r, d = Fraction(float(gain)), Fraction(float(delta))
    if r < 0 or d <= 0:
        raise ValueError(
            "`gain` must not be negative and `delta` must be positive. "
            f"Received: gain={gain}, delta={delta}."
        )
    return Indices(float(delta), round_down(-(d * r * r + r)))


def gain_cascade(
    claim: Indices, gains: Sequence[float]
) -> tuple[tuple[Indices, ...], ScaledCascade]:
    """Layer indices and weights that prove IIFOFP(δ, ν) from the layers' gains alone.

    δ_l → ∞ and p_l → 0 with p_lδ_l fixed, stopped at a finite, verified point: in signals scaled
    to unit gains p_nδ_n = (δ-ν)/2 and p_l ≈ p_{l+1}(1 + 4/δ_l). The verdict holds for
    Π r_l ≤ -a(δ,ν)(1 - tiny), the exact condition up to a relative reserve of about 1e-8.

    Args:
        claim: (δ, ν) of the network, δ > 0.
        gains: r_l > 0, l2 gains of the layers (with activation).

    Returns:
        The layers' `Indices` and the `ScaledCascade` verdict.

    Example:
        >>> layers, verdict = gain_cascade(Indices(0.4, -2.0), [1.2, 1.0])
        >>> verdict.holds
        True

    Reference: sound form, equations (2.1) and (2.3).
    """
    gains = _check_weights(gains, len(tuple(gains)))
    product = float(exact_product(gains))
    if not 0 < product < math.inf:
        raise ValueError(f"The product of `gains` must be representable. Received: {product}.")
    delta, nu = claim.delta * product, claim.nu / product
    level = max((delta - nu) / 2, 0.5)
    # The limit's smallest eigenvalue is (-ν-δ-1)/2; finite δ_l cost about level/δ_l of it.
    sharpness = _DISC_SHARPNESS * max(1.0, level / max(-nu - delta, 1.0))
    layers = tuple(gain_indices(r, delta=sharpness / r) for r in gains)
    growth = np.arange(len(gains) - 1, -1, -1.0)
    # 2⁻⁴² covers the rounding of the weights themselves.
    scaled = (level / sharpness) * (1 + 4 / sharpness + 2.0**-42) ** growth
    return layers, _with_weights(claim, layers, _unscale(scaled, gains))


def cone_weights(layers: Sequence[Indices]) -> tuple[float, ...]:
    """Weights p_l for layers whose cones are acute (δ_l, ν_l > 0), in closed form.

    With half-angles θ_l, cos θ_l = 2√(δ_lν_l), and signals scaled by √(ν_l/δ_l), the optimum is
    p_l = sin(Σθ)/sin θ_l: M(p) is then singular exactly when the network's cone has half-angle
    Σθ and slope √(ν/δ) = Π√(ν_l/δ_l). Needs Σθ < π.

    Args:
        layers: (δ_l, ν_l), all positive.

    Returns:
        p_l, one per layer; a candidate that `scaled_cascade` must check.

    Example:
        >>> cone_weights([Indices(0.5, 0.3)])
        (1.0,)

    Reference: sound form, equation (2.3).
    """
    layers = _check_layers(layers)
    if any(layer.delta <= 0 or layer.nu <= 0 for layer in layers):
        raise ValueError(f"`layers` must have positive indices. Received: {layers}.")
    angles = np.array([max(layer.half_angle, 1e-9) for layer in layers])
    if angles.sum() >= math.pi:
        raise ValueError(f"The half-angles must sum to less than pi. Received: {angles.sum()}.")
    weights = np.sin(angles.sum()) / np.sin(angles)
    return _unscale(weights, [math.sqrt(layer.nu / layer.delta) for layer in layers])


def unscaled_gain_product(claim: Indices, depth: int) -> float:
    """Largest product of equal layer gains that the papers' test p = 1 can accept.

    Bisects r; for each r the best δ_l > 0 (with ν_l = -(δ_l r²+r)) make λ_min(M(1)) largest.
    Compare `allowed_gain_product`, which the scaled cascade reaches. An estimate from below.

    Args:
        claim: (δ, ν) of the network, δ > 0, ν < 0.
        depth: number of layers n.

    Returns:
        Π r_l = rⁿ, float64 (0 if none is accepted).

    Example:
        >>> claim = Indices(0.4, -2.0)
        >>> allowed_gain_product(claim) / unscaled_gain_product(claim, 3) > 2.7
        True

    Reference: sound form, remark to equation (2.3).
    """
    n = int(depth)
    if n < 1:
        raise ValueError(f"`depth` must be at least 1. Received: depth={depth}.")

    def accepts(r):
        constant = np.diag(np.full(n + 1, -r)) - np.diag(np.full(n, 0.5), 1)
        constant -= np.diag(np.full(n, 0.5), -1)
        constant[n, n] = -claim.delta
        constant[0, 0] -= claim.nu
        constant[0, n] += 0.5
        constant[n, 0] += 0.5
        directions = np.zeros((n, n + 1, n + 1))
        for index in range(n):
            directions[index, index, index] = -r * r
            directions[index, index + 1, index + 1] = 1.0
        deltas = maximize_smallest_eigenvalue(constant, directions, enough=0.0)
        layers = [Indices(delta, -(delta * r * r + r)) for delta in deltas]
        return np.linalg.eigvalsh(-cascade_matrix(claim, layers))[0] >= -1e-9

    low, high = 0.0, max(allowed_gain_product(claim), 0.0) ** (1 / n)
    for _ in range(24):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if accepts(middle) else (low, middle)
    return low**n
