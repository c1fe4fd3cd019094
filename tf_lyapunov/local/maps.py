"""Linear operations of a program around a point: adjoints, absolute maps and norms, no matrices.

Every function here dispatches on the type of the operation; a type without an entry is not linear
here (`is_linear` says so) and is bounded by a relaxation or by its gain.
"""

import dataclasses
import functools
import math

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import pooling as geometry
from tf_lyapunov.program.families.linear import Linear
from tf_lyapunov.program.families.merging import Joined, Weighted
from tf_lyapunov.program.families.moving import Moved
from tf_lyapunov.program.families.norms import WindowNorm, window_norm_gain
from tf_lyapunov.program.families.pooling import Pooled
from tf_lyapunov.program.families.scaling import Scaled
from tf_lyapunov.program.operation import EXACT, Signal
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import convolution_taps

# Entries of a block of rows that is worked on at once.
_CLOSE = 2**18
# Rows, and entries of a matrix, from which its zero columns are worth leaving out.
_ROWS, _LARGE = 32, 2**15


def is_linear(operation):
    """Whether an operation is affine and has an adjoint here."""
    if isinstance(operation, Pooled):
        return operation.kind == "mean"
    if isinstance(operation, WindowNorm):
        return operation.p is None
    return adjoint.dispatch(type(operation)) is not adjoint.dispatch(object)


def applied(operation, values):
    """The operation itself on arrays (n, …), by NumPy in their format."""
    if isinstance(operation, Moved) and is_flattening(operation, values[0][0].size):
        return values[0].reshape(len(values[0]), *operation.index.shape)
    if isinstance(operation, Linear) and operation.linear_map.kind == "conv":
        x = values[0]
        y = convolved_forth(np.moveaxis(x, 1, -1) if operation.channels_first else x,
                            operation.kernel, operation.linear_map)  # fmt: skip
        y = np.moveaxis(y, -1, 1) if operation.channels_first else y
        return y if operation.bias is None else y + offset(operation)
    return forwards(operation, values)


@functools.singledispatch
def forwards(operation, values):
    """An operation that is not a program's own on arrays."""
    return operation.forward([Signal(v) for v in values], EXACT).value


@functools.singledispatch
def adjoint(operation, c, shapes):
    """Wᵀc per input, for y = Σ_k W_k x_k + b.

    Args:
        operation: a linear `Operation`.
        c: float64 (rows, *output shape).
        shapes: shapes of the inputs' samples.

    Returns:
        List of float64 (rows, *shape).
    """
    raise TypeError(f"No adjoint is known. Received: {type(operation).__name__}.")


@functools.singledispatch
def absolute(operation, sizes):
    """|W|s: what elementwise bounds |x_k| ≤ s_k say of |Wx|, for arrays (n, …)."""
    raise TypeError(f"No absolute map is known. Received: {type(operation).__name__}.")


@functools.singledispatch
def offset(operation):
    """b, of a shape that broadcasts against an output sample, or None."""
    return None


@functools.singledispatch
def terms(operation, shapes):
    """Products per entry of Wx or of Wᵀc, at most."""
    return 4


@functools.singledispatch
def norms(operation, shapes):
    """‖W_k‖ per input, upper bounds, so that ‖Σ W_k d_k‖ ≤ Σ ‖W_k‖‖d_k‖."""
    raise TypeError(f"No norm is known. Received: {type(operation).__name__}.")


def radius(operation, shapes, radii):
    """Bound on ‖W d‖ for inputs that move by ‖d_k‖ ≤ radii[k]."""
    if isinstance(operation, Joined):
        return rounding.root_sum_squares_up(*radii)
    pairs = zip(norms(operation, shapes), radii, strict=True)
    return rounding.sum_up(*(rounding.product_up(n, r) for n, r in pairs))


def size_up(operation, sizes):
    """Bound on what is summed up in an output entry: |W|s + |b|."""
    found = absolute(operation, sizes)
    shift = offset(operation)
    return found if shift is None else found + np.abs(shift)


def broadcast(shapes):
    """Shape of a sample that merges samples of these shapes."""
    return np.broadcast_shapes(*(tuple(s) for s in shapes))


def reduced_to(c, shape):
    """Adjoint of broadcasting samples of `shape` to those of `c`."""
    extra = c.ndim - 1 - len(shape)
    if extra:
        c = c.sum(axis=tuple(range(1, 1 + extra)))
    axes = tuple(
        i for i, (n, m) in enumerate(zip(c.shape[1:], shape, strict=True), 1) if m == 1 and n != 1
    )
    return c.sum(axis=axes, keepdims=True) if axes else c


