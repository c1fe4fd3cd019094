"""Charts of the report as inline SVG: colours come from the page, values appear under the pointer.

No scripts: every place of a chart is a strip that shows a small table of values while the pointer
is on it. All text is escaped.
"""

from __future__ import annotations

import bisect
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MOST_STRIPS = 48
_MOST_POINTS = 400
_MOST_LETTERS = 30
_LETTER, _LINE = 7.3, 17  # of the tables' text, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 42


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y), increasing in x.
        colour: class of the style sheet, such as "certified".
        shown: how its values are written, for example rounded to the safe side.
        marker: whether points are marked.
        dashed: whether the line is.
        step: whether, between two points, the line stays at the value of the right one, which is
            what holds for everything proved to decrease.
        filled: whether the area below is shaded.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    shown: Callable[[float], str]
    marker: bool = False
    dashed: bool = False
    step: bool = False
    filled: bool = False

    def at(self, x: float) -> float | None:
        """The value that is known there; of steps also between the points."""
        keys = [point[0] for point in self.points]
        place = bisect.bisect_left(keys, x)
        if place < len(keys) and (keys[place] == x or (self.step and x >= keys[0])):
            return self.points[place][1]
        return None


def line_chart(
    series: Sequence[Series],
    *,
    alt: str,
    x_label: str,
    y_label: str = "",
    x_shown: Callable[[float], str],
    y_tick: Callable[[float], str],
    y_top: float | None = None,
    y_bottom: float | None = 0.0,
    whole: bool = False,
    size: tuple[int, int] = (720, 380),
) -> str:
    """Lines over a common axis, as SVG text.

    Args:
        series: lines; those without points are left out.
        alt: what the chart shows, in words.
        x_label, y_label: of the axes.
        x_shown: how places on the horizontal axis are written.
        y_tick: how values on the vertical axis are written.
        y_top, y_bottom: ends of the vertical axis; None: those of the data.
        whole: whether x are whole numbers, such as epochs.
        size: width and height of the drawing in pixels; it scales.

    Returns:
        An `<svg>` element, or "" without any point.

    Example:

    >>> line = Series("a <b>", [(0.0, 1.0), (1.0, 0.5)], "clean", str)
    >>> svg = line_chart([line], alt="A line.", x_label="x", x_shown=str, y_tick=str)
    >>> svg.count("<polyline"), "a &lt;b&gt;: 0.5" in svg, "<script" in svg
    (1, True, False)
    """
    series = [s for s in (_drawable(s) for s in series) if s.points]
    if not series:
        return ""
    width, height = size
    places = [x for s in series for x, _ in s.points]
    values = [y for s in series for _, y in s.points]
    x_low, x_high = min(places), max(places)
    if not whole:
        x_low = min(x_low, 0.0)
    x_high = x_high if x_high > x_low else x_low + 1.0
    low = min(values) if y_bottom is None else min(y_bottom, *values)
    high = max(values) if y_top is None else y_top
    if y_top is None:
        high += 0.06 * (high - low)
    low -= 0.06 * (high - low) if y_bottom is None else 0.0
    high = high if high > low else low + 1.0
    across, down = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def px(x):
        return _LEFT + across * (x - x_low) / (x_high - x_low)

    def py(y):
        return _TOP + down * (1 - (min(max(y, low), high) - low) / (high - low))

    parts = [_axes(x_low, x_high, low, high, px, py, size, whole, y_tick)]
    parts += [_labels(x_label, y_label, size)]
    for s in series:
        parts.append(_line(s, px, py, low))
    strips = _strips(series)
    edges = [px(x) for x in strips]
    for number, x in enumerate(strips):
        start = _LEFT if number == 0 else (edges[number - 1] + edges[number]) / 2
        last = number == len(strips) - 1
        end = width - _RIGHT if last else (edges[number] + edges[number + 1]) / 2
        parts.append(_strip(series, x, x_shown(x), x_label, (start, end), px, py, size))
    return _svg("".join(parts), size, alt)


