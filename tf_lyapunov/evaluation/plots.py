"""Figures of a run: accuracy by radius, gains, budgets and cascade margin by epoch.

Every function returns a Matplotlib `Figure` (no global state, no display), drawn in a light or a
dark theme with colours that colour-blind readers can tell apart, and line styles besides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_lyapunov.evaluation import perturbation_plots, wording
from tf_lyapunov.evaluation.drawing import (
    THEMES,
    data_url,
    new_figure,
    percent_formatter,
    require_matplotlib,
    save,
    style,
    to_svg,
    whole_epochs,
)
from tf_lyapunov.evaluation.results import Results

__all__ = [
    "accuracy_by_radius",
    "cascade_margin_by_epoch",
    "gain_comparison",
    "layer_norms_by_epoch",
    "output_change_by_radius",
    "radius_histogram",
    "report_figures",
    "require_matplotlib",
    "save",
    "to_svg",
    "training_by_epoch",
    "write_figures",
]

_MARKERS = ("s", "^", "D", "v", "P", "X")
_MOST_PANELS = 8


def accuracy_by_radius(
    rows: Sequence[Mapping[str, Any]],
    *,
    curve: Mapping[str, Sequence[float]] | None = None,
    theme: str = "light",
):
    """Clean, certified and attacked accuracy against the radius.

    Args:
        rows: `results.Results.rows`.
        curve: {"radius", "certified"}, the certified accuracy on a finer grid, or None.
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`.
    """
    rows = sorted((row for row in rows if row.get("radius") is not None), key=_radius)
    with style(theme) as colours:
        figure, (axes,) = new_figure(7, 3.8)
        radii = [row["radius"] for row in rows]
        top = max(radii, default=0.0)
        if any(row.get("clean") is not None for row in rows):
            points = [(row["radius"], row["clean"]) for row in rows if row.get("clean") is not None]
            start = [(0.0, points[0][1])] if points[0][0] > 0 else []
            x, y = zip(*start, *points, strict=True)
            axes.plot(x, y, "--", color=colours["clean"], label="clean (no change)")
        for index, name in enumerate(wording.attack_names(rows)):
            points = [
                (row["radius"], row["attacked"][name])
                for row in rows
                if (row.get("attacked") or {}).get(name) is not None
            ]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            colour = colours["others"][index % len(colours["others"])]
            marker = _MARKERS[index % len(_MARKERS)]
            axes.plot(x, y, f"-{marker}", color=colour, label=f"under {name} (measured)")
        if curve and curve.get("radius"):
            x, y = np.asarray(curve["radius"], float), np.asarray(curve["certified"], float)
            top = top or float(x.max())
            axes.plot(x, y, "-", color=colours["certified"], label="certified (proved)")
            axes.fill_between(x, 0, y, color=colours["certified"], alpha=0.12, linewidth=0)
        else:
            points = [
                (row["radius"], row["certified"])
                for row in rows
                if row.get("certified") is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "-o", color=colours["certified"], label="certified (proved)")
                axes.fill_between(x, 0, y, color=colours["certified"], alpha=0.12, linewidth=0)
        axes.set(xlabel="radius (l2)", ylabel="accuracy", ylim=(0, 1.02))
        axes.set_xlim(0, (top or 1.0) * 1.03)
        axes.yaxis.set_major_formatter(percent_formatter())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        return figure


def output_change_by_radius(
    rows: Sequence[Mapping[str, Any]],
    gain_upper_bound: float | None = None,
    *,
    theme: str = "light",
):
    """Measured change of the outputs under attack beside the proved bound, gain × radius.

    Args:
        rows: `results.Results.rows`, with "output_change".
        gain_upper_bound: the proved gain, or None.
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`.
    """
    rows = sorted((row for row in rows if row.get("radius")), key=_radius)
    with style(theme) as colours:
        figure, (axes,) = new_figure(7, 3.4)
        top = max((row["radius"] for row in rows), default=1.0)
        if gain_upper_bound is not None:
            axes.plot(
                [0, top],
                [0, top * gain_upper_bound],
                "--",
                color=colours["bound"],
                label="proved bound",
            )
        names = list(dict.fromkeys(n for row in rows for n in row.get("output_change") or {}))
        for index, name in enumerate(names):
            colour = colours["others"][index % len(colours["others"])]
            marker = _MARKERS[index % len(_MARKERS)]
            for kind, line in (("max", "-"), ("mean", ":")):
                points = [
                    (row["radius"], row["output_change"][name][kind])
                    for row in rows
                    if (row.get("output_change") or {}).get(name, {}).get(kind) is not None
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    label = f"{'largest' if kind == 'max' else 'mean'}, {name}"
                    axes.plot(x, y, line + marker, color=colour, label=label)
        axes.set(xlabel="radius (l2)", ylabel="change of the scores (l2)")
        axes.set_xlim(0, top * 1.03)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left")
        return figure


def gain_comparison(gain: Mapping[str, Any], *, theme: str = "light"):
    """Claimed, proved and measured gain as bars.

    Args:
        gain: `results.Results.gain`.
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`.
    """
    bars = [
        ("promised", gain.get("claimed"), "clean", wording.round_up),
        ("proved upper bound", gain.get("upper_bound"), "bound", wording.round_up),
        ("largest measured", gain.get("measured_max"), None, wording.number),
        ("mean measured", gain.get("measured_mean"), None, wording.number),
    ]
    bars = [bar for bar in bars if bar[1] is not None]
    with style(theme) as colours:
        figure, (axes,) = new_figure(7, 0.9 + 0.42 * max(len(bars), 1))
        for place, (_, value, key, shown) in enumerate(reversed(bars)):
            colour = colours["others"][0] if key is None else colours[key]
            axes.barh(place, value, color=colour, height=0.62)
            axes.annotate(f" {shown(value)}", (value, place), va="center", color=colours["text"])
        axes.set_yticks(range(len(bars)), [bar[0] for bar in reversed(bars)])
        values = [bar[1] for bar in bars if bar[1] and bar[1] > 0]
        if values and max(values) > 50 * min(values):
            axes.set_xscale("log")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.15)
        axes.set_xlabel("change of the scores per unit of input change")
        return figure


def layer_norms_by_epoch(history: Sequence[Mapping[str, Any]], *, theme: str = "light"):
    """Each layer's spectral norm beside its budget, by epoch.

    Args:
        history: `results.Results.history`, with "sigma/<layer>" and "budget/<layer>".
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`: one panel a layer up to eight, else the ratios to the budgets.
    """
    layers = _layers(history)
    with style(theme) as colours:
        if len(layers) > _MOST_PANELS:
            return _norm_ratios(history, layers, colours)
        columns = min(4, max(1, len(layers)))
        rows = -(-max(1, len(layers)) // columns)
        figure, panels = new_figure(7 if columns < 4 else 8, 2.1 * rows + 0.5, columns, rows)
        for axes, layer in zip(panels, layers, strict=False):
            x, y = _series(history, f"sigma/{layer}")
            axes.plot(x, y, "-", color=colours["clean"], label="spectral norm")
            x, y = _series(history, f"budget/{layer}")
            if len(x):
                axes.plot(x, y, "--", color=colours["others"][0], label="budget")
            axes.set_title(layer)
            axes.set_xlabel("epoch")
            _from_zero(axes)
            whole_epochs(axes)
        for axes in panels[len(layers) :]:
            axes.set_visible(False)
        if layers:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return figure


def _norm_ratios(history, layers, colours):
    figure, (axes,) = new_figure(7, 3.4)
    for layer in layers:
        x, sigma = _series(history, f"sigma/{layer}")
        where, budget = _series(history, f"budget/{layer}")
        budgets = dict(zip(where, budget, strict=True))
        points = [(e, s / budgets[e]) for e, s in zip(x, sigma, strict=True) if budgets.get(e)]
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1, color=colours["clean"], alpha=0.6)
    axes.axhline(1.0, linestyle="--", color=colours["others"][0], label="budget")
    axes.set(xlabel="epoch", ylabel="spectral norm / budget")
    axes.set_ylim(bottom=0)
    axes.legend()
    whole_epochs(axes)
    return figure


def cascade_margin_by_epoch(history: Sequence[Mapping[str, Any]], *, theme: str = "light"):
    """The trained layers' margin in the cascade test by epoch; below zero nothing is proved.

    Args:
        history: `results.Results.history`, with "cascade_margin".
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`.
    """
    with style(theme) as colours:
        figure, (axes,) = new_figure(7, 2.8)
        x, y = _series(history, "cascade_margin")
        axes.plot(x, y, "-o", color=colours["clean"], label="margin")
        axes.axhline(0.0, linestyle="--", color=colours["others"][0], label="needed: at least 0")
        axes.set(xlabel="epoch", ylabel="margin")
        axes.legend()
        whole_epochs(axes)
        return figure


def training_by_epoch(history: Sequence[Mapping[str, Any]], *, theme: str = "light"):
    """Loss, accuracy and gain bound by epoch, as far as they were recorded.

    Args:
        history: `results.Results.history`.
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`.
    """
    panels = [
        ("loss", ("loss", "val_loss"), False),
        ("accuracy", ("accuracy", "val_accuracy"), True),
        ("gain, upper bound", ("gain_upper_bound",), False),
    ]
    panels = [p for p in panels if any(len(_series(history, key)[0]) for key in p[1])]
    with style(theme) as colours:
        figure, all_axes = new_figure(7, 2.7, columns=max(1, len(panels)))
        for axes, (title, keys, share) in zip(all_axes, panels, strict=False):
            for key, line in zip(keys, ("-", "--"), strict=False):
                x, y = _series(history, key)
                if len(x):
                    label = "validation" if key.startswith("val_") else "training"
                    axes.plot(x, y, line, color=colours["clean"], label=label)
            axes.set(title=title, xlabel="epoch")
            if share:
                axes.yaxis.set_major_formatter(percent_formatter())
            elif len(keys) == 1:
                _from_zero(axes)
            if len(keys) > 1:
                axes.legend()
            whole_epochs(axes)
        return figure


def radius_histogram(histogram: Mapping[str, Sequence[float]], *, theme: str = "light"):
    """How many inputs have which certified radius.

    Args:
        histogram: {"edges", "counts"} as in `summaries.certificate_summary`.
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`.
    """
    edges = np.asarray(histogram["edges"], float)
    counts = np.asarray(histogram["counts"], float)
    with style(theme) as colours:
        figure, (axes,) = new_figure(7, 2.8)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours["certified"])
        axes.set(xlabel="certified radius (l2; 0: misclassified)", ylabel="inputs")
        axes.set_xlim(0, float(edges[-1]) or 1.0)
        return figure


def report_figures(results) -> list[dict[str, str]]:
    """Every figure that `results` has data for, ready to be inlined.

    Args:
        results: a `results.Results`.

    Returns:
        Dicts "key", "title", "alt" (what it shows, in words), "light" and "dark" (data URLs).
    """
    clean = Results.from_dict(results.to_dict())
    return [
        {
            "key": key,
            "title": title,
            "alt": alt,
            **{theme: data_url(draw(theme)) for theme in THEMES},
        }
        for key, title, alt, draw in _available(clean)
    ]


def write_figures(results, directory: str | os.PathLike) -> list[Path]:
    """Writes every figure that `results` has data for as `<key>.svg` into `directory`."""
    clean = Results.from_dict(results.to_dict())
    return [
        save(draw("light"), Path(directory) / f"{key}.svg") for key, _, _, draw in _available(clean)
    ]


def _available(results):
    """(key, title, alt text, function of the theme) for each figure with data."""
    rows, history = results.rows, results.history
    certificate, gain = results.certificate or {}, results.gain
    curve, histogram = certificate.get("curve"), certificate.get("histogram")
    if rows or curve:
        yield (
            "accuracy",
            "Accuracy by radius",
            wording.accuracy_alt(rows),
            lambda theme: accuracy_by_radius(rows, curve=curve, theme=theme),
        )
    if results.bracket:
        yield from perturbation_plots.report_entries(results.bracket)
    bound = wording.proved_gain_of(results)
    # Gain times radius bounds the change within l2 balls, not within others of the same radius.
    others = wording.attacks_outside_l2(results)
    changes = [
        {
            "radius": row.get("radius"),
            "output_change": {
                name: change
                for name, change in (row.get("output_change") or {}).items()
                if name not in others
            },
        }
        for row in rows
    ]
    if any(row["output_change"] for row in changes):
        yield (
            "output_change",
            "Change of the outputs under attack",
            "Line chart: largest and mean measured change of the scores by radius, beside the "
            f"proved bound of {wording.round_up(bound)} times the radius.",
            lambda theme: output_change_by_radius(changes, bound, theme=theme),
        )
    if any(gain.get(k) is not None for k in ("claimed", "upper_bound", "measured_max")):
        yield (
            "gain",
            "Gain: promised, proved, measured",
            f"Bar chart: promised {wording.round_up(gain.get('claimed'))}, proved upper bound "
            f"{wording.round_up(gain.get('upper_bound'))}, largest measured "
            f"{wording.number(gain.get('measured_max'))}.",
            lambda theme: gain_comparison(gain, theme=theme),
        )
    if histogram and histogram.get("counts"):
        yield (
            "radii",
            "Certified radii",
            "Histogram of the inputs' certified radii; median "
            f"{wording.round_down(certificate.get('median_radius'))}.",
            lambda theme: radius_histogram(histogram, theme=theme),
        )
    if _layers(history):
        yield (
            "layers",
            "Spectral norms and budgets by epoch",
            f"Line charts by epoch of the spectral norm and budget of {len(_layers(history))} "
            "layers.",
            lambda theme: layer_norms_by_epoch(history, theme=theme),
        )
    margin = _series(history, "cascade_margin")[1]
    if len(margin):
        yield (
            "cascade",
            "Cascade margin by epoch",
            "Line chart of the trained layers' margin in the cascade test by epoch; last value "
            f"{wording.round_down(margin[-1])}.",
            lambda theme: cascade_margin_by_epoch(history, theme=theme),
        )
    if any(len(_series(history, key)[0]) for key in ("loss", "accuracy")):
        yield (
            "training",
            "Training",
            f"Line charts of loss, accuracy and gain bound over {len(history)} epochs.",
            lambda theme: training_by_epoch(history, theme=theme),
        )


def _from_zero(axes) -> None:
    """Axis from zero with room above, so that lines near a constant stay visible and honest."""
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])


def _layers(history) -> list[str]:
    names = (key[len("sigma/") :] for row in history for key in row if key.startswith("sigma/"))
    return list(dict.fromkeys(names))


def _series(history, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one column, rows without it left out."""
    points = [
        (row.get("epoch") or index + 1, row[key])
        for index, row in enumerate(history)
        if row.get(key) is not None
    ]
    return [p[0] for p in points], [p[1] for p in points]


def _radius(row) -> float:
    return row["radius"]
