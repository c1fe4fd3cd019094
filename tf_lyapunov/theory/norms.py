"""Operator norms of linear maps in float64: upper bounds, and power iteration from below."""

import collections
import contextlib
import contextvars
import dataclasses
import hashlib
import math
import numbers
import threading

import numpy as np

from tf_lyapunov.theory.costs import SMALLEST_SIDE, announce
from tf_lyapunov.theory.eigenvalues import (
    SMALL_SIDE,
    Grams,
    gamma,
    largest_banded,
    largest_eigenvalue,
    largest_of_stack,
)
from tf_lyapunov.theory.gram_symbols import ENTRIES, largest_of_symbol
from tf_lyapunov.theory.operators import (
    as_convolution,
    block_gram,
    block_matrices,
    block_matrix,
    convolution_taps,
    entries_of_block,
)
from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF
from tf_lyapunov.theory.symbols import Symbol, circulant, sampled
from tf_lyapunov.theory.threads import one_thread

# Materialised Gram matrices up to this side are factorised whatever their band.
EXACT_SIDE = 1500
# Larger ones up to the second side are where factors of their band take fewer products than this;
# on longer axes the circulant is within 0.1%.
EXACT_BANDED_SIDE, EXACT_PRODUCTS = 6000, 2e9
# Above this many entries the Gram matrix is faster than an SVD, and its rounding, γ_m·trace, is
# still below 1e-9.
SVD_SIZE = 2**14
# Below this many products a call, threads of BLAS cost more than they bring.
_THREADED = 1e9
# Powers of two of the largest entry at which squares are far from over- and underflow, and entries
# from which a copy is saved there.
_NEAR, _LARGE = 64, 2**18
# Share of entries that are not zero from which a matrix is treated as full.
_DENSE = 0.1
# Bounds remembered: a few hundred bytes each.
REMEMBERED = 4096


@dataclasses.dataclass(frozen=True)
class NormBound:
    """An upper bound on an operator norm and how it was found.

    Attributes:
        value: float, at least the exact-arithmetic norm of the map.
        method: `"svd"`, `"gram"`, `"pointwise"`, `"materialised"`, `"frequency"`, `"size_free"`.
        exact: whether the bound equals the norm up to rounding.
    """

    value: float
    method: str
    exact: bool


_tolerance = contextvars.ContextVar("tolerance", default=0.0)


@contextlib.contextmanager
def tolerated(tol):
    """Context in which `tol` is that of `norm_upper_bound` where none is given.

    Example:

    >>> from tf_lyapunov.theory.operators import LinearMap
    >>> with tolerated(0.1):
    ...     bound = norm_upper_bound(np.eye(200), LinearMap("dense"))
    >>> 1.0 <= bound.value <= 1.1 * (1 + 1e-9)
    True
    """
    token = _tolerance.set(checked_tolerance(tol))
    try:
        yield
    finally:
        _tolerance.reset(token)


def checked_tolerance(tol):
    """A float ≥ 0 that is finite.

    Raises:
        ValueError: if it is something else.
    """
    is_number = isinstance(tol, numbers.Real) and not isinstance(tol, bool)
    if not is_number or not 0 <= tol < math.inf:
        raise ValueError(f"`tol` must be a number, at least 0. Received: tol={tol!r}.")
    return float(tol)


