"""Graphs of dense layers with skips, sums and concatenations as one problem.

Signals are the input z_0 and the results z_k = φ_k(y_k) of elementwise functions; sums, skips and
linear layers between them are multiplied out, so that

    y_k = Σ_{j<k} A_kj z_j,    f = Σ_j C_j z_j.

For differences of signals, slopes in [α, β], m = (α+β)/2, p = αβ and any diagonal Λ_k ≥ 0,

    0 ≤ Σ_k (y_k·α - z_k)ᵀΛ_k(z_k - β·y_k) = -Σ_k (z_kᵀΛ_kz_k - 2m z_kᵀΛ_ky_k + p y_kᵀΛ_ky_k),

hence ‖f‖² ≤ ρ‖z_0‖² if the quadratic form

    ρ‖z_0‖² - ‖Σ_j C_jz_j‖² + Σ_k (z_kᵀΛ_kz_k - 2m z_kᵀΛ_ky_k + p y_kᵀΛ_ky_k)  ≥ 0           (J)

on all signals. For a chain it is (8.1). It sees how branches add up across blocks, which a product
of the blocks' gains does not: never above it but for the accuracy of the search, as the multipliers
of the blocks, scaled, satisfy it. What proves it is the matrix in float64, not the search.
"""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.chains import error_norm, gram_factor, norm_up
from tf_lyapunov.bounds.programs import first_order
from tf_lyapunov.bounds.programs.interior import MultiplierProblem
from tf_lyapunov.bounds.programs.sdp import smallest_parameter, verified_point
from tf_lyapunov.program import rounding
from tf_lyapunov.theory.norms import power_iteration
from tf_lyapunov.verification.inequalities import Multipliers

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# Sectors are widened by this share where slopes coincide: a superset.
_WIDENING = 2.0**-16
# Growth of multipliers up to which a proof is tried.
_MOST_GROWTH = 2e-2


@dataclasses.dataclass(frozen=True, eq=False)
class JointForm:
    """A graph of signals in the form above.

    Attributes:
        sizes: of z_0, …, z_m.
        weights: rows A_k of all units, float64 (Σ_{k≥1} sizes, Σ sizes).
        weight_errors: of the same shape, bounds on the entries' distance to those that are meant.
        outputs: C, (outputs, Σ sizes).
        output_errors: of the same shape.
        alphas, betas: slopes of φ_k, α < β.
        exponent: the gain is 2^exponent times that of this form.
        powers: per entry of the signals, the exponent that it was divided by; none are zeros.
        names: of the nodes that make z_1, …, z_m.
    """

    sizes: tuple
    weights: np.ndarray
    weight_errors: np.ndarray
    outputs: np.ndarray
    output_errors: np.ndarray
    alphas: tuple
    betas: tuple
    exponent: int = 0
    powers: np.ndarray | None = None
    names: tuple = ()

    @property
    def total(self):
        """Number of entries of all signals."""
        return sum(self.sizes)

    def with_outputs(self, outputs, errors):
        """The same signals with other outputs (in the units of this form)."""
        return dataclasses.replace(self, outputs=outputs, output_errors=errors)

    def matrix(self, squared, multipliers):
        """(J) as a matrix at ρ and multipliers, as computed."""
        return _problem(self)[0].matrix(squared, np.concatenate(multipliers))

    def scaled(self):
        """The form with signals divided by powers of two near their size, which is exact."""
        ends = np.cumsum([0, *self.sizes])
        powers = np.zeros(self.total, dtype=int)
        weights, errors = np.array(self.weights), np.array(self.weight_errors)
        first = self.sizes[0]
        for k, beta in enumerate(self.betas):
            rows = slice(ends[k + 1] - first, ends[k + 2] - first)
            part = np.ldexp(weights[rows], powers)
            power = _power(part) + (round(math.log2(beta)) if beta > 0 else 0)
            powers[ends[k + 1] : ends[k + 2]] = power
            weights[rows] = np.ldexp(part, -power)
            errors[rows] = np.ldexp(errors[rows], powers - power)
        outputs = np.ldexp(self.outputs, powers)
        power = _power(outputs)
        return dataclasses.replace(
            self,
            weights=weights,
            weight_errors=errors,
            outputs=np.ldexp(outputs, -power),
            output_errors=np.ldexp(self.output_errors, powers - power),
            exponent=self.exponent + power,
            powers=powers if self.powers is None else self.powers + powers,
        )

    def unscaled(self, squared, multipliers):
        """`Multipliers` of the network's own signals: (J) times 4^exponent."""
        powers = np.zeros(self.total, dtype=int) if self.powers is None else self.powers
        ends = np.cumsum(self.sizes)
        values = tuple(
            np.ldexp(lam, 2 * (self.exponent - powers[a:b]))
            for lam, a, b in zip(multipliers, ends[:-1], ends[1:], strict=True)
        )
        sectors = tuple(zip(self.alphas, self.betas, strict=True))
        return Multipliers(rounding.ldexp_up(squared, 2 * self.exponent), values, sectors)


