"""Branch and bound on hidden units: their boxes split at corners, the worst branch first.

On a branch (L) of `relaxation` holds with the smaller box, and g of a unit that was split is the
multiplier of what makes it smaller. Multipliers of a branch begin where its parent's ended. A
branch without a unit left to split is split along the input.
"""

import copy
import dataclasses
import heapq
import time

import numpy as np

from tf_lyapunov.local.around import OutOfTime
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.domains import Domains, narrowed
from tf_lyapunov.local.leaves import Leaves
from tf_lyapunov.local.lines import breaks_of, lines_of
from tf_lyapunov.local.partition import Partition
from tf_lyapunov.local.relaxation import Elementwise, Multipliers
from tf_lyapunov.local.tree import Tree
from tf_lyapunov.program import rounding

_FIRST, _MOST, _SECONDS = 4, 256, 0.6
_STEPS, _LOOK, _ROWS = 20, 8, 16
# Units behind the first activation, up to which their boxes are bounded anew on every branch.
_REFRESHED = 512
# Weight of a choice's better part beside its worse one.
_BETTER = 0.1
# Of ascents: steps of shares lose at first, so that nobody is to lose patience.
RATE = 0.07


@dataclasses.dataclass(eq=False)
class Branch:
    """Part of a region, for one unsafe set.

    Attributes:
        number: of the unsafe set.
        bound: proved lower bound of the largest of its rows, A y - b.
        splits: dict from (position, unit) to (low, high).
        box: (low, high) of the input, flat, or None for the region's own.
        held: dict from positions to `Multipliers` of the set's rows.
        choices: list of what may be split next, best first: (position, unit, point), position 0
            for the input.
        boxes: dict from positions that activations read to `(low, high)`, in float32, where boxes
            are bounded again on every branch.
        since: position of the last split, behind which boxes may be tighter now.
        path: the splits that lead here, see `partition.Leaf`.
        evidence: `partition.Evidence` of a bound that is enough, or None.
        depth: number of splits.
    """

    number: int
    bound: float
    splits: dict
    box: tuple | None
    held: dict
    choices: list
    boxes: dict = dataclasses.field(default_factory=dict)
    since: int = 0
    path: tuple | None = None
    evidence: object = None
    depth: int = 0


