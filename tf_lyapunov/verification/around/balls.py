"""How far signals move from those at the centre in l2, from the chords that boxes leave.

On its box, an activation moves from φ(z⁰) by m(z - z⁰) + ψ with |ψ_i| ≤ s_i|z_i - z⁰_i|: m the
middle and s half the spread of the slopes of its chords from z⁰. So with J the linearised map from
the input, J_j that from step j's output, and weights w on a signal z,

    √(Σ w_i (z_i - z⁰_i)²) ≤ ‖w^½ J‖ r + Σ_j ‖w^½ J_j s_j^½‖ t_j,                            (T)

t_j the same bound for the weights s_j on what step j reads: ψ_j = s_j^½ (s_j^½ δ) with |δ| at most
the signal's own distance. The maps are rows that are carried back, `functionals`, with what their
rounding may miss of every entry; maxima pass their ball by its gain.
"""

import numpy as np

from tf_lyapunov.verification.arithmetic import (
    SLACK,
    UNIT,
    gamma,
    norm_up,
    product_up,
    row_norms_up,
    sum_up,
)
from tf_lyapunov.verification.around import functionals
from tf_lyapunov.verification.around.functionals import Functionals

# Rows and columns up to which norms of linearised maps are worth their time.
_ROWS, _COLUMNS = 600, 2**13
# Chords over less than this share of their numbers' size are not told from slopes.
_NEAR = 1e-6


class Balls:
    """(T) for `Surroundings`, step by step.

    Args:
        around: `Surroundings`, of which only steps that are known are read.
    """

    def __init__(self, around):
        self.around = around
        self.middles, self.roots, self.moves = {}, {}, {}

    def add(self, name, source, relaxed):
        """Takes in an activation, with the box of what it reads."""
        low, high = chords(relaxed)
        middle = low / 2 + high / 2
        spread = np.maximum(high - middle, middle - low) * (1 + 4 * UNIT)
        spread = np.where(high > low, spread, 0.0)
        shape = relaxed.shape
        self.middles[name] = middle.reshape(shape)
        # A root's square lies within a rounding of what it is the root of.
        self.roots[name] = (np.sqrt(spread) * (1 + 4 * UNIT)).reshape(shape)
        self.moves[name] = self.radius(source, self.roots[name].reshape(-1))

    def radius(self, source, roots):
        """Bound on √(Σ w_i (z_i - z⁰_i)²) for the signal of a step.

        Args:
            source: name of the step.
            roots: float64 (m,) ≥ 0, w^½.
        """
        around, units = self.around, np.flatnonzero(roots)
        if not len(units):
            return 0.0
        roots = roots[units]
        entries = roots * around.reach(source).reshape(-1)[units]
        whole = min(
            product_up(float(roots.max()), around.radii[source]),
            float(row_norms_up(entries[None])[0]),
        )
        if len(units) > _ROWS or around.region.center.size > _COLUMNS:
            return whole
        return min(whole, self._through(source, units, roots))

    def _through(self, source, units, roots):
        around = self.around
        shape = around.values[source].shape
        rows = np.zeros((len(units), int(np.prod(shape))))
        rows[np.arange(len(units)), units] = roots
        held = {source: Functionals(rows.reshape(len(units), *shape))}
        total, lost = 0.0, np.zeros(len(units))
        for name in reversed(around.order[1 : around.order.index(source) + 1]):
            if name not in held:
                continue
            c, step = held.pop(name), around.steps[name]
            # What the step's own evaluation errs by, and what rounding misses of the rest.
            size, noise = around.spreads[name]
            lost += gamma(around.terms) * 4 * _dot(np.abs(c.rows), c.of(size))
            lost += _dot(np.abs(c.rows), c.of(noise))
            if name in self.middles:
                spread = product_up(_norm(c.rows * c.of(self.roots[name])), self.moves[name])
                total = sum_up(total, spread)
                parts = [Functionals(c.rows * c.of(self.middles[name]), c.window)]
            elif functionals.is_linear(step.operation):
                shapes = [around.steps[i].shape for i in step.inputs]
                parts = functionals.back(step.operation, c, shapes, step.shape)
            else:
                total = sum_up(total, product_up(_norm(c.rows), around.radii[name]))
                continue
            for before, part in zip(step.inputs, parts, strict=True):
                held[before] = (
                    held[before].plus(part, around.steps[before].shape) if before in held else part
                )
        first = held.pop(around.order[0], None)
        if first is not None:
            total = sum_up(total, product_up(_norm(first.rows), around.region.l2_radius()))
        return sum_up(total, float(row_norms_up(lost[None])[0])) * SLACK


def chords(relaxed):
    """Bounds `(low, high)` of (φ(t) - φ(z⁰))/(t - z⁰) over the box, float64 (m,) each.

    On a line the chord's slope is monotone in t on either side of z⁰, so that the ends of pieces
    hold the extremes; where one lies close to z⁰, or pieces are no lines, slopes of φ bound it.
    """
    p, z = relaxed.pieces, relaxed.center
    low, high = p.low.copy(), p.high.copy()
    value, known = np.zeros_like(z), np.zeros(z.shape, bool)
    for k in range(len(p.slope)):
        inside = (p.start[k] <= z) & (z <= p.stop[k])
        value = np.where(inside & ~known, p.slope[k] * z + p.shift[k], value)
        known |= inside
    least, most = np.full(z.shape, np.inf), np.full(z.shape, -np.inf)
    for k in range(len(p.slope)):
        holds = (p.start[k] <= z) & (z <= p.stop[k])
        least = np.where(holds, np.minimum(least, p.slope[k]), least)
        most = np.where(holds, np.maximum(most, p.slope[k]), most)
        for t in (p.start[k], p.stop[k]):
            away = t - z
            known &= np.abs(away) > _NEAR * (1 + np.abs(z) + np.abs(t))
            chord = (p.slope[k] * t + p.shift[k] - value) / np.where(away == 0, 1.0, away)
            least, most = np.minimum(least, chord), np.maximum(most, chord)
    known &= np.all(p.error == 0, axis=0)
    # Numbers cancel to `_NEAR` of their size at most: of 10 roundings, 10⁻⁹ of the steepest slope.
    room = 1e-8 * (np.abs(p.slope).max(axis=0) + np.abs(p.shift).max(axis=0))
    low = np.where(known, np.maximum(low, least - room), low)
    return low, np.maximum(np.where(known, np.minimum(high, most + room), high), low)


def _norm(rows):
    """Bound on the spectral norm of rows on a signal."""
    flat = rows.reshape(len(rows), -1)
    # Columns without an entry change nothing.
    return norm_up(flat[:, np.any(flat != 0, axis=0)]) if np.any(flat) else 0.0


def _dot(rows, value):
    return rows.reshape(len(rows), -1) @ value.reshape(-1)
