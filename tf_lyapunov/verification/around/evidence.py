"""Multipliers of bounds around inputs in a proof file: five arrays of numbers, read in order.

`layout` says, input by input, how many numbers of the others belong together:

    groups, then for each group: target, units, rows, splits, margin, parts,
        for each split: step, and for each part: step, columns, bytes.

A group is about functionals of the signal of step `target`: of single units and their negatives
(rows = 2·units), of all margins of the logits (units = 0, margin = -1), of these with balls and
input as one problem (`joint`, margin = -3), or of one margin on the branches of splits (rows =
2^splits); or it holds the weights of the balls that these use (margin = -2, one row of logarithms
of their roots in place of shares). A split divides the region
by whether a unit (in `units`) lies below or above a point (in `numbers`); row b is the branch that
lies above in the splits whose bits are set in b. A part holds multipliers of one step: its units
(of maxima, cells of windows, window by window; `units`), then for each row and unit a share in
`bytes` bytes (`shares`): float16, float32, or 8 bits between two ends (in `numbers`); then log λ of
each row (`numbers`). Every one of these numbers is arbitrary: others give other bounds.
"""

import dataclasses

import numpy as np

from tf_lyapunov.verification.around.maxima import cells_of
from tf_lyapunov.verification.around.relaxation import Multipliers, of_rows
from tf_lyapunov.verification.operations import Activation, GlobalPooling, MaxPooling

