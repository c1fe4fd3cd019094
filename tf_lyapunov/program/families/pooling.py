"""Maxima and means over windows."""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import pooling as geometry
from tf_lyapunov.program.operation import Operation, with_error


@dataclasses.dataclass(frozen=True)
class Pooled(Operation):
    """Maximum or mean over windows of channels-last or channels-first signals.

    Attributes:
        kind: `"max"` or `"mean"`.
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
            size = self._pool(np.abs(signal.value) + signal.error, "mean")
            return moved + precision.sum(float(cells) + 2) * size + 4 * precision.tiny

        return with_error(signals, value, error)

    def _pool(self, x, kind):
        if self.channels_first:
            x = np.moveaxis(x, 1, -1)
        axes = tuple(range(1, x.ndim - 1))
        if self.sizes is None:
            reduce = np.max if kind == "max" else np.mean
            value = reduce(x, axis=axes, keepdims=self.keepdims)
            return np.moveaxis(value, -1, 1) if self.channels_first and self.keepdims else value
        for axis, (q, s) in enumerate(zip(self.sizes, self.strides, strict=True), 1):
            x = _along(x, axis, q, s, self.padding, kind)
        return np.moveaxis(x, -1, 1) if self.channels_first else x


def _along(x, axis, q, s, padding, kind):
    """One axis of a window: maxima and means with equal counts are taken axis by axis."""
    n = x.shape[axis]
    starts = geometry._windows(n, q, s, padding)
    best, count = None, np.zeros(len(starts))
    for t in range(q):
        cells = starts + t
        inside = (cells >= 0) & (cells < n)
        part = np.take(x, np.clip(cells, 0, n - 1), axis=axis)
        shape = [1] * x.ndim
        shape[axis] = -1
        mask = inside.reshape(shape)
        part = np.where(mask, part, -np.inf if kind == "max" else 0.0)
        best = part if best is None else (np.maximum(best, part) if kind == "max" else best + part)
        count += inside
    if kind == "max":
        return best
    shape = [1] * x.ndim
    shape[axis] = -1
    return best / count.reshape(shape)


def read(call):
    """A pooling layer of Keras."""
    layer, kinds = call.operation, type(call.operation)
    if kinds in geometry.AVERAGE_POOLING and layer.padding == "same":
        if keras.backend.backend() == "torch":
            raise UnsupportedLayerError(
                "Keras on PyTorch pads means by the edge where they are uneven. Received: layer "
                f"{layer.name!r} with padding='same'."
            )
    kind = "max" if kinds in (*geometry.MAX_POOLING, *geometry.GLOBAL_MAX) else "mean"
    first = layer.data_format == "channels_first"
    if kinds in (*geometry.GLOBAL_MAX, *geometry.GLOBAL_AVERAGE):
        return [Pooled(kind, None, None, "valid", first, bool(layer.keepdims))]
    return [Pooled(kind, tuple(layer.pool_size), tuple(layer.strides), layer.padding, first)]


READERS = dict.fromkeys(
    (
        *geometry.MAX_POOLING,
        *geometry.GLOBAL_MAX,
        *geometry.GLOBAL_AVERAGE,
        *geometry.AVERAGE_POOLING,
    ),
    read,
)
