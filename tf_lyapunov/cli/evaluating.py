"""`evaluate`: accuracy by radius, or the suite of noise, attacks, corruptions and dropout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import emit, print_rows, say, work
from .application import (
    Data,
    DataDir,
    Download,
    Json,
    Label,
    Out,
    Pixels,
    Replace,
    Samples,
    Split,
    Target,
    open_target,
)

_SUITE = "Suite"


def evaluate(
    target: Target,
    data: Data = None,
    label: Label = None,
    pixels: Pixels = None,
    split: Split = "test",
    samples: Samples = None,
    radius: Annotated[
        list[float] | None,
        typer.Option(
            help="May be repeated. Default: those of the run. With --suite, radii of l∞ PGD."
        ),
    ] = None,
    out: Out = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
    suite: Annotated[
        bool,
        typer.Option(
            "--suite",
            help="Clean, noise, FGSM, PGD and 15 corruptions instead, resumable.",
            rich_help_panel=_SUITE,
        ),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="noise, fgsm, pgd, corruption or dropout; may be repeated.", rich_help_panel=_SUITE
        ),
    ] = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option(help="Only these corruptions; may be repeated.", rich_help_panel=_SUITE),
    ] = None,
    severity: Annotated[
        list[int] | None,
        typer.Option(help="Only these severities, 1 to 5.", rich_help_panel=_SUITE),
    ] = None,
    snr: Annotated[
        list[float] | None,
        typer.Option(help="Signal-to-noise ratios of noise, in dB.", rich_help_panel=_SUITE),
    ] = None,
    fgsm_snr: Annotated[
        list[float] | None,
        typer.Option(help="Signal-to-noise ratios of FGSM, in dB.", rich_help_panel=_SUITE),
    ] = None,
    dropout_layer: Annotated[
        list[str] | None,
        typer.Option(help="Layers whose outputs are dropped.", rich_help_panel=_SUITE),
    ] = None,
    dropout_rate: Annotated[
        list[float] | None, typer.Option(help="Shares that are dropped.", rich_help_panel=_SUITE)
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Suite of another model (a directory or suite.json), for mCE and relative mCE.",
            rich_help_panel=_SUITE,
        ),
    ] = None,
    suite_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the suite is kept. Default: RUN/suite; needed for a model file.",
            rich_help_panel=_SUITE,
        ),
    ] = None,
    released: Annotated[
        bool,
        typer.Option(
            "--released",
            help="Corruptions of the released CIFAR-10-C arrays (prepared by TFDS).",
            rich_help_panel=_SUITE,
        ),
    ] = False,
    plots: Annotated[
        bool, typer.Option("--plots", help="Write figures beside it.", rich_help_panel=_SUITE)
    ] = False,
    overwrite: Replace = False,
) -> None:
    """Clean, certified and attacked accuracy at several radii, with the run's own attacks.

    Example: [bold]tf-lyapunov evaluate runs/digits --radius 0.1 --radius 0.5[/bold]

    With --suite: errors under noise, FGSM, PGD, corruptions and dropped features.

    Example: [bold]tf-lyapunov evaluate runs/cifar --suite --baseline runs/vanilla/suite[/bold]
    """
    chosen = {
        "--only": only,
        "--corruption": corruption,
        "--severity": severity,
        "--snr": snr,
        "--fgsm-snr": fgsm_snr,
        "--dropout-layer": dropout_layer,
        "--dropout-rate": dropout_rate,
        "--baseline": baseline,
        "--suite-dir": suite_dir,
        "--released": released,
        "--plots": plots,
        "--overwrite": overwrite,
    }
    given = [name for name, value in chosen.items() if value]
    if given and not suite:
        raise ValueError(f"These options belong to the suite. Received: {given} without `--suite`.")
    with work(json_):
        from ..experiments import runner

        with open_target(target, data, data_dir, download, label, pixels) as opened:
            if suite:
                found = _suite(opened, chosen, split, samples, radius, data_dir)
            else:
                runner.certify_target(opened, split, samples)
                found = runner.attack_target(
                    opened, opened.attacks, radius or opened.radii, split, samples, out=out
                )
        if suite and out is not None:
            from ..experiments.files import write_json

            write_json(out, found)
        if json_:
            emit(found)
        elif suite:
            _print_suite(found)
        else:
            print_rows(found["rows"])


def _suite(opened, chosen, split, samples, radii, data_dir) -> dict:
    from ..attacks import PGD
    from ..data.arrays import released_corruptions
    from ..evaluation.suite import evaluate_suite, load_suite
    from ..theory.balls import Linf

    directory = chosen["--suite-dir"]
    if directory is None:
        if opened.run is None:
            raise ValueError(
                "A model file has no directory for its suite. Received: no `--suite-dir`."
            )
        directory = opened.run.file("suite")
    # Read first: a baseline that is not there should not cost an evaluation.
    baseline = None if chosen["--baseline"] is None else load_suite(chosen["--baseline"])
    x, y = opened.arrays(split, samples)
    bounds = opened.data.pixel_range
    bounds = bounds if math.isfinite(bounds[1] - bounds[0]) else None
    options = {
        "include": chosen["--only"],
        "corruptions": chosen["--corruption"],
        "severities": chosen["--severity"],
        "snrs": chosen["--snr"],
        "fgsm_snrs": chosen["--fgsm-snr"],
        "dropout_layers": chosen["--dropout-layer"],
        "dropout_rates": chosen["--dropout-rate"],
    }
    if radii:
        options["pgd"] = [
            PGD(Linf(r), steps=10, step=r / 4, random_start=True, bounds=bounds) for r in radii
        ]
    if chosen["--released"]:
        options["released"] = released_corruptions(opened.data, data_dir, limit=samples)
    result = evaluate_suite(
        opened.model,
        x,
        y,
        **{name: value for name, value in options.items() if value},
        bounds=bounds,
        path=directory,
        overwrite=chosen["--overwrite"],
        progress=lambda text: say(f"evaluating: {text}"),
    )
    if chosen["--plots"]:
        _write_plots(result, baseline, directory)
    return {
        "suite": str(directory),
        "split": split,
        "samples": len(x),
        "summary": result.summary(baseline),
        "rows": result.rows,
    }


def _write_plots(result, baseline, directory) -> None:
    from ..evaluation.drawing import save
    from ..evaluation.measures import corruption_figure, noise_figure

    shown = {"this model": result, **({} if baseline is None else {"baseline": baseline})}
    for kind, draw in (("noise", noise_figure), ("corruption", corruption_figure)):
        having = {name: suite for name, suite in shown.items() if suite.of_kind(kind)}
        if result.of_kind(kind):
            save(draw(having), Path(directory) / f"{kind}.svg")


def _print_suite(found: dict) -> None:
    for row in found["rows"]:
        typer.echo(
            f"{row['kind']:<11}{row['name']:<20}{row['level']:>8g}  error {row['error']:.4f}"
        )
    for name, value in found["summary"].items():
        if value is not None:
            typer.echo(f"{name}: {value if isinstance(value, str) else format(value, '.4f')}")
    typer.echo(f"Written to {found['suite']}")
