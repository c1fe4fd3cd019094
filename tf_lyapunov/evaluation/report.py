"""One run's results as a terminal table and a self-contained HTML page.

The page is written for a reader who has never heard of passivity. It makes no network request,
runs no script, escapes every user string, and omits the sections whose data are missing. Numbers
shown as guarantees are rounded to the safe side: gains up, certified accuracies and radii down.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from tf_lyapunov.evaluation import sections, wording
from tf_lyapunov.evaluation.results import Results
from tf_lyapunov.writing import write_text


def render_report(results: Results) -> str:
    """The report of `results` as one HTML document.

    Raises:
        ImportError: if Jinja2 is not installed. Without Matplotlib the figures of a bracket are
            left out and the page says so.

    Example:

    >>> "<title>Digits" in render_report(Results("Digits"))
    True
    """
    try:
        import jinja2  # noqa: F401
        import markupsafe
    except ImportError as error:
        raise ImportError(
            "The HTML report needs Jinja2. Install it with: pip install 'tf-lyapunov[report]'"
        ) from error
    # Rendering works on a cleaned copy, so that NaN and NumPy values cannot reach the page.
    clean = Results.from_dict(results.to_dict())
    figures, notice = _figures(clean)
    examples = sections.examples(clean)
    pictures = [part for e in examples for part in e["parts"] if part["urls"]]
    return _template().render(
        r=clean,
        contents=sections.Contents(markupsafe.Markup),
        charts=sections.charts(clean),
        examples=examples,
        has_pictures=bool(pictures),
        has_colours=any(part["coloured"] for part in pictures),
        has_greys=not all(part["coloured"] for part in pictures),
        classes=sections.classes(clean),
        layer_bars=sections.layer_bars(clean.layers),
        gain_bars=sections.gain_bars(clean),
        tests=wording.design_tests(clean.design or {}),
        figures=figures,
        notice=notice,
        attack_names=wording.attack_names(clean.rows),
        verdict=wording.verdict(clean),
        proved_gain=wording.proved_gain_of(clean),
        radius_meaning=wording.radius_meaning(clean),
        config_text=wording.config_text(clean.config),
    )


@functools.cache
def _template():
    """The page's template; to compile it takes longer than to fill it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters.update(
        percent=wording.percent,
        percent_down=wording.percent_down,
        number=wording.number,
        upper=wording.round_up,
        lower=wording.round_down,
    )
    return environment.get_template("report.html.j2")


def write_report(results: Results, path: str | os.PathLike) -> Path:
    """Writes the report of `results` as one self-contained HTML file and returns its path.

    Args:
        results: what to show; missing parts are left out.
        path: the file to write; replaced in one step if it exists.

    Returns:
        The path written.

    Raises:
        ImportError: if Jinja2 is not installed.

    Example:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(Results("Digits"), Path(folder, "report.html")).name
    'report.html'
    """
    path = Path(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_report(results))
    return path


def _figures(results: Results) -> tuple[list[dict[str, str]], str]:
    """Figures of a bracket, which Matplotlib draws, and a sentence if it is not there."""
    if not (results.bracket or {}).get("lower"):
        return [], ""
    try:
        from tf_lyapunov.evaluation import plots

        plots.require_matplotlib()
    except ImportError as error:
        return [], str(error)
    return plots.report_figures(Results(results.title, bracket=results.bracket)), ""


def terminal_table(results: Results):
    """Renderable for `rich`: verdict, accuracy by radius, gain, and layers.

    Args:
        results: what to show; missing parts are left out.

    Returns:
        A `rich.console.Group`; print it with `rich.console.Console().print(...)`.

    Example:

    >>> type(terminal_table(Results("Digits"))).__name__
    'Group'
    """
    try:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError(
            "The terminal table needs rich. Install it with: pip install tf-lyapunov"
        ) from error
    results = Results.from_dict(results.to_dict())
    parts: list[Any] = []
    verdict = wording.verdict(results)
    styles = {"proved": "bold green", "certified": "bold green", "broken": "bold white on red"}
    parts.append(Text(verdict.headline, style=styles.get(verdict.state, "bold yellow")))
    parts.extend(Text(f"  {sentence}") for sentence in verdict.sentences)
    if results.rows:
        names = wording.attack_names(results.rows)
        table = Table(title="Accuracy when inputs may move by at most the radius (l2)")
        for heading in ("radius", "clean", "certified (proved)", *(f"under {n}" for n in names)):
            table.add_column(heading, justify="right")
        for row in results.rows:
            attacked = row.get("attacked") or {}
            table.add_row(
                wording.number(row.get("radius")),
                wording.percent(row.get("clean")),
                wording.percent_down(row.get("certified")),
                *(wording.percent(attacked.get(name)) for name in names),
            )
        parts.append(table)
    proved_gain = wording.proved_gain_of(results)
    if proved_gain is not None or results.gain.get("measured_max") is not None:
        table = Table(title="Output change per unit of input change (gain)")
        for heading in ("claimed", "proved upper bound", "largest measured", "mean measured"):
            table.add_column(heading, justify="right")
        table.add_row(
            wording.round_up(results.gain.get("claimed")),
            wording.round_up(proved_gain),
            wording.number(results.gain.get("measured_max")),
            wording.number(results.gain.get("measured_mean")),
        )
        parts.append(table)
    if results.layers:
        table = Table(title="Layers")
        table.add_column("layer")
        headings = ["spectral norm, upper bound", "budget"]
        gains = any(row.get("gain_upper_bound") is not None for row in results.layers)
        for heading in (*headings, "gain, upper bound") if gains else headings:
            table.add_column(heading, justify="right")
        for row in results.layers:
            table.add_row(
                Text(str(row.get("name", ""))),
                # Rounded the same way, so that "within budget" can be seen.
                wording.round_up(row.get("sigma_upper_bound"), 6),
                wording.round_up(row.get("budget"), 6),
                *([wording.round_up(row.get("gain_upper_bound"))] if gains else []),
            )
        parts.append(table)
    return Group(*parts)
