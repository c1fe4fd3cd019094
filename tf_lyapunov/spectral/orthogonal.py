"""Orthogonal parametrisations in `keras.ops`, each followed by a proven bound of its excess.

In floating point no parametrisation is orthogonal to the last bit, and none of them may count on
a backward stable solver. What is returned here has a norm of at most 1 in exact arithmetic: it is
divided by a bound that is computed from the result itself, or that holds for the last step
whatever came before.
"""

import math

import numpy as np
from keras import ops

from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.gram import product, product_terms, sum_of_squares, trace
from tf_lyapunov.spectral.polar import differentiable_gram
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# Cayley's A is at most this squared: I + A is then far from singular in float32.
LARGEST_NORM = 512.0
# Real matrices of a larger side are inverted by halves.
DIRECT_SIDE = 64


def contraction_factor(real, imag=None):
    """Factors s ≤ 1 with ‖s·Q‖ ≤ 1 for each of a batch of nearly semi-unitary matrices.

        s = (1 + ‖QᴴQ - I‖_F + γ·‖Q‖_F²)^(-1/2),   rounded down                            (1)

    γ bounds the rounding of forming QᴴQ. Holds for every Q; s is close to 1 where the columns are
    nearly orthonormal. The rounding of the product s·Q is provided for.

    Args:
        real: `(..., n, m)`, n ≥ m.
        imag: imaginary parts of the same shape, or `None`.

    Returns:
        Tensor `(..., 1, 1)` of the type of `real`, without a gradient; NaN where Q is not finite.

    Example:

    >>> import numpy as np
    >>> s = float(contraction_factor(np.eye(3, dtype="float32"))[0, 0])
    >>> 0.99999 < s < 1.0
    True
    """
    given = real.dtype
    dtype = work_dtype(real)
    real = ops.stop_gradient(ops.cast(real, dtype))
    stacked = real
    if imag is not None:
        imag = ops.stop_gradient(ops.cast(imag, dtype))
        stacked = ops.concatenate([real, imag], axis=-2)
    side, terms = stacked.shape[-1], product_terms(stacked.shape[-2])
    # The factor is rounded to `given`, and so is its product with Q.
    u, stored = unit_roundoff(dtype), max(unit_roundoff(dtype), unit_roundoff(given))
    with full_precision():
        gram = product(stacked, stacked, axis=-2)
        total = trace(gram) * (1 + 2 * gamma(terms + side, u))
        squares = sum_of_squares(gram - ops.eye(side, dtype=dtype))
        if imag is not None:
            turned = ops.concatenate([imag, -real], axis=-2)
            squares = squares + sum_of_squares(product(stacked, turned, axis=-2))
    residual = ops.sqrt(squares) * (1 + gamma(2 * side + 12, u))
    # |ΔG| ≤ γ|S|ᵀ|S| for the real and for the imaginary part, so √2·γ‖S‖_F² together; squares
    # below the smallest float are lost, at most 1e-18 per entry.
    forming = (1 if imag is None else 1.5) * gamma(terms, u) * total + 1e-17 * side
    squared = (1 + residual + forming) * (1 + 8 * u)
    margin = 8 * u + 3 * stored * math.sqrt(side)
    return ops.cast((1 - margin) / ops.sqrt(squared), given)[..., None, None]


