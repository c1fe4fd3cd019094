"""Norms and scaled means over windows."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.pooling import (
    GlobalL2NormPooling2D,
    L2NormPooling2D,
    LpPooling2D,
    ScaledAveragePooling2D,
    ScaledGlobalAveragePooling2D,
    window_sum_bound,
)
from tf_lyapunov.program.families import pooling
from tf_lyapunov.program.gain import FUNCTION_ULPS, SLACK, Peak, layer_gain, widened
from tf_lyapunov.program.operation import Operation, with_error


@dataclasses.dataclass(frozen=True)
class WindowNorm(Operation):
    """y = scale·(Σ_window |x|^p)^(1/p), or scale·Σ_window x, on images.

    Attributes:
        p: of the norm, 1 to infinity, or None for the sum.
        scale: positive float.
        sizes, strides: per spatial axis; None for all positions at once, which drops the axes.
        padding: `"valid"` or `"same"`, by zeros.
        channels_first: bool.
        keepdims: whether a global norm keeps its axes.
    """

    p: float | None
    scale: float
    sizes: tuple | None
    strides: tuple | None
    padding: str
    channels_first: bool
    keepdims: bool = False

    def forward(self, signals, precision):
        (signal,) = signals
        cells = self._cells(signal.value)
        value = self._placed(self.scale * self._reduced(cells, self.p))

        def error():
            # Norms change at most by the norm of the change.
            moved, count = self._cells(signal.error), len(cells)
            absolute = 1.0 if self.p is None else self.p
            change = self.scale * self._reduced(moved, absolute)
            size = self.scale * self._reduced(np.abs(cells) + moved, absolute)
            own = self._relative(count, precision.wide) + 2 * precision.setting
            own = own + precision.unit * (1 + own)
            flushed = 8 * count * precision.tiny * (1 + self.scale)
            return self._placed(change + own * size + flushed)

        return with_error(signals, value, error)

    def write(self, graph, names):
        """By sums over windows; powers above the format's largest number overflow."""
        (x,) = names
        sizes = graph.sizes(x)
        axes = (2, 3) if self.channels_first else (1, 2)
        if not graph.is_double and self.p is not None and self.p < math.inf and self.p % 1 == 0:
            y = self._write_norm(graph, x, axes)
            return y if self.scale == 1 else graph.pointwise("Mul", y, self.scale)
        if self.p == math.inf:
            reduce, power = "Max", None
        else:
            reduce, power = "Sum", None if self.p in (None, 1.0) else self.p
        if self.p is not None and self.p != 2.0:
            x = graph.pointwise("Abs", x)
        if power is not None:
            x = graph.pointwise("Mul", x, x) if power == 2.0 else graph.pointwise("Pow", x, power)
        if self.sizes is None:
            y = graph.reduce(reduce, x, axes, self.keepdims)
        else:
            y = self._write_windows(graph, x, [sizes[a - 1] for a in axes], reduce)
        if power == 2.0:
            y = graph.pointwise("Sqrt", y)
        elif power is not None:
            y = graph.pointwise("Pow", y, 1 / power)
        return y if self.scale == 1 else graph.pointwise("Mul", y, self.scale)

    def _write_norm(self, graph, x, axes):
        """By the operators that ONNX has for whole powers; `ReduceL2` for all positions."""
        if self.sizes is None:
            return graph.reduce(f"L{int(self.p)}", x, axes, self.keepdims)
        sizes = [graph.sizes(x)[a - 1] for a in axes]
        if not self.channels_first:
            x = graph.transposed(x, (0, 3, 1, 2))
        y = graph.node("LpPool", x, p=int(self.p), **self._window(sizes))
        return y if self.channels_first else graph.transposed(y, (0, 2, 3, 1))

    def _window(self, sizes):
        sides = [pooling.padded_cells(n, q, s, self.padding)
                 for n, q, s in zip(sizes, self.sizes, self.strides, strict=True)]  # fmt: skip
        return {
            "kernel_shape": tuple(map(int, self.sizes)),
            "strides": tuple(map(int, self.strides)),
            "pads": tuple(int(side[i]) for i in (0, 1) for side in sides),
        }

    def _write_windows(self, graph, x, sizes, reduce):
        if not self.channels_first:
            x = graph.transposed(x, (0, 3, 1, 2))
        y = graph.node(
            "MaxPool" if reduce == "Max" else "AveragePool",
            x,
            **self._window(sizes),
            count_include_pad=None if reduce == "Max" else 1,
        )
        if reduce == "Sum" and math.prod(self.sizes) > 1:
            y = graph.pointwise("Mul", y, float(math.prod(self.sizes)))
        return y if self.channels_first else graph.transposed(y, (0, 2, 3, 1))

    def _relative(self, count, precision):
        """Relative error of the norm of so many entries, computed after a scale by the largest."""
        if self.p == math.inf:
            return 0.0
        if self.p in (None, 1.0):
            return precision.sum(count + 4)
        if self.p == 2.0:
            return precision.sum(count + FUNCTION_ULPS)
        # A power t^p of t ≤ 1 errs by 2f and p units, relative to a sum ≥ 1; the root divides that
        # by p and errs by 2f itself, and by its exponent's unit times the logarithm of the sum.
        return 3 * precision.function * (count + 1)

    def _cells(self, x):
        """The cells of every window, (cells, n, …, channels)."""
        x = np.moveaxis(x, 1, -1) if self.channels_first else x
        if self.sizes is None:
            return np.moveaxis(x.reshape(len(x), -1, x.shape[-1]), 1, 0)
        for axis, (q, s) in enumerate(zip(self.sizes, self.strides, strict=True), 1):
            starts = pooling.windows(x.shape[axis], q, s, self.padding)
            pads = [(0, 0)] * x.ndim
            pads[axis] = (-min(starts[0], 0), max(starts[-1] + q - x.shape[axis], 0))
            x = np.pad(x, pads)
        parts = []
        for offset in np.ndindex(*self.sizes):
            index = [slice(None)] * x.ndim
            for axis, (i, q, s) in enumerate(zip(offset, self.sizes, self.strides, strict=True), 1):
                index[axis] = slice(i, i + 1 - q or None, s)
            parts.append(x[tuple(index)])
        return np.stack(parts)

    def _reduced(self, cells, p):
        if p is None:
            return cells.sum(axis=0)
        sizes = np.abs(cells)
        largest = sizes.max(axis=0)
        if p == math.inf:
            return largest
        scale = np.where(largest > 0, largest, 1.0)
        return scale * ((sizes / scale) ** p).sum(axis=0) ** (1 / p)

    def _placed(self, y):
        if self.sizes is None and self.keepdims:
            y = y[:, None, None, :]
        return np.moveaxis(y, -1, 1) if self.channels_first and y.ndim > 2 else y


