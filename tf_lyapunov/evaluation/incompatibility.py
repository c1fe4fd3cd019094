"""Tables and figures of what a data set's distances allow (Figures 1 and 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tf_lyapunov.evaluation.drawing import new_figure, percent_formatter, style
from tf_lyapunov.theory.localized import PairStatistics

_BINS = 40


def incompatibility_rows(
    statistics: PairStatistics,
    slopes: Sequence[float],
    distances: Sequence[float] = (),
    *,
    of: str = "opposite",
) -> list[dict[str, Any]]:
    """Shares of pairs that no one-hot classifier of a slope can fit, as a tidy table.

    Args:
        statistics: of `theory.localized.pair_statistics`, with `compatibility_thresholds` of the
            same slopes and distances.
        slopes: α > 0.
        distances: d: also only pairs closer than d (Figure 3); all pairs are always listed.
        of: "opposite" or "all": the pairs that a share is of.

    Returns:
        One dict for each distance and slope: "norm", "within" (infinite: all), "slope", "share".

    Raises:
        ValueError: if a distance was not counted.

    Example:

    >>> from tf_lyapunov.theory.localized import compatibility_thresholds, pair_statistics
    >>> found = pair_statistics([[0.0], [1.0]], [0, 1], compatibility_thresholds([1.0, 2.0]))
    >>> [row["share"] for row in incompatibility_rows(found, [1.0, 2.0])]
    [1.0, 0.0]

    Reference: Bontonou et al., Figures 1 and 3, as published; exact.
    """
    slopes = np.asarray(slopes, np.float64).ravel()
    return [
        {"norm": statistics.norm, "within": float(within), "slope": float(a), "share": float(s)}
        for within in (math.inf, *distances)
        for a, s in zip(slopes, statistics.incompatible_share(slopes, within, of=of), strict=True)
    ]


def incompatibility_figure(tables: Mapping[str, Sequence[Mapping]], *, theme: str = "light"):
    """Share of incompatible pairs by slope, one line for each table and distance.

    Args:
        tables: name, such as a data set's -> rows of `incompatibility_rows`.
        theme: "light" or "dark".

    Returns:
        A Matplotlib `Figure`.
    """
    with style(theme) as colours:
        figure, (axes,) = new_figure(6, 3.6)
        palette = (colours["clean"], colours["certified"], *colours["others"])
        number = 0
        for name, rows in tables.items():
            for within in dict.fromkeys(row["within"] for row in rows):
                chosen = sorted(
                    (row["slope"], row["share"]) for row in rows if row["within"] == within
                )
                label = name if math.isinf(within) else f"{name}, d < {within:g}"
                axes.plot(*zip(*chosen, strict=True), label=label, drawstyle="default",
                          color=palette[number % len(palette)])  # fmt: skip
                number += 1
        axes.set(xlabel="slope α", ylabel="incompatible pairs", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(percent_formatter())
        axes.legend(loc="best")
        return figure


def ceiling_rows(statistics: PairStatistics, bins: int = _BINS) -> list[dict[str, Any]]:
    """Histogram of the distance to the nearest sample of another class.

    That distance is a ceiling: no classifier that is right on both samples has a certified radius
    above it at the one, nor radii that add up to more at the two.

    Args:
        statistics: of `pair_statistics`.
        bins: number of bins, from 0 to the largest distance.

    Returns:
        One dict a bin: "norm", "from", "to", "samples".
    """
    top = float(statistics.nearest.max()) or 1.0
    counts, edges = np.histogram(statistics.nearest, bins=bins, range=(0.0, top))
    return [
        {"norm": statistics.norm, "from": float(a), "to": float(b), "samples": int(n)}
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]


def ceiling_figure(statistics: PairStatistics, *, theme: str = "light"):
    """`ceiling_rows` as a figure, the median marked.

    Returns:
        A Matplotlib `Figure`.
    """
    rows = ceiling_rows(statistics)
    with style(theme) as colours:
        figure, (axes,) = new_figure(6, 3.2)
        axes.bar(
            [row["from"] for row in rows],
            [row["samples"] for row in rows],
            [row["to"] - row["from"] for row in rows],
            align="edge",
            color=colours["clean"],
        )
        median = float(np.median(statistics.nearest))
        axes.axvline(median, color=colours["others"][0], label=f"median {median:.3g}")
        norm = "l2" if statistics.norm == 2 else "l∞"
        axes.set(xlabel=f"{norm} distance to the nearest other class", ylabel="samples")
        axes.legend(loc="best")
        return figure