def norm_upper_bound(kernel, linear_map, *, method="auto", tol=None):
    """Upper bound, in float64, on the operator norm of a layer's linear map.

    Dense maps, and convolutions of which one tap is ever used: SVD, or the largest eigenvalue of
    the Gram matrix. Convolutions of known size: the same of the materialised map where its smaller
    side is at most 1500 or its band narrow, else of the circulant whose compression the zero-padded
    map is, block by block of frequencies,

        σ ≤ max_f ‖(1/√s)·[K̂(f), K̂(f + N/s), …]‖,   N ≥ n + max(p, k-1-p) per axis.

    Unknown size, and long axes: the maximum over a grid of N frequencies per axis divided by
    cos(πD/2N), D the degree of the Gram symbol (see `symbols.sampled`). Every eigenvalue is proved
    by Cholesky factors (see `eigenvalues`); rounding is added on the upper side.

    Bounds are remembered by a digest of the kernel's bytes: asking again costs its hash.

    Args:
        kernel: array in Keras' layout, any real dtype; read as float64.
        linear_map: `LinearMap`.
        method: `"auto"`, `"materialised"`, `"frequency"` or `"size_free"`.
        tol: float ≥ 0, relative: what the bound may exceed the norm (of the circulant, where it
            is one) by, which saves eigenvalues. The bound holds for any. None: that of
            `tolerated`, or 0.

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
    tol = _tolerance.get() if tol is None else checked_tolerance(tol)
    key = (_digest(kernel), kernel.shape, linear_map, method, tol)
    found = _remembered(key)
    if found is None:
        found = _norm_upper_bound(kernel, linear_map, method, tol)
        _remember(key, found)
    return found


_memory, _lock = collections.OrderedDict(), threading.Lock()


def forget():
    """Empties the memory of bounds."""
    with _lock:
        _memory.clear()


def _digest(kernel):
    # Processors have instructions for this hash.
    return hashlib.sha256(np.ascontiguousarray(kernel)).digest()


def _remembered(key):
    with _lock:
        if key in _memory:
            _memory.move_to_end(key)
        return _memory.get(key)


def _remember(key, bound):
    with _lock:
        _memory[key] = bound
        while len(_memory) > REMEMBERED:
            _memory.popitem(last=False)


def _norm_upper_bound(kernel, linear_map, method, tol):
    kernel = _without_idle_taps(kernel, linear_map)
    largest = max(float(kernel.max(initial=0.0)), -float(kernel.min(initial=0.0)))
    if largest == 0.0:
        return NormBound(0.0, "zero", True)
    # A power of two keeps the scaling exact and the squares away from over- and underflow.
    power = math.frexp(largest)[1]
    side = min(kernel.shape[-2:])
    if (side >= SMALLEST_SIDE or kernel.size >= _LARGE) and abs(power) < _NEAR:
        power = 0  # no copy is made
    small = side**2 * max(kernel.shape[-2:]) < _THREADED
    with one_thread() if small else contextlib.nullcontext():
        scaled = np.ldexp(kernel, -power) if power else kernel
        bound = _scaled_norm_upper_bound(scaled, linear_map, method, (1 + tol) ** 2 - 1)
    try:
        value = math.nextafter(math.ldexp(float(bound.value), power), math.inf)
    except OverflowError:
        value = math.inf
    return dataclasses.replace(bound, value=value)


def _without_idle_taps(kernel, linear_map):
    """The kernel with zeros where a tap joins no two positions.

    What is never used must not set the scale, below which squares of what is used underflow.
    """
    if linear_map.kind == "dense" or linear_map.input_shape is None:
        return kernel
    taps = kernel.shape[: linear_map.rank(kernel.shape)]
    used = [tap for tap, _, _ in convolution_taps(kernel.shape, linear_map)]
    if len(used) == math.prod(taps):
        return kernel
    found = np.zeros_like(kernel)
    for tap in used:
        found[tap] = kernel[tap]
    return found


def _scaled_norm_upper_bound(kernel, linear_map, method, tol):
    if linear_map.kind == "dense":
        return _dense(kernel, tol)
    known = linear_map.input_shape is not None
    if not known and method in ("materialised", "frequency"):
        raise ValueError(
            f"`method` needs a known input size. Received: method={method!r}, input_shape=None."
        )
    blocks, axes = as_convolution(kernel, linear_map)
    if method == "auto":
        tap = _only_tap(kernel, linear_map, known)
        if tap is not None:
            return _pointwise(blocks[(slice(None), *tap)], tol)
    if known and method in ("auto", "materialised"):
        bound = _exact(blocks, axes, tol, method == "materialised")
        if bound is not None:
            return bound
    if known and method != "size_free":
        name, grid = "frequency", circulant(axes)
    else:
        name, grid = "size_free", sampled(axes)
    return NormBound(float(_frequency_norms(blocks, grid, tol).max()), name, False)


def _dense(kernel, tol):
    if kernel.size <= SVD_SIZE:
        sigma = np.linalg.svd(kernel, compute_uv=False)[0]
        return NormBound(sigma * (1 + 8 * max(kernel.shape) * UNIT_ROUNDOFF), "svd", True)
    tall = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
    rows, side = tall.shape
    if side >= SMALLEST_SIDE:
        announce(
            f"The norm of a matrix of {rows}×{side}",
            side**2 * (rows + side),  # the Gram matrix, and three factorisations
            8 * (rows * side + side**2),
            "It is remembered while the weights stay as they are.",
        )
    return NormBound(
        _root(largest_eigenvalue(Grams(1, lambda i: tall, len(tall)), tol)), "gram", True
    )


def _root(eigenvalue):
    return math.sqrt(eigenvalue) * (1 + 4 * UNIT_ROUNDOFF)


def _only_tap(kernel, linear_map, known):
    """Index of the one tap that joins positions of the input and the output, or None."""
    taps = kernel.shape[: linear_map.rank(kernel.shape)]
    if math.prod(taps) == 1:
        return (0,) * len(taps)
    if not known:
        return None
    found = convolution_taps(kernel.shape, linear_map)
    return found[0][0] if len(found) == 1 else None


def _pointwise(blocks, tol):
    """Largest norm of a stack of matrices `(groups, in, out)`."""
    if len(blocks) == 1:
        return dataclasses.replace(_dense(blocks[0], tol), method="pointwise")
    tall = _tall(blocks)
    return NormBound(_root(_largest(tall, tall.shape[1], tol)), "pointwise", True)


def _largest(stack, terms, tol):
    """Largest eigenvalue of the Gram matrices of a stack, from above."""
    if stack.shape[-1] > SMALL_SIDE:
        order = np.argsort(-np.linalg.norm(stack, axis=(1, 2)), kind="stable")
        return largest_eigenvalue(Grams(len(stack), stack.__getitem__, terms, order), tol)
    part = max(1, ENTRIES // (stack.shape[-1] * max(stack.shape[1:])))
    parts = (stack[i : i + part] for i in range(0, len(stack), part))
    return max(largest_of_stack(p, terms, tol) for p in parts)


def _exact(blocks, axes, tol, asked):
    """Norm of the materialised map where its Gram matrix is small or has a narrow band, or None."""
    ci, co = blocks.shape[-2:]
    rows, columns = (math.prod(s) for s in zip(*((a.output, a.size) for a in axes), strict=True))
    side = min(rows * co, columns * ci)
    if not asked and side > EXACT_SIDE:
        products = side * _band(axes, ci, co) ** 2
        if side > EXACT_BANDED_SIDE or products > EXACT_PRODUCTS:
            return None
    terms = math.prod(a.taps for a in axes) * max(ci, co)
    if side <= SMALL_SIDE:
        part = max(1, ENTRIES // (rows * co * columns * ci))
        parts = (blocks[i : i + part] for i in range(0, len(blocks), part))
        stacks = (_tall(block_matrices(p, axes)) for p in parts)
        eigenvalue = max(_largest(stack, terms, tol) for stack in stacks)
    elif len(blocks) == 1:
        eigenvalue = _largest_materialised(blocks[0], axes, terms, tol)
    else:
        # Groups whose bound by frequencies is below the best exact norm need no exact one.
        bounds = _frequency_norms(blocks, circulant(axes), 0.0)
        eigenvalue = 0.0
        for i in np.argsort(-bounds, kind="stable"):
            if bounds[i] ** 2 * (1 + 4 * UNIT_ROUNDOFF) <= eigenvalue:
                break
            eigenvalue = max(eigenvalue, _largest_materialised(blocks[i], axes, terms, tol))
    return NormBound(_root(eigenvalue), "materialised", True)


def _largest_materialised(block, axes, terms, tol):
    """Largest eigenvalue of the Gram matrix of one group's map, from above."""
    ci, co = block.shape[-2:]
    rows, columns = math.prod(a.output for a in axes) * co, math.prod(a.size for a in axes) * ci
    if entries_of_block(block.shape, axes) > _DENSE * rows * columns:
        tall = _tall(block_matrices(block[None], axes))[0]
        return largest_eigenvalue(Grams(1, lambda i: tall, terms), tol)
    if columns <= rows and all(a.dilation == 1 for a in axes):
        return largest_banded(block_gram(block, axes), terms, tol)
    matrix = block_matrix(block, axes)
    gram = matrix.T @ matrix if columns <= rows else matrix @ matrix.T
    return largest_banded(gram, terms, tol)


