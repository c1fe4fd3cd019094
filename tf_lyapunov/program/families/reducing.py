"""Bare sums, means, maxima and minima over axes, pools over windows, stacks and clips."""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import merging, pooling
from tf_lyapunov.program.families.elementwise import Clipped
from tf_lyapunov.program.gain import Affine, Gain, Peak
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import Operation, Signal, frozen, with_error
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.weights import inference_value
from tf_lyapunov.theory.sectors import Sector


@dataclasses.dataclass(frozen=True)
class Reduced(Operation):
    """Sum, mean, largest or smallest entry over axes.

    Attributes:
        kind: `"sum"`, `"mean"`, `"max"` or `"min"`.
        axes: tuple of int, batch axis 0 not among them.
        keepdims: bool.
    """

    kind: str
    axes: tuple
    keepdims: bool

    def forward(self, signals, precision):
        (signal,) = signals
        value = self._reduce(signal.value, self.kind)

        def error():
            if self.kind in ("max", "min"):
                return self._reduce(signal.error, "max")
            moved = self._reduce(signal.error, self.kind)
            size = self._reduce(np.abs(signal.value) + signal.error, self.kind)
            count = math.prod(signal.value.shape[a] for a in self.axes)
            return moved + precision.sum(count + 2) * size + 4 * precision.tiny * count

        return with_error(signals, value, error)

    def write(self, graph, names):
        return graph.reduce(self.kind.capitalize(), *names, self.axes, self.keepdims)

    def _reduce(self, x, kind):
        return getattr(np, kind)(x, axis=self.axes, keepdims=self.keepdims)


_KINDS = {"Sum": "sum", "Mean": "mean", "Max": "max", "Amax": "max", "Min": "min", "Amin": "min"}


def _reduced(call):
    operation, tensor = call.operation, call.inputs[0]
    rank, kind = len(tensor.shape), _KINDS[type(operation).__name__]
    axis = operation.axis
    axes = () if axis is None else ((axis,) if isinstance(axis, int) else tuple(axis))
    axes = tuple(sorted({a % rank for a in axes}))
    if axis is None or 0 in axes:
        refuse(
            operation,
            "it combines samples along the batch axis",
            advice="State the axes to reduce, other than the first.",
        )
    if getattr(operation, "initial", None) is not None:
        refuse(operation, "it takes an initial value", advice="Use `maximum` with a constant.")
    if kind in ("sum", "mean") and not keras.backend.is_float_dtype(tensor.dtype):
        refuse(operation, "it adds integers, which may wrap around")
    return Reduced(kind, axes, bool(operation.keepdims))


def _reduced_rule(call):
    """Over n entries: √n for a sum, 1/√n for a mean, on equal entries; 1 for an extreme."""
    found, tensor = _reduced(call), call.inputs[0]
    sizes = [tensor.shape[a] for a in found.axes]
    if found.kind in ("max", "min"):
        name = "largest" if found.kind == "max" else "smallest"
        return Gain("pooling", 1.0, f"{name} entry over axes")
    count = None if None in sizes else math.prod(sizes)
    if found.kind == "mean":
        value = pooling.global_average_gain(sizes) if sizes else 1.0
        method = "mean over axes, 1/√n"
        peak = Peak(math.inf if count is None else math.sqrt(count), wide=True)
    else:
        if count is None:
            refuse(call.operation, "it sums over axes of unknown size")
        value, method, peak = rounding.sqrt_up(count), "sum over axes, √n", Peak()
    unit = rounding.unit_roundoff(call.outputs[0].dtype)
    error = rounding.gamma(math.inf if count is None else count + 2, unit)
    # Without negative weights the map equals its absolute value, which scales the error.
    return Gain("map", value, method, Affine(value, 0.0, error * value), peak=peak)


def _read_reduced(call):
    return [_reduced(call)]


# Windows ----------------------------------------------------------------------------------------


def _window(call):
    """`Pooled` of a bare `max_pool` or `average_pool`, and its spatial sizes."""
    operation, tensor = call.operation, call.inputs[0]
    rank = len(tensor.shape) - 2

    def spread(value):
        return (value,) * rank if isinstance(value, int) else tuple(int(n) for n in value)

    sizes = spread(operation.pool_size)
    strides = sizes if operation.strides is None else spread(operation.strides)
    form = getattr(operation, "data_format", None) or keras.config.image_data_format()
    first = form == "channels_first"
    kind = "max" if type(operation).__name__ == "MaxPool" else "mean"
    found = pooling.Pooled(kind, sizes, strides, operation.padding.lower(), first)
    return found, tensor.shape[2:] if first else tensor.shape[1:-1]


