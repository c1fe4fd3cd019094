"""How results show themselves: short texts, HTML in notebooks, figures on demand.

A result says what there is to see as a `Page`; the rest is here. HTML holds no colour of its own,
so that light and dark notebooks both can be read, and every text in it is escaped. Numbers are
rounded for people; guarantees to their safe side, by whoever makes the page (`digits.at_most`,
`at_least`).
"""

import dataclasses
import html
import importlib
import math

# Rows of a table that are shown; and characters of a text.
MOST_ROWS, MOST_CHARACTERS = 10, 300
_CELL = "padding:0.15em 0.7em;text-align:{};border:none"
_LINE = "border-bottom:1px solid currentColor"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a heading; of more than ten the first are shown, and how many there are.

    Attributes:
        columns: heads.
        rows: sequence of rows of texts or numbers, or those to show of `total`.
        caption: what the rows are.
        total: number of rows that there are, if not all are given.
    """

    columns: tuple
    rows: tuple
    caption: str = ""
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Page:
    """What a result has to show.

    Attributes:
        title: its kind and verdict.
        facts: pairs of a name and a value, the important ones first.
        tables: `Table`s.
        notes: sentences.
    """

    title: str
    facts: tuple = ()
    tables: tuple = ()
    notes: tuple = ()

    def line(self):
        """One line: the title and the first facts.

        >>> Page("GainBound", (("gain", "≤ 2"), ("layers", 3))).line()
        'GainBound(gain ≤ 2, layers 3)'
        """
        facts = ", ".join(f"{name} {value}" for name, value in self.facts[:5])
        return f"{self.title}({facts})"

    def html(self):
        """HTML that a notebook shows.

        >>> "&lt;b&gt;" in Page("<b>").html()
        True
        """
        parts = [f"<p><strong>{_text(self.title)}</strong></p>"]
        if self.facts:
            parts.append(_table((), self.facts))
        for table in self.tables:
            if not table.rows:
                continue
            if table.caption:
                parts.append(f"<p>{_text(table.caption)}</p>")
            shown = tuple(table.rows)[:MOST_ROWS]
            parts.append(_table(table.columns, shown))
            total = len(table.rows) if table.total is None else table.total
            if total > len(shown):
                parts.append(f"<p><em>… {total - len(shown)} more of {total}</em></p>")
        parts += [f"<p><em>{_text(note)}</em></p>" for note in self.notes[:MOST_ROWS]]
        return f"<div>{''.join(parts)}</div>"


class Shown:
    """Base of results: `_page` says what there is to see, `plot` draws it.

    Data classes that derive from it leave their `repr` to it (`repr=False`): arrays of a result are
    of any length.
    """

    def _page(self):
        raise NotImplementedError

    def __repr__(self):
        return self._page().line()

    def _repr_html_(self):
        return self._page().html()

    def plot(self, axes=None):
        """Draws the result with Matplotlib (extra `report`), imported when this is called.

        Args:
            axes: Matplotlib axes to draw on; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: if Matplotlib is not installed, naming the extra that brings it.
        """
        # Upwards, and only here: results are there without pictures of them.
        figures = importlib.import_module("tf_lyapunov.evaluation.result_figures")
        return figures.draw(self, axes)


def number(value, digits=4):
    """A measured number for people, rounded to nearest.

    >>> number(0.123456), number(3), number(1610612723.0000002), number(None)
    ('0.1235', '3', '1.611e+09', '—')
    """
    if value is None:
        return "—"
    if isinstance(value, int):
        return str(value)
    return f"{float(value):.{digits}g}"


def share(value):
    """A share in percent, rounded down: all is said of all alone.

    >>> share(0.5), share(1), share(0.9999)
    ('50.0%', '100.0%', '99.9%')
    """
    return f"{math.floor(1000 * float(value) * (1 + 2**-50)) / 10:.1f}%"


def share_at_most(value):
    """A share in percent, rounded up: for errors.

    >>> share_at_most(0.0001), share_at_most(0.25)
    ('0.1%', '25.0%')
    """
    return f"{math.ceil(1000 * float(value) * (1 - 2**-50)) / 10:.1f}%"


def _text(value):
    text = str(value)
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + "…"
    return html.escape(text)


def _table(columns, rows):
    head = ""
    if columns:
        cells = "".join(
            f'<th style="{_CELL.format("left" if i == 0 else "right")};{_LINE}">{_text(c)}</th>'
            for i, c in enumerate(columns)
        )
        head = f"<thead><tr>{cells}</tr></thead>"
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{_CELL.format("left" if i == 0 else "right")}">{_text(c)}</td>'
            for i, c in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    # Nothing here says a colour: text and lines take the notebook's.
    style = "border-collapse:collapse;background:transparent"
    return f'<table style="{style}">{head}<tbody>{body}</tbody></table>'