def cayley(real, imag=None):
    """Contractions with nearly orthonormal columns that the matrices [U; V] stand for.

        Q = s·[ 2(I+A)⁻¹ - I ; -2V(I+A)⁻¹ ],   A = U - Uᴴ + VᴴV,   s from (1)

    ‖Q‖ ≤ 1 exactly as stored; QᴴQ = I up to rounding. A matrix with ‖[U; V]‖_F > 512 is scaled to
    that norm first: in float32, I + A would be singular for much larger ones. A complex matrix
    R + iJ is inverted as the real block matrix [[R, -J], [J, R]], which all backends and compilers
    can.

    Args:
        real: `(..., n, m)` real parts, n ≥ m, float32 or float64.
        imag: imaginary parts, or `None` for real matrices.

    Returns:
        Q, or `(real, imag)` of Q, of the same shapes and type. NaN if the input is not finite.

    Raises:
        ValueError: if there are fewer rows than columns.

    Example:

    >>> import numpy as np
    >>> q = np.asarray(cayley(np.array([[0.0, 3.0], [1.0, 0.0], [2.0, 2.0]], "float32")))
    >>> bool(np.allclose(q.T @ q, np.eye(2), atol=1e-5))
    True

    Reference: Trockman and Kolter (2021), section 3; sound form (division by the excess).
    """
    real = ops.convert_to_tensor(real)
    side, shape = real.shape[-1], tuple(real.shape)
    if shape[-2] < side:
        raise ValueError(
            "A Cayley transform needs a matrix with at least as many rows as columns. "
            f"Received: shape={shape}."
        )
    u = unit_roundoff(real.dtype)
    if side * u >= 0.1:
        raise ValueError(f"The type {real.dtype} is too coarse for a matrix of shape {shape}.")
    if imag is None:
        q, factor = cayley_factors(real)
        return q * factor
    eye = ops.eye(side, dtype=real.dtype)
    imag = ops.convert_to_tensor(imag)
    real, imag, finite = _limited(real, imag)
    with full_precision():
        inverse_real, inverse_imag = _complex_resolvent(real, imag, side)
        low_real, low_imag = real[..., side:, :], imag[..., side:, :]
        products = (
            ops.matmul(low_real, inverse_real) - ops.matmul(low_imag, inverse_imag),
            ops.matmul(low_real, inverse_imag) + ops.matmul(low_imag, inverse_real),
        )
    q_real = ops.concatenate([2 * inverse_real - eye, -2 * products[0]], axis=-2)
    q_imag = ops.concatenate([2 * inverse_imag, -2 * products[1]], axis=-2)
    factor = contraction_factor(q_real, q_imag) * finite
    return q_real * factor, q_imag * factor


def cayley_factors(kernel):
    """Q of real matrices before it is divided by its excess, and s of (1): ‖s·Q‖ ≤ 1.

    Args:
        kernel: `(..., n, m)`, n ≥ m, see `cayley`.

    Returns:
        Tensors `(..., n, m)`, and `(..., 1, 1)` without a gradient.

    Example:

    >>> q, factor = cayley_factors(np.array([[0.0, 3.0], [1.0, 0.0], [2.0, 2.0]], "float32"))
    >>> tuple(q.shape), bool(0.9999 < float(np.asarray(factor)[0, 0]) < 1.0)
    ((3, 2), True)
    """
    kernel = ops.convert_to_tensor(kernel)
    side = kernel.shape[-1]
    eye = ops.eye(side, dtype=kernel.dtype)
    frozen = ops.stop_gradient(kernel)
    squares = ops.sum(ops.square(frozen), axis=(-2, -1), keepdims=True)
    ones = ops.ones_like(squares)
    # The comparison is false for NaN.
    shrink, finite = cond(
        ops.all(squares < 0.99 * LARGEST_NORM**2),
        lambda: (ones, ones),
        lambda: _limits([frozen])[1:],
    )
    with full_precision():
        top, low = _split(kernel * shrink, side)
        matrix = eye + (top - _turn(top))
        if low.shape[-2]:
            matrix = matrix + differentiable_gram(low)
        inverse = accretive_inverse(ops.where(ops.isfinite(finite), matrix, eye))
        q = ops.concatenate([2 * inverse - eye, -2 * ops.matmul(low, inverse)], axis=-2)
        return q, contraction_factor(q) * finite


def _limited(real, imag):
    """Matrices of ‖·‖_F ≤ `LARGEST_NORM`, finite; and 1 per matrix, or NaN where it was not."""
    (real, imag), shrink, mark = _limits([real, imag])
    return real * shrink, imag * shrink, mark


