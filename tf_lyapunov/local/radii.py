"""The largest radius at which linear functions of the output stay positive, by repeated bounds."""

import dataclasses
import itertools
import math
import time

import numpy as np

from tf_lyapunov.local.around import OutOfTime
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.boxes import CROWN, Effort, Memory, reweigh, surround, weigh
from tf_lyapunov.local.branching import split_lower
from tf_lyapunov.local.flow import trace
from tf_lyapunov.local.forms import Forms, JointAround
from tf_lyapunov.local.regions import Region, check_norm
from tf_lyapunov.local.searching import SearchFlow

# Relative distance between a proved radius and one that is not, at which the search ends.
_TOLERANCE, _TOLERANCE_LARGE = 8e-3, 2e-2
# Share of the centre's margin that searches in float32 leave for the proof, in large flows.
_ROOM = 0.01
_EVALUATIONS, _FAILURES = 9, 12
# Of the least radius that fails, what may be left where no radius is known.
_SHARE = 1e-2
_LARGEST = 1e9
# Larger radii that splits are tried for, where hidden steps are narrow and where they are not.
_MANY, _ENOUGH = 20, 4
# First growth of a radius that splits are tried for, units split, and ascent steps on a branch.
_GROWTH, _SPLITS, _SPLIT_STEPS = 1.06, 6, 40
# Share of the largest margin that splits found in single precision leave for the proof.
_SPARE = 1e-4
# Proofs that are tried, the least share a radius gives way after one that failed, by how much more
# than the bound's slope says, and the most.
_PROOFS, _RETREAT, _MORE, _MOST = 6, 1e-4, 1.25, 0.5
# Lanczos steps of proofs by `forms`.
_LANCZOS = 8
# Share of the linearisation's radius at which the search of a large flow begins.
_FIRST_LARGE = 0.3
# Share of the centre's margin that bounds may miss for the next radius to be by their slopes.
_NEAR = 0.3
FULL = Effort()
# The first search around an input, and later ones, which begin where it ended.
_SMALL = FULL, Effort(box_steps=4, box_trials=(0.0, 0.3), margin_steps=25)
_LARGE = Effort(box_steps=4, margin_steps=30), Effort(0, (0.0,), 12, (0.0,))
# Entries of all signals together from which on searches are short.
_ENTRIES = 4000


@dataclasses.dataclass
class Answer:
    """A proved radius.

    Attributes:
        radius: float, 0 where nothing is proved.
        multipliers: of the rows, by position, at that radius; None without a proof. Where the
            proof takes balls and input as one problem (`forms`), those of the plain one.
        memory: `Memory` of that search.
        evaluations: radii that were tried.
        trace: `Trace` at the input.
        unsplit: what the multipliers prove without splits of units, at most `radius`.
        splits: dict from rows to `branching.Branches`, which prove them at `radius`.
        joint: multipliers of the rows for `forms`, by position; empty where none were looked for.
    """

    radius: float
    multipliers: dict | None = None
    memory: Memory | None = None
    evaluations: int = 0
    trace: object = None
    unsplit: float = 0.0
    splits: dict = dataclasses.field(default_factory=dict)
    joint: dict = dataclasses.field(default_factory=dict)

    def rescaled(self, power):
        """The same of rows that are 2^power times smaller: λ is in proportion to them."""
        held = [self.multipliers or {}, self.joint]
        held += [b.multipliers for b in self.splits.values()]
        for m in itertools.chain(*(h.values() for h in held)):
            m.log_lam = m.log_lam - m.log_lam.dtype.type(power * math.log(2.0))
        return self


