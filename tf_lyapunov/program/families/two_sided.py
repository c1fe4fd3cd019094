"""Both halves of a signal side by side: the smallest family, to copy (see docs)."""

import dataclasses

import numpy as np

from tf_lyapunov.layers.activations import TwoSidedReLU
from tf_lyapunov.program.gain import layer_gain
from tf_lyapunov.program.operation import Operation, with_error


@dataclasses.dataclass(frozen=True)
class Halves(Operation):
    """y = [max(x, 0), max(-x, 0)] side by side along an axis (batch axis 0)."""

    axis: int

    def forward(self, signals, precision):
        (signal,) = signals
        halves = [np.maximum(signal.value, 0.0), np.maximum(-signal.value, 0.0)]
        value = np.concatenate(halves, axis=self.axis)

        def error():
            # Nothing is rounded; devices flush subnormal numbers to zero.
            twice = np.concatenate([signal.error, signal.error], axis=self.axis)
            return twice + precision.tiny

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        halves = [graph.pointwise("Relu", x), graph.pointwise("Relu", graph.pointwise("Neg", x))]
        return graph.join(halves, self.axis)


def _read(call):
    """What the layer computes, from what it holds now."""
    layer, tensor = call.operation, call.inputs[0]
    return [Halves(layer.axis % len(tensor.shape))]


def _rule(call):
    """Values of equal sign keep their distance, and a² + b² ≤ (|a| + |b|)² for the others."""
    method = "positive and negative parts, an isometry of norms"
    return layer_gain(call, "activation", 1.0, method, 0.0)


READERS = {TwoSidedReLU: _read}
RULES = {TwoSidedReLU: _rule}
