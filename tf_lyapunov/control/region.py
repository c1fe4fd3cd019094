"""Regions of attraction of plants under a network's control, proved by a matrix inequality."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.control import search, simulation
from tf_lyapunov.control.plants import Plant
from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.showing import Page, Shown
from tf_lyapunov.theory.arguments import finite_float
from tf_lyapunov.verification import archive, loopfiles, loops
from tf_lyapunov.verification.reading import read_with_calls

# Further room taken off an ellipsoid whose proof fails by a hair, and steps of bisections.
_ROOMS, _HALVINGS = (0.0, 1e-5, 1e-4, 1e-3), 24
# Share of the box in which the linearisation is looked at, for the reason of a failure.
_CLOSE = 1e-3
# Part of the box on which narrower sectors are tried, and how often.
_SMALL, _TRIALS = 0.005, 8


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RegionOfAttraction(Shown):
    """A proved ellipsoid of attraction, or why there is none.

    Attributes:
        verdict: `"PROVED"` or `"NOT_PROVED"`.
        matrix: P (n, n), float64: from every x with xᵀPx ≤ 1 the loop goes to 0 without leaving the
            ellipsoid, nor the box. None if no ellipsoid was proved.
        radius: of the largest ball that the ellipsoid holds, rounded down; 0 without one.
        rate: ρ: V(x⁺) ≤ ρ V(x) on the ellipsoid, V = xᵀPx; 1 without one.
        box: h (n,), |x_i| ≤ h_i.
        offset: bound on |π(0)|, which is taken off the control; 0 where π(0) = 0 exactly.
        reason: why the claim is not proved, or "".
        nearest: the nearest claim that is, in words, or "".
        plant: `Plant`.
        controller: the Keras model.
        claim: `verification.loops.LoopClaim`, what a proof file holds, or None.
        seconds: wall time.
    """

    verdict: str
    matrix: np.ndarray | None
    radius: float
    rate: float
    box: np.ndarray
    offset: float
    reason: str
    nearest: str
    plant: Plant
    controller: object
    claim: loops.LoopClaim | None
    seconds: float

    def __bool__(self):
        return self.verdict == "PROVED"

    @property
    def volume(self):
        """Volume of the ellipsoid, its area for two states; 0 without one."""
        if self.matrix is None:
            return 0.0
        n = len(self.box)
        unit = math.pi ** (n / 2) / math.gamma(n / 2 + 1)
        return unit * math.exp(-0.5 * float(np.linalg.slogdet(self.matrix)[1]))

    @property
    def half_widths(self):
        """max |x_i| over the ellipsoid, float64 (n,)."""
        if self.matrix is None:
            return np.zeros(len(self.box))
        return np.sqrt(np.diag(np.linalg.inv(self.matrix)))

    def contains(self, x):
        """Whether states (…, n) are in the ellipsoid, bool (…)."""
        x = np.asarray(x, np.float64)
        if self.matrix is None:
            return np.zeros(x.shape[:-1], bool)
        return np.einsum("...i,ij,...j->...", x, self.matrix, x) * (1 + 1e-12) <= 1

    def attack(self, count=1000, *, steps=300, seed=0, inside=False):
        """Simulates the loop in float64 from the ellipsoid's boundary.

        Args:
            count: number of starts.
            steps: of every trajectory.
            seed: of their directions.
            inside: whether starts are spread over the whole ellipsoid instead.

        Returns:
            `simulation.LoopAttack`; `left` is False everywhere unless the proof is wrong.

        Raises:
            ValueError: without an ellipsoid.
        """
        self._proved("attack")
        starts = simulation.boundary(self.matrix, count, seed)
        if inside:
            shares = np.random.default_rng([seed, 1]).random((count, 1))
            starts = starts * shares ** (1 / len(self.box))
        return simulation.attack(
            self.plant, self._control(), self.matrix, self.rate, self.box, starts, steps
        )

    def compare(self, count=10_000, *, steps=600, seed=0):
        """The ellipsoid beside the starts from which simulations stay in the box and end at 0.

        Returns:
            `simulation.Comparison`, an estimate.

        Raises:
            ValueError: without an ellipsoid.
        """
        self._proved("compare")
        return simulation.compare(
            self.plant, self._control(), self.matrix, self.volume, self.box, count, steps, seed
        )

    def save(self, path):
        """Writes a proof file (`.npz`), which `verification.verify` re-checks by NumPy alone.

        Args:
            path: file name; an existing file is replaced.

        Raises:
            ValueError: without an ellipsoid, or if the controller has changed since. Nothing is
                written then.
        """
        self._proved("save")
        model, network, calls = read_with_calls(self.controller)
        claim = loopfiles.FileClaim(self.claim, self.offset > 0)
        wrong = list(loopfiles.objections(network, claim))
        wrong = wrong or loopfiles.contradictions(model, network, calls, claim)
        if wrong:
            raise ValueError(
                "The verifier could not confirm this region, so no proof file was written: the "
                f"controller may have changed. Received: model {model.name!r}. {' '.join(wrong)}"
            )
        archive.write(path, *loopfiles.pack(network, claim))

    def explain(self):
        """Plain text: what is proved, and what it rests on."""
        lines = [f"{self.verdict}: region of attraction of {self.plant}."]
        if self.matrix is not None:
            widths = ", ".join(at_most(w, 4) for w in self.half_widths)
            lines.append(
                f"Ellipsoid xᵀPx ≤ 1 of volume {self.volume:.5g}, half widths {widths}; it holds "
                f"the ball of radius {at_least(self.radius, 5)}. V falls to "
                f"{at_most(self.rate, 6)} of itself or less in every step."
            )
            said = loops.stated(self.claim)
            lines.append(
                "It concerns exact arithmetic on the controller's weights and the plant's matrices"
                + (f", and rests on {said}." if said else ".")
            )
        if self.offset:
            lines.append(
                f"The controller's value at 0, up to {at_most(self.offset, 3)}, is taken off."
            )
        lines += [text for text in (self.reason, self.nearest) if text]
        return "\n".join(lines)

    def _page(self):
        facts = ()
        if self.matrix is not None:
            facts = (
                ("volume", f"{self.volume:.5g}"),
                ("radius", f"≥ {at_least(self.radius, 5)}"),
                ("rate", f"≤ {at_most(self.rate, 6)}"),
                ("states", len(self.box)),
            )
        notes = tuple(text for text in (self.reason, self.nearest) if text)
        return Page(f"RegionOfAttraction {self.verdict}", facts, notes=notes)

    def _proved(self, what):
        if self.matrix is None:
            raise ValueError(f"`{what}` needs a region that is proved. Received: {self.reason}")

    def _control(self):
        network = read_with_calls(self.controller)[1]
        return simulation.control_of(loops.controller_of(network))


def region_of_attraction(
    plant, controller, box, *, radius=None, rate=0.9999, trim=False, solver="clarabel"
):
    """A proved ellipsoid of states from which the loop x⁺ = Ax + B_q q + Bπ(x) goes to 0 in a box.

    On the part of the box where the first hidden layer's inputs stay within bounds, every
    activation has a sector around its value at rest, and so has every nonlinearity of the plant.
    With them, P ≻ 0 and multipliers make V = xᵀPx fall there (`verification.loops` has the
    inequality and its derivation), and {x: V(x) ≤ 1} lies within that part, so it is never left.
    P is found by cvxpy (extra `sdp`), which maximises the volume over P, and over the bounds by a
    search, so a larger ellipsoid may exist; the inequalities are then proved in float64 with every
    rounding bounded, by the code that re-checks proof files.

    Args:
        plant: `Plant`, with its equilibrium at 0.
        controller: built Keras model from (n,) states to (m,) inputs: dense layers and pointwise
            activations, one after the other.
        box: half widths h (n,), or `(low, high)`, of which the part symmetric around 0 is used.
        radius: the claim, or None for any ellipsoid: every start with ‖x‖₂ ≤ radius goes to 0.
        rate: ρ < 1 by which V falls per step at least; the smallest that is proved is reported.
        trim: whether π(0) ≠ 0 is taken off the control, u = π(x) - π(0).
        solver: `"clarabel"`, `"scs"` or `"mosek"`.

    Returns:
        `RegionOfAttraction`; with a reason and the nearest claim where `"NOT_PROVED"`.

    Raises:
        ValueError: if the box does not hold 0 in its interior, numbers are NaN, the controller is
            not 0 at 0, or shapes do not fit.
        UnsupportedLayerError: naming a layer of the controller.
        ImportError: if cvxpy or the solver is not installed.

    Example: x⁺ = 1.2x + u under u = -tanh x, whose linearisation at 0 is 0.2x:

    >>> import keras
    >>> weights = [np.ones((1, 1)), -np.ones((1, 1))]
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "tanh", use_bias=False),
    ...                           keras.layers.Dense(1, use_bias=False)])
    >>> model.set_weights(weights)
    >>> found = region_of_attraction(Plant([[1.2]], [1.0]), model, [10.0])
    >>> found.verdict, bool(4.7 < found.half_widths[0] < 5.0)  # 1.2x - tanh x = x near 5
    ('PROVED', True)

    Reference: Yin, Seiler and Arcak, Stability analysis using quadratic constraints for systems
    with neural network controllers (2020), sound form.
    """
    begin = time.monotonic()
    if not isinstance(plant, Plant):
        raise TypeError(f"`plant` must be a `Plant`. Received: a {type(plant).__name__}.")
    search.ready(solver)
    box = _half_widths(box, len(plant.state))
    rate = finite_float("rate", rate)
    if not 0 < rate < 1:
        raise ValueError(f"`rate` must be between 0 and 1. Received: rate={rate!r}.")
    if radius is not None and not finite_float("radius", radius) > 0:
        raise ValueError(f"`radius` must be positive. Received: radius={radius!r}.")
    model, network, calls = read_with_calls(controller)
    chain = _chain(network, plant)
    offset, is_away = loopfiles.offset_of(chain)
    if is_away and not trim:
        raise ValueError(
            "The controller must be 0 at the equilibrium x = 0. Received: π(0) = "
            f"{np.array2string(chain.offset, precision=6)}. Leave out biases, or pass `trim=True` "
            "for the loop with u = π(x) - π(0)."
        )
    arrays = plant.arrays()
    claim = _found(arrays, chain, box, rate, solver)

    def result(verdict, claim, reason="", nearest="", inner=0.0):
        matrix = None if claim is None else claim.shape
        ended = 1.0 if claim is None else float(claim.rate[0])
        return RegionOfAttraction(
            verdict, matrix, inner, ended, box, offset, reason, nearest, plant, model, claim,
            time.monotonic() - begin,
        )  # fmt: skip

    if claim is None:
        return result("NOT_PROVED", None, *_why_not(arrays, chain, box, rate, solver))
    wrong = loopfiles.contradictions(
        model, network, calls, loopfiles.FileClaim(claim, bool(offset))
    )
    if wrong:
        raise ValueError(" ".join(wrong))
    inner = loopfiles.inner_radius(claim.shape)
    if radius is not None and not inner >= radius:
        reason = f"The ellipsoid found does not hold the ball of radius {radius:g}."
        nearest = f"Nearest claim that is proved: radius={at_least(inner, 6)}."
        return result("NOT_PROVED", claim, reason, nearest, inner)
    return result("PROVED", claim, inner=inner)


def _half_widths(box, states):
    if isinstance(box, tuple) and len(box) == 2 and np.ndim(box[0]) == 1:
        low, high = (np.array(v, np.float64) for v in box)
        if low.shape != (states,) or high.shape != (states,):
            raise ValueError(
                f"`box` must have one interval per state, {states} in all. Received: shapes "
                f"{low.shape} and {high.shape}."
            )
        if not np.all((low < 0) & (high > 0)):
            raise ValueError(
                "`box` must hold the equilibrium x = 0 in its interior. Received: intervals "
                f"{[(float(a), float(b)) for a, b in zip(low, high, strict=True)]}."
            )
        found = np.minimum(-low, high)
    else:
        found = np.array(box, np.float64)
    if found.shape != (states,) or not np.all(np.isfinite(found) & (found > 0)):
        raise ValueError(
            f"`box` must be {states} positive finite half widths, or `(low, high)`. "
            f"Received: {box!r}."
        )
    return found


def _chain(network, plant):
    if any("int" in dtype for dtype in network.casts):
        raise ValueError(
            "A controller must read real numbers. Received: a model whose input is of type "
            f"{network.casts[0]}."
        )
    try:
        chain = loops.controller_of(network)
    except ValueError as error:
        raise UnsupportedLayerError(
            "A region of attraction needs a controller of dense layers and pointwise activations, "
            f"one after the other. Received: {error}."
        ) from error
    inputs, outputs = chain.weights[0].shape[1], len(chain.weights[-1])
    if (inputs, outputs) != plant.input.shape:
        raise ValueError(
            f"The plant has {plant.input.shape[0]} states and {plant.input.shape[1]} inputs. "
            f"Received: a controller from {inputs} to {outputs} numbers."
        )
    return chain


def _found(arrays, chain, box, rate, solver):
    """A proved `LoopClaim` with the smallest rate that is, or None."""
    for best in search.candidates(arrays, chain, box, rate, solver):
        for room in _ROOMS:
            grow = 1 + room
            claim = loops.LoopClaim(
                arrays, box, best.first, best.reads, best.shape * grow, np.array([rate]),
                best.lam * grow, best.mu * grow,
            )  # fmt: skip
            claim.check()
            if not any(True for _ in loops.objections(claim, chain)):
                return _faster(claim, chain)
    return None


def _faster(claim, chain):
    proved, low = claim, 0.0
    for _ in range(_HALVINGS):
        middle = (low + float(proved.rate[0])) / 2
        tried = dataclasses.replace(claim, rate=np.array([middle]))
        if middle > 0 and not any(True for _ in loops.objections(tried, chain)):
            proved = tried
        else:
            low = middle
    return proved


def _why_not(arrays, chain, box, rate, solver):
    """`(reason, nearest claim)` where no ellipsoid was found."""
    count = len(arrays.kinds)
    form = loops.form_on(arrays, chain, _CLOSE * box, np.inf, np.full(count, np.inf))
    slopes = (np.concatenate([form.alpha, form.low]) + np.concatenate([form.beta, form.high])) / 2
    n, units = len(box), len(form.alpha)
    # w = D(N_x x + N_w w), solved for the middles of the sectors near 0.
    reads = np.concatenate([form.signal, form.gap_reads(form.signal.shape[1])])
    inner = np.eye(units + count) - slopes[:, None] * reads[:, n:]
    follow = np.linalg.solve(inner, slopes[:, None] * reads[:, :n])
    closed = form.motion[:, :n] + form.motion[:, n:] @ follow
    size = float(np.max(np.abs(np.linalg.eigvals(closed))))
    spread = np.concatenate([form.beta - form.alpha, form.high - form.low])
    if size >= 1 and np.max(spread, initial=0.0) < 0.01:
        return (
            f"The loop is not stable at 0: its linearisation has the spectral radius {size:.6g} "
            "(an estimate).",
            "No region of attraction exists around 0. Train the controller to stabilise it first.",
        )
    full = loops.form_on(arrays, chain, box, np.inf, np.full(count, np.inf))
    last = len(full.widths) - count
    first, widths = _SMALL * full.widths[n:last], _SMALL * full.widths[last:]
    low, high = 0.0, 1.0
    for _ in range(_TRIALS):
        blend = (low + high) / 2
        found = search.solve(
            arrays, chain, box, first, widths, rate, solver, rounds=1, blend=blend
        )  # fmt: skip
        low, high = (low, blend) if found is None else (blend, high)
    reason = (
        "No quadratic V falls for all slopes that the sectors allow, on any part of the box that "
        "was tried."
    )
    if low == 0:
        return reason, "None is near: not even with the middles of the sectors is the loop stable."
    return reason, (
        f"Nearest feasible claim: activations and nonlinearities whose slopes stay within "
        f"{100 * low:.3g}% of the half widths of their sectors, around the middles. A lower gain "
        "of the controller, or a smooth activation, narrows them."
    )
