"""LipSDP by first-order ascent on its low-rank dual: linear in the number of weights and in depth.

With slopes in [α_l, β_l], m = (α+β)/2, r = (β-α)/2, the dual of LipSDP has a positive semidefinite
matrix for its unknown. Written as VVᵀ with few columns, it is a network of matrices as signals:

    maximise ‖W_nZ_{n-1} + SZ_0‖²  over  ‖Z_0‖ = 1 and U_l with rows of norm 1, where
    Y_l = W_lZ_{l-1},   Z_l = m_lY_l + r_l diag(‖Y_l,k‖) U_l.                            (8.2)

S = 0, or the shortcut of a residual block. Every value is at most LipSDP's optimum ρ, and a
maximum with enough columns equals it. There the gradients G_l with respect to Z_l hold the
multipliers, λ_k = ‖G_l,k‖ / (2r_l‖Y_l,k‖): a candidate, which `multipliers` proves or refuses.
"""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.progress import stage

# Columns to begin with; they are doubled while ρ and the dual's value stay apart.
_COLUMNS = 8
# L-BFGS iterations between two candidates, and in all.
_ITERATIONS, _MOST_ITERATIONS = 400, 2400
# Relative progress at which L-BFGS stops: multipliers are half as accurate, in digits, as values.
_FLAT = 1e-14
# Share of the typical row's norm below which a row counts as zero.
_TINY = 1e-9
# Smallest normal float: keeps quotients and logarithms finite.
_LEAST = float(np.finfo(float).tiny)
# Evaluations of (8.1) that a search and its proof take, and flops of one per cubed width.
_EVALUATIONS, _CUBES = 6, 4
# Growth up to which a search for feasible multipliers goes on after its time.
_LATE = 1e-3
# Size of new columns beside the old ones.
_NEW = 0.1


def narrow(widths):
    """Signal sizes without the part of inputs and outputs that adds nothing to the gain."""
    if len(widths) < 3:
        return tuple(widths)
    return (min(widths[:2]), *widths[1:-1], min(widths[-2:]))


def estimated_steps(widths):
    """L-BFGS steps of a search, roughly: deep chains take more, as measured."""
    return 300 + 20 * len(widths)


