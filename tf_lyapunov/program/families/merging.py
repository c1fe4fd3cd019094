"""Sums, differences, means, maxima and concatenations of several signals."""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.program.gains import MERGING_LAYERS
from tf_lyapunov.program.operation import Operation, Signal

_layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Weighted(Operation):
    """y = Σ_k w_k·x_k with broadcasting.

    Attributes:
        weights: tuple of float, one per signal.
    """

    weights: tuple

    def forward(self, signals, precision):
        value = sum(w * s.value for w, s in zip(self.weights, signals, strict=True))
        if any(s.error is None for s in signals):
            return Signal(value)
        pairs = list(zip(self.weights, signals, strict=True))
        size = sum(abs(w) * (np.abs(s.value) + s.error) for w, s in pairs)
        # A mean adds first, then divides.
        size = size + np.abs(sum(s.value for s in signals)) * max(map(abs, self.weights))
        error = sum(abs(w) * s.error for w, s in pairs) + precision.sum(len(pairs) + 2) * size
        return Signal(value, error * (1 + 1e-9) + 4 * precision.tiny)


@dataclasses.dataclass(frozen=True)
class Extreme(Operation):
    """y = max_k x_k, or min_k x_k, entry by entry with broadcasting."""

    largest: bool

    def forward(self, signals, precision):
        pick = np.maximum if self.largest else np.minimum
        value, error = signals[0].value, signals[0].error
        for signal in signals[1:]:
            value = pick(value, signal.value)
            if error is not None and signal.error is not None:
                error = np.maximum(error, signal.error)
        return Signal(value, None if any(s.error is None for s in signals) else error)


@dataclasses.dataclass(frozen=True)
class Joined(Operation):
    """Concatenation along an axis (batch axis 0)."""

    axis: int

    def forward(self, signals, precision):
        value = np.concatenate([s.value for s in signals], axis=self.axis)
        if any(s.error is None for s in signals):
            return Signal(value)
        return Signal(value, np.concatenate([s.error for s in signals], axis=self.axis))


def of_name(name, count, axis=None):
    """The operation of a merging layer by its class's name."""
    if name == "Add":
        return Weighted((1.0,) * count)
    if name == "Subtract":
        return Weighted((1.0, -1.0))
    if name == "Average":
        return Weighted((1.0 / count,) * count)
    if name == "Concatenate":
        return Joined(int(axis))
    return Extreme(name == "Maximum")


def read(call):
    """A merging layer."""
    layer = call.operation
    return [of_name(type(layer).__name__, len(call.inputs), getattr(layer, "axis", None))]


READERS = dict.fromkeys(MERGING_LAYERS, read)
