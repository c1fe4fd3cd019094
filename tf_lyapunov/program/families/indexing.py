"""Operations that place entries by an index: flips, rolls, padding, splits, copies and selections.

Each is y[i] = x[index[i]] or a constant; its matrix W has one 1 in a row at most, so that WᵀW is
diagonal with the number of times that each entry is used: the gain is √(largest number), attained.
"""

import dataclasses

import keras
import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.moving import checked_read, index_gain
from tf_lyapunov.program.gain import Affine, Gain
from tf_lyapunov.program.operation import Operation, Signal
from tf_lyapunov.program.refusal import refuse

_MIXES = "it mixes samples along the batch axis"
# Each entry is used once at most, whatever the sizes are.
_ONCE = ("Flip", "Fliplr", "Roll", "Swapaxes", "Moveaxis", "Rot90", "Tril", "Triu")
_OTHERS = (
    *("Repeat", "Tile", "BroadcastTo", "Take", "TakeAlongAxis", "Diagonal", "Slice", "Ravel"),
    *("DepthToSpace", "SpaceToDepth", "CropImages", "PadImages", "Rearrange"),
    *("Unfold", "ExtractPatches", "ExtractSequences"),
)
# Operations with several outputs, each of which is one `wrapping.Part`.
_SPLITS = ("Split", "ArraySplit", "Unstack", "Hsplit", "Vsplit", "Dsplit")


@dataclasses.dataclass(frozen=True)
class Filled(Operation):
    """y = x + fill where `mask` is 1, which are the padded cells.

    Attributes:
        mask: float64 of the shape of a sample, 1 in padded cells and 0 elsewhere.
        fill: float.
    """

    mask: np.ndarray
    fill: float

    def forward(self, signals, precision):
        (signal,) = signals
        value, cells = signal.value + self.mask * self.fill, self.mask * abs(self.fill)
        if signal.error is None:
            return Signal(value)
        return Signal(value, signal.error + precision.unit * cells + precision.tiny * self.mask)

    def write(self, graph, names):
        return graph.pointwise("Add", *names, self.mask * self.fill)


def _gain(call, found, method):
    value = index_gain(found.index)
    return Gain("reshape", value, method, Affine(value))


def _rule(call):
    kind, tensor = type(call.operation).__name__, call.inputs[0]
    if kind in _ONCE and None in tensor.shape[1:] and not _touches_batch(call):
        return Gain("reshape", 1.0, "moves or drops entries")
    return _gain(call, checked_read(call), "√(times that an entry is used)")


def _touches_batch(call):
    """Whether an operation's axes, as far as they are stated, include the batch axis."""
    rank = len(call.inputs[0].shape)
    values = vars(call.operation)
    axes = [values[k] for k in ("axis", "axis1", "axis2", "source", "destination", "axes")
            if k in values]  # fmt: skip
    if not axes or any(a is None for a in axes):
        return type(call.operation).__name__ not in ("Tril", "Triu") or rank < 3
    return any(a % rank == 0 for a in keras.tree.flatten(axes))


def _roll_rule(call):
    # A roll by the number of samples tried would look like none.
    if _touches_batch(call):
        refuse(call.operation, _MIXES)
    return _rule(call)


def _read(call):
    return [checked_read(call)]


# Padding ----------------------------------------------------------------------------------------


