"""Resizing, interpolated upsampling, centre crops and adaptive pooling: one matrix per axis.

Such a step maps every channel x of an image by y = (A_1 ⊗ A_2 ⊗ …) x + b, one matrix per spatial
axis, and b from cells that are filled. Its weights are those of the active backend, read from its
own results on the unit vectors of each axis. The norm of the product is that of its factors'
product, ‖A_1 ⊗ A_2‖ = ‖A_1‖ ‖A_2‖, attained on the product of the two singular vectors.
"""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import moving, selecting
from tf_lyapunov.program.gain import Affine, Gain, Peak, with_cast
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import Operation, Signal, frozen, with_error
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.tensors import as_array, as_tensor

_layers = keras.layers


def _adaptive(kind):
    # Older versions of Keras have none.
    names = [f"Adaptive{kind}Pooling{n}D" for n in (1, 2, 3)]
    return tuple(getattr(_layers, name) for name in names if hasattr(_layers, name))


ADAPTIVE_AVERAGE, ADAPTIVE_MAX = _adaptive("Average"), _adaptive("Max")
# Entries that are computed at once when a step's matrices are read.
_ENTRIES = 2**22
_SINGLE = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Separable(Operation):
    """y = (A_1 ⊗ A_2 ⊗ …) x + b per channel.

    Attributes:
        axes: spatial axes of the batch.
        matrices: tuple of float64 (outputs, inputs), one per axis.
        shift: float64, b, broadcast against a sample.
        selects: whether every output is an input entry or a constant, which no rounding changes.
    """

    axes: tuple
    matrices: tuple
    shift: np.ndarray
    selects: bool

    def forward(self, signals, precision):
        (signal,) = signals
        value = self._apply(signal.value, self.matrices) + self.shift

        def error():
            size = tuple(np.abs(m) for m in self.matrices)
            moved = self._apply(signal.error, size)
            unit = max(precision.unit, _SINGLE)
            if self.selects:
                return moved + unit * np.abs(self.shift) + precision.tiny
            wide = tuple(map(_dilated, self.matrices))
            largest = self._apply(np.abs(signal.value) + signal.error, wide)
            return (
                moved
                + _weight_error(self.matrices, unit) * (largest + np.abs(self.shift))
                + 8 * precision.tiny * (1 + np.max(np.abs(signal.value), initial=0.0))
            )

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        sizes = list(graph.sizes(x))
        pairs = list(zip(self.axes, self.matrices, strict=True))
        if self.selects and all(np.all(m.sum(axis=1) == 1) for m in self.matrices):
            lines = {axis: np.argmax(matrix, axis=1) for axis, matrix in pairs}
            x = selecting.write_lines(graph, x, lines, sizes)
        else:
            rank = len(sizes) + 1
            order = (*(a for a in range(rank) if a not in self.axes), *self.axes)
            x = graph.transposed(x, order)
            for place, (_, matrix) in enumerate(pairs, rank - len(pairs)):
                x = _write_matrix(graph, x, matrix, place, rank)
            x = graph.transposed(x, np.argsort(order).tolist())
        return graph.pointwise("Add", x, self.shift) if np.any(self.shift) else x

    def _apply(self, x, matrices):
        for axis, matrix in zip(self.axes, matrices, strict=True):
            x = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)
        return x


def _write_matrix(graph, x, matrix, place, rank):
    """The products with a matrix along an axis of a signal that has its spatial axes last."""
    if place == rank - 2:
        return graph.node("MatMul", matrix, x)
    swap = list(range(rank))
    swap[place], swap[-1] = swap[-1], swap[place]
    y = graph.node("MatMul", graph.transposed(x, swap), matrix.T)
    return graph.transposed(y, swap)


def _weight_error(matrices, unit):
    """Relative error of a sum of products with weights from coordinates in float32.

    A coordinate errs by a few units of the size of its axis, and a weight by as much.
    """
    largest = max(max(m.shape) for m in matrices)
    terms = sum(int(np.max(np.count_nonzero(m, axis=1), initial=0)) for m in matrices)
    return rounding.gamma(2 * largest + terms + 16, unit)


def _dilated(matrix):
    """|A| with every weight spread to its neighbours, which a shifted coordinate may reach."""
    size = np.abs(matrix)
    wide = size.copy()
    wide[:, 1:] = np.maximum(wide[:, 1:], size[:, :-1])
    wide[:, :-1] = np.maximum(wide[:, :-1], size[:, 1:])
    return wide


