"""Maxima and means over windows, and the geometry of windows."""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.pooling import window_sum_bound
from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import Affine, Gain, Peak
from tf_lyapunov.program.operation import Operation, with_error
from tf_lyapunov.program.rounding import UNIT_ROUNDOFF, down, product_up, sqrt_up, up

_layers = keras.layers

MAX_POOLING = (_layers.MaxPooling1D, _layers.MaxPooling2D, _layers.MaxPooling3D)
AVERAGE_POOLING = (_layers.AveragePooling1D, _layers.AveragePooling2D, _layers.AveragePooling3D)
GLOBAL_MAX = (_layers.GlobalMaxPooling1D, _layers.GlobalMaxPooling2D, _layers.GlobalMaxPooling3D)
GLOBAL_AVERAGE = (
    _layers.GlobalAveragePooling1D,
    _layers.GlobalAveragePooling2D,
    _layers.GlobalAveragePooling3D,
)


def spatial_sizes(layer, input_shape):
    """Spatial sizes of a batch shape in the layer's data format."""
    shape = tuple(input_shape)[1:]
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return shape[1:] if first else shape[:-1]


def windows(n, q, s, padding):
    """First input index of each window; negative inside 'same' padding."""
    if padding == "valid":
        return np.arange((n - q) // s + 1) * s
    m = -(-n // s)
    return np.arange(m) * s - max((m - 1) * s + q - n, 0) // 2


def padded_cells(n, q, s, padding):
    """Cells that windows reach before and behind an axis of n cells."""
    starts = windows(n, q, s, padding)
    return (0, 0) if not len(starts) else (max(-starts[0], 0), max(starts[-1] + q - n, 0))


def _cells(n, q, s, padding):
    return windows(n, q, s, padding)[:, None] + np.arange(q)[None, :]


@dataclasses.dataclass(frozen=True)
class Pooled(Operation):
    """Maximum or mean over windows of channels-last or channels-first signals.

    Attributes:
        kind: `"max"`, `"mean"`, or `"edge"` for a mean in which padded cells repeat the edge.
        sizes, strides: per spatial axis; None for all positions at once, which drops the axes.
        padding: `"valid"` or `"same"`; padded cells count in neither maximum nor mean.
        channels_first: bool.
        keepdims: whether a global pool keeps its axes.
    """

    kind: str
    sizes: tuple | None
    strides: tuple | None
    padding: str
    channels_first: bool
    keepdims: bool = False

    def forward(self, signals, precision):
        (signal,) = signals
        value = self._pool(signal.value, self.kind)

        def error():
            moved = self._pool(signal.error, self.kind)
            if self.kind == "max":
                return moved
            cells = np.prod(self.sizes or signal.value.shape[1:])
            size = self._pool(np.abs(signal.value) + signal.error, self.kind)
            return moved + precision.sum(float(cells) + 2) * size + 4 * precision.tiny

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        sizes = graph.sizes(x)
        rank = len(sizes) - 1
        spatial = tuple(range(2, rank + 2)) if self.channels_first else tuple(range(1, rank + 1))
        if self.sizes is None:
            kind = "Max" if self.kind == "max" else "Mean"
            return graph.reduce(kind, x, spatial, self.keepdims)
        if not self.channels_first:
            x = graph.transposed(x, (0, rank + 1, *range(1, rank + 1)))
        sides = [padded_cells(sizes[a - 1], q, s, self.padding)
                 for a, q, s in zip(spatial, self.sizes, self.strides, strict=True)]  # fmt: skip
        pads = tuple(int(side[i]) for i in (0, 1) for side in sides)
        if self.kind == "edge" and any(pads):
            edges = (0, 0, *pads[:rank], 0, 0, *pads[rank:])
            x, pads = graph.node("Pad", x, edges, mode="edge"), (0,) * len(pads)
        y = graph.node(
            "MaxPool" if self.kind == "max" else "AveragePool",
            x,
            kernel_shape=tuple(map(int, self.sizes)),
            strides=tuple(map(int, self.strides)),
            pads=pads,
        )
        if self.channels_first:
            return y
        return graph.transposed(y, (0, *range(2, rank + 2), 1))

    def _pool(self, x, kind):
        if self.channels_first:
            x = np.moveaxis(x, 1, -1)
        axes = tuple(range(1, x.ndim - 1))
        if self.sizes is None:
            reduce = np.max if kind == "max" else np.mean
            value = reduce(x, axis=axes, keepdims=self.keepdims)
            return np.moveaxis(value, -1, 1) if self.channels_first and self.keepdims else value
        for axis, (q, s) in enumerate(zip(self.sizes, self.strides, strict=True), 1):
            x = along(x, axis, q, s, self.padding, kind)
        return np.moveaxis(x, -1, 1) if self.channels_first else x


def along(x, axis, q, s, padding, kind):
    """One axis of a window: maxima and means with equal counts are taken axis by axis."""
    n = x.shape[axis]
    starts = windows(n, q, s, padding)
    best, count = None, np.zeros(len(starts))
    for t in range(q):
        cells = starts + t
        inside = (cells >= 0) & (cells < n)
        part = np.take(x, np.clip(cells, 0, n - 1), axis=axis)
        shape = [1] * x.ndim
        shape[axis] = -1
        mask = inside.reshape(shape)
        if kind != "edge":
            part = np.where(mask, part, -np.inf if kind == "max" else 0.0)
        best = part if best is None else (np.maximum(best, part) if kind == "max" else best + part)
        count += inside | (kind == "edge")
    if kind == "max":
        return best
    shape = [1] * x.ndim
    shape[axis] = -1
    return best / count.reshape(shape)


def _read(call):
    """A pooling layer of Keras."""
    layer, kinds = call.operation, type(call.operation)
    kind = "max" if kinds in (*MAX_POOLING, *GLOBAL_MAX) else "mean"
    if kinds in AVERAGE_POOLING:
        sizes = spatial_sizes(layer, call.inputs[0].shape)
        if repeats_edges(layer, layer.pool_size, layer.strides, layer.padding, sizes):
            kind = "edge"
    first = layer.data_format == "channels_first"
    if kinds in (*GLOBAL_MAX, *GLOBAL_AVERAGE):
        return [Pooled(kind, None, None, "valid", first, bool(layer.keepdims))]
    return [Pooled(kind, tuple(layer.pool_size), tuple(layer.strides), layer.padding, first)]


def repeats_edges(operation, pool_size, strides, padding, sizes):
    """Whether Keras on PyTorch pads a mean by its edges: where one axis is padded unevenly."""
    if keras.backend.backend() != "torch" or padding != "same":
        return False
    if None in sizes:
        raise UnsupportedLayerError(
            "How a mean is padded depends on the size. Received: layer "
            f"{operation.name!r} on sizes {tuple(sizes)}, with padding='same'."
        )
    padded = [
        max((-(-n // s) - 1) * s + q - n, 0)
        for n, q, s in zip(sizes, pool_size, strides, strict=True)
    ]
    return any(p % 2 for p in padded)


# Gains ------------------------------------------------------------------------------------------


def max_pooling_gain(pool_size, strides, padding, sizes):
    """Gain of max pooling, √Π_axes (largest number of windows that share a cell), attained.

    Each output moves at most as its window's largest change, and a cell lies in at most ⌈q/s⌉
    windows per axis (fewer where the input is small).

    Args:
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`.
        sizes: spatial sizes, None where unknown.

    Returns:
        float, rounded up.

    Example:

    >>> max_pooling_gain((3, 3), (2, 2), "valid", (28, 28))
    2.0

    Reference: theory of pooling in the library's notes (sound form; Peck et al. use κ/t).
    """
    shared = 1
    for q, s, n in zip(pool_size, strides, sizes, strict=True):
        if n is None:
            shared *= -(-q // s)
            continue
        cells = _cells(n, q, s, padding)
        inside = cells[(cells >= 0) & (cells < n)]
        shared *= int(np.max(np.bincount(inside, minlength=1), initial=1))
    return sqrt_up(shared)


def average_pooling_gain(pool_size, strides, padding, sizes):
    """Gain of average pooling: product over the axes of the norms of their averaging matrices.

    With 'same' padding an edge window divides by its valid cells; on torch, uneven padding
    repeats the edge cell instead. The larger norm of the two is used. Unknown size: √(⌈q/s⌉/q)
    for 'valid', √⌈q/s⌉ for 'same' (row sums 1, largest column sum).

    Args:
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`.
        sizes: spatial sizes, None where unknown.

    Returns:
        float, rounded up.

    Example:

    >>> round(average_pooling_gain((2, 2), (2, 2), "valid", (8, 8)), 9)
    0.5
    """
    gains = []
    for q, s, n in zip(pool_size, strides, sizes, strict=True):
        if n is None:
            gains.append(sqrt_up(-(-q // s) / (q if padding == "valid" else 1)))
        elif n == 0 or (padding == "valid" and n < q):
            gains.append(0.0)  # no window fits: the layer's output is empty
        else:
            gains.append(max(map(_norm_up, _averaging_matrices(n, q, s, padding))))
    return product_up(*gains)


def window_sum_gain(pool_size, strides, padding, sizes):
    """Gain of the sum over windows, with zeros around: product of the norms along the axes.

    Args:
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`.
        sizes: spatial sizes, None where unknown (the largest norm over all sizes).

    Returns:
        float, rounded up.

    Example:

    >>> round(window_sum_gain((3,), (2,), "valid", (5,)) ** 2, 9)
    4.0
    """
    gains = []
    for q, s, n in zip(pool_size, strides, sizes, strict=True):
        if n is None:
            gains.append(float(up(window_sum_bound((q,), (s,)))))
            continue
        cells = _cells(n, q, s, padding)
        matrix = np.zeros((len(cells), n))
        rows, inside = np.arange(len(cells))[:, None], (cells >= 0) & (cells < n)
        np.add.at(matrix, (np.broadcast_to(rows, cells.shape)[inside], cells[inside]), 1.0)
        gains.append(_norm_up(matrix))
    return product_up(*gains)


def _averaging_matrices(n, q, s, padding):
    cells = _cells(n, q, s, padding)
    inside = (cells >= 0) & (cells < n)
    rows = np.broadcast_to(np.arange(len(cells))[:, None], cells.shape)
    excluding = np.zeros((len(cells), n))
    weights = inside / np.maximum(inside.sum(axis=1, keepdims=True), 1)
    np.add.at(excluding, (rows[inside], cells[inside]), weights[inside])
    repeating = np.zeros((len(cells), n))
    np.add.at(repeating, (rows, np.clip(cells, 0, n - 1)), 1 / q)
    return [excluding] if padding == "valid" else [excluding, repeating]


def _norm_up(matrix):
    # LAPACK's singular values err by a small multiple of the larger side in units of roundoff.
    inflation = 1 + 8 * max(matrix.shape) * UNIT_ROUNDOFF["float64"]
    if matrix.size <= 10**6:
        return float(np.linalg.norm(matrix, 2)) * inflation
    # Schur test: ‖A‖² ≤ (largest row sum)·(largest column sum) for non-negative A.
    return math.sqrt(matrix.sum(axis=1).max() * matrix.sum(axis=0).max()) * inflation


def global_average_gain(sizes):
    """Gain of the mean over N positions, 1/√N rounded up; 1 where a size is unknown."""
    if None in sizes:
        return 1.0
    return float(up(1 / down(math.sqrt(math.prod(sizes)))))


def _max_pooling_rule(call):
    layer = call.operation
    sizes = spatial_sizes(layer, call.inputs[0].shape)
    value = max_pooling_gain(layer.pool_size, layer.strides, layer.padding, sizes)
    method = f"max pooling {_by(layer.pool_size)}/{_by(layer.strides)}, overlap counted"
    return Gain("pooling", value, method, Affine(value))


def _average_pooling_rule(call):
    layer = call.operation
    sizes = spatial_sizes(layer, call.inputs[0].shape)
    value = average_pooling_gain(layer.pool_size, layer.strides, layer.padding, sizes)
    method = f"average pooling {_by(layer.pool_size)}/{_by(layer.strides)}, norm of its matrix"
    terms = math.prod(layer.pool_size)
    # TensorFlow sums a window in the format of the signal.
    return _averaging(value, method, terms, layer, Peak(sqrt_up(terms)))


def _global_max_rule(call):
    return Gain("pooling", 1.0, "maximum over all positions")


def _global_average_rule(call):
    layer = call.operation
    sizes = spatial_sizes(layer, call.inputs[0].shape)
    terms = math.inf if None in sizes else math.prod(sizes)
    value = global_average_gain(sizes)
    peak = Peak(math.sqrt(terms), wide=True)
    return _averaging(value, "mean over all positions, 1/√N", terms, layer, peak)


def _averaging(value, method, terms, layer, peak):
    error = rounding.gamma(terms + 2, rounding.unit_roundoff(layer.compute_dtype))
    # A matrix without negative entries equals its absolute value, which scales the error.
    return Gain("pooling", value, method, Affine(value, 0.0, error * value), peak=peak)


def _by(sizes):
    return "×".join(str(int(s)) for s in sizes)


READERS = dict.fromkeys((*MAX_POOLING, *AVERAGE_POOLING, *GLOBAL_MAX, *GLOBAL_AVERAGE), _read)
RULES = {
    **dict.fromkeys(MAX_POOLING, _max_pooling_rule),
    **dict.fromkeys(AVERAGE_POOLING, _average_pooling_rule),
    **dict.fromkeys(GLOBAL_MAX, _global_max_rule),
    **dict.fromkeys(GLOBAL_AVERAGE, _global_average_rule),
}
