"""Layers and operations that move, repeat, drop or pad entries: read by running them on positions.

What such a layer does to a sample does not depend on its values, so its own result on the numbers
of the positions says where every entry comes from.
"""

import dataclasses
import functools
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import padding, resizing, shifting
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import selecting
from tf_lyapunov.program.families.unchanged import unchanged_gain
from tf_lyapunov.program.gain import Affine, Gain, layer_gain
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import Operation, with_error
from tf_lyapunov.program.refusal import refuse
from tf_lyapunov.program.tensors import as_array, as_tensor

_layers = keras.layers

RESHAPING_LAYERS = (
    _layers.Flatten,
    _layers.Reshape,
    _layers.Permute,
    _layers.ZeroPadding1D,
    _layers.ZeroPadding2D,
    _layers.ZeroPadding3D,
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.Cropping3D,
)

UPSAMPLING = (_layers.UpSampling1D, _layers.UpSampling3D)

OWN_LAYERS = (
    resizing.InvertibleDownSampling,
    resizing.InvertibleUpSampling,
    resizing.ChannelPadding,
    resizing.Truncate,
    shifting.ShiftMixing,
)

# Numbers of positions are followed digit by digit: every format holds integers up to 128.
_BASE, _DIGITS = 128, 5


@dataclasses.dataclass(frozen=True)
class Moved(Operation):
    """y[i] = x[index[i] - 1], or zero where the index is 0.

    Attributes:
        index: read-only int64, of the shape of an output sample.
    """

    index: np.ndarray

    def forward(self, signals, precision):
        (signal,) = signals
        return with_error(signals, self._moved(signal.value), lambda: self._moved(signal.error))

    def write(self, graph, names):
        return selecting.write_moved(graph, *names, self.index)

    @functools.cached_property
    def _keeps_order(self):
        return np.array_equal(self.index.ravel(), np.arange(1, self.index.size + 1))

    def _moved(self, x):
        flat = x.reshape(len(x), -1)
        if self._keeps_order and self.index.size == flat.shape[1]:  # flattened or reshaped
            return flat.reshape(len(x), *self.index.shape)
        padded = np.concatenate([np.zeros((len(x), 1)), flat], axis=1)
        return padded[:, self.index.ravel()].reshape(len(x), *self.index.shape)


