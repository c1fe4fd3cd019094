"""Weights of recurrent equilibrium networks that satisfy a supply rate whatever their values are.

    x⁺ = A x + B₁ w + B₂ u + b_x,   v = C₁ x + D₁₁ w + D₁₂ u + b_v,   w = φ(v),
    y = C₂ x + D₂₁ w + D₂₂ u + b_y                                                           (1)

φ elementwise with slopes in [0, 1]. For two trajectories of (1), their differences Δ, and any
matrices E, P ≻ 0 and diagonal Λ ≻ 0, let F = EA, and let bold letters hold the equations of x⁺ and
v multiplied by E and by Λ. Then V(Δx) = ΔxᵀEᵀP⁻¹EΔx satisfies V⁺ - V ≤ |Δu|² - |Δy|² if

    ⎡ E+Eᵀ-P   -𝐂₁ᵀ           0      ⎤
    ⎢ -𝐂₁      2Λ-𝐃₁₁-𝐃₁₁ᵀ    -𝐃₁₂   ⎥ - [𝐅 𝐁₁ 𝐁₂]ᵀP⁻¹[𝐅 𝐁₁ 𝐁₂] - [C₂ D₂₁ D₂₂]ᵀ[C₂ D₂₁ D₂₂] ⪰ 0  (2)
    ⎣ 0        -𝐃₁₂ᵀ          I      ⎦

because V⁺ = |𝐅Δx + 𝐁₁Δw + 𝐁₂Δu|² in the metric P⁻¹, EᵀP⁻¹E ⪰ E + Eᵀ - P (from
(E-P)ᵀP⁻¹(E-P) ⪰ 0), and 2ΔwᵀΛ(Δv - Δw) ≥ 0 by the slopes of φ. By Schur complements over x⁺ and
u, (2) follows from

    H ⪰ XᵀX + K(I - D₂₂ᵀD₂₂)⁻¹Kᵀ + GᵀG,   G = [C₂ D₂₁ 0],   Kᵀ = [-D₂₂ᵀC₂, -D₂₂ᵀD₂₁ - 𝐃₁₂ᵀ, 𝐁₂ᵀ],

    H = ⎡ E+Eᵀ-P   -𝐂₁ᵀ          𝐅ᵀ  ⎤
        ⎢ -𝐂₁      2Λ-𝐃₁₁-𝐃₁₁ᵀ   𝐁₁ᵀ ⎥                                                       (3)
        ⎣ 𝐅        𝐁₁            P   ⎦

for some X. So X, 𝐁₂, 𝐃₁₂, C₂, D₂₁ and ‖D₂₂‖ < 1 are free, and (3) is read as a definition of the
rest. D₁₁ is strictly lower block triangular, so that w is computed block by block: within a block
the entries of H are dominated by the diagonal, Σ_j|H_ij|√(H_jj/H_ii) at i, and D₁₁ takes those
below the blocks. In
general (2Λ - 𝐃₁₁ - 𝐃₁₁ᵀ = H₂₂ alone is asked for) w solves an equation: with Λ = ½diag H₂₂,

    𝐃₁₁ = Λ - ½(H₂₂ + √Λ(Y - Yᵀ)√Λ),                                                        (4)

and w = φ(D₁₁w + b) has one solution, for I - D₁₁ is strongly monotone in the metric Λ, and φ is
the resolvent of a monotone map there. Another supply rate is the same in other coordinates
(`feedthrough_form`):

    s(Δu, Δy) = |root·Δu|² - |half⁻¹(Δy - center·Δu)|²,

so u is replaced by root·u, and y by center·u + half·y. Contraction at rate a has P/a² for P in the
first block of (2), its first two block rows and columns alone, and C₂, D₂₁, D₂₂ free.

(3) holds for whatever X, 𝐁₂ and C₂ are, rounded ones too. So states are turned first, by a T with
Tᵀ(H₁₁ + P/a²)T = 2I as far as rounding lets it, and (3) is read in the new coordinates: however
ill-conditioned X is, E there is near I, and no error of T is one of (2).

Reference: Revay, Wang and Manchester (2024), Recurrent Equilibrium Networks; in sound form: a
margin keeps (2) in floating point, in coordinates where rounding is small; blocks are dominated.
"""

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.spectral.orthogonal import accretive_inverse
from tf_lyapunov.spectral.precision import full_precision

