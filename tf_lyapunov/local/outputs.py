"""Proved ranges of outputs and hidden units over a region, and proved gains on it."""

import dataclasses

import numpy as np

from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.local import gains, maps
from tf_lyapunov.local.ascent import ascend, tried
from tf_lyapunov.local.boxes import Effort, Memory, surround_proved
from tf_lyapunov.local.curved import Curved
from tf_lyapunov.local.flow import Whole, flow_of, gain_of, trace
from tf_lyapunov.local.gainfiles import Ball, save_gains
from tf_lyapunov.local.localgains import LocalGains
from tf_lyapunov.local.maxima import WindowMaximum
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.ranges import Source, save_ranges
from tf_lyapunov.local.regions import Region
from tf_lyapunov.program import rounding
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate
from tf_lyapunov.showing import Page, Shown, Table
from tf_lyapunov.theory.arguments import finite_float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OutputBounds(Shown):
    """Proved ranges over a region.

    Attributes:
        lower, upper: float64 (functionals,), of every functional of the output.
        steps: dict from names of steps to `(low, high)`, float64 of the shape of what the step
            makes (its last operation).
        source: `ranges.Source`, what a proof file is made of.
    """

    lower: np.ndarray
    upper: np.ndarray
    steps: dict
    source: Source | None = dataclasses.field(default=None, repr=False)

    def save(self, path):
        """Writes a proof file (`.npz`) of the functionals' ranges: the region and the multipliers.

        `tf_lyapunov.verification.verify` and `tf-lyapunov verify` re-check it from the model's
        weights alone. Its ranges are those that the verifier proves with the multipliers found;
        where they are wider by more than 0.2% of their width, the file says by how much. It holds
        no ranges of hidden units, which the verifier finds anew.

        Args:
            path: file name; an existing file is replaced.

        Raises:
            ValueError: if the model has changed since, the ranges are those behind a softmax or
                sigmoid, or `verify` would refuse the two. Nothing is written then.
            UnsupportedLayerError: naming a layer that the verifier does not know.
        """
        save_ranges(self, path)

    def _page(self):
        widths = self.upper - self.lower
        widest = at_most(float(widths.max(initial=0.0)), 4)
        facts = (("functionals", len(self.lower)), ("widest range", widest))
        rows = tuple(
            (i, at_least(float(low), 4), at_most(float(high), 4))
            for i, (low, high) in enumerate(zip(self.lower, self.upper, strict=True))
        )
        table = Table(("output", "at least", "at most"), rows)
        notes = ("Proved for every input of the region, of the exact function of the weights.",)
        return Page("OutputBounds", facts, (table,), notes)


@takes_networks
def output_bounds(model, region, functionals=None, *, outputs="logits", effort=None):
    """Proved lower and upper bounds of linear functions of a model's output over a region.

    For every x of the region, lower ≤ A f(x) ≤ upper, f the exact function of the model's settings
    and of its weights as cast for inference.

    Args:
        model: a built Keras model of supported layers with one input.
        region: `Region` of inputs as the model receives them.
        functionals: float (m, outputs), the rows of A; None for every output by itself.
        outputs: `"logits"` stops before a final softmax or sigmoid, `"model"` includes it.
        effort: `boxes.Effort`, or None.

    Returns:
        `OutputBounds`.

    Raises:
        UnsupportedLayerError: naming a step without a proven gain.
        ValueError: if shapes do not fit, functionals are none or not finite, or the region's
            centre is beyond the model's input dtype.

    Example:

    >>> import keras
    >>> dense = keras.layers.Dense(1, kernel_initializer="ones", activation="relu")
    >>> model = keras.Sequential([keras.Input((2,)), dense])
    >>> found = output_bounds(model, Region.ball(np.zeros(2), 1.0, "linf"))
    >>> bool(-1e-6 < found.lower[0] <= 0), round(float(found.upper[0]), 6)
    (True, 2.0)
    """
    network, flow, traced = read_around(model, region, outputs)
    size = traced.values[-1].size
    rows = np.eye(size) if functionals is None else np.asarray(functionals, np.float64)
    if rows.ndim != 2 or rows.shape[1] != size or not len(rows) or not np.all(np.isfinite(rows)):
        raise ValueError(
            f"`functionals` must be one or more finite rows of {size} numbers, one per output. "
            f"Received: shape {rows.shape}."
        )
    effort = effort or Effort()
    memory = Memory()
    around = surround_proved(flow, traced, region, effort, memory)
    c = np.concatenate([rows, -rows]).reshape(-1, *traced.shape(flow.output))
    multipliers, _ = tried(around, c, flow.output, trials=effort.margin_trials)
    if multipliers and effort.margin_steps:
        ascend(around, c, flow.output, multipliers, effort.margin_steps)
    found = around.lower(c, flow.output, multipliers)
    low, high = (v.reshape(-1) for v in around.box(flow.output))
    if functionals is None:
        found = np.maximum(found, np.concatenate([low, -high]))
    names = {link.name: k for k, link in enumerate(flow.links, 1)}
    steps = {name: tuple(v[0] for v in around.box(k)) for name, k in names.items()}
    digest = network.digest()
    source = Source(network, flow, traced, region, rows, memory, multipliers, outputs, digest)
    return OutputBounds(found[: len(rows)], -found[len(rows) :], steps, source)