def estimated_flops(widths):
    """Flops of a search and of the proof of what it finds, roughly.

    Args:
        widths: signal sizes from the input to the output.
    """
    sizes = [float(w) for w in narrow(widths)]
    weights = sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    columns = _COLUMNS + len(sizes) / 2
    return 8 * estimated_steps(widths) * columns * weights + _EVALUATIONS * _CUBES * sum(
        w**3 for w in sizes[:-1]
    )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Multipliers that a search found: not a proof.

    Attributes:
        multipliers: one array per hidden layer.
        squared: ρ that they reach, as computed; infinite if none.
        value: largest value of (8.2): no multipliers reach a smaller ρ, up to rounding.
        columns: of Z, in the last run.
        iterations: L-BFGS steps in all.
        seconds: wall time.
    """

    multipliers: tuple
    squared: float
    value: float
    columns: int
    iterations: int
    seconds: float

    @property
    def gap(self):
        """Relative distance between ρ and its lower bound."""
        return self.squared / self.value - 1 if self.value > 0 else math.inf


def search(
    weights, alphas, betas, reach, *, tied=False, shortcut=None, tol=1e-6, deadline=None,
    columns=_COLUMNS, iterations=_MOST_ITERATIONS,
):  # fmt: skip
    """Multipliers near the optimum of LipSDP, and how near.

    Args:
        weights: W_1, …, W_n, float64 (outputs, inputs), of moderate size (`ScaledChain`).
        alphas, betas: slopes per hidden layer, α < β, α + β > 0.
        reach: callable from multipliers (list of arrays) to the smallest ρ that they allow, or inf.
        tied: one multiplier per layer.
        shortcut: S, float64 (outputs, inputs), or None.
        tol: relative gap at which the search ends.
        deadline: `time.monotonic()` value after which the search ends with what it has, or None.
        columns: number of columns to begin with.
        iterations: largest number of L-BFGS steps, up to one round.

    Returns:
        `Candidate`, the same for the same arguments unless the deadline cuts the search short.

    Example:

    >>> from tf_lyapunov.bounds.multipliers import smallest_squared_gain
    >>> from tf_lyapunov.bounds.chains import Chain, scaled_chain
    >>> from tf_lyapunov.theory.sectors import Sector
    >>> chain = Chain([np.array([[1.0], [1.0]]), np.array([[1.0, -1.0]])], [Sector(0.0, 1.0)])
    >>> scaled = scaled_chain(chain)
    >>> found = search(scaled.weights, scaled.alphas, scaled.betas,
    ...                lambda lam: smallest_squared_gain(scaled, lam))
    >>> round(scaled.gain(found.squared), 5), found.gap < 1e-6
    (1.0, True)

    Reference: Burer and Monteiro (2003) for low-rank semidefinite programs; Boumal, Voroninski and
    Bandeira (2016) for r(r+1)/2 > number of constraints, beyond which maxima are global.
    """
    dual = _Dual(weights, alphas, betas, tied, shortcut)
    with stage("iterations") as shown:
        return ascended(dual, reach, tol, deadline, columns, iterations, shown)


def search_graph(
    form, reach, *, tol=1e-6, deadline=None, columns=_COLUMNS, iterations=_MOST_ITERATIONS
):
    """As `search`, for units that read all signals before them (see `joint.JointForm`).

    Args:
        form: object with `sizes` of the signals z_0, …, z_m, `weights` (Σ sizes of z_1 …, Σ sizes)
            that are zero where a unit would read itself or what comes later, `outputs`
            (outputs, Σ sizes), and `alphas`, `betas` per signal after z_0.
        reach, tol, deadline, columns, iterations: see `search`.

    Returns:
        `Candidate`.
    """
    with stage("iterations") as shown:
        return ascended(_GraphDual(form), reach, tol, deadline, columns, iterations, shown)


def ascended(dual, reach, tol, deadline, columns, iterations, shown):
    from scipy.optimize import minimize

    begin = time.monotonic()
    rng = np.random.default_rng(0)
    most = math.isqrt(2 * (dual.units + 1)) + 2
    columns = min(columns, most)
    point = rng.normal(size=(dual.rows, columns))
    best = Candidate((), math.inf, 0.0, columns, 0, 0.0)
    steps, value = 0, 0.0

    def late():
        return deadline is not None and time.monotonic() > deadline

    def stop(*_):
        shown.advance()
        if late():
            raise StopIteration

    while True:
        result = minimize(
            dual.cost,
            point.ravel(),
            jac=True,
            method="L-BFGS-B",
            callback=stop,
            options={"maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "maxcor": 20,
                     "ftol": _FLAT, "gtol": 1e-12},
        )  # fmt: skip
        steps += int(result.nit)
        point = result.x.reshape(dual.rows, columns)
        found, multipliers = dual.candidate(point)
        value = max(value, found)
        squared, repaired = grown(multipliers, reach, value * (1 + tol), tol, late)
        stalled = not squared / value - 1 < 0.3 * (best.squared / value - 1)
        if squared < best.squared:
            best = dataclasses.replace(best, multipliers=repaired, squared=squared)
        done = best.squared <= value * (1 + tol)
        converged = result.nit < _ITERATIONS
        if done or late() or steps >= iterations or (columns == most and converged):
            break
        more = min(2 * columns, most) - columns
        if more and (converged or stalled or steps == int(result.nit)):
            size = _NEW * np.linalg.norm(point, axis=1, keepdims=True) / math.sqrt(more)
            point = np.hstack([point, size * rng.normal(size=(dual.rows, more))])
            columns += more
    elapsed = time.monotonic() - begin
    return dataclasses.replace(
        best, value=value, columns=columns, iterations=steps, seconds=elapsed
    )


def grown(multipliers, reach, wanted, tol, late=lambda: False):
    """Λ_l ← (1+s)^(n-l)Λ_l with the s that makes ρ smallest, to a factor of two or so.

    Multipliers near the optimum lie a little outside; growing them towards the input leads inside.

    Args:
        multipliers: list of arrays, one per hidden layer.
        reach: see `search`.
        wanted: ρ that is good enough.
        tol: relative accuracy that is wanted.
        late: whether the time is up: then the first feasible growth is taken.

    Returns:
        `(squared, multipliers)`; infinite if nothing was feasible.
    """
    depth = len(multipliers) + 1
    best, growth, step = (math.inf, tuple(multipliers)), tol / (4 * depth), 10.0
    while growth < 4.0:
        trial = tuple(
            (1 + growth) ** (depth - 1 - layer) * lam for layer, lam in enumerate(multipliers)
        )
        squared = reach(trial)
        if squared < best[0]:
            best = (squared, trial)
            if squared <= wanted or late():
                break
        elif late() and growth > _LATE:
            break
        elif math.isfinite(best[0]):
            if step < 10:
                break
            # Back to before the first feasible growth, in smaller steps.
            growth, step = growth / 100, 10**0.25
        growth *= step
    return best


class _Dual:
    """Value and gradient of (8.2)."""

    def __init__(self, weights, alphas, betas, tied, shortcut):
        self.weights, self.shortcut = weights, shortcut
        self.means = [(a + b) / 2 for a, b in zip(alphas, betas, strict=True)]
        self.radii = [(b - a) / 2 for a, b in zip(alphas, betas, strict=True)]
        self.norms = _whole if tied else _by_row
        sizes = [weights[0].shape[1], *(len(w) for w in weights[:-1])]
        self.units, self.rows = sum(sizes[1:]), sum(sizes)
        self.cuts = np.cumsum(sizes)[:-1]

    def cost(self, flat):
        """-log of the value and its gradient, for a flat array of all rows."""
        raw = flat.reshape(self.rows, -1)
        value, gradient, _ = self._pass(raw, with_multipliers=False)
        return -math.log(value), (-1 / value) * gradient.ravel()

    def candidate(self, raw):
        """`(value, multipliers)` at a point."""
        value, _, multipliers = self._pass(raw)
        return value, multipliers

    def _pass(self, raw, with_multipliers=True):
        first, *rest = np.split(raw, self.cuts)
        size = np.linalg.norm(first)
        start = signal = first / size
        kept = []
        for weight, mean, radius, row in zip(
            self.weights, self.means, self.radii, rest, strict=False
        ):
            before = weight @ signal
            length = self.norms(before)
            scale = self.norms(row)
            unit = row / scale
            signal = mean * before + (radius * length) * unit
            kept.append((before, length, unit, scale))
        out = self.weights[-1] @ signal
        if self.shortcut is not None:
            out = out + self.shortcut @ start
        value = max(float(np.vdot(out, out)), _LEAST)
        # Halves of the gradients, from the output to the input.
        back = self.weights[-1].T @ out
        gradients, multipliers = [], []
        layers = zip(self.weights[:-1], self.means, self.radii, kept, strict=True)
        for weight, mean, radius, (before, length, unit, scale) in reversed(list(layers)):
            along = self.norms(back, unit)
            gradients.append((2 * radius) * (length / scale) * (back - along * unit))
            if with_multipliers:
                share = self.norms(back) / (radius * length)
                multipliers.append(np.array(np.broadcast_to(share, (len(back), 1))[:, 0]))
            back = weight.T @ (mean * back + (radius * along / length) * before)
        if self.shortcut is not None:
            back = back + self.shortcut.T @ out
        gradients.append((2 / size) * (back - start * np.vdot(start, back)))
        return value, np.concatenate(gradients[::-1]), multipliers[::-1]


class _GraphDual(_Dual):
    """Value and gradient of (8.2) where Y_l = Σ_j A_lj Z_j reads every signal before it."""

    def __init__(self, form):
        self.form, self.norms = form, _by_row
        self.means = [(a + b) / 2 for a, b in zip(form.alphas, form.betas, strict=True)]
        self.radii = [(b - a) / 2 for a, b in zip(form.alphas, form.betas, strict=True)]
        self.units, self.rows = sum(form.sizes[1:]), sum(form.sizes)
        self.ends = np.cumsum([0, *form.sizes])
        self.cuts = self.ends[1:-1]

    def _pass(self, raw, with_multipliers=True):
        weights, outputs, ends = self.form.weights, self.form.outputs, self.ends
        first, *rest = np.split(raw, self.cuts)
        size = np.linalg.norm(first)
        signal = np.empty_like(raw)
        signal[: ends[1]] = start = first / size
        kept, offset = [], ends[1]
        for k, (mean, radius, row) in enumerate(zip(self.means, self.radii, rest, strict=True)):
            begin, end = ends[k + 1], ends[k + 2]
            before = weights[begin - offset : end - offset, :begin] @ signal[:begin]
            length, scale = self.norms(before), self.norms(row)
            unit = row / scale
            signal[begin:end] = mean * before + (radius * length) * unit
            kept.append((before, length, unit, scale))
        out = outputs @ signal
        value = max(float(np.vdot(out, out)), _LEAST)
        # Halves of the gradients, from the output to the input.
        back = outputs.T @ out
        gradients, multipliers = [], []
        for k in range(len(kept) - 1, -1, -1):
            (before, length, unit, scale), mean, radius = kept[k], self.means[k], self.radii[k]
            begin, end = ends[k + 1], ends[k + 2]
            own = back[begin:end]
            along = self.norms(own, unit)
            gradients.append((2 * radius) * (length / scale) * (own - along * unit))
            if with_multipliers:
                multipliers.append((self.norms(own) / (radius * length))[:, 0])
            own = mean * own + (radius * along / length) * before
            back[:begin] += weights[begin - offset : end - offset, :begin].T @ own
        own = back[: ends[1]]
        gradients.append((2 / size) * (own - start * np.vdot(start, own)))
        return value, np.concatenate(gradients[::-1]), multipliers[::-1]


def _by_row(matrix, other=None):
    """Norms of rows, (n, 1), at least a tiny share of the typical one; products if two."""
    if other is not None:
        return np.einsum("ij,ij->i", matrix, other)[:, None]
    squares = np.einsum("ij,ij->i", matrix, matrix)[:, None]
    floor = _TINY**2 * float(squares.sum()) / len(squares) + _LEAST
    return np.sqrt(np.maximum(squares, floor))


def _whole(matrix, other=None):
    """As `_by_row` for all rows together, (1, 1)."""
    total = float(np.vdot(matrix, matrix if other is None else other))
    if other is not None:
        return np.full((1, 1), total)
    return np.full((1, 1), math.sqrt(max(total, _LEAST)))
