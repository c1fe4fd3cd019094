"""How steep attention by l2 distances is."""

import math

from tf_lyapunov.theory.arguments import finite_float

# Relative room for a handful of float64 operations and the tolerance of the bisection.
_ROOM = 1e-9


def mean_distance_upper_bound(count):
    """c with c·e^(c+1) = count - 1, rounded up: bounds the mean distance under its own softmax.

    For t_1 = 0 and any t_2, …, t_N ≥ 0, p = softmax(-t),

        Σ_j p_j t_j ≤ c,   c·e^(c+1) = N - 1,                                                  (1)

    and c is reached. Proof: the sum is at most c if and only if Σ_{j≥2} e^(-t_j)(t_j - c) ≤ c; each
    term is largest at t_j = c + 1, where it is e^(-c-1), so that the left side is at most
    (N - 1)e^(-c-1) = c.

    Args:
        count: N ≥ 1.

    Returns:
        float.

    Example:

    >>> round(mean_distance_upper_bound(2), 4), mean_distance_upper_bound(1)
    (0.2785, 0.0)

    Reference: Kim, Papamakarios, Mnih, The Lipschitz constant of self-attention (2021).
    """
    if finite_float("count", count) < 1:
        raise ValueError(f"`count` must be at least 1. Received: count={count!r}.")
    if count == 1:
        return 0.0
    low, high = 0.0, math.log(count) + 1
    for _ in range(100):
        middle = (low + high) / 2
        if middle * math.exp(middle + 1) < count - 1:
            low = middle
        else:
            high = middle
    return high * (1 + _ROOM)


def l2_attention_gain(count):
    """Bound on the gain of y ↦ P y, P = softmax over j of -‖y_i - y_j‖²/s, of `count` vectors.

        ‖h(y) - h(y')‖ ≤ (√((N+1)/2) + 2c + 2√(c κ (N - 1))) ‖y - y'‖,   N = count,            (2)

    in the l2 norm over all vectors, for every s > 0 and all y, y', with c of (1) for N and κ of (1)
    for 2; 1 for N = 1.

    Proof. With u_ij = y_j - y_i and the mean ū_i = Σ_j P_ij u_ij the derivative is

        dh_i = Σ_j P_ij dy_j + (2/s) C_i dy_i - (2/s) Σ_j P_ij (u_ij - ū_i) u_ijᵀ dy_j,

    C_i = Σ_j P_ij (u_ij - ū_i)(u_ij - ū_i)ᵀ. By (1) with t_ij = ‖u_ij‖²/s the mean of ‖u_ij‖² is at
    most sc in every row. First term: rows of P sum to 1, its diagonal holds the largest entry of
    every row, so that others are at most ½, columns sum to at most 1 + (N-1)/2, and
    ‖P‖₂ ≤ √(largest row sum · largest column sum). Second: ‖C_i‖ ≤ tr C_i ≤ sc. Third: by Cauchy's
    inequality row i is at most √‖C_i‖·√(Σ_j P_ij ‖u_ij‖² ‖dy_j‖²), and the squares of all rows
    together at most sc·Σ_j ‖dy_j‖² Σ_i P_ij ‖u_ij‖², where P_ij t_ij ≤ t_ij/(1 + e^(t_ij)) ≤ κ,
    which vanishes for i = j.

    Example:

    >>> l2_attention_gain(1), 2.3 < l2_attention_gain(2) < 2.4
    (1.0, True)

    Reference: Kim, Papamakarios, Mnih (2021), whose constant is √N(4c + 1). Sound form, smaller.
    """
    c, kappa = mean_distance_upper_bound(count), mean_distance_upper_bound(2)
    if count == 1:
        return 1.0
    third = 2 * math.sqrt(c * kappa * (count - 1))
    return (math.sqrt((count + 1) / 2) + 2 * c + third) * (1 + _ROOM)