class UnitTree(Tree):
    """Branches of one region, split at hidden units.

    Args:
        around: proved `Around` of the whole region, complete.
        unsafe, attacker, clock: of `Tree`; the attacker is shown the minimisers of bounds.
    """

    def __init__(self, around, unsafe, attacker, clock):
        super().__init__(unsafe, attacker, clock)
        self.around = around
        self.around.deadline = clock.deadline
        self.columns = {
            k: step.columns
            for k, step in around.steps.items()
            if isinstance(step, Elementwise) and len(step.columns)
        }
        self.leaves = Leaves(around, self.columns)
        domains = Domains(around)
        sources = {k: around.flow.links[k - 1].inputs[0] for k in self.columns}
        count = sum(len(c) for k, c in self.columns.items() if not domains.affine[sources[k]])
        self.domains = domains if count <= _REFRESHED else None
        # What bounds must exceed, and the parts that are proved, for a proof file.
        self.margin, self.partition = 0.0, Partition(self.domains is not None)
        # Splits of every leaf, at least, and whether points are shown to the attacker.
        self.least, self.attacks = 0, True
        # Whether branches that share the input's box differ in boxes that are all known.
        self._is_shared = not domains.has_ends and set(domains.kept) <= set(sources.values())

    def run(self, steps, before, report=lambda count: None):
        """Splits until nothing is open, a counterexample is found, or time is up.

        Args:
            steps: of ascent for the whole region.
            before: dict from the sets that are open to their bounds so far.
            report: called with the number of branches after every batch.
        """
        whole = [Branch(i, bound, {}, None, {}, []) for i, bound in before.items()]
        whole.sort(key=lambda b: b.bound)
        self._run(whole, steps, report)

    def further(self, leaf, depth, margin, clock):
        """Leaves that part one further, all of them proved anew, or None.

        Args:
            leaf: `partition.Leaf`.
            depth: splits beyond the leaf's own, at least, wherever there is something to split.
            margin: float > 0 that every bound must exceed.
            clock: `Clock`.
        """
        tree = copy.copy(self)
        tree.heap, tree.stuck, tree.closed, tree.counterexample = [], [], np.inf, None
        tree.margin, tree.clock, tree.attacks = margin, clock, False
        tree.least = len(leaf.splits()) + depth
        tree.around.deadline = clock.deadline
        tree.partition = Partition(self.partition.is_renewed)
        branch = Branch(leaf.number, -np.inf, {}, None, {}, [], path=leaf.path)
        for k, unit, point, is_above in leaf.splits():
            branch.splits, branch.box = tree._cut(branch, k, unit, point, is_above)
            branch.depth += 1
        if tree.domains is not None and leaf.path is not None:
            tree._refresh([branch])
            branch.bound = -np.inf
        tree._run([branch], 3 * _STEPS, lambda count: None)
        complete = tree.open == 0 and tree.counterexample is None
        return tree.partition.leaves if complete else None

    def _run(self, whole, steps, report):
        waiting, size, rounds = whole, _FIRST, 0
        try:
            points = []
            # The whole region for some sets at a time, then the worst branches.
            while waiting:
                points += self._evaluate(waiting[:_ROWS], steps)
                waiting = waiting[_ROWS:]
            if self.attacks:
                self.counterexample = self.attacker.search(
                    points[:32], starts=4, stop=self.clock.is_up
                )
            while self.heap and self.counterexample is None:
                self.clock.check()
                begin = time.monotonic()
                waiting = [heapq.heappop(self.heap)[2] for _ in range(min(size, len(self.heap)))]
                children = self._children(waiting)
                if self.domains is not None:
                    self._refresh(children)
                open_ = [c for c in children if c.bound < np.inf]
                self.branches += len(children) - len(open_)
                points = self._evaluate(open_, _STEPS, push=False) if open_ else []
                for child in children:
                    self._settle(child)
                waiting = []
                rounds += 1
                report(len(children))
                self.counterexample = self._shown(points, rounds)
                spent = max(time.monotonic() - begin, 1e-4)
                limit = min(_SECONDS, 0.05 * self.clock.timeout)
                size = int(np.clip(size * np.clip(limit / spent, 0.5, 2.0), 1, _MOST))
        except OutOfTime:
            for branch in waiting:
                self._push(branch)

    def _push(self, branch):
        heapq.heappush(self.heap, (branch.bound, next(self.counter), branch))

    def _settle(self, branch):
        """Puts a bounded branch where it belongs."""
        if self._is_closed(branch) and (branch.depth >= self.least or not branch.choices):
            self.closed = min(self.closed, branch.bound)
            self.partition.add(branch)
        elif not branch.choices:
            self.stuck.append(branch.bound)
        else:
            self._push(branch)

    def _is_closed(self, branch):
        if self.margin:
            return branch.bound > self.margin
        return branch.bound > 0 or (branch.bound == 0 and self._strict(branch))

    def _strict(self, branch):
        start = self.unsafe.starts[branch.number]
        return bool(np.all(self.unsafe.strict[start : start + self.unsafe.lengths[branch.number]]))

    def _shown(self, points, rounds):
        if not self.attacks:
            return None
        found = self.attacker.tried(np.stack(points)) if points else None
        if found is None and points and (rounds & (rounds - 1)) == 0:
            found = self.attacker.search(points[:16], starts=4, steps=20, stop=self.clock.is_up)
        return found

    # Bounds -------------------------------------------------------------------------------------

    def _rows(self, branches):
        starts, lengths = self.unsafe.starts, self.unsafe.lengths
        counts = [int(lengths[b.number]) for b in branches]
        index = np.concatenate(
            [starts[b.number] + np.arange(n) for b, n in zip(branches, counts, strict=True)]
        )
        return index, np.repeat(np.arange(len(branches)), counts)

    def _setting(self, branches, owner):
        """`(around, split)` of rows of branches: their boxes of hidden units, and of the input."""
        around, split = self.around, {}
        for k, columns in self.columns.items():
            source = around.flow.links[k - 1].inputs[0]
            if not any(source in b.boxes or (k, u) in b.splits for b in branches for u in columns):
                continue
            step = around.steps[k]
            low, high = self._unit_boxes(branches, k)
            center = step.center.reshape(1, *step.shape)
            split[k] = Elementwise(
                step.operation,
                center,
                low[owner],
                high[owner],
                step.radius,
                step.all_weights(),
                columns,
            )
            # Of a unit that was split g is free.
            split[k].free = None
        if any(b.box is not None for b in branches):
            around = copy.copy(around)
            around.region = _Boxes(around.region, [b.box for b in branches], owner)
        return around, split

    def _unit_boxes(self, branches, k):
        """Boxes of what link k reads, (branches, units), with the branches' splits."""
        step, source = self.around.steps[k], self.around.flow.links[k - 1].inputs[0]
        low = np.repeat(step.low, len(branches), axis=0)
        high = np.repeat(step.high, len(branches), axis=0)
        for i, b in enumerate(branches):
            if source in b.boxes:
                low[i] = np.maximum(low[i], b.boxes[source][0])
                high[i] = np.minimum(high[i], b.boxes[source][1])
            for (p, unit), (a, z) in b.splits.items():
                if p == k:
                    low[i, unit], high[i, unit] = max(low[i, unit], a), min(high[i, unit], z)
        return low, np.maximum(high, low)

    def _refresh(self, branches):
        """Bounds the boxes of hidden units of every branch anew; closes those that are empty."""
        own = branches
        if self._is_shared and all(b.box is None for b in branches):
            own = branches[:1]
        low, high = (np.stack(v) for v in zip(*map(self._box, own), strict=True))
        boxes = {}
        for k in self.columns:
            source = self.around.flow.links[k - 1].inputs[0]
            found = self._unit_boxes(branches, k)
            if source in boxes:
                found = np.maximum(boxes[source][0], found[0]), np.minimum(
                    boxes[source][1], found[1])  # fmt: skip
            boxes[source] = found
        since = np.array([b.since for b in branches])
        *_, empty = self.domains.propagated(low, high, boxes, self.clock.check, since)
        boxes = {k: narrowed(*v) for k, v in boxes.items()}
        for i, branch in enumerate(branches):
            branch.boxes = {k: (a[i].copy(), b[i].copy()) for k, (a, b) in boxes.items()}
            if empty[i]:
                branch.bound = np.inf

    def _evaluate(self, branches, steps, push=True):
        """Bounds branches, and says what may be split next; gives the points where they are low."""
        index, owner = self._rows(branches)
        around, split = self._setting(branches, owner)
        target = around.flow.output
        c = self.unsafe.rows[index].reshape(len(index), *around.trace.shape(target))
        need = self.unsafe.bounds[index]
        if branches[0].held:
            multipliers = _joined([b.held for b in branches])
        else:
            multipliers, _ = tried(around, c, target)
        stop = need + self.margin + 1e-9 * (1 + np.abs(need))
        if multipliers and steps:
            # Small steps, which lose at first: large ones lead nowhere from where a search ended.
            ascend(around, c, target, multipliers, steps, split=split, stop=stop, rate=RATE,
                   patience=None)  # fmt: skip
        lower = rounding.down(around.lower(c, target, multipliers, split=split) - need)
        _, _, memory = around.backward(c, target, multipliers, record=True, split=split)
        self.branches += len(branches)
        memory = dict(memory)
        best = [int(np.flatnonzero(owner == i)[np.argmax(lower[owner == i])])
                for i in range(len(branches))]  # fmt: skip
        gaps = {k: _gaps(split.get(k) or around.steps[k]) for k in self.columns}
        points = []
        for i, branch in enumerate(branches):
            rows = np.flatnonzero(owner == i)
            branch.bound = max(branch.bound, float(lower[best[i]]))
            branch.held = {k: _shifted(m.of_rows(rows), memory.get(k), rows)
                           for k, m in multipliers.items()}  # fmt: skip
            branch.choices = self._choices(branch, memory, best[i], gaps, split)
            if self._is_closed(branch):
                weights = (index[rows] == index[best[i]]).astype(np.float64)
                branch.evidence = self.partition.evidence(
                    weights, memory, multipliers, best[i], {**around.steps, **split}
                )
            if self._is_leaf(branch) and self.leaves.applies:
                points += self._solve(branch)
            if 0 in memory:
                points.append(memory[0][best[i]])
            if push:
                self._settle(branch)
        return points

    def _is_leaf(self, branch):
        return not self._is_closed(branch) and not any(k for k, _, _ in branch.choices)

    def _solve(self, branch):
        """Bounds an affine branch by a linear program's duals; gives the minimisers."""
        start = self.unsafe.starts[branch.number]
        own = slice(start, start + self.unsafe.lengths[branch.number])
        rows, bounds = self.unsafe.rows[own], self.unsafe.bounds[own]
        around, split = self._setting([branch], np.zeros(1, int))
        target, points = around.flow.output, []
        for weights, multipliers, x in self.leaves.solve(rows, bounds, *self._box(branch), split):
            c = (weights @ rows).reshape(1, *around.trace.shape(target))
            lower = around.lower(c, target, multipliers, split=split) - weights @ bounds
            # Rows may cancel in their combination, which errs by what they are themselves.
            most = np.maximum(*map(np.abs, around.box(target))).reshape(-1)
            size = float(weights @ (np.abs(bounds) + np.abs(rows) @ most))
            lost = rounding.gamma(len(rows) + 32, rounding.UNIT_ROUNDOFF["float64"]) * size
            lower = float(lower[0] - lost) / float(weights.sum())
            # Weights sum to one up to rounding, their own sum up to less.
            branch.bound = max(branch.bound, lower - 1e-12 * abs(lower))
            if self._is_closed(branch):
                _, _, memory = around.backward(c, target, multipliers, record=True, split=split)
                branch.evidence = self.partition.evidence(
                    weights, dict(memory), multipliers, 0, {**around.steps, **split}
                )
            points.append(x.reshape(around.values[0].shape[1:]))
            if not self._is_leaf(branch):
                break
        return points

    def _choices(self, branch, memory, row, gaps, split):
        """What may be split next, by how much its relaxation costs the row that decides."""
        scores = []
        for k, columns in self.columns.items():
            own = memory.get(k)
            if own is None:
                continue
            step = split.get(k) or self.around.steps[k]
            i = row if len(step.low) > 1 else 0
            cost = np.abs(own[0][row]) * gaps[k][i]
            for j in np.argsort(-cost)[: 2 * _LOOK]:
                unit = int(columns[j])
                low, high = float(step.low[i, unit]), float(step.high[i, unit])
                point = _point(step.operation, low, high)
                if cost[j] > 0 and point is not None:
                    scores.append((float(cost[j]), k, unit, point))
        scores.sort(reverse=True)
        if scores:
            return [s[1:] for s in scores[:_LOOK]]
        low, high = self._box(branch)
        width = (high - low) / np.maximum(self.attacker.high - self.attacker.low, 1e-300).ravel()
        unit = int(np.argmax(width))
        point = low[unit] / 2 + high[unit] / 2
        return [(0, unit, float(point))] if low[unit] < point < high[unit] else []

    def _box(self, branch):
        if branch.box is not None:
            return branch.box
        region = self.around.region
        low = rounding.down(self.attacker.low.reshape(-1))
        high = rounding.up(self.attacker.high.reshape(-1))
        return np.maximum(low, region.low.ravel()), np.minimum(high, region.high.ravel())

    def _children(self, branches):
        """The two parts of every branch, by the choice whose worse part is bounded best."""
        pairs = [[self._parts(b, choice) for choice in b.choices] for b in branches]
        several = [i for i, p in enumerate(pairs) if len(p) > 1]
        if several:
            tried_ = [part for i in several for pair in pairs[i] for part in pair]
            bounds = iter(self._glanced(tried_))
            for i in several:
                found = [(next(bounds), next(bounds)) for _ in pairs[i]]
                scores = [min(a, b) + _BETTER * max(a, b) for a, b in found]
                pairs[i] = [pairs[i][int(np.argmax(scores))]]
        return [part for pair in pairs for part in pair[0]]

    def _glanced(self, branches):
        """Bounds of branches with their parents' multipliers, before rounding."""
        index, owner = self._rows(branches)
        around, split = self._setting(branches, owner)
        target = around.flow.output
        c = self.unsafe.rows[index].reshape(len(index), *around.trace.shape(target))
        multipliers = _joined([b.held for b in branches])
        found, _, _ = around.backward(c, target, multipliers, split=split)
        found = found - self.unsafe.bounds[index]
        return [float(found[owner == i].max()) for i in range(len(branches))]

    def _parts(self, branch, choice):
        found = []
        for side in (False, True):
            splits, box = self._cut(branch, *choice, side)
            path = (branch.path, *choice, side)
            # A bound of the whole branch may be enough, where parts need their own.
            bound = -np.inf if self.least else branch.bound
            found.append(
                Branch(branch.number, bound, splits, box, branch.held, [], branch.boxes,
                       choice[0], path, None, branch.depth + 1)
            )  # fmt: skip
        return found

    def _cut(self, branch, k, unit, point, is_above):
        """Splits and box of one side of a branch."""
        splits, box = dict(branch.splits), branch.box
        if k == 0:
            box = tuple(v.copy() for v in self._box(branch))
            box[0 if is_above else 1][unit] = point
        else:
            step = self.around.steps[k]
            low, high = splits.get((k, unit), (step.low[0, unit], step.high[0, unit]))
            splits[k, unit] = (point, high) if is_above else (low, point)
        return splits, box


