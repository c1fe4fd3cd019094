"""What the report's template shows: charts, bars, pictures and counts, made from `Results`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tf_lyapunov.evaluation import pictures, wording
from tf_lyapunov.evaluation.charts import Series, bar_chart, line_chart

_WIDE, _NARROW, _PANEL = (720, 380), (360, 300), (310, 210)
_LOW_WIDE, _LOW_NARROW = (720, 250), (360, 230)
_MOST_PANELS = 8
_MOST_RADII = 4


class Contents:
    """Headings of the page in the order in which they were written."""

    def __init__(self, markup):
        self.entries: list[tuple[str, str]] = []
        self._markup = markup

    def heading(self, name: str, short: str, title: str = ""):
        """The heading of a section; `short` is its line in the table of contents."""
        self.entries.append((name, short))
        return self._markup(f'<h2 id="{name}">{html.escape(title or short)}</h2>')


def charts(results) -> dict[str, dict[str, Any]]:
    """Every chart that `results` has data for.

    Returns:
        key -> dict with "title", "legend" ((name, colour, dashed)), and "drawings": dicts "svg"
        and "width" ("wide", "narrow" or "panel") and "title" of a panel.
    """
    found = {}
    for key, chart in (
        ("accuracy", _accuracy(results)),
        ("radii", _radii(results)),
        ("output_change", _output_change(results)),
        ("layers", _layers(results.history)),
        ("cascade", _cascade(results.history)),
        ("training", _training(results.history)),
    ):
        if chart is not None and any(drawing["svg"] for drawing in chart["drawings"]):
            found[key] = chart
    return found


def _chart(title, series, draw, sizes=(_WIDE, _NARROW)):
    return {
        "title": title,
        "legend": [(s.name, s.colour, s.dashed) for s in series],
        "drawings": [
            {"width": width, "svg": draw(size)}
            for width, size in zip(("wide", "narrow"), sizes, strict=True)
        ],
    }


def _accuracy(results):
    rows = sorted((r for r in results.rows if r.get("radius") is not None), key=_radius)
    curve = (results.certificate or {}).get("curve") or {}
    names = wording.attack_names(rows)
    fine = list(zip(curve.get("radius") or (), curve.get("certified") or (), strict=False))
    top = max((row["radius"] for row in rows), default=None)
    fine = [point for point in fine if not top or point[0] <= top]
    # The rows' own shares beside those of the grid: what is shown at a row's radius is exact.
    proved = sorted({**dict(fine), **dict(_points(rows, lambda row: row.get("certified")))}.items())
    series = [
        Series("certified (proved)", proved, "certified", wording.percent_down,
               marker=not fine, step=True, filled=True),
        Series("clean, no change (measured)", _points(rows, lambda row: row.get("clean")), "clean",
               wording.percent, dashed=True, marker=True),
        *(
            Series(f"under {name} (measured)",
                   _points(rows, lambda row, name=name: (row.get("attacked") or {}).get(name)),
                   f"o{index % 4}", wording.percent, marker=True)
            for index, name in enumerate(names)
        ),
    ]  # fmt: skip
    series = [s for s in series if s.points]
    alt = wording.accuracy_alt(rows) if rows else "Certified accuracy against the radius."

    def draw(size):
        return line_chart(
            series, alt=alt, x_label="radius", x_shown=wording.round_down, y_tick=_whole_percent,
            y_label="accuracy", y_top=1.0, size=size,
        )  # fmt: skip

    return _chart("Accuracy by radius", series, draw)


def _radii(results):
    certificate = results.certificate or {}
    histogram = certificate.get("histogram") or {}
    edges, counts = histogram.get("edges") or (), histogram.get("counts") or ()
    bars = [
        (
            left,
            right,
            count,
            f"{count} input{'s' if count != 1 else ''} with radius "
            f"{wording.round_down(left, 3)} to {wording.round_up(right, 3)}",
        )
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
    ]
    alt = (
        "Histogram of the inputs' certified radii; median "
        f"{wording.round_down(certificate.get('median_radius'))}."
    )

    def draw(size):
        return bar_chart(
            bars, alt=alt, x_label="certified radius (0: nothing proved)", y_label="inputs",
            colour="certified", size=size,
        )  # fmt: skip

    return _chart("Certified radii", (), draw, (_LOW_WIDE, _LOW_NARROW))


def _output_change(results):
    bound = wording.proved_gain_of(results)
    # Gain times radius bounds the change within l2 balls, not within others of the same radius.
    others = wording.attacks_outside_l2(results)
    rows = sorted((r for r in results.rows if r.get("radius")), key=_radius)
    names = dict.fromkeys(n for row in rows for n in row.get("output_change") or {})
    names = [name for name in names if name not in others]
    series = []
    for index, name in enumerate(names):
        for kind, word in (("max", "largest"), ("mean", "mean")):
            changes = [(row["radius"], (row.get("output_change") or {}).get(name)) for row in rows]
            points = [(x, change.get(kind)) for x, change in changes if change]
            series.append(
                Series(f"{word}, {name} (measured)", [p for p in points if p[1] is not None],
                       f"o{index % 4}", wording.number, marker=True, dashed=kind == "mean")
            )  # fmt: skip
    series = [s for s in series if s.points]
    if not series:
        return None
    if bound is not None:
        places = [0.0, *dict.fromkeys(row["radius"] for row in rows)]
        line = [(x, x * bound) for x in places]
        series.insert(0, Series("proved bound", line, "certified", wording.round_up))
    alt = (
        "Line chart: largest and mean measured change of the scores by radius, beside the proved "
        f"bound of {wording.round_up(bound)} times the radius."
    )

    def draw(size):
        return line_chart(
            series, alt=alt, x_label="radius", y_label="change of the scores",
            x_shown=wording.number, y_tick=_tick, size=size,
        )  # fmt: skip

    return _chart("Change of the scores under attack", series, draw, ((720, 300), _NARROW))


def _panels(title, panels):
    """Small charts by epoch: (title, series, alt, tick, bottom) each."""
    drawings = [
        {
            "width": "panel",
            "title": name,
            "svg": line_chart(
                series,
                alt=alt,
                x_label="epoch",
                x_shown=_tick,
                y_tick=tick,
                whole=True,
                y_bottom=bottom,
                size=_PANEL,
            ),
        }
        for name, series, alt, tick, bottom in panels
    ]
    legend = dict.fromkeys((s.name, s.colour, s.dashed) for _, ss, *_ in panels for s in ss)
    return {"title": title, "legend": list(legend), "drawings": drawings} if panels else None


def _layers(history):
    names = dict.fromkeys(k.split("/", 1)[1] for row in history for k in row if k.startswith(
        ("sigma/", "sigma_upper_bound/")))  # fmt: skip
    measured = {}
    for name in names:
        proved = _series(history, f"sigma_upper_bound/{name}")
        measured[name] = (
            Series("spectral norm, at most (proved)", proved, "certified", _up6)
            if proved
            else Series("spectral norm (estimate)", _series(history, f"sigma/{name}"), "clean",
                        _six)
        )  # fmt: skip
    if len(names) > _MOST_PANELS:
        return _shares(history, measured)
    panels = []
    for name, line in measured.items():
        budget = Series("budget", _series(history, f"budget/{name}"), "budget", _up6, dashed=True)
        last = line.shown(line.points[-1][1]) if line.points else wording.MISSING
        limit = _up6(budget.points[-1][1]) if budget.points else "none"
        alt = f"Spectral norm of {name} by epoch: {last} at the end, budget {limit}."
        panels.append((name, [s for s in (line, budget) if s.points], alt, _tick, 0.0))
    return _panels("Spectral norms and budgets by epoch", panels)


def _shares(history, measured):
    """Of many layers the largest share of its budget that any uses."""
    shares: dict[float, float] = {}
    for name, line in measured.items():
        budgets = dict(_series(history, f"budget/{name}"))
        for epoch, value in line.points:
            if budgets.get(epoch):
                shares[epoch] = max(shares.get(epoch, 0.0), value / budgets[epoch])
    estimated = any(line.colour != "certified" for line in measured.values())
    word, colour = ("estimate", "clean") if estimated else ("at most", "certified")
    series = Series(f"largest share of a budget ({word})", sorted(shares.items()), colour,
                    wording.percent_up)  # fmt: skip
    limit = Series("all of it", [(x, 1.0) for x, _ in series.points], "budget", wording.percent,
                   dashed=True)  # fmt: skip
    alt = (
        "Line chart by epoch of the largest share of its budget that one of "
        f"{len(measured)} layers uses."
    )
    return _panels(
        "Spectral norms and budgets by epoch",
        [("largest share of a budget", [series, limit], alt, _whole_percent, 0.0)],
    )


def _cascade(history):
    margin = _series(history, "cascade_margin")
    if not margin:
        return None
    needed = [(x, 0.0) for x, _ in margin]
    series = [
        Series("room left", margin, "certified", wording.round_down),
        Series("needed: at least 0", needed, "budget", wording.number, dashed=True),
    ]
    alt = (
        "Line chart of the room that the trained layers leave by epoch; last value "
        f"{wording.round_down(margin[-1][1])}."
    )
    return _panels("Room that the trained layers leave", [("room left", series, alt, _tick, 0.0)])


def _training(history):
    panels = []
    for title, key, shown, tick, bottom in (
        ("loss", "loss", wording.number, _tick, None),
        ("accuracy", "accuracy", wording.percent, _whole_percent, None),
        ("gain (at most)", "gain_upper_bound", wording.round_up, _tick, 0.0),
    ):
        if key == "gain_upper_bound":
            series = [Series("gain, proved upper bound", _series(history, key), "certified", shown)]
        else:
            series = [
                Series("training", _series(history, key), "clean", shown),
                Series("validation", _series(history, f"val_{key}"), "o1", shown, dashed=True),
            ]
        series = [s for s in series if s.points]
        if series:
            ends = "; ".join(f"{s.name} {shown(s.points[-1][1])}" for s in series)
            alt = f"Line chart of the {title} over {len(history)} epochs. At the end: {ends}."
            panels.append((title, series, alt, tick, bottom))
    return _panels("Training by epoch", panels)


def examples(results) -> list[dict[str, Any]]:
    """Cards of the weakest inputs: names, numbers in words, pictures or features."""
    return [_card(results, item) for item in results.examples if isinstance(item, Mapping)]


def _card(results, item):
    label = wording.class_name(results, item.get("label"))
    decided = item.get("prediction_adv")
    decided = None if decided is None else wording.class_name(results, decided)
    radius, distance = item.get("radius"), item.get("distance")
    single = len(item.get("inputs") or ()) == 1
    parts = []
    for part in item.get("inputs") or ():
        picture = part.get("picture") if isinstance(part, Mapping) else None
        stored = picture or {}
        parts.append(
            {
                "name": part.get("name", ""),
                "urls": pictures.urls(picture) if isinstance(picture, Mapping) else None,
                "reach": stored.get("reach"),
                "shrunk": list(stored.get("size") or ()) != list(stored.get("shape") or ())[:2],
                "size": stored.get("size"),
                "ratio": _ratio(stored),
                "coloured": list(stored.get("shape") or ())[2:] == [3],
                "features": part.get("features"),
                "changed": part.get("changed"),
                "changes": [
                    {
                        **change,
                        "name": wording.feature_name(results, change)
                        if single
                        else f"feature {change.get('feature')}",
                    }
                    for change in part.get("changes") or ()
                ],
            }
        )
    share = None
    if radius is not None and distance:
        share = max(0.0, min(radius / distance, 1.0))
    return {
        "role": item.get("role", "weakest"),
        "index": item.get("index"),
        "label": label,
        "decided": decided,
        "radius": radius,
        "distance": distance,
        "attack": item.get("attack"),
        "parts": parts,
        "share": share,
    }


def _ratio(picture):
    """Width to height, as the style sheet wants it."""
    size = picture.get("size")
    sound = isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) for v in size)
    return f"{size[1]} / {size[0]}" if sound else "1"


def classes(results) -> dict[str, Any] | None:
    """The table by class, and the confusion matrix, with names and shares."""
    record = results.classes
    if not record or not record.get("rows"):
        return None
    radii = record.get("radii") or []
    wanted = [i for i, radius in enumerate(radii) if radius > 0] or list(range(len(radii)))
    if len(wanted) > _MOST_RADII:
        wanted = [wanted[round(k * (len(wanted) - 1) / (_MOST_RADII - 1))] for k in
                  range(_MOST_RADII)]  # fmt: skip
    first = record["rows"][0]
    kinds = [key for key in ("certified", "attacked") if first.get(key)]
    rows = [
        {
            "name": wording.class_name(results, row.get("class")),
            "count": row["count"],
            "clean": row["clean"] / row["count"],
            "cells": [
                {"kind": kind, "share": row[kind][i] / row["count"]}
                for i in wanted
                for kind in kinds
            ],
        }
        for row in record["rows"]
        if row.get("count")
    ]
    matrix = record.get("confusion")
    confusion = None
    if matrix:
        names = [wording.class_name(results, i) for i in range(len(matrix))]
        confusion = {
            "names": names,
            "rows": [
                (name, [(count, _heat(count, sum(line), i == j)) for j, count in enumerate(line)])
                for i, (name, line) in enumerate(zip(names, matrix, strict=False))
            ],
        }
    mistakes = [
        {
            "label": wording.class_name(results, item.get("label")),
            "prediction": wording.class_name(results, item.get("prediction")),
            "count": item.get("count"),
        }
        for item in record.get("mistakes") or ()
    ]
    return {
        "radii": [radii[i] for i in wanted] if kinds else [],
        "kinds": kinds,
        "attacks": record.get("attacks") or [],
        "rows": rows,
        "total": record.get("present") or len(rows),
        "confusion": confusion,
        "mistakes": mistakes,
        "errors": sum(item["count"] or 0 for item in mistakes),
    }


def _heat(count, total, right):
    if right:
        return "right"
    share = count / total if total else 0.0
    return next((f"h{i}" for i, s in ((4, 0.2), (3, 0.1), (2, 0.04)) if share >= s),
                "h1" if count else "h0")  # fmt: skip


def layer_bars(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every layer with a budget the share of it that its proved norm uses."""
    bars = []
    for row in layers:
        sigma, budget = row.get("sigma_upper_bound"), row.get("budget")
        if sigma is None or not budget:
            continue
        share = sigma / budget
        bars.append(
            {
                "name": row.get("name", ""),
                "sigma": sigma,
                "budget": budget,
                "share": share,
                "within": sigma <= budget,
            }
        )
    top = max((bar["share"] for bar in bars), default=1.0)
    for bar in bars:
        bar["width"] = f"{100 * bar['share'] / max(top, 1.0):.2f}"
        bar["mark"] = f"{100 / max(top, 1.0):.2f}"
    return bars


