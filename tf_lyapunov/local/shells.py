"""How far outputs move for a change of the input of at most r, per unit of that change.

Around one point x, on the ball of radius s: ‖F(x+e) - F(x)‖ ≤ A(s)‖e‖, A by the slopes that its
boxes leave: the gain of the logits times the largest slope of softmax there, or the gains of
margins as `probabilities` weighs them; and ‖F(x+e) - F(x)‖ ≤ D(s), by the proved ranges of the
outputs. With shells s_0 < s_1 < … up to r, for any m,

    sup_{0<‖e‖≤r} ‖F(x+e) - F(x)‖/‖e‖ ≤ max{ A(s_m), max_{k>m} D(s_k)/s_{k-1} },              (S)

since ‖e‖ > s_{k-1} on shell k. Gains prove little on large balls, ranges little on small ones.
"""

import math

import numpy as np

from tf_lyapunov.local.around import Around, OutOfTime
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.boxes import Effort, Memory, surround
from tf_lyapunov.local.flow import trace
from tf_lyapunov.local.localgains import chords
from tf_lyapunov.local.outputs import EntryGains, SlopeGains
from tf_lyapunov.local.probabilities import Margins, distance, slope
from tf_lyapunov.local.radii import margin_rows
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.searching import SearchFlow
from tf_lyapunov.program import rounding

# Balls per radius that are looked at, and the least ratio of two shells, also in large flows; and
# the share of a radius that is looked at first in these, whose larger balls take longer and prove
# less.
_BALLS, _RATIO, _RATIO_LARGE, _FIRST_LARGE = 8, 1.06, 1.25, 1 / 8
_NOTHING = 1e-30
# Entries of all signals together from which on searches are short.
_ENTRIES = 4000
_SMALL = Effort(box_steps=6, margin_steps=25)
_LARGE = Effort(0, (0.0, 0.1), 10, (0.0, 0.05, 0.3))


