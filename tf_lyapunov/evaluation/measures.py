"""What the cells of an evaluation suite add up to: mean errors, mCE, relative mCE, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tf_lyapunov.evaluation.drawing import new_figure, percent_formatter, style
from tf_lyapunov.showing import Page, Shown, Table, number, share_at_most


@dataclass(frozen=True, repr=False)
class SuiteResult(Shown):
    """Errors by cell of one model.

    Attributes:
        rows: one dict a cell: "kind", "name", "level" (SNR in dB, radius, severity or rate),
            "settings" (of attacks), "error", "accuracy", "count", "seconds".
    """

    rows: list[dict[str, Any]]

    def _page(self):
        facts = [("cells", len(self.rows))]
        if self.of_kind("clean"):
            facts.append(("clean error", share_at_most(self.clean_error)))
        if self.corrupted_error is not None:
            facts.append(("mean error under corruptions", share_at_most(self.corrupted_error)))
        rows = [
            (r["kind"], r["name"], number(r["level"]), share_at_most(r["error"]), r["count"])
            for r in self.rows
        ]
        columns = ("kind", "name", "level", "error", "inputs")
        return Page("SuiteResult", tuple(facts), (Table(columns, rows),))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def clean_error(self) -> float:
        """Error on the inputs as they are."""
        return self.of_kind("clean")[0]["error"]

    @property
    def corrupted_error(self) -> float | None:
        """Mean error over all corruptions and severities measured; None without any."""
        errors = [row["error"] for row in self.of_kind("corruption")]
        return float(np.mean(errors)) if errors else None

    def mean_corruption_error(self, baseline: SuiteResult) -> float:
        """mCE = 100 · mean_c (Σ_s E_cs / Σ_s E_cs of the baseline), in percent.

        Raises:
            ValueError: if the baseline lacks a cell of this suite, or an error of it is 0.

        Reference: Hendrycks and Dietterich (ICLR 2019), section 4.2.
        """
        own, other = self._by_corruption(baseline)
        if not np.all(other > 0):
            raise ValueError(
                "mCE divides by the baseline's errors, which must not be 0. Received: "
                f"{other.tolist()}."
            )
        return float(100 * np.mean(own / other))

    def relative_corruption_error(self, baseline: SuiteResult) -> float:
        """Relative mCE = 100 · (C_X - clean_X) / (C_V - clean_V), in percent.

        C is the mean error over this suite's corruptions and severities, X this model, V the
        baseline.

        Raises:
            ValueError: if the baseline lacks a cell of this suite, or loses nothing.

        Reference: Bontonou et al., Table 2, as published.
        """
        own, other = self._by_corruption(baseline)
        lost = float(other.mean()) - baseline.clean_error
        if not lost > 0:
            raise ValueError(
                "Relative mCE divides by what the baseline loses under corruptions, which must be "
                f"positive. Received: {lost:g}."
            )
        return 100 * (float(own.mean()) - self.clean_error) / lost

    def _by_corruption(self, baseline):
        """Mean error by corruption over the cells of this suite, of both, float64."""
        tables = []
        for result in (self, baseline):
            table: dict[str, dict[float, float]] = {}
            for row in result.of_kind("corruption"):
                table.setdefault(row["name"], {})[row["level"]] = row["error"]
            tables.append(table)
        own, other = tables
        missing = sum(s not in other.get(name, {}) for name, t in own.items() for s in t)
        if not own or missing:
            raise ValueError(
                "The baseline must hold the same corruptions at the same severities. Received: "
                f"{sum(map(len, own.values()))} cells, of which the baseline lacks {missing}."
            )
        return tuple(
            np.array([np.mean([table[name][s] for s in own[name]]) for name in own])
            for table in tables
        )

    def summary(self, baseline: SuiteResult | None = None) -> dict[str, Any]:
        """Clean and corrupted error, mCE and relative mCE; None where not measured or undefined."""
        entries: dict[str, Any] = {
            "clean_error": self.clean_error,
            "corrupted_error": self.corrupted_error,
            "mce": None,
            "relative_mce": None,
        }
        if baseline is not None and self.corrupted_error is not None:
            for key, measure in (
                ("mce", self.mean_corruption_error),
                ("relative_mce", self.relative_corruption_error),
            ):
                try:
                    entries[key] = measure(baseline)
                except ValueError as error:
                    entries["note"] = str(error)
        return entries


def comparison_rows(
    results: Mapping[str, SuiteResult], baseline: str | None = None
) -> list[dict[str, Any]]:
    """One row a model: summary, and its error in every cell that is no corruption.

    Args:
        results: name -> suite.
        baseline: name of the model that mCE and relative mCE compare with.

    Raises:
        ValueError: if `baseline` is not among the results.

    Example:

    >>> clean = {"kind": "clean", "name": "clean", "level": 0.0, "error": 0.25}
    >>> comparison_rows({"vanilla": SuiteResult([clean])})[0]["clean_error"]
    0.25
    """
    if baseline is not None and baseline not in results:
        raise ValueError(
            f"`baseline` must be one of {list(results)}. Received: baseline={baseline!r}."
        )
    rows = []
    for name, result in results.items():
        row = {"model": name, **result.summary(results[baseline] if baseline else None)}
        for cell in result.rows:
            if cell["kind"] not in ("clean", "corruption"):
                row[f"{cell['kind']} {cell['name']} {cell['level']:g}"] = cell["error"]
        rows.append(row)
    return rows


def markdown_table(rows) -> str:
    """Rows as a Markdown table; floats with four digits, — where there is nothing.

    Example:

    >>> print(markdown_table([{"model": "a", "error": 0.5}, {"model": "b", "error": None}]))
    | model | error |
    |---|---|
    | a | 0.5 |
    | b | — |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def shown(value):
        if value is None:
            return "—"
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def noise_figure(results: Mapping[str, SuiteResult], *, theme: str = "light"):
    """Accuracy by signal-to-noise ratio of Gaussian noise, one line a model (Figure 4).

    Returns:
        A Matplotlib `Figure`.
    """
    with style(theme) as colours:
        figure, (axes,) = new_figure(6, 3.6)
        palette = (colours["clean"], colours["certified"], *colours["others"])
        for i, (name, result) in enumerate(results.items()):
            rows = sorted(result.of_kind("noise"), key=lambda row: row["level"])
            levels = [row["level"] for row in rows]
            shares = [1 - row["error"] for row in rows]
            axes.plot(levels, shares, f"-{'os^DvPX'[i % 7]}", label=name,
                      color=palette[i % len(palette)])  # fmt: skip
        axes.set(xlabel="signal-to-noise ratio (dB)", ylabel="accuracy", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(percent_formatter())
        axes.legend(loc="best")
        return figure


def corruption_figure(results: Mapping[str, SuiteResult], *, theme: str = "light"):
    """Mean error by corruption, one bar a model.

    Returns:
        A Matplotlib `Figure`.
    """
    with style(theme) as colours:
        figure, (axes,) = new_figure(9, 3.8)
        palette = (colours["clean"], colours["certified"], *colours["others"])
        names = list(dict.fromkeys(r["name"] for s in results.values() for r in s.of_kind(
            "corruption")))  # fmt: skip
        width = 0.8 / max(len(results), 1)
        for i, (label, result) in enumerate(results.items()):
            errors = [
                np.mean([r["error"] for r in result.of_kind("corruption") if r["name"] == name])
                for name in names
            ]
            axes.bar(np.arange(len(names)) + (i - (len(results) - 1) / 2) * width, errors, width,
                     label=label, color=palette[i % len(palette)])  # fmt: skip
        axes.set(ylabel="mean error over severities", ylim=(0, 1.02))
        axes.set_xticks(range(len(names)), [n.replace("_", " ") for n in names], rotation=40,
                        ha="right")  # fmt: skip
        axes.yaxis.set_major_formatter(percent_formatter())
        axes.legend(loc="best")
        return figure
