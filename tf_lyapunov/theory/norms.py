"""Operator norms of linear maps in float64: upper bounds, and power iteration from below."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.theory.operators import as_convolution, block_matrix

# Materialised Gram matrices up to this side are cheap to diagonalise (about a second).
EXACT_SIDE = 1500
# Above this many entries the eigenvalues of the Gram matrix are ten times faster than an SVD, and
# their rounding, γ_m·trace, is still below 1e-9.
SVD_SIZE = 2**14
# Above this many flops the eigenvalues per frequency give way to Chebyshev squarings.
EIGENVALUE_FLOPS = 3e10
UNIT_ROUNDOFF = np.finfo(np.float64).eps / 2


@dataclasses.dataclass(frozen=True)
class NormBound:
    """An upper bound on an operator norm and how it was found.

    Attributes:
        value: float, at least the exact-arithmetic norm of the map.
        method: `"svd"`, `"gram"`, `"materialised"`, `"frequency"`, `"size_free"`, each optionally
            followed by `"+chebyshev"`.
        exact: whether the bound equals the norm up to rounding.
    """

    value: float
    method: str
    exact: bool


def norm_upper_bound(kernel, linear_map, *, method="auto"):
    """Upper bound, in float64, on the operator norm of a layer's linear map.

    Dense maps: SVD, or eigenvalues of the Gram matrix. Convolutions of known size: eigenvalues of
    the materialised Gram matrix where its smaller side is at most 1500, else the circulant whose
    compression the zero-padded map is, block by block of frequencies,

        σ ≤ max_f ‖(1/√s)·[K̂(f), K̂(f + N/s), …]‖,   N ≥ n + max(p, k-1-p) per axis.

    Unknown size: the maximum over a grid of N frequencies per axis divided by cos(πD/2N), D the
    degree of the Gram symbol f ≥ 0. (Riesz: a trigonometric polynomial of degree D that is at most
    1, with equality at t₀, stays above cos(D(t-t₀)) up to π/D away; apply it to 2f/max f - 1.)
    Rounding is added on the upper side.

    Args:
        kernel: array in Keras' layout, any real dtype; read as float64.
        linear_map: `LinearMap`.
        method: `"auto"`, `"materialised"`, `"frequency"` or `"size_free"`.

    Returns:
        `NormBound`.

    Raises:
        ValueError: if the kernel holds NaN or infinity, or the method does not fit the map.

    Example:

    >>> import numpy as np
    >>> from tf_lyapunov.theory.operators import LinearMap
    >>> ones = np.ones((5, 5, 1, 1))
    >>> bound = norm_upper_bound(ones, LinearMap("conv", (28, 28, 1)))
    >>> bound.exact, 24.2 < bound.value < 25.0
    (True, True)

    Reference: Sedghi et al. (2019) for circular convolutions; theory of zero padding, strides and
    unknown sizes: sound form of this library.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    if not np.all(np.isfinite(kernel)):
        raise ValueError(
            f"A kernel must be finite. Received: NaN or infinity in a kernel of shape "
            f"{kernel.shape}. The model has diverged; no bound on it exists."
        )
    if method not in ("auto", "materialised", "frequency", "size_free"):
        raise ValueError(
            "`method` must be 'auto', 'materialised', 'frequency' or 'size_free'. "
            f"Received: method={method!r}."
        )
    largest = np.max(np.abs(kernel), initial=0.0)
    if largest == 0.0:
        return NormBound(0.0, "zero", True)
    # A power of two keeps the scaling exact and the squares away from over- and underflow.
    scale = 2.0 ** np.floor(np.log2(largest))
    bound = _scaled_norm_upper_bound(kernel / scale, linear_map, method)
    return dataclasses.replace(bound, value=float(np.nextafter(bound.value * scale, np.inf)))