@takes_networks
def gain_on(model, x, radius, *, norm="l2", outputs="logits", effort=None, proof=None):
    """Proved gain of a model on the ball around each input: how far any two points may be taken.

    ‖f(u) - f(v)‖ ≤ gain·‖u - v‖ for all u, v within `radius` of x, both norms l2, or both l∞: with
    the slopes that proved boxes leave, M their middle and S half their width, by the recursion of
    `localgains` for l2, and |J|1 + Σ_j |J_j|S_j D_j, entry by entry, for l∞.

    Args:
        model: a built Keras model of supported layers with one input.
        x: inputs (n, …).
        radius: positive number, of the ball in the same norm.
        norm: `"l2"` or `"linf"`.
        outputs: `"logits"` or `"model"`, see `output_bounds`.
        effort: `boxes.Effort`, or None.
        proof: name of a proof file (`.npz`) to write, or None; an existing file is replaced.
            `tf_lyapunov.verification.verify` and `tf-lyapunov verify` re-check it from the model's
            weights alone. Its gains are those that the verifier proves with the multipliers of the
            boxes, never smaller than those returned; where they are larger by more than 0.2%, the
            file says by how much.

    Returns:
        float64 (n,).

    Raises:
        ValueError: for another norm, or a radius that is not positive; for a proof file, if there
            is no input, of gains behind a softmax or sigmoid, or if `verify` would refuse it.
            Nothing is written then.
        UnsupportedLayerError: for a proof file, naming a layer that the verifier does not know.

    Example:

    >>> import keras
    >>> dense = keras.layers.Dense(2, kernel_initializer="identity", activation="relu")
    >>> model = keras.Sequential([keras.Input((2,)), dense])
    >>> found = gain_on(model, np.array([[2.0, -2.0], [0.1, -2.0]]), 1.0)
    >>> np.round(found, 6).tolist()
    [1.0, 1.0]
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"`norm` must be 'l2' or 'linf'. Received: norm={norm!r}.")
    if finite_float("radius", radius) <= 0:
        raise ValueError(f"`radius` must be a positive number. Received: radius={radius!r}.")
    x, shape = np.asarray(x, np.float64), getattr(model, "input_shape", None)
    if x.ndim < 1 or (isinstance(shape, tuple) and x.ndim != len(shape)):
        raise ValueError(
            f"`x` must hold inputs (n, …) of the model's input shape {shape}. Received: shape "
            f"{x.shape}. Add an axis for one input: x[None]."
        )
    found, balls = [], []
    for point in x:
        region, memory = Region.ball(point, radius, norm), Memory()
        network, flow, traced = read_around(model, region, outputs)
        around = surround_proved(flow, traced, region, effort or Effort(), memory)
        kind = SlopeGains if norm == "l2" else EntryGains
        found.append(kind(around).gain())
        if proof is not None:
            balls.append(Ball(network, flow, traced, region, memory, outputs))
    if proof is not None:
        save_gains(proof, balls, np.array(found), radius, norm)
    return np.array(found)


def read_around(model, region, outputs):
    """`(network, flow, trace)` of a model at a region's centre, compared with the model itself."""
    if outputs not in ("logits", "model"):
        raise ValueError(f"`outputs` must be 'logits' or 'model'. Received: outputs={outputs!r}.")
    network = read_network(model, [(None, *region.center.shape)], on_region=True)
    validate(network, [_carried(region.center[None], network.graph.inputs[0].dtype)])
    flow = flow_of(network, decision=outputs == "model")
    return network, flow, trace(flow, region.center)


