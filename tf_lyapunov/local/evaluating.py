"""A flow on many inputs at once: values, gradients, and enclosures of the exact outputs."""

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.local.flow import Whole, gain_of
from tf_lyapunov.local.maxima import is_window_maximum, windows_of
from tf_lyapunov.local.pieces import has_pieces, linear_pieces
from tf_lyapunov.local.relaxed import curve_of, is_curved
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.elementwise import FUNCTIONS, Kinked
from tf_lyapunov.program.families.merging import Extreme
from tf_lyapunov.program.operation import EXACT, Signal


class Evaluation:
    """Values of a flow on a batch, and the gradients of functions of its outputs.

    Gradients serve searches alone: functions without corners are differenced, and steps that only
    the model itself evaluates pass gradients on where shapes agree, and stop them elsewhere.

    Args:
        flow: `Flow`.
        x: float64 (n, *shape).

    Attributes:
        outputs: float64 (n, outputs).
    """

    def __init__(self, flow, x):
        self.flow, self.values = flow, [x]
        for link in flow.links:
            read = [self.values[k] for k in link.inputs]
            with np.errstate(all="ignore"):
                self.values.append(_applied(link.operation, read))
        self.outputs = self.values[-1].reshape(len(x), -1)

    def gradient(self, c):
        """Gradient of c_iᵀf at each x_i, float64 (n, *shape), for c (n, outputs)."""
        held = {self.flow.output: c.reshape(self.values[-1].shape)}
        for k in range(self.flow.output, 0, -1):
            if k not in held:
                continue
            c, link = held.pop(k), self.flow.links[k - 1]
            read = [self.values[i] for i in link.inputs]
            with np.errstate(all="ignore"):
                found = _pulled(link.operation, c, read, self.values[k])
            for i, part in zip(link.inputs, found, strict=True):
                held[i] = held[i] + part if i in held else part
        return held.get(0, np.zeros_like(self.values[0]))


def _applied(operation, read):
    if isinstance(operation, Whole):
        return np.asarray(operation.evaluate(read)[0], np.float64)
    if maps.is_linear(operation):
        return maps.applied(operation, read)
    return operation.forward([Signal(v) for v in read], EXACT).value


def _pulled(operation, c, read, value):
    """c through the derivative of one operation, per input."""
    shapes = [r.shape[1:] for r in read]
    if isinstance(operation, Whole):
        return [c if r.shape == c.shape else np.zeros_like(r) for r in read]
    if maps.is_linear(operation):
        return maps.adjoint(operation, c, shapes)
    if has_pieces(operation):
        return [c * slopes_at(operation, read[0])]
    if is_window_maximum(operation):
        cells, _ = windows_of(operation, shapes[0])
        flat = read[0].reshape(len(c), -1)
        inside = np.where(cells >= 0, flat[:, cells], -np.inf)
        chosen = cells[np.arange(len(cells)), inside.argmax(axis=2)]
        found = np.zeros_like(flat)
        np.add.at(found, (np.arange(len(c))[:, None], chosen), c.reshape(len(c), -1))
        return [found.reshape(read[0].shape)]
    if is_curved(operation):
        flat = read[0].reshape(len(c), -1)
        curve = curve_of(operation, shapes[0], flat, flat, flat)
        pulled = curve.pull(c.reshape(len(c), -1), np.arange(len(c)))
        return [pulled.reshape(read[0].shape)]
    if isinstance(operation, Extreme):
        return [maps.reduced_to(c * (r == value), s) for r, s in zip(read, shapes, strict=True)]
    return [c if r.shape == c.shape else np.zeros_like(r) for r in read]


def slopes_at(operation, t):
    """φ'(t) of an elementwise operation, nearly."""
    if isinstance(operation, Kinked):
        return np.where(t > 0, 1.0, operation.slopes)
    exact = linear_pieces(operation)
    if exact is not None:
        breaks, lines = exact
        return np.array([slope for slope, _ in lines], float)[np.searchsorted(breaks, t)]
    step = 1e-6 * (1 + np.abs(t))
    function, parameters = FUNCTIONS[operation.name], dict(operation.parameters)
    return (function(t + step, **parameters) - function(t - step, **parameters)) / (2 * step)


def enclosed(flow, x):
    """The exact outputs at single inputs: `(values, errors)`, float64 (n, outputs).

    Every operation's own bound on the rounding of its float64 evaluation adds up through the flow;
    a step that only the model evaluates carries errors on by its gain.
    """
    found = [_enclosed(flow, row[None]) for row in x]
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _enclosed(flow, x):
    signals = [Signal(x, np.zeros_like(x))]
    for link in flow.links:
        read = [signals[k] for k in link.inputs]
        if isinstance(link.operation, Whole):
            value, own = link.operation.evaluate([s.value for s in read])
            sizes = [float(rounding.euclidean_norms_up(s.error.reshape(1, -1))[0]) for s in read]
            error = rounding.sum_up(gain_of(link.operation.nodes, sizes), own)
            signals.append(Signal(np.asarray(value, np.float64), np.full(value.shape, error)))
        else:
            found = link.operation.forward(read, EXACT)
            error = found.error
            error = np.full(found.value.shape, np.inf) if error is None else error
            signals.append(Signal(found.value, np.broadcast_to(error, found.value.shape)))
    last = signals[-1]
    return last.value.reshape(1, -1), np.asarray(last.error, np.float64).reshape(1, -1)
