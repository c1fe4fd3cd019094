"""(5) Lower bounds on minimal adversarial perturbations, layer by layer, sound and as published.

If every change of class needs the input of layer l+1 to move by at least κ, a layer rule says by
how much, κ', the input of layer l has to move. Sound rules start from ‖h(x+r) - h(x)‖ ≥ κ alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sound rules round a few dozen float64 operations; this covers them, on the safe side.
_DOWN, _UP = 1 - 1e-12, 1 + 1e-12


# ------------------------------------------------------------------------------------ output layer


def output_lower_bound(logits, weights, labels):
    """Distance from h(x) to the nearest input of the output layer that another class wins.

        κ = min_{j≠c} (f_c - f_j) / ‖w_c - w_j‖

    Necessary and sufficient (exact), for logits f = Wᵀh + b.

    Args:
        logits: float64 (n, K).
        weights: float64 (features, K), K ≥ 2.
        labels: int (n,), the classes c; 0 where c is not the largest logit.

    Returns:
        float64 (n,), rounded down; infinite where no class can win.

    Example:

    >>> output_lower_bound([[3.0, 0.0]], [[1.0, -2.0]], [0]).round(9).tolist()
    [1.0]

    Reference: Peck et al., Lemma 3.5 (as published; exact for linear classifiers).
    """
    logits, weights = (np.asarray(v, dtype=np.float64) for v in (logits, weights))
    labels = np.asarray(labels)
    bound = np.empty(len(logits))
    for label in np.unique(labels):
        mine = labels == label
        gaps = np.delete(logits[mine, label, None] - logits[mine], label, axis=1)
        columns = np.delete(weights[:, label, None] - weights, label, axis=1)
        sizes = np.linalg.norm(columns, axis=0) * (1 + len(weights) * 2.0**-52)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(gaps > 0, np.where(sizes > 0, gaps / sizes, np.inf), 0.0)
        bound[mine] = ratios.min(axis=1) * _DOWN
    return bound


# ------------------------------------------------------------------------------ smooth activations


@dataclass(frozen=True)
class Curvature:
    """Bounds of an activation's first and second derivative: |g'| ≤ slope, |g''| ≤ bend.

    Example:

    >>> Curvature.of("sigmoid").slope, round(Curvature.of("tanh").bend, 6)
    (0.25, 0.7698)
    """

    slope: float
    bend: float

    @classmethod
    def of(cls, name: str) -> Curvature:
        """Bounds of a named activation; ReLU has no second derivative and is refused.

        Reference: Peck et al., Table 4.1, computed from the derivatives' stationary points.
        """
        if name not in _CURVATURES:
            raise ValueError(
                f"No bound on the second derivative is known. Received: {name!r}. "
                f"Smooth activations: {', '.join(_CURVATURES)}."
            )
        slope, bend = _CURVATURES[name]
        return cls(slope, bend * _UP)


# |g''| is largest where tanh² = 1/3, where σ = (3 ± √3)/6, and for softplus at 0.
_CURVATURES = {
    "linear": (1.0, 0.0),
    "sigmoid": (0.25, 1 / (6 * math.sqrt(3))),
    "tanh": (1.0, 4 / (3 * math.sqrt(3))),
    "softplus": (1.0, 0.25),
    "log_sigmoid": (1.0, 0.25),
}


def smooth_activations() -> tuple[str, ...]:
    """Names that `Curvature.of` knows."""
    return tuple(_CURVATURES)


# ------------------------------------------------------------------------------ dense smooth stacks


def hessian_norm_bounds(weights: Sequence, curvatures: Sequence[Curvature]):
    """Bounds on the spectral norms of the Hessians of a dense stack's outputs, over all inputs.

    For z_l = g_l(V_l z_{l-1} + b_l), unit i of layer l,

        H_i = B_l·G_i² + A_l·Σ_j |v_ij|·H_j,   G_i ≥ sup‖∇(v_i·z_{l-1})‖,

    with G_i = min(‖v_i‖·Lip(z_{l-1}), Σ_j |v_ij|·A_{l-1}·G_j). Sufficient.

    Args:
        weights: V_l, float64 (outputs, inputs), from the input on.
        curvatures: one per layer.

    Returns:
        `(H, lipschitz)`: float64 (outputs of the last layer,), and a bound on the stack's gain.

    Example:

    >>> bounds, gain = hessian_norm_bounds([np.array([[2.0]])], [Curvature.of("softplus")])
    >>> round(float(bounds[0]), 6), round(gain, 6)
    (1.0, 2.0)

    Reference: Peck et al., Theorem 4.4, sound form (norms in place of entrywise bounds).
    """
    lipschitz, bends, gradients = 1.0, None, None
    for weight, curvature in zip(weights, curvatures, strict=True):
        weight = np.asarray(weight, dtype=np.float64)
        size = np.abs(weight)
        through = np.linalg.norm(weight, axis=1) * lipschitz
        if gradients is not None:
            through = np.minimum(through, size @ gradients)
        own = curvature.bend * through**2
        bends = own if bends is None else own + curvature.slope * (size @ bends)
        bends, gradients = bends * _UP, curvature.slope * through * _UP
        norm = min(np.linalg.norm(weight, 2), np.linalg.norm(weight)) * _UP
        lipschitz = min(lipschitz * norm * curvature.slope, float(np.linalg.norm(gradients))) * _UP
    return bends, float(lipschitz)


def smooth_lower_bound(kappa, jacobian_norm, hessian_norm, lipschitz=math.inf):
    """How far the input of a twice differentiable map has to move to move its output by κ.

    By Taylor's theorem κ ≤ ‖h(x+r) - h(x)‖ ≤ ‖J‖·‖r‖ + M‖r‖²/2, hence

        ‖r‖ ≥ 2κ / (‖J‖ + √(‖J‖² + 2Mκ)),   and   ‖r‖ ≥ κ/Lip.                        (5.1)

    Args:
        kappa: κ ≥ 0, number or array.
        jacobian_norm: upper bound on ‖J(x)‖.
        hessian_norm: M, the root of the sum of squares of `hessian_norm_bounds`.
        lipschitz: upper bound on the map's gain.

    Returns:
        float64, the larger of the two, rounded down; infinite if the output cannot move.

    Example:

    >>> float(smooth_lower_bound(1.5, 1.0, 1.0)).__round__(9)
    1.0

    Reference: Peck et al., Theorem 4.2, sound form.
    """
    kappa, jacobian_norm = np.asarray(kappa, np.float64), np.asarray(jacobian_norm, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Without squares, whose underflow would make the bound larger.
        bend = np.sqrt(2 * hessian_norm) * np.sqrt(kappa)
        half = (jacobian_norm + np.hypot(jacobian_norm, bend)) / 2
        taylor = np.where(half > 0, kappa / half, np.inf)
        linear = np.where(lipschitz > 0, kappa / np.maximum(lipschitz, 1e-300), np.inf)
    # Overflow makes of (5.1) infinity over infinity, which the linear bound need not share.
    bound = np.where(kappa < np.inf, np.fmax(taylor, linear) * _DOWN, np.inf)
    return np.where(kappa > 0, bound, 0.0)


# ---------------------------------------------------------------------------------- other layers


def convolution_gain_bound(kernel, strides, dilation=1):
    """Upper bound √(Π⌈q·gcd(s,d)/s⌉)·‖W‖_F on the norm of a convolution: a cell is read that often.

    Args:
        kernel: (*window, in, out).
        strides, dilation: one number, or one per axis.

    Example:

    >>> kernel = np.ones((5, 5, 1, 1))
    >>> round(convolution_gain_bound(kernel, 1), 9), float(np.linalg.norm(kernel))
    (25.0, 5.0)

    Reference: Peck et al., Theorem 2, sound form for overlapping patches.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    axes = kernel.ndim - 2
    strides, dilation = (np.broadcast_to(v, axes).tolist() for v in (strides, dilation))
    overlap = math.prod(
        math.ceil(q * math.gcd(s, d) / s)
        for q, s, d in zip(kernel.shape[:axes], strides, dilation, strict=True)
    )
    return math.sqrt(overlap) * float(np.linalg.norm(kernel)) * (1 + kernel.size * 2.0**-52)


