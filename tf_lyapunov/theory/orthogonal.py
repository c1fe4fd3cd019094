"""Orthogonal matrices that are only computed nearly so: how far their norms can exceed 1.

Three parametrisations of matrices with QᵀQ = I, each an exact identity that a computer truncates
or rounds: the exponential of a skew matrix (a Taylor polynomial), the Cayley transform (a linear
solve) and the polar factor (finitely many Björck-Bowie steps).
"""

import math
from fractions import Fraction

import numpy as np

from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF, round_up, sqrt_up


def exponential_truncation_error_upper_bound(terms, norm):
    """Distance from the exponential of a skew operator to its Taylor polynomial, from above.

        ‖exp(A) - Σ_{k<n} Aᵏ/k!‖ ≤ ‖A‖ⁿ/n!,   Aᵀ = -A

    (the remainder is ∫₀¹ (1-s)ⁿ⁻¹/(n-1)!·Aⁿ exp(sA) ds, and exp(sA) is orthogonal).

    Args:
        terms: n, positive integer.
        norm: upper bound on ‖A‖.

    Returns:
        float, rounded up.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> error = exponential_truncation_error_upper_bound(5, 1.0)
    >>> 1 / 120 <= error < 1 / 119
    True

    Reference: Singla and Feizi (2021), Theorem 3; as published.
    """
    norm = _radius(terms, norm)
    return round_up(norm**terms / math.factorial(terms))


def truncated_exponential_norm_upper_bound(terms, norm):
    """Norm of the Taylor polynomial of the exponential of a skew operator, from above.

        ‖Σ_{k<n} Aᵏ/k!‖² ≤ max_{|θ| ≤ ‖A‖} |s_n(iθ)|² = 1 + Σ_j c_j θ²ʲ,   Aᵀ = -A,          (1)
        c_j = Σ_{a+b=2j; a,b<n} (-1)^((a-b)/2) / (a! b!)   (0 for 0 < 2j < n),

    since A is normal with eigenvalues iθ. The right side is 1 for n = 0 or 1 modulo 4 and ‖A‖ ≤ 1
    (the first c_j is then negative and outweighs the later ones): the polynomials with 5 and 12
    terms are contractions. Elsewhere (1) is bounded by its first coefficient plus the positive
    later ones: sufficient, and tight for small norms.

    Args:
        terms: n, positive integer.
        norm: upper bound on ‖A‖.

    Returns:
        float ≥ 1, rounded up.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> truncated_exponential_norm_upper_bound(5, 1.0)
    1.0
    >>> truncated_exponential_norm_upper_bound(2, 1.0) >= 2**0.5  # |1 + i|
    True

    Reference: sound form of the truncation in Singla and Feizi (2021), who bound the distance to
    the exponential only.
    """
    norm = _radius(terms, norm)
    square = norm * norm
    coefficients = _squared_modulus(terms)
    first = next((j for j in range(1, terms) if coefficients[j]), None)
    if first is None:
        return 1.0
    tail = sum(
        max(coefficients[j], Fraction(0)) * square ** (j - first) for j in range(first + 1, terms)
    )
    excess = square**first * max(coefficients[first] + tail, Fraction(0))
    return max(1.0, sqrt_up(1 + excess))


def _radius(terms, norm):
    if int(terms) != terms or terms < 1:
        raise ValueError(f"`terms` must be a positive integer. Received: terms={terms}.")
    if not (math.isfinite(norm) and norm >= 0):
        raise ValueError(f"`norm` must be finite and at least 0. Received: norm={norm}.")
    return Fraction(float(norm))


