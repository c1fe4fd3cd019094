"""Means of tokens weighted by their distances."""

import dataclasses
import math

import numpy as np

from tf_lyapunov.layers.l2_attention import L2Attention
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.softmax import Softmax
from tf_lyapunov.program.gain import FUNCTION_ULPS, layer_gain
from tf_lyapunov.program.operation import Operation, Signal, with_error
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.theory.attention import l2_attention_gain


@dataclasses.dataclass(frozen=True)
class Means(Operation):
    """z_i = factor·Σ_j softmax_j(-inverse·‖y_i - y_j‖²) y_j in each of some parts of the channels.

    Attributes:
        heads: int.
        inverse, factor: float.
    """

    heads: int
    inverse: float
    factor: float

    def forward(self, signals, precision):
        (signal,) = signals
        y = self._split(signal.value)
        apart = y[:, :, :, None] - y[:, :, None]
        squares = np.square(apart).sum(axis=-1)
        weights = Softmax((3,)).forward([Signal(-self.inverse * squares)], precision).value
        value = self._together(weights @ y)

        def error():
            e, width = self._split(signal.error), y.shape[-1]
            moved = e[:, :, :, None] + e[:, :, None]
            away = np.abs(apart) + moved
            lost = 2 * np.abs(apart) * moved + np.square(moved) + 4 * precision.tiny
            lost = lost.sum(axis=-1) + precision.sum(width + 4) * np.square(away).sum(axis=-1)
            scores = Signal(-self.inverse * squares, self.inverse * lost + 4 * precision.tiny)
            off = Softmax((3,)).forward([scores], precision).error
            size = np.abs(y) + e
            found = weights @ e + off @ size
            found = found + precision.sum(len(y[0, 0]) + 2) * ((weights + off) @ size)
            found = found + 4 * precision.tiny * y.shape[2] * (1 + size.max(initial=0.0))
            return self._together(found) + precision.unit * 2 * np.abs(value)

        return with_error(signals, self.factor * value, lambda: self.factor * error())

    def write(self, graph, names):
        """By differences of all pairs of tokens; heads have an axis of their own."""
        (x,) = names
        count, channels = graph.sizes(x)
        width = channels // self.heads
        y = graph.reshape(x, (count, self.heads, width))
        y = graph.laid_out(graph.transposed(y, (0, 2, 1, 3)))
        rows = graph.reshape(y, (self.heads, count, 1, width))
        apart = graph.node("Sub", rows, graph.reshape(y, (self.heads, 1, count, width)))
        squares = graph.reduce("Sum", graph.node("Mul", apart, apart), (4,), False)
        scores = graph.node("Mul", squares, -self.inverse)
        means = graph.node("MatMul", graph.node("Softmax", scores, axis=3), y)
        means = graph.node("Mul", means, self.factor)
        back = graph.laid_out(graph.transposed(means, (0, 2, 1, 3)))
        return graph.reshape(back, (count, channels))

    def _split(self, x):
        n, count, channels = x.shape
        return x.reshape(n, count, self.heads, channels // self.heads).transpose(0, 2, 1, 3)

    def _together(self, y):
        n, _, count, _ = y.shape
        return y.transpose(0, 2, 1, 3).reshape(n, count, -1)


def _sizes(call):
    shape = call.inputs[0].shape
    if None in shape[1:]:
        refuse(call.operation, "its number of tokens or channels is unknown")
    return shape[1:]


def _read(call):
    layer, (count, channels) = call.operation, _sizes(call)
    return [Means(layer.heads, layer.inverse_temperature(channels), layer.factor(count))]


def _rule(call):
    """g/L(N) times L(N), and a rounding that is relative to the input.

    Computed distances err by γ relative to themselves, so that weights before they are normalised
    err by at most γ t e^(-t(1-γ)) ≤ γ/2, and as the largest of a row is exactly 1, the weights of a
    row by γN together: a row of the mean errs by (N + 8)γ times the largest token, which the norm
    of all bounds.
    """
    layer, (count, channels) = call.operation, _sizes(call)
    factor, unit = layer.factor(count), rounding.unit_roundoff(layer.compute_dtype)
    value = rounding.product_up(factor, l2_attention_gain(count))
    error = rounding.gamma(count + channels + FUNCTION_ULPS + 16, unit)
    error = rounding.product_up(error, (count + 8) * math.sqrt(count) * factor / value * 1.01)
    method = "attention by distances: √((N+1)/2) + 2c + 2√(cκ(N-1))"
    return layer_gain(call, "lipschitz", value, method, error)


READERS = {L2Attention: _read}
RULES = {L2Attention: _rule}