def _carried(x, dtype):
    """Inputs in the model's input dtype, or in float32, which holds those of bfloat16."""
    if "int" in dtype:  # compared at the nearest that it can hold
        limits = np.iinfo(dtype)
        return np.clip(np.rint(x), limits.min, limits.max).astype(dtype)
    with np.errstate(over="ignore"):
        found = x.astype("float32" if dtype == "bfloat16" else dtype)
    if not np.all(np.isfinite(found)):
        raise ValueError(
            "The centre of a region must be finite in the model's input dtype. Received: numbers "
            f"up to {np.max(np.abs(x)):.3g} for {dtype}. Use a centre that the model can receive."
        )
    return found


class SlopeGains(LocalGains):
    """l2 gains between any two points of the region, from the slopes of a finished `Around`.

    Args:
        around: finished `Around`.
        slopes: function of an `Elementwise` step: bounds on its slopes; `localgains.chords` gives
            gains from the centre to the points of the region instead.
    """

    def __init__(self, around, slopes=None):
        super().__init__(around)
        self.bounds = [1.0]
        for k, link in enumerate(around.flow.links, 1):
            radii = [self.bounds[i] for i in link.inputs]
            shapes = around._shapes(link)
            step = around.steps.get(k)
            if isinstance(step, (WindowMaximum, Curved)):
                self._add_several(k, step)
                found = gains.radius(link.operation, shapes, radii)
                if isinstance(step, Curved):
                    found = min(found, rounding.product_up(step.gain, radii[0]))
                self.bounds.append(found)
            elif k in around.steps and has_pieces(link.operation):
                low, high = slopes(around.steps[k]) if slopes else around.steps[k].slopes
                steepest = float(np.max(np.maximum(np.abs(low), np.abs(high)), initial=0.0))
                self.middles[k] = (low + high) / 2
                spread = np.where(high > low, (high - low) / 2 * (1 + 1e-12), 0.0)
                self.roots[k] = np.sqrt(spread) * (1 + 1e-12)
                self.signals[k] = self.radius(link.inputs[0], spread)
                self.bounds.append(rounding.product_up(steepest, radii[0]))
            elif isinstance(link.operation, Whole):
                self.bounds.append(gain_of(link.operation.nodes, radii))
            elif around._linear(link):
                self.bounds.append(maps.radius(link.operation, shapes, radii))
            else:
                self.bounds.append(gains.radius(link.operation, shapes, radii))

    def gain(self):
        """Upper bound on the gain to the output."""
        size = self.around.values[-1].size
        return float(self.radius(self.around.flow.output, np.ones(size)))

    def row_gains(self, rows):
        """Upper bounds, (m,), on the gains of linear functions of the output, `rows` (m, outputs).

        ‖cᵀJ‖r + Σ_j ‖cᵀJ_j s_j^½‖·t_j, with the linearised maps of (t): a row's norm is exact.
        """
        sizes = rounding.euclidean_norms_up(rows)
        whole = sizes * self.gain() * (1 + 1e-12)
        held, parts, lost = self.linearised.get(self.around.flow.output, ((), (), 0.0))
        if len(held) != rows.shape[1]:
            return whole
        unit, found = rounding.UNIT_ROUNDOFF["float64"], lost * sizes
        for part in parts:
            matrix = np.asarray(part.rows.matrix, np.float64)
            if not matrix.size:
                continue
            # Of what the matrix errs by, and of this product.
            wrong = part.wrong + rounding.gamma(len(held) + 2, unit) * part.rows.size
            wrong += rounding.TINY * matrix.size
            own = rounding.euclidean_norms_up(rows @ matrix) + wrong * sizes
            found = found + own * part.moved
        return np.fmin(whole, found * (1 + 1e-9))

    def _radius_at(self, k):
        return self.bounds[k]

    def _entries_at(self, k):
        return self.bounds[k]

    def _noise_at(self, k):
        return 0.0

    def _lost(self, first, last):
        return 0.0