def _limits(parts):
    """Finite parts, a factor per matrix that limits its norm, and 1, or NaN if it is not finite."""
    sizes = [ops.max(ops.abs(ops.stop_gradient(p)), axis=(-2, -1), keepdims=True) for p in parts]
    sums = [ops.sum(ops.stop_gradient(p), axis=(-2, -1), keepdims=True) for p in parts]
    # A maximum may pass over NaN; a sum of finite entries may overflow, which is as bad.
    finite = ops.isfinite(sum(sizes) + sum(sums))
    parts = [ops.where(finite, p, ops.zeros_like(p)) for p in parts]
    largest = ops.where(finite, ops.maximum(sum(sizes), 1e-30), ops.ones_like(sizes[0]))
    units = [ops.stop_gradient(p) / largest for p in parts]
    squares = sum(ops.sum(ops.square(p), axis=(-2, -1), keepdims=True) for p in units)
    shrink = ops.minimum(1.0, LARGEST_NORM / (largest * ops.sqrt(ops.maximum(squares, 1e-30))))
    mark = ops.where(finite, ops.ones_like(largest), np.nan * ops.ones_like(largest))
    return parts, shrink, mark


def _split(matrix, side):
    return ops.split(matrix, [side], axis=-2)


def _turn(matrix):
    return ops.swapaxes(matrix, -1, -2)


def accretive_inverse(matrix):
    """M⁻¹ of matrices with M + Mᵀ ≻ 0, by a Newton step from an inverse held fixed.

        R = R₀ + R₀(I - MR₀)

    Its gradient -RᵀR̄Rᵀ takes two products and no second solution; its residual is the square of
    that of R₀.
    """
    start = ops.stop_gradient(_inverse_by_halves(ops.stop_gradient(matrix)))
    residual = ops.eye(matrix.shape[-1], dtype=matrix.dtype) - ops.matmul(matrix, start)
    return start + ops.matmul(start, residual)


def _inverse_by_halves(matrix):
    """M⁻¹ through Schur complements, mostly products: of M + Mᵀ ≻ 0 they are such matrices too."""
    side = matrix.shape[-1]
    if side <= DIRECT_SIDE:
        eye = ops.broadcast_to(ops.eye(side, dtype=matrix.dtype), matrix.shape)
        return ops.solve(matrix, eye)
    half = side // 2
    (a, b), (c, d) = ((rows[..., :half], rows[..., half:]) for rows in _split(matrix, half))
    first = _inverse_by_halves(a)
    left = ops.matmul(c, first)
    second = _inverse_by_halves(d - ops.matmul(left, b))
    corner = -ops.matmul(ops.matmul(first, b), second)
    upper = ops.concatenate([first - ops.matmul(corner, left), corner], axis=-1)
    lower = ops.concatenate([-ops.matmul(second, left), second], axis=-1)
    return ops.concatenate([upper, lower], axis=-2)


def _complex_resolvent(real, imag, side):
    """Real and imaginary parts of (I + U - Uᴴ + VᴴV)⁻¹."""
    (top, low), (top_imag, low_imag) = _split(real, side), _split(imag, side)
    # VᴴV = (RᵀR + JᵀJ) + i(RᵀJ - JᵀR)
    cross = ops.matmul(_turn(low), low_imag)
    skew = top - _turn(top) + ops.matmul(_turn(low), low) + ops.matmul(_turn(low_imag), low_imag)
    skew_imag = top_imag + _turn(top_imag) + cross - _turn(cross)
    diagonal = skew + ops.eye(side, dtype=real.dtype)
    block = ops.concatenate(
        [
            ops.concatenate([diagonal, -skew_imag], axis=-1),
            ops.concatenate([skew_imag, diagonal], axis=-1),
        ],
        axis=-2,
    )
    return _split(accretive_inverse(block)[..., :side], side)


