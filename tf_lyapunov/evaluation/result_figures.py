"""One figure per kind of result, for `.plot()`: on the user's own Matplotlib axes and settings."""

from __future__ import annotations

import functools

import numpy as np

from tf_lyapunov.attacks.base import AttackResult
from tf_lyapunov.bounds.upper_bound import GainBound
from tf_lyapunov.certification.certificate import Certificate
from tf_lyapunov.control.region import RegionOfAttraction
from tf_lyapunov.dynamics.certificate import DynamicsCertificate
from tf_lyapunov.evaluation.bracket import Bracket
from tf_lyapunov.evaluation.drawing import percent_formatter, require_matplotlib
from tf_lyapunov.evaluation.localized import LocalizedCurve
from tf_lyapunov.evaluation.measures import SuiteResult
from tf_lyapunov.local.outputs import OutputBounds
from tf_lyapunov.local.verifying import Verification
from tf_lyapunov.theory.designs import Design

# Radii at which a curve is drawn.
_POINTS = 200


def draw(result, axes=None):
    """Draws a result.

    Args:
        result: `Design`, `GainBound`, `Certificate`, `Bracket`, `AttackResult`, `SuiteResult`,
            `LocalizedCurve`, `RegionOfAttraction`, `DynamicsCertificate`, `OutputBounds` or
            `Verification`.
        axes: Matplotlib axes; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: if Matplotlib is not installed.
        TypeError: for something else.
    """
    require_matplotlib()
    if axes is None:
        import matplotlib.pyplot

        axes = matplotlib.pyplot.figure(layout="constrained").add_subplot()
    _draw(result, axes)
    return axes


@functools.singledispatch
def _draw(result, axes):
    raise TypeError(f"There is no figure of this. Received: {type(result).__name__}.")


def _bars(axes, names, values, label):
    places = np.arange(len(names))
    axes.barh(places, values)
    axes.set_yticks(places, [str(n)[:40] for n in names])
    axes.invert_yaxis()
    axes.set_xlabel(label)


@_draw.register
def _design(result: Design, axes):
    names = [f"layer {i}" for i in range(1, len(result.budgets) + 1)]
    _bars(axes, names, result.budgets, "budget: largest operator norm")
    axes.set_title(f"{result.verdict}, rule {result.rule}", parse_math=False)


@_draw.register
def _gain(result: GainBound, axes):
    rows = [c for c in result.contributions if c.kind != "input"]
    gains = [c.gain_upper_bound for c in rows]
    _bars(axes, [c.name for c in rows], gains, "gain of the layer, at most")
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    positive = [g for g in gains if 0 < g < np.inf]
    if positive and max(positive) > 20 * min(positive):
        axes.set_xscale("log")


@_draw.register
def _dynamics(result: DynamicsCertificate, axes):
    gains = [stage.gain_upper_bound for stage in result.stages]
    _bars(axes, [stage.name for stage in result.stages], gains, "gain over sequences, at most")
    axes.set_title(f"{result.verdict}, gain at most {result.gain_upper_bound:.4g}")


@_draw.register
def _ranges(result: OutputBounds, axes):
    places = np.arange(len(result.lower))
    axes.barh(places, result.upper - result.lower, left=result.lower)
    axes.set_yticks(places, [f"output {i}" for i in places])
    axes.invert_yaxis()
    axes.set_xlabel("proved range")


@_draw.register
def _property(result: Verification, axes):
    """Between the proved and the smallest found margin lies the truth."""
    ends = [v for v in (result.bound, result.least) if np.isfinite(v)]
    if not ends:
        raise ValueError(
            f"A figure needs a margin. Received: {result.status} without a bound or an attack."
        )
    axes.barh([0], [max(ends) - min(ends)], left=[min(ends)], color="0.8")
    axes.axvline(0.0, color="0.3", linewidth=1)
    for value, mark, label in ((result.bound, "<", "proved"), (result.least, "o", "found")):
        if np.isfinite(value):
            axes.plot([value], [0], mark, label=f"smallest margin {label}")
    axes.set(xlabel="margin of the property", yticks=[])
    axes.set_title(result.status)
    axes.legend()


