"""Polar factors by Björck-Bowie steps on Gram matrices, and Gram matrices with cheap gradients."""

import math

import numpy as np
from keras import ops

from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.gram import (
    PIECE,
    SAFE_TRACE,
    eigenvalue_upper_bound,
    product,
    product_terms,
    sum_of_squares,
    trace,
    unit_entries,
)
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# Power steps behind the guess that makes a bound tight.
STEERING_STEPS = 12
# Björck steps between two Gram matrices formed anew: each multiplies their rounding by 9/4.
GRAM_STEPS = 8
# A step from X shrinks every singular value of X up to 2 below 1.
LARGEST_START = 1.9


def differentiable_gram(matrix, axis=-2, partner=None, pieces=1):
    """WᵀW (`axis=-2`) or WWᵀ, with one product for the gradient W(Ḡ + Ḡᵀ) and not two.

    `partner`, a multiple of W, takes the place of one factor: see `partner_in_range`. The sums are
    cut into `pieces`, so that their rounding is γ of the length of a piece and their number.

    Example:

    >>> w = np.array([[1.0, 2.0], [0.0, 1.0]], "float32")
    >>> np.asarray(differentiable_gram(w)).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    matrix = ops.convert_to_tensor(matrix)
    partner = ops.stop_gradient(matrix if partner is None else partner)
    left, right = (v if axis == -2 else ops.swapaxes(v, -1, -2) for v in (partner, matrix))
    *batch, length, side = right.shape
    if pieces > 1:  # a reshape has a cheaper gradient than slices
        if length % pieces:
            pads = [[0, 0]] * len(batch) + [[0, -length % pieces], [0, 0]]
            left, right = ops.pad(left, pads), ops.pad(right, pads)
        left, right = (ops.reshape(v, (*batch, pieces, -1, side)) for v in (left, right))
    half = ops.matmul(ops.swapaxes(left, -1, -2), right)
    half = ops.sum(half, axis=-3) if pieces > 1 else half
    still = ops.stop_gradient(half)
    half = still + 2 * (half - still)  # the value, and both factors' gradients
    return 0.5 * (half + ops.swapaxes(half, -1, -2))


def partner_in_range(matrix):
    """`(W/c², c)` without a gradient, c = 1 unless squares of W's entries over- or underflow.

    WᵀW/c² is then the product of the two, and W itself needs no scaling, which costs a pass over
    it and another in the gradient. Entries of W/c² err by 2u.
    """
    matrix = ops.stop_gradient(matrix)
    largest = ops.max(ops.abs(matrix))
    low, high = math.sqrt(SAFE_TRACE[0]), math.sqrt(SAFE_TRACE[1] / math.prod(matrix.shape))
    inside = ops.logical_and(largest > low, largest < high)
    nothing = ops.logical_or(inside, ops.logical_not(largest > 0))
    scale = ops.where(nothing, ops.ones_like(largest), largest)
    return cond(inside, lambda: matrix, lambda: matrix / scale / scale), scale


def bjorck_factors(kernel, iterations):
    """X and C with ‖XC‖ ≤ 1 (CX for a wide kernel): the last of the Björck-Bowie steps apart.

        W ← W/bound(W), then W ← W(3I - WᵀW)/2 a few times; X before the last, XC after it    (2)

    *Cost.* X = W·P, where P follows from the Gram matrix G of the smaller side n alone: a step is
    B = (3I - G)/2, P ← PB, G ← GB², 6n³ flops and not 4·in·units·n, after 2·in·units·n for G.

    *Norm.* A step maps singular values in [0, 2] into [0, 1], whatever X is: ‖X‖ is bounded by
    the Gram matrix of X as stored, and X shrunk in C where 1.9 is not proven. With t = tr XᵀX and
    ‖X‖ ≤ x, C = (3I - XᵀX)/2 as computed adds at most ½x(γt + 3u(3√n + t)), divided out.

    *Gradient.* That of the last step, P held fixed. Where X is orthonormal, W = QS, it is
    Q·N·S⁻¹ + (I - QQᵀ)Q̄S⁻¹ with N = skew(QᵀQ̄), Q̄ the gradient at Q, and S the symmetric part of W
    with eigenvalues s_i. The polar factor's own has 2N_ij/(s_i + s_j) for N S⁻¹; both agree if S
    is a multiple of I. A step along this one changes the loss at the rate
    -Σ N_ij²/(s_i s_j) - ‖(I - QQᵀ)Q̄S⁻¹‖² to first order: it descends, from every W of full rank.

    Args:
        kernel: `(a, b)` tensor, float32 or float64.
        iterations: steps, at least 1.

    Returns:
        `(X, C)`: `(a, b)`, and a square matrix of the smaller side.

    Example:

    >>> x, c = bjorck_factors(np.diag([1.0, 0.5]).astype("float32"), 10)
    >>> bool(np.allclose(np.asarray(x) @ np.asarray(c), np.eye(2), atol=1e-5))
    True

    Reference: Björck and Bowie (1971), order 1; sound form.
    """
    kernel = ops.convert_to_tensor(kernel)
    given, dtype = kernel.dtype, work_dtype(kernel)
    tall = kernel.shape[0] >= kernel.shape[1]
    axis, side, length = (-2 if tall else -1), min(kernel.shape), max(kernel.shape)
    u, terms, eye = unit_roundoff(dtype), product_terms(length), ops.eye(side, dtype=dtype)
    # Scaling does not change the polar factor: no gradient is lost.
    w = ops.cast(kernel / unit_entries(ops.stop_gradient(kernel))[0], dtype)
    with full_precision():
        first, left = True, iterations - 1
        while first or left:
            frozen = ops.stop_gradient(w)
            gram = product(frozen, frozen, axis)
            factor = eye
            if first:
                total = trace(gram) * (1 + 2 * gamma(terms + side, u))
                top = eigenvalue_upper_bound(
                    gram, total, near=top_eigenvector(gram)[0], squarings=2
                )
                top = top + gamma(terms, u) * total
                top = ops.where(top > 0, top, ops.ones_like(top))
                gram, factor, first = gram / top, eye / ops.sqrt(top), False
            for _ in range(min(left, GRAM_STEPS)):
                step = 1.5 * eye - 0.5 * gram
                factor, gram = ops.matmul(factor, step), ops.matmul(gram, ops.matmul(step, step))
            left -= min(left, GRAM_STEPS)
            factor = ops.stop_gradient(factor)
            w = ops.matmul(w, factor) if tall else ops.matmul(factor, w)
        w = ops.cast(w, given)
        gram = differentiable_gram(ops.cast(w, dtype), axis, pieces=math.ceil(length / PIECE))
        still = ops.stop_gradient(gram)
        total = trace(still) * (1 + 2 * gamma(terms + side + 2, u))
        rounding = gamma(terms + 2, u) * total
        top = eigenvalue_upper_bound(still, total, near=ops.ones_like(total), squarings=2)
        norm = ops.sqrt(top + rounding) * (1 + 8 * u)
    shrink = LARGEST_START / ops.maximum(norm, LARGEST_START)
    excess = 0.5 * norm * (rounding + 3 * u * (3 * math.sqrt(side) + total))
    stored = max(u, unit_roundoff(given))
    scale = 0.5 * (1 - 16 * stored * math.sqrt(side)) * shrink / (1 + excess)
    return w, ops.cast((3 * eye - (shrink * shrink) * gram) * scale, given)


def bjorck(kernel, iterations):
    """Contraction close to the nearest matrix with orthonormal columns (or rows).

    The product of `bjorck_factors`, less what its rounding may add: of norm at most 1 as stored,
    for every number of steps, converged or not.

    Args:
        kernel: `(a, b)` tensor, float32 or float64.
        iterations: steps, at least 1.

    Returns:
        Tensor of the same shape and type; 0 for 0, NaN if the kernel is not finite.

    Example:

    >>> q = np.asarray(bjorck(np.diag([1.0, 0.5]).astype("float32"), 10))
    >>> bool(np.allclose(q, np.eye(2), atol=1e-5))
    True
    """
    x, c = bjorck_factors(kernel, iterations)
    tall = x.shape[0] >= x.shape[1]
    u, terms = unit_roundoff(x.dtype), product_terms(c.shape[0])
    with full_precision():
        q = product(x, ops.transpose(c), -1) if tall else product(ops.transpose(c), x, -2)
        # |Δ| ≤ γ|X||C| entry by entry; and the scaling below.
        sizes = [ops.sqrt(ops.sum(sum_of_squares(ops.stop_gradient(v)))) for v in (x, c)]
    margin = gamma(terms, u) * sizes[0] * sizes[1] * 1.01 + 4 * u * math.sqrt(c.shape[0])
    return q * ops.cast((1 - 8 * u) / (1 + margin), q.dtype)


def top_eigenvector(gram):
    """`(⟨v, Gv⟩, v)` of a positive semidefinite matrix after power steps v ← Gv/trace(G).

    An estimate from below, which steers and proves nothing; `(1, v)` where it would be 0.
    """
    side = gram.shape[0]
    share = gram / ops.maximum(trace(gram), 1e-30)
    start = np.random.default_rng(0).standard_normal((side, 1)) / math.sqrt(side)
    vector = ops.cast(start, gram.dtype)
    for i in range(STEERING_STEPS):
        vector = ops.matmul(share, vector)
        if i % 4 == 3:  # a step divides it by the side at most
            size = ops.max(ops.abs(vector))
            vector = vector / ops.where(size > 0, size, ops.ones_like(size))
    vector = vector / ops.sqrt(ops.maximum(ops.sum(ops.square(vector)), 0.5))
    near = ops.sum(vector * ops.matmul(gram, vector))
    return ops.where(near > 0, near, ops.ones_like(near)), vector
