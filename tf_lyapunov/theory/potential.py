"""Convex potential layers and their kin: gains of maps x ↦ x - W t φ(Wᵀx + b) and 2Aᵀ φ(Bx + b).

For a pair of inputs, an activation with slopes in [α, β] acts on the difference as a diagonal
matrix D with αI ⪯ D ⪯ βI. Everything here follows from that and from W alone: no gradient flow,
no convexity and no smoothness of φ is needed.
"""

import math
from fractions import Fraction

import numpy as np

from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF, round_up


def flow_step(x, kernel, bias, activation, scale=None):
    """One explicit step along the gradient of a convex potential.

        z = x - t·Wᵀφ(Wx + b),   t = 2/‖W‖² unless given                                     (1)

    With a fixed t it is the relaxed layer of Appendix D.2, whose gain has no bound of its own.

    Args:
        x: `(n, d)` inputs, one per row.
        kernel: `(d, m)`, W transposed: Wx is `x @ kernel`.
        bias: `(m,)`.
        activation: function φ of arrays.
        scale: t, a float or one per hidden unit, `(m,)`.

    Returns:
        `(n, d)` float64.

    Example:

    >>> flow_step(np.array([[3.0]]), np.array([[2.0]]), 0.0, lambda h: np.maximum(h, 0))
    array([[-3.]])

    Reference: Meunier et al. (2022), Proposition 3 and equation (6); as published.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    if scale is None:
        scale = 2 / np.linalg.norm(kernel, 2) ** 2
    return x - (scale * activation(x @ kernel + bias)) @ kernel.T


def flow_step_gain_upper_bound(norm, beta=1.0):
    """Gain of x ↦ x - W t φ(Wᵀx + b) from the norm of W·√t, for slopes of φ in [0, β].

        J = I - (W√t) D (W√t)ᵀ is symmetric with eigenvalues in [1 - β‖W√t‖², 1]:
        ‖J‖ ≤ max(1, β‖W√t‖² - 1)                                                            (2)

    Attained where D = βI is. Hence 1 exactly when β‖W√t‖² ≤ 2: for t = 2/‖W‖², and for t = 2/T
    with a diagonal T ⪰ WᵀW.

    Args:
        norm: upper bound on ‖W√t‖, at least 0.
        beta: largest slope, at least 0; all slopes must be at least 0.

    Returns:
        float, rounded up.

    Raises:
        ValueError: if an argument is negative or not finite.

    Example:

    >>> flow_step_gain_upper_bound(2**0.5), flow_step_gain_upper_bound(2.0)
    (1.0000000000000004, 3.0)

    Reference: sound form of Meunier et al. (2022), Proposition 3, for every step.
    """
    if not (math.isfinite(norm) and norm >= 0 and math.isfinite(beta) and beta >= 0):
        raise ValueError(
            f"`norm` and `beta` must be finite and at least 0. Received: norm={norm}, beta={beta}."
        )
    exact = Fraction(float(beta)) * Fraction(float(norm)) ** 2 - 1
    return max(1.0, round_up(exact))


def flow_gain_upper_bound(kernel, scale, linear_map=None, *, beta=1.0, gain=1.0):
    """Gain of x ↦ g·(x - W t φ(Wᵀx + b)) from its weights: (2), times g.

    Args:
        kernel: W transposed in Keras' layout, dense `(d, m)` or convolution `(*k, d, m)`.
        scale: t ≥ 0, a float or one per hidden channel, `(m,)`.
        linear_map: `LinearMap` of the convolution; `None` for a matrix.
        beta: largest slope of φ; all slopes must be at least 0.
        gain: g ≥ 0.

    Returns:
        float, rounding included.

    Raises:
        ValueError: if a weight is not finite or a scale is negative.

    Example:

    >>> bool(1.0 <= flow_gain_upper_bound(np.diag([2.0, 1.0]), 0.5) < 1.0 + 1e-12)
    True

    Reference: Meunier et al. (2022) and Araujo et al. (2023), Theorem 3; sound form.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    scale = np.asarray(scale, dtype=np.float64)
    if not np.all(np.isfinite(scale)) or np.any(scale < 0):
        raise ValueError("`scale` must be finite and at least 0. Received: a scale that is not.")
    linear_map = linear_map or LinearMap("dense", kernel.shape[:1])
    norm = norm_upper_bound(kernel * np.sqrt(scale), linear_map).value
    # Two roundings per entry, ΔW ≤ 2u|W|: in norm at most 2u·√taps·‖W‖_F, all taps together.
    taps = math.prod(kernel.shape[:-2])
    norm += 4 * UNIT_ROUNDOFF * math.sqrt(taps) * np.linalg.norm(kernel * np.sqrt(scale))
    step = flow_step_gain_upper_bound(float(np.nextafter(norm, np.inf)), beta)
    return round_up(Fraction(step) * Fraction(float(gain)))


