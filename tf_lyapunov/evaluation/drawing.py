"""How figures look and how they are written: themes, SVG text, files, data URLs."""

from __future__ import annotations

import base64
import contextlib
import io
import os
from pathlib import Path

from tf_lyapunov.writing import atomic_path

# Okabe and Ito's palette; the dark theme uses its lighter members.
THEMES = {
    "light": {
        "text": "#1f2430",
        "grid": "#d7dbe2",
        "clean": "#0072b2",
        "certified": "#00795b",
        "bound": "#00795b",
        "others": ("#d55e00", "#aa4499", "#7a5c00", "#444b5a"),
    },
    "dark": {
        "text": "#e4e7ee",
        "grid": "#3a4150",
        "clean": "#56b4e9",
        "certified": "#2fd0a2",
        "bound": "#2fd0a2",
        "others": ("#ff9a4d", "#e58fd0", "#f0e442", "#aab2c2"),
    },
}


def require_matplotlib():
    """Imports Matplotlib, or says which extra brings it.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "Figures need Matplotlib. Install it with: pip install 'tf-lyapunov[report]'"
        ) from error
    return matplotlib


@contextlib.contextmanager
def style(theme: str):
    """Matplotlib settings of a theme; yields its colours."""
    matplotlib = require_matplotlib()
    if theme not in THEMES:
        raise ValueError(f"`theme` must be one of {', '.join(THEMES)}. Received: theme={theme!r}.")
    colours = THEMES[theme]
    settings = {
        "svg.fonttype": "none",  # text stays text: smaller files, searchable, sharp
        "svg.hashsalt": "tf_lyapunov",  # equal figures give equal bytes
        "text.parse_math": False,  # a dollar sign in a user's name is a dollar sign
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.6,
        "axes.edgecolor": colours["text"],
        "axes.labelcolor": colours["text"],
        "axes.titlecolor": colours["text"],
        "axes.titlesize": 11,
        "text.color": colours["text"],
        "xtick.color": colours["text"],
        "ytick.color": colours["text"],
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(settings):
        yield colours


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1):
    """A figure of that size in inches, and its axes as a flat array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def percent_formatter():
    """Ticks 0 … 1 as 0% … 100%."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=0)


def whole_epochs(axes) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def to_svg(figure) -> str:
    """The figure as SVG text; equal figures give equal text."""
    buffer = io.BytesIO()
    with require_matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": "tf_lyapunov"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode("utf-8")


def save(figure, path: str | os.PathLike) -> Path:
    """Writes the figure to `path`, SVG or PNG by its suffix, in one step.

    PNGs get a white background, since viewers differ in what they put behind transparency.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(to_svg(figure), encoding="utf-8")
        else:
            figure.savefig(temporary, dpi=120, facecolor="white")
    return path


def data_url(figure) -> str:
    """The figure as an SVG data URL, for `<img src>`."""
    encoded = base64.b64encode(to_svg(figure).encode("utf-8")).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"