def batch_normalization_gain(gamma, variance, epsilon):
    """max_j |γ_j|/√(var_j + e), rounded up: the gain of batch normalization at inference.

    Reference: Peck et al., Theorem 5, sound form.
    """
    gamma, variance = np.asarray(gamma, np.float64), np.asarray(variance, np.float64)
    return float(np.max(np.abs(gamma) / np.sqrt(variance + epsilon))) * _UP


def response_normalization_gain(k, alpha, beta, window, largest=math.inf):
    """Upper bound on the gain of b_i = a_i·(k + α·Σ a_j²)^(-β), j in a window around i.

        k^-β·(1 + 2β·g·√w),  g = (β/(1+β))^(β+1)/β,   and, for |a| ≤ A,
        k^-β + 2αβ·w·A²·k^(-β-1).

    The Jacobian is diag(s^-β) minus a matrix whose rows have norm at most 2β·t(k+t)^(-β-1), with
    t = αΣa_j² ≤ αwA², and whose columns have w entries; t(k+t)^(-β-1) is largest at t = k/β.

    Args:
        k, alpha, beta: k > 0, α ≥ 0, β ≥ 0 (α is not divided by the window).
        window: w, number of channels summed over.
        largest: A.

    Returns:
        float, the smaller of the two, rounded up.

    Example:

    >>> round(response_normalization_gain(2.0, 0.0, 0.75, 5), 6) == round(2.0**-0.75, 6)
    True
    >>> response_normalization_gain(2.0, 1e-4, 0.75, 5) > response_normalization_gain(
    ...     2.0, 1e-4, 0.75, 5, largest=1.0)
    True

    Reference: Peck et al., Theorem 6, sound form.
    """
    if not (k > 0 and alpha >= 0 and beta >= 0 and window >= 1 and math.isfinite(k)):
        raise ValueError(
            "Local response normalization needs k > 0, alpha ≥ 0, beta ≥ 0 and a window ≥ 1. "
            f"Received: k={k}, alpha={alpha}, beta={beta}, window={window}."
        )
    scale = k**-beta
    if alpha == 0 or beta == 0:
        return scale * _UP
    peak = (beta / (1 + beta)) ** (beta + 1) / beta
    anywhere = scale * (1 + 2 * beta * peak * math.sqrt(window))
    within = scale + 2 * alpha * beta * window * largest**2 * k ** (-beta - 1)
    return min(anywhere, within) * _UP


