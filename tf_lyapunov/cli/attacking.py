"""`attack`: how a network does under attack."""

from __future__ import annotations

from typing import Annotated

import typer

from ..terminal import emit, print_rows, work
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
    numbers,
    open_target,
)


def attack(
    target: Target,
    data: Data = None,
    label: Label = None,
    pixels: Pixels = None,
    split: Split = "test",
    samples: Samples = None,
    method: Annotated[str, typer.Option(help="pgd or fgm.")] = "pgd",
    norm: Annotated[str, typer.Option(help="l2 or linf.")] = "l2",
    radius: Annotated[
        list[float] | None, typer.Option(help="May be repeated. Default: those of the run.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 40,
    restarts: Annotated[int, typer.Option(min=1, help="Runs from different points.")] = 1,
    loss: Annotated[str, typer.Option(help="cross_entropy or margin.")] = "cross_entropy",
    bounds: Annotated[
        str | None, typer.Option(help="Smallest and largest pixel, e.g. 0,1. Default: none.")
    ] = None,
    out: Out = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
) -> None:
    """Search for inputs near the given ones that the model gets wrong.

    Example: [bold]tf-lyapunov attack runs/digits --radius 0.3 --steps 100[/bold]
    """
    with work(json_):
        from ..experiments import runner

        box = None if bounds is None else numbers("--bounds", bounds)
        spec = {"name": method, "norm": norm, "steps": steps, "restarts": restarts, "loss": loss}
        with open_target(target, data, data_dir, download, label, pixels) as opened:
            found = runner.attack_target(
                opened, [{**spec, "bounds": box}], radius or opened.radii, split, samples, out=out
            )
        if json_:
            emit(found)
        else:
            print_rows(found["rows"])
