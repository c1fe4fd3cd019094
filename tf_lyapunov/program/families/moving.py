"""Layers and operations that move, repeat, drop or pad entries: read by running them on positions.

What such a layer does to a sample does not depend on its values, so its own result on the numbers
of the positions says where every entry comes from.
"""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import resizing
from tf_lyapunov.program.gains import RESHAPING_LAYERS
from tf_lyapunov.program.graph import Tensor
from tf_lyapunov.program.operation import Operation, with_error
from tf_lyapunov.program.pooling import UPSAMPLING

# Above it neighbours coincide in float32.
_LARGEST = 2**24


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

    def _moved(self, x):
        flat = x.reshape(len(x), -1)
        padded = np.concatenate([np.zeros((len(x), 1)), flat], axis=1)
        return padded[:, self.index.ravel()].reshape(len(x), *self.index.shape)


def read(call):
    """The index map of a call, from its result on positions."""
    tensor, operation = call.inputs[0], call.operation
    if tensor.size is None or tensor.size >= _LARGEST:
        raise UnsupportedLayerError(
            f"Moving entries is followed up to {_LARGEST} of them. Received: layer "
            f"{operation.name!r} on shape {tensor.shape}."
        )
    positions = np.arange(1, tensor.size + 1).reshape(1, *tensor.shape[1:])
    # In a sample of its own, and beside one of zeros, which must stay zeros.
    batch = np.concatenate([positions, np.zeros_like(positions)]).astype("float32")
    given = keras.ops.convert_to_tensor(batch)

    def fill(a):
        return given if isinstance(a, Tensor) else a

    args, kwargs = keras.tree.map_structure(fill, (call.args, call.kwargs))
    layer = operation
    if isinstance(layer, keras.Layer) and layer.compute_dtype != "float32":
        layer = type(layer).from_config({**layer.get_config(), "dtype": "float32"})
    moved = np.asarray(keras.ops.convert_to_numpy(layer(*args, **kwargs)))
    index = np.rint(moved).astype(np.int64)
    size = math.prod(moved.shape[1:])
    faithful = len(moved) == 2 and not np.any(moved[1]) and np.array_equal(index, moved)
    if not faithful or index.min(initial=0) < 0 or index.max(initial=0) > tensor.size or not size:
        raise UnsupportedLayerError(
            "A layer that moves entries must keep samples apart and entries as they are. Received: "
            f"layer {operation.name!r} of type {type(operation).__name__}."
        )
    index = index[0]
    index.setflags(write=False)
    return [Moved(index)]


READERS = dict.fromkeys(
    (
        *RESHAPING_LAYERS,
        *UPSAMPLING,
        keras.layers.RepeatVector,
        resizing.InvertibleDownSampling,
        resizing.InvertibleUpSampling,
        resizing.ChannelPadding,
        resizing.Truncate,
    ),
    read,
)
OPERATIONS = dict.fromkeys(("Transpose", "Reshape", "Squeeze", "ExpandDims", "GetItem"), read)
