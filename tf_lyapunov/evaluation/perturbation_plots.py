"""Figures of minimal perturbations: brackets, deviations, class changes, galleries.

Every function returns a Matplotlib `Figure` (no global state, no display) in a light or dark theme.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

import numpy as np

from tf_lyapunov.evaluation.drawing import new_figure, percent_formatter, style

_LINES = ("-o", "--s", ":^", "-.D")


def bracket_figure(found, *, title: str = "", theme: str = "light", unit: str = "l2 norm"):
    """Lower and upper bounds of every attacked input, sorted by the smallest found.

    Args:
        found: `Bracket`.
        title: over the figure.
        theme: "light" or "dark".
        unit: label of the vertical axis.

    Returns:
        A Matplotlib `Figure`: the shaded part holds every minimal perturbation.

    Raises:
        ValueError: if no input was perturbed.

    Reference: ours; the pairs behind Peck et al., Table 5.1.
    """
    order = _attacked(found)
    order = order[np.argsort(found.upper[order], kind="stable")]
    x = np.arange(1, len(order) + 1)
    with style(theme) as colours:
        figure, (axes,) = new_figure(7, 3.8)
        attack, claimed = colours["others"][:2]
        lower, upper = found.lower[order], found.upper[order]
        axes.plot(x, upper, color=attack, label="smallest found (attacks)")
        shown = np.where(lower > 0, lower, np.nan)
        axes.plot(x, shown, color=colours["bound"], label="proved lower bound")
        axes.fill_between(x, shown, upper, color=colours["grid"], alpha=0.6, linewidth=0)
        if found.published is not None:
            claim = np.where(found.published[order] > 0, found.published[order], np.nan)
            axes.plot(x, claim, ":", color=claimed, label="published rules (no proof)")
        axes.set(xlabel="inputs, nearest first", ylabel=unit, yscale="log", title=title)
        axes.set_xlim(1, max(len(order), 2))
        axes.legend(loc="best", fontsize=8)
        return figure


def distance_histogram(found, *, bins: int = 30, theme: str = "light", unit: str = "l2 norm"):
    """How many inputs have which lower bound, and which smallest perturbation found.

    Args:
        found: `Bracket`.
        bins: number of bins, equal in the logarithm.
        theme: "light" or "dark".
        unit: label of the horizontal axis.

    Raises:
        ValueError: if no input was perturbed.
    """
    rows = _attacked(found)
    lower, upper = found.lower[rows], found.upper[rows]
    ends = [v[(v > 0) & np.isfinite(v)] for v in (lower, upper)]
    both = np.concatenate(ends)
    edges = np.geomspace(both.min() * 0.99, both.max() * 1.01, bins + 1)
    with style(theme) as colours:
        figure, (axes,) = new_figure(7, 3.4)
        axes.hist(ends[0], edges, color=colours["bound"], alpha=0.65, label="proved lower bound")
        axes.hist(
            ends[1], edges, color=colours["others"][0], alpha=0.65, label="smallest found",
            hatch="//", edgecolor=colours["text"], linewidth=0.4,
        )  # fmt: skip
        axes.set(xscale="log", xlabel=unit, ylabel="inputs")
        axes.legend(fontsize=8)
        return figure


def boxplots(
    groups: Mapping[str, Sequence[float]],
    *,
    ylabel: str = "deviation from the lower bound",
    log: bool = False,
    theme: str = "light",
):
    """Boxes of the quartiles of several groups of numbers, whiskers at 1.5 interquartile ranges.

    Args:
        groups: name -> numbers; those not finite are left out.
        ylabel: of the vertical axis.
        log: logarithmic axis, for positive numbers.
        theme: "light" or "dark".

    Raises:
        ValueError: if a group holds no finite number.

    Reference: Peck et al., Figures 3.2, 4.1, 4.2 and 5.11.
    """
    values = {name: np.asarray(v, float) for name, v in groups.items()}
    values = {name: v[np.isfinite(v)] for name, v in values.items()}
    empty = [name for name, v in values.items() if not len(v)]
    if empty or not values:
        raise ValueError(f"Every group must hold finite numbers. Received: none in {empty}.")
    with style(theme) as colours:
        figure, (axes,) = new_figure(max(3.5, 0.9 * len(values) + 1.6), 3.6)
        line = dict(color=colours["text"], linewidth=1)
        drawn = axes.boxplot(
            list(values.values()), widths=0.6, patch_artist=True,
            boxprops=dict(facecolor=colours["grid"], edgecolor=colours["text"]),
            medianprops=dict(color=colours["others"][0], linewidth=2),
            whiskerprops=line, capprops=line,
            flierprops=dict(marker=".", markersize=3, markeredgecolor=colours["text"]),
        )  # fmt: skip
        for line in drawn["fliers"]:  # thousands of points as one image
            line.set_rasterized(True)
        axes.set_xticks(range(1, len(values) + 1), list(values))
        axes.set_ylabel(ylabel)
        axes.xaxis.grid(False)
        if log:
            axes.set_yscale("log")
        return figure


def change_counts(labels, predictions_adv, classes: int) -> np.ndarray:
    """Counts (classes, classes) of inputs of class i, the row, that were decided as j.

    Example:

    >>> change_counts([0, 0, 1], [1, 1, 0], 2).tolist()
    [[0, 2], [1, 0]]
    """
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.asarray(labels), np.asarray(predictions_adv)), 1)
    return counts


def class_changes(counts, names: Sequence[str] | None = None, *, theme: str = "light"):
    """Heat map of the classes before and after perturbation, with the counts written in.

    Args:
        counts: `change_counts`.
        names: of the classes; default: their numbers.
        theme: "light" or "dark".

    Raises:
        ValueError: if `counts` is not square, or `names` has another length.

    Reference: Peck et al., Figure 5.10.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"`counts` must be square. Received: shape {counts.shape}.")
    names = [str(i) for i in range(len(counts))] if names is None else list(names)
    if len(names) != len(counts):
        raise ValueError(f"`names` must name {len(counts)} classes. Received: {len(names)}.")
    with style(theme) as colours:
        side = 1.8 + 0.42 * len(counts)
        figure, (axes,) = new_figure(side + 0.6, side)
        image = axes.imshow(counts, cmap="cividis")
        figure.colorbar(image, ax=axes, shrink=0.8, label="inputs")
        middle = (counts.max() + counts.min()) / 2
        for (row, column), count in np.ndenumerate(counts):
            colour = "black" if count > middle else "white"
            axes.text(column, row, int(count), ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="class after perturbation", ylabel="class before")
        axes.grid(False)
        axes.tick_params(colors=colours["text"])
        return figure