def gain_bars(results) -> list[dict[str, Any]]:
    """Promised, proved and measured gain, with lengths in percent of the largest."""
    gain, bound = results.gain, wording.proved_gain_of(results)
    bars = [
        ("promised", gain.get("claimed"), "budget", wording.round_up, "set before training"),
        ("proved upper bound", bound, "certified", wording.round_up,
         "computed from the trained weights, rounded up"),
        ("largest measured", gain.get("measured_max"), "o0", wording.number,
         gain.get("measured_by") or "found by the attacks"),
        ("mean measured", gain.get("measured_mean"), "o0", wording.number, "the same inputs"),
    ]  # fmt: skip
    bars = [bar for bar in bars if isinstance(bar[1], (int, float)) and bar[1] >= 0]
    top = max((bar[1] for bar in bars), default=0.0) or 1.0
    return [
        {"name": name, "value": shown(value), "colour": colour, "how": how,
         "width": f"{100 * value / top:.2f}"}
        for name, value, colour, shown, how in bars
    ]  # fmt: skip


def _points(rows, value):
    return [(row["radius"], value(row)) for row in rows if value(row) is not None]


def _series(history, key):
    """(epoch, value) of one column, rows without it left out."""
    return [
        (row.get("epoch") or index + 1, row[key])
        for index, row in enumerate(history)
        if row.get(key) is not None
    ]


def _radius(row):
    return row["radius"]


def _whole_percent(value):
    return f"{100 * value:.4g}%"


def _tick(value):
    return f"{value:.6g}"


def _six(value):
    return wording.number(value, 6)


def _up6(value):
    return wording.round_up(value, 6)