def _tall(stack):
    return stack if stack.shape[-2] >= stack.shape[-1] else stack.swapaxes(-1, -2)


def _band(axes, ci, co):
    """Half the bandwidth of the smaller Gram matrix, at most about."""
    outputs = math.prod(a.output for a in axes) * co <= math.prod(a.size for a in axes) * ci
    band, channels = 0, co if outputs else ci
    for axis in axes:
        size = axis.output if outputs else axis.size
        reach = (axis.extent - 1) // (axis.stride if outputs else 1)
        band = band * size + min(reach, size - 1)
    return (band + 1) * channels


def _frequency_norms(blocks, grid, tol):
    """Per group, max over frequencies of the aliased symbol's norm, from above."""
    axes, periods, inflation = grid
    ci, co = blocks.shape[-2:]
    if min(math.prod(a.stride for a in axes) * ci, co) == 1:
        found = _single_columns(Symbol(blocks, axes, periods))
    else:
        symbols = (Symbol(blocks[i : i + 1], axes, periods) for i in range(len(blocks)))
        found = np.array([_frequency_norm(s, tol) for s in symbols])
    return found * inflation * (1 + 8 * UNIT_ROUNDOFF)


def _single_columns(symbol):
    """The same where every matrix is one column, all groups at once."""
    count, rows = len(symbol.frequencies), symbol.shape[0]
    part = max(1, ENTRIES // (rows * symbol.groups))
    best = np.zeros(symbol.groups)
    for start in range(0, count, part):
        columns = symbol.at(slice(start, start + part))
        squares = np.sum(columns.real**2 + columns.imag**2, axis=(-1, -2))
        best = np.maximum(best, squares.max(axis=0))
    return np.sqrt(best * (1 + gamma(rows + 4))) * (1 + 4 * UNIT_ROUNDOFF) + symbol.error()


def _frequency_norm(symbol, tol):
    rows, side = symbol.shape
    if side > SMALL_SIDE:
        return _root(largest_of_symbol(symbol, tol))
    count = len(symbol.frequencies)
    part = max(1, ENTRIES // (rows * side))
    parts = (symbol.at(slice(j, j + part))[:, 0] for j in range(0, count, part))
    eigenvalue = max(largest_of_stack(stack, rows, tol) for stack in parts)
    return _root(eigenvalue) + float(symbol.error()[0])


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
    largest, power = float(np.max(np.abs(matrix), initial=0.0)), 0
    if not 1e-6 < largest < 1e6 and 0 < largest < math.inf:  # squares under- or overflow
        power = math.frexp(largest)[1]
        matrix = np.ldexp(matrix, -power)
    tiny = np.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        vector = vector / max(np.linalg.norm(vector), tiny)
        image = vector @ matrix
        sigma = float(np.linalg.norm(image))
        vector = matrix @ image
    with np.errstate(over="ignore"):
        sigma = float(np.ldexp(sigma, power))
    return sigma, vector / max(np.linalg.norm(vector), tiny)
