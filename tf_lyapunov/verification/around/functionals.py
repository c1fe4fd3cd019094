"""Linear functionals of signals, and how linear steps carry them back.

A functional is a row c of numbers that reads a signal y as cᵀy. Many are carried at once, and only
on the window of the signal outside which all of them are zero: those of single units of
convolutions read little of what lies before. For y = Wx + b, cᵀy = (Wᵀc)ᵀx + cᵀb.

Rounding. The computed Wᵀc errs by at most γ_n|W|ᵀ|c|, so that cᵀy is off by γ_n|c|ᵀ|W||x| at most:
what `absolute` bounds, for |x| ≤ s. Where W itself is known up to an entrywise error alone, `doubt`
bounds what that changes in y.
"""

import dataclasses
import functools
import math

import numpy as np

from tf_lyapunov.verification.arithmetic import UNIT
from tf_lyapunov.verification.operations import (
    AveragePooling,
    Convolution,
    GlobalPooling,
    Identity,
    Linear,
    Merge,
    Move,
    Scale,
)

# Channels up to which all taps of a convolution are one product.
_FEW = 4


@dataclasses.dataclass(eq=False)
class Functionals:
    """Rows of numbers on a window of a signal.

    Attributes:
        rows: float64 (n, *extent of the window).
        window: `(start, stop)` of each axis but the last, or None for the whole signal.
    """

    rows: np.ndarray
    window: tuple | None = None

    def whole(self, shape):
        """The same on the whole signal of this shape."""
        if self.window is None:
            return self
        rows = np.zeros((len(self.rows), *shape))
        rows[(slice(None), *self.slices())] = self.rows
        return Functionals(rows)

    def slices(self):
        """Slices of the axes of one signal."""
        return () if self.window is None else tuple(slice(a, b) for a, b in self.window)

    def of(self, array):
        """What an array (*shape) holds within the window."""
        return array[self.slices()]

    def plus(self, other, shape):
        """The sum of two on a signal of this shape."""
        if self.window is None or other.window is None:
            return Functionals(self.whole(shape).rows + other.whole(shape).rows)
        window = tuple(
            (min(a, c), max(b, d)) for (a, b), (c, d) in zip(self.window, other.window, strict=True)
        )
        rows = np.zeros((len(self.rows), *(b - a for a, b in window), shape[-1]))
        for part in (self, other):
            place = tuple(
                slice(a - c, b - c) for (a, b), (c, _) in zip(part.window, window, strict=True)
            )
            rows[(slice(None), *place)] += part.rows
        return Functionals(rows, window)


def of_units(units, shape):
    """`Functionals` that read single units, then minus the same, on the window that holds them.

    Args:
        units: int (m,), flat indices within the shape.
        shape: of the signal.
    """
    places = np.unravel_index(units, shape)
    window, extent = None, tuple(shape)
    if len(shape) > 1:
        window = tuple((int(p.min()), int(p.max()) + 1) for p in places[:-1])
        extent = (*(b - a for a, b in window), shape[-1])
        places = [
            *(p - a for p, (a, _) in zip(places[:-1], window, strict=True)),
            places[-1],
        ]
    rows = np.zeros((2 * len(units), *extent))
    index = np.arange(len(units))
    rows[(index, *places)] = 1.0
    rows[(len(units) + index, *places)] = -1.0
    return Functionals(rows, window)


def is_linear(operation):
    """Whether an operation is affine."""
    if isinstance(operation, GlobalPooling):
        return operation.mean
    return back.dispatch(type(operation)) is not back.dispatch(object)


@functools.singledispatch
def back(operation, c, shapes, out):
    """Wᵀc for every input.

    Args:
        operation: an affine operation.
        c: `Functionals` of its output.
        shapes: of the inputs.
        out: shape of the output.

    Returns:
        List of `Functionals`.
    """
    raise TypeError(f"no functional passes {type(operation).__name__}")


@functools.singledispatch
def absolute(operation, sizes):
    """|W|s for elementwise bounds s of the inputs, float64 (1, *shape) each."""
    raise TypeError(f"{type(operation).__name__} is not linear")


@functools.singledispatch
def doubt(operation, sizes):
    """Bound on the change of y that errors of W and b make, for |x| ≤ s; 0.0 if they are exact."""
    return 0.0


@functools.singledispatch
def offset(operation):
    """b, of a shape that broadcasts against a signal, or None."""
    return None


@functools.singledispatch
def terms(operation):
    """Products in an entry of Wx or Wᵀc, at most, roundings of W's own entries included."""
    return 8


@back.register
def _(operation: Linear, c, shapes, out):
    # On the last axis alone: windows of the other axes stay.
    return [Functionals(c.rows @ operation.weight, c.window)]


@absolute.register
def _(operation: Linear, sizes):
    return sizes[0] @ np.abs(operation.weight).T


@doubt.register
def _(operation: Linear, sizes):
    found = operation.bias_error
    if np.ndim(operation.weight_error):
        found = found + sizes[0] @ operation.weight_error.T
    return found


@offset.register
def _(operation: Linear):
    return operation.bias


@terms.register
def _(operation: Linear):
    return sum(operation.weight.shape) + 8