class EntryGains:
    """l∞ gains of every entry, between any two points of the region; `slopes` as above."""

    def __init__(self, around, slopes=None):
        self.around, self.slopes = around, {}
        self.bounds = [np.ones_like(around.values[0])]
        for k, link in enumerate(around.flow.links, 1):
            reads = [self.bounds[i] for i in link.inputs]
            if k in around.steps and has_pieces(link.operation):
                low, high = slopes(around.steps[k]) if slopes else around.steps[k].slopes
                self.slopes[k] = low, high
                steepest = np.maximum(np.abs(low), np.abs(high)).reshape(around.values[k].shape)
                found = steepest * reads[0]
            elif around._linear(link):
                terms = maps.terms(link.operation, around._shapes(link))
                found = maps.absolute(link.operation, reads)
                found = found * (1 + rounding.gamma(terms + 8, 2.0**-53))
            else:
                # From l∞ to l2 and back: ‖e‖₂ ≤ √n‖e‖_∞.
                sizes = [float(rounding.euclidean_norms_up(v)[0]) for v in reads]
                if isinstance(link.operation, Whole):
                    size = gain_of(link.operation.nodes, sizes)
                else:
                    size = gains.radius(link.operation, around._shapes(link), sizes)
                if isinstance(around.steps.get(k), Curved):
                    size = min(size, rounding.product_up(around.steps[k].gain, sizes[0]))
                found = np.full(around.values[k].shape, size)
            self.bounds.append(found * (1 + 1e-12) + rounding.TINY)

    def gain(self):
        """Upper bound on the largest row sum."""
        return float(np.max(self.row_gains(np.eye(self.around.values[-1].size))))

    def row_gains(self, rows):
        """Upper bounds, (m,), on the l1 norms of what `rows` (m, outputs) are of the input."""
        around, size = self.around, len(rows)
        target = around.flow.output
        held = {target: rows.reshape(size, *around.trace.shape(target))}
        total = np.zeros(size)
        for k in range(target, 0, -1):
            if k not in held:
                continue
            c = held.pop(k)
            link = around.flow.links[k - 1]
            flat = np.abs(c.reshape(size, -1))
            if k in around.steps and has_pieces(link.operation):
                low, high = self.slopes[k]
                source = self.bounds[link.inputs[0]].ravel()
                total += flat @ ((high - low) / 2 * source)
                # The rounding of the middles.
                total += 2.0**-50 * flat @ (np.maximum(np.abs(low), np.abs(high)) * source)
                found = [c * ((low + high) / 2).reshape(c.shape[1:])]
            elif around._linear(link):
                found = maps.adjoint(link.operation, c, around._shapes(link))
            else:
                total += flat @ self.bounds[k].ravel()
                continue
            # Rounding of the adjoint, relative to what it sums up.
            reads = [self.bounds[i] for i in link.inputs]
            if around._linear(link):
                total += (
                    rounding.gamma(around.sum_length, 2.0**-53)
                    * flat
                    @ maps.absolute(link.operation, reads).ravel()
                )
            for i, part in zip(link.inputs, found, strict=True):
                # What underflows of the rows.
                total += rounding.TINY * float(np.sum(self.bounds[i]))
                held[i] = held[i] + part if i in held else part
        if 0 in held:
            total += np.abs(held[0].reshape(size, -1)).sum(axis=1)
        whole = np.abs(rows) * np.where(rows != 0, self.bounds[target].ravel(), 0.0)
        found = np.fmin(np.sum(whole, axis=1), total)  # what overflows may be no number
        return np.where(np.isnan(found), np.inf, found * (1 + 1e-9))
