"""What one step of a network does: its gain, its matrix where it has one, and its values.

Signals are float64 arrays (n, …) without Keras; `forward` maps values and bounds on their errors
to those of the output.
"""

import dataclasses
import itertools
import math

import numpy as np

from tf_lyapunov.verification import activations
from tf_lyapunov.verification.arithmetic import (
    SLACK,
    TINY,
    UNIT,
    frobenius_up,
    gamma,
    largest_eigenvalue_up,
    ldexp_up,
    norm_up,
    product_up,
    sqrt_up,
    sum_up,
    times,
    up,
)
from tf_lyapunov.verification.rounding import FLOAT64

# Largest smaller side of a convolution's matrix whose norm is taken from that matrix, and the
# largest number of entries held at once.
LARGEST_SIDE, LARGEST_ENTRIES = 1500, 2**25
# Entries of a matrix that is part of a chain.
LARGEST_MATRIX = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """y = Wx + b on flattened signals, or on the last axis."""

    weight: np.ndarray  # (out, in)
    bias: np.ndarray  # (out,)
    weight_error: object = 0.0
    bias_error: object = 0.0
    bias_size: object = None  # of what was added up to the bias, where it was folded
    after: object = 1.0  # factors ≥ 1 that a folded normalization puts on errors before it

    def gain(self):
        return norm_up(self.weight, self.weight_error)

    def matrix(self, shape):
        if len(shape) != 1:
            return None
        return self.weight, self.weight_error

    def forward(self, values, errors, rounding=FLOAT64):
        terms, size = self.weight.shape[1], np.abs(self.weight)
        reach = np.abs(values) + errors
        error = rounding.gamma(terms + 16) * reach + errors
        result = values @ self.weight.T + self.bias
        error = error @ size.T
        if np.ndim(self.weight_error):
            error = error + reach @ self.weight_error.T
        error = error + _bias_error(self, result, rounding)
        lost = terms + 2 + size.sum(axis=1) + reach.sum(axis=-1, keepdims=True)
        return result, _grown(error + rounding.tiny * lost * self.after, terms)


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One spatial axis: y[i] = Σ_t K[t] x[i·stride + t·dilation - left], zero outside."""

    taps: int
    stride: int
    dilation: int
    size: int
    left: int
    output: int

    @classmethod
    def of(cls, taps, stride, dilation, size, padding):
        extent = (taps - 1) * dilation + 1
        if padding == "valid":
            return cls(taps, stride, dilation, size, 0, (size - extent) // stride + 1)
        output = -(-size // stride)
        left = extent - 1
        if padding == "same":
            left = max((output - 1) * stride + extent - size, 0) // 2
        return cls(taps, stride, dilation, size, left, output)

    @property
    def last(self):
        """Largest index read, beyond the input where there is padding."""
        return (self.output - 1) * self.stride + (self.taps - 1) * self.dilation - self.left

    @property
    def period(self):
        """Length of a circle on which no index wraps around onto the input.

        An index in [-left, last] outside [0, size) must stay outside modulo the period, and the
        outputs must be different points of it.
        """
        least = max(self.size + self.left, self.last + 1, self.output * self.stride)
        return self.stride * -(-least // self.stride)


def windows(values, axes, fill):
    """Yields `(tap, slice)`: what every output position reads at each tap of its window."""
    pads = [(a.left, max(a.last - a.size + 1, 0)) for a in axes]
    padded = np.pad(values, [(0, 0), *pads, (0, 0)], constant_values=fill)
    for tap in itertools.product(*(range(a.taps) for a in axes)):
        index = tuple(
            slice(t * a.dilation, t * a.dilation + (a.output - 1) * a.stride + 1, a.stride)
            for t, a in zip(tap, axes, strict=True)
        )
        yield tap, padded[(slice(None), *index)]


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """Convolution on channels-last signals, zero padded.

    `kernels` is (groups, *taps, in, out); group g reads and writes its own channels.
    """

    kernels: np.ndarray
    axes: tuple
    bias: np.ndarray
    kernel_error: object = 0.0
    bias_error: object = 0.0
    bias_size: object = None
    after: object = 1.0

    def output_shape(self):
        channels = self.kernels.shape[0] * self.kernels.shape[-1]
        return (*(a.output for a in self.axes), channels)

    def apply(self, values, kernels):
        groups, inputs = kernels.shape[0], kernels.shape[-2]
        total = np.zeros((len(values), *self.output_shape()))
        parts = total.reshape(*total.shape[:-1], groups, kernels.shape[-1])
        for tap, read in windows(values, self.axes, 0.0):
            split = read.reshape(*read.shape[:-1], groups, inputs)
            for g in range(groups):
                parts[..., g, :] += split[..., g, :] @ kernels[(g, *tap)]
        return total

    def forward(self, values, errors, rounding=FLOAT64):
        size, reach = np.abs(self.kernels), np.abs(values) + errors
        terms = math.prod(a.taps for a in self.axes) * self.kernels.shape[-2]
        result = self.apply(values, self.kernels) + self.bias
        error = self.apply(rounding.gamma(terms + 16) * reach + errors, size)
        if np.ndim(self.kernel_error):
            error = error + self.apply(reach, self.kernel_error)
        error = error + _bias_error(self, result, rounding)
        largest = reach.max(axis=tuple(range(1, reach.ndim)), keepdims=True)
        sums = size.sum(axis=tuple(range(1, size.ndim - 1))).reshape(-1)
        lost = terms * (1 + largest) + 2 + sums
        return result, _grown(error + rounding.tiny * lost * self.after, terms)

    def matrix(self, shape):
        inputs, outputs = math.prod(shape), math.prod(self.output_shape())
        if inputs * outputs > LARGEST_MATRIX:
            return None
        basis = np.eye(inputs).reshape(inputs, *shape)
        # Every entry is one weight or zero: the sums are exact.
        weight = self.apply(basis, self.kernels).reshape(inputs, outputs).T
        if not np.ndim(self.kernel_error):
            return weight, 0.0
        return weight, self.apply(basis, self.kernel_error).reshape(inputs, outputs).T

    def gain(self):
        norms = []
        for g in range(len(self.kernels)):
            alone = dataclasses.replace(self, kernels=self.kernels[g : g + 1], kernel_error=0.0)
            bound = alone._matrix_norm_up()
            norms.append(alone._frequency_norm_up() if bound is None else bound)
        # ‖Σ_t E_t ⊗ shift_t‖ ≤ Σ_t ‖E_t‖
        extra = 0.0
        if np.ndim(self.kernel_error):
            extra = frobenius_up(self.kernel_error)
            extra = product_up(extra, sqrt_up(math.prod(a.taps for a in self.axes)))
        return sum_up(max(norms), extra)

    def _matrix_norm_up(self):
        """From the Gram matrix of the smaller side, or None if that is large."""
        shape = (*(a.size for a in self.axes), self.kernels.shape[-2])
        inputs, outputs = math.prod(shape), math.prod(self.output_shape())
        side = min(inputs, outputs)
        if side > LARGEST_SIDE or (inputs < outputs and inputs * outputs > LARGEST_ENTRIES):
            return None
        scale = math.frexp(float(np.max(np.abs(self.kernels), initial=0.0)))[1]
        scaled = dataclasses.replace(self, kernels=np.ldexp(self.kernels, -scale))
        gram, error, step = np.zeros((side, side)), np.zeros((side, side)), inputs
        # Products with an exact zero are exact: this many others enter one entry.
        terms = math.prod(a.taps for a in self.axes) * max(self.kernels.shape[-2:])
        if inputs >= outputs:
            step = max(min(inputs, LARGEST_ENTRIES // (4 * max(outputs, 1))), 1)
        for start in range(0, inputs, step):
            basis = np.zeros((min(step, inputs - start), inputs))
            basis[:, start : start + step] = np.eye(len(basis))
            columns = scaled.apply(basis.reshape(-1, *shape), scaled.kernels)
            columns = columns.reshape(len(basis), outputs)
            part = columns if inputs < outputs else columns.T
            product, rounding = times(part, part.T, terms=terms)
            gram, error = gram + product, error + rounding
            error += 2 * UNIT * np.abs(gram)
        error = error * (1 + gamma(inputs // step + 8))
        top = largest_eigenvalue_up((gram + gram.T) / 2, (error + error.T) / 2 * SLACK)
        return ldexp_up(sqrt_up(top), scale)

    def _frequency_norm_up(self):
        """From the circulant on `Axis.period` points, of which the map is a compression.

        Stride s adds the s aliased frequencies: ‖A‖² is the largest eigenvalue over frequencies g
        of (1/s)·Σ_j S(g + jN/s) S(g + jN/s)ᴴ, S the kernel's transform.
        """
        # By a power of two, which is exact, to entries near one.
        scale = math.frexp(float(np.max(np.abs(self.kernels), initial=0.0)))[1]
        scaled = np.ldexp(self.kernels[0], -scale)
        kernel = scaled.astype(np.complex128)
        inputs, outputs = kernel.shape[-2:]
        for position, axis in enumerate(self.axes):
            n = axis.period
            angle = np.outer(np.arange(n), np.arange(axis.taps) * axis.dilation) % n
            wave = np.exp(-2j * np.pi * angle / n)
            kernel = np.moveaxis(np.tensordot(wave, kernel, (1, position)), 0, position)
        strides = [a.stride for a in self.axes]
        points = [a.period // a.stride for a in self.axes]
        rank, aliases = len(self.axes), math.prod(strides)
        split = [n for s, g in zip(strides, points, strict=True) for n in (s, g)]
        order = [2 * i + 1 for i in range(rank)] + [2 * i for i in range(rank)]
        symbol = kernel.reshape(*split, inputs, outputs).transpose(*order, 2 * rank, 2 * rank + 1)
        # A real kernel's transform is conjugate at the negative frequency.
        symbol = symbol[: points[0] // 2 + 1].reshape(-1, aliases * inputs, outputs)
        if aliases * inputs < outputs:
            symbol = np.conj(np.swapaxes(symbol, -1, -2))
        size = frobenius_up(scaled) or TINY
        symbol = symbol / size
        rows, side = symbol.shape[-2:]
        best, step = 0.0, max(1, LARGEST_ENTRIES // (8 * side * max(side, rows)))
        for start in range(0, len(symbol), step):
            part = symbol[start : start + step]
            gram = np.conj(np.swapaxes(part, -1, -2)) @ part
            sizes = np.max(np.sum(np.abs(part) ** 2, axis=(-2, -1)))
            rounding = float(gamma(4 * rows + 16) * sizes * SLACK)
            best = max(best, largest_eigenvalue_up(gram, rounding))
        # Waves err by a few units per axis; entries of the transform sum over the taps.
        taps = math.prod(a.taps for a in self.axes)
        drift = (8 * rank + 4) * UNIT * 4 + gamma(4 * taps + 16)
        drift = product_up(drift, sqrt_up(taps), sqrt_up(aliases))
        bound = sum_up(sqrt_up(best / aliases * (1 + 4 * UNIT)), drift)
        return ldexp_up(product_up(size, bound), scale)


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """y = scale·x + shift along the last axis, or with numbers."""

    scale: np.ndarray
    shift: np.ndarray
    scale_error: np.ndarray
    shift_error: np.ndarray
    shift_size: object = None  # of what was added up to the shift

    def gain(self):
        return sum_up(float(np.max(np.abs(self.scale))), float(np.max(np.abs(self.scale_error))))

    def matrix(self, shape):
        size = math.prod(shape)
        if size**2 > LARGEST_MATRIX:
            return None
        scale = np.broadcast_to(self.scale, shape).reshape(-1)
        error = np.broadcast_to(self.scale_error, shape).reshape(-1)
        return np.diag(scale), np.diag(error)

    def forward(self, values, errors, rounding=FLOAT64):
        result = self.scale * values + self.shift
        shift = np.abs(self.shift) if self.shift_size is None else self.shift_size
        size = np.abs(self.scale) * np.abs(values) + shift
        unit = 4 * UNIT if rounding.unit == UNIT else 16 * rounding.unit
        error = (np.abs(self.scale) + self.scale_error) * errors + unit * size
        error = error + self.scale_error * np.abs(values) + self.shift_error
        error = error + rounding.settings * size
        error = error + rounding.tiny * (4 + 2 * np.abs(self.scale) + np.abs(values) + errors)
        return result, _grown(error, 8)


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function of `activations.TABLE`; `slopes_at` for PReLU."""

    name: str
    parameters: dict
    slopes_at: np.ndarray | None = None

    def slopes(self):
        if self.slopes_at is None:
            return activations.slopes(self.name, self.parameters)
        found = self.slopes_at
        return min(1.0, float(found.min())), max(1.0, float(found.max()))

    def gain(self):
        return max(map(abs, self.slopes()))

    def forward(self, values, errors, rounding=FLOAT64):
        lost = rounding.tiny * (1 + self.gain() + np.abs(values) + errors)
        if self.slopes_at is None:
            result, error = activations.evaluate(
                self.name, self.parameters, values, errors, rounding
            )
            return result, _grown(error + lost, 4)
        result = np.where(values > 0, values, self.slopes_at * values)
        error = self.gain() * errors + 4 * rounding.unit * np.abs(result) + lost
        return result, _grown(error, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class MaxPooling:
    """Largest entry of each window."""

    axes: tuple

    def gain(self):
        """√(most windows that share a cell): each output moves as one cell of its window."""
        shared = 1
        for axis in self.axes:
            cells = _cells(axis)
            counts = np.bincount(cells[(cells >= 0) & (cells < axis.size)], minlength=1)
            shared *= int(counts.max())
        return sqrt_up(shared) if shared > 1 else 1.0

    def forward(self, values, errors, rounding=FLOAT64):
        best = np.maximum.reduce([read for _, read in windows(values, self.axes, -np.inf)])
        error = np.maximum.reduce([read for _, read in windows(errors, self.axes, 0.0)])
        return best, error + rounding.tiny


@dataclasses.dataclass(frozen=True, eq=False)
class AveragePooling:
    """Mean of each window's valid cells."""

    axes: tuple

    def _matrices(self):
        """One (output, input) matrix per axis; the pooling is their Kronecker product."""
        for axis in self.axes:
            cells = _cells(axis)
            inside = (cells >= 0) & (cells < axis.size)
            matrix = np.zeros((axis.output, axis.size))
            rows = np.broadcast_to(np.arange(axis.output)[:, None], cells.shape)
            share = 1 / inside.sum(axis=1, keepdims=True)
            np.add.at(matrix, (rows[inside], cells[inside]), (inside * share)[inside])
            yield matrix

    def gain(self):
        return product_up(*(norm_up(m, 2 * UNIT * m) for m in self._matrices()))

    def matrix(self, shape):
        outputs = (*(a.output for a in self.axes), shape[-1])
        if math.prod(shape) * math.prod(outputs) > LARGEST_MATRIX:
            return None
        weight = np.ones((1, 1))
        for part in (*self._matrices(), np.eye(shape[-1])):
            weight = np.kron(weight, part)
        return weight, 8 * (len(self.axes) + 1) * UNIT * weight

    def forward(self, values, errors, rounding=FLOAT64):
        count = math.prod(a.taps for a in self.axes)
        for position, matrix in enumerate(self._matrices(), 1):

            def mean(array, matrix=matrix, position=position):
                return np.moveaxis(np.tensordot(matrix, array, (1, position)), 0, position)

            errors = mean(errors + rounding.gamma(count + 8) * np.abs(values))
            errors = errors + rounding.tiny * (2 * count + 2)
            values = mean(values)
        return values, _grown(errors, 4 * count)


def _cells(axis):
    start = np.arange(axis.output)[:, None] * axis.stride - axis.left
    return start + np.arange(axis.taps)[None, :] * axis.dilation


@dataclasses.dataclass(frozen=True, eq=False)
class GlobalPooling:
    """Largest entry or mean over all positions."""

    mean: bool
    positions: int

    def gain(self):
        return float(up(1 / math.sqrt(self.positions) * (1 + 2 * UNIT))) if self.mean else 1.0

    def matrix(self, shape):
        if not self.mean or math.prod(shape) * shape[-1] > LARGEST_MATRIX:
            return None
        weight = np.tile(np.eye(shape[-1]) / self.positions, self.positions)
        return weight, 8 * UNIT * weight

    def forward(self, values, errors, rounding=FLOAT64):
        axes = tuple(range(1, values.ndim - 1))
        if not self.mean:
            return values.max(axis=axes), errors.max(axis=axes) + rounding.tiny
        size = np.abs(values).mean(axis=axes)
        error = errors.mean(axis=axes) + rounding.gamma(self.positions + 8) * size
        error = error + rounding.tiny * (2 * self.positions + 2)
        return values.mean(axis=axes), _grown(error, 2 * self.positions)


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """Reshapes (row-major), or pads by zeros and crops (negative pads)."""

    shape: tuple
    pads: tuple = ()

    def gain(self):
        return 1.0

    def matrix(self, shape):
        inputs = math.prod(shape)
        if inputs * math.prod(self.shape) > LARGEST_MATRIX:
            return None
        moved = self._moved(np.eye(inputs).reshape(inputs, *shape))
        return moved.reshape(inputs, -1).T, 0.0

    def forward(self, values, errors, rounding=FLOAT64):
        return self._moved(values), self._moved(errors)

    def _moved(self, array):
        if not self.pads:
            return array.reshape(len(array), *self.shape)
        index = [slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(
            self.pads, array.shape[1:], strict=True)]  # fmt: skip
        array = array[(slice(None), *index)]
        return np.pad(array, [(0, 0), *((max(a, 0), max(b, 0)) for a, b in self.pads)])


@dataclasses.dataclass(frozen=True, eq=False)
class Merge:
    """Sum, difference, mean or concatenation of several signals of one shape."""

    kind: str
    axis: int = -1

    def combine(self, gains):
        """Gain from the model's input, from those of the signals that are merged."""
        if self.kind == "concatenate":
            total = sum_up(*(product_up(g, g) for g in gains))
            return gains[0] if len(gains) == 1 else sqrt_up(total)
        total = sum_up(*gains)
        return float(up(total / len(gains))) if self.kind == "average" else total

    def forward(self, values, errors, rounding=FLOAT64):
        if self.kind == "concatenate":
            return np.concatenate(values, self.axis), np.concatenate(errors, self.axis)
        signs = [1.0] * len(values)
        if self.kind == "subtract":
            signs[1] = -1.0
        result = sum(s * v for s, v in zip(signs, values, strict=True))
        size = sum(np.abs(v) for v in values)
        error = sum(errors) + rounding.gamma(len(values) + 4) * size + rounding.tiny * len(values)
        if self.kind == "average":
            result, error = result / len(values), error / len(values)
        return result, _grown(error, len(values) + 4)


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """What does nothing at inference."""

    def gain(self):
        return 1.0

    def forward(self, values, errors, rounding=FLOAT64):
        return values, errors


def _bias_error(operation, result, rounding):
    size = np.abs(operation.bias) if operation.bias_size is None else operation.bias_size
    unit = 4 * UNIT if rounding.unit == UNIT else 16 * rounding.unit
    return unit * (size + np.abs(result)) + operation.bias_error


def _grown(error, terms):
    """An error bound with the rounding of its own computation."""
    return error * (1 + gamma(terms + 16)) * SLACK + terms * TINY