def gallery(clean, perturbed, titles: Sequence[str] | None = None, *, theme: str = "light"):
    """Images, their perturbations and the perturbed images, a row for each input.

    Images of a row share their grey levels; the perturbation is drawn around zero, enlarged to the
    whole range. Several perturbed images in a row (iterative perturbation) get two columns each.

    Args:
        clean: array (n, height, width, 1 or 3), or without channels.
        perturbed: array of that shape, or a sequence of such arrays.
        titles: n texts, written over the perturbed images.
        theme: "light" or "dark".

    Raises:
        ValueError: for other shapes, or another number of titles.

    Reference: Peck et al., Figures 5.8, 5.9 and 2.5.
    """
    clean = _images("clean", clean)
    several = isinstance(perturbed, (list, tuple))
    steps = [_images("perturbed", p) for p in (perturbed if several else [perturbed])]
    if any(step.shape != clean.shape for step in steps):
        raise ValueError(
            f"`perturbed` must have the shape of `clean`, {clean.shape}. "
            f"Received: {[step.shape for step in steps]}."
        )
    if titles is not None and len(titles) != len(clean):
        raise ValueError(
            f"`titles` must hold {len(clean)} texts, one for each input. Received: {len(titles)}."
        )
    columns = 1 + 2 * len(steps)
    with style(theme):
        figure, axes = new_figure(1.5 * columns, 1.6 * len(clean) + 0.2, columns, len(clean))
        grid = np.asarray(axes).reshape(len(clean), columns)
        for row, axes_of_row in enumerate(grid):
            panels, before = [clean[row]], clean[row]
            for step in steps:
                panels += [step[row] - before, step[row]]
                before = step[row]
            images = np.stack([clean[row], *(s[row] for s in steps)])
            low, high = images.min(), images.max()
            for column, (axis, panel) in enumerate(zip(axes_of_row, panels, strict=True)):
                is_change = column % 2 == 1
                size = np.abs(panel).max() or 1.0
                ends = (-size, size) if is_change else (low, max(high, low + 1e-12))
                _show(axis, panel, ends, "RdBu_r" if is_change else "gray")
                if is_change:
                    axis.set_title(f"±{size:.2g}", fontsize=8)
            if titles is not None:
                axes_of_row[-1].set_title(titles[row], fontsize=8)
        return figure