def bar_chart(
    bars: Sequence[tuple[float, float, float, str]],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    colour: str,
    size: tuple[int, int] = (720, 260),
) -> str:
    """Bars from `left` to `right`, as SVG text.

    Args:
        bars: (left, right, value, what is shown under the pointer).
        alt: what the chart shows, in words.
        x_label, y_label: of the axes.
        colour: class of the style sheet.
        size: width and height of the drawing in pixels; it scales.

    Returns:
        An `<svg>` element, or "" without bars.
    """
    if not bars:
        return ""
    width, height = size
    x_low, x_high = bars[0][0], bars[-1][1]
    x_high = x_high if x_high > x_low else x_low + 1.0
    high = max(max(bar[2] for bar in bars), 1.0) * 1.06
    across, down = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def px(x):
        return _LEFT + across * (x - x_low) / (x_high - x_low)

    def py(y):
        return _TOP + down * (1 - y / high)

    parts = [_axes(x_low, x_high, 0.0, high, px, py, size, False, _plain)]
    parts += [_labels(x_label, y_label, size)]
    strips = []
    for left, right, value, text in bars:
        start, end = px(left), px(right)
        box = f'x="{start:.1f}" width="{max(end - start - 1, 0.5):.1f}"'
        top = py(value)
        parts.append(
            f'<rect class="bar f-{colour}" {box} y="{top:.1f}" height="{_TOP + down - top:.1f}"/>'
        )
        strips.append(
            f'<g class="strip"><rect class="hit" {box} y="{_TOP}" height="{down}"/><g class="tip">'
            f"{_tip([('', text)], (start + end) / 2, _TOP + 4, size)}</g></g>"
        )
    parts += strips  # last, so that no bar covers a table
    return _svg("".join(parts), size, alt)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers in [low, high], about `count` of them.

    Example:

    >>> ticks(0.0, 1.0), ticks(1, 40, whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [10.0, 20.0, 30.0, 40.0])
    """
    width = (high - low) / max(count, 1)
    if not width > 0 or not math.isfinite(width):
        return [low]
    power = 10.0 ** math.floor(math.log10(width))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= width * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def _svg(body, size, alt):
    return (
        f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-label="{html.escape(alt)}">{body}</svg>'
    )


def _drawable(series):
    points = [
        (float(x), float(y))
        for x, y in series.points
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    if len(points) > _MOST_POINTS:  # the last one stays; a step keeps what holds to its left
        every = -(-len(points) // _MOST_POINTS)
        points = [points[0], *points[1:][::-1][::every][::-1]]
    return Series(**{**vars(series), "points": points})


def _axes(x_low, x_high, low, high, px, py, size, whole, y_tick):
    width, height = size
    base = height - _BOTTOM
    parts = []
    for y in ticks(low, high, 5):
        at, text = py(y), html.escape(y_tick(y))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4:.1f}">{text}</text>'
        )
    for x in ticks(x_low, x_high, 6 if width > 500 else 5, whole):
        text = html.escape(_plain(x))
        parts.append(f'<text class="tick mid" x="{px(x):.1f}" y="{base + 16}">{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def _labels(x_label, y_label, size):
    width, height = size
    text = (
        f'<text class="label mid" x="{(width + _LEFT) / 2:.0f}" y="{height - 6}">'
        f"{html.escape(x_label)}</text>"
    )
    if y_label:
        middle = (height - _BOTTOM) / 2
        text += (
            f'<text class="label mid" transform="translate(13 {middle:.0f}) rotate(-90)">'
            f"{html.escape(y_label)}</text>"
        )
    return text


def _plain(value):
    return f"{value:.6g}"


def _line(series, px, py, low):
    points = [(px(x), py(y)) for x, y in series.points]
    path = [points[0]]
    for before, after in zip(points, points[1:], strict=False):
        if series.step:  # down at once: between two radii the larger one's share is what holds
            path.append((before[0], after[1]))
        path.append(after)
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    parts = []
    if series.filled:
        base = py(low)
        parts.append(
            f'<polygon class="area f-{series.colour}" points="{path[0][0]:.1f},{base:.1f} {text} '
            f'{path[-1][0]:.1f},{base:.1f}"/>'
        )
    dashed = " dashed" if series.dashed else ""
    parts.append(f'<polyline class="line s-{series.colour}{dashed}" points="{text}"/>')
    if series.marker and len(points) <= 40:
        radius = 5 if series.colour == "o0" else 3.5
        parts += [
            f'<circle class="f-{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
            for x, y in points
        ]
    return "".join(parts)


def _strips(series):
    """Places at which values are shown: all of marked points, and some of the others."""
    marked = {x for s in series if s.marker for x, _ in s.points}
    others = sorted({x for s in series if not s.marker for x, _ in s.points} - marked)
    room = max(_MOST_STRIPS - len(marked), 2)
    every = -(-len(others) // room) if others else 1
    return sorted(marked | set(others[::-1][::every]))


def _strip(series, x, shown, x_label, ends, px, py, size):
    height = size[1]
    start, end = ends
    here = [(s, s.at(x)) for s in series]
    here = [(s, y) for s, y in here if y is not None]
    rows = [("", f"{x_label} {shown}"), *((s.colour, f"{_cut(s.name)}: {s.shown(y)}")
                                          for s, y in here)]  # fmt: skip
    at = px(x)
    dots = "".join(
        f'<circle class="dot f-{s.colour}" cx="{at:.1f}" cy="{py(y):.1f}" r="5"/>' for s, y in here
    )
    return (
        f'<g class="strip"><rect class="hit" x="{start:.1f}" y="{_TOP}" '
        f'width="{max(end - start, 0.5):.1f}" height="{height - _TOP - _BOTTOM}"/><g class="tip">'
        f'<line class="guide" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        f"{dots}{_tip(rows, at, _TOP + 4, size)}</g></g>"
    )


def _tip(rows, at, top, size):
    """A small table beside `at`, on the side where there is room."""
    longest = max(len(text) for _, text in rows)
    width = min(longest * _LETTER + 28, size[0] - 8)
    left = at + 10 if at + 10 + width < size[0] - 2 else at - 10 - width
    left = max(left, 2)
    height = len(rows) * _LINE + 10
    parts = [f'<rect class="box" x="{left:.1f}" y="{top}" width="{width:.0f}" height="{height}" '
             'rx="5"/>']  # fmt: skip
    for number, (colour, text) in enumerate(rows):
        y = top + 17 + number * _LINE
        if colour:
            parts.append(f'<circle class="f-{colour}" cx="{left + 11:.1f}" cy="{y - 4}" r="4"/>')
        indent = 20 if colour else 8
        parts.append(f'<text x="{left + indent:.1f}" y="{y}">{html.escape(text)}</text>')
    return "".join(parts)


def _cut(text):
    text = " ".join(str(text).split())
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
