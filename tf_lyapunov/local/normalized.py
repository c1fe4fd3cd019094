"""Normalisations by statistics of their own input to second order, see `curves`.

y = γ∘N(Px) + β with N(z) = z/s, s² = ‖z‖²/n + ε and P the centring or identity. N is the gradient
of n·s, so that the third derivative T of n·s is a symmetric form and its norm, that of N's second
derivative, is attained at a single vector (Banach). For a unit d at angle cosine α with z,

    |T[d, d, d]| = ‖z‖/(n s³)·|3α - 3ηα³| ≤ √(η/n)/s²·κ(η),   η = ‖z‖²/(n s²) = 1 - ε/s²,
    κ = 3(1 - η) for η ≤ 1/3 (α = 1), else 2/√(3η) (α² = 1/(3η)).

This is L(η), which grows up to η = 1/5 and falls from there; v = L‖Pγ∘c‖ for all entries, L at the
least η of the set if that is above 1/5, else L(1/5).
"""

import math

import numpy as np

from tf_lyapunov.local.curves import TINY, UNIT, UP, Grouped, norms, of, sets


class NormalizedCurve(Grouped):
    """(V) of a normalisation by statistics of its own input."""

    def _prepare(self):
        operation, size = self.operation, math.prod(self.shape)
        split = operation._split(np.arange(size).reshape(1, *self.shape))[0]
        self.index = sets(split, operation.axes)
        gamma, beta = (
            np.broadcast_to(v, split.shape).reshape(-1) for v in (operation.gamma, operation.beta)
        )
        # `index` is of the flat sample, in whose order split entries lie too.
        self.gamma, self.beta = gamma[self.index], beta[self.index]
        n, eps = self.index.shape[1], operation.epsilon
        x, away = self._grouped(self.center), self._grouped(self.away)
        z = self._centred(x)
        noise = (n + 8) * UNIT * 2 * (np.abs(x) + np.abs(x).mean(axis=2, keepdims=True))
        noise = norms(noise) * UP
        norm, moved = norms(z), self._reach(away)
        least = np.maximum(norm / UP - noise - moved, 0.0)
        most = norm * UP + noise + moved
        s = np.sqrt(norm * norm / n + eps)
        self.inverse, self.unit = 1 / s, z / s
        low, high = np.sqrt(least**2 / n + eps) / UP, np.sqrt(most**2 / n + eps) * UP
        self.steep = 1 / low * UP
        self.bend = self._bend(least, low, n)
        # 1/s, z/s and their product err by what z errs by, and by a few sums; s itself may be less.
        inner = np.sqrt(np.maximum(norm / UP - noise, 0.0) ** 2 / n + eps) / UP
        off = (5 * noise / (math.sqrt(n) * inner) + 4 * (n + 16) * UNIT) / inner
        self.off = off * moved
        self.tau = np.minimum(most / np.sqrt(most**2 / n + eps), math.sqrt(n)) * UP
        self._range(z, noise, away, moved, low, high)
        largest = np.abs(self.gamma).max(axis=1)[None, :, None]
        self.gain = float((largest * self.steep).max()) * UP
        spread = largest * (np.minimum(self.bend * moved, self.steep) + off) * UP
        self.growth = 8 * self.gain
        self.spread = self._flat(np.broadcast_to(spread, z.shape))[0]

    def _centred(self, x):
        return x - x.mean(axis=2, keepdims=True) if self.operation.centred else x

    def _bend(self, least, low, n):
        """L of the module's docstring, at the least η of the set or at 1/5."""
        eps = self.operation.epsilon
        eta = np.minimum(np.square(least) / (n * np.square(low)), 1.0)
        small = 3 * (1 - np.minimum(eta, 1 / 3))
        kappa = np.where(eta < 1 / 3, small, 2 / np.sqrt(3 * np.maximum(eta, 1 / 3)))
        # (1 - η)/ε is 1/s².
        found = np.sqrt(eta / n) / np.square(low) * kappa
        return np.where(eta < 0.2 * UP, math.sqrt(0.2 / n) * 1.92 / eps, found) * UP

    def _range(self, z, noise, away, moved, low, high):
        n = z.shape[2]
        if self.operation.centred:
            each = away * (1 - 2 / n) + away.sum(axis=2, keepdims=True) / n
        else:
            each = away
        each = np.minimum(each, moved) * UP + noise
        ends = [z - each, z + each]
        down = np.where(ends[0] > 0, ends[0] / high, ends[0] / low)
        up = np.where(ends[1] > 0, ends[1] / low, ends[1] / high)
        room = 1e-12 * (np.abs(down) + np.abs(up))
        # And by (V) for one output: its row of J has the norm √(J Jᵀ) ≤ 1/s.
        unit = self.unit
        row = np.sqrt(np.maximum(1 + unit * unit * (unit * unit).sum(axis=2, keepdims=True) / n**2
                                 - 2 * unit * unit / n, 0.0)) * self.inverse  # fmt: skip
        reach = (row * moved + self.bend * moved**2 / 2 + self.off) * UP
        reach = reach + 1e-12 * np.abs(unit) + 2 * noise * self.inverse
        down = np.maximum(down - room, np.maximum(unit - reach, -self.tau))
        up = np.minimum(up + room, np.minimum(unit + reach, self.tau))
        ends = np.sort([self.gamma * down, self.gamma * up], axis=0)
        room = 1e-12 * (np.abs(ends).max(axis=0) + np.abs(self.beta))
        self._hold(*map(self._flat, (ends[0] + self.beta - room, ends[1] + self.beta + room)))

    def _weighted(self, c):
        return self._centred(self.gamma * self._grouped(c))

    def pull(self, c, at):
        """J_cᵀc, (rows, inputs)."""
        a, unit = self._weighted(c), of(self.unit, at)
        a = a - unit * np.mean(unit * a, axis=2, keepdims=True)
        return self._flat(self._centred(a) * of(self.inverse, at))

    def push(self, d, c, at):
        """J_c d, (rows, outputs)."""
        d, unit = self._centred(self._grouped(d)), of(self.unit, at)
        d = d - unit * np.mean(unit * d, axis=2, keepdims=True)
        return self._flat(self.gamma * d * of(self.inverse, at))

    def missed(self, c, at):
        """What the rounding of J may miss of cᵀJd, (rows,)."""
        size = norms(self.gamma * self._grouped(c))
        return np.sum(size * of(self.off, at), axis=(1, 2)) * UP

    def curvature(self, c, at):
        """v(c), (rows, inputs)."""
        room = 1e-12 * norms(self.gamma * self._grouped(c))
        size = (norms(self._weighted(c)) + room) * of(self.bend, at)
        return self._flat(np.broadcast_to(size * UP, (len(c), *self.index.shape)))

    def curvature_back(self, weights, c, at):
        """Derivative of Σ w_k v_k(c) by c, (rows, outputs)."""
        a = self._weighted(c)
        whole = self._grouped(weights).sum(axis=2, keepdims=True) * of(self.bend, at)
        return self._flat(self.gamma * a * (whole / np.maximum(norms(a), TINY)))

    def least(self, c, at):
        """By ranges, or ‖N‖ ≤ τ, set by set."""
        rows, a = self._grouped(c), self._weighted(c)
        low, high = (of(self._grouped(v), at) for v in (self.low, self.high))
        corner = np.where(rows > 0, low, high)
        norm, tau = norms(a), of(self.tau, at)
        ball = self.beta - self.gamma * a * (tau / np.maximum(norm, TINY))
        # γ∘c itself where a lost digits to the mean.
        room = 1e-12 * norms(self.gamma * rows) * tau
        by_ball = np.sum(self.beta * rows, axis=2) - (norm * tau + room)[..., 0]
        by_corner = np.sum(rows * corner, axis=2)
        point = np.where((by_corner >= by_ball)[..., None], corner, ball)
        return np.maximum(by_corner, by_ball).sum(axis=1), self._flat(point)

    def losses(self):
        """½ Σ v_k(±e_j) D_k² for every output j, below and above: (centres, outputs) each."""
        squares = np.square(self._grouped(self.away)).sum(axis=2, keepdims=True)
        found = self._flat(np.abs(self.gamma) * self.bend * squares / 2 * UP)
        return found, found

    def magnified(self, sizes):
        """|J|s for every centre within the box, (outputs,)."""
        s = self._grouped(sizes[None])
        size = s + s.mean(axis=2, keepdims=True) + norms(s)
        return self._flat(np.abs(self.gamma) * self.steep * size * UP)[0]
