"""Activations that sort or reflect groups of entries: they keep norms."""

import dataclasses

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import activations
from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import FUNCTION_ULPS, layer_gain
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.program.weights import finite_value


@dataclasses.dataclass(frozen=True)
class Sorted(Operation):
    """Sorts groups of entries along an axis (batch axis 0): a permutation, which rounds nothing
    but what devices flush to zero.

    Attributes:
        axis: int.
        size: of a group of neighbours, in ascending order; or None for the pairs (i, i + C/2), the
            larger first.
    """

    axis: int
    size: int | None

    def forward(self, signals, precision):
        (signal,) = signals
        if self.size is None:
            first, second = np.split(signal.value, 2, axis=self.axis)
            pair = [np.maximum(first, second), np.minimum(first, second)]
            value = np.concatenate(pair, axis=self.axis)
        else:
            value = np.sort(self._groups(signal.value), axis=self.axis + 1)
            value = value.reshape(signal.value.shape)

        def error():
            # The k-th largest moves at most as the largest change of its group.
            if self.size is None:
                largest = np.maximum(*np.split(signal.error, 2, axis=self.axis))
                return np.concatenate([largest, largest], axis=self.axis) + precision.tiny
            groups = self._groups(signal.error)
            largest = groups.max(axis=self.axis + 1, keepdims=True)
            largest = np.broadcast_to(largest, groups.shape)
            return largest.reshape(signal.error.shape) + precision.tiny

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        sizes = (None, *graph.sizes(x))
        if self.size is None:
            first, second = graph.halves(x, self.axis)
            pair = (graph.pointwise("Max", first, second), graph.pointwise("Min", first, second))
            return graph.join(pair, self.axis)
        x, (axis,), back = graph.below(x, (self.axis,))
        held = [sizes[a] for a in np.argsort(graph.beneath(*names)[1] or range(len(sizes)))]
        split = [*held[1:axis], held[axis] // self.size, self.size, *held[axis + 1 :]]
        if self.size == 2:
            # Neighbours by minima and maxima, which more tools know than they know TopK.
            pair = [graph.part(x, axis, i, held[axis], 2) for i in (0, 1)]
            shape = [*split[:axis], 1, *split[axis + 1 :]]
            ends = [graph.reshape(graph.node(kind, *pair), shape) for kind in ("Min", "Max")]
            y = graph.node("Concat", *ends, axis=axis + 1)
        else:
            y, _ = graph.node(
                "TopK", graph.reshape(x, split), (self.size,),
                count=2, axis=axis + 1, largest=0, sorted=1,
            )  # fmt: skip
        return back(graph.reshape(y, held[1:]))

    def _groups(self, x):
        shape, axis = x.shape, self.axis
        count = shape[axis] // self.size
        return x.reshape(*shape[:axis], count, self.size, *shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Reflected(Operation):
    """z - 2v·max(vᵀz, 0) for the pairs z = (x_i, x_{i+C/2}), v = (sin θ_i/2, -cos θ_i/2).

    Attributes:
        axis: int, batch axis 0.
        angle: float64 (C/2,), θ as stored.
    """

    axis: int
    angle: np.ndarray

    def forward(self, signals, precision):
        (signal,) = signals
        shape = [1] * signal.value.ndim
        shape[self.axis] = -1
        half = self.angle.reshape(shape) / 2
        sine, cosine = np.sin(half), np.cos(half)
        a, b = np.split(signal.value, 2, axis=self.axis)
        excess = 2 * np.maximum(sine * a - cosine * b, 0.0)
        value = np.concatenate([a - sine * excess, b + cosine * excess], axis=self.axis)

        def error():
            sines, cosines = np.abs(sine), np.abs(cosine)
            of_a, of_b = np.split(signal.error, 2, axis=self.axis)
            size = np.abs(a) + of_a + np.abs(b) + of_b
            # With f the error of 1 + |sin|, hence 2f of a sine, and u ≤ f/16: the excess errs by
            # (4f + 3u)·2·size, a result by that, 4f·size for its factor and 10u for the rest.
            own = 16 * precision.function * size + 16 * precision.tiny * (1 + size)
            moved = 2 * (sines * of_a + cosines * of_b)
            parts = [of_a + sines * moved + own, of_b + cosines * moved + own]
            return np.concatenate(parts, axis=self.axis)

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        half = self.angle.reshape(-1, *[1] * (len(graph.sizes(x)) - self.axis)) / 2
        sine, cosine = np.sin(half), np.cos(half)
        a, b = graph.halves(x, self.axis)
        excess = graph.pointwise("Sub", graph.pointwise("Mul", a, sine),
                                 graph.pointwise("Mul", b, cosine))  # fmt: skip
        excess = graph.pointwise("Relu", excess)
        a = graph.pointwise("Sub", a, graph.pointwise("Mul", excess, 2 * sine))
        b = graph.pointwise("Add", b, graph.pointwise("Mul", excess, 2 * cosine))
        return graph.join((a, b), self.axis)


def _read(call):
    """The operation of one of these layers."""
    layer, kind = call.operation, type(call.operation)
    shape = call.inputs[0].shape
    axis = layer.axis % len(shape)
    if kind is activations.Householder:
        return [Reflected(axis, frozen(finite_value(layer, layer.angle, layer.angle.dtype)))]
    if kind is activations.MaxMin:
        return [Sorted(axis, None)]
    if kind is activations.GroupSort:
        return [Sorted(axis, layer.group_size)]
    if shape[axis] is None:
        raise UnsupportedLayerError(
            f"Sorting needs a known size. Received: layer {layer.name!r} on shape {shape}."
        )
    return [Sorted(axis, int(shape[axis]))]


def _sorting_rule(call):
    return layer_gain(call, "activation", 1.0, "permutes entries", 0.0)


def _householder_rule(call):
    layer = call.operation
    finite_value(layer, layer.angle, layer.angle.dtype)
    # |v| = 1 exactly; the sine and cosine of the angle are library functions. With e the error of
    # either, y errs by 2(2√2e + …)·‖z‖ from v and by fewer than ten further roundings.
    error = rounding.gamma(8 * FUNCTION_ULPS, rounding.unit_roundoff(layer.compute_dtype))
    return layer_gain(call, "activation", 1.0, "identity or reflection of each pair", error)


RULES = {
    activations.MaxMin: _sorting_rule,
    activations.GroupSort: _sorting_rule,
    activations.FullSort: _sorting_rule,
    activations.Householder: _householder_rule,
}
READERS = dict.fromkeys(RULES, _read)
