"""Whether a property holds for all inputs of a region: proved, refuted, or unknown."""

import dataclasses

import numpy as np

from tf_lyapunov.digits import at_least
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.around import OutOfTime
from tf_lyapunov.local.ascent import tried
from tf_lyapunov.local.attacking import Attacker, Counterexample
from tf_lyapunov.local.boxes import CROWN, Effort, Memory, surround_proved
from tf_lyapunov.local.clock import Clock
from tf_lyapunov.local.domains import Domains
from tf_lyapunov.local.inputtree import InputTree
from tf_lyapunov.local.outputs import read_around
from tf_lyapunov.local.property import Property, Unsafe
from tf_lyapunov.local.propertyfiles import save_property
from tf_lyapunov.local.ranges import Source
from tf_lyapunov.local.regions import Region
from tf_lyapunov.local.unittree import UnitTree
from tf_lyapunov.program import rounding
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.logits import LogitsModel, check_single_output
from tf_lyapunov.progress import reports_progress, stage
from tf_lyapunov.showing import Page, Shown
from tf_lyapunov.theory.arguments import checked_seconds

BRANCHING = ("inputs", "units")
PROVED, REFUTED, UNKNOWN = "PROVED", "REFUTED", "UNKNOWN"
# Inputs that may change, up to which these are split rather than hidden units.
_FEW = 8
# Of regions that are boxes, whose balls say nothing.
_BOXED = Effort(20, (0.0,), 60, (0.0,), False, 0.15, None)
# What is searched on top of that, where it took at most this share of the time.
_FURTHER, _SHARE = dataclasses.replace(_BOXED, box_steps=60), 0.1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Verification(Shown):
    """What was found of a property over a region.

    The margin of outputs is how far they are from breaking it: the smallest over its unsafe sets
    {y : A y ≤ b} of the largest entry of A y - b.

    Attributes:
        status: `"PROVED"`, `"REFUTED"` or `"UNKNOWN"`.
        bound: proved lower bound of the margin over the region, -inf where none was reached.
        least: smallest margin that was found at a point of the region, up to rounding.
        counterexample: `attacking.Counterexample` (`.x`, `.outputs`, `.margin`), or None.
        branches: parts of the region that were bounded.
        open: parts that are left.
        seconds: that it took.
        timeout: seconds that were allowed.
        text: the property in words.
        unsafe: `property.Unsafe`, the property as it was resolved.
        leaves: boxes `(low, high)` on which it was proved if the region was split along its inputs
            (`inputtree.ProvedBoxes`), empty if it was not split, None if otherwise.
        tree: `unittree.UnitTree` that proved it by splits of hidden units, or None.
        source: `ranges.Source`, what a proof file is made of.
    """

    status: str
    bound: float
    least: float
    counterexample: Counterexample | None
    branches: int
    open: int
    seconds: float
    timeout: float
    text: str
    unsafe: Unsafe | None = dataclasses.field(default=None, repr=False)
    leaves: list | None = dataclasses.field(default=None, repr=False)
    tree: UnitTree | None = dataclasses.field(default=None, repr=False)
    source: Source | None = dataclasses.field(default=None, repr=False)

    def save(self, path, timeout=None):
        """Writes a proof file (`.npz`) of a property that is PROVED: the region and its parts.

        `tf_lyapunov.verification.verify` and `tf-lyapunov verify` re-check it from the model's
        weights alone: on the region as a whole with the multipliers found, on every box of a
        partition along the inputs, or on every part of one by hidden units (and inputs), with the
        slopes that prove it. Parts that the verifier's own bounds do not prove are parted further.

        Args:
            path: file name; an existing file is replaced.
            timeout: seconds for it, or None: all parts are bounded once more, which takes about as
                long as the proof did.

        Raises:
            ValueError: if the property is not proved, or on a ball by splits of its inputs, or on
                too many parts for a file, or about what is behind a softmax or sigmoid; if the
                model has changed since; if the time is up; or if `verify` would refuse the two.
                Nothing is written then.
            UnsupportedLayerError: naming a layer that the verifier does not know.
        """
        save_property(self, path, timeout)

    @property
    def is_proved(self):
        """Whether the property holds on the whole region."""
        return self.status == PROVED

    @property
    def is_refuted(self):
        """Whether an input of the region breaks it."""
        return self.status == REFUTED

    def _rows(self, digits):
        rows = [
            ("property", self.text),
            ("status", self.status),
            ("margin, proved", f"at least {at_least(self.bound, digits)}"),
            ("margin, found", f"{self.least:.{digits}g}"),
            ("branches", f"{self.branches} bounded, {self.open} open"),
            ("seconds", f"{self.seconds:.2f} of {self.timeout:g}"),
        ]
        if self.counterexample is not None:
            outputs = np.array2string(self.counterexample.outputs, precision=digits, threshold=10)
            rows.append(("counterexample", f"outputs {' '.join(outputs.split())}"))
        return rows

    def _page(self):
        rows = [row for row in self._rows(4) if row[0] not in ("status", "property")]
        notes = (f"Property: {self.text}",)
        return Page(f"Verification {self.status}", tuple(rows), notes=notes)

    def __str__(self):
        rows = self._rows(6)
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@takes_networks
@reports_progress
def verify_property(model, region, property, *, timeout=60.0, outputs="logits", branching=None,
                    effort=None, seed=0):  # fmt: skip
    """Whether f(x) satisfies a property for every x of a region.

    PROVED is about the exact function f of the model's settings and of its weights as cast for
    inference, as `certify` is: a lower bound of the margin, in float64 with a bound on its
    rounding, is positive (not negative, for `linear`) on every part of a partition of the region.
    REFUTED comes with an input that lies in the region exactly, in the model's own format, at which
    both break the property: the model itself, called on it, and f, by its float64 evaluation with a
    bound on its rounding. UNKNOWN says how far the bound came. Differences that the model's own
    rounding decides are left unknown.

    Few inputs (up to 8 that may change) are split themselves; otherwise hidden units are, at the
    corners of their activation. Both are complete for piecewise linear networks, given time, where
    the margin is not zero. Max pools, softmax and normalisations are bounded, not split,
    and steps without a relaxation pass their gain: splits of hidden units alone do not close what
    these lose.

    Args:
        model: a built Keras model of supported layers with one input.
        region: `Region` of inputs as the model receives them.
        property: `Property` of the outputs.
        timeout: positive number of seconds; exceeded by the last batch at most.
        outputs: `"logits"` stops before a final softmax or sigmoid, `"model"` includes it.
        branching: `"inputs"`, `"units"`, or None for what fits.
        effort: `boxes.Effort` of the bounds of the whole region, or None.
        seed: of the attack's random points.
        progress: whether to show how far it is, after two seconds; `None`: in a terminal and a
            notebook. Ctrl-C leaves nothing behind.

    Returns:
        `Verification`.

    Raises:
        UnsupportedLayerError: naming a step without a proven gain.
        ValueError: for a property of outputs that do not exist, a region of another shape than
            the input's, a timeout that is not positive.

    Example:

    >>> import keras
    >>> dense = keras.layers.Dense(2, kernel_initializer="identity", activation="relu")
    >>> model = keras.Sequential([keras.Input((2,)), dense])
    >>> region = Region.ball(np.array([3.0, 1.0]), 0.9, "linf")
    >>> verify_property(model, region, Property.classified_as(0)).status
    'PROVED'
    >>> found = verify_property(model, region, Property.linear([1.0, 0.0], 3.5))
    >>> found.status, bool(found.counterexample.outputs[0] > 3.5)
    ('REFUTED', True)

    Reference: Bunel et al. (2020), Branch and bound for piecewise linear neural network
    verification; Wang et al. (2021), Beta-CROWN, whose multipliers of splits are g here.
    """
    _check(model, region, property, timeout, branching)
    clock = Clock(timeout)
    with stage("reading the model"):
        network, flow, traced = read_around(model, region, outputs)
        size = traced.values[-1].size
        if outputs == "model" and property.has_labels and size == 1 and network.decision:
            raise ValueError(
                "The class of a single probability is a matter of its logit. Received: a property "
                "`classified_as` with outputs='model'. Use outputs='logits'."
            )
        unsafe, digest = property.resolved(size), network.digest()
    rng = np.random.default_rng(seed)
    attacker = Attacker(network, flow, region, unsafe, outputs, rng)
    if property.has_labels and size == 1 and network.decision is None:
        kind = "float32" if attacker.dtype == "bfloat16" else attacker.dtype
        own, x = LogitsModel(network), region.center[None].astype(kind)
        check_single_output(network, own, [x], own.predict([x], 1))
    search = _Search(flow, traced, region, unsafe, attacker, clock)
    with stage("attacking"):
        found = attacker.search(stop=clock.is_up)
    if found is None:
        found = search.run(branching, effort)
    if found is not None:
        status = REFUTED
    else:
        status = PROVED if search.is_proved else UNKNOWN
    return Verification(
        status,
        search.bound,
        attacker.least,
        found,
        search.branches,
        search.open,
        clock.passed(),
        clock.timeout,
        str(property),
        unsafe,
        search.leaves,
        search.tree,
        Source(network, flow, traced, region, unsafe.rows, *search.whole, outputs, digest),
    )