# Dense layers and convolutions ------------------------------------------------------------------


@adjoint.register
def _(operation: Linear, c, shapes):
    if operation.linear_map.kind == "dense":
        return [_dense_back(c, operation.kernel)]
    if operation.channels_first:
        c = np.moveaxis(c, 1, -1)
    (shape,) = shapes
    sizes = (*shape[1:], shape[0]) if operation.channels_first else shape
    found = convolved_back(c, operation.kernel, operation.linear_map, sizes)
    return [np.moveaxis(found, -1, 1) if operation.channels_first else found]


def _dense_back(c, kernel):
    """c @ kernel.T, without columns of c that are zero: those of units that are off everywhere."""
    if c.ndim == 2 and len(c) >= _ROWS and kernel.size >= _LARGE:
        used = np.flatnonzero(np.any(c != 0, axis=0))
        if 4 * len(used) < 3 * kernel.shape[1]:
            return c[:, used] @ kernel[:, used].T
    return c @ kernel.T


@absolute.register
def _(operation: Linear, sizes):
    return operation._map(sizes[0], np.abs(operation.kernel))


@offset.register
def _(operation: Linear):
    if operation.bias is None:
        return None
    rank = 2 if operation.linear_map.kind == "dense" else operation.kernel.ndim
    return operation._shaped(operation.bias, rank)