def skew_kernel(kernel):
    """Skew part of a convolution kernel: the filter whose map is minus its own adjoint.

        L[t] = ½(M[t] - M[k-1-t]ᵀ)                                                        (4)

    The adjoint of y[i] = Σ_t K[t]ᵀx[i + t - p], p = (k-1)/2 with k odd, has the kernel K[k-1-t]ᵀ.
    On the infinite grid L is therefore skew, and its zero-padded "same" map P L P* of an image is
    too, because (P L P*)* = P L* P*. In floating point L[t] = -L[k-1-t]ᵀ holds bit for bit.

    Args:
        kernel: `(*k, channels, channels)`, k odd on every spatial axis.

    Returns:
        Tensor of the same shape.

    Raises:
        ValueError: if a spatial side is even or the channels differ.

    Example:

    >>> import numpy as np
    >>> kernel = np.arange(3.0).reshape(3, 1, 1)
    >>> [float(v) for v in np.asarray(skew_kernel(kernel))[:, 0, 0]]
    [-1.0, 0.0, 1.0]

    Reference: Singla and Feizi (2021), Theorem 2; as published.
    """
    kernel = ops.convert_to_tensor(kernel)
    shape = tuple(kernel.shape)
    if any(k % 2 == 0 for k in shape[:-2]) or shape[-1] != shape[-2]:
        raise ValueError(
            "A skew filter needs odd spatial sides and as many input as output channels. "
            f"Received: shape={shape}."
        )
    flipped = ops.flip(kernel, axis=tuple(range(len(shape) - 2)))
    return 0.5 * (kernel - ops.swapaxes(flipped, -1, -2))


def exponential_action(x, apply, terms):
    """Taylor polynomial of the exponential of a linear map, applied to a signal.

        y = Σ_{k<n} Aᵏx/k!

    Args:
        x: tensor.
        apply: function of a tensor, x ↦ A x.
        terms: n, positive integer.

    Returns:
        Tensor of the shape of `x`.

    Example:

    >>> float(exponential_action(np.float32(1.0), lambda x: x, 3))
    2.5
    """
    total = power = x
    for k in range(1, terms):
        power = apply(power) * (1.0 / k)
        total = total + power
    return total