def _squared_modulus(terms):
    """Coefficients c_j of |s_n(iθ)|² in θ², exactly."""
    c = [Fraction(0)] * terms
    for a in range(terms):
        for b in range(a % 2, terms, 2):
            sign = -1 if (a - b) // 2 % 2 else 1
            c[(a + b) // 2] += Fraction(sign, math.factorial(a) * math.factorial(b))
    return c


def cayley(kernel):
    """Matrix with orthonormal columns that a matrix [U; V] of at least as many rows stands for.

        Q = [ 2(I+A)⁻¹ - I ; -2V(I+A)⁻¹ ],   A = U - Uᴴ + VᴴV,   QᴴQ = I                     (2)

    I + A has the Hermitian part I + VᴴV ⪰ I, so that it is invertible with ‖(I+A)⁻¹‖ ≤ 1 for
    every U and V. With X = (I+A)⁻¹ and Xᴴ(2I + A + Aᴴ)X = X + Xᴴ,
    QᴴQ = (2X-I)ᴴ(2X-I) + 4XᴴVᴴVX = 2Xᴴ(2I + 2VᴴV)X - 2X - 2Xᴴ + I = I.

    Args:
        kernel: `(..., n, m)` real or complex, n ≥ m; U are the first m rows.

    Returns:
        Array of the same shape, float64 or complex128.

    Raises:
        ValueError: if there are fewer rows than columns.

    Example:

    >>> q = cayley([[0.0, 3.0], [1.0, 0.0], [2.0, 2.0]])
    >>> bool(np.allclose(q.T @ q, np.eye(2)))
    True

    Reference: Trockman and Kolter (2021), section 3; as published.
    """
    kernel = np.asarray(kernel)
    kernel = kernel.astype(np.result_type(kernel.dtype, np.float64))
    if kernel.ndim < 2 or kernel.shape[-2] < kernel.shape[-1]:
        raise ValueError(
            "A Cayley transform needs a matrix with at least as many rows as columns. "
            f"Received: shape={kernel.shape}."
        )
    side = kernel.shape[-1]
    top, bottom = kernel[..., :side, :], kernel[..., side:, :]
    skew = top - _adjoint(top) + _adjoint(bottom) @ bottom
    inverse = np.linalg.inv(np.eye(side) + skew)
    return np.concatenate([2 * inverse - np.eye(side), -2 * bottom @ inverse], axis=-2)


def cayley_error_upper_bound(error):
    """How much an error in A moves the square Cayley transform: ‖Q(A+E) - Q(A)‖ ≤ 2‖E‖.

    Q(A) = 2(I+A)⁻¹ - I, and the resolvents of A and A+E, of Hermitian parts ⪰ 0, have norm ≤ 1.

    Args:
        error: upper bound on ‖E‖.

    Returns:
        float.

    Example:

    >>> cayley_error_upper_bound(0.25)
    0.5
    """
    return 2.0 * float(error)


def residual_norm_upper_bound(matrix):
    """Norm of a matrix with nearly orthonormal columns (or rows), from its Gram residual.

        ‖Q‖² = ‖QᴴQ‖ ≤ 1 + ‖QᴴQ - I‖_F,   on the smaller side                                (3)

    with the rounding of the product added: a bound for any matrix, tight for small residuals.

    Args:
        matrix: `(..., n, m)`, real or complex.

    Returns:
        float: bound on the largest norm over the leading axes, rounded up.

    Raises:
        ValueError: if an entry is not finite.

    Example:

    >>> bool(1.0 <= residual_norm_upper_bound(np.eye(3)) < 1.0 + 1e-14)
    True
    """
    worst = 1 + gram_residual_upper_bound(matrix)
    return float(np.nextafter(math.sqrt(worst) * (1 + 4 * UNIT_ROUNDOFF), np.inf))


def gram_residual_upper_bound(matrix):
    """Departure of a matrix from orthonormal columns (or rows): ‖QᴴQ - I‖_F from above.

    Of the smaller side, with the rounding of the product added; no singular value is farther than
    that from 1.

    Args:
        matrix: `(..., n, m)`, real or complex.

    Returns:
        float: the largest over the leading axes, rounded up.

    Raises:
        ValueError: if an entry is not finite.

    Example:

    >>> 3.0 <= gram_residual_upper_bound(np.diag([1.0, 2.0])) < 3.0 + 1e-12
    True
    """
    matrix = np.asarray(matrix)
    matrix = matrix.astype(np.result_type(matrix.dtype, np.float64))
    if not np.all(np.isfinite(matrix)):
        raise ValueError("A matrix must be finite. Received: NaN or infinity.")
    if matrix.shape[-2] < matrix.shape[-1]:
        matrix = _adjoint(matrix)
    gram = _adjoint(matrix) @ matrix
    residual = np.linalg.norm(gram - np.eye(gram.shape[-1]), axis=(-2, -1))
    trace = np.linalg.norm(matrix, axis=(-2, -1)) ** 2
    # Complex products have four real terms each; 2n + 8 covers the sums and the subtraction.
    rounding = (4 * matrix.shape[-2] + 8) * 1.01 * UNIT_ROUNDOFF * (trace + gram.shape[-1])
    worst = np.max(residual * (1 + gram.size * UNIT_ROUNDOFF) + rounding)
    return float(np.nextafter(worst, np.inf))


def polyphase(kernel, strides):
    """Kernel of the same convolution between pixels of patches, moved into channels, and outputs.

        K'[q][(ρ, c), o] = K[q·s + ρ][c, o],   x'[j][(ρ, c)] = x[j·s + ρ][c]:
        y[i] = Σ_q x'[i + q]K'[q]

    Along an axis that is shorter than its stride pixels that no tap sees are left out.

    Args:
        kernel: `(k₁, k₂, in, out)` array.
        strides: `(s₁, s₂)`.

    Returns:
        Array `(⌈k₁/s₁⌉, ⌈k₂/s₂⌉, b₁·b₂·in, out)`, b = min(k, s).

    Example:

    >>> polyphase(np.arange(3.0).reshape(3, 1, 1, 1), (2, 1))[:, 0, :, 0].tolist()
    [[0.0, 1.0], [2.0, 0.0]]
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    *size, channels, width = kernel.shape
    base = [min(k, s) for k, s in zip(size, strides, strict=True)]
    counts = [-(-k // b) for k, b in zip(size, base, strict=True)]
    ends = [(0, n * b - k) for n, b, k in zip(counts, base, size, strict=True)]
    kernel = np.pad(kernel, [*ends, (0, 0), (0, 0)])
    kernel = kernel.reshape(counts[0], base[0], counts[1], base[1], channels, width)
    return kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*counts, -1, width)


def convolution_residual_upper_bound(kernel, strides=(1, 1), groups=1):
    """Departure of a convolution from orthonormal rows or columns, whatever the image's size.

        ‖G - I‖ ≤ Σ_δ ‖D[δ] - I·[δ = 0]‖_F,   D[δ] = Σ_q K'[q]ᵀK'[q + δ]  (or K'[q]K'[q + δ]ᵀ)   (5)

    with K' the `polyphase` kernel and G the Gram operator of the smaller side, of the convolution
    on the infinite grid or on any circle: its blocks are the D[δ], and wrapping adds them up. Zero
    padding and cropping take a part of the grid, so that (1 + ‖G - I‖)^½ bounds their norms too.
    Dilation (without strides) leaves (5) as it is. Rounding is added.

    Args:
        kernel: `(k₁, k₂, in/groups, out)` array, read as float64.
        strides: `(s₁, s₂)`.
        groups: of channels.

    Returns:
        float, the largest of the groups, rounded up.

    Raises:
        ValueError: if an entry is not finite.

    Example: a shift keeps norms.

    >>> shift = np.array([0.0, 1.0]).reshape(2, 1, 1, 1)
    >>> convolution_residual_upper_bound(shift) < 1e-13
    True

    Reference: Wang et al., "Orthogonal convolutional neural networks" (2020), for the condition;
    the bound of the departure is this library's.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    if not np.all(np.isfinite(kernel)):
        raise ValueError("A kernel must be finite. Received: NaN or infinity.")
    parts = np.split(kernel, groups, axis=-1)
    return max(_shifted_residuals(polyphase(part, strides)) for part in parts)


def _shifted_residuals(kernel):
    """The right side of (5) for one group."""
    if kernel.shape[-2] < kernel.shape[-1]:
        kernel = kernel.swapaxes(-1, -2)
    (n, m), side = kernel.shape[:2], kernel.shape[-1]
    total = 0.0
    for i in range(n):
        for j in range(-m + 1 if i else 0, m):
            first = kernel[: n - i, max(-j, 0) : m - max(j, 0)]
            second = kernel[i:, max(j, 0) : m - max(-j, 0)]
            product = np.tensordot(first, second, axes=([0, 1, 2], [0, 1, 2]))
            # D[-δ] is the transpose of D[δ].
            at_zero = i == j == 0
            total += (1 if at_zero else 2) * np.linalg.norm(product - at_zero * np.eye(side))
    shifts = (2 * n - 1) * (2 * m - 1)
    terms = n * m * kernel.shape[2] + side**2 + 2 * shifts + 8
    rounding = 1.01 * UNIT_ROUNDOFF * terms * (shifts * np.sum(kernel**2) + side + total)
    return float(np.nextafter(total + rounding, np.inf))


def bjorck(matrix, iterations):
    """Nearest matrix with orthonormal columns (or rows), approached by Björck-Bowie steps.

        W ← W(3I - WᵀW)/2,   i.e. every singular value σ ← σ(3-σ²)/2                           (4)

    Args:
        matrix: `(n, m)` of norm at most 1 (see `bjorck_norm_upper_bound`).
        iterations: number of steps.

    Returns:
        Array `(n, m)`, float64.

    Example:

    >>> q = bjorck(np.diag([1.0, 0.5]), 10)
    >>> bool(np.allclose(q, np.eye(2)))
    True

    Reference: Björck and Bowie (1971), order 1; as published.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    for _ in range(iterations):
        matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)
    return matrix


def bjorck_norm_upper_bound(norm):
    """Norm after one Björck-Bowie step on a matrix of norm at most ν, from above.

        max_{0≤σ≤ν} |σ(3-σ²)/2| = ν(3-ν²)/2 for ν ≤ 1, 1 for 1 ≤ ν ≤ 2, ν(ν²-3)/2 beyond

    Each step starts anew from 1: errors made before the last step do not add up.

    Args:
        norm: ν ≥ 0.

    Returns:
        float, rounded up.

    Example:

    >>> bjorck_norm_upper_bound(0.5), bjorck_norm_upper_bound(1.7), bjorck_norm_upper_bound(3.0)
    (0.6875, 1.0, 9.0)
    """
    norm = _radius(1, norm)
    if 1 <= norm <= 2:
        return 1.0
    return round_up(abs(norm * (3 - norm * norm)) / 2)


def bjorck_defect_upper_bound(defect, iterations):
    """Distance of all singular values from 1 after Björck-Bowie steps, from above.

        e ← e²(3 - e)/2 for singular values in [1 - e, 1],   e ≤ 1

    so that W is within the final e of its polar factor. Quadratic once e < 2/3; from far away,
    e = 1 - σ with small σ, the smallest singular value grows by 3/2 a step.

    Args:
        defect: e at the start, in [0, 1].
        iterations: number of steps.

    Returns:
        float, rounded up.

    Raises:
        ValueError: if `defect` is not in [0, 1].

    Example:

    >>> bjorck_defect_upper_bound(0.5, 5) < 2e-6
    True
    """
    if not 0 <= defect <= 1:
        raise ValueError(f"`defect` must lie in [0, 1]. Received: defect={defect}.")
    for _ in range(iterations):
        exact = Fraction(defect)
        defect = min(1.0, round_up(exact**2 * (3 - exact) / 2))
    return float(defect)


def _adjoint(matrix):
    return np.conj(np.swapaxes(matrix, -1, -2))