@terms.register
def _(operation: Linear, shapes):
    return int(operation.kernel.size // min(operation.kernel.shape[-2:]))


@norms.register
def _(operation: Linear, shapes):
    return [_kernel_norm(_Kept(operation), tuple(shapes[0]))]


class _Kept:
    """An operation as a key of a cache: the same object, whatever it holds."""

    def __init__(self, operation):
        self.operation = operation

    def __hash__(self):
        return id(self.operation)

    def __eq__(self, other):
        return self.operation is other.operation


@functools.lru_cache(maxsize=256)
def _kernel_norm(kept, shape):
    operation = kept.operation
    linear_map = operation.linear_map
    if linear_map.kind != "dense":
        sizes = (*shape[1:], shape[0]) if operation.channels_first else shape
        linear_map = dataclasses.replace(linear_map, input_shape=sizes)
    return float(norm_upper_bound(operation.kernel, linear_map).value)


def convolved_back(c, kernel, linear_map, sizes):
    """Adjoint of `convolved`: rows (n, *output sizes, channels) to (n, *sizes), channels last.

    Example:

    >>> from tf_lyapunov.theory.operators import LinearMap
    >>> kernel = np.array([1.0, -1.0]).reshape(2, 1, 1)
    >>> c = np.array([[[1.0], [10.0]]])
    >>> convolved_back(c, kernel, LinearMap("conv", (3, 1)), (3, 1)).ravel().tolist()
    [1.0, 9.0, -10.0]
    """
    linear_map = dataclasses.replace(linear_map, input_shape=tuple(sizes))
    out = np.zeros((len(c), *sizes), c.dtype)
    taps = convolution_taps(kernel.shape, linear_map)
    if linear_map.kind != "conv" or linear_map.groups != 1:
        turned = linear_map.kind == "conv_transpose"
        for tap, narrow, wide in taps:
            read, write = (wide, narrow) if turned else (narrow, wide)
            out[write] += _tap_back(c[read], kernel[tap], linear_map)
        return out
    # All taps in one product of two matrices, for as many rows as stay close to the processor.
    flat, inner, outer = kernel.shape[:-2], *kernel.shape[-2:]
    count = math.prod(flat)
    matrix = np.ascontiguousarray(kernel.reshape(-1, outer).T)
    for rows in _blocks(len(c), math.prod(c.shape[1:-1]) * count * inner):
        some, found = c[rows], out[rows]
        parts = some.reshape(-1, outer) @ matrix
        parts = parts.reshape(*some.shape[:-1], count, inner)
        for tap, narrow, wide in taps:
            found[wide] += parts[(*narrow, int(np.ravel_multi_index(tap, flat)))]
    return out


def _blocks(rows, size):
    """Slices of rows of so many entries each."""
    step = max(_CLOSE // max(size, 1), 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def convolved_forth(x, kernel, linear_map):
    """A convolution (n, *sizes, channels) in the format of `x`, one product of matrices."""
    linear_map = dataclasses.replace(linear_map, input_shape=tuple(x.shape[1:]))
    shape = linear_map.output_shape(kernel.shape)
    groups, inner, outer = linear_map.groups, *kernel.shape[-2:]
    count = math.prod(kernel.shape[:-2])
    flat = kernel.shape[:-2]
    taps = convolution_taps(kernel.shape, linear_map)
    out = np.empty((len(x), *shape), np.result_type(x, kernel))
    for rows in _blocks(len(x), math.prod(shape[:-1]) * groups * count * inner):
        some = x[rows]
        patches = np.zeros((len(some), *shape[:-1], groups, count, inner), x.dtype)
        for tap, narrow, wide in taps:
            part = some[wide]
            at = (*narrow, slice(None), int(np.ravel_multi_index(tap, flat)))
            patches[at] = part.reshape(*part.shape[:-1], groups, inner)
        if groups == 1:
            value = patches.reshape(-1, count * inner) @ kernel.reshape(-1, outer)
        else:
            blocks = kernel.reshape(count, inner, groups, -1)
            value = np.einsum("...gti,tigo->...go", patches, blocks, optimize=True)
        out[rows] = value.reshape(len(some), *shape)
    return out


def _tap_back(c, matrix, linear_map):
    if linear_map.kind == "conv_transpose":
        return c @ matrix
    if linear_map.kind == "depthwise":
        parts = c.reshape(*c.shape[:-1], *matrix.shape)
        return np.einsum("...im,im->...i", parts, matrix)
    groups = linear_map.groups
    parts = c.reshape(*c.shape[:-1], groups, -1)
    blocks = matrix.reshape(len(matrix), groups, -1)
    return np.einsum("...go,igo->...gi", parts, blocks).reshape(*c.shape[:-1], -1)


# Scales, sums, concatenations, moves, means --------------------------------------------------


@adjoint.register
def _(operation: Scaled, c, shapes):
    return [reduced_to(c * operation.scale, shapes[0])]


@absolute.register
def _(operation: Scaled, sizes):
    # Shifts may broadcast the signal to more entries.
    return sizes[0] * np.abs(operation.scale) + 0.0 * operation.shift


@offset.register
def _(operation: Scaled):
    return operation.shift


@terms.register
def _(operation: Scaled, shapes):
    return 8 + max(operation.scale.size, operation.shift.size)


@norms.register
def _(operation: Scaled, shapes):
    out = np.broadcast_shapes(shapes[0], operation.scale.shape, operation.shift.shape)
    repeats = math.prod(out) / max(math.prod(shapes[0]), 1)
    return [rounding.product_up(float(np.abs(operation.scale).max()), rounding.sqrt_up(repeats))]


@adjoint.register
def _(operation: Weighted, c, shapes):
    pairs = zip(operation.weights, shapes, strict=True)
    return [reduced_to(c if w == 1 else w * c, shape) for w, shape in pairs]


@absolute.register
def _(operation: Weighted, sizes):
    return sum(abs(w) * s for w, s in zip(operation.weights, sizes, strict=True))


@terms.register
def _(operation: Weighted, shapes):
    return len(operation.weights) + max(math.prod(s) for s in shapes)


@norms.register
def _(operation: Weighted, shapes):
    size = math.prod(broadcast(shapes))
    repeats = [rounding.sqrt_up(size / max(math.prod(s), 1)) for s in shapes]
    pairs = zip(operation.weights, repeats, strict=True)
    return [rounding.product_up(abs(w), r) for w, r in pairs]


@adjoint.register
def _(operation: Joined, c, shapes):
    axis = operation.axis
    widths = [s[axis - 1 if axis > 0 else axis] for s in shapes]
    return np.split(c, np.cumsum(widths)[:-1], axis=axis)


@absolute.register
def _(operation: Joined, sizes):
    return np.concatenate(sizes, axis=operation.axis)


@norms.register
def _(operation: Joined, shapes):
    return [1.0] * len(shapes)


@adjoint.register
def _(operation: Moved, c, shapes):
    size = math.prod(shapes[0])
    flat = c.reshape(len(c), -1)
    if is_flattening(operation, size):
        return [c.reshape(len(c), *shapes[0])]
    index = operation.index.ravel()
    kept = index > 0
    plain = _permutation(_Kept(operation), size)
    if plain is not None:
        return [flat[:, plain].reshape(len(c), *shapes[0])]
    out = np.zeros((size, len(c)), c.dtype)
    np.add.at(out, index[kept] - 1, flat[:, kept].T)
    return [np.ascontiguousarray(out.T).reshape(len(c), *shapes[0])]


def is_flattening(operation, size):
    """Whether a move leaves all entries in their order."""
    return operation.index.size == size and _in_order(_Kept(operation))


@functools.lru_cache(maxsize=256)
def _in_order(kept):
    index = kept.operation.index.ravel()
    return bool(np.array_equal(index, np.arange(1, len(index) + 1)))


@functools.lru_cache(maxsize=256)
def _permutation(kept, size):
    """Where every input entry went, if each went to one place, or None."""
    index = kept.operation.index.ravel()
    if len(index) != size or not np.array_equal(np.sort(index), np.arange(1, size + 1)):
        return None
    return np.argsort(index)


@absolute.register
def _(operation: Moved, sizes):
    return operation._moved(sizes[0])


@terms.register
def _(operation: Moved, shapes):
    return int(np.bincount(operation.index.ravel())[1:].max(initial=0))


@norms.register
def _(operation: Moved, shapes):
    return [rounding.sqrt_up(terms(operation, shapes))]


@adjoint.register
def _(operation: Pooled, c, shapes):
    (shape,) = shapes
    if operation.kind != "mean":
        raise TypeError("Maxima are not linear.")
    first = operation.channels_first
    sizes = shape[1:] if first else shape[:-1]
    if operation.sizes is None:
        count = math.prod(sizes)
        if not operation.keepdims:
            c = c.reshape(len(c), *([c.shape[-1], *[1] * len(sizes)] if first else
                                    [*[1] * len(sizes), c.shape[-1]]))  # fmt: skip
        return [np.broadcast_to(c / count, (len(c), *shape)).copy()]
    x = np.moveaxis(c, 1, -1) if first else c
    for axis, (n, q, s) in enumerate(zip(sizes, operation.sizes, operation.strides, strict=True)):
        x = _spread(x, axis + 1, n, q, s, operation.padding)
    return [np.moveaxis(x, -1, 1) if first else x]


def _spread(c, axis, n, q, s, padding):
    """Adjoint of means over windows along one axis."""
    cells = geometry._cells(n, q, s, padding)
    inside = (cells >= 0) & (cells < n)
    matrix = np.zeros((len(cells), n))
    rows, columns = np.nonzero(inside)
    matrix[rows, cells[rows, columns]] = 1.0
    matrix /= inside.sum(axis=1, keepdims=True)
    return np.moveaxis(np.moveaxis(c, axis, -1) @ matrix, -1, axis)


@absolute.register
def _(operation: Pooled, sizes):
    if operation.kind != "mean":
        raise TypeError("Maxima are not linear.")
    return operation._pool(sizes[0], "mean")


@terms.register
def _(operation: Pooled, shapes):
    return 4 + 2 * math.prod(operation.sizes or shapes[0])


@norms.register
def _(operation: Pooled, shapes):
    sizes = shapes[0][1:] if operation.channels_first else shapes[0][:-1]
    if operation.sizes is None:
        return [geometry.global_average_gain(sizes)]
    found = geometry.average_pooling_gain(
        operation.sizes, operation.strides, operation.padding, sizes
    )
    return [float(found)]


@adjoint.register
def _(operation: WindowNorm, c, shapes):
    (shape,) = shapes
    cells = window_cells(operation, shape)
    flat = operation.scale * c.reshape(len(c), -1)
    found = np.zeros((len(c), math.prod(shape)), flat.dtype)
    for own in cells.T:
        # Cells of different windows in the same place of each are different.
        held = own >= 0
        found[:, own[held]] += flat[:, held]
    return [found.reshape(len(c), *shape)]


@absolute.register
def _(operation: WindowNorm, sizes):
    return operation._placed(operation.scale * operation._reduced(operation._cells(sizes[0]), None))


@terms.register
def _(operation: WindowNorm, shapes):
    return 4 + 2 * math.prod(operation.sizes or shapes[0])


@norms.register
def _(operation: WindowNorm, shapes):
    return [window_norm_gain(operation, shapes[0])]


def window_cells(operation, shape):
    """Flat input entries of every window of a `WindowNorm`, int (outputs, cells), -1 beyond."""
    cells = operation._cells(np.arange(1, math.prod(shape) + 1).reshape(1, *shape))
    return np.stack([operation._placed(c).reshape(-1) for c in cells], axis=1) - 1


__all__ = ["absolute", "adjoint", "applied", "convolved_back", "is_linear", "norms", "offset",
           "radius", "size_up", "terms"]  # fmt: skip


def applied_shape(operation, shapes):
    """Shape of an output sample."""
    return absolute(operation, [np.zeros((1, *s)) for s in shapes]).shape[1:]