class _Search:
    """Bounds of the whole region, then of its parts.

    Attributes:
        bounds: float64 (sets,), what is proved of each unsafe set so far.
        branches, open: numbers of parts.
        is_proved: whether nothing is open.
        leaves: see `Verification`.
        tree: see `Verification`.
        whole: `(memory, multipliers)` of the whole region.
    """

    def __init__(self, flow, traced, region, unsafe, attacker, clock):
        self.flow, self.traced, self.region = flow, traced, region
        self.unsafe, self.attacker, self.clock = unsafe, attacker, clock
        self.bounds = np.full(len(unsafe.starts), -np.inf)
        self.branches, self.open, self.is_proved = 0, 1, False
        self.bound, self.leaves, self.whole = -np.inf, None, (None, None)
        self.tree = None

    def run(self, branching, effort):
        """A counterexample, or None."""
        moving = int(np.sum(self.attacker.high > self.attacker.low))
        if branching is None:
            branching = "inputs" if moving <= _FEW else "units"
        try:
            with stage("bounding the region"):
                memory = Memory()
                around = self._around(CROWN, memory)
                open_ = self._whole(around, memory)
            if not len(open_):
                self.leaves = []
                return None
            if branching == "inputs":
                tree = InputTree(Domains(around), self.unsafe, self.attacker, self.clock)
                with stage("parts of the region") as entered:
                    tree.run(self.bound, entered.advance)
            else:
                with stage("bounding the region"):
                    memory, around, effort = self._searched(effort)
                self.whole = memory, self.whole[1]
                tree = UnitTree(around, self.unsafe, self.attacker, self.clock)
                before = {int(i): float(self.bounds[i]) for i in open_}
                with stage("branches") as entered:
                    tree.run(effort.margin_steps, before, entered.advance)
        except OutOfTime:
            return None
        closed = np.delete(self.bounds, open_)
        self.branches += tree.branches
        self.open = tree.open
        self.is_proved = tree.open == 0 and tree.counterexample is None
        if branching == "inputs":
            self.leaves = tree.leaves if self.is_proved and self._is_box() else None
            self.bound = max(self.bound, tree.bound)
        else:
            self.bound = max(self.bound, min(tree.bound, float(closed.min(initial=np.inf))))
            self.tree = tree if self.is_proved else None
        return tree.counterexample

    def _is_box(self):
        return bool(np.isinf(min(self.region.radius, self.region.radius_l1)))

    def _around(self, effort, memory=None):
        """Proved boxes of the whole region, by multipliers that were searched first."""
        return surround_proved(
            self.flow, self.traced, self.region, effort, memory, deadline=self.clock.deadline
        )

    def _searched(self, effort):
        """`(memory, around, effort)` of the whole region, by multipliers searched for longer."""
        memory, begin = Memory(), self.clock.passed()
        balls = bool(np.isfinite(self.region.radius))
        own = effort or (Effort() if balls else _BOXED)
        around = self._around(own, memory)
        spent = self.clock.passed() - begin
        if effort is None and not balls and spent < _SHARE * self.clock.timeout:
            # Boxes of hidden units are what every branch rests on.
            around = self._around(_FURTHER, memory)
        return memory, around, own

    def _whole(self, around, memory):
        """Bounds every set on the whole region; gives those that are open."""
        target = self.flow.output
        c = self.unsafe.rows.reshape(-1, *around.trace.shape(target))
        multipliers, _ = tried(around, c, target, trials=CROWN.margin_trials)
        self.whole = memory, multipliers
        lower = around.lower(c, target, multipliers) - self.unsafe.bounds
        excess = rounding.down(lower)[None]
        self.branches = 1
        self.bounds = self.unsafe.of_rows(excess)[0]
        self.bound = float(self.bounds.min())
        open_ = np.flatnonzero(~self.unsafe.holds(excess)[0])
        self.open, self.is_proved = len(open_), not len(open_)
        return open_


