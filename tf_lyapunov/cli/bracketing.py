"""`bracket`: lower bounds beside the smallest perturbations that attacks find."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import emit, say, work
from .application import (
    Data,
    DataDir,
    Download,
    Json,
    Label,
    Out,
    Pixels,
    Samples,
    Split,
    Target,
    open_target,
)


def bracket(
    target: Target,
    data: Data = None,
    label: Label = None,
    pixels: Pixels = None,
    split: Split = "test",
    samples: Samples = None,
    published: Annotated[
        bool, typer.Option("--published", help="Compare with the published rules (no proof).")
    ] = False,
    box: Annotated[
        bool, typer.Option("--box", help="Attacks stay within the data set's range of pixels.")
    ] = False,
    time_budget: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="For relaxations around the inputs; 0: by rules of layers."
        ),
    ] = 10.0,
    state: Annotated[
        Path | None,
        typer.Option(help="Keep finished attacks in this file; a killed command continues."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Write a report page.")
    ] = None,
    out: Out = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
) -> None:
    """Prove and find, for every input, how small a perturbation changes the class.

    Example: [bold]tf-lyapunov bracket runs/digits --samples 100 --report bracket.html[/bold]
    """
    with work(json_):
        from ..evaluation.bracket import bracket as compute
        from ..evaluation.examples import bracket_examples
        from ..evaluation.report import write_report
        from ..evaluation.results import Results
        from ..experiments.files import write_json

        with open_target(target, data, data_dir, download, label, pixels) as opened:
            x, y = opened.arrays(split, samples)
            found = compute(
                opened.model,
                x,
                y,
                rules="published" if published else "sound",
                bounds=opened.data.pixel_range if box else None,
                time_budget=time_budget,
                state=state,
                progress=say,
            )
        result = {"split": split, "summary": found.summary(), "rows": found.rows()}
        if out is not None:
            write_json(out, result)
        if report is not None:
            results = Results(title=target.stem, bracket=found.record())
            results.examples = bracket_examples(found, x)
            write_report(results, report)
        if json_:
            emit(result)
        else:
            typer.echo(found.table())