def matrix_norm_up(matrix):
    """Upper bound on the spectral norm of a float64 matrix, within a few units of roundoff."""
    inflation = 1 + 8 * max(matrix.shape) * rounding.UNIT_ROUNDOFF["float64"]
    if not matrix.size:
        return 0.0
    if matrix.size <= 10**6:
        return float(np.linalg.norm(matrix, 2)) * inflation
    # Schur test: ‖A‖² ≤ (largest absolute row sum)·(largest absolute column sum).
    size = np.abs(matrix)
    return math.sqrt(size.sum(axis=1).max() * size.sum(axis=0).max()) * inflation


# Reading ----------------------------------------------------------------------------------------


def _spatial_axes(call):
    rank = len(call.inputs[0].shape)
    form = getattr(call.operation, "data_format", None) or keras.config.image_data_format()
    return tuple(range(2, rank)) if form == "channels_first" else tuple(range(1, rank - 1))


def _callable(call):
    """The call as a function of one array, in the dtype of its input."""

    def run(x):
        given = as_tensor(x, call.inputs[0].dtype)

        def fill(a):
            return given if isinstance(a, Tensor) else a

        args, kwargs = keras.tree.map_structure(fill, (call.args, call.kwargs))
        return as_array(call.operation(*args, **kwargs))

    return run


