"""2-norms over windows to second order, see `curves`.

y = σ‖z‖. For c ≥ 0 they lie above their tangent. For c < 0 and any t > 0 ‖z‖ ≤ (‖z‖² + t²)/(2t),
which is (V) with the slope z⁰/t, v_k = |c|σ/t summed over the windows that hold k, and
e = |c|σ(t - ‖z⁰‖)²/(2t); t² = ‖z⁰‖² + ρ² loses least on the ball.
"""

import math

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.local.curves import TINY, UNIT, UP, Curve, norms, of

# Below it squares lose their digits: what is so small is bounded by its range.
_SMALL = 1e-140


class NormCurve(Curve):
    """(V) of 2-norms over windows."""

    def _prepare(self):
        operation = self.operation
        self.cells = maps.window_cells(operation, self.shape)
        self.inside = (self.cells >= 0).astype(np.float64)
        z, away = self._read(self.center), self._read(self.away)
        scale, n = operation.scale, self.cells.shape[1]
        norm, moved = norms(z), np.minimum(norms(away), self.radius) * UP
        # √(‖z⁰‖² + ρ²), without overflow; any number would do.
        self.level = np.hypot(norm, moved)
        safe = np.maximum(self.level, TINY)
        flat = self.level <= _SMALL
        self.tangent = scale * np.where(norm > TINY, z / np.maximum(norm, TINY), 0.0)
        self.slope = scale * np.where(flat, 0.0, z / safe)
        self.bend = scale * np.where(flat, 0.0, 1 / safe) * UP
        gap = (self.level - norm) * ((self.level - norm) / (2 * safe))
        # The computed slope z⁰/t is that of (V) up to a few roundings, and t is what it is.
        lost = (n + 16) * 4 * UNIT
        self.gap = (scale * np.where(flat, moved, gap) * UP + lost * scale * self.level)[..., 0]
        # Its own bound on rounding allows for a scale in single precision.
        self.doubt = 2 * lost * np.abs(self.value)
        self.off = (scale * lost * (moved + np.where(norm > TINY, 0.0, 2 * moved)))[..., 0]
        low, high = self._read(self.bottom), self._read(self.top)
        inner = np.maximum(np.maximum(low, -high), 0.0)
        outer = np.maximum(np.abs(low), np.abs(high))
        least = np.maximum(norms(inner) / UP, norm / UP - moved)
        most = np.minimum(norms(outer), norm + moved) * UP
        self._hold(*(scale * v[..., 0] for v in (np.maximum(least, 0.0) / UP, most * UP)))
        self.gain = np.inf
        # The direction turns by an angle of sine ρ/‖z⁰‖ at most.
        turned = np.where(moved < norm, 1.5708 * moved / np.maximum(norm, TINY), 2.0)
        self.spread = (scale * (turned * UP + lost))[0, :, 0]
        self.growth = 8 * scale * math.sqrt(n)

    def _read(self, array):
        return array[:, self.cells] * self.inside

    def _added(self, parts):
        found = np.zeros((len(parts), math.prod(self.shape)))
        for k, own in enumerate(self.cells.T):
            # Cells of different windows in the same place of each are different.
            held = own >= 0
            found[:, own[held]] += parts[:, held, k]
        return found

    def pull(self, c, at):
        """J_cᵀc, (rows, inputs)."""
        c = c[..., None]
        slope = np.where(c > 0, of(self.tangent, at), of(self.slope, at))
        return self._added(c * slope)

    def push(self, d, c, at):
        """J_c d, (rows, outputs)."""
        slope = np.where(c[..., None] > 0, of(self.tangent, at), of(self.slope, at))
        return np.sum(slope * self._read(d), axis=2)

    def missed(self, c, at):
        """What the rounding of J may miss of cᵀJd, (rows,)."""
        return np.einsum("ij,ij->i", np.abs(c), np.broadcast_to(of(self.off, at), c.shape))

    def offset(self, c, at):
        """e(c), (rows,)."""
        minus = np.maximum(-c, 0.0)
        return np.einsum("ij,ij->i", minus, np.broadcast_to(of(self.gap, at), c.shape))

    def offset_back(self, c):
        """Derivative of e(c) by c, (rows, outputs)."""
        return np.where(c < 0, -self.gap, 0.0)

    def slopes_back(self, c):
        """Jᵀc at the only centre, (rows, inputs)."""
        return self._added(c[..., None] * self.tangent)

    def curvature(self, c, at):
        """v(c), (rows, inputs)."""
        minus = np.maximum(-c, 0.0)[..., None]
        return self._added(minus * of(self.bend, at) * self.inside) * UP

    def curvature_back(self, weights, c, at):
        """Derivative of Σ w_k v_k(c) by c, (rows, outputs)."""
        total = self._read(weights).sum(axis=2) * of(self.bend, at)[..., 0]
        return np.where(c < 0, -total, 0.0)

    def spread_back(self, weights):
        """Per input, the sum of weights of the windows that hold it."""
        return self._added((weights[:, None] * self.inside)[None])[0]

    def losses(self):
        """½ Σ v_k(±e_j) D_k² + e for every output j, below and above: (centres, outputs) each."""
        squares = np.square(self._read(self.away)).sum(axis=2)
        above = self.bend[..., 0] * squares / 2 * UP + self.gap
        return np.zeros_like(above), above

    def magnified(self, sizes):
        """|J|s for every centre within the box, (outputs,)."""
        return self.operation.scale * norms(self._read(sizes[None]))[0, :, 0] * UP