@_draw.register
def _certificate(result: Certificate, axes):
    finite = result.radius[np.isfinite(result.radius)]
    end = float(finite.max()) if len(finite) and finite.max() > 0 else 1.0
    radii = np.linspace(0.0, 1.02 * end, _POINTS)
    axes.step(radii, result.certified_accuracy(radii), where="post", label="certified")
    axes.axhline(result.accuracy, linestyle="--", label="accuracy without a proof")
    axes.set(xlabel=f"radius, {result.norm} norm", ylabel="share of inputs", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(percent_formatter())
    axes.legend()


@_draw.register
def _bracket(result: Bracket, axes):
    order = np.flatnonzero(result.found)
    order = order[np.argsort(result.upper[order], kind="stable")]
    places, lower = np.arange(1, len(order) + 1), result.lower[order]
    axes.plot(places, result.upper[order], ".-", label="smallest found by attacks")
    axes.plot(places, np.where(lower > 0, lower, np.nan), ".-", label="proved lower bound")
    axes.set(xlabel="inputs, nearest first", ylabel="l2 norm")
    if len(order):
        axes.set_yscale("log")
    axes.legend()


@_draw.register
def _attack(result: AttackResult, axes):
    found = np.sort(result.distance[result.broken])
    end = float(found.max()) if len(found) else 1.0
    radii = np.linspace(0.0, 1.02 * end, _POINTS)
    right = int(result.right_before.sum())
    left = right - np.searchsorted(found, radii, side="right")
    axes.step(radii, left / max(len(result), 1), where="post")
    axes.set(xlabel=f"radius, {result.norm.__name__} norm", ylabel="not broken", ylim=(0, 1.02))
    axes.set_title(result.attack[:60], parse_math=False)
    axes.yaxis.set_major_formatter(percent_formatter())


@_draw.register
def _suite(result: SuiteResult, axes):
    rows = result.rows
    names = [f"{r['kind']} {r['name']} {r['level']:g}" for r in rows]
    _bars(axes, names, [r["error"] for r in rows], "error")
    axes.xaxis.set_major_formatter(percent_formatter())


@_draw.register
def _curve(result: LocalizedCurve, axes):
    for name in ("certified", "gradient", "monte_carlo"):
        values = np.asarray(getattr(result, name), np.float64)
        axes.plot(result.radii, np.where(np.isfinite(values), values, np.nan), ".-", label=name)
    axes.set(xlabel="radius", ylabel="gain within the radius")
    axes.legend()


@_draw.register
def _region(result: RegionOfAttraction, axes):
    """The ellipsoid's shadow in the first two states, with simulated trajectories."""
    if result.matrix is None or len(result.box) < 2:
        raise ValueError(
            "A figure needs a proved region of two states or more. "
            f"Received: {result.verdict} with {len(result.box)} states."
        )
    paths = result.attack(48, steps=200).trajectories
    for k in range(paths.shape[1]):
        axes.plot(paths[:, k, 0], paths[:, k, 1], linewidth=0.7, alpha=0.6, color="0.5")
    # The shadow of xᵀPx ≤ 1 in two states is the ellipse of that block of P⁻¹.
    root = np.linalg.cholesky(np.linalg.inv(result.matrix)[:2, :2])
    angle = np.linspace(0, 2 * np.pi, _POINTS)
    edge = root @ np.stack([np.cos(angle), np.sin(angle)])
    axes.plot(*edge, linewidth=2, label="proved region of attraction")
    h = result.box
    axes.plot([-h[0], h[0], h[0], -h[0], -h[0]], [-h[1], -h[1], h[1], h[1], -h[1]],
              linestyle="--", label="box")  # fmt: skip
    axes.set(xlabel="x₁", ylabel="x₂")
    axes.legend(loc="upper right")
