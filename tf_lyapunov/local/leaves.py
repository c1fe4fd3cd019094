"""Branches on which a piecewise linear flow is affine: its rows' minimum there by a linear program.

With every unit on one piece, y(x) and the inputs z(x) of the activations are affine, and a set
{A y ≤ b} is missed on the branch if

    τ* = min { τ : A y(x) - b ≤ τ, low ≤ x ≤ high, p ≤ z(x) ≤ q } > 0

for the boxes [p, q] of its units. The program's dual values w of the rows and β of the units are
multipliers of a backward pass with the row wᵀA, g = slope·c + β, whose bound is τ* up to rounding;
that pass, not the solver, is the proof. Where the branch is empty the units' bounds are softened
by a penalty, so that duals exist.
"""

import time

import numpy as np
from scipy.optimize import linprog

from tf_lyapunov.local import maps
from tf_lyapunov.local.around import OutOfTime
from tf_lyapunov.local.flow import Whole
from tf_lyapunov.local.lines import breaks_of, lines_of
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.relaxation import Multipliers

# Penalties of units beyond their boxes, relative to the size of the rows' slopes.
_PENALTIES = (1e3, 1e6)
# Entries of the program's matrix at most.
_MOST = 2**22


class Leaves:
    """Affine branches of one flow around one region.

    Args:
        around: `Around` of the whole region.
        columns: dict from positions to the units that may be split there.
    """

    def __init__(self, around, columns):
        self.around, self.columns = around, columns
        links = around.flow.links
        self.applies = np.isinf(min(around.region.radius, around.region.radius_l1)) and all(
            not isinstance(link.operation, Whole)
            and (
                maps.is_linear(link.operation)
                or (has_pieces(link.operation) and breaks_of(link.operation) is not None)
            )
            for link in links
        )
        size = around.values[0].size
        self.applies &= size * (1 + sum(len(c) for c in columns.values())) < _MOST

    def solve(self, rows, bounds, low, high, split):
        """Weights of rows, multipliers and a minimiser, one triple per penalty.

        Args:
            rows, bounds: float64 (m, outputs) A and (m,) b.
            low, high: float64 (inputs,), the branch's box of the input.
            split: dict from positions to `Elementwise` of the branch's boxes, one row each.

        Yields:
            `(weights, multipliers, x)`: (m,), dict by position of one row, and (inputs,).
        """
        around = self.around
        outputs, units = self._affine(low, high, split)
        matrix, shift = outputs[1] @ rows.T, outputs[0] @ rows.T - bounds
        size = float(np.abs(matrix).max(initial=0.0)) + float(np.abs(shift).max()) + 1e-30
        found = self._constraints(units)
        left, right, owners = found
        n, m, k = len(low), len(rows), len(right)
        for penalty in _PENALTIES:
            # Variables: x - low, τ, and one excess for each bound of a unit.
            cost = np.concatenate([np.zeros(n), [1.0], np.full(k, penalty * size)])
            upper = np.zeros((m + k, n + 1 + k))
            upper[:m, :n], upper[:m, n] = matrix.T, -1.0
            upper[m:, :n] = left
            upper[m + np.arange(k), n + 1 + np.arange(k)] = -1.0
            limits = [(0.0, float(w)) for w in high - low] + [(None, None)] + [(0.0, None)] * k
            seconds = around.deadline - time.monotonic()
            if seconds <= 0:
                raise OutOfTime
            answer = linprog(
                cost, upper, np.concatenate([-shift, right]), bounds=limits, method="highs",
                options={"time_limit": seconds},
            )  # fmt: skip
            if answer.status != 0:
                return
            dual = np.maximum(-answer.ineqlin.marginals, 0.0)
            weights = dual[:m] / max(float(dual[:m].sum()), 1e-30)
            yield weights, self._multipliers(split, owners, dual[m:]), low + answer.x[:n]

    def _affine(self, low, high, split):
        """`(constant, matrix)` of the outputs, and of the units' inputs by position, from `low`."""
        around = self.around
        n = len(low)
        points = np.concatenate([np.zeros((1, n)), np.eye(n)]) + low
        values = [points.reshape(-1, *around.values[0].shape[1:])]
        units = {}
        for k, link in enumerate(around.flow.links, 1):
            read = [values[i] for i in link.inputs]
            if has_pieces(link.operation):
                step = split.get(k) or around.steps[k]
                z = read[0].reshape(n + 1, -1)
                lines = lines_of(link.operation, step.low[:1], step.high[:1], step.shape)
                y = z * lines.high_slope[0] + lines.high_shift[0]
                values.append(y.reshape(values[link.inputs[0]].shape))
                if k in self.columns:
                    units[k] = _parts(z[:, self.columns[k]]), step, lines.high_slope[0]
            else:
                values.append(maps.applied(link.operation, read))
        self._units = units
        return _parts(values[-1].reshape(n + 1, -1)), units

    def _constraints(self, units):
        """`(left, right, owners)`: left·(x - low) ≤ right for every end of a split unit's box."""
        left, right, owners = [], [], []
        for k, ((constant, matrix), step, _) in units.items():
            columns, whole = self.columns[k], self.around.steps[k]
            for sign, ends, old in (
                (1.0, step.high[0, columns], whole.high[0, columns]),
                (-1.0, step.low[0, columns], whole.low[0, columns]),
            ):
                used = np.flatnonzero(ends != old)
                left.append(sign * matrix[:, used].T)
                right.append(sign * (ends - constant)[used])
                owners += [(k, int(j), sign) for j in used]
        n = self.around.values[0].size
        return np.concatenate([np.zeros((0, n)), *left]), np.concatenate([[], *right]), owners

    def _multipliers(self, split, owners, dual):
        found = {}
        for k, ((constant, _), _, slope) in self._units.items():
            columns = self.columns[k]
            shift = np.zeros((1, len(constant)))
            for (p, j, sign), value in zip(owners, dual, strict=True):
                if p == k:
                    shift[0, j] += sign * value
            share = np.asarray(slope[columns], np.float64)[None].copy()
            found[k] = Multipliers(
                share, np.full(1, -np.inf), columns, shift, np.full((1, 1), 1e-30)
            )
        return found


def _parts(values):
    """`(constant, matrix)` of an affine map from its values at a corner and at unit steps."""
    return values[0], values[1:] - values[0]
