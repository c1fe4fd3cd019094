"""The parts of a region that splits of hidden units prove, with the slopes that prove them."""

import dataclasses

import numpy as np

from tf_lyapunov.local.relaxation import Elementwise

# Numbers of slopes that are kept for a proof file.
_LARGEST = 2**24
# Slopes are kept where they differ from those of lines by this share of the largest.
_SMALL = 1e-7


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What proves that one part misses an unsafe set.

    Attributes:
        weights: float64 (rows of the set,) ≥ 0; the bound is of their combination of rows.
        slopes: dict from positions to `(columns, values, log λ)`: of activations g itself, of
            maxima shares, float32.
    """

    weights: np.ndarray
    slopes: dict


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A part that is proved.

    Attributes:
        number: of the unsafe set.
        path: `(path of the part before, position, unit, point, is_above)`, or None for all.
        evidence: `Evidence`, or None where no input reaches the part.
    """

    number: int
    path: tuple | None
    evidence: Evidence | None

    def splits(self):
        """List of `(position, unit, point, is_above)`, the first split first."""
        found, path = [], self.path
        while path is not None:
            found.append(path[1:])
            path = path[0]
        return found[::-1]


class Partition:
    """Leaves of a tree as they are proved.

    Args:
        is_renewed: whether boxes of hidden units are bounded anew on every part.

    Attributes:
        leaves: list of `Leaf`, or None where their slopes are too many for a file.
    """

    def __init__(self, is_renewed):
        self.is_renewed, self.leaves, self._held = is_renewed, [], 0

    def add(self, branch):
        """Takes in a branch that is proved."""
        if self.leaves is None:
            return
        evidence = branch.evidence
        if evidence is not None:
            self._held += sum(len(values) for _, values, _ in evidence.slopes.values())
        self.leaves.append(Leaf(branch.number, branch.path, evidence))
        if self._held > _LARGEST or len(self.leaves) > _LARGEST // 8:
            self.leaves = None

    def evidence(self, weights, memory, multipliers, row, steps):
        """`Evidence` of one row of a recorded pass, or None where nothing is kept any more.

        Args:
            weights: of the set's rows.
            memory: dict of the pass's memory.
            multipliers: dict of `Multipliers` that it used.
            row: int.
            steps: dict of relaxed steps by position, the branch's own where it has any.
        """
        if self.leaves is None:
            return None
        slopes = {}
        for k, m in multipliers.items():
            own, step = memory.get(k), steps[k]
            if own is None or not m.share.shape[1]:
                continue
            columns, values = m.columns, m.share[row]
            if isinstance(step, Elementwise):
                values, columns = _slopes(step, own, m, row)
            if len(columns):
                slopes[k] = (
                    columns.astype(np.int32), values.astype(np.float32), float(m.log_lam[row])
                )  # fmt: skip
        return Evidence(weights, slopes)


def _slopes(step, own, m, row):
    """`(g, columns)` of units that are not lines on the part, or whose g is not the line's."""
    c = own[0][row]
    g = m.share[row] * c
    if m.shift is not None:
        g = g + m.shift[row]
    p = step.pieces
    slope, error = (v[:, min(row, v.shape[1] - 1)] for v in (p.slope, p.error))
    shift = p.intercept[:, min(row, p.intercept.shape[1] - 1)]
    is_line = (np.ptp(slope, axis=0) == 0) & (np.ptp(shift, axis=0) == 0) & ~np.any(error, axis=0)
    near = np.abs(g - slope[0] * c) <= _SMALL * np.abs(c).max(initial=0.0)
    kept = ~(is_line & near)
    return g[kept], m.columns[kept]