def _responses(run, axes, axis, shape):
    """Results on the unit vectors of one axis, ones along the others; one row per vector."""
    count = shape[axis]
    room = max(_ENTRIES // math.prod(shape[1:]), 1)
    found = []
    for start in range(0, count, room):
        index = np.arange(start, min(start + room, count))
        x = np.zeros((len(index), *shape[1:]))
        np.moveaxis(x, axis, 1)[np.arange(len(index)), index] = 1.0
        found.append(run(x))
    return np.concatenate(found)


def _one_channel(call):
    """Axes and shape of one channel of the call's input; refused where a size is unknown."""
    tensor, axes = call.inputs[0], _spatial_axes(call)
    if len(call.inputs) != 1 or len(tensor.shape) < 3:
        refuse(call.operation, "it is read as a map of batches of images")
    if any(tensor.shape[a] is None for a in axes):
        refuse(call.operation, "the size of its input is unknown")
    return axes, [1, *(tensor.shape[a] if a in axes else 1 for a in range(1, len(tensor.shape)))]


def _of_call(call):
    """`Separable` of a linear call, from its own results."""
    axes, shape = _one_channel(call)
    run = _callable(call)
    zero, ones = run(np.zeros(shape)), run(np.ones(shape))
    whole = (ones - zero)[0]
    place = np.unravel_index(np.argmax(np.abs(whole)), whole.shape)
    peak = float(whole[place])
    if peak == 0 or not np.all(np.isfinite(whole)):
        refuse(call.operation, "it does not show what it does to an image of ones")
    matrices = []
    for axis in axes:
        rows = _responses(run, axes, axis, shape) - zero
        line = list(place)
        line[axis - 1] = slice(None)
        matrices.append(rows[(slice(None), *line)].T)
    output = call.outputs[0].dtype
    unit = max(rounding.UNIT_ROUNDOFF.get(output, 0.0), _SINGLE)
    if abs(peak - 1) > 16 * unit:  # each matrix holds the others' row sums at that place
        matrices[0] = matrices[0] / peak ** (len(axes) - 1)
    if "AdaptiveAverage" in type(call.operation).__name__:
        # Means of the cells that were seen, whatever the format rounds their weights to.
        cells = [np.asarray(m != 0, np.float64) for m in matrices]
        matrices = [c / np.maximum(c.sum(axis=1, keepdims=True), 1.0) for c in cells]
    selects = all(_is_selection(m) for m in matrices)
    if not keras.backend.is_float_dtype(output):
        # Rounded results on zeros and ones tell nothing of the weights.
        if getattr(call.operation, "interpolation", None) != "nearest":
            refuse(call.operation, "it rounds integers, which is discontinuous")
    return Separable(axes, tuple(map(frozen, matrices)), frozen(zero[0]), selects)


def _is_selection(matrix):
    ones = np.isin(matrix, (0.0, 1.0)).all()
    return bool(ones) and bool(np.all(matrix.sum(axis=1) <= 1))


def _read(call):
    return [_of_call(call)]


def _rule(call):
    found, tensor = _of_call(call), call.inputs[0]
    dtype = call.outputs[0].dtype
    value = rounding.product_up(*map(matrix_norm_up, found.matrices))
    shift = float(rounding.euclidean_norms_up(found.shift.reshape(1, -1))[0])
    channels = tensor.size
    if channels is not None:
        channels = tensor.size / math.prod(tensor.shape[a] for a in found.axes)
    # Filled cells only; a channel's shift repeats over all of them.
    offset = 0.0 if shift == 0 else rounding.product_up(shift, math.sqrt(channels or math.inf))
    unit = max(rounding.unit_roundoff(dtype), rounding.unit_roundoff("float32"))
    if found.selects:
        affine = Affine(value, offset, 0.0, unit * offset)
        method = "selects entries, norm of its matrix"
    else:
        error = _weight_error(found.matrices, unit)
        wide = rounding.product_up(*(matrix_norm_up(_dilated(m)) for m in found.matrices))
        # Weights were read in the format of the input, which may round them.
        value = rounding.sum_up(value, rounding.product_up(4 * unit, wide))
        affine = Affine(value, offset, error * wide, error * offset)
        method = "norm of its matrices along the axes"
    affine = with_cast(affine, tensor, dtype, rounding.unit_roundoff(dtype))
    peak = Peak()
    if "AdaptiveAverage" in type(call.operation).__name__:
        peak = Peak(math.sqrt(math.prod(tensor.shape[a] for a in found.axes)))
    return Gain("map", value, method, affine, peak=peak)


def _upsampling_rule(call):
    layer = call.operation
    if layer.interpolation != "nearest":
        return _rule(call)
    value = rounding.sqrt_up(int(np.prod(layer.size)))
    return Gain("reshape", value, "repeats every entry", Affine(value))


def _read_upsampling(call):
    return _read(call) if call.operation.interpolation != "nearest" else moving.read(call)


# Adaptive maxima --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Largest(Operation):
    """y = the largest x of a window, a product of sets of cells along the axes.

    Attributes:
        axes: spatial axes of the batch.
        windows: tuple of float64 (outputs, inputs) of ones and zeros, one per axis.
    """

    axes: tuple
    windows: tuple

    def forward(self, signals, precision):
        (signal,) = signals
        value = self._apply(signal.value)
        if signal.error is None:
            return Signal(value)
        return Signal(value, self._apply(signal.error))

    def write(self, graph, names):
        (x,) = names
        for axis, window in zip(self.axes, self.windows, strict=True):
            width = int(np.max(np.count_nonzero(window, axis=1)))
            # Shorter windows repeat their last cell.
            cells = np.stack([np.resize(np.flatnonzero(row), width) for row in window])
            below, (place,), back = graph.below(x, (axis,))
            below = graph.node("Gather", below, cells, axis=place)
            x = back(graph.reduce("Max", below, (place + 1,), False))
        return x

    def _apply(self, x):
        for axis, window in zip(self.axes, self.windows, strict=True):
            moved = np.moveaxis(x, axis, -1)
            parts = [moved[..., row > 0].max(axis=-1) for row in window]
            x = np.moveaxis(np.stack(parts, axis=-1), -1, axis)
        return x


def _windows(call):
    axes, shape = _one_channel(call)
    run, windows = _callable(call), []
    for axis in axes:
        rows = _responses(run, axes, axis, shape)
        line = [0] * (rows.ndim - 1)
        line[axis - 1] = slice(None)
        window = rows[(slice(None), *line)].T
        if not np.isin(window, (0.0, 1.0)).all() or not np.all(window.sum(axis=1) >= 1):
            refuse(call.operation, "its windows are not those of a maximum")
        windows.append(frozen(window))
    return Largest(axes, tuple(windows))


def _read_largest(call):
    return [_windows(call)]


def _largest_rule(call):
    """√Π (largest number of windows that share a cell): as for max pooling, attained."""
    shared = math.prod(int(w.sum(axis=0).max()) for w in _windows(call).windows)
    value = rounding.sqrt_up(shared)
    return Gain("pooling", value, "adaptive maximum, overlap counted", Affine(value))


_IMAGES = (_layers.Resizing, _layers.CenterCrop, *ADAPTIVE_AVERAGE)
READERS = {
    **dict.fromkeys(_IMAGES, _read),
    _layers.UpSampling2D: _read_upsampling,
    **dict.fromkeys(ADAPTIVE_MAX, _read_largest),
}
RULES = {
    **dict.fromkeys(_IMAGES, _rule),
    _layers.UpSampling2D: _upsampling_rule,
    **dict.fromkeys(ADAPTIVE_MAX, _largest_rule),
}
BARE_READERS = {
    **dict.fromkeys(("Resize", "AdaptiveAveragePool"), _read),
    "AdaptiveMaxPool": _read_largest,
}
BARE_RULES = {
    **dict.fromkeys(("Resize", "AdaptiveAveragePool"), _rule),
    "AdaptiveMaxPool": _largest_rule,
}