# Share of H's diagonal, times the root of its size, that is added to it: (2) must survive the
# rounding of E⁻¹ and Λ⁻¹. In balanced coordinates what is rounded is of the size of the diagonal
# entries it stands between, so that a few units of roundoff times the size would do: 330 here.
MARGIN = {"float32": 2e-5, "float64": 1e-9}
# A diagonal of zeros; the smallest square; skew parts of E in units of its symmetric part.
FLOOR, TINY, LARGEST_SKEW = 1e-6, 1e-30, 4.0
# Share of the diagonal of H₂₂ added to it in (4): how monotone I - D₁₁ is at least.
MONOTONE = 0.25
# Squares of weights, times the sizes of sums, stay within float32.
LARGEST = 1e15


def block_bounds(neurons, blocks):
    """Limits of the blocks of D₁₁: `blocks` of nearly equal sizes.

    >>> block_bounds(5, 2)
    [0, 3, 5]
    """
    sizes = [len(part) for part in np.array_split(np.arange(neurons), blocks)]
    return np.concatenate([[0], np.cumsum(sizes)]).tolist()


def equilibrium_weights(x, skew, signals, feedthrough, bounds, rate=None, caution=1.0, inner=None):
    """Weights of (1) from free matrices, in the coordinates of the unit gain.

    Args:
        x: X, (r, 2·states + neurons), columns of x, w and x⁺.
        skew: (states, states); its skew part is that of E.
        signals: `(B₂, D₁₂, C₂, D₂₁)` times E and Λ as in (3): (states, inputs), (neurons, inputs),
            (outputs, states), (outputs, neurons).
        feedthrough: D₂₂ of norm below 1, (outputs, inputs).
        bounds: of `block_bounds`.
        rate: a for contraction alone, or None for the gain.
        caution: factor of `MARGIN`.
        inner: Y of (4), (neurons, neurons), or None for a D₁₁ that is lower block triangular.

    Returns:
        `[A, B₁, B₂, C₁, D₁₁, D₁₂, C₂, E, P, Λ, (2I - D₁₁)⁻¹]`, tensors, Λ as a vector, the last one
        with (4) alone; NaN for weights that are not finite, or above `LARGEST`.
    """
    # Factorisations of NaN raise errors on some backends and not on others.
    given = [x, skew, feedthrough, *signals] + ([] if inner is None else [inner])
    (x, skew, feedthrough, b2, d12, c2, d21, *rest), mark = _finite(*given)
    inner = rest[0] if rest else None
    n, q = b2.shape[0], d12.shape[0]
    dtype = keras.backend.standardize_dtype(x.dtype)
    margin = caution * MARGIN[dtype] * math.sqrt(2 * n + q)
    squared = 1.0 if rate is None else rate**2
    eye = ops.eye(n, dtype=dtype)
    with full_precision():
        h = ops.matmul(ops.transpose(x), x)
        supplied = None
        if rate is None:
            supplied = _Supplied(d12, d21, feedthrough)
            h = h + supplied(b2, c2)
        # More rows of X, so that T is known where X has a kernel.
        rest = ops.sqrt(margin * (ops.diagonal(h) + FLOOR))
        x = ops.concatenate([x, ops.diag(rest)], axis=0)
        sizes = ops.square(rest[:n]), ops.square(rest[n + q :])
        before = h[:n, :n] + ops.diag(sizes[0])
        after = h[n + q :, n + q :] + ops.diag(sizes[1])
        root = ops.cholesky((before + after / squared) / 2)
        turn = ops.solve_triangular(root, eye, lower=True)
        turned = ops.transpose(turn)
        x = ops.concatenate(
            [
                ops.matmul(x[:, :n], turned),
                x[:, n : n + q],
                ops.matmul(x[:, n + q :], turned),
            ],
            axis=1,
        )
        b2, c2 = ops.matmul(turn, b2), ops.matmul(c2, turned)
        h = ops.matmul(ops.transpose(x), x)
        if rate is None:
            h = h + supplied(b2, c2)
        within = h[n : n + q, n : n + q]
        within = within + ops.diag(margin * ops.diagonal(within))
        p = h[n + q :, n + q :] + margin * squared * eye
        e = (h[:n, :n] + margin * eye + p / squared) / 2 + _limited_skew(skew)
        driven = ops.concatenate([h[n + q :, : n + q], b2], axis=1)
        explicit = ops.matmul(accretive_inverse(e), driven)
        resolvent = []
        if inner is None:
            multipliers = _dominating(within, bounds) / 2
            below = ops.convert_to_tensor(_below(bounds), dtype=dtype)
            between = -within * below
        else:
            within = within + ops.diag(MONOTONE * ops.diagonal(within))
            multipliers = ops.diagonal(within) / 2
            t = ops.sqrt(multipliers)
            scaled = within / t / ops.expand_dims(t, 1) / 2 + _limited_skew(inner) / 2
            turns = ops.expand_dims(t, 1) * (ops.eye(q, dtype=dtype) - scaled) * t
            between = turns
            inverse = accretive_inverse(ops.eye(q, dtype=dtype) + scaled)
            resolvent = [inverse * t / ops.expand_dims(t, 1)]
        rows = ops.concatenate([-h[n : n + q, :n], between, d12], axis=1)
        rows = rows / ops.expand_dims(multipliers, 1)
    a, b1, b2 = explicit[:, :n], explicit[:, n : n + q], explicit[:, n + q :]
    c1, d11, d12 = rows[:, :n], rows[:, n : n + q], rows[:, n + q :]
    found = a, b1, b2, c1, d11, d12, c2, e, p, multipliers, *resolvent
    return [v * mark for v in found]