def _padding(call):
    """`(call with zeros, constant)` of a `pad`."""
    constant = call.kwargs.get("constant_values")
    if constant is None and len(call.args) > 1:
        constant = call.args[1]
    tensor = call.inputs[0]
    zeros = dataclasses.replace(call, args=(tensor,), kwargs={})
    if constant is None:
        return zeros, 0.0
    value = np.asarray(keras.ops.convert_to_numpy(constant), np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        refuse(call.operation, "its constant must be one finite number")
    return zeros, float(value.reshape(()))


def _pad_rule(call):
    zeros, constant = _padding(call)
    operation, tensor = call.operation, call.inputs[0]
    mode = getattr(operation, "mode", "constant")
    if None in tensor.shape[1:] and mode == "constant" and constant == 0:
        widths = np.asarray(operation.pad_width)
        if widths.ndim == 2 and len(widths) == len(tensor.shape) and not np.any(widths[0]):
            return Gain("reshape", 1.0, "pads by zeros")
    found = checked_read(zeros)
    gain = _gain(call, found, f"pads by mode {mode!r}, times that an entry is used")
    cells = int(np.sum(found.index == 0)) * tensor.copies
    offset = rounding.product_up(abs(constant), rounding.sqrt_up(cells))
    unit = rounding.unit_roundoff(call.outputs[0].dtype)
    affine = Affine(gain.value, offset, 0.0, rounding.product_up(unit, offset))
    return dataclasses.replace(gain, affine=affine)


def _read_pad(call):
    zeros, constant = _padding(call)
    found = checked_read(zeros)
    if constant == 0:
        return [found]
    mask = np.asarray(found.index == 0, np.float64)
    mask.setflags(write=False)
    return [found, Filled(mask, constant)]


# Splits and time steps --------------------------------------------------------------------------


def _part_rule(call):
    kind, operation = type(call.operation.operation).__name__, call.operation.operation
    if kind not in _SPLITS:
        refuse(call.operation)
    tensor, rank = call.inputs[0], len(call.inputs[0].shape)
    axis = getattr(operation, "axis", None)
    if len(call.inputs) == 1 and None in tensor.shape[1:] and axis is not None and axis % rank:
        return Gain("reshape", 1.0, "one part of a split")
    return _gain(call, checked_read(call), "one part of a split")


@dataclasses.dataclass(frozen=True)
class Stepped(Operation):
    """(n, steps, …) to (n·steps, …), or back if `steps` is the size of an axis to be made.

    Attributes:
        steps: number of steps, or None where they go into the batch axis.
        shape: of a step.
    """

    steps: int | None
    shape: tuple

    def forward(self, signals, precision):
        (signal,) = signals
        lead = (-1,) if self.steps is None else (-1, self.steps)

        def moved(array):
            return None if array is None else array.reshape(*lead, *array.shape[1 + self._drop :])

        return Signal(moved(signal.value), moved(signal.error))

    def write(self, graph, names):
        (x,) = names
        lead = (-1,) if self.steps is None else (-1, self.steps)
        return graph.node("Reshape", x, (*lead, *graph.sizes(x)[self._drop :]))

    @property
    def _drop(self):
        return 1 if self.steps is None else 0


def _steps_rule(call):
    return Gain("reshape", 1.0, "time steps as samples")


def _read_folded(call):
    return [Stepped(None, call.operation.shape)]


def _read_unfolded(call):
    return [Stepped(call.operation.steps, call.operation.shape)]


# Identities -------------------------------------------------------------------------------------


def _same_rule(call):
    if call.inputs[0].dtype != call.outputs[0].dtype or len(call.inputs) != 1:
        refuse(call.operation, "it changes the type of numbers")
    return Gain("identity", 1.0, "identity")


def _nothing(call):
    return []


_SAME = ("Copy", "ConvertToTensor", "Array")
_MOVES = (*_ONCE, *_OTHERS)
BARE_READERS = {
    **dict.fromkeys(_MOVES, _read),
    "Pad": _read_pad,
    "Part": _read,
    "Folded": _read_folded,
    "Unfolded": _read_unfolded,
    **dict.fromkeys(_SAME, _nothing),
}
BARE_RULES = {
    **dict.fromkeys(_MOVES, _rule),
    "Roll": _roll_rule,
    "Pad": _pad_rule,
    "Part": _part_rule,
    **dict.fromkeys(("Folded", "Unfolded"), _steps_rule),
    **dict.fromkeys(_SAME, _same_rule),
}