def read(call):
    """The index map of a call, from its result on positions."""
    tensor, operation = call.inputs[0], call.operation
    size = None if None in tensor.shape[1:] else math.prod(tensor.shape[1:])
    if size is None or size >= _BASE**_DIGITS:
        raise UnsupportedLayerError(
            f"Moving entries needs a known size below {_BASE**_DIGITS}. Received: layer "
            f"{operation.name!r} on shape {tensor.shape}."
        )
    count = next(d for d in range(1, _DIGITS + 1) if size < _BASE**d)
    powers = _BASE ** np.arange(count)
    positions = np.arange(1, size + 1).reshape(tensor.shape[1:])
    # A sample per digit, all of them again, which must give the same, and one of zeros, which must
    # stay zeros.
    each = [positions // p % _BASE for p in powers]
    dtype = tensor.dtype if "float" in tensor.dtype else "float32"
    known = as_tensor(np.stack([*each, *each, np.zeros_like(positions)]), dtype)

    def fill(a):
        return known if isinstance(a, Tensor) else a

    args, kwargs = keras.tree.map_structure(fill, (call.args, call.kwargs))
    moved = as_array(operation(*args, **kwargs))
    digits = np.rint(moved).astype(np.int64)
    faithful = len(moved) == 2 * count + 1 and not np.any(moved[-1])
    faithful = faithful and np.array_equal(digits, moved) and math.prod(moved.shape[1:])
    faithful = faithful and np.all((digits >= 0) & (digits < _BASE))
    faithful = faithful and np.array_equal(digits[:count], digits[count:-1])
    index = np.tensordot(powers, digits[:count], 1)[None] if faithful else None
    if not faithful or index.max(initial=0) > size:
        raise UnsupportedLayerError(
            "A layer that moves entries must keep samples apart and entries as they are. Received: "
            f"layer {operation.name!r} of type {type(operation).__name__}."
        )
    index = index[0]
    index.setflags(write=False)
    return [Moved(index)]


def index_gain(index):
    """√(largest number of times that an entry is used), rounded up: the norm of an index map.

    Its matrix W has one 1 in a row at most, so that WᵀW is diagonal with these numbers.

    Args:
        index: integers, 0 where no entry is placed.

    Example:

    >>> index_gain(np.array([1, 1, 2, 0, 1, 1]))
    2.0
    """
    used = np.asarray(index).ravel()
    return rounding.sqrt_up(int(np.max(np.bincount(used[used > 0], minlength=1), initial=0)))


def checked_read(call):
    """The index map of a call of one tensor, refused where it is none or mixes samples."""
    tensor, output = call.inputs[0], call.outputs[0]
    mixes = "it mixes samples along the batch axis"
    if len(call.inputs) != 1 or tensor.shape[:1] != output.shape[:1] or len(tensor.shape) < 2:
        refuse(call.operation, mixes)
    if None in tensor.shape[1:]:
        refuse(call.operation, "the sizes of its input are unknown")
    try:
        return read(call)[0]
    except UnsupportedLayerError:
        refuse(call.operation, mixes)


def _reshaping_rule(call):
    return dataclasses.replace(
        unchanged_gain(call), kind="reshape", method="moves, drops or pads entries by zeros"
    )


def _repeat_rule(call):
    repeats = rounding.sqrt_up(call.operation.n)
    return Gain("reshape", repeats, "repeats every entry", Affine(repeats))


def _own_rule(call):
    return layer_gain(call, "reshape", 1.0, "moves, drops or pads entries by zeros", 0.0)


def _padding_rule(call):
    value = index_gain(checked_read(call).index)
    mode = f"pads by mode {call.operation.mode!r}, √(times that an entry is used)"
    return layer_gain(call, "reshape", value, mode, 0.0)


def _upsampling_rule(call):
    value = rounding.sqrt_up(int(np.prod(call.operation.size)))
    return Gain("reshape", value, "repeats every entry", Affine(value))


def _bare_rule(call):
    """Operations that only move or drop entries, and leave the batch axis alone."""
    operation, tensor, output = call.operation, call.inputs[0], call.outputs[0]
    kind, rank = type(operation).__name__, len(tensor.shape)
    mixes = "it mixes samples along the batch axis"
    if len(call.inputs) != 1 or (tensor.shape[0] is not None) != (output.shape[0] is not None):
        refuse(operation, mixes)
    if kind == "Transpose" and (operation.axes is None or operation.axes[0] % rank != 0):
        refuse(operation, mixes)
    if kind == "Reshape" and (tensor.size is None or tensor.size != output.size):
        refuse(operation, mixes)
    if kind == "Squeeze":
        axes = operation.axis
        axes = (axes,) if isinstance(axes, int) else axes
        if axes is None or 0 in [a % rank for a in axes]:
            refuse(operation, mixes)
    if kind == "ExpandDims":
        axes = operation.axis
        axes = (axes,) if isinstance(axes, int) else axes
        if 0 in [a % len(output.shape) for a in axes]:
            refuse(operation, mixes)
    if kind == "GetItem":
        key = call.args[1] if len(call.args) > 1 else call.kwargs.get("key")
        parts = key if isinstance(key, (tuple, list)) else (key,)
        kinds = (int, np.integer, slice, type(Ellipsis), type(None))
        if any(isinstance(p, bool) or not isinstance(p, kinds) for p in parts):
            # An array of indices: its entries may repeat.
            value = index_gain(checked_read(call).index)
            return Gain("reshape", value, "√(times that an entry is used)", Affine(value))
        if not parts or (parts[0] is not Ellipsis and parts[0] != slice(None)):
            refuse(operation, mixes)
        if parts[0] is Ellipsis and len([p for p in parts[1:] if p is not None]) >= rank:
            refuse(operation, mixes)
    return Gain("reshape", 1.0, "moves or drops entries")


def space_to_depth_index(shape, strides):
    """Index of a `Moved` that rearranges blocks of pixels into channels, zeros where none is.

    Args:
        shape: `(H, W, c)`.
        strides: `(s, t)`.

    Example:

    >>> space_to_depth_index((2, 3, 1), (2, 2))[0, 1].tolist()
    [3, 0, 6, 0]
    """
    (high, wide, channels), (s, t) = shape, strides
    index = np.arange(1, math.prod(shape) + 1).reshape(shape)
    index = np.pad(index, [(0, -high % s), (0, -wide % t), (0, 0)])
    rows, columns = index.shape[0] // s, index.shape[1] // t
    index = index.reshape(rows, s, columns, t, channels).transpose(0, 2, 1, 3, 4)
    index = np.ascontiguousarray(index.reshape(rows, columns, s * t * channels))
    index.setflags(write=False)
    return index


READERS = dict.fromkeys(
    (*RESHAPING_LAYERS, *UPSAMPLING, _layers.RepeatVector, *OWN_LAYERS, padding.Padding2D),
    read,
)
RULES = {
    **dict.fromkeys(RESHAPING_LAYERS, _reshaping_rule),
    **dict.fromkeys(UPSAMPLING, _upsampling_rule),
    _layers.RepeatVector: _repeat_rule,
    **dict.fromkeys(OWN_LAYERS, _own_rule),
    padding.Padding2D: _padding_rule,
}
_MOVES = ("Transpose", "Reshape", "Squeeze", "ExpandDims", "GetItem")
BARE_READERS = dict.fromkeys(_MOVES, read)
BARE_RULES = dict.fromkeys(_MOVES, _bare_rule)