def lp_pooling_gain(overlap, window, p):
    """Upper bound on the gain of Lp pooling (Σ|x|^p)^(1/p) over windows of q cells.

    ‖·‖_p is 1-Lipschitz in l2 for p ≥ 2, and q^(1/p - 1/2)-Lipschitz for 1 ≤ p < 2; every cell is
    in at most `overlap` windows.

    Example:

    >>> lp_pooling_gain(1, 4, 2.0), round(lp_pooling_gain(4, 4, 1.0), 9)
    (1.0, 4.0)

    Reference: Peck et al., Theorem 4, sound form.
    """
    if not p >= 1:
        raise ValueError(f"Lp pooling needs p ≥ 1. Received: p={p!r}.")
    exponent = max(1 / p - 0.5, 0.0)
    exact = exponent == 0 and math.isqrt(overlap) ** 2 == overlap
    return math.sqrt(overlap) * window**exponent * (1.0 if exact else _UP)


# ----------------------------------------------------------------------------------- as published


#: (A, B) of Table 4.1 and of its text. tanh's B is half of max |tanh''|, and ReLU has none.
CURVATURES_AS_PUBLISHED = {
    "sigmoid": (0.25, (5 - 3 * math.sqrt(3)) / (30 * math.sqrt(3) - 54)),
    "tanh": (1.0, math.sinh(math.log(2 + math.sqrt(3)) / 2)
             / math.cosh(math.log(2 + math.sqrt(3)) / 2) ** 3),
    "softplus": (1.0, 0.25),
    "relu": (1.0, 1.0),
}  # fmt: skip


def second_derivative_bound_as_published(weights: Sequence, curvatures: Sequence):
    """M of Algorithm 4.1: M_i = B_i·N²·s² + A_i·M·s, N_i = A_i·N·s, s the largest row sum.

    Meant for single second derivatives, from which Theorem 4.2 does not follow: it needs norms of
    Hessians. As s is an l1 norm, N also bounds the gradients' norms and M those of the Hessians, so
    that the algorithm is sound wherever (A, B) are right, that is for sigmoid and softplus.

    Args:
        weights: V_l, (outputs, inputs).
        curvatures: (A_l, B_l), see `CURVATURES_AS_PUBLISHED`.

    Example:

    >>> second_derivative_bound_as_published([np.array([[1.0, -2.0]])], [(1.0, 1.0)])
    9.0

    Reference: Peck et al., Algorithm 4.1, as published.
    """
    m, n = np.float64(0.0), np.float64(1.0)  # which overflow to infinity
    for weight, (slope, bend) in zip(weights, curvatures, strict=True):
        s = float(np.abs(weight).sum(axis=1).max())
        with np.errstate(over="ignore", invalid="ignore"):
            m, n = bend * n**2 * s**2 + slope * m * s, slope * n * s
    return float(m)