def _window_rule(call):
    found, sizes = _window(call)
    shape = "×".join(map(str, found.sizes)) + "/" + "×".join(map(str, found.strides))
    if found.kind == "max":
        value = pooling.max_pooling_gain(found.sizes, found.strides, found.padding, sizes)
        return Gain("pooling", value, f"max pooling {shape}, overlap counted", Affine(value))
    value = pooling.average_pooling_gain(found.sizes, found.strides, found.padding, sizes)
    unit = rounding.unit_roundoff(call.outputs[0].dtype)
    error = rounding.gamma(math.prod(found.sizes) + 2, unit)
    affine = Affine(value, 0.0, error * value)
    peak = Peak(rounding.sqrt_up(math.prod(found.sizes)))
    return Gain("pooling", value, f"average pooling {shape}, norm of its matrix", affine, peak=peak)


def _read_window(call):
    found, sizes = _window(call)
    settings = (found.sizes, found.strides, found.padding, sizes)
    if found.kind == "mean" and pooling.repeats_edges(call.operation, *settings):
        found = dataclasses.replace(found, kind="edge")
    return [found]


# Stacks -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stacked(Operation):
    """Signals along a new axis (batch axis 0)."""

    axis: int

    def forward(self, signals, precision):
        value = np.stack([s.value for s in signals], axis=self.axis)
        if any(s.error is None for s in signals):
            return Signal(value)
        return Signal(value, np.stack([s.error for s in signals], axis=self.axis))

    def write(self, graph, names):
        sizes = graph.sizes(names[0])
        shape = (*sizes[: self.axis - 1], 1, *sizes[self.axis - 1 :])
        return graph.join([graph.reshape(name, shape) for name in names], self.axis)


def _joining_axis(call):
    operation, rank = call.operation, len(call.outputs[0].shape)
    axis = 1 if type(operation).__name__ == "Hstack" else operation.axis
    if axis is None or axis % rank == 0:
        refuse(operation, "it joins tensors along the batch axis")
    tensors = keras.tree.flatten((call.args, call.kwargs))
    if not all(isinstance(t, Tensor) for t in tensors):
        refuse(operation, "it joins constants")
    return axis % rank


def _joining_rule(call):
    axis, output = _joining_axis(call), call.outputs[0]
    gain = merging.merged_gain("Concatenate", call.inputs, output, output.dtype, axis)
    return dataclasses.replace(gain, method="stack, √Σ L²")


def _read_stack(call):
    return [Stacked(_joining_axis(call))]


def _read_hstack(call):
    return [merging.Joined(_joining_axis(call))]


# Clips ------------------------------------------------------------------------------------------


def _clipped(call):
    operation, dtype = call.operation, call.outputs[0].dtype
    if len(call.inputs) != 1 or call.inputs[0].shape != call.outputs[0].shape:
        refuse(operation)

    def bound(value):
        if value is None:
            return None
        if isinstance(value, keras.KerasTensor | Tensor):
            refuse(operation, "its limits are computed from inputs")
        value = inference_value(value, dtype)
        if np.any(np.isnan(value)):
            raise ValueError(f"Limits must be numbers. Received: NaN in {operation.name!r}.")
        rank = len(call.inputs[0].shape)
        if value.ndim > rank or (value.ndim == rank and value.shape[0] != 1):
            refuse(operation, "a constant of this shape does not broadcast over samples")
        return frozen(value.reshape(value.shape[1:]) if value.ndim == rank else value)

    return Clipped(bound(operation.x_min), bound(operation.x_max))


def _clip_rule(call):
    found, tensor = _clipped(call), call.inputs[0]
    limits = [b for b in (found.low, found.high) if b is not None]
    size = math.inf if tensor.size is None else math.sqrt(tensor.size)
    at_zero = float(np.max(np.abs(found.of(np.zeros(1))), initial=0.0))
    offset = rounding.product_up(at_zero, size)
    largest = max((float(np.max(np.abs(b[np.isfinite(b)]), initial=0.0)) for b in limits),
                  default=0.0)  # fmt: skip
    # Layers of float64 may hold their limits in float32.
    unit = 2.0**-23 if tensor.dtype == "float64" else 0.0
    affine = Affine(1.0, offset, 0.0, rounding.product_up(unit, largest, size))
    method = "clip, slopes in [0, 1]"
    return Gain("activation", 1.0, method, affine, sector=Sector(0.0, 1.0))


def _read_clip(call):
    return [_clipped(call)]


BARE_READERS = {
    **dict.fromkeys(_KINDS, _read_reduced),
    **dict.fromkeys(("MaxPool", "AveragePool"), _read_window),
    "Stack": _read_stack,
    "Hstack": _read_hstack,
    "Clip": _read_clip,
}
BARE_RULES = {
    **dict.fromkeys(_KINDS, _reduced_rule),
    **dict.fromkeys(("MaxPool", "AveragePool"), _window_rule),
    **dict.fromkeys(("Stack", "Hstack"), _joining_rule),
    "Clip": _clip_rule,
}