def _power(matrix):
    """Exponent of a power of two near the norm of a matrix."""
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return 0
    norm = power_iteration(matrix.T / largest, 5)[0] or 1.0
    return round(math.log2(norm) + math.log2(largest))


@dataclasses.dataclass(frozen=True, eq=False)
class JointBound:
    """A bound on the gain of a `JointForm`.

    Attributes:
        gain_upper_bound: float, proved; infinite if nothing was.
        least: value that no multipliers of this kind get below, as computed; 0 if not known.
        form: the scaled `JointForm`.
        squared: ρ of it, proved.
        multipliers: one array per signal after z_0, that prove it.
        seconds: wall time.
    """

    gain_upper_bound: float
    least: float = 0.0
    form: JointForm | None = None
    squared: float = math.inf
    multipliers: tuple = ()
    seconds: float = 0.0


def joint_gain(form, *, budget=None, tol=1e-6):
    """Smallest gain bound that (J) proves for a graph of signals, up to the search's accuracy.

    Args:
        form: `JointForm`.
        budget: `Budget` of the search, or None.
        tol: relative accuracy of ρ asked from it.

    Returns:
        `JointBound`.

    Example:

    >>> eye, zero = np.eye(2), np.zeros((2, 2))
    >>> x_minus_relu = JointForm((2, 2), np.hstack([eye, zero]), np.zeros((2, 4)),
    ...     np.hstack([eye, -eye]), np.zeros((2, 4)), (0.0,), (1.0,))
    >>> round(joint_gain(x_minus_relu).gain_upper_bound, 5)
    1.0

    Reference: Fazlyab et al. (NeurIPS 2019), LipSDP-Neuron, for a graph; sound form of this
    library.
    """
    return bounded(form.scaled(), budget=budget, tol=tol)


def bounded(form, *, budget=None, tol=1e-6, multipliers=None):
    """`joint_gain` in the units of the form itself, which should be moderate (`scaled`).

    Args:
        form: `JointForm`.
        budget: `Budget` of the search, or None.
        tol: relative accuracy of ρ asked from it.
        multipliers: to be proved instead of a search, or None.
    """
    begin = time.monotonic()
    if not np.any(form.outputs) and not np.any(form.output_errors):
        return JointBound(0.0, form=form, squared=0.0)
    problem, constant_error = _problem(form)
    reach, value = _Reach(problem, form.sizes), 0.0
    if multipliers is None and form.alphas:
        deadline = None if budget is None else budget.before(20.0 * form.total**3)
        found = first_order.search_graph(form, reach, tol=tol, deadline=deadline)
        value, multipliers = found.value, found.multipliers
    if not form.alphas:
        norm = rounding.sum_up(norm_up(form.outputs), error_norm(form.output_errors, form.outputs))
        squared, kept = rounding.product_up(norm, norm), ()
    else:
        squared, kept = math.inf, ()
        if multipliers:
            squared, kept = _proved(form, problem, constant_error, reach, multipliers)
    gain = math.inf
    if math.isfinite(squared):
        gain = rounding.ldexp_up(rounding.sqrt_up(squared), form.exponent)
    least = math.ldexp(math.sqrt(max(value, 0.0)), form.exponent)
    return JointBound(gain, least, form, squared, kept, time.monotonic() - begin)


def _problem(form):
    """`MultiplierProblem` of (J) with θ = ρ, and the entrywise error of its constant matrix."""
    first, total = form.sizes[0], form.total
    product = form.outputs.T @ form.outputs
    constant = -(product + product.T) / 2
    size, spread = np.abs(form.outputs), form.output_errors
    error = rounding.gamma(len(size) + 8, UNIT) * (size.T @ size)
    if np.any(spread):
        cross = size.T @ spread
        error = error + cross + cross.T + spread.T @ spread
    direction = np.zeros((total, total))
    direction[:first, :first] = np.eye(first)
    alphas, betas = (np.repeat(v, form.sizes[1:]) for v in (form.alphas, form.betas))
    rows = first + np.arange(total - first)
    problem = MultiplierProblem(
        constant, direction, rows, form.weights, (alphas + betas) / 2, alphas * betas
    )
    return problem, 1.01 * error


class _Reach:
    """Smallest ρ for which (J) holds with given multipliers, as computed; inf if none does."""

    def __init__(self, problem, sizes):
        self.problem, self.first = problem, sizes[0]

    def __call__(self, multipliers):
        return smallest_parameter(self.problem.matrix(0.0, np.concatenate(multipliers)), self.first)


