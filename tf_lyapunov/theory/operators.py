"""Linear maps of layers: geometry, materialised matrices, and norm bounds in float64.

A `LinearMap` says what a kernel does (dense or convolution, input size, stride, padding,
dilation, groups) without its weights. The operator norm of a convolution is that of the whole
map at this size, not that of the reshaped kernel.
"""

import dataclasses
import math

import numpy as np

KINDS = ("dense", "conv", "depthwise", "conv_transpose")
PADDINGS = ("valid", "same", "causal")

# Materialised Gram matrices up to this side are cheap to diagonalise (about a second).
EXACT_SIDE = 1500
# Above this many entries the eigenvalues of the Gram matrix are ten times faster than an SVD, and
# their rounding, γ_m·trace, is still below 1e-9.
SVD_SIZE = 2**14
# Above this many flops the eigenvalues per frequency give way to Chebyshev squarings.
EIGENVALUE_FLOPS = 3e10
UNIT_ROUNDOFF = np.finfo(np.float64).eps / 2


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """Geometry of a layer's linear map, without its weights.

    Kernels keep Keras' layouts: dense `(in, out)`, conv `(*k, in / groups, out)`, depthwise
    `(*k, in, multiplier)`, conv_transpose `(*k, out, in)`. Shapes are channels-last.

    Args:
        kind: `"dense"`, `"conv"`, `"depthwise"` or `"conv_transpose"`.
        input_shape: `(*spatial, channels)` without the batch axis (`(in,)` for dense), or
            `None` for a map that must be bounded at every input size.
        strides, dilation: one integer per spatial axis (or one for all of them).
        padding: `"valid"`, `"same"` or `"causal"` (one spatial axis only).
        groups: channel groups of a `"conv"`.
        output_padding: of a `"conv_transpose"`, or `None` for Keras' default.

    Raises:
        ValueError: if an argument is not one of the above.

    Example:

    >>> LinearMap("conv", (28, 28, 1), strides=(2, 2), padding="same").output_shape((3, 3, 1, 8))
    (14, 14, 8)
    """

    kind: str
    input_shape: tuple | None = None
    strides: tuple = ()
    dilation: tuple = ()
    padding: str = "valid"
    groups: int = 1
    output_padding: tuple | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}. Received: kind={self.kind!r}.")
        if self.padding not in PADDINGS:
            raise ValueError(
                f"`padding` must be one of {PADDINGS}. Received: padding={self.padding!r}."
            )
        for name in ("strides", "dilation", "output_padding", "input_shape"):
            value = getattr(self, name)
            if value is not None:
                value = (value,) if np.ndim(value) == 0 else tuple(value)
                object.__setattr__(self, name, value)
        if self.input_shape is not None and None in self.input_shape:
            object.__setattr__(self, "input_shape", None)
        for name in ("strides", "dilation", "input_shape"):
            if any(int(v) != v or v < 1 for v in getattr(self, name) or ()):
                raise ValueError(
                    f"`{name}` must hold positive integers. Received: {name}={getattr(self, name)}."
                )
        if int(self.groups) != self.groups or self.groups < 1:
            raise ValueError(
                f"`groups` must be a positive integer. Received: groups={self.groups}."
            )

    def rank(self, kernel_shape):
        """Number of spatial axes that the kernel has."""
        return 0 if self.kind == "dense" else len(kernel_shape) - 2

    def _per_axis(self, name, rank):
        value = getattr(self, name) or (1,)
        value = tuple(int(v) for v in value)
        if len(value) == 1:
            return value * rank
        if len(value) != rank:
            raise ValueError(
                f"`{name}` must hold one integer per spatial axis ({rank}). "
                f"Received: {name}={value}."
            )
        return value

    def output_shape(self, kernel_shape):
        """Shape `(*spatial, channels)` of the output, or `None` where the input size is unknown."""
        if self.input_shape is None:
            return None
        if self.kind == "dense":
            return (*self.input_shape[:-1], int(kernel_shape[1]))
        rank = self.rank(kernel_shape)
        sizes, channels = self.input_shape[:-1], self.input_shape[-1]
        if len(sizes) != rank:
            raise ValueError(
                f"`input_shape` must be {rank} sizes and the channels for a kernel of shape "
                f"{tuple(kernel_shape)}. Received: input_shape={self.input_shape}."
            )
        axes = zip(
            sizes,
            kernel_shape[:rank],
            self._per_axis("strides", rank),
            self._per_axis("dilation", rank),
            self.output_padding or (None,) * rank,
            strict=True,
        )
        if self.kind == "conv_transpose":
            spatial = tuple(_transposed_size(n, k, s, d, self.padding, o) for n, k, s, d, o in axes)
            return (*spatial, int(kernel_shape[rank]))
        spatial = tuple(_size(n, k, s, d, self.padding) for n, k, s, d, _ in axes)
        if any(n < 1 for n in spatial):
            raise ValueError(
                f"The kernel {tuple(kernel_shape)} does not fit the input. "
                f"Received: input_shape={self.input_shape}, padding={self.padding!r}."
            )
        out = kernel_shape[-1] * (channels if self.kind == "depthwise" else 1)
        return (*spatial, int(out))


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


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution written as y[i] = Σ_t K[t] x[i·stride + t·dilation - left].

    `size` and `output` are None where the input size is unknown.
    """

    taps: int
    stride: int
    dilation: int
    size: int | None
    output: int | None
    left: int

    @property
    def extent(self):
        """Effective kernel length, (taps - 1)·dilation + 1."""
        return (self.taps - 1) * self.dilation + 1

    @property
    def period(self):
        """Smallest circulant size whose compression is the zero-padded map (theory, section 7)."""
        reach = max(
            self.size + max(self.left, 0),
            (self.output - 1) * self.stride + self.extent - self.left,
            self.output * self.stride,
        )
        return self.stride * math.ceil(reach / self.stride)


def _size(n, k, s, d, padding):
    extent = (k - 1) * d + 1
    return -(-n // s) if padding in ("same", "causal") else (n - extent) // s + 1


def _transposed_size(n, k, s, d, padding, output_padding):
    extent = (k - 1) * d + 1
    if output_padding is None:
        return n * s if padding == "same" else n * s + max(extent - s, 0)
    if padding == "same":
        return (n - 1) * s + extent - 2 * (extent // 2) + output_padding
    return (n - 1) * s + extent + output_padding


def _axis(n, k, s, d, padding):
    extent = (k - 1) * d + 1
    if n is None:
        return Axis(k, s, d, None, None, 0)
    m = _size(n, k, s, d, padding)
    left = 0
    if padding == "same":
        left = max((m - 1) * s + extent - n, 0) // 2
    elif padding == "causal":
        left = extent - 1
    return Axis(k, s, d, n, m, left)


def as_convolution(kernel, linear_map):
    """The convolution with the same operator norm: kernel blocks and one `Axis` per spatial axis.

    A transposed convolution is the adjoint of the convolution from its output grid to its input
    grid. Groups (and the channels of a depthwise convolution) act on disjoint channels.

    Args:
        kernel: array in Keras' layout for `linear_map.kind` (not dense).
        linear_map: `LinearMap`.

    Returns:
        `(blocks, axes)`: blocks `(groups, *k, in, out)`; the norm is the maximum over groups.
    """
    rank = linear_map.rank(kernel.shape)
    if linear_map.kind == "depthwise":
        blocks = np.moveaxis(kernel, rank, 0)[..., None, :]
    else:
        groups = linear_map.groups
        if kernel.shape[-1] % groups:
            raise ValueError(
                "`groups` must divide the kernel's output channels. "
                f"Received: groups={groups}, kernel.shape={kernel.shape}."
            )
        blocks = np.stack(np.split(kernel, groups, axis=-1))
    return blocks, convolution_axes(kernel.shape, linear_map)


def convolution_axes(kernel_shape, linear_map):
    """One `Axis` per spatial axis of the convolution that `linear_map` is, or is the adjoint of.

    For a transposed convolution, `size` is the layer's output size and `output` its input size.
    """
    rank = linear_map.rank(kernel_shape)
    if linear_map.input_shape is None:
        sizes = (None,) * rank
    elif linear_map.kind == "conv_transpose":
        sizes = linear_map.output_shape(kernel_shape)[:rank]
    else:
        linear_map.output_shape(kernel_shape)  # refuses kernels that do not fit
        sizes = linear_map.input_shape[:rank]
    strides = linear_map._per_axis("strides", rank)
    dilation = linear_map._per_axis("dilation", rank)
    axes = [
        _axis(*geometry, linear_map.padding)
        for geometry in zip(sizes, kernel_shape[:rank], strides, dilation, strict=True)
    ]
    if linear_map.kind == "conv_transpose" and linear_map.input_shape is not None:
        # Output padding may leave the adjoint's grid one step longer than the layer's input.
        axes = [
            dataclasses.replace(a, output=n, left=_transposed_left(a, n, linear_map))
            for a, n in zip(axes, linear_map.input_shape[:rank], strict=True)
        ]
    return axes


def _transposed_left(axis, n, linear_map):
    if linear_map.padding != "same":
        return 0
    return max((n - 1) * axis.stride + axis.extent - axis.size, 0) // 2


def _axis_entries(axis):
    """Rows, columns and taps (i, i·s + t·d - left, t) inside the input."""
    i = np.arange(axis.output)[:, None]
    t = np.arange(axis.taps)[None, :]
    column = i * axis.stride + t * axis.dilation - axis.left
    rows, taps = np.broadcast_arrays(i, t)
    inside = (column >= 0) & (column < axis.size)
    return rows[inside], column[inside], taps[inside]


def convolution_matrix(kernel, linear_map):
    """Sparse matrix of the map on row-major flattened channels-last signals.

    Args:
        kernel: array in Keras' layout.
        linear_map: `LinearMap` with a known `input_shape`.

    Returns:
        `scipy.sparse.csr_matrix` of shape (outputs, inputs), float64.

    Raises:
        ValueError: if the input size is unknown.

    Example:

    >>> import numpy as np
    >>> kernel = np.array([1.0, -1.0]).reshape(2, 1, 1)
    >>> convolution_matrix(kernel, LinearMap("conv", (3, 1))).toarray()
    array([[ 1., -1.,  0.],
           [ 0.,  1., -1.]])
    """
    import scipy.sparse

    kernel = np.asarray(kernel, dtype=np.float64)
    if linear_map.kind == "dense":
        matrix = scipy.sparse.csr_matrix(kernel.T)
        positions = math.prod((linear_map.input_shape or (1,))[:-1])
        return scipy.sparse.kron(scipy.sparse.identity(positions), matrix, format="csr")
    if linear_map.input_shape is None:
        raise ValueError(
            "A convolution can be materialised only at a known input size. "
            "Received: input_shape=None. Pass `input_shape=(*spatial, channels)`."
        )
    blocks, axes = as_convolution(kernel, linear_map)
    groups, ci, co = blocks.shape[0], blocks.shape[-2], blocks.shape[-1]
    inputs = math.prod(a.size for a in axes) * groups * ci
    outputs = math.prod(a.output for a in axes) * groups * co
    matrix = scipy.sparse.csr_matrix((outputs, inputs))
    for group, block in enumerate(blocks):
        part = _block_matrix(block, axes).tocoo()
        rows = part.row // co * (groups * co) + group * co + part.row % co
        columns = part.col // ci * (groups * ci) + group * ci + part.col % ci
        matrix += scipy.sparse.csr_matrix((part.data, (rows, columns)), shape=matrix.shape)
    return matrix.T.tocsr() if linear_map.kind == "conv_transpose" else matrix


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
    matrix = _block_matrix(block, axes)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    terms = block.size
    gram = gram.toarray()
    value = np.linalg.eigvalsh(gram)[-1]
    return _root_up(value, np.trace(gram), gram.shape[0], terms)


def _block_matrix(block, axes):
    """Sparse matrix of one group: channels-last, row-major, kernel block `(*k, in, out)`."""
    import scipy.sparse

    row, column, tap = np.zeros(1, int), np.zeros(1, int), np.zeros(1, int)
    for axis in axes:
        r, c, t = _axis_entries(axis)
        row = (row[:, None] * axis.output + r).ravel()
        column = (column[:, None] * axis.size + c).ravel()
        tap = (tap[:, None] * axis.taps + t).ravel()
    ci, co = block.shape[-2:]
    values = block.reshape(-1, ci, co)[tap]
    rows = np.broadcast_to(row[:, None, None] * co + np.arange(co), values.shape)
    columns = np.broadcast_to(column[:, None, None] * ci + np.arange(ci)[:, None], values.shape)
    return scipy.sparse.csr_matrix(
        (values.ravel(), (rows.ravel(), columns.ravel())),
        shape=(math.prod(a.output for a in axes) * co, math.prod(a.size for a in axes) * ci),
    )


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
