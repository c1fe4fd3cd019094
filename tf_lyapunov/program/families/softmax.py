"""Softmax and log-softmax."""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.program.operation import Operation, with_error


@dataclasses.dataclass(frozen=True)
class Softmax(Operation):
    """exp(x) / Σ exp(x) along axes, or its logarithm.

    Attributes:
        axes: tuple of int, batch axis 0 not among them.
        logarithm: bool.
    """

    axes: tuple
    logarithm: bool = False

    def forward(self, signals, precision):
        (signal,) = signals
        top = signal.value.max(axis=self.axes, keepdims=True)
        powers = np.exp(signal.value - top)
        total = powers.sum(axis=self.axes, keepdims=True)
        value = signal.value - top - np.log(total) if self.logarithm else powers / total

        def error():
            count = np.prod([signal.value.shape[a] for a in self.axes])
            moved = signal.error.max(axis=self.axes, keepdims=True)
            size = 1 + np.abs(signal.value - top)
            if self.logarithm:
                own = (precision.sum(count) + 4 * precision.function) * (size + np.abs(value))
                return 2 * moved + own
            # The exponent's own rounding is relative to it; where it is large the power is small.
            relative = precision.sum(count) + 4 * precision.function + precision.unit * size
            return (
                value * np.expm1(np.minimum(2 * moved, 50.0))
                + relative * value
                + (4 * precision.tiny + precision.function * precision.unit)
            )

        return with_error(signals, value, error)


def of_axis(axis, rank, logarithm=False):
    """`Softmax` along one axis or several of a tensor of this rank."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return Softmax(tuple(sorted(a % rank for a in axes)), logarithm)


def read(call):
    """A Softmax layer."""
    return [of_axis(call.operation.axis, len(call.inputs[0].shape))]


READERS = {keras.layers.Softmax: read}
