"""Multipliers of bounds around inputs in a proof file: five arrays of numbers, read in order.

`layout` says, input by input, how many numbers of the others belong together:

    groups, then for each group: target, units, rows, parts, and for each part: step, columns.

A group is about functionals of the signal of step `target`: of single units and their negatives
(rows = 2·units), or, for the logits, of the margins (units = 0). A part holds the multipliers of
one step before it: the units that they are about (`units`, after those of the group itself), a
share of each row and unit in 8 bits between the ends of the step's slopes (`shares`), and log λ of
each row (`logs`). Every one of these numbers is arbitrary: others give other bounds.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.around.relaxation import Multipliers
from tf_lyapunov.verification.operations import Activation

ARRAYS = {"inputs": "i8", "layout": "i8", "units": "i4", "shares": "u1", "logs": "f4"}
LEVELS = 255
_LARGEST_LOG = 200.0


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Multipliers of one step as a file holds them.

    Attributes:
        step: number of the step in the network's order.
        columns: int32 (m,), flat units.
        shares: uint8 (rows, m).
        logs: float32 (rows,).
    """

    step: int
    columns: np.ndarray
    shares: np.ndarray
    logs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A group as a file holds it.

    Attributes:
        target: number of a step.
        units: int32 (n,), empty for margins.
        rows: int, of every part.
        parts: tuple of `Part`.
    """

    target: int
    units: np.ndarray
    rows: int
    parts: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units of one signal, with the multipliers of their lower bounds and of minus the upper ones.

    Attributes:
        units: int (n,), flat.
        multipliers: dict from names of steps to `Multipliers` of 2n rows, or of the margins' rows.
    """

    units: np.ndarray
    multipliers: dict

    def of(self, part):
        """Multipliers of a slice of the units."""
        count = len(self.units)
        rows = np.r_[np.arange(count)[part], count + np.arange(count)[part]]
        return {
            name: Multipliers(m.columns, m.shares[rows], m.lam[rows])
            for name, m in self.multipliers.items()
        }


def pack(pieces):
    """Arrays of `unpack`.

    Args:
        pieces: dict from numbers of inputs, increasing, to lists of `Piece`.
    """
    layout, units, shares, logs = [], [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], []
    for groups in pieces.values():
        layout.append(len(groups))
        for group in groups:
            layout += [group.target, len(group.units), group.rows, len(group.parts)]
            units.append(group.units)
            for part in group.parts:
                layout += [part.step, len(part.columns)]
                units.append(part.columns)
                shares.append(part.shares.reshape(-1))
                logs.append(part.logs)
    return {
        "inputs": np.array(list(pieces), dtype=np.int64),
        "layout": np.array(layout, dtype=np.int64),
        "units": np.concatenate(units).astype(np.int32),
        "shares": np.concatenate(shares).astype(np.uint8),
        "logs": np.concatenate([np.zeros(0, np.float32), *logs]).astype(np.float32),
    }


class _Stream:
    def __init__(self, array):
        self.array, self.place = array, 0

    def take(self, count):
        if not 0 <= count <= len(self.array) - self.place:
            raise ValueError("the multipliers around an input end too early")
        self.place += count
        return self.array[self.place - count : self.place]

    def number(self):
        return int(self.take(1)[0])


def unpack(arrays, count):
    """Dict from numbers of inputs to lists of `Piece`.

    Args:
        arrays: dict with the names of `ARRAYS`.
        count: number of inputs of the file.

    Raises:
        KeyError, ValueError: if an array is missing, of another type, too short or too long.
    """
    for name, kind in ARRAYS.items():
        if arrays[name].dtype.str[1:] != kind or arrays[name].ndim != 1:
            raise ValueError(f"{name} around the inputs has another shape or type")
    inputs = arrays["inputs"]
    if np.any(inputs < 0) or np.any(inputs >= count) or np.any(np.diff(inputs) <= 0):
        raise ValueError("the inputs with multipliers are not those of the file, in order")
    if np.any(np.isnan(arrays["logs"])):
        raise ValueError("a multiplier is NaN")
    streams = {name: _Stream(arrays[name]) for name in ARRAYS if name != "inputs"}
    found = {}
    for number in inputs:
        groups = _repeated(streams["layout"])
        found[int(number)] = [_group(streams) for _ in range(groups)]
    for name, stream in streams.items():
        if stream.place != len(stream.array):
            raise ValueError(f"{name} around the inputs holds more than is laid out")
    return found


def _repeated(stream):
    """A number of things, each of which takes at least one more number."""
    count = stream.number()
    if not 0 <= count <= len(stream.array) - stream.place:
        raise ValueError("the layout of multipliers around an input does not fit")
    return count


def _group(streams):
    layout = streams["layout"]
    target, size, rows = layout.number(), layout.number(), layout.number()
    parts = _repeated(layout)
    units = streams["units"].take(size)
    if rows < 0 or rows > 2**31 or (size and rows != 2 * size):
        raise ValueError("a group of units does not have two rows for each")
    held = []
    for _ in range(parts):
        step, width = layout.number(), layout.number()
        columns = streams["units"].take(width)
        shares = streams["shares"].take(rows * width).reshape(rows, width)
        held.append(Part(step, columns, shares, streams["logs"].take(rows)))
    return Piece(target, units, rows, tuple(held))


def read(network, pieces, margins):
    """`(groups, multipliers of the margins)` for `Surroundings`.

    Args:
        network: `network.Network`.
        pieces: list of `Piece` of one input.
        margins: number of margins.

    Raises:
        ValueError: if a step or a unit is not the network's, or one is there twice.
    """
    names = [step.name for step in network.steps]
    groups, last = {}, None
    for piece in pieces:
        step = _step(network, piece.target)
        _check_units(piece.units, step.shape)
        multipliers = {}
        for part in piece.parts:
            reads = _step(network, part.step)
            name = names[part.step]
            if name in multipliers or part.step > piece.target:
                raise ValueError("the multipliers of a step are there twice, or too late")
            _check_units(part.columns, reads.shape)
            multipliers[name] = decoded(part, reads)
        if len(piece.units):
            groups.setdefault(step.name, []).append(Group(piece.units, multipliers))
        elif step.name != network.logits or piece.rows != margins or last is not None:
            raise ValueError("the multipliers of the margins do not fit, or are there twice")
        else:
            last = multipliers
    return groups, last or {}


def _step(network, number):
    if not 0 < number < len(network.steps):
        raise ValueError(f"there is no step {number}")
    return network.steps[number]


def _check_units(units, shape):
    size = int(np.prod(shape))
    if np.any(units < 0) or np.any(units >= size) or len(np.unique(units)) != len(units):
        raise ValueError("a unit is not in its signal, or is there twice")


def decoded(part, step):
    """`Multipliers` of a part, for the step that it is about."""
    low, high = ends(step.operation)
    shares = low + (high - low) * (part.shares / LEVELS)
    with np.errstate(over="ignore"):
        lam = np.exp(np.minimum(part.logs.astype(np.float64), _LARGEST_LOG))
    return Multipliers(part.columns, shares, lam)


def ends(operation):
    """Least and largest share that 8 bits can say: slopes of an activation, 0 and 1 of a maximum."""
    return operation.slopes() if isinstance(operation, Activation) else (0.0, 1.0)
