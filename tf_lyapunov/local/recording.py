"""What a proof file needs of a radius: the multipliers that prove it, in few bytes.

Shares are kept in 8 bits between the ends of their step's slopes: any g gives a bound, so that
rounding one costs tightness alone, and little of it. Windows become units of the whole signal, one
block per place, as nothing but the place's own window takes part in its rows.
"""

import dataclasses

import numpy as np

from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.windows import Windows
from tf_lyapunov.program.families.elementwise import Kinked

LEVELS = 255


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """Multipliers of one step.

    Attributes:
        columns: int32 (m,), flat units.
        shares: uint8 (rows, m), from `low` to `high` in equal steps.
        low, high: float.
        logs: float32 (rows,), log λ.
    """

    columns: np.ndarray
    shares: np.ndarray
    low: float
    high: float
    logs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Rows about one position.

    Attributes:
        source: position that the rows read.
        units: int32 (n,) that rows are the lower bounds of, then minus the upper ones; empty for
            the margins.
        steps: dict from positions of elementwise outputs to `Shares`.
    """

    source: int
    units: np.ndarray
    steps: dict


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Multipliers that prove a radius without splits of units.

    Attributes:
        radius: float.
        blocks: tuple of `Block`.
    """

    radius: float
    blocks: tuple

    @property
    def nbytes(self):
        """Bytes held, about."""
        return sum(
            b.units.nbytes + sum(s.columns.nbytes + s.shares.nbytes + s.logs.nbytes + 200
                                 for s in b.steps.values())
            for b in self.blocks
        )  # fmt: skip


def record(flow, traced, answer):
    """`Record` of a `radii.Answer`, or None without a proof.

    Args:
        flow, traced: `Flow` and its `Trace` at the input.
    """
    if answer.multipliers is None:
        return None
    blocks = []
    for source, parts in sorted(answer.boxes.items()):
        windows = Windows(flow, traced, source)
        for found in parts:
            if not any(m.share.size for m in found.multipliers.values()):
                continue
            if windows.applies:
                blocks += _placed(flow, traced, windows, found)
            else:
                steps = _steps(flow, found.multipliers, slice(None), None)
                blocks.append(Block(source, found.units.astype(np.int32), steps))
    none = np.zeros(0, np.int32)
    blocks.append(Block(flow.output, none, _steps(flow, answer.multipliers, slice(None), None)))
    return Record(answer.unsplit, tuple(blocks))


def _steps(flow, multipliers, rows, places):
    """`Shares` by position, of some rows; `places` maps columns to units, -1 for none."""
    found = {}
    for k, m in multipliers.items():
        columns, share = m.columns, m.share[rows]
        if places is not None:
            units = places(k, columns)
            columns, share = units[units >= 0], share[:, units >= 0]
        if not share.size:
            continue
        low, high = _ends(flow.links[k - 1].operation)
        levels = np.rint((share - low) * (LEVELS / max(high - low, 1e-300)))
        levels = np.clip(np.nan_to_num(levels), 0, LEVELS).astype(np.uint8)
        logs = np.nan_to_num(m.log_lam[rows].astype(np.float32), nan=-np.inf, posinf=0.0)
        found[k] = Shares(columns.astype(np.int32), levels, low, high, logs)
    return found


def _placed(flow, traced, windows, found):
    """Blocks of single places of a convolutional position."""
    shape = traced.shape(windows.source)
    spots = found.units // shape[-1]
    blocks = []
    for spot in np.unique(spots):
        mine = np.flatnonzero(spots == spot)
        rows = np.concatenate([mine, len(found.units) + mine])
        at = np.unravel_index(np.array([spot * shape[-1]]), shape)[:-1]

        def places(k, columns, at=at):
            whole = traced.shape(k - 1)
            index, inside = windows.indices(k - 1, at, whole)
            flat, inside = index.reshape(-1), inside.reshape(-1)
            cell, channel = np.divmod(columns, whole[-1])
            return np.where(inside[cell], flat[cell] * whole[-1] + channel, -1)

        steps = _steps(flow, found.multipliers, rows, places)
        blocks.append(Block(windows.source, found.units[mine].astype(np.int32), steps))
    return blocks


def _ends(operation):
    """Least and largest share worth keeping."""
    if isinstance(operation, Kinked):
        return float(min(1.0, operation.slopes.min())), float(max(1.0, operation.slopes.max()))
    if has_pieces(operation):
        return float(operation.sector.alpha), float(operation.sector.beta)
    return 0.0, 1.0