ARRAYS = {"inputs": "i8", "layout": "i8", "units": "i4", "shares": "u1", "numbers": "f4"}
LEVELS = 255
# In place of a margin: weights of balls, and all margins by `joint`; and the largest logarithm of
# weights' roots.
WEIGHTS, JOINT, _LARGEST_ROOT = -2, -3, 10.0
_LARGEST_LOG, _LARGEST_SPLITS = 200.0, 10


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Multipliers of one step as a file holds them.

    Attributes:
        step: number of the step in the network's order.
        columns: int32 (m,), flat units.
        shares: float16 or float32 (rows, m); or uint8, from the first to the second of `ends`.
        ends: float32 (2,), or None.
        logs: float32 (rows,).
    """

    step: int
    columns: np.ndarray
    shares: np.ndarray
    ends: np.ndarray | None
    logs: np.ndarray

    def multipliers(self):
        """`Multipliers` of the step."""
        shares = self.shares.astype(np.float64)
        if self.ends is not None:
            low, high = self.ends.astype(np.float64)
            shares = low + (high - low) * (shares / LEVELS)
        return Multipliers(self.columns, shares, lam_of(self.logs))


def lam_of(logs):
    """λ of their logarithms."""
    return np.exp(np.minimum(logs.astype(np.float64), _LARGEST_LOG))


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A group as a file holds it.

    Attributes:
        target: number of a step.
        units: int32 (n,), empty for margins.
        rows: int, of every part.
        parts: tuple of `Part`.
        splits: tuple of `(number of a step, unit, point)`.
        margin: number of the margin that is split, or -1, or `WEIGHTS` or `JOINT`.
    """

    target: int
    units: np.ndarray
    rows: int
    parts: tuple
    splits: tuple = ()
    margin: int = -1


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
        return of_rows(self.multipliers, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """One margin on the branches of splits.

    Attributes:
        splits: tuple of `(name of a relaxed step, unit, point)`.
        multipliers: dict from names of steps to `Multipliers` of one row per branch.
    """

    splits: tuple
    multipliers: dict

    def of(self, branch):
        """`(halves, multipliers)` of one branch: dict from steps to `[(unit, point, is above)]`."""
        halves = {}
        for bit, (name, unit, point) in enumerate(self.splits):
            halves.setdefault(name, []).append((unit, point, bool(branch >> bit & 1)))
        return halves, of_rows(self.multipliers, slice(branch, branch + 1))


def pack(pieces):
    """Arrays of `unpack`.

    Args:
        pieces: dict from numbers of inputs, increasing, to lists of `Piece`.
    """
    layout, units, shares, numbers = [], [[]], [np.zeros(0, np.uint8)], [[]]
    for groups in pieces.values():
        layout.append(len(groups))
        for group in groups:
            layout += [group.target, len(group.units), group.rows, len(group.splits)]
            layout += [group.margin, len(group.parts)]
            units.append(group.units)
            for step, unit, point in group.splits:
                layout.append(step)
                units.append([unit])
                numbers.append([point])
            for part in group.parts:
                layout += [part.step, len(part.columns), part.shares.itemsize]
                units.append(part.columns)
                if part.ends is not None:
                    numbers.append(part.ends)
                numbers.append(part.logs)
                shares.append(np.ascontiguousarray(part.shares).reshape(-1).view(np.uint8))
    return {
        "inputs": np.array(list(pieces), dtype=np.int64),
        "layout": np.array(layout, dtype=np.int64),
        "units": np.concatenate(units).astype(np.int32),
        "shares": np.concatenate(shares),
        "numbers": np.concatenate(numbers).astype(np.float32),
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
    if np.any(np.isnan(arrays["numbers"])):
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
    layout, units, numbers = (streams[name] for name in ("layout", "units", "numbers"))
    target, size, rows = layout.number(), layout.number(), layout.number()
    splits, margin, parts = layout.number(), layout.number(), layout.number()
    if not 0 <= rows <= 2**31 or (size and rows != 2 * size):
        raise ValueError("a group of units does not have two rows for each")
    if not 0 <= splits <= _LARGEST_SPLITS or (splits and (size or rows != 2**splits)):
        raise ValueError("a group of branches does not have two rows for each split")
    if not 0 <= parts <= len(layout.array):
        raise ValueError("the layout of multipliers around an input does not fit")
    own = units.take(size)
    divided = []
    for _ in range(splits):
        step, unit, point = layout.number(), units.number(), float(numbers.take(1)[0])
        if not np.isfinite(point):
            raise ValueError("a unit is split at infinity")
        divided.append((step, unit, point))
    held = [_part(streams, rows) for _ in range(parts)]
    return Piece(target, own, rows, tuple(held), tuple(divided), margin)


def _part(streams, rows):
    layout, numbers = streams["layout"], streams["numbers"]
    step, width, size = layout.number(), layout.number(), layout.number()
    if size not in (1, 2, 4):
        raise ValueError("a share has neither one byte nor two nor four")
    columns = streams["units"].take(width)
    ends = numbers.take(2) if size == 1 else None
    shares = streams["shares"].take(rows * width * size)
    if size > 1:
        shares = np.frombuffer(shares.tobytes(), dtype=f"<f{size}")
    if not np.all(np.isfinite(shares)) or (ends is not None and not np.all(np.isfinite(ends))):
        raise ValueError("a share is no finite number")
    return Part(step, columns, shares.reshape(rows, width), ends, numbers.take(rows))


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What `Piece`s say of one input.

    Attributes:
        groups: dict from names of steps to lists of `Group`.
        last: multipliers of all margins, by names of steps.
        branches: dict from numbers of margins to `Branches`.
        weights: what `Surroundings.weigh` takes.
        joint: multipliers of all margins for `joint`; empty where there are none.
    """

    groups: dict
    last: dict
    branches: dict
    weights: dict
    joint: dict


def read(network, pieces, margins):
    """`Given`, from the `Piece`s of one input.

    Args:
        network: `network.Network`.
        pieces: list of `Piece`.
        margins: number of margins.

    Raises:
        ValueError: if a step or a unit is not the network's, or one is there twice.
    """
    groups, wholes, branches, weights = {}, {}, {}, None
    for piece in pieces:
        step = _step(network, piece.target)
        check_units(piece.units, step.shape)
        multipliers = {}
        for part in piece.parts:
            reads = _step(network, part.step)
            if reads.name in multipliers:
                raise ValueError("the multipliers of a step are there twice")
            check_units(part.columns, shared(reads))
            multipliers[reads.name] = part.multipliers()
        if len(piece.units):
            groups.setdefault(step.name, []).append(Group(piece.units, multipliers))
            continue
        if step.name != network.logits:
            raise ValueError("the multipliers of the margins are not about the logits")
        if piece.margin == WEIGHTS:
            if weights is not None or piece.splits or piece.rows != 1:
                raise ValueError("the weights of balls do not fit, or are there twice")
            weights = {}
            for part in piece.parts:
                name = _activation(network, part.step).name
                roots = multipliers[name].shares[0]
                roots = np.exp(np.clip(roots, -_LARGEST_ROOT, _LARGEST_ROOT))
                weights[name] = part.columns, roots
        elif piece.splits:
            splits = []
            for number, unit, point in piece.splits:
                if number >= piece.target:
                    raise ValueError("a step is split that lies behind the logits")
                (source,) = _activation(network, number).inputs
                check_units(np.array([unit]), network[source].shape)
                splits.append((network.steps[number].name, unit, point))
            if not 0 <= piece.margin < margins or piece.margin in branches:
                raise ValueError("a margin that is split is none of the logits', or there twice")
            branches[piece.margin] = Branches(tuple(splits), multipliers)
        elif piece.margin not in (-1, JOINT) or piece.margin in wholes or piece.rows != margins:
            raise ValueError("the multipliers of the margins do not fit, or are there twice")
        else:
            wholes[piece.margin] = multipliers
    return Given(groups, wholes.get(-1, {}), branches, weights or {}, wholes.get(JOINT, {}))


def _step(network, number):
    if not 0 < number < len(network.steps):
        raise ValueError(f"there is no step {number}")
    return network.steps[number]


def _activation(network, number):
    step = _step(network, number)
    if not isinstance(step.operation, Activation):
        raise ValueError(f"step {number} is no activation, whose units could be split or weighed")
    return step


def shared(step):
    """Shape of what shares are of: units of the signal, or cells of windows."""
    if isinstance(step.operation, (MaxPooling, GlobalPooling)):
        return (cells_of(step.operation, step.shape),)
    return step.shape


def check_units(units, shape):
    """Refuses units that are not in a signal of a shape, or there twice."""
    size = int(np.prod(shape))
    if np.any(units < 0) or np.any(units >= size) or len(np.unique(units)) != len(units):
        raise ValueError("a unit is not in its signal, or is there twice")