def fourier_bases(sizes):
    """Real matrices of the unitary two-dimensional Fourier transform of real images.

    With w the second axis, f = 0…⌊W/2⌋ its frequencies, and c_f = 1 where f is its own conjugate
    (0, and W/2 for even W), else 2:

        wide:  √(c_f/W)·cos(2πwf/W), -√(c_f/W)·sin(2πwf/W)   (W, ⌊W/2⌋+1)
        tall:  cos(2πhg/H)/√H, sin(2πhg/H)/√H                (H, H)

    The transform T built of them keeps norms (Parseval, each pair of conjugate frequencies
    counted once), so that T*·diag(Q)·T has a norm of at most max ‖Q(f)‖ for *any* blocks Q.

    Args:
        sizes: `(H, W)`.

    Returns:
        Four float64 arrays.

    Example:

    >>> cosine, sine, *_ = fourier_bases((1, 3))
    >>> bool(np.allclose(cosine @ cosine.T + sine @ sine.T, np.eye(3)))
    True
    """
    high, wide = sizes
    f = np.arange(wide // 2 + 1)
    weight = np.sqrt(np.where((f == 0) | (2 * f == wide), 1.0, 2.0) / wide)
    turn = 2 * np.pi * (np.outer(np.arange(wide), f) % wide) / wide
    other = 2 * np.pi * (np.outer(np.arange(high), np.arange(high)) % high) / high
    scale = 1 / math.sqrt(high)
    return (
        weight * np.cos(turn),
        -weight * np.sin(turn),
        scale * np.cos(other),
        scale * np.sin(other),
    )


def block_fourier(x, block, bases):
    """Linear map of images that is one complex matrix per frequency: y = T*·diag(Q)·T x.

    Args:
        x: `(n, H, W, a)`.
        block: `(H·(⌊W/2⌋+1), 2a, 2b)` real: `[[R, J], [-J, R]]` for Q = R + iJ, ŷ = x̂·Q.
        bases: see `fourier_bases`, as tensors or arrays of the type of `x`.

    Returns:
        Tensor `(n, H, W, b)`.

    Example: the identity at every frequency is the identity.

    >>> x = np.arange(6, dtype="float32").reshape(1, 2, 3, 1)
    >>> bases = [b.astype("float32") for b in fourier_bases((2, 3))]
    >>> block = np.broadcast_to(np.eye(2, dtype="float32"), (4, 2, 2))
    >>> bool(np.allclose(np.asarray(block_fourier(x, block, bases)), x, atol=1e-6))
    True
    """
    wide_cos, wide_sin, tall_cos, tall_sin = bases
    (wide, half), high, inputs = wide_cos.shape, tall_cos.shape[0], x.shape[-1]
    across = ops.reshape(
        ops.stack([ops.transpose(wide_cos), ops.transpose(wide_sin)], 1), (-1, wide)
    )
    # (real + i·imag)(cos - i·sin) along the other axis; the rows are pairs (g, part).
    down = ops.stack(
        [
            ops.concatenate([ops.transpose(tall_cos), ops.transpose(tall_sin)], axis=1),
            ops.concatenate([-ops.transpose(tall_sin), ops.transpose(tall_cos)], axis=1),
        ],
        axis=1,
    )
    down = ops.reshape(down, (2 * high, 2 * high))
    # Few and long products: pixels come first, and images with their channels are the columns.
    signal = ops.reshape(ops.transpose(x, (2, 1, 0, 3)), (wide, -1))
    signal = ops.reshape(ops.matmul(across, signal), (half, 2 * high, -1))
    signal = ops.reshape(ops.matmul(down, signal), (half, high, 2, -1, inputs))
    signal = ops.reshape(ops.transpose(signal, (0, 1, 3, 2, 4)), (half * high, -1, 2 * inputs))
    block = ops.swapaxes(ops.reshape(block, (high, half, *block.shape[1:])), 0, 1)
    signal = ops.matmul(signal, ops.reshape(block, (half * high, *block.shape[2:])))
    outputs = block.shape[-1] // 2
    signal = ops.transpose(ops.reshape(signal, (half, high, -1, 2, outputs)), (0, 1, 3, 2, 4))
    signal = ops.matmul(ops.transpose(down), ops.reshape(signal, (half, 2 * high, -1)))
    signal = ops.matmul(ops.transpose(across), ops.reshape(signal, (2 * half, -1)))
    return ops.transpose(ops.reshape(signal, (wide, high, -1, outputs)), (2, 1, 0, 3))


def circular_symbol(kernel, sizes):
    """Matrices of a circular convolution at the frequencies of `fourier_bases`.

        K̂(θ) = Σ_t K[t]·exp(iθ·(t - ⌊k/2⌋)),   θ = 2π(g/H, f/W)

    Args:
        kernel: `(k₁, k₂, a, b)` tensor, of any size beside the image (it wraps around).
        sizes: `(H, W)`.

    Returns:
        `(real, imag)`, each `(H·(⌊W/2⌋+1), a, b)`.

    Example:

    >>> real, imag = circular_symbol(np.ones((1, 1, 1, 1), "float32"), (2, 2))
    >>> tuple(real.shape), float(real[0, 0, 0]), float(imag[0, 0, 0])
    ((4, 1, 1), 1.0, 0.0)
    """
    kernel = ops.convert_to_tensor(kernel)
    (high, wide), (tall, broad, a, b) = sizes, kernel.shape
    g, f = np.meshgrid(np.arange(high) / high, np.arange(wide // 2 + 1) / wide, indexing="ij")
    t, s = np.meshgrid(np.arange(tall) - tall // 2, np.arange(broad) - broad // 2, indexing="ij")
    turns = np.outer(g.ravel(), t.ravel()) + np.outer(f.ravel(), s.ravel())
    angle = 2 * np.pi * (turns % 1.0)
    taps = ops.reshape(kernel, (tall * broad, a * b))
    with full_precision():
        parts = [
            ops.reshape(ops.matmul(ops.cast(wave, kernel.dtype), taps), (len(angle), a, b))
            for wave in (np.cos(angle), np.sin(angle))
        ]
    return tuple(parts)