def schur_diagonal(gram, q):
    """Diagonal T ⪰ G from the row sums of a symmetric G and any positive q.

        T_i = Σ_j |G_ij|·q_j/q_i                                                             (3)

    (T - G is similar, by diag(q), to a matrix that is dominated by its diagonal.) With G = WᵀW,
    x - 2W T⁻¹ φ(Wᵀx + b) has gain at most 1.

    Args:
        gram: `(m, m)`; of a convolution: entries summed in modulus over all lags.
        q: `(m,)` positive.

    Returns:
        `(m,)` float64.

    Example:

    >>> schur_diagonal(np.array([[2.0, -1.0], [-1.0, 2.0]]), np.array([1.0, 2.0]))
    array([4. , 2.5])

    Reference: Araujo et al., A Unified Algebraic Perspective on Lipschitz Neural Networks (2023),
    Theorem 3; as published.
    """
    return np.abs(gram) @ q / q


def sandwich_gain_upper_bound(inner, outer, weights, *, beta=1.0, gain=1.0):
    """Gain of x ↦ g·P φ(Q x + b) from its weights and any positive weights θ of hidden units.

        ‖P D Q‖ ≤ (β/2)·‖[θ⁻¹Pᵀ, θQ]‖²   for 0 ⪯ D ⪯ βI                                      (4)

    Let M = [θ⁻¹Pᵀ, θQ] and N = MᵀDM, so that 0 ⪯ N ⪯ β‖M‖²I: then N - (β/2)‖M‖²I has norm at
    most (β/2)‖M‖², and PDQ is one of its blocks. P and Q may hold one block per frequency.

    Args:
        inner: `(..., d, m)` Q transposed, real: complex blocks R + iJ as [[R, J], [-J, R]].
        outer: `(..., m, k)` P transposed.
        weights: `(m,)` θ, positive.
        beta: largest slope of φ; all slopes must be at least 0.
        gain: g ≥ 0.

    Returns:
        float: the largest over the leading axes, rounding included.

    Raises:
        ValueError: if a weight is not finite or θ is not positive.

    Example:

    >>> root = np.sqrt([[1.0]])
    >>> bool(1.0 <= sandwich_gain_upper_bound(root, root, [1.0]) < 1.0 + 1e-12)
    True

    Reference: Wang and Manchester, Direct Parameterization of Lipschitz-Bounded Deep Networks
    (2023), Theorem 3.2; sound form for weights that are only nearly orthogonal.
    """
    inner, outer = np.asarray(inner, dtype=np.float64), np.asarray(outer, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    if not (np.all(np.isfinite(weights)) and np.all(weights > 0)):
        raise ValueError("`weights` must be finite and positive. Received: one that is not.")
    stacked = np.concatenate([np.swapaxes(outer, -1, -2) / weights, inner * weights], axis=-2)
    blocks = stacked.reshape(-1, *stacked.shape[-2:])
    dense = LinearMap("dense", stacked.shape[-2:-1])
    norm = max(norm_upper_bound(b, dense).value for b in blocks)
    norm += 2 * UNIT_ROUNDOFF * max(np.linalg.norm(b) for b in blocks)
    half = Fraction(float(beta)) * Fraction(float(gain)) / 2
    return round_up(half * Fraction(float(np.nextafter(norm, np.inf))) ** 2)