def _scaled_norm_upper_bound(kernel, linear_map, method):
    if linear_map.kind == "dense":
        return _dense_norm_upper_bound(kernel)
    known = linear_map.input_shape is not None
    if not known and method in ("materialised", "frequency"):
        raise ValueError(
            f"`method` needs a known input size. Received: method={method!r}, input_shape=None."
        )
    blocks, axes = as_convolution(kernel, linear_map)
    if known and method in ("auto", "materialised"):
        side = min(
            math.prod(a.output for a in axes) * blocks.shape[-1],
            math.prod(a.size for a in axes) * blocks.shape[-2],
        )
        if method == "materialised" or side <= EXACT_SIDE:
            return NormBound(max(_materialised(b, axes) for b in blocks), "materialised", True)
    if known and method != "size_free":
        periods = [a.period for a in axes]
        inflation, name = 1.0, "frequency"
    else:
        # Without a stride, dilation only reorders the frequencies.
        axes = [a if a.stride > 1 else dataclasses.replace(a, dilation=1) for a in axes]
        degrees = [(a.extent - 1) // a.stride for a in axes]
        # 16 points per degree: 1/cos(π/32) costs 0.5% per axis.
        grid = [max(16 * degree, 1) for degree in degrees]
        periods = [a.stride * n for a, n in zip(axes, grid, strict=True)]
        cosines = [math.cos(math.pi * D / (2 * n)) for D, n in zip(degrees, grid, strict=True)]
        inflation, name = 1 / math.prod(cosines), "size_free"
    values = [_frequency_norm(b, axes, periods) for b in blocks]
    value = max(v for v, _ in values) * inflation * (1 + 8 * UNIT_ROUNDOFF)
    return NormBound(value, name + ("" if values[0][1] else "+chebyshev"), False)


def _dense_norm_upper_bound(kernel):
    if kernel.size <= SVD_SIZE:
        sigma = np.linalg.svd(kernel, compute_uv=False)[0]
        return NormBound(sigma * (1 + 8 * max(kernel.shape) * UNIT_ROUNDOFF), "svd", True)
    tall = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
    gram = tall.T @ tall
    value = np.linalg.eigvalsh(gram)[-1]
    return NormBound(_root_up(value, np.trace(gram), *tall.shape[::-1]), "gram", True)


def _materialised(block, axes):
    """Largest singular value of one group's matrix, rounded up."""
    matrix = block_matrix(block, axes)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    terms = block.size
    gram = gram.toarray()
    value = np.linalg.eigvalsh(gram)[-1]
    return _root_up(value, np.trace(gram), gram.shape[0], terms)


def _root_up(eigenvalue, trace, side, terms):
    """√λ rounded up: forming the Gram matrix errs by γ_K·trace, LAPACK by O(side·u·λ)."""
    forming = (terms + 2) * UNIT_ROUNDOFF * 1.01 * trace
    solving = 8 * side * UNIT_ROUNDOFF * abs(eigenvalue)
    return math.sqrt(max(eigenvalue, 0.0) + forming + solving) * (1 + 4 * UNIT_ROUNDOFF)


def _frequency_norm(block, axes, periods):
    """max over frequencies of the aliased symbol's norm; also whether eigenvalues were used."""
    ci, co = block.shape[-2:]
    grid = [N // a.stride for N, a in zip(periods, axes, strict=True)]
    # Symbol at every frequency of one axis: exp(-2πi f t d / N), f = g + j·N/s.
    symbol = block.astype(np.complex128)
    for position, (axis, N) in enumerate(zip(axes, periods, strict=True)):
        angle = np.outer(np.arange(N), np.arange(axis.taps) * axis.dilation) % N
        dft = np.exp(-2j * np.pi * angle / N)
        symbol = np.moveaxis(np.tensordot(dft, symbol, axes=(1, position)), 0, position)
    # A real kernel's symbol is conjugate at -f: half of the first axis is enough.
    shape = [n for a, g in zip(axes, grid, strict=True) for n in (a.stride, g)]
    symbol = symbol.reshape(*shape, ci, co)
    rank = len(axes)
    order = [2 * i + 1 for i in range(rank)] + [2 * i for i in range(rank)]
    symbol = symbol.transpose(*order, 2 * rank, 2 * rank + 1)
    aliases = math.prod(a.stride for a in axes)
    symbol = symbol[: grid[0] // 2 + 1].reshape(-1, aliases * ci, co) / math.sqrt(aliases)
    if aliases * ci < co:
        symbol = np.conj(symbol.swapaxes(-1, -2))
    side, terms = symbol.shape[-1], symbol.shape[-2]
    eigenvalues = len(symbol) * side**3 * 10 <= EIGENVALUE_FLOPS
    best = 0.0
    chunk = max(1, int(2**24 // max(1, side * max(side, terms))))
    for start in range(0, len(symbol), chunk):
        part = symbol[start : start + chunk]
        gram = np.conj(part.swapaxes(-1, -2)) @ part
        traces = np.trace(gram, axis1=-2, axis2=-1).real
        if eigenvalues:
            tops = np.linalg.eigvalsh(gram)[:, -1]
        else:
            tops = _chebyshev_upper_bound(gram)
        worst = [_root_up(t, tr, side, 4 * terms) for t, tr in zip(tops, traces, strict=True)]
        best = max(best, *worst)
    # Each entry of the symbol errs by γ_taps·Σ|K| at most, hence the symbol, in Frobenius norm, by:
    taps = math.prod(a.taps for a in axes)
    error = 8 * (taps + 4) * math.sqrt(taps) * UNIT_ROUNDOFF * np.linalg.norm(block)
    return best + error, eigenvalues


def _chebyshev_upper_bound(gram, squarings=6, steps=20):
    """λ_max of Hermitian positive semidefinite matrices from above, by squarings only.

    For every c > 0: λ_max ≤ c/2·(1 + cosh(acosh(max(1, ‖T‖_F))/2^k)), T = T_{2^k}(2G/c - I) with
    T_{2n} = 2T_n² - I. Power steps choose c near λ_max, which makes the bound tight; they do not
    enter its proof.
    """
    side = gram.shape[-1]
    v = np.ones((len(gram), side, 1)) / math.sqrt(side) + 0j
    v[:, ::2] *= 1.25  # off any symmetry of the all-ones vector
    for _ in range(steps):
        v = gram @ v
        v /= np.maximum(np.linalg.norm(v, axis=1, keepdims=True), np.finfo(float).tiny)
    estimate = np.linalg.norm(gram @ v, axis=(1, 2))
    trace = np.trace(gram, axis1=-2, axis2=-1).real
    c = np.maximum(np.maximum(estimate, trace / side), np.finfo(float).tiny)[:, None, None]
    identity = np.eye(side)
    chebyshev = 2 * gram / c - identity
    error = 4 * side * UNIT_ROUNDOFF
    for _ in range(squarings):
        norm = np.linalg.norm(chebyshev, axis=(1, 2)).max()
        chebyshev = 2 * chebyshev @ chebyshev - identity
        # ‖fl(T²) - T²‖ ≤ γ_n‖T‖_F², and an error e in T becomes at most 4‖T‖e.
        error = 4 * norm * error + 2 * error**2 + (4 * side + 16) * UNIT_ROUNDOFF * norm**2
    frobenius = np.linalg.norm(chebyshev, axis=(1, 2)) + error
    amplified = np.arccosh(np.maximum(frobenius, 1.0)) / 2**squarings
    return c[:, 0, 0] / 2 * (1 + np.cosh(amplified)) * (1 + 16 * UNIT_ROUNDOFF)


def power_iteration(matrix, iterations, start=None):
    """Estimate of the largest singular value of a matrix, never above it but for rounding.

        v ← Wᵀ W v / ‖Wᵀ W v‖,   σ ≈ ‖W v‖ ≤ σ(W)

    It steers and shows; it proves nothing.

    Args:
        matrix: `(in, out)` kernel, y = x W; float32 is iterated in float32.
        iterations: positive number of steps.
        start: `(in,)` vector of an earlier call, or None for a fixed random one.

    Returns:
        `(sigma, vector)`: a float and the unit vector to start the next call from.

    Example:

    >>> import numpy as np
    >>> sigma, vector = power_iteration(np.diag([3.0, 1.0]), 20)
    >>> round(sigma, 6)
    3.0
    """
    matrix = np.asarray(matrix)
    if start is None:
        start = np.random.default_rng(0).normal(size=matrix.shape[0])
    vector, sigma = np.asarray(start, dtype=matrix.dtype).reshape(-1), 0.0
    tiny = np.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        vector = vector / max(np.linalg.norm(vector), tiny)
        image = vector @ matrix
        sigma = float(np.linalg.norm(image))
        vector = matrix @ image
    return sigma, vector / max(np.linalg.norm(vector), tiny)