def _check(model, region, property, timeout, branching):
    if not isinstance(region, Region):
        raise TypeError(
            "`region` must be a `Region`. Received: an object of type "
            f"{type(region).__name__}. Use `Region.ball` or `Region.box`."
        )
    if not isinstance(property, Property):
        raise TypeError(
            "`property` must be a `Property`. Received: an object of type "
            f"{type(property).__name__}. Use `Property.classified_as`, `linear` or `avoids`."
        )
    checked_seconds("timeout", timeout)
    if branching is not None and branching not in BRANCHING:
        raise ValueError(
            f"`branching` must be one of {BRANCHING}, or None. Received: branching={branching!r}."
        )
    shape = getattr(model, "input_shape", None)
    if isinstance(shape, (list, dict)) and len(shape) > 1:
        raise UnsupportedLayerError(
            f"`verify_property` needs a model with one input. Received: {len(shape)} inputs. "
            "Concatenate them inside the model."
        )
    if isinstance(shape, tuple) and not _fits(shape[1:], region.center.shape):
        raise ValueError(
            f"A region must have the shape of one input, {shape[1:]}. Received: a region of shape "
            f"{region.center.shape}."
        )


def _fits(shape, own):
    if len(shape) != len(own):
        return False
    return all(n is None or n == m for n, m in zip(shape, own, strict=True))