def _proved(form, problem, constant_error, reach, multipliers):
    """`(ρ, multipliers)` that are proved, those towards the input grown a little; `(inf, ())`."""
    if not all(np.all(np.isfinite(lam)) for lam in multipliers):
        return math.inf, ()
    top = max(float(lam.max(initial=0.0)) for lam in multipliers)
    floored = [np.maximum(lam, max(1e-14 * top, 1e-290)) for lam in multipliers]
    errors = {"constant_error": constant_error}
    if np.any(form.weight_errors):
        errors["weight_error"] = form.weight_errors
    count, growth = len(floored), 4 * UNIT * form.total**2
    while growth <= _MOST_GROWTH:
        lam = [(1 + growth) ** (count - k) * v for k, v in enumerate(floored)]
        squared = reach(lam) * (1 + 10 * growth) + 1e-280
        if math.isfinite(squared) and verified_point(
            problem, squared, np.concatenate(lam), **errors
        ):
            return squared, tuple(lam)
        growth *= 10
    return math.inf, ()


class FormBuilder:
    """Multiplies linear maps out between the elementwise functions of a graph.

    Linear functions of the signals are lists with one `(matrix, error)` per signal, or None for
    those that they do not read.

    Args:
        size: entries of z_0.
    """

    def __init__(self, size):
        self.sizes, self.reads, self.alphas, self.betas = [size], [], [], []
        self.names = []

    def signal(self, k):
        """z_k itself."""
        return {k: (np.eye(self.sizes[k]), 0.0)}

    def activated(self, form, sector, name=""):
        """φ of a linear function: a new signal of a name, or a multiple where φ is linear."""
        alpha, beta = sector.alpha, sector.beta
        if alpha == beta:
            return self.times_number(alpha, form)
        size = len(next(iter(form.values()))[0])
        self.sizes.append(size)
        self.reads.append(form)
        self.names.append(name)
        width = max(abs(alpha), abs(beta)) * _WIDENING
        self.alphas.append(min(alpha, beta - width))
        self.betas.append(beta)
        return self.signal(len(self.sizes) - 1)

    @staticmethod
    def times_number(number, form):
        """A multiple by a number that may be rounded itself."""
        return {
            k: (number * m, abs(number) * e + 3 * UNIT * np.abs(number * m))
            for k, (m, e) in form.items()
        }

    @staticmethod
    def times(weight, spread, form):
        """W times a linear function, W known up to an entrywise error."""
        size = np.abs(weight)
        found = {}
        for k, (matrix, error) in form.items():
            own = rounding.gamma(weight.shape[1] + 4, UNIT) * (size @ np.abs(matrix))
            if np.ndim(error):
                own = own + size @ error
            if np.ndim(spread):
                own = own + spread @ (np.abs(matrix) + error)
            found[k] = (weight @ matrix, own * (1 + 1e-9))
        return found

    @staticmethod
    def total(forms, signs):
        """Σ ± forms."""
        found = {}
        for sign, form in zip(signs, forms, strict=True):
            for k, (matrix, error) in form.items():
                if k not in found:
                    found[k] = (sign * matrix, error)
                    continue
                value = found[k][0] + sign * matrix
                found[k] = (value, found[k][1] + error + 2 * UNIT * np.abs(value))
        return found

    @staticmethod
    def stacked(forms, order):
        """Rows of several functions one after the other, then taken in an order."""
        heights = [len(next(iter(form.values()))[0]) for form in forms]
        found = {}
        for k in sorted({k for form in forms for k in form}):
            width = next(form[k][0].shape[1] for form in forms if k in form)
            empty = [(np.zeros((h, width)), 0.0) for h in heights]
            parts = [form.get(k, e) for form, e in zip(forms, empty, strict=True)]
            errors = [np.broadcast_to(e, m.shape) for m, e in parts]
            found[k] = np.vstack([m for m, _ in parts])[order], np.vstack(errors)[order]
        return found

    def row(self, form):
        """`(matrix, errors)` over all signals, (n, Σ sizes)."""
        height = len(next(iter(form.values()))[0])
        ends = np.cumsum([0, *self.sizes])
        matrix, errors = np.zeros((2, height, int(ends[-1])))
        for k, (part, error) in form.items():
            matrix[:, ends[k] : ends[k + 1]] = part
            errors[:, ends[k] : ends[k + 1]] = error
        return matrix, errors

    def finish(self, form):
        """`JointForm` whose outputs are a linear function of the signals."""
        rows = [self.row(read) for read in self.reads]
        total = sum(self.sizes)
        weights = np.vstack([m for m, _ in rows]) if rows else np.zeros((0, total))
        errors = np.vstack([e for _, e in rows]) if rows else np.zeros((0, total))
        outputs, output_errors = self.row(form)
        return JointForm(
            tuple(self.sizes), weights, errors, outputs, output_errors, tuple(self.alphas),
            tuple(self.betas), names=tuple(self.names),
        )  # fmt: skip


def narrow_start(weight, spread):
    """`(R, 0)` with RRᵀ ⪰ WWᵀ for a wide W, which stands for the first layer; W itself else."""
    if weight.shape[1] <= weight.shape[0]:
        return weight, spread
    power = _power(weight)
    try:
        factor = gram_factor(np.ldexp(weight, -power), np.ldexp(spread, -power))
    except np.linalg.LinAlgError:
        return weight, spread
    return np.ldexp(factor, power), 0.0