def regularization_curves(
    weights: Sequence[float], panels: Mapping[str, Sequence[float]], *, theme: str = "light"
):
    """Accuracy and error rate, and perturbations, against the weight of a regulariser.

    Args:
        weights: ℓ ≥ 0, increasing.
        panels: name -> one number per weight; names with "rate" or "accuracy" share the axis of
            shares, the others a logarithmic one.
        theme: "light" or "dark".

    Raises:
        ValueError: if a curve has another length.

    Reference: Peck et al., Figure 4.3.
    """
    _check_lengths(weights, panels)
    shares = [name for name in panels if "rate" in name or "accuracy" in name]
    others = [name for name in panels if name not in shares]
    x = np.asarray(weights, float)
    with style(theme) as colours:
        figure, axes = new_figure(8, 3.2, columns=2)
        palette = (colours["bound"], *colours["others"])
        for axis, names in zip(axes, (shares, others), strict=True):
            for index, name in enumerate(names):
                values = [np.nan if v is None else v for v in panels[name]]
                line, colour = _LINES[index % len(_LINES)], palette[index % len(palette)]
                axis.plot(x, values, line, color=colour, label=name, markersize=4)
            smallest = x[x > 0].min(initial=1.0)
            axis.set_xscale("symlog", linthresh=smallest)
            axis.set(xlabel="weight ℓ")
            if names:
                axis.legend(fontsize=8)
        axes[0].set_ylim(0, 1.02)
        axes[0].yaxis.set_major_formatter(percent_formatter())
        axes[1].set_yscale("log")
        axes[1].set_ylabel("median l2 norm")
        return figure


def relative_curves(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    xlabel: str = "layers",
    log: bool = False,
    theme: str = "light",
):
    """Relative increases of bounds, one line each; None leaves a point out.

    Args:
        x: horizontal axis.
        curves: name -> one number, or None, per point.
        xlabel: of the horizontal axis.
        log: logarithmic vertical axis.
        theme: "light" or "dark".

    Raises:
        ValueError: if a curve has another length.

    Reference: Peck et al., Figures 5.12 and 5.13.
    """
    _check_lengths(x, curves)
    with style(theme) as colours:
        figure, (axes,) = new_figure(5, 3.2)
        palette = (colours["bound"], *colours["others"])
        for index, (name, values) in enumerate(curves.items()):
            values = [np.nan if v is None else v for v in values]
            axes.plot(
                x, values, _LINES[index % len(_LINES)], color=palette[index % len(palette)],
                label=name, markersize=4,
            )  # fmt: skip
        axes.set(xlabel=xlabel, ylabel="relative to the network before")
        if log:
            axes.set_yscale("log")
        axes.legend(fontsize=8)
        return figure


def report_entries(record: Mapping):
    """(key, title, alt text, function of the theme) of the figures of a `Bracket.record`."""
    if not record.get("lower"):
        return
    arrays = {
        name: None if record.get(name) is None else np.asarray(record[name], float)
        for name in ("lower", "upper", "published")
    }
    found = types.SimpleNamespace(found=np.ones(len(arrays["lower"]), bool), **arrays)
    text = f"{len(arrays['lower'])} inputs"
    yield (
        "bracket",
        "Proof and attack, input by input",
        f"Line chart of {text}: the smallest perturbation found above the proved lower bound.",
        lambda theme: bracket_figure(found, theme=theme),
    )
    yield (
        "bracket_histogram",
        "How far away the class changes",
        f"Histograms of proved lower bounds and smallest perturbations found, {text}.",
        lambda theme: distance_histogram(found, theme=theme),
    )
    boxes = {"found - proved": found.upper - found.lower}
    if found.published is not None:
        boxes["found - published rules"] = found.upper - found.published
    yield (
        "bracket_deviations",
        "Distance between proof and attack",
        f"Boxplot of the smallest perturbation found minus the lower bound, {text}.",
        lambda theme: boxplots(boxes, theme=theme),
    )
    labels, changed = record["labels"], record["predictions_adv"]
    classes = 1 + max(*labels, *changed)
    if classes <= 30:
        counts = change_counts(labels, changed, classes)
        yield (
            "class_changes",
            "Which class becomes which",
            f"Heat map of classes before and after the perturbation, {text}.",
            lambda theme: class_changes(counts, theme=theme),
        )
    images = record.get("images")
    if images:
        yield (
            "bracket_gallery",
            "Inputs, perturbations, perturbed inputs",
            "Images: " + "; ".join(images["titles"]) + ".",
            lambda theme: gallery(
                images["clean"], np.asarray(images["perturbed"]), images["titles"], theme=theme
            ),
        )


def _check_lengths(x, curves):
    for name, values in curves.items():
        if len(values) != len(x):
            raise ValueError(
                f"Every curve must have {len(x)} points. Received: {len(values)} in {name!r}."
            )


def _attacked(found):
    rows = np.flatnonzero(found.found)
    if not len(rows):
        raise ValueError("Nothing to draw: no input was perturbed. Received: a bracket without.")
    return rows


def _images(name, images):
    images = np.asarray(images, float)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3) or not len(images):
        raise ValueError(
            f"`{name}` must hold images (n, height, width, 1 or 3). Received: shape {images.shape}."
        )
    return images


def _show(axis, panel, ends, colours):
    low, high = ends
    if panel.ndim == 3:
        axis.imshow(np.clip((panel - low) / (high - low), 0, 1))
    else:
        axis.imshow(panel, cmap=colours, vmin=low, vmax=high)
    axis.set_axis_off()
