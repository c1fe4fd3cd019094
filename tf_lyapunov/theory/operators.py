"""Linear maps of layers: geometry and materialised matrices.

A `LinearMap` says what a kernel does (dense or convolution, input size, stride, padding,
dilation, groups) without its weights. The operator norm of a convolution is that of the whole
map at this size, not that of the reshaped kernel.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

KINDS = ("dense", "conv", "depthwise", "conv_transpose")
PADDINGS = ("valid", "same", "causal")


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


@functools.lru_cache(maxsize=512)
def convolution_taps(kernel_shape, linear_map):
    """Every tap of a convolution of known size with the slices that it joins.

    Args:
        kernel_shape: tuple of Keras' layout.
        linear_map: `LinearMap` with a known `input_shape`.

    Returns:
        Tuple of `(tap, narrow, wide)`: index of the kernel, and slices of a batch of signals on the
        grid of outputs and of inputs (of a transposed convolution the other way round).
    """
    found = []
    axes = convolution_axes(kernel_shape, linear_map)
    for tap in itertools.product(*(range(a.taps) for a in axes)):
        narrow, wide = [slice(None)], [slice(None)]
        for axis, t in zip(axes, tap, strict=True):
            # Positions i of the narrow grid whose partner i·s + t·d - left is in the wide one.
            shift = t * axis.dilation - axis.left
            first = max(-(shift // axis.stride), 0)
            last = min((axis.size - 1 - shift) // axis.stride, axis.output - 1)
            if last < first:
                break
            narrow.append(slice(first, last + 1))
            begin = first * axis.stride + shift
            wide.append(slice(begin, last * axis.stride + shift + 1, axis.stride))
        else:
            found.append((tap, tuple(narrow), tuple(wide)))
    return tuple(found)


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


def _entries(axes):
    """Row and column of every pair of positions that a tap joins, and the tap, all flattened."""
    row, column, tap = np.zeros(1, int), np.zeros(1, int), np.zeros(1, int)
    for axis in axes:
        r, c, t = _axis_entries(axis)
        row = (row[:, None] * axis.output + r).ravel()
        column = (column[:, None] * axis.size + c).ravel()
        tap = (tap[:, None] * axis.taps + t).ravel()
    return row, column, tap


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
        part = block_matrix(block, axes).tocoo()
        rows = part.row // co * (groups * co) + group * co + part.row % co
        columns = part.col // ci * (groups * ci) + group * ci + part.col % ci
        matrix += scipy.sparse.csr_matrix((part.data, (rows, columns)), shape=matrix.shape)
    return matrix.T.tocsr() if linear_map.kind == "conv_transpose" else matrix


def block_matrix(block, axes):
    """Sparse matrix of one group: channels-last, row-major, kernel block `(*k, in, out)`."""
    import scipy.sparse

    row, column, tap = _entries(axes)
    ci, co = block.shape[-2:]
    values = block.reshape(-1, ci, co)[tap]
    rows = np.broadcast_to(row[:, None, None] * co + np.arange(co), values.shape)
    columns = np.broadcast_to(column[:, None, None] * ci + np.arange(ci)[:, None], values.shape)
    return scipy.sparse.csr_matrix(
        (values.ravel(), (rows.ravel(), columns.ravel())),
        shape=(math.prod(a.output for a in axes) * co, math.prod(a.size for a in axes) * ci),
    )


def block_gram(block, axes):
    """Sparse Gram matrix MᵀM of the `block_matrix` M of one group, on inputs.

    Products of taps K_t K_uᵀ are formed once and added where both taps meet an output:

        (MᵀM)[x, x + (u - t)·dilation] = Σ_{t, u} K_t K_uᵀ,   x = i·s + t·dilation - left.

    Every entry is a sum of the products that the matrices give, in another order. The memory it
    takes grows with the dilation.
    """
    import scipy.sparse

    ci = block.shape[-2]
    sizes = [a.size for a in axes]
    reaches = [min((a.taps - 1) * a.dilation, a.size - 1) for a in axes]
    flat = block.reshape(-1, block.shape[-1])
    products = (flat @ flat.T).reshape(-1, ci, math.prod(block.shape[:-2]), ci)
    found = np.zeros((*sizes, *(2 * r + 1 for r in reaches), ci, ci))
    indices = list(itertools.product(*(range(a.taps) for a in axes)))
    for (i, t), (j, u) in itertools.product(enumerate(indices), repeat=2):
        places = [_meeting(*both) for both in zip(axes, t, u, strict=True)]
        moved = [(b - a) * x.dilation for a, b, x in zip(t, u, axes, strict=True)]
        if all(abs(m) <= r for m, r in zip(moved, reaches, strict=True)):
            offsets = [m + r for m, r in zip(moved, reaches, strict=True)]
            found[(*places, *offsets)] += products[i, :, j]
    index = np.indices(found.shape[:-2], sparse=True)
    rank, row, column, inside = len(axes), 0, 0, True
    for place, offset, size, reach in zip(index[:rank], index[rank:], sizes, reaches, strict=True):
        other = place + offset - reach
        inside = inside & (other >= 0) & (other < size)
        row, column = row * size + place, column * size + other
    shape = found.shape[:-2]
    inside = np.broadcast_to(inside, shape)
    row, column = (np.broadcast_to(a, shape)[inside][:, None, None] * ci for a in (row, column))
    values, channels = found[inside], np.arange(ci)
    row = np.broadcast_to(row + channels[:, None], values.shape).ravel()
    column = np.broadcast_to(column + channels, values.shape).ravel()
    side = math.prod(sizes) * ci
    return scipy.sparse.csr_matrix((values.ravel(), (row, column)), shape=(side, side))


def _meeting(axis, t, u):
    """Inputs that tap t reads for the outputs for which tap u reads one too."""
    shifts = [tap * axis.dilation - axis.left for tap in (t, u)]
    first = max(-(min(shifts) // axis.stride), 0)
    last = min((axis.size - 1 - max(shifts)) // axis.stride, axis.output - 1)
    begin = first * axis.stride + shifts[0]
    return slice(begin, max(begin + (last - first) * axis.stride + 1, begin), axis.stride)


def entries_of_block(block_shape, axes):
    """Number of entries of a `block_matrix` that taps are written to."""
    pairs = (len(_axis_entries(axis)[0]) for axis in axes)
    return math.prod(pairs) * math.prod(block_shape[-2:])


def block_matrices(blocks, axes):
    """Dense matrices `(groups, outputs, inputs)` of blocks `(groups, *k, in, out)`.

    Rows and columns as in `block_matrix`.
    """
    row, column, tap = _entries(axes)
    ci, co = blocks.shape[-2:]
    outputs, inputs = math.prod(a.output for a in axes), math.prod(a.size for a in axes)
    found = np.zeros((len(blocks), outputs, inputs, ci, co))
    found[:, row, column] = blocks.reshape(len(blocks), -1, ci, co)[:, tap]
    return found.transpose(0, 1, 4, 2, 3).reshape(len(blocks), outputs * co, inputs * ci)
