"""(3) Localized robustness α_lim(F, r): estimated by sampling and by ascent, bounded by proof."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from keras import ops

from tf_lyapunov.attacks.backend import compiled, sum_gradient
from tf_lyapunov.attacks.logits import probabilities
from tf_lyapunov.digits import at_most
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.evaluation.amplification import UpperBounds
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.logits import Float64Logits, LogitsModel
from tf_lyapunov.program.network import read_network
from tf_lyapunov.showing import Page, Shown, Table, number

OUTPUTS = ("softmax", "logits")
PROTOCOLS = {"paper": 1000, "released": 100}
# Share of the largest value at which a curve counts as saturated.
_SATURATED = 0.99
# Outputs this much smaller than their rounding are noise, not change (float32 and float64).
_NOISE = {"float32": 2.0**-20, "float64": 2.0**-48}


@dataclass(frozen=True, repr=False)
class LocalizedCurve(Shown):
    """α_lim(F, r) over a set of points: two lower estimates and a proven upper bound.

    Attributes:
        radii: float64 (k,), ascending, in units of the input.
        norm: 2 or `math.inf`, of inputs and outputs.
        outputs: `"softmax"` or `"logits"`.
        monte_carlo: float64 (k,), largest ratio over random directions.
        gradient: float64 (k,), largest ratio found by ascent; never below `monte_carlo`.
        certified: float64 (k,), upper bounds; infinite where nothing is proved.
        monte_carlo_by_point, gradient_by_point, certified_by_point: float64 (n, k).
        noise: float, ratios below this cannot be told from rounding at the smallest radius.
    """

    radii: np.ndarray
    norm: float
    outputs: str
    monte_carlo: np.ndarray
    gradient: np.ndarray
    certified: np.ndarray
    monte_carlo_by_point: np.ndarray = field(repr=False)
    gradient_by_point: np.ndarray = field(repr=False)
    certified_by_point: np.ndarray = field(repr=False)
    noise: float = 0.0

    def _page(self):
        rows = [
            (number(r), number(m), number(g), at_most(c, 4))
            for r, m, g, c in zip(
                self.radii, self.monte_carlo, self.gradient, self.certified, strict=True
            )
        ]
        columns = ("radius", "random directions", "ascent", "proved, at most")
        facts = (("radii", len(rows)), ("norm", self.norm), ("outputs", self.outputs))
        return Page("LocalizedCurve", facts, (Table(columns, rows),))

    @property
    def saturation(self):
        """`(value, radius)`: the largest gradient estimate, and the first radius within 1% of it.

        The radius is the last one if the curve still grows there.
        """
        value = float(self.gradient.max())
        return value, float(self.radii[np.argmax(self.gradient >= _SATURATED * value)])

    def rows(self):
        """One dict per radius, for tables and CSV files."""
        return [
            {
                "radius": float(r),
                "monte_carlo": float(m),
                "gradient": float(g),
                "certified": float(c),
            }
            for r, m, g, c in zip(
                self.radii, self.monte_carlo, self.gradient, self.certified, strict=True
            )
        ]


@takes_networks
def localized_robustness(
    model,
    x,
    radii,
    *,
    norm=2,
    outputs="softmax",
    protocol="paper",
    directions=None,
    steps=60,
    bounds=None,
    method="auto",
    time_budget=10.0,
    batch_size=128,
    seed=0,
    progress: Callable | None = None,
):
    """How much a network amplifies changes of at most r around given points.

        α_lim(F, r) = sup_{x ∈ R, 0 < ‖e‖ ≤ r} ‖F(x+e) - F(x)‖ / ‖e‖                        (3.2)

    is bracketed for every radius: from below by Gaussian directions rescaled to length r (as
    published) and by ascent from the best of them, from above by a proof: slopes on balls around x,
    times the largest slope that softmax has there, and proved ranges of F on the shells between
    them (`local.shells`), or the network's gain. The estimates never prove anything; the bound
    never estimates.

    Args:
        model: a built Keras model; softmax and sigmoid heads are looked through.
        x: the points R, (n, …); every sample is used.
        radii: positive numbers, in units of x.
        norm: 2 or `math.inf`, for inputs and outputs.
        outputs: F is `"softmax"` (a single logit: sigmoid) or `"logits"`.
        protocol: `"paper"`: 1000 directions, ratio by ‖e‖ = r. `"released"`: 100 directions, x+e
            clipped to `bounds`, ratio by the clipped change, running maximum over radii.
        directions: number of directions instead.
        steps: ascent steps per radius.
        bounds: box of the released protocol, (0, 1) by default.
        method: of the network's gain, as for `certify`; "composition" is quick for large networks.
        time_budget: seconds for the proofs, at most half of them for the network's gain; the points
            share the rest, and keep what gains prove where it is too short.
        batch_size: points evaluated at once.
        seed: of the directions.
        progress: called with the share done.

    Returns:
        `LocalizedCurve`.

    Raises:
        ValueError: for radii that are not positive, or larger than the points' own diameter where
            there are several; for NaN, wrong shapes or unknown options.

    Example:

    >>> import keras
    >>> unit = keras.layers.Dense(1, kernel_initializer="ones")
    >>> model = keras.Sequential([keras.Input((1,)), unit])
    >>> curve = localized_robustness(model, [[-10.0], [10.0]], [1.0, 10.0], directions=4)
    >>> [round(float(v), 2) for v in (curve.gradient[1], curve.certified[1])]
    [0.05, 0.05]

    Reference: Bontonou et al., Definition 1 and Figure 5 (Monte-Carlo as published; ascent and
    bound of this library).
    """
    taken = Inputs.of(model)
    if taken.several:
        raise ValueError(
            "The points of `localized_robustness` are one array. Received: model "
            f"{taken.model!r} with the inputs {', '.join(map(repr, taken.names))}. Join them in a "
            "model of one input that splits it again; `certify` and `bracket` take several."
        )
    settings = checked(norm, outputs, protocol, directions, steps)
    x, radii = checked_points(model, x, radii, norm)
    view = _Outputs(model, outputs, x, norm)
    bounds = (bounds or (0.0, 1.0)) if protocol == "released" else None
    found = [np.empty((len(x), len(radii))) for _ in range(3)]
    certify = UpperBounds(view, norm, outputs, method, time_budget, len(x))
    batches = range(0, len(x), batch_size)
    for done, start in enumerate(batches):
        here = slice(start, start + batch_size)
        # Draws depend on the seed and the batch, so that a longer list of radii changes nothing.
        rng = np.random.default_rng([seed, start])
        sampled, best = _sampled(view, x[here], radii, norm, settings[0], bounds, rng)
        found[0][here] = np.maximum.accumulate(sampled, axis=1) if bounds else sampled
        found[1][here] = _ascended(view, x[here], radii, norm, steps, sampled, best, bounds)
        found[2][here] = certify(x[here], radii, found[1][here])
        if progress is not None:
            progress((done + 1) / len(batches))
    # A bound below an estimate can only be rounding noise of the estimate.
    curves = [values.max(axis=0) for values in found]
    return LocalizedCurve(radii, norm, outputs, *curves, *found, noise=float(view.noise / radii[0]))


# ------------------------------------------------------------------------------------- estimates


class _Outputs:
    """F in float64 by the network's program, and gradients by the model itself.

    A model that cannot be read is evaluated in its own precision.
    """

    def __init__(self, model, outputs, x, norm):
        self.network = self.exact = None
        own = model
        try:
            self.network = read_network(model, [(None, *x.shape[1:])])
            own = LogitsModel(self.network)
            self.exact = Float64Logits(self.network)
        except (UnsupportedLayerError, ValueError):
            if self.network is None and outputs == "logits":
                raise
        self.own, self.norm, self.dtype = own, norm, "float32"
        if self.network is not None and self.network.graph.inputs[0].dtype == "float64":
            self.dtype = "float64"
        self.head = None
        shape = (None, *x.shape[1:])
        variables = list(model.variables)
        self._computed = compiled(lambda z: (self(z),), variables, [(self.dtype, shape)])
        sample = self.values(x[:1])
        self.noise = _NOISE["float32" if self.exact is None else "float64"]
        self.noise *= max(float(np.abs(sample).max()), 1.0)
        if outputs == "softmax" and self.network is not None:
            self.head = "sigmoid" if sample.size == 1 else "softmax"
            # What was compiled has no head yet.
            self._computed = compiled(lambda z: (self(z),), variables, [(self.dtype, shape)])
        self.climb = compiled(
            self._climb, variables, [(self.dtype, shape)] * 2 + [(self.dtype, (None,)),
                                                                ("int32", ())]
        )  # fmt: skip

    def values(self, x):
        """F at an array (n, …), float64 (n, k)."""
        if self.exact is None:
            return np.asarray(self._computed(x.astype(self.dtype))[0], np.float64)
        values, _ = self.exact.evaluate(x, len(x))
        values = values.reshape(len(values), -1)
        return values if self.head is None else probabilities(values, self.head)

    def __call__(self, x):
        """F of a tensor as the model computes it."""
        values = self.own(x) if self.network else self.own(x, training=False)
        values = ops.reshape(values, (ops.shape(values)[0], -1))
        return values if self.head is None else getattr(ops, self.head)(values)

    def size(self, values):
        """Norms of rows."""
        flat = ops.reshape(values, (ops.shape(values)[0], -1))
        if self.norm == 2:
            # The root has a gradient at zero too.
            least = 1e-300 if self.dtype == "float64" else 1e-30
            return ops.sqrt(ops.sum(flat * flat, axis=1) + least)
        return ops.max(ops.abs(flat), axis=1)

    def _climb(self, x, e, radius, steps):
        """Perturbations of the largest ratio met on the way, and the ratio."""
        base = self(x)
        wide = (-1, *(1 for _ in x.shape[1:]))
        reach = ops.reshape(radius, wide)
        tiny = 1e-30

        def objective(e, squared):
            change = self.size(self(x + e) - base)
            value = change * change if squared else change / ops.maximum(self.size(e), tiny)
            return ops.sum(value), change

        def direction(g):
            if self.norm == 2:
                return g / ops.reshape(ops.maximum(self.size(g), tiny), wide)
            return ops.sign(g)

        def project(e):
            if self.norm != 2:
                return ops.clip(e, -reach, reach)
            size = ops.reshape(ops.maximum(self.size(e), tiny), wide)
            return e * ops.minimum(reach / size, 1.0)

        def ratio(e, change):
            return change / ops.maximum(self.size(e), tiny)

        def keep(e, found, best, value):
            better = found > value
            return ops.where(ops.reshape(better, wide), e, best), ops.maximum(found, value)

        def power(i, state):
            # The next point of the sphere along the gradient: the power method if F is linear.
            e, best, value = state
            g, change = sum_gradient(lambda e: objective(e, True), e)
            best, value = keep(e, ratio(e, change), best, value)
            moves = ops.reshape(self.size(g) > tiny, wide)
            return ops.where(moves, reach * direction(g), e), best, value

        def ascent(i, state):
            e, best, value = state
            g, change = sum_gradient(lambda e: objective(e, False), e)
            best, value = keep(e, ratio(e, change), best, value)
            length = reach * 0.5 / ops.cast(1 + i, self.dtype)
            return project(e + length * direction(g)), best, value

        start = ratio(e, self.size(self(x + e) - base))
        if self.norm != 2:
            # ‖·‖_∞ of the outputs is one of them: without these the power method finds a poor one.
            def unit(i, state):
                best, value = state
                g, _ = sum_gradient(lambda z: (ops.sum(ops.take(self(z), i, axis=1)), ()), x)
                e = reach * direction(g)
                return keep(e, ratio(e, self.size(self(x + e) - base)), best, value)

            e, start = ops.fori_loop(0, ops.shape(base)[1], unit, (e, start))
        state = (e, e, start)
        _, best, value = ops.fori_loop(0, steps, power, state)
        last, best, value = ops.fori_loop(0, steps, ascent, (best, best, value))
        last_ratio = ratio(last, self.size(self(x + last) - base))
        return keep(last, last_ratio, best, value)


def _sampled(view, x, radii, norm, directions, bounds, rng):
    """Largest ratios (n, k) over random directions and their perturbations (n, k, …)."""
    shape = x.shape[1:]
    base = view.values(x)
    best = np.zeros((len(x), len(radii)))
    kept = np.zeros((len(x), len(radii), *shape))
    chunk = max(2**20 // (x[0].size * len(x)), 1)
    for start in range(0, directions, chunk):
        count = min(chunk, directions - start)
        draws = rng.standard_normal((count, len(x), *shape))
        draws /= norms(draws.reshape(count * len(x), -1), norm).reshape(count, len(x), *ones(x))
        for k, radius in enumerate(radii):
            e = radius * draws
            if bounds is not None:
                e = np.clip(x + e, *bounds) - x
            moved = (x + e).reshape(count * len(x), *shape)
            values = view.values(moved)
            change = (values.reshape(count, len(x), -1) - base).reshape(count * len(x), -1)
            sizes = norms(e.reshape(count * len(x), -1), norm)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.where(sizes > 0, norms(change, norm) / sizes, 0.0)
            ratios = ratios.reshape(count, len(x))
            first = ratios.argmax(axis=0)
            found = ratios[first, np.arange(len(x))]
            better = found > best[:, k]
            best[better, k] = found[better]
            kept[better, k] = e[first, np.arange(len(x))][better]
    return best, kept


def _ascended(view, x, radii, norm, steps, sampled, starts, bounds):
    """Largest ratios (n, k) by ascent from the best samples; they grow with the radius."""
    result = np.array(sampled)
    before = None
    for k, radius in enumerate(radii):
        e = np.array(starts[:, k])
        if before is not None:  # the last radius' best perturbation is still allowed
            better = result[:, k - 1] > result[:, k]
            e[better] = before[better]
        # A start of length 0 has no ratio.
        empty = norms(e.reshape(len(e), -1), norm) == 0
        e[empty] = radius / math.sqrt(x[0].size)
        reach = np.full(len(x), radius * (1 - 1e-12))
        arrays = (v.astype(view.dtype) for v in (x, e, reach))
        before = np.asarray(view.climb(*arrays, np.asarray(steps, np.int32))[0], np.float64)
        before = np.where(np.isfinite(before), before, 0.0)
        # What lies on the sphere but for rounding is put onto it.
        sizes = norms(before.reshape(len(x), -1), norm)
        scale = np.where(sizes > reach * (1 - 1e-5), reach / np.maximum(sizes, 1e-300), 1.0)
        before = before * scale.reshape(-1, *[1] * (x.ndim - 1))
        if bounds is not None:
            before = np.clip(x + before, *bounds) - x
        # The climb sees the model's own rounding; its end is measured without.
        sizes = norms(before.reshape(len(x), -1), norm)
        change = view.values(x + before) - view.values(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(sizes > 0, norms(change, norm) / sizes, 0.0)
        result[:, k] = np.maximum(result[:, k], np.where(np.isfinite(ratio), ratio, 0.0))
        if k:
            result[:, k] = np.maximum(result[:, k], result[:, k - 1])
    return result


# ----------------------------------------------------------------------------------------- input


def norms(rows, norm):
    if norm == 2:
        return np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return np.abs(rows).max(axis=1)


def ones(x):
    return [1] * (x.ndim - 1)


def checked(norm, outputs, protocol, directions, steps):
    if norm not in (2, math.inf):
        raise ValueError(f"`norm` must be 2 or math.inf. Received: norm={norm!r}.")
    if outputs not in OUTPUTS:
        raise ValueError(f"`outputs` must be one of {OUTPUTS}. Received: outputs={outputs!r}.")
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"`protocol` must be one of {tuple(PROTOCOLS)}. Received: protocol={protocol!r}."
        )
    directions = PROTOCOLS[protocol] if directions is None else directions
    if directions < 1 or steps < 0:
        raise ValueError(
            "`directions` must be at least 1 and `steps` at least 0. "
            f"Received: directions={directions!r}, steps={steps!r}."
        )
    return (int(directions),)


def checked_points(model, x, radii: Sequence, norm):
    x = np.asarray(x, dtype=np.float64)
    radii = np.unique(np.asarray(radii, dtype=np.float64).ravel())
    if not len(radii) or not np.all(np.isfinite(radii)) or radii[0] <= 0:
        raise ValueError(f"`radii` must be positive, finite numbers. Received: {radii!r}.")
    if x.ndim < 2 or not len(x) or not np.all(np.isfinite(x)):
        raise ValueError(
            f"`x` must hold finite points (n, …). Received: shape {x.shape}, or NaN or infinity."
        )
    if len(x) > 1:
        flat = x.reshape(len(x), -1)
        # Twice the distance to the first point is at least the diameter.
        diameter = 2 * float(norms(flat - flat[0], norm).max())
        if diameter > 0 and radii[-1] > diameter:
            raise ValueError(
                f"A radius beyond the diameter of the points is not local. Received: radius "
                f"{radii[-1]:g} with points at most {diameter:g} apart. Choose smaller radii."
            )
    return x, radii
