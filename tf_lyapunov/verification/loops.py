"""Regions of attraction of a linear plant with sector nonlinearities under a network's control.

    x⁺ = A x + B_q q + B u,   q_k = ψ_k(s_k),   s = C x,   u = π(x) - π(0),
    π(x) = W_n φ(… φ(W_1 x + b_1) …) + b_n

The claim: from every x with V(x) = xᵀPx ≤ 1, V falls to ρ^t at least, and |x_i| ≤ h_i throughout.

Proof. Let S be all x with |x_i| ≤ h_i, |(W_1 x)_j| ≤ d_j and |s_k| ≤ r_k. In terms of differences
to their values at x = 0, the activations w = φ(v) have v = N_x x + N_w w and u = U_x x + U_w w. On
S every v_i stays in an interval, on which its chords have slopes in [α_i, β_i] (`around.chords`),
and those of ψ_k are in [l_k, L_k]; so, with any λ, μ ≥ 0,

    Σ λ_i (w_i - α_i v_i)(β_i v_i - w_i) + Σ μ_k (q_k - l_k s_k)(L_k s_k - q_k) ≥ 0.           (S)

With x⁺ = Mξ, ξ = (x, w, q), the form of the left side K, and

    ρ xᵀPx - ξᵀMᵀPMξ - ξᵀKξ ≥ 0 for all ξ,                                                      (L)

V(x⁺) ≤ ρV(x) for x in S. The ellipsoid lies in S if for every bound |cᵀx| ≤ d

    [ d²  cᵀ ]
    [ c   P  ] ⪰ 0,                                                                              (E)

for then 2acᵀx + a²d² + V(x) ≥ 0 for all a, hence (cᵀx)² ≤ d²V(x). So it is never left, and
|x_i| ≤ h_i ρ^{t/2}.

Reference: Yin, Seiler and Arcak, Stability analysis using quadratic constraints for systems with
neural network controllers (arXiv 2006.07579), without its integral quadratic constraints.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.verification.arithmetic import (
    SLACK,
    TINY,
    UNIT,
    down,
    gamma,
    is_semidefinite,
    times,
    up,
)
from tf_lyapunov.verification.around.chords import chords
from tf_lyapunov.verification.around.pieces import pieces
from tf_lyapunov.verification.operations import Activation, Identity, Linear

# 1 - sin t/t has its largest value, 1.217233628…, where t = tan t.
_LARGEST_SINE = 1.21724
# Kinds of nonlinearity: of a sector that is stated, and s - sin s.
STATED, SINE = 0, 1
# Activations with φ(0) = 0, whatever their parameters.
_ZERO_AT_ZERO = (
    "linear", "relu", "relu6", "leaky_relu", "elu", "selu", "tanh", "softsign", "silu", "gelu",
    "mish",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Plant:
    """x⁺ = A x + B_q q + B u with q_k = ψ_k(c_kᵀx); arrays are float64 and exact.

    Attributes:
        a, b: (n, n) and (n, m).
        enters, reads: (n, k) and (k, n), B_q and C.
        kinds: int64 (k,), `STATED` or `SINE`.
        sectors: (k, 3): l, L and the width r such that l s² ≤ s ψ(s) ≤ L s² for |s| ≤ r, as stated;
            ignored for `SINE`.
    """

    a: np.ndarray
    b: np.ndarray
    enters: np.ndarray
    reads: np.ndarray
    kinds: np.ndarray
    sectors: np.ndarray

    def check(self):
        """Refuses shapes that do not fit, NaN, and empty sectors."""
        n, count = len(self.a), len(self.kinds)
        if self.a.ndim != 2 or self.a.shape != (n, n) or not n:
            raise ValueError("A is not a square matrix")
        if self.b.ndim != 2 or self.b.shape[0] != n or not self.b.shape[1]:
            raise ValueError("B has not as many rows as A")
        if self.enters.shape != (n, count) or self.reads.shape != (count, n):
            raise ValueError("the nonlinearities do not read and enter the state")
        if self.kinds.shape != (count,) or not np.all(np.isin(self.kinds, (STATED, SINE))):
            raise ValueError("a nonlinearity is of no known kind")
        if self.sectors.shape != (count, 3):
            raise ValueError("there is not one sector for every nonlinearity")
        if not all(np.all(np.isfinite(v)) for v in (self.a, self.b, self.enters, self.reads)):
            raise ValueError("a matrix of the plant is not finite")
        low, high, width = self.sectors.T
        if not np.all((low <= high) & (width > 0) & np.isfinite(low) & np.isfinite(high)):
            raise ValueError("a sector is empty, infinite or NaN")

    def sectors_on(self, widths):
        """`(l, L)` of the nonlinearities on |s_k| ≤ r_k, which stated sectors are about.

        s - sin s: sin s/s falls on (0, π], so that 0 ≤ 1 - sin s/s ≤ 1 - sin r/r there.
        """
        found = np.array(self.sectors[:, :2])
        for k, width in enumerate(widths):
            if self.kinds[k] == SINE:
                found[k] = 0.0, _LARGEST_SINE
                if width <= 3.14:
                    # Of so small arguments the difference is below r²/6.
                    close = float(up(width * width / 6 * (1 + 8 * UNIT)))
                    if width > 1e-3:
                        close = min(close, 1 - math.sin(width) / width + 64 * UNIT)
                    found[k, 1] = close
        return found[:, 0], found[:, 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Controller:
    """A network as weights and activations, and what is at rest when its input is 0.

    Attributes:
        weights, errors: W_l (out, in) of all linear layers, and entrywise errors or 0.0.
        activations: `operations.Activation` between them.
        rests, doubts: v_l at x = 0, and bounds on their errors.
        offset, offset_doubt: (m,), π(0) as computed, and a bound on its error.
    """

    weights: tuple
    errors: tuple
    activations: tuple
    rests: tuple
    doubts: tuple
    offset: np.ndarray
    offset_doubt: np.ndarray

    @property
    def units(self):
        """Number of hidden units."""
        return sum(len(w) for w in self.weights[:-1])


def controller_of(network):
    """`Controller` of a `network.Network` of dense layers and activations, one after the other.

    Raises:
        ValueError: naming a step of another kind.
    """
    weights, errors, kept, rests, doubts = [], [], [], [], []
    size = network.steps[0].shape
    if len(size) != 1:
        raise ValueError(f"its input has the shape {size}, where the plant's state is one vector")
    width = size[0]
    value, noise = np.zeros((1, width)), np.zeros((1, width))
    weight, error = None, 0.0
    name = network.steps[0].name
    for step in network.steps[1:]:
        operation = step.operation
        if step.inputs != (name,):
            raise ValueError(f"step {step.name!r} does not read the step before it")
        name = step.name
        if type(operation) is Identity:
            continue
        if isinstance(operation, Linear) and len(step.shape) == 1:
            if weight is None:
                weight, error = operation.weight, operation.weight_error
            else:
                weight, error = times(operation.weight, weight, operation.weight_error, error)
        elif isinstance(operation, Activation) and operation.name != "linear":
            if weight is None:
                weight, error = np.eye(step.shape[0]), 0.0
            weights.append(weight)
            errors.append(error)
            kept.append(operation)
            rests.append(value[0])
            doubts.append(noise[0])
            weight, error = None, 0.0
        elif not (isinstance(operation, Activation) and operation.name == "linear"):
            raise ValueError(
                f"step {step.name!r} is a {type(operation).__name__}, and not a dense layer or an "
                "activation"
            )
        value, noise = _at_rest(operation, value, noise)
    if weight is None:
        weight, error = np.eye(len(value[0])), 0.0
    return Controller(
        (*weights, weight), (*errors, error), tuple(kept), tuple(rests), tuple(doubts),
        value[0], noise[0],
    )  # fmt: skip


def _at_rest(operation, value, noise):
    """`operation.forward`, in which what is made of exact zeros alone is exact."""
    found, error = operation.forward(value, noise)
    still = (value == 0) & (noise == 0)
    if isinstance(operation, Linear):
        moves = (np.abs(value) + noise) @ (np.abs(operation.weight) + operation.weight_error).T
        exact = (moves == 0) & (np.broadcast_to(operation.bias_error, operation.bias.shape) == 0)
        return np.where(exact, operation.bias, found), np.where(exact, 0.0, error)
    exact = still & (operation.name in _ZERO_AT_ZERO or operation.slopes_at is not None)
    return np.where(exact, 0.0, found), np.where(exact, 0.0, error)


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """What holds on S.

    Attributes:
        motion, motion_error: M (n, n + units + k) and the errors of its entries.
        signal, signal_error: v = N ξ, (units, n + units + k).
        alpha, beta: float64 (units,), of the activations.
        low, high: float64 (k,), of the plant's nonlinearities.
        bounds, bounds_error, widths: (rows, n) and (rows,): |cᵀx| ≤ d on S.
    """

    motion: np.ndarray
    motion_error: np.ndarray
    signal: np.ndarray
    signal_error: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bounds: np.ndarray
    bounds_error: np.ndarray
    widths: np.ndarray

    def matrix(self, shape, rate, lam, mu):
        """The matrix of (L) and the errors of its entries.

        Args:
            shape: P (n, n), symmetric.
            rate: ρ.
            lam, mu: multipliers ≥ 0, (units,) and (k,).
        """
        n, size = len(shape), self.motion.shape[1]
        through, error = times(shape, self.motion, 0.0, self.motion_error)
        pulled, error = times(self.motion.T, through, self.motion_error.T, error)
        total, spread = -pulled, error
        total[:n, :n] += rate * shape
        spread[:n, :n] += 2 * UNIT * np.abs(rate * shape)
        reads = np.concatenate([self.signal, self.gap_reads(size)])
        reads_error = np.concatenate([self.signal_error, np.zeros((len(mu), size))])
        picks = np.eye(size)[n:]
        low, high = np.concatenate([self.alpha, self.low]), np.concatenate([self.beta, self.high])
        weight = np.concatenate([lam, mu])
        # K = Σ λ ((α+β)/2 (vwᵀ + wvᵀ) - αβ vvᵀ - wwᵀ), its products by `times`.
        mean, product = weight * ((low + high) / 2), weight * (low * high)
        doubt = reads_error + 8 * UNIT * np.abs(reads)
        cross, error = times(picks.T, mean[:, None] * reads, 0.0, np.abs(mean)[:, None] * doubt)
        square, own = times(
            reads.T, product[:, None] * reads, reads_error.T, np.abs(product)[:, None] * doubt
        )
        total += square - cross - cross.T
        spread += own + error + error.T
        places = np.arange(n, size)
        total[places, places] += weight
        sizes = np.abs(pulled) + np.abs(square) + np.abs(cross) + np.abs(cross.T)
        sizes[:n, :n] += np.abs(rate * shape)
        sizes[places, places] += weight
        spread = (spread + 16 * UNIT * sizes) * SLACK + TINY
        return (total + total.T) / 2, (spread + spread.T) / 2 * SLACK

    def gap_reads(self, size):
        count = len(self.low)
        # The rows of C come last among the bounds.
        rows = self.bounds[len(self.bounds) - count :]
        return np.concatenate([rows, np.zeros((count, size - rows.shape[1]))], axis=1)


def form_on(plant, controller, box, first, reads):
    """`Form` on S.

    Args:
        plant, controller: `Plant` and `Controller`.
        box: h (n,).
        first: d, of the first hidden layer's units, possibly infinite; empty without one.
        reads: r (k,), possibly infinite.

    Raises:
        ValueError: where shapes do not fit.
    """
    n, count = len(plant.a), len(plant.kinds)
    if controller.weights[0].shape[1] != n or len(controller.weights[-1]) != plant.b.shape[1]:
        raise ValueError(
            f"the controller maps {controller.weights[0].shape[1]} numbers to "
            f"{len(controller.weights[-1])}, the plant has {n} states and {plant.b.shape[1]} inputs"
        )
    reads = np.minimum(_sum_up(np.abs(plant.reads), box), reads)
    # Where stated sectors end, S does.
    ends = np.where(plant.kinds == STATED, plant.sectors[:, 2], np.inf)
    reads = np.minimum(reads, ends)
    low, high = plant.sectors_on(reads)
    alpha, beta, first = _activations(controller, box, first)
    units = controller.units
    size = n + units + count
    signal, signal_error = np.zeros((2, units, size))
    column, row = 0, 0
    for weight, error in zip(controller.weights[:-1], controller.errors[:-1], strict=True):
        places = slice(row, row + len(weight)), slice(column, column + weight.shape[1])
        signal[places], signal_error[places] = weight, error
        column = n if column == 0 else column + weight.shape[1]
        row += len(weight)
    last, error = controller.weights[-1], controller.errors[-1]
    inputs, inputs_error = np.zeros((2, len(last), size))
    places = slice(None), slice(column, column + last.shape[1])
    inputs[places], inputs_error[places] = last, error
    motion, motion_error = times(plant.b, inputs, 0.0, inputs_error)
    motion[:, :n] += plant.a
    motion_error[:, :n] += 2 * UNIT * (np.abs(motion[:, :n]) + np.abs(plant.a))
    motion[:, n + units :] += plant.enters
    some = bool(controller.activations)
    lines, lines_error = [np.eye(n)], [np.zeros((n, n))]
    if some:
        lines.append(controller.weights[0])
        lines_error.append(np.broadcast_to(controller.errors[0], controller.weights[0].shape))
    lines.append(plant.reads)
    lines_error.append(np.zeros_like(plant.reads))
    return Form(
        motion, motion_error * SLACK, signal, signal_error, alpha, beta, low, high,
        np.concatenate(lines), np.concatenate(lines_error),
        np.concatenate([box, first, reads] if some else [box, reads]),
    )  # fmt: skip


def _sum_up(sizes, reach):
    return sizes @ reach * (1 + gamma(sizes.shape[1] + 4)) + TINY


def _activations(controller, box, first):
    """Sectors of all hidden units on S, and the bounds of the first layer's.

    Two bounds of v_l - v_l⁰ side by side: an interval, and |v_l - v_l⁰ - T x| ≤ e with the middles
    of the chords' slopes multiplied into T.
    """
    alphas, betas, kept = [], [], np.zeros(0)
    low, high = -box, box
    middle, middle_error, rest = None, None, None
    for index, operation in enumerate(controller.activations):
        weight, error = controller.weights[index], controller.errors[index]
        point, doubt = controller.rests[index], controller.doubts[index]
        plus, minus = np.maximum(weight, 0.0), np.minimum(weight, 0.0)
        room = (gamma(2 * weight.shape[1] + 8) * np.abs(weight) + error) * SLACK
        room = room @ np.maximum(high, -low) * SLACK + TINY
        low, high = plus @ low + minus @ high - room, plus @ high + minus @ low + room
        if middle is None:
            middle, middle_error, rest = weight, np.broadcast_to(error, weight.shape), 0.0
        else:
            rest = _sum_up(np.abs(weight) + error, rest)
            middle, middle_error = times(weight, middle, error, middle_error)
        reach = _sum_up((np.abs(middle) + middle_error) * SLACK, box) + rest
        if index == 0:
            reach = np.minimum(reach, np.maximum(high, -low))
            reach = np.minimum(reach, first)
            kept = reach
        low, high = np.maximum(low, -reach), np.minimum(high, reach)
        start, stop = down(point + low - doubt), up(point + high + doubt)
        alpha, beta = chords(operation, point, doubt, start, stop)
        alphas.append(alpha)
        betas.append(beta)
        # What w - w⁰ can be: by chords, and by the function's range.
        value, noise = (v[0] for v in operation.forward(point[None], doubt[None]))

        def units(values, shape=point.shape):
            return np.broadcast_to(values, shape)

        least, largest = pieces(operation, start, stop, units).range()
        ends = np.stack([alpha * low, alpha * high, beta * low, beta * high, 0 * low])
        slack = 4 * UNIT * np.abs(ends).max(axis=0) + TINY
        reach = np.maximum(high, -low)
        low = np.maximum(ends.min(axis=0) - slack, down(least - value - noise))
        high = np.minimum(ends.max(axis=0) + slack, up(largest - value + noise))
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        # w - w⁰ = m(v - v⁰) up to s|v - v⁰|, s the half width of the slopes.
        mean, spread = (alpha + beta) / 2, up((beta - alpha) / 2 * (1 + 4 * UNIT))
        rest = (np.abs(mean) * rest + spread * reach) * (1 + 16 * UNIT) + TINY
        middle_error = np.abs(mean)[:, None] * (middle_error + 4 * UNIT * np.abs(middle)) * SLACK
        middle = mean[:, None] * middle
    join = np.concatenate
    none = [np.zeros(0)]
    return join(alphas or none), join(betas or none), kept


@dataclasses.dataclass(frozen=True, eq=False)
class LoopClaim:
    """The claim of the module's text, and what proves it.

    Attributes:
        plant: `Plant`.
        box, first, reads: h, d and r; see `form_on`.
        shape: P.
        rate: ρ, float64 (1,).
        lam, mu: multipliers.
    """

    plant: Plant
    box: np.ndarray
    first: np.ndarray
    reads: np.ndarray
    shape: np.ndarray
    rate: np.ndarray
    lam: np.ndarray
    mu: np.ndarray

    def check(self):
        """Refuses what is of another form."""
        self.plant.check()
        n, count = len(self.plant.a), len(self.plant.kinds)
        if self.box.shape != (n,) or not np.all(np.isfinite(self.box) & (self.box > 0)):
            raise ValueError("the box is not one finite positive number for every state")
        if self.shape.shape != (n, n) or not np.all(np.isfinite(self.shape)):
            raise ValueError("P is not a finite matrix of the plant's size")
        if not np.array_equal(self.shape, self.shape.T):
            raise ValueError("P is not symmetric")
        if self.rate.shape != (1,) or not 0 < self.rate[0] < 1:
            raise ValueError("the rate is not between 0 and 1")
        if self.mu.shape != (count,) or self.reads.shape != (count,):
            raise ValueError("there is not one multiplier and one width for every nonlinearity")
        if self.lam.ndim != 1 or self.first.ndim != 1:
            raise ValueError("multipliers are not a vector")
        for values in (self.lam, self.mu):
            if not np.all(np.isfinite(values) & (values >= 0)):
                raise ValueError("a multiplier is negative, infinite or NaN")
        if not (np.all(self.first >= 0) and np.all(self.reads >= 0)):
            raise ValueError("a width is negative or NaN")


def objections(claim, controller):
    """Sentences on what is not proved of a `LoopClaim`; empty if all is.

    Raises:
        ValueError: where shapes do not fit.
        OverflowError: where sums have no bound.
    """
    if len(claim.first) not in (0, len(controller.weights[0]) if controller.activations else 0):
        raise ValueError("there is not one width for every unit of the first hidden layer")
    first = claim.first if len(claim.first) else np.inf
    form = form_on(claim.plant, controller, claim.box, first, claim.reads)
    if len(claim.lam) != controller.units:
        raise ValueError(f"{controller.units} hidden units have {len(claim.lam)} multipliers")
    matrix, error = form.matrix(claim.shape, float(claim.rate[0]), claim.lam, claim.mu)
    if not is_semidefinite(matrix, error):
        yield "The inequality that makes V fall is not proved with the multipliers of the file."
    n = len(claim.shape)
    outside = []
    for index, (row, doubt, width) in enumerate(
        zip(form.bounds, form.bounds_error, form.widths, strict=True)
    ):
        if not np.any(row) and not np.any(doubt):
            continue
        whole, spread = np.zeros((2, n + 1, n + 1))
        whole[0, 0], whole[0, 1:], whole[1:, 0], whole[1:, 1:] = (
            width * width, row, row, claim.shape,
        )  # fmt: skip
        spread[0, 0] = 2 * UNIT * width * width + TINY
        spread[0, 1:] = spread[1:, 0] = doubt
        if not is_semidefinite(whole, spread):
            outside.append(index)
    if outside:
        names = ", ".join(str(i) for i in outside[:5])
        yield (
            f"The ellipsoid is not proved to lie in the set on which the sectors hold, for "
            f"{len(outside)} of {len(form.bounds)} bounds (number {names})."
        )


def stated(claim):
    """What the claim rests on that no weight can prove, in words, or None."""
    count = int(np.sum(claim.plant.kinds == STATED))
    if not count:
        return None
    return f"the stated sector{'s' if count > 1 else ''} of {count} nonlinearit" + (
        "ies" if count > 1 else "y"
    )
