"""How far a kernel's norm can grow between two projections onto its budget.

An optimizer step moves a kernel K by at most f in Frobenius norm, whatever the loss. If the map of
every kernel E has ‖map(E)‖ ≤ q‖E‖_F, and nothing else than steps and contractions happens,

    ‖map(K_k)‖ ≤ ‖map(K_0)‖ + q Σ_{j≤k} f_j                                               (G.1)

    SGD, ‖g‖_F ≤ c, momentum μ:  f_j = v_j = μ v_{j-1} + η_j c ≤ ηc/(1-μ)                  (G.2)
    Adam:                        f_j = η_j R √(entries of K)                              (G.3)
    R = sup_t (1-β₁)/√(1-β₂) · √((1-γᵗ)/(1-γ)) · √(1-β₂ᵗ)/(1-β₁ᵗ),   γ = β₁²/β₂ < 1
    RMSprop, momentum μ:         as SGD, with c = √(entries of K) / √(1-ρ)                (G.4)

(G.3) is Cauchy and Schwarz on m_t = (1-β₁)Σβ₁^{t-i}g_i and v_t = (1-β₂)Σβ₂^{t-i}g_i², with equality
for g_i ∝ (β₁/β₂)^{t-i}: R is the largest value of m̂/√v̂ there is (7.27 for the defaults). The bounds
of Kingma and Ba (2015, section 2.1), η(1-β₁)/√(1-β₂) or η, are for special gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Unit roundoff of float32, in which optimizers and constraints compute.
ROUNDOFF = 2.0**-24
# Smallest positive number that no device takes for zero.
_TINY = 2.0**-126
# A kernel's entry is rounded by the step, by weight decay (twice) and by steering (twice).
_STORED = 8 * ROUNDOFF
# And an update by its own few operations.
_UPDATE = 1 + 16 * ROUNDOFF


def patch_overlap(kernel_shape: Sequence[int], linear_map=None) -> float:
    """Smallest known q with ‖map(E)‖ ≤ q‖E‖_F for every kernel E of this shape.

        dense: 1;   convolution: √Π_i ⌈k_i gcd(s_i, d_i)/s_i⌉, the patches an input pixel is in

    Args:
        kernel_shape: shape of the kernel, in Keras' layout.
        linear_map: its `LinearMap`; `None` bounds over every stride and dilation.

    Returns:
        The factor q, rounded up.

    Example:

    >>> patch_overlap((784, 10)), patch_overlap((3, 3, 8, 16))
    (1.0, 3.0000000000000004)

    Reference: sound form of Peck et al.'s convolution rule (this library).
    """
    axes = len(kernel_shape) - 2
    strides = getattr(linear_map, "strides", ()) or (1,) * axes
    dilation = getattr(linear_map, "dilation", ()) or (1,) * axes
    sizes = [
        math.ceil(k * math.gcd(s, d) / s)
        for k, s, d in zip(kernel_shape[:axes], strides, dilation, strict=True)
    ]
    return math.nextafter(math.sqrt(math.prod(sizes)), math.inf) if sizes else 1.0


def adam_ratio_upper_bound(
    beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-7
) -> float:
    """Largest |m̂_t|/(√v̂_t + ε) of one entry over all steps t and all gradients, as in (G.3).

    Rounding in float32 is covered: of β₁, β₂, their powers, the moving averages (each product
    relaxed by 4u), and gradients whose squares underflow.

    Args:
        beta_1: decay β₁ of the mean, in [0, 1).
        beta_2: decay β₂ of the mean square, in (β₁², 1).
        epsilon: Keras' ε, at least 2⁻¹²⁶ (or it is flushed to zero too): it alone bounds updates
            after squares have underflowed.

    Returns:
        The ratio R, at least 1.

    Raises:
        ValueError: a decay is out of range, or β₁² ≥ β₂, where the ratio grows without end.

    Example:

    >>> 7.27 < adam_ratio_upper_bound() < 7.28
    True

    Reference: Adam, Kingma and Ba (2015), algorithm 1; sound form of its section 2.1.
    """
    if not 0 <= beta_1 < 1 or not 0 < beta_2 < 1 or not epsilon >= _TINY:
        raise ValueError(
            "Adam needs 0 ≤ beta_1 < 1, 0 < beta_2 < 1 and epsilon ≥ 2⁻¹²⁶. Received: "
            f"beta_1={beta_1}, beta_2={beta_2}, epsilon={epsilon}."
        )
    b1, b2 = beta_1 + 4 * ROUNDOFF, beta_2 - 4 * ROUNDOFF
    gamma = b1**2 / b2 if b2 > 0 else math.inf
    if gamma >= 1:
        raise ValueError(
            "Adam's updates are bounded only if beta_1² < beta_2. Received: "
            f"beta_1={beta_1}, beta_2={beta_2}."
        )
    front = (1 - beta_1) / math.sqrt(1 - beta_2)
    # Beyond the last step the powers of γ no longer matter, and the correction falls towards 1.
    last = 2 if b1 == 0 else 2 + math.ceil(-40 / math.log(max(b1, gamma)))
    t = np.arange(1, last + 1, dtype=float)
    mean = np.sqrt((1 - gamma**t) / (1 - gamma))
    correction = np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
    tail = math.sqrt(1 / (1 - gamma)) / (1 - beta_1**last)
    ratio = front * max(float(np.max(mean * correction)), tail)
    # 1 - β^t is computed with a relative error of at most a few u / (1 - β).
    rounding = 1 + 16 * ROUNDOFF * (1 + 1 / (1 - beta_1) + 1 / (1 - beta_2))
    smallest = 2.0**-63 / math.sqrt(1 - beta_2)  # below it (1 - β₂)g² may be flushed to zero
    return ratio * rounding + (1 + ratio) * smallest / epsilon


def rmsprop_ratio_upper_bound(rho: float = 0.9, epsilon: float = 1e-7) -> float:
    """Largest |g_t|/√(v_t + ε) of one entry under RMSprop, as in (G.4); not if centered.

    Args:
        rho: decay ρ of the mean square, in [0, 1).
        epsilon: Keras' ε, at least 2⁻¹²⁶: it alone bounds updates after squares have underflowed.

    Returns:
        1/√(1 - ρ), with the rounding of float32 added.

    Raises:
        ValueError: an argument is out of range.

    Example:

    >>> round(rmsprop_ratio_upper_bound(), 4)
    3.1623

    Reference: RMSprop as Keras computes it (sound form: one gradient after none attains it).
    """
    if not 0 <= rho < 1 or not epsilon >= _TINY:
        raise ValueError(
            "RMSprop needs 0 ≤ rho < 1 and epsilon ≥ 2⁻¹²⁶. Received: "
            f"rho={rho}, epsilon={epsilon}."
        )
    ratio = (1 + 16 * ROUNDOFF * (1 + 1 / (1 - rho))) / math.sqrt(1 - rho)
    return max(ratio, 2.0**-63 / math.sqrt((1 - rho) * epsilon))


def sgd_moves(
    rates: Sequence[float],
    gradient_norm: float,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    velocity: float = 0.0,
) -> list[float]:
    """Upper bounds f_1…f_k on the Frobenius norms of k steps with momentum, as in (G.2).

    Args:
        rates: learning rates η_1…η_k.
        gradient_norm: bound c on the Frobenius norm of every gradient of the kernel, or of what
            takes its place.
        momentum: μ in [0, 1).
        nesterov: whether a step is μv_j + η_j c instead of v_j.
        velocity: Frobenius norm of the momentum before the first step.

    Returns:
        A list as long as `rates`.

    Raises:
        ValueError: an argument is negative or not finite.

    Example:

    >>> [round(move, 3) for move in sgd_moves([0.1, 0.1, 0.1], 1.0, momentum=0.9)]
    [0.1, 0.19, 0.271]
    """
    numbers = [*rates, gradient_norm, momentum, velocity]
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or momentum >= 1:
        raise ValueError(
            "SGD's moves need finite, non-negative rates, norms and a momentum below 1. Received: "
            f"gradient_norm={gradient_norm}, momentum={momentum}, velocity={velocity}."
        )
    moves = []
    for rate in rates:
        velocity = (momentum * velocity + rate * gradient_norm) * _UPDATE
        moves.append(
            (momentum * velocity + rate * gradient_norm) * _UPDATE if nesterov else velocity
        )
    return moves


def growth_upper_bound(
    norm: float, frobenius: float, moves: Sequence[float], overlap: float = 1.0
) -> float:
    """Upper bound on ‖map(K)‖ after, and at any time during, some steps, as in (G.1).

    Between steps the kernel may be scaled by factors in [-1, 1] (weight decay with ηλ ≤ 2,
    steering towards the budget). The entries are rounded to float32 by at most 8u a step.
    Necessary and sufficient but for rounding: gradients along the top singular pair attain it for
    SGD and dense kernels.

    Args:
        norm: upper bound on ‖map(K_0)‖, as the projection leaves it.
        frobenius: ‖K_0‖_F, or an upper bound.
        moves: bounds f_1…f_k on the Frobenius norms of the steps.
        overlap: `patch_overlap` of the kernel.

    Returns:
        Upper bound, float64, rounded up.

    Raises:
        ValueError: an argument is negative or NaN.

    Example:

    >>> round(growth_upper_bound(1.0, 1.0, [0.1] * 5), 4)
    1.5
    """
    if not all(number >= 0 for number in (norm, frobenius, overlap, *moves)):
        raise ValueError(
            "Norms and moves must not be negative. Received: "
            f"norm={norm}, frobenius={frobenius}, overlap={overlap}, moves={list(moves)[:5]}."
        )
    for move in moves:
        frobenius = (frobenius + move) * (1 + _STORED)
        norm += overlap * (move + _STORED * frobenius)
    return math.nextafter(norm * (1 + 8 * (len(moves) + 1) * 2.0**-53), math.inf)


def steps_within(
    norm: float, frobenius: float, move: float, limit: float, overlap: float = 1.0
) -> int:
    """Largest number k of steps that keep ‖map(K)‖ ≤ limit by (G.1): what `every=` may be.

    Args:
        norm, frobenius, overlap: as in `growth_upper_bound`.
        move: bound on the Frobenius norm of each step, positive.
        limit: the largest norm to allow.

    Returns:
        The number, 0 if already the first step may pass the limit.

    Raises:
        ValueError: `move` is not positive, or `limit` is not finite.

    Example:

    >>> steps_within(1.0, 1.0, 0.01, limit=1.1)
    9
    """
    if not move > 0 or not math.isfinite(limit):
        raise ValueError(
            f"`move` must be positive and `limit` finite. Received: move={move}, limit={limit}."
        )
    count = max(int((limit - norm) / (overlap * move)) + 1, 0)  # not below by rounding alone
    while count and growth_upper_bound(norm, frobenius, [move] * count, overlap) > limit:
        count -= 1
    return count