class Prover:
    """Bounds of one flow around many inputs.

    Args:
        flow: `Flow`.
        norm: `"l2"`, `"linf"` or `"l1"`.
        bounds: `(low, high)` of valid inputs, or None.
        efforts: `(first, later)` `Effort`s of a search; by default by the size of the flow.
    """

    def __init__(self, flow, norm="l2", bounds=None, efforts=None):
        check_norm(norm)
        self.flow, self.norm, self.bounds, self.efforts = flow, norm, bounds, efforts
        self.search = SearchFlow(flow, norm == "l2" and bounds is None)

    def region(self, x, radius):
        """The region of one input."""
        return Region.ball(x, radius, self.norm, self.bounds)

    def evaluate(self, traced, radius, rows, effort, memory, held=None, deadline=np.inf,
                 joint=None):  # fmt: skip
        """Searches multipliers at one radius: `(bounds, multipliers)`, nothing proved.

        Args:
            traced: `(trace, search trace)`.
            radius: float.
            rows: float64 (rows, outputs).
            effort: `Effort`.
            memory: `Memory`, renewed.
            held: multipliers of the rows at a similar radius, or None.
            deadline: see `Around`.
            joint: dict of multipliers for `forms`, renewed, which then count as well; or None.
        """
        region = self.search.region(self.region(traced[0].values[0][0], radius))
        around = surround(
            self.search.flow,
            traced[1],
            region,
            effort,
            memory,
            dtype=np.float32,
            deadline=deadline,
        )
        c = rows.astype(np.float32).reshape(len(rows), *around.trace.shape(self.flow.output))
        target = self.flow.output
        if effort.balls:
            first = {}
            around.backward(c, target, first)
            adopt(first, held or {}, np.arange(len(rows)))
            weigh(around, c, target, first, memory)
        multipliers, found = tried(around, c, target, trials=effort.margin_trials)
        if held is not None:
            units = np.arange(len(rows))
            adopt(multipliers, held, units)
        if multipliers and effort.margin_steps:
            found = ascend(around, c, target, multipliers, effort.margin_steps)
        if joint is not None and multipliers and Forms.apply_to(around):
            before, own = dict(joint), {k: m.copy() for k, m in multipliers.items()}
            adopt(own, before, np.arange(len(rows)))
            better = ascend(JointAround(around), c, target, own, effort.margin_steps)
            found = np.fmax(found, better)
            joint.update(own)
        return found.astype(np.float64), multipliers

    def prove(self, traced, radius, rows, memory, held, balls=True, joint=None):
        """Proved lower bounds of `rows` over the region, float64 (rows,).

        Args:
            memory, held: multipliers of boxes and rows; any are valid.
            joint: those for `forms`, or None.
        """
        region = self.region(traced.values[0][0], radius)
        effort = dataclasses.replace(FULL, balls=balls)
        around = surround(self.flow, traced, region, effort, memory.copy(), proof=True)
        reweigh(around, memory)
        c = rows.reshape(len(rows), *traced.shape(self.flow.output))
        multipliers = {}
        around.backward(c, self.flow.output, multipliers)
        adopt(multipliers, held, np.arange(len(rows)))
        found = around.lower(c, self.flow.output, multipliers)
        if joint and Forms.apply_to(around):
            adopt(multipliers, joint, np.arange(len(rows)))
            other = JointAround(around, _LANCZOS, True).lower(c, self.flow.output, multipliers)
            found = np.maximum(found, other)
        return found

    def radius(self, x, rows, need, start=0.0, deadline=np.inf, split_deadline=np.inf,
               traced=None):  # fmt: skip
        """`Answer` with the largest radius found at which every row exceeds its need.

        Args:
            x: one input, as the model receives it, in float64.
            rows: float64 (rows, outputs).
            need: function of a radius, float: what every row must exceed there.
            start: a radius that is known already; nothing below it is looked for.
            deadline: `time.monotonic()` at which the search stops.
            split_deadline: the same for splits of units.
            traced: `Trace` at x, made here by default.
        """
        traced = trace(self.flow, x) if traced is None else traced
        # Margins of the size of one: searches in float32 know neither 1e-40 nor 1e40.
        power = _power(rows @ traced.values[-1].reshape(-1))
        scaled = np.ldexp(rows, power), lambda r: math.ldexp(need(r), power)
        answer = self._radius(x, traced, *scaled, start, deadline, split_deadline)
        return answer.rescaled(power)

    def _radius(self, x, traced, rows, need, start, deadline, split_deadline):
        pair = traced, self.search.trace(traced)
        large = sum(v.size for v in traced.values) > _ENTRIES
        efforts = self.efforts or (_LARGE if large else _SMALL)
        center = rows @ traced.values[-1].reshape(-1) - need(0.0)
        # Nobody asks for more, and numbers of the size of a format's end are no place to search.
        most = _LARGEST * (1.0 + float(np.max(np.abs(x), initial=0.0)))
        if not np.all(center > 0) or not start < most:
            return Answer(0.0)
        guess = min(self._guess(traced, rows, center), most, 2 * self._extent(x))
        height = float(center.min())
        low, high = 0.0, np.inf
        radius = max((_FIRST_LARGE if large else 0.6) * guess, start * 1.02)
        memory, held, best, joint = Memory(), None, None, {} if large else None
        count, tolerance = 0, _TOLERANCE_LARGE if large else _TOLERANCE
        failed = 0  # before the first success
        while count - max(failed - 1, 0) < _EVALUATIONS and failed < _FAILURES:
            if time.monotonic() >= deadline:
                break
            effort = efforts[0 if count == 0 else 1]
            try:
                # What single precision does not hold is no bound.
                with np.errstate(over="ignore", invalid="ignore"):
                    found, held = self.evaluate(
                        pair, radius, rows, effort, memory, held, deadline, joint
                    )
            except OutOfTime:
                break
            value = float(np.min(found)) - need(radius) - (_ROOM * height if large else 0.0)
            count += 1
            if not np.isfinite(value):
                value = -10 * height
            if value > 0:
                best = radius, held, memory.copy(), dict(joint or {})
                low, above = radius, value
            else:
                high, below = radius, value
                failed += low == 0
            if high <= max(low * (1 + tolerance), start):
                break
            # Bounds fall like height·(1 - r/guess) - curvature·r², the curvature growing slowly.
            curvature = (height * (1 - radius / guess) - value) / radius**2
            root = _root(height, height / guess, curvature) * (1 - tolerance / 2)
            if value > 0 and root <= radius * (1 + tolerance):
                break
            if large and 0 < low < high < np.inf:
                # Bounds are known on both sides of the root.
                root = low + (high - low) * above / (above - below) * (1 - tolerance)
            if high < np.inf and not low < root < high:
                root = (low + high) / 2
            if low == 0 and failed > 1:
                # Slopes at the input say nothing here, as behind a softmax that is saturated there;
                # or roots are approached from above, where a little less is enough.
                if value < -_NEAR * height:
                    root = min(root, math.sqrt(max(start, _SHARE * high) * high))
                else:
                    root *= 1 - 2 * tolerance
            radius = max(min(root, 2 * radius), start * 1.001)
            if radius > most:
                break
        answer = self._proved(traced, rows, need, best, start, count)
        if answer.radius > 0 and not large:
            self._branched(pair, rows, need, answer, min(deadline, split_deadline))
        return answer

    def _branched(self, pair, rows, need, answer, deadline):
        """Enlarges a proved radius by splits of units, while time lasts."""
        traced = pair[0]
        growth, width = _GROWTH, sum(v.size for v in traced.values[1:-1])
        for _ in range(_MANY if width < 1.2 * traced.values[0].size else _ENOUGH):
            if growth <= 1 + _TOLERANCE / 2 or time.monotonic() > deadline:
                break
            radius = answer.radius * growth
            region = self.region(traced.values[0][0], radius)
            try:
                memory = answer.memory.copy()
                around = surround(self.flow, traced, region, FULL, memory, proof=True)
                reweigh(around, memory)
                finder = self._finder(pair[1], region, memory.copy())
                around.deadline = finder.deadline = deadline
                c = rows.reshape(len(rows), *traced.shape(self.flow.output))
                multipliers = {}
                around.backward(c, self.flow.output, multipliers)
                adopt(multipliers, answer.multipliers, np.arange(len(rows)))
                found = around.lower(c, self.flow.output, multipliers)
                splits = {}
                # Beyond what single precision may have lost.
                stop = need(radius) + _SPARE * float(np.max(np.abs(found)))
                # The worst first: if it stays open, the others need no splits.
                for i in np.argsort(found):
                    if found[i] <= need(radius):
                        held = {k: m.of_rows([i]) for k, m in multipliers.items()}
                        row = rows[i : i + 1]
                        bound, splits[int(i)] = split_lower(
                            around, row, held, _SPLITS, _SPLIT_STEPS, finder, stop
                        )
                        found[i] = bound[0]
                    if found[i] <= need(radius):
                        break
            except OutOfTime:
                return
            if np.all(found > need(radius)):
                answer.radius, answer.splits = radius, splits
            else:
                growth = 1 + (growth - 1) / 3

    def _finder(self, traced, region, memory):
        """`Around` of the search flow, whose boxes and weights are those remembered."""
        region = self.search.region(region)
        with np.errstate(over="ignore", invalid="ignore"):
            found = surround(
                self.search.flow, traced, region, FULL, memory, dtype=np.float32, proof=True
            )
            reweigh(found, memory)
        return found

    def _extent(self, x):
        """Distance beyond which the bounds leave no valid input; infinite without bounds."""
        if self.bounds is None:
            return np.inf
        low, high = self.bounds
        away = np.maximum(np.abs(high - x), np.abs(x - low)).ravel()
        order = {"l2": 2, "linf": np.inf, "l1": 1}[self.norm]
        return max(float(np.linalg.norm(away, order)), np.finfo(np.float32).tiny)

    def _guess(self, traced, rows, center):
        """Where the linearisation at the input reaches zero."""
        scale = max(float(np.max(np.abs(traced.values[0]))), 1.0) * 1e-6
        around = surround(self.flow, traced, self.region(traced.values[0][0], scale), CROWN)
        c = rows.reshape(len(rows), *traced.shape(self.flow.output))
        found, _, _ = around.backward(c, self.flow.output, {})
        slopes = np.maximum((rows @ traced.values[-1].reshape(-1) - found) / scale, 1e-30)
        return float(np.min(center / slopes))

    def _proved(self, traced, rows, need, best, start, count):
        if best is None:
            return Answer(0.0, evaluations=count)
        radius, held, memory, joint = best
        # Bounds fall by twice their height over the last radius, about.
        slope = 2 * float(np.min(rows @ traced.values[-1].reshape(-1))) / radius
        missed, least, tried_before = 0.0, _RETREAT, None
        for _ in range(_PROOFS):
            smaller = radius * (1 - missed)
            if smaller <= start:
                break
            found = self.prove(traced, smaller, rows, memory, held, joint=joint)
            value = float(np.min(found)) - need(smaller)
            if value > 0:
                return Answer(smaller, held, memory, count, traced, smaller, joint=joint)
            if tried_before is not None and tried_before[0] > smaller:
                slope = min(slope, (value - tried_before[1]) / (tried_before[0] - smaller))
            tried_before = smaller, value
            away = _MORE * -value / (slope * radius) if slope > 0 and np.isfinite(value) else 0.0
            missed, least = min(missed + max(away, least), max(_MOST, missed + least)), 10 * least
        return Answer(0.0, evaluations=count)


def _power(margins):
    """Exponent of the power of two by which the least of them is of the size of one."""
    least = float(np.min(margins))
    return -math.frexp(least)[1] if least > 0 and math.isfinite(least) else 0


def _root(height, slope, curvature):
    """Positive root of height - slope·r - curvature·r², or a large number."""
    square = slope**2 + 4 * curvature * height
    below = slope + np.sqrt(max(square, 0.0))
    return 2 * height / below if below > 0 and square > 0 else 1e30


def adopt(multipliers, held, rows):
    """Takes over the multipliers of the same rows from another search, where steps are shared."""
    for k, own in multipliers.items():
        if k in held:
            own.adopt(held[k], rows, rows)


def margin_rows(classes, label):
    """Rows of f_label - f_j for all j ≠ label, or ±f of a single output."""
    if classes == 1:
        return np.array([[1.0 if label == 1 else -1.0]])
    rows = -np.eye(classes)[np.arange(classes) != label]
    rows[:, label] = 1.0
    return rows
