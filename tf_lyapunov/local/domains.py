"""Bounds over many boxes within one region at once, by lines below and above every activation.

A domain is a box of the input, cut with the region's ball if it has one. Position by position it
gets boxes by intervals, and those of activations that are not linear on theirs by a backward pass
of their own, in which each activation stands between two lines,

    α y + β ≤ φ(y) ≤ α' y + β',     cᵀφ(y) ≥ (c⁺α + c⁻α')ᵀy + c⁺ᵀβ + c⁻ᵀβ',                  (C)

which is (L) of `relaxation` with λ = 0 and one g per unit and sign; one row per (domain, unit) that
needs it, all domains together.

Rounding. As `around` says, a pass errs by at most γ_N of the sum over its links of the sizes that
each sums up. Every size there is |c|ᵀs for the row's coefficients c at that link, with s a bound on
what the link's entries sum up over the whole region; and |c| at a link is at most |W|ᵀ|c| of the
next one, or the steepest slope times it. So that sum is at most |c|ᵀL for the row's own c, with

    L_0 = 2|x⁰| + 4(reach + ρ),   L_k = 2s_k + |W|L_{k-1},   L_k = 4·max|φ| + σ(4·max|y| + L_{k-1})

for linear links and activations of steepest slope σ, once for all domains.                     (S)
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.local.flow import Whole
from tf_lyapunov.local.lines import (
    CurvedLines,
    WindowLines,
    active_cells,
    breaks_of,
    curved_lines,
    interval_of,
    lines_of,
    repeated,
    window_lines,
)
from tf_lyapunov.local.maxima import is_window_maximum, windows_of
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.relaxed import curve_of, is_curved, is_relaxed
from tf_lyapunov.program import rounding

UNIT = rounding.UNIT_ROUNDOFF["float64"]
_MARGIN = 1 + 1e-9
# Entries of one block of rows, at the widest step: what a core's own cache holds a few times, below
# which new arrays need no new pages. Rows of a block at least, for products of matrices.
_BLOCK, _LEAST = 2**15, 128
# Entries of the matrix that leads from units back to what their link reads, at most.
_TABLE = 2**20
# Inputs that move, up to which the slopes of hidden units by each are kept.
_FEW = 32


@dataclasses.dataclass(eq=False)
class Bounded:
    """What was found of rows over domains.

    Attributes:
        lower: float64 (domains, r), -inf where not wanted.
        place: int (domains, r), each wanted row's position among the p that were bounded, or -1.
        slopes: float64 (p, inputs), coefficients of the rows at the input.
        lost: float64 (p,), what was taken off for rounding.
        costs: dict from positions to lists of `(coefficients (p, units), gaps (domains, units))`.
        steep: dict from positions to slopes of their units, (domains, units, moving), or None.
    """

    lower: np.ndarray
    place: np.ndarray
    slopes: np.ndarray
    lost: np.ndarray
    costs: dict
    steep: dict


class _Intervals(dict):
    """Intervals by position, (domains, entries), computed when they are asked for."""

    def __init__(self, domains, low, high):
        super().__init__({0: (low, high)})
        self.domains = domains

    def __missing__(self, k):
        self[k] = self.domains._interval(k, self.domains.flow.links[k - 1], self)
        return self[k]


class Domains:
    """Bounds of one flow over domains of one region.

    Args:
        around: proved `Around` of the whole region, complete.
    """

    def __init__(self, around):
        self.around, self.flow, self.region = around, around.flow, around.region
        self.shapes = [v.shape[1:] for v in around.values]
        self.center = around.values[0].reshape(-1)
        self.rounding = rounding.gamma(around.sum_length, UNIT)
        self.whole = [tuple(v.reshape(-1) for v in around.box(k)) for k in range(len(self.shapes))]
        self.sizes = self._sizes()
        self.is_box = not np.isfinite(min(self.region.radius, self.region.radius_l1))
        # What links with lines read, in order: these boxes are kept from a domain to its parts.
        self.kept = list(dict.fromkeys(
            link.inputs[0] for link in self.flow.links if is_relaxed(link.operation)
        ))  # fmt: skip
        self.moving = np.flatnonzero(self.whole[0][0] < self.whole[0][1])
        # Links that neither lines nor adjoints lead through: what is behind them has intervals.
        self.has_ends = not all(
            around._linear(link) or is_relaxed(link.operation) for link in self.flow.links
        )
        self._slopes, self._tables, self.affine = {}, {}, [True]
        for link in self.flow.links:
            linear = around._linear(link) and all(self.affine[i] for i in link.inputs)
            self.affine.append(linear)

    def _sizes(self):
        """L of (S), per position, flat."""
        around = self.around
        reach = self.region.reach()
        found = [2 * np.abs(around.values[0]) + (4 * reach + 4 * self.region.l2_radius())[None]]
        # Sizes of each link alone: of its coefficients, and of those that it passes on.
        self.own, self.reads = [found[0].reshape(-1)], {}
        for k, link in enumerate(self.flow.links, 1):
            reads = [found[i] for i in link.inputs]
            low, high = around.box(k)
            size = np.maximum(np.abs(low), np.abs(high))
            if around._linear(link):
                own = 2 * around.sizes[k]
                size = own + maps.absolute(link.operation, reads)
            elif is_relaxed(link.operation):
                step, source = around.steps[k], around.box(link.inputs[0])
                largest = np.maximum(np.abs(source[0]), np.abs(source[1]))
                if has_pieces(link.operation):
                    slopes = np.maximum(*(np.abs(s) for s in step.slopes)).reshape(size.shape)
                    own = 4 * step.largest_value.reshape(size.shape)
                    size = own + slopes * (4 * largest + reads[0])
                elif is_curved(link.operation):
                    ends = (v.reshape(1, -1) for v in (around.values[link.inputs[0]], *source))
                    curve = curve_of(link.operation, self.shapes[link.inputs[0]], *ends)
                    inner = curve.magnified((4 * largest + reads[0]).reshape(-1))
                    own = 8 * size
                    size = own + inner.reshape(size.shape)
                else:
                    cells, out = windows_of(link.operation, self.shapes[link.inputs[0]])
                    inner = np.where(cells >= 0, (8 * largest + reads[0]).reshape(-1)[cells], 0.0)
                    top = np.where(cells >= 0, largest.reshape(-1)[cells], 0.0).max(axis=1)
                    own = 4 * size + 8 * top.reshape(1, *out)
                    size = own + inner.max(axis=1).reshape(1, *out)
                self.reads[k] = 4 * largest.reshape(-1)
            else:
                own = size = 4 * size
            self.own.append(np.broadcast_to(own, around.values[k].shape).reshape(-1))
            found.append(size * _MARGIN)
        return [f.reshape(-1) for f in found]

    # Boxes and lines ----------------------------------------------------------------------------

    def bound(self, low, high, boxes, rows, wanted, deadline_passed):
        """Lower bounds of rows of the output over domains.

        Args:
            low, high: float64 (domains, inputs), flat boxes of the input within the region.
            boxes: dict from `kept` positions to `(low, high)` (domains, units), known already;
                renewed.
            rows: float64 (r, outputs).
            wanted: bool (domains, r), which to bound.
            deadline_passed: function without arguments; the pass raises `OutOfTime` by it.

        Returns:
            `Bounded`.
        """
        box, lines, steep, empty = self.propagated(low, high, boxes, deadline_passed)
        domain, row = np.nonzero(wanted)
        passed = {}
        found, slopes = self.lower(rows[row], domain, self.flow.output, box, lines, passed)
        if self.has_ends:
            found = np.maximum(found, self._at_box(rows[row], domain, box[self.flow.output]))
        lower = np.full(wanted.shape, -np.inf)
        lower[domain, row] = found
        lower[empty] = np.inf
        place = np.full(wanted.shape, -1)
        place[domain, row] = np.arange(len(domain))
        lost = passed.pop(0)
        return Bounded(lower, place, slopes, lost, self._costs(box, lines, passed), steep)

    def propagated(self, low, high, boxes, deadline_passed, since=None):
        """Boxes of all positions, lines of all activations, and which domains are empty.

        Args:
            low, high, boxes, deadline_passed: see `bound`; with one input box for all domains,
                (1, inputs), boxes of hidden positions must be known, and `has_ends` be false.
            since: int (domains,), positions up to which boxes are known as well as can be, or None.

        Returns:
            `(box, lines, steep, empty)`: dicts by position, see `Bounded`, and bool (domains,).
        """
        box, lines, steep = _Intervals(self, low, high), {}, {}
        count = max([len(low), *(len(b[0]) for b in boxes.values() if b is not None)])
        empty = np.zeros(count, bool) | np.any(low > high, axis=1)
        for k, link in enumerate(self.flow.links, 1):
            operation = link.operation
            if is_relaxed(operation):
                source = link.inputs[0]
                if source not in steep:
                    steep[source] = self._tighten(
                        source, box, boxes, lines, link, empty, deadline_passed, since
                    )
                lines[k] = self._lines(operation, source, *box[source])
            deadline_passed()
        return box, lines, steep, empty

    def _costs(self, box, lines, passed):
        """How much of its width each unit's activation costs a row: |c|·gap/width, by source."""
        found = {}
        for k, c in passed.items():
            line, source = lines[k], self.flow.links[k - 1].inputs[0]
            if isinstance(line, WindowLines):
                continue
            low, high = box[source]
            if isinstance(line, CurvedLines):
                # ½vD² of a box of width 2D.
                found.setdefault(source, []).append((c, (high - low) / 8))
                continue
            gap = np.where(line.open, line.gap(low, high), 0.0) / np.maximum(high - low, 1e-30)
            found.setdefault(source, []).append((c, gap))
        return found

    def chunk(self, rows):
        """How many domains to bound at once: as many as a core's own cache holds."""
        widest = max(math.prod(s) for s in self.shapes)
        return int(np.clip(_BLOCK // (widest * rows), 16, 512))

    def losses(self, bounded, own, rows):
        """What relaxations lose to the width of each input, about, for one row of some domains.

        A unit whose box spans u - l by input j's part |a_j|·width_j owes it that share of what the
        gap of its lines costs the row. Inputs that nothing is known of lose 0.

        Args:
            bounded: `Bounded`.
            own: int (n,), the domains.
            rows: int (n,), position of each one's row among those that were bounded.

        Returns:
            float64 (n, inputs), to be multiplied by the widths.
        """
        total = np.zeros((len(rows), len(self.center)))
        for source, parts in bounded.costs.items():
            steep = bounded.steep[source]
            if steep is None:
                continue
            for c, gap in parts:
                weight = np.abs(c[rows]) * gap[own]
                total[:, self.moving] += np.einsum("bu,bun->bn", weight, np.abs(steep[own]))
        return total

    def _tighten(self, source, box, boxes, lines, link, empty, deadline_passed, since):
        """The box at a position, from intervals, from what is known, and by passes of its own."""
        steep, known = None, boxes.get(source)
        exact = self.affine[source] and self.is_box
        if known is None or exact:
            low, high = (np.array(v) for v in box[source])
        else:
            # What is known is not far from what intervals say.
            low, high = (np.array(v) for v in known)

        if len(self.moving) <= _FEW:
            steep = np.zeros((*low.shape, len(self.moving)))
        if known is not None and exact:
            low, high = np.maximum(low, known[0]), np.minimum(high, known[1])
        if exact and steep is not None:
            steep[:] = self._affine_slopes(source)
        if not exact:
            mask = self._matters(link, low, high)
            if since is not None:
                mask &= (source > since)[:, None]
            domain, unit = np.nonzero(mask)
            width = max(math.prod(s) for s in self.shapes[: source + 1])
            block = max(_BLOCK // width, _LEAST) // 2
            for start in range(0, len(domain), block):
                deadline_passed()
                some, at = domain[start : start + block], unit[start : start + block]
                count = len(some)
                found, slopes = self._units(at, some, source, box, lines)
                low[some, at] = np.maximum(low[some, at], found[:count])
                high[some, at] = np.minimum(high[some, at], -found[count:])
                if steep is not None:
                    slopes = slopes[:, self.moving]
                    steep[some, at] = (slopes[:count] - slopes[count:]) / 2
        # An empty box is a domain without inputs, of which anything holds.
        empty |= np.any(low > high, axis=1)
        np.maximum(high, low, out=high)
        box[source] = boxes[source] = low, high
        return steep

    def _affine_slopes(self, source):
        """Slopes of an affine position at the inputs that move, (units, moving)."""
        if source not in self._slopes:
            size = len(self.whole[source][0])
            box = {0: tuple(v[None] for v in self.whole[0])}
            _, slopes = self.lower(np.eye(size), np.zeros(size, int), source, box, {})
            self._slopes[source] = slopes[:, self.moving]
        return self._slopes[source]

    def _matters(self, link, low, high):
        """Units whose activation is not linear on their box."""
        operation = link.operation
        if is_window_maximum(operation):
            cells, _ = windows_of(operation, self.shapes[link.inputs[0]])
            found, exists = np.zeros(low.shape, bool), cells >= 0
            bottom = np.where(exists, low[:, cells], -np.inf)
            active = active_cells(exists, bottom, np.where(exists, high[:, cells], -np.inf))
            active &= active.sum(axis=2, keepdims=True) > 1
            domain, window, cell = np.nonzero(active)
            found[domain, cells[window, cell]] = True
            return found
        breaks = None if is_curved(operation) else breaks_of(operation)
        if breaks is None:
            return high > low
        return np.any([(low < b) & (b < high) for b in breaks], axis=0)

    def _lines(self, operation, source, low, high):
        if is_window_maximum(operation):
            return window_lines(operation, self.shapes[source], low, high)
        if is_curved(operation):
            return curved_lines(operation, self.shapes[source], low, high)
        return lines_of(operation, low, high, self.shapes[source])

    def _interval(self, k, link, box):
        """Intervals of a position, (domains, entries), by those of what its link reads."""
        operation = link.operation
        # Units are split in domains that share their input: some boxes are of all, others of each.
        count = max(len(box[i][0]) for i in (0, *link.inputs))
        reads = [
            tuple(
                np.broadcast_to(v.reshape(-1, *self.shapes[i]), (count, *self.shapes[i]))
                for v in box[i]
            )
            for i in link.inputs
        ]
        if isinstance(operation, Whole):
            found = None
        elif self.around._linear(link):
            found = self._linear_interval(k, link, reads)
        else:
            found = interval_of(operation, reads, self.shapes[k])
        low, high = (np.broadcast_to(v, (count, v.shape[-1])) for v in self.whole[k])
        if found is None:
            return low, high
        low = np.maximum(low, found[0].reshape(count, -1))
        high = np.minimum(high, found[1].reshape(count, -1))
        return low, np.maximum(low, high)

    def _linear_interval(self, k, link, reads):
        operation = link.operation
        middle = [low / 2 + high / 2 for low, high in reads]
        half = [np.maximum(high - m, m - low) for m, (low, high) in zip(middle, reads, strict=True)]
        value = maps.applied(operation, middle)
        reach = maps.absolute(operation, half)
        room = self.rounding * 2 * self.around.sizes[k] * _MARGIN + 1e-290
        reach = reach * (1 + self.rounding) + room
        return value - reach, value + reach

    # Backwards ----------------------------------------------------------------------------------

    def lost(self, c, target):
        """What rounding takes from bounds of rows of a position on any domain, at most: (p,)."""
        return self.rounding * (np.abs(c) @ self.sizes[target]) * _MARGIN + 1e-290

    def _units(self, at, domain, target, box, lines):
        """`lower` of units of a position, one per domain, and of their negatives behind them."""
        count, size = len(at), len(self.whole[target][0])
        table = self._table(target) if target else None  # no link leads to the input
        if table is None:
            c = np.zeros((2 * count, size))
            c[np.arange(count), at] = 1.0
            c[count + np.arange(count), at] = -1.0
            return self.lower(c, domain, target, box, lines)
        # What a pass begins with is a row of the matrix itself.
        held = {}
        for i, rows in table[0]:
            c = np.take(rows, at, axis=0)
            c = np.concatenate([c, -c])
            held[i] = held[i] + c if i in held else c
        constant = np.concatenate([table[1][at], -table[1][at]])
        lost = self.rounding * self.sizes[target][at] * _MARGIN + 1e-290
        lost = np.concatenate([lost, lost])
        return self._back(held, constant, lost, domain, target - 1, box, lines, None)

    def _table(self, k):
        """`(matrices, shift)` of a linear link, its units row by row, or None if it is too large.

        Products with unit vectors are exact, so that these are the link's own numbers.
        """
        if k not in self._tables:
            link, size = self.flow.links[k - 1], len(self.whole[k][0])
            shapes = [self.shapes[i] for i in link.inputs]
            self._tables[k] = None
            if self.around._linear(link) and size * max(map(math.prod, shapes)) <= _TABLE:
                eye = np.eye(size).reshape(size, *self.shapes[k])
                found = maps.adjoint(link.operation, eye, shapes)
                found = [np.ascontiguousarray(f.reshape(size, -1)) for f in found]
                shift = maps.offset(link.operation)
                shift = 0.0 if shift is None else shift
                shift = np.broadcast_to(shift, self.shapes[k]).reshape(-1)
                self._tables[k] = list(zip(link.inputs, found, strict=True)), shift
        return self._tables[k]

    def lower(self, c, domain, target, box, lines, passed=None):
        """Proved lower bounds of rows of a position, each over one domain.

        Args:
            c: float64 (m·d, entries).
            domain: int (d,), of rows d apart from one another.
            target: position.
            box: dict from positions to intervals (domains, entries).
            lines: dict from positions to `Lines`, as far as the target needs them.
            passed: dict that takes the rows' coefficients at every activation, and at 0 what was
                taken off for rounding, or None; with it that is measured row by row.

        Returns:
            `(lower, slopes)`: float64 (p,), and (p, inputs), the row's coefficients at the input.
        """
        lost = self.lost(c, target)
        return self._back({target: c}, np.zeros(len(c)), lost, domain, target, box, lines, passed)

    def _back(self, held, constant, lost, domain, target, box, lines, passed):
        """A pass from the coefficients `held` by position, and what `lower` returns of it."""
        size = np.zeros(len(constant))
        for k in range(target, 0, -1):
            if k not in held:
                continue
            c, link = held.pop(k), self.flow.links[k - 1]
            operation = link.operation
            if passed is not None:
                size += np.abs(c) @ self.own[k]
            if self.around._linear(link):
                shaped = c.reshape(-1, *self.shapes[k])
                shift = maps.offset(operation)
                if shift is not None:
                    shift = np.broadcast_to(shift, self.shapes[k])
                    constant += c @ shift.reshape(-1)
                found = maps.adjoint(operation, shaped, [self.shapes[i] for i in link.inputs])
                found = [f.reshape(len(c), -1) for f in found]
            elif k in lines:
                if passed is not None:
                    passed[k] = lines[k].costs(c, domain)
                found, added = lines[k].through(c, domain)
                constant += added
                if passed is not None:
                    size += np.abs(found[0]) @ self.reads[k]
            else:
                constant += self._plain(c, repeated(domain, len(c)), box[k])
                continue
            for i, part in zip(link.inputs, found, strict=True):
                held[i] = held[i] + part if i in held else part
        slopes = held.get(0)
        if slopes is None:
            slopes = np.zeros((len(constant), len(self.center)))
        else:
            constant += slopes @ self.center + self._at_input(slopes, domain, *box[0])
        if passed is not None:
            # What was summed up indeed is often far less than (S) says.
            size += np.abs(slopes) @ self.own[0]
            lost = np.minimum(lost, self.rounding * size * _MARGIN + 1e-290)
            passed[0] = lost
        found = rounding.down(constant - lost)
        return np.where(np.isfinite(found), found, -np.inf), slopes

    def _at_input(self, c, domain, low, high):
        low, high = low - self.center, high - self.center
        if self.is_box and len(low) == 1:
            # c⁺low + c⁻high.
            return c @ low[0] + np.minimum(c, 0.0) @ (high[0] - low[0])
        domain = repeated(domain, len(c)) % len(low)
        low, high = low[domain], high[domain]
        if self.is_box:
            return np.einsum("ij,ij->i", c, np.where(c > 0, low, high))
        return self.region.minimum_between(c.reshape(-1, *self.shapes[0]), low, high)[0]

    def _plain(self, c, domain, box):
        return np.einsum("ij,ij->i", c, np.where(c > 0, box[0][domain], box[1][domain]))

    def _at_box(self, c, domain, box):
        lost = (
            self.rounding
            * 4
            * np.einsum("ij,ij->i", np.abs(c), np.maximum(np.abs(box[0]), np.abs(box[1]))[domain])
        )
        return rounding.down(self._plain(c, domain, box) - lost * _MARGIN - 1e-290)


def narrowed(low, high):
    """Boxes in float32, rounded outwards, to be kept."""
    with np.errstate(over="ignore"):
        a, b = low.astype(np.float32), high.astype(np.float32)
    a = np.where(a > low, np.nextafter(a, np.float32(-np.inf)), a)
    return a, np.where(b < high, np.nextafter(b, np.float32(np.inf)), b)