class _Boxes:
    """A region whose rows have boxes of the input of their own."""

    def __init__(self, region, boxes, owner):
        shape = region.center.shape
        low = [region.low if b is None else b[0].reshape(shape) for b in boxes]
        high = [region.high if b is None else b[1].reshape(shape) for b in boxes]
        self.whole = region
        self.low, self.high = ((np.stack(v) - region.center)[owner] for v in (low, high))

    def minimum(self, c):
        return self.whole.minimum_between(c, self.low, self.high)

    def slack(self, c):
        return self.whole.slack(c)


def _joined(held):
    found = {}
    for k, first in held[0].items():
        parts = [
            None if getattr(first, name) is None else np.concatenate(
                [getattr(h[k], name) for h in held])
            for name in ("share", "log_lam", "shift", "scale")
        ]  # fmt: skip
        found[k] = Multipliers(parts[0], parts[1], first.columns, parts[2], parts[3])
    return found


def _shifted(multipliers, memory, rows):
    """With shifts, whose steps are a share of the coefficients' size."""
    if memory is not None and isinstance(memory, tuple) and len(memory) == 6:
        size = np.abs(memory[0][rows])
        multipliers.scale = 0.3 * size.max(axis=1, keepdims=True) + 1e-30
        if multipliers.shift is None:
            multipliers.shift = np.zeros_like(multipliers.share)
    return multipliers


def _gaps(step):
    """How far the lines around an activation are apart amid its box, (rows, columns)."""
    shape = step.shape
    lines = lines_of(step.operation, step.low, step.high, shape)
    gap = lines.gap(step.low, step.high)
    return np.where(lines.open, gap, 0.0)[:, step.columns]


def _point(operation, low, high):
    """Where to split a unit's box: at the corner nearest its middle, or amid, or None."""
    breaks = breaks_of(operation)
    if breaks is None:
        point = low / 2 + high / 2
        return point if low < point < high else None
    inside = [b for b in breaks if low < b < high]
    return min(inside, key=lambda b: abs(b - (low + high) / 2)) if inside else None