def dense_bound_as_published(kappa, jacobian_norm, second_derivative, outputs):
    """κ' = (√(‖J‖² + 2M√n·κ) - ‖J‖)/(M√n). Reference: Theorems 1 and 4.2, as published."""
    scale = second_derivative * math.sqrt(outputs)
    kappa, jacobian_norm = np.asarray(kappa, np.float64), np.asarray(jacobian_norm, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        bound = (np.sqrt(jacobian_norm**2 + 2 * scale * kappa) - jacobian_norm) / scale
        linear = kappa / jacobian_norm  # the limit for M = 0
    if scale == 0:
        return np.where(kappa > 0, linear, 0.0)
    return np.where(scale < np.inf, bound, 0.0)


def convolution_bound_as_published(kappa, kernel):
    """κ/‖W‖_F, which overlapping patches violate. Reference: Theorem 2, as published."""
    return kappa / np.linalg.norm(kernel)


def pooling_bound_as_published(kappa, side, window=1, p=None):
    """κ/t, or κ/(t·q^(2/p)) for Lp pooling, t the output's side, q the window's.

    Reference: Theorem 4, as published.
    """
    return kappa / (side * (1 if p is None else window ** (2 / p)))


def batch_normalization_bound_as_published(kappa, x, gamma, beta, mean, variance, epsilon):
    """max_j δ_j of Theorem 5, x (d,). The maximum is wrong: only min_j δ_j could be implied.

    Reference: Theorem 5, as published.
    """
    x, gamma, beta, mean = (np.asarray(v, np.float64) for v in (x, gamma, beta, mean))
    deviation = np.sqrt(np.asarray(variance, np.float64) + epsilon)
    output = gamma * (x - mean) / deviation + beta
    phi = gamma / deviation**2
    chi = 2 * gamma * (x - mean) + 2 * beta * deviation
    psi = (2 * kappa * np.linalg.norm(output) + kappa**2) / x.size
    root = np.sqrt((phi * chi) ** 2 + 4 * phi * gamma * psi)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.stack([root + phi * chi, root - phi * chi]) / (2 * phi * gamma)
    return float(np.nanmax(np.abs(ends).min(axis=0)))


def response_normalization_bound_as_published(kappa, x, k, alpha, beta, window):
    """max_a λ_a of Theorem 6 with M of Lemma 5.11, x (…, channels).

    The maximum over ∆ has the same fault as batch normalization's.

    Reference: Theorem 6, as published.
    """
    x = np.asarray(x, dtype=np.float64)
    channels, half = x.shape[-1], window // 2
    lines = x.reshape(-1, channels)
    squares = np.pad(np.cumsum(lines**2, axis=1), ((0, 0), (1, 0)))
    low = np.maximum(np.arange(channels) - half, 0)
    high = np.minimum(np.arange(channels) + half + 1, channels)
    total = squares[:, high] - squares[:, low]
    sums = k + alpha * total
    output = lines * sums**-beta
    factor = 2 * alpha * beta * np.abs(lines) * sums ** (-beta - 1)
    own = sums**-beta - factor * np.abs(lines)
    gradient = np.sqrt(own**2 + factor**2 * np.maximum(total - lines**2, 0))
    top = float(np.abs(x).max())
    bend = 2 * top * alpha * beta * k ** (-beta - 1)
    bend += (
        4 * top * alpha * beta * (top**2 * alpha * (beta + 1) * k ** (-beta - 2) + k ** (-beta - 1))
    )
    gap = np.abs(output) - (np.linalg.norm(output) + kappa) / math.sqrt(x.size)
    chosen = gap < 0
    root = np.sqrt(gradient[chosen] ** 2 - 2 * bend * gap[chosen])
    # (root - gradient)/bend without cancellation, also for bend = 0.
    return float(np.max(-2 * gap[chosen] / (root + gradient[chosen])))