def _read_windows(call):
    layer, kind = call.operation, type(call.operation)
    windows = layer.pool_size, layer.strides, layer.padding, layer.data_format == "channels_first"
    if kind is LpPooling2D:
        return [WindowNorm(layer.p, 1.0, *windows)]
    if kind is L2NormPooling2D:
        shared = math.prod(-(-q // s) for q, s in zip(layer.pool_size, layer.strides, strict=True))
        return [WindowNorm(2.0, 1 / math.sqrt(shared), *windows)]
    return [WindowNorm(None, 1 / window_sum_bound(layer.pool_size, layer.strides), *windows)]


def _read_global(call):
    layer, first = call.operation, call.operation.data_format == "channels_first"
    if type(layer) is GlobalL2NormPooling2D:
        return [WindowNorm(2.0, 1.0, None, None, "valid", first, layer.keepdims)]
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    if None in sizes:
        raise UnsupportedLayerError(
            "A mean over all positions needs a known size. Received: layer "
            f"{layer.name!r} on shape {call.inputs[0].shape}."
        )
    scale = 1 / math.sqrt(math.prod(sizes))
    return [WindowNorm(None, scale, None, None, "valid", first, layer.keepdims)]


def lp_pooling_gain(p, pool_size, strides, padding, sizes):
    """Gain of p-norm pooling from l2 to l2.

        p ≥ 2:      √m
        1 ≤ p < 2:  σ^(2/p - 1)·√m^(2 - 2/p)                                              (1)

    with m the largest number of windows that share a cell and σ the norm of the sum over windows.
    The reverse triangle inequality reduces it to Σ_w ‖v_w‖_p² ≤ gain²·‖v‖²; for p ≥ 2 use
    ‖v_w‖_p ≤ ‖v_w‖_2, else ‖v_w‖_p ≤ ‖v_w‖_1^(2/p-1)·‖v_w‖_2^(2-2/p) and Hölder's inequality.
    Attained for p ≥ 2 (one cell), for p = 1 (all entries positive), and without overlap.

    Args:
        p: float of at least 1.
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`, by zeros.
        sizes: spatial sizes, None where unknown.

    Returns:
        float, rounded up.

    Example:

    >>> lp_pooling_gain(2.0, (2, 2), (2, 2), "valid", (8, 8))
    1.0
    >>> round(lp_pooling_gain(1.0, (2, 2), (2, 2), "valid", (8, 8)), 9)
    2.0

    Reference: sound form of Peck et al. (2017), who use κ/(t·q^(2/p)).
    """
    overlap = pooling.max_pooling_gain(pool_size, strides, padding, sizes)
    if p >= 2:
        return overlap
    total = pooling.window_sum_gain(pool_size, strides, padding, sizes)
    if p == 1:
        return total
    return total ** (2 / p - 1) * overlap ** (2 - 2 / p) * SLACK


def window_norm_gain(operation, shape):
    """Gain of a `WindowNorm` on samples of this shape, rounded up."""
    sizes = shape[1:] if operation.channels_first else shape[:-1]
    p, scale = operation.p, operation.scale
    if operation.sizes is None:
        count = math.prod(sizes)
        if p is None or p < 2:
            # ‖v‖_p ≤ n^(1/p - 1/2)·‖v‖₂, and the sum is at most the 1-norm.
            return scale * count ** (1 / (p or 1.0) - 0.5) * SLACK
        return scale
    geometry = operation.sizes, operation.strides, operation.padding, sizes
    if p is None:
        return scale * pooling.window_sum_gain(*geometry) * SLACK
    return scale * lp_pooling_gain(p, *geometry) * SLACK


def _lp_error(p, cells, dtype):
    """Relative error of a p-norm of `cells` entries, scaled by the largest."""
    if p == math.inf:
        return widened(dtype, 0)
    if p == 1:
        return widened(dtype, cells)
    if p == 2:
        return widened(dtype, cells + FUNCTION_ULPS)
    # t^p of t ≤ 1 errs by FUNCTION_ULPS + p units relative to a sum ≥ 1, whose root divides by p.
    return widened(dtype, (FUNCTION_ULPS + 2) * cells + 2 * FUNCTION_ULPS)


def _lp_pooling_rule(call):
    layer = call.operation
    geometry = _geometry(call)
    value = lp_pooling_gain(layer.p, *geometry)
    error = _lp_error(layer.p, math.prod(layer.pool_size), layer.compute_dtype)
    method = f"{layer.p:g}-norm of windows, overlap counted"
    return layer_gain(call, "pooling", value, method, error)


def _norm_pooling_rule(call):
    layer = call.operation
    largest = math.prod(-(-q // s) for q, s in zip(layer.pool_size, layer.strides, strict=True))
    # The scale is the overlap on large images: never below that on this one.
    value = pooling.max_pooling_gain(*_geometry(call)) / math.sqrt(largest) * SLACK
    error = _lp_error(2, math.prod(layer.pool_size) + 2, layer.compute_dtype)
    return layer_gain(call, "pooling", min(value, 1.0), "2-norm of windows over √overlap", error)


def _scaled_average_rule(call):
    layer = call.operation
    scale = window_sum_bound(layer.pool_size, layer.strides)
    value = pooling.window_sum_gain(*_geometry(call)) / scale * SLACK
    # The scale is the norm for every size: never above 1.
    error = widened(layer.compute_dtype, math.prod(layer.pool_size) + 4)
    gain = layer_gain(call, "pooling", min(value, 1.0), "sum over windows over its norm", error)
    terms = math.prod(layer.pool_size)
    return dataclasses.replace(gain, peak=Peak(math.sqrt(terms), wide=True))


def _global_rule(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    cells = math.inf if None in sizes else math.prod(sizes)
    is_norm = type(layer) is GlobalL2NormPooling2D
    error = widened(layer.compute_dtype, cells + FUNCTION_ULPS)
    method = "2-norm over all positions" if is_norm else "sum over N positions, 1/√N"
    gain = layer_gain(call, "pooling", 1.0, method, error)
    return dataclasses.replace(gain, peak=Peak(math.sqrt(cells), wide=True))


def _geometry(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    return layer.pool_size, layer.strides, layer.padding, sizes


READERS = {
    **dict.fromkeys((LpPooling2D, L2NormPooling2D, ScaledAveragePooling2D), _read_windows),
    **dict.fromkeys((ScaledGlobalAveragePooling2D, GlobalL2NormPooling2D), _read_global),
}
RULES = {
    LpPooling2D: _lp_pooling_rule,
    L2NormPooling2D: _norm_pooling_rule,
    ScaledAveragePooling2D: _scaled_average_rule,
    ScaledGlobalAveragePooling2D: _global_rule,
    GlobalL2NormPooling2D: _global_rule,
}
