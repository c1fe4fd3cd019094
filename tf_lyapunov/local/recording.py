"""What a proof file needs of a radius: the multipliers that prove it, in few bytes.

Any g gives a bound, so that rounding a share costs tightness alone, and little of it: those of
boxes are kept in 8 bits between two ends, those of margins in half precision. Where a record is
large, λ alone is kept of the boxes with the most shares: on a convolutional network of MNIST 250
against 1500 kB, for half a percent of the radius. Windows become units of the whole signal, one
block per place, as nothing but the place's own window takes part in its rows.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.local.relaxed import is_curved
from tf_lyapunov.local.windows import Windows

LEVELS, WEIGHTS, JOINT = 255, -2, -3
# Bytes of a record beyond which shares of boxes are left out.
LARGEST = 2**18
_LARGEST, _FAR, _MOST = 6e4, 2.0, 1e30


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """Multipliers of one step.

    Attributes:
        columns: int32 (m,), flat units.
        shares: float16 or float32 (rows, m); or uint8, from the first to the second of `ends` in
            equal steps.
        ends: float32 (2,), or None.
        logs: float32 (rows,), log λ.
    """

    columns: np.ndarray
    shares: np.ndarray
    ends: np.ndarray | None
    logs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Rows about one position.

    Attributes:
        source: position that the rows read.
        units: int32 (n,) that rows are the lower bounds of, then minus the upper ones; empty for
            the margins.
        steps: dict from positions of elementwise outputs to `Shares`.
        splits: tuple of `(position, unit, point)`; row b is the branch above the points of the
            splits whose bits are set in b.
        margin: number of the margin that is split, or -1; or `WEIGHTS`, where shares are halves of
            the logarithms of the weights of balls; or `JOINT`, for all margins by `forms`.
    """

    source: int
    units: np.ndarray
    steps: dict
    splits: tuple = ()
    margin: int = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Multipliers that prove a radius.

    Attributes:
        radius: float.
        unsplit: float, proved without the blocks of splits.
        blocks: tuple of `Block`.
    """

    radius: float
    unsplit: float
    blocks: tuple

    @property
    def nbytes(self):
        """Bytes held, about."""
        return sum(
            b.units.nbytes + sum(s.columns.nbytes + s.shares.nbytes + s.logs.nbytes + 200
                                 for s in b.steps.values())
            for b in self.blocks
        )  # fmt: skip


def record(flow, traced, answer, largest=None, are_exact=False):
    """`Record` of a `radii.Answer`, or None without a proof.

    Args:
        flow, traced: `Flow` and its `Trace` at the input.
        largest: bytes of shares of boxes that are kept, `LARGEST` unless given.
        are_exact: whether shares are kept in single precision.
    """
    if answer.multipliers is None:
        return None
    blocks = []
    for source, parts in sorted(answer.memory.boxes.items()):
        windows = Windows(flow, traced, source)
        for found in parts:
            if not any(m.share.size for m in found.multipliers.values()):
                continue
            if windows.applies:
                blocks += _placed(flow, traced, windows, found, are_exact)
            else:
                steps = _steps(flow, found.multipliers, slice(None), None, are_exact=are_exact)
                blocks.append(Block(source, found.units.astype(np.int32), steps))
    none = np.zeros(0, np.int32)
    steps = _steps(flow, answer.multipliers, slice(None), None, fine=True, are_exact=are_exact)
    blocks.append(Block(flow.output, none, steps))
    if answer.joint:
        steps = _steps(flow, answer.joint, slice(None), None, fine=True, are_exact=are_exact)
        blocks.append(Block(flow.output, none, steps, (), JOINT))
    weights = {
        k: Shares(np.asarray(columns, np.int32), *_coded(np.log(w)[None] / 2), np.zeros(1, "f4"))
        for k, (columns, w) in answer.memory.weights.items()
        if len(columns)
    }
    if weights:
        blocks.append(Block(flow.output, none, weights, (), WEIGHTS))
    for margin, branches in answer.splits.items():
        steps = _steps(flow, branches.multipliers, slice(None), None, fine=True)
        blocks.append(Block(flow.output, none, steps, branches.splits, margin))
    blocks = _fitting(blocks, LARGEST if largest is None else largest)
    return Record(answer.radius, answer.unsplit, tuple(blocks))


def _fitting(blocks, largest):
    """Blocks without the shares of boxes that would make them too large, the largest first."""
    sizes = {}
    for block in blocks:
        for k, held in block.steps.items() if len(block.units) else ():
            sizes[block.source, k] = sizes.get((block.source, k), 0) + held.shares.nbytes
    total, dropped = sum(sizes.values()), set()
    for key in sorted(sizes, key=sizes.get, reverse=True):
        if total <= largest:
            break
        total -= sizes[key]
        dropped.add(key)
    for block in blocks:
        steps = {
            k: _without_shares(held) if len(block.units) and (block.source, k) in dropped else held
            for k, held in block.steps.items()
        }
        yield dataclasses.replace(block, steps=steps)


def _without_shares(held):
    return dataclasses.replace(held, columns=held.columns[:0], shares=held.shares[:, :0])


def _steps(flow, multipliers, rows, places, fine=False, are_exact=False):
    """`Shares` by position, of some rows; `places` maps columns to units, -1 for none."""
    found = {}
    for k, m in multipliers.items():
        if is_curved(flow.links[k - 1].operation):
            continue  # the verifier knows none of them
        columns, share = m.columns, m.share[rows]
        if places is not None:
            units = places(k, columns)
            columns, share = units[units >= 0], share[:, units >= 0]
        if not share.size:
            continue
        share, ends = np.nan_to_num(share), None
        if are_exact:
            share = np.clip(share, -_MOST, _MOST).astype(np.float32)
        elif fine:
            share = np.clip(share, -_LARGEST, _LARGEST).astype(np.float16)
        else:
            share, ends = _coded(np.clip(share, -_FAR, 1 + _FAR))
        logs = np.nan_to_num(m.log_lam[rows].astype(np.float32), nan=-np.inf, posinf=0.0)
        found[k] = Shares(columns.astype(np.int32), share, ends, logs)
    return found


def _coded(values):
    """`(uint8, ends)`: equal steps between the least and the largest."""
    ends = np.array([values.min(), values.max()], np.float32)
    low, width = float(ends[0]), float(ends[1]) - float(ends[0])
    codes = np.rint((values - low) * (LEVELS / max(width, 1e-30)))
    return np.clip(codes, 0, LEVELS).astype(np.uint8), ends


def _placed(flow, traced, windows, found, are_exact):
    """Blocks of single places of a convolutional position."""
    shape = traced.shape(windows.source)
    spots = found.units // shape[-1]
    blocks = []
    for spot in np.unique(spots):
        mine = np.flatnonzero(spots == spot)
        rows = np.concatenate([mine, len(found.units) + mine])
        at = np.unravel_index(np.array([spot * shape[-1]]), shape)[:-1]

        def units(k, columns, at=at):
            whole = traced.shape(k)
            index, inside = windows.indices(k, at, whole)
            flat, inside = index.reshape(-1), inside.reshape(-1)
            cell, channel = np.divmod(columns, whole[-1])
            return np.where(inside[cell], flat[cell] * whole[-1] + channel, -1)

        def places(k, columns, units=units):
            if k not in windows.pools:
                return units(k - 1, columns)
            count = math.prod(windows.pools[k].sizes)
            window, cell = np.divmod(columns, count)
            window = units(k, window)
            return np.where(window >= 0, window * count + cell, -1)

        steps = _steps(flow, found.multipliers, rows, places, are_exact=are_exact)
        blocks.append(Block(windows.source, found.units[mine].astype(np.int32), steps))
    return blocks