def _finite(*tensors):
    """The tensors, or zeros for all where an entry is not below `LARGEST`; and 1, or NaN."""
    fits = ops.convert_to_tensor(True)
    for tensor in tensors:
        # False for NaN.
        fits = ops.logical_and(fits, ops.all(ops.abs(ops.stop_gradient(tensor)) < LARGEST))
    kept = [ops.where(fits, tensor, ops.zeros_like(tensor)) for tensor in tensors]
    one = ops.ones((), dtype=tensors[0].dtype)
    return kept, ops.where(fits, one, one * float("nan"))


def _limited_skew(skew):
    """Skew part of E, of norm below `LARGEST_SKEW`: E⁻¹ is well known."""
    skew = skew - ops.transpose(skew)
    norm = ops.sqrt(ops.sum(ops.square(skew)) + TINY)
    return skew * (LARGEST_SKEW / (LARGEST_SKEW + norm))


class _Supplied:
    """K(I - D₂₂ᵀD₂₂)⁻¹Kᵀ + GᵀG of (3), a function of 𝐁₂ and C₂."""

    def __init__(self, d12, d21, feedthrough):
        self._d12, self._d21 = d12, d21
        self._turned = ops.transpose(feedthrough)
        eye = ops.eye(feedthrough.shape[1], dtype=d12.dtype)
        self._inverse = accretive_inverse(eye - ops.matmul(self._turned, feedthrough))

    def __call__(self, b2, c2):
        zero = ops.zeros((c2.shape[0], b2.shape[0]), dtype=b2.dtype)
        g = ops.concatenate([c2, self._d21, zero], axis=1)
        k = ops.concatenate(
            [
                -ops.matmul(self._turned, c2),
                -ops.matmul(self._turned, self._d21) - ops.transpose(self._d12),
                ops.transpose(b2),
            ],
            axis=1,
        )
        through = ops.matmul(ops.transpose(k), ops.matmul(self._inverse, k))
        # Symmetric to the last bit, as (3) takes it.
        return ops.matmul(ops.transpose(g), g) + (through + ops.transpose(through)) / 2


def _dominating(h, bounds):
    """Diagonal d with diag(d) ⪰ the diagonal blocks of h.

    d_i = Σ_j |h_ij|·t_j/t_i over the block of i, with t = √h_jj: diag(d) - h is diagonally dominant
    after scaling by t.
    """
    t = ops.sqrt(ops.diagonal(h))
    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        block, scale = h[start:end, start:end], t[start:end]
        relative = ops.abs(block) / scale / ops.expand_dims(scale, 1)
        parts.append(ops.sum(relative, axis=1) * ops.square(scale))
    return ops.concatenate(parts) if len(parts) > 1 else parts[0]


def _below(bounds):
    """Mask of the entries left of the diagonal blocks."""
    block = np.searchsorted(bounds, np.arange(bounds[-1]), side="right")
    return block[:, None] > block[None, :]