class Shells:
    """(S) for one flow up to its logits.

    Args:
        flow: `Flow`.
        norm: `"l2"` or `"linf"`, of changes and outputs.
        head: None for the logits themselves, `"softmax"` or `"sigmoid"`.
        deadline: `time.monotonic()` at which the search stops.
    """

    def __init__(self, flow, norm, head, deadline=np.inf):
        self.flow, self.norm, self.head, self.deadline = flow, norm, head, deadline
        self.search = SearchFlow(flow, norm == "l2")
        # The ball whose gain counted at the last point, or None.
        self.near, self.ratio = None, _RATIO
        # How far F moves at most, wherever the input is, from the point at hand.
        self.most = np.inf

    def improved(self, x, radii, known, enough=None, deadline=np.inf):
        """Upper bounds, one per radius, never above `known`.

        Args:
            x: one input, as the model receives it, in float64.
            radii: float64 (k,), ascending.
            known: float64 (k,), bounds that are proved already.
            enough: float64 (k,), below which nothing is looked for, or None.
            deadline: `time.monotonic()` at which the search for this point stops.
        """
        found = np.array(known, np.float64)
        enough = np.zeros(len(found)) if enough is None else enough
        traced, balls = None, {}
        deadline = min(deadline, self.deadline)
        for j, radius in enumerate(radii):
            if found[j] <= enough[j]:
                continue
            if traced is None:
                traced = trace(self.flow, x)
                self._start_at(traced)
                self.ratio = _RATIO_LARGE if self._is_large(traced) else _RATIO
            for _ in range(_BALLS):
                value, size = self._bound(balls, radius)
                if not balls or not self._may_start_small(traced):
                    size = size if float(radius) in balls else self._first(traced, float(radius))
                found[j] = min(found[j], value)
                if size is None or size in balls or found[j] <= enough[j]:
                    break
                try:
                    balls[size] = self._ball(traced, size, deadline)
                except OutOfTime:
                    return np.minimum.accumulate(found[::-1])[::-1]
            found[j] = min(found[j], self._bound(balls, radius)[0])
            self.near = self._start(balls, radius)
        # What holds on a ball holds on those inside it.
        return np.minimum.accumulate(found[::-1])[::-1]

    def _start_at(self, traced):
        """Where F is at the centre, which bounds how far it ever moves from there."""
        if self.head is None:
            return
        logits = traced.values[-1].reshape(-1)
        self.label = int(np.argmax(logits)) if len(logits) > 1 else int(logits[0] > 0)
        self.rows = margin_rows(len(logits), self.label)
        # Rounding of the logits: what a ball that is next to nothing moves them by.
        region = Region.ball(traced.values[0][0], _NOTHING, self.norm)
        around = Around(self.flow, traced, region)
        for k in range(1, self.flow.output + 1):
            around.advance(k)
        doubt = rounding.product_up(around.radii[self.flow.output], 2.0)
        margins = self.rows @ logits
        doubt = doubt + 1e-15 * (np.abs(self.rows) @ np.abs(logits))
        self.centre = Margins(margins - doubt, margins + doubt)
        anywhere = Margins(*(np.full(len(margins), v) for v in (-np.inf, np.inf)))
        self.most = distance(anywhere, self.centre, self.norm, self.head)

    def _may_start_small(self, traced):
        # Without a head, only a range on the whole ball bounds anything on its shells.
        return np.isfinite(self.most) and self._is_large(traced)

    def _first(self, traced, radius):
        if not self._may_start_small(traced):
            return radius
        return radius * _FIRST_LARGE if self.near is None else min(self.near, radius)

    @staticmethod
    def _is_large(traced):
        return sum(v.size for v in traced.values) > _ENTRIES

    def _start(self, balls, radius):
        """The size from which on ranges count, for the best bound at a radius."""
        values = {s: self._bound({k: v for k, v in balls.items() if k >= s}, radius)[0]
                  for s in balls}  # fmt: skip
        return min(values, key=values.get, default=None)

    def _bound(self, balls, radius):
        """`(value of (S), size of the ball that would lower it most)` from the balls at hand."""
        sizes = sorted(balls)
        best, wanted = np.inf, None
        for m, start in enumerate(sizes):
            terms = [(balls[start][0], start / 2)]
            before = start
            for size in sizes[m + 1 :]:
                if before >= radius:
                    break
                middle = math.sqrt(before * size)
                ends = size <= before * self.ratio
                terms.append((balls[size][1] / before, None if ends else middle))
                before = size
            if before < radius:
                ends = radius <= before * self.ratio
                next_size = min(2 * before, math.sqrt(before * radius))
                terms.append((self.most / before, None if ends else next_size))
            value, size = max(terms, key=lambda t: t[0])
            if value < best:
                best, wanted = value, size
        return float(rounding.up(best * (1 + 1e-12))), wanted

    def _ball(self, traced, radius, deadline):
        """`(A, D)` on one ball, by boxes searched in float32 and proved in float64."""
        flow, target = self.flow, self.flow.output
        region = Region.ball(traced.values[0][0], radius, self.norm)
        effort = _LARGE if self._is_large(traced) else _SMALL
        memory = Memory()
        surround(
            self.search.flow, self.search.trace(traced), self.search.region(region), effort,
            memory, dtype=np.float32, deadline=deadline,
        )  # fmt: skip
        around = surround(flow, traced, region, effort, memory, proof=True, deadline=deadline)
        logits = traced.values[-1].reshape(-1)
        rows = (
            self.rows if self.head else np.concatenate([np.eye(len(logits)), -np.eye(len(logits))])
        )
        c = rows.reshape(len(rows), *traced.shape(target))
        multipliers, _ = tried(around, c, target, trials=effort.margin_trials)
        if multipliers and effort.margin_steps:
            ascend(around, c, target, multipliers, effort.margin_steps)
        lower = around.lower(c, target, multipliers)
        gains = (SlopeGains if self.norm == "l2" else EntryGains)(around, chords)
        if self.head is None:
            # Both x and x+e lie in the ball.
            width = rounding.up(-lower[len(logits) :] - lower[: len(logits)])
            size = np.max(width) if self.norm == "linf" else rounding.euclidean_norms_up(
                width[None])[0]  # fmt: skip
            return gains.gain(), float(size)
        moved = gains.row_gains(rows)
        reach = rounding.up(moved * radius)
        margins = Margins(
            np.maximum(lower, rounding.down(self.centre.low - reach)),
            rounding.up(self.centre.high + reach),
        )
        gain = gains.gain() * margins.steepest(self.head)
        return (
            min(gain, slope(margins, moved, self.norm, self.head)),
            min(distance(margins, self.centre, self.norm, self.head), self.most),
        )
