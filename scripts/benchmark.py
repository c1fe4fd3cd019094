"""Measures what the README promises, as ratios within one run, and saves a table and JSON.

    python scripts/benchmark.py [--only norms,overhead ...] [--scale] [--quick] [--out DIR]

Topics are the modules of `scripts/benchmarks`, a section of `benchmark.json` each; sections that
are not measured again stay as they are. Topics with `SCALE = True` take long and much memory: they
run with `--scale`, or by name.
"""

import json
import math
import os
import pathlib
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import typer

from benchmarks import topics
from benchmarks.machine import machine

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
TOPICS = topics()


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(TOPICS)}; repeated, or with commas."),
    ] = None,
    scale: Annotated[bool, typer.Option("--scale", help="The large networks instead.")] = False,
    quick: Annotated[bool, typer.Option(help="Smaller sizes, fewer rounds.")] = False,
    out: Annotated[pathlib.Path, typer.Option(help="Where benchmark.json goes.")] = RESULTS,
    data_dir: Annotated[
        pathlib.Path | None, typer.Option(help="Data sets that TFDS has prepared.")
    ] = None,
):
    """Runs the benchmarks and merges them into OUT/benchmark.json."""
    from tf_lyapunov.writing import write_text

    if data_dir is not None:
        os.environ["TFDS_DATA_DIR"] = str(data_dir)
    default = [name for name, topic in TOPICS.items() if getattr(topic, "SCALE", False) == scale]
    chosen = [name for names in only or default for name in names.split(",") if name]
    unknown = sorted(set(chosen) - set(TOPICS))
    if unknown:
        raise typer.BadParameter(f"Unknown topics {unknown}; choose from {list(TOPICS)}.")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "benchmark.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen:
        topic = TOPICS[name]
        results[name] = {"machine": machine(), "quick": quick, **topic.measure(quick)}
        rows = topic.rows(results[name]) if hasattr(topic, "rows") else results[name]["rows"]
        _show(topic.TITLE, rows)
        write_text(path, json.dumps(results, indent=1, default=float) + "\n")
    if any(not math.isfinite(v) for v in _floats({name: results[name] for name in chosen})):
        raise SystemExit("A benchmark returned NaN or infinity.")


def _show(title, rows):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*(f"{v:.6g}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=160).print(table)


def _floats(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [f for item in value for f in _floats(item)]
    return [value] if isinstance(value, float) else []


if __name__ == "__main__":
    typer.run(main)