@back.register
def _(operation: Convolution, c, shapes, out):
    (shape,) = shapes
    held, kernels, axes = c.rows, operation.kernels, operation.axes
    window = c.window or tuple((0, a.output) for a in axes)
    starts = [w[0] * a.stride - a.left for w, a in zip(window, axes, strict=True)]
    lengths = [
        (w[1] - w[0] - 1) * a.stride + (a.taps - 1) * a.dilation + 1
        for w, a in zip(window, axes, strict=True)
    ]
    groups, inputs, outputs = kernels.shape[0], *kernels.shape[-2:]
    total = np.zeros((len(held), *lengths, shape[-1]))
    narrow = None
    if groups == 1 and inputs <= _FEW:
        narrow = held @ np.moveaxis(kernels[0], -1, 0).reshape(outputs, -1)
        narrow = narrow.reshape(*held.shape[:-1], -1, inputs)
    for number, tap in enumerate(np.ndindex(*(a.taps for a in axes))):
        place = tuple(
            slice(t * a.dilation, t * a.dilation + (w[1] - w[0] - 1) * a.stride + 1, a.stride)
            for t, a, w in zip(tap, axes, window, strict=True)
        )
        if narrow is not None:
            total[(slice(None), *place)] += narrow[..., number, :]
        elif inputs == outputs == 1:
            total[(slice(None), *place)] += held * kernels[(slice(None), *tap)][:, 0, 0]
        else:
            for g in range(groups):
                part = held[..., g * outputs : (g + 1) * outputs] @ kernels[(g, *tap)].T
                where = (slice(None), *place, slice(g * inputs, (g + 1) * inputs))
                total[where] += part
    # What lies beyond the edge reads zeros.
    kept = [
        (max(a, 0), min(a + n, size))
        for a, n, size in zip(starts, lengths, shape[:-1], strict=True)
    ]
    kept = [(min(a, size), max(b, min(a, size))) for (a, b), size in zip(kept, shape, strict=False)]
    cut = tuple(slice(a - s, b - s) for (a, b), s in zip(kept, starts, strict=True))
    return [Functionals(total[(slice(None), *cut)], tuple(kept))]


@absolute.register
def _(operation: Convolution, sizes):
    return operation.apply(sizes[0], np.abs(operation.kernels))


@doubt.register
def _(operation: Convolution, sizes):
    found = operation.bias_error
    if np.ndim(operation.kernel_error):
        found = found + operation.apply(sizes[0], operation.kernel_error)
    return found


@offset.register
def _(operation: Convolution):
    return operation.bias


@terms.register
def _(operation: Convolution):
    taps = math.prod(a.taps for a in operation.axes)
    return taps * sum(operation.kernels.shape[-2:]) + 8


@back.register
def _(operation: Scale, c, shapes, out):
    if operation.scale.ndim > 1:
        c = c.whole(out)
    return [Functionals(c.rows * operation.scale, c.window)]


@absolute.register
def _(operation: Scale, sizes):
    return np.abs(operation.scale) * sizes[0]


@doubt.register
def _(operation: Scale, sizes):
    return operation.scale_error * sizes[0] + operation.shift_error


@offset.register
def _(operation: Scale):
    return operation.shift


@back.register
def _(operation: Move, c, shapes, out):
    (shape,) = shapes
    rows = c.whole(out).rows
    if not operation.pads:
        return [Functionals(rows.reshape(len(rows), *shape))]
    index = [slice(max(a, 0), n - max(b, 0)) for (a, b), n in zip(operation.pads, out, strict=True)]
    rows = rows[(slice(None), *index)]
    return [
        Functionals(np.pad(rows, [(0, 0), *((max(-a, 0), max(-b, 0)) for a, b in operation.pads)]))
    ]


@absolute.register
def _(operation: Move, sizes):
    return operation._moved(sizes[0])


@back.register
def _(operation: Merge, c, shapes, out):
    if operation.kind == "concatenate":
        rows = c.whole(out).rows
        widths = [s[operation.axis - 1] for s in shapes]
        parts = np.split(rows, np.cumsum(widths)[:-1], axis=operation.axis)
        return [Functionals(p) for p in parts]
    return [Functionals(w * c.rows, c.window) for w in _weights(operation, len(shapes))]


@absolute.register
def _(operation: Merge, sizes):
    if operation.kind == "concatenate":
        return np.concatenate(sizes, operation.axis)
    return sum(abs(w) * s for w, s in zip(_weights(operation, len(sizes)), sizes, strict=True))


@doubt.register
def _(operation: Merge, sizes):
    if operation.kind != "average":
        return 0.0
    return 2 * UNIT * sum(sizes)  # of 1/n


@terms.register
def _(operation: Merge):
    return 64


def _weights(operation, count):
    if operation.kind == "average":
        return [1 / count] * count
    return [1.0, -1.0] if operation.kind == "subtract" else [1.0] * count


@back.register
def _(operation: AveragePooling, c, shapes, out):
    rows = c.whole(out).rows
    for position, matrix in enumerate(operation._matrices(), 1):
        rows = np.moveaxis(np.moveaxis(rows, position, -1) @ matrix, -1, position)
    return [Functionals(rows)]


@absolute.register
def _(operation: AveragePooling, sizes):
    found = sizes[0]
    for position, matrix in enumerate(operation._matrices(), 1):
        found = np.moveaxis(np.tensordot(matrix, found, (1, position)), 0, position)
    return found


@terms.register
def _(operation: AveragePooling):
    # Entries 1/n of the matrices are rounded, once per axis.
    return 4 * sum(a.taps + a.output for a in operation.axes) + 16


@back.register
def _(operation: GlobalPooling, c, shapes, out):
    (shape,) = shapes
    rows = c.rows / operation.positions
    rows = rows.reshape(len(rows), *[1] * (len(shape) - 1), shape[-1])
    return [Functionals(np.broadcast_to(rows, (len(rows), *shape)))]


@absolute.register
def _(operation: GlobalPooling, sizes):
    return sizes[0].mean(axis=tuple(range(1, sizes[0].ndim - 1)))


@terms.register
def _(operation: GlobalPooling):
    return 2 * operation.positions + 16


@back.register
def _(operation: Identity, c, shapes, out):
    return [c]


@absolute.register
def _(operation: Identity, sizes):
    return sizes[0]
