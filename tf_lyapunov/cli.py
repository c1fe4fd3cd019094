"""Command line: design, train, certify, attack, evaluate, report, and run for all of them.

Exit codes: 0 done, 1 a required claim is not proved, 2 bad input, 130 interrupted. Messages and
progress go to stderr; stdout carries the result, with `--json` one JSON object and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .terminal import Interrupted, Progress, console, emit, print_results, print_rows, say, work

DONE, NOT_PROVED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="tf-lyapunov",
    help="Design, train, certify and attack robust Keras classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="TensorFlow Datasets directory. Default: $TFDS_DATA_DIR."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data set if it is missing.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file (YAML).")]
RunDir = Annotated[
    Path | None, typer.Option(help="Where to write. Default: runs/NAME of the experiment.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that is there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there.")]
Epochs = Annotated[int | None, typer.Option(help="Instead of training.epochs.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a field: training.epochs=9."),
]
Target = Annotated[
    Path, typer.Argument(metavar="RUN_OR_MODEL", help="Run directory, or .keras file.")
]
Data = Annotated[
    str | None, typer.Option(help="Data set. Default: the one the run was trained on.")
]
Split = Annotated[str, typer.Option(help="train, val or test.")]
Samples = Annotated[int | None, typer.Option(help="Only the first so many examples.")]
Out = Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")]


def _read_config(path: Path, epochs: int | None, overrides: list[str] | None):
    from .experiments.reading import load_config

    extra = list(overrides or [])
    if epochs is not None:
        extra.append(f"training.epochs={epochs}")
    return load_config(path, extra)


@contextlib.contextmanager
def _open_run(config, run_dir: Path | None, resume: bool, overwrite: bool):
    from .experiments.files import RunDirectory

    path = run_dir if run_dir is not None else Path("runs", config.name)
    with RunDirectory(path).open(resume=resume, overwrite=overwrite) as run:
        yield run


# ----------------------------------------------------------------------------------- commands


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tf-lyapunov {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Design, train, certify and attack robust Keras classifiers."""


@app.command()
def design(
    delta: Annotated[float | None, typer.Option(help="Output index δ of the claim.")] = None,
    nu: Annotated[float | None, typer.Option(help="Input index ν of the claim.")] = None,
    gain: Annotated[float | None, typer.Option(help="Claim a plain l2 gain instead.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers with weights.")] = 3,
    activation: Annotated[str, typer.Option(help="Activation of the hidden layers.")] = "relu",
    negative_slope: Annotated[
        float | None, typer.Option(help="Slope of leaky_relu below zero.")
    ] = None,
    last_activation: Annotated[str, typer.Option(help="Activation of the last one.")] = "linear",
    rule: Annotated[
        str, typer.Option(help="sound, conic, lyapunov or dissipativity (as published).")
    ] = "sound",
    weights: Annotated[
        str | None, typer.Option(help="Relative budgets of the layers, e.g. 2,1,1.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="closed_form or remark_4 (lyapunov); theorem_4 or get_indexes."),
    ] = None,
    square_root: Annotated[
        bool, typer.Option("--square-root", help="lyapunov: budgets as derived, not as printed.")
    ] = False,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="Exit with 1 unless the claim is proved.")
    ] = False,
    json_: Json = False,
) -> None:
    """Spectral budgets of the layers that prove a claim about the network.

    Example: [bold]tf-lyapunov design --delta 0.4 --nu -2 --layers 3 --activation leaky_relu
    --negative-slope 0.1 --rule sound[/bold]
    """
    if (gain is None) == (delta is None and nu is None) or (delta is None) != (nu is None):
        raise ValueError(
            "A claim is `--delta` with `--nu`, or `--gain`. Received: "
            f"delta={delta}, nu={nu}, gain={gain}."
        )
    with work(json_):
        from .design import spectral_design
        from .theory.sectors import Indices, Sector

        slope = {} if negative_slope is None else {"negative_slope": negative_slope}
        hidden = Sector.of(activation, **(slope if activation == "leaky_relu" else {}))
        last = Sector.of(last_activation, **(slope if last_activation == "leaky_relu" else {}))
        options: dict[str, Any] = {} if variant is None else {"variant": variant}
        if square_root:
            options["square_root"] = True
        if weights is not None:
            options["weights"] = _numbers("--weights", weights)
        sectors = [hidden] * (layers - 1) + [last]
        if gain is not None:
            result = spectral_design(gain=gain, sectors=sectors, **options)
        else:
            result = spectral_design(Indices(delta, nu), sectors, rule=rule, **options)
        if json_:
            record = result.to_json()
            emit(json.loads(record) if isinstance(record, str) else record)
        else:
            typer.echo(result.explain())
    if require_proof and not result.is_proved:
        raise typer.Exit(NOT_PROVED)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"`{option}` takes numbers separated by commas. Received: {text!r}."
        ) from None


@app.command()
def train(
    config: Config,
    run_dir: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    epochs: Epochs = None,
    set_: Set = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
) -> None:
    """Train the model of an experiment under its claim; a kill at any moment loses one epoch.

    Example: [bold]tf-lyapunov train configs/lyapunov/digits.yaml --resume[/bold]
    """
    experiment = _read_config(config, epochs, set_)
    with work(json_), _open_run(experiment, run_dir, resume, overwrite) as run:
        from .experiments import runner

        with Progress() as progress:
            trained = runner.train_experiment(
                experiment,
                run,
                resume=resume,
                data_dir=data_dir,
                download=download,
                on_epoch=progress,
                say=say,
            )
        last = trained.history[-1] if trained.history else {}
        if json_:
            emit(
                {
                    "run": str(run.path),
                    "epochs": len(trained.history),
                    "resumed_from": trained.resumed_from,
                    "seconds": trained.seconds,
                    "metrics": last,
                }
            )
        else:
            typer.echo(
                f"Trained {len(trained.history)} epochs: validation accuracy "
                f"{last.get('val_accuracy', float('nan')):.4f}. Written to {run.path}"
            )


@app.command()
def certify(
    target: Target,
    data: Data = None,
    split: Split = "test",
    samples: Samples = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RADIUS:ACCURACY",
            help="Exit with 1 unless this certified accuracy is reached, e.g. 0.2:0.8.",
        ),
    ] = None,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="Exit with 1 unless radii and claim are proved.")
    ] = False,
    radius: Annotated[
        list[float] | None, typer.Option(help="Radii to print. Default: those of the run.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="composition, liplt, closed_form, eclipse, lipsdp, local, auto, ...")
    ] = "composition",
    out: Out = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
) -> None:
    """Prove for every input a radius within which the prediction cannot change.

    Example: [bold]tf-lyapunov certify runs/digits --require 0.3:0.8[/bold]
    """
    demands = [_demand(text) for text in require or []]
    with work(json_):
        from .experiments import runner

        with runner.open_target(target, data, data_dir, download, say=say) as opened:
            certificate = runner.certify_target(opened, split, samples, method=method, out=out)
            radii, proved = radius or opened.radii, opened.is_proved
        table = [
            {"radius": r, "certified_accuracy": float(certificate.certified_accuracy(r))}
            for r in radii
        ]
        failed = [
            {"radius": r, "required": a, "reached": float(certificate.certified_accuracy(r))}
            for r, a in demands
            if not float(certificate.certified_accuracy(r)) >= a
        ]
        if json_:
            emit(
                {
                    "target": str(target),
                    "verdict": certificate.verdict,
                    "claim_proved": proved,
                    "gain_upper_bound": certificate.gain_upper_bound,
                    "examples": len(certificate.radius),
                    "certified": table,
                    "failed": failed,
                }
            )
        else:
            typer.echo(certificate.explain())
            for row in table:
                typer.echo(
                    f"certified accuracy at radius {row['radius']:g}: "
                    f"{row['certified_accuracy']:.4f}"
                )
    for item in failed:
        say(
            f"Not proved: accuracy {item['required']} at radius {item['radius']}; reached "
            f"{item['reached']:.4f}."
        )
    if require_proof and not proved:
        say(
            "Not proved: "
            + ("the design's claim." if certificate.verdict == "PROVED" else "any radius.")
        )
    if failed or (require_proof and not proved):
        raise typer.Exit(NOT_PROVED)


def _demand(text: str) -> tuple[float, float]:
    try:
        radius, accuracy = (float(part) for part in text.split(":"))
        if not (0 <= radius < float("inf") and 0 <= accuracy <= 1):
            raise ValueError
    except ValueError:
        raise ValueError(
            "`--require` is RADIUS:ACCURACY with a radius of at least 0 and an accuracy between 0 "
            f"and 1, for example 0.2:0.8. Received: {text!r}."
        ) from None
    return radius, accuracy


@app.command()
def attack(
    target: Target,
    data: Data = None,
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
        from .experiments import runner

        box = None if bounds is None else _numbers("--bounds", bounds)
        spec = {"name": method, "norm": norm, "steps": steps, "restarts": restarts, "loss": loss}
        with runner.open_target(target, data, data_dir, download, say=say) as opened:
            found = runner.attack_target(
                opened, [{**spec, "bounds": box}], radius or opened.radii, split, samples, out=out
            )
        if json_:
            emit(found)
        else:
            print_rows(found["rows"])


@app.command()
def evaluate(
    target: Target,
    data: Data = None,
    split: Split = "test",
    samples: Samples = None,
    radius: Annotated[
        list[float] | None, typer.Option(help="May be repeated. Default: those of the run.")
    ] = None,
    out: Out = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
) -> None:
    """Clean, certified and attacked accuracy at several radii, with the run's own attacks.

    Example: [bold]tf-lyapunov evaluate runs/digits --radius 0.1 --radius 0.5[/bold]
    """
    with work(json_):
        from .experiments import runner

        with runner.open_target(target, data, data_dir, download, say=say) as opened:
            runner.certify_target(opened, split, samples)
            found = runner.attack_target(
                opened, opened.attacks, radius or opened.radii, split, samples, out=out
            )
        if json_:
            emit(found)
        else:
            print_rows(found["rows"])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    json_: Json = False,
) -> None:
    """Write the HTML report of a run from the files that are there, and print its table.

    Example: [bold]tf-lyapunov report runs/digits[/bold]
    """
    with work(json_):
        from .experiments import runner

        with runner.open_run(run) as opened:
            results, path = runner.report_run(opened)
        print_results(results, path, json_)


@app.command()
def run(
    config: Config,
    run_dir: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    epochs: Epochs = None,
    set_: Set = None,
    data_dir: DataDir = None,
    download: Download = False,
    json_: Json = False,
) -> None:
    """Train, certify, attack and report in one go.

    Example: [bold]tf-lyapunov run configs/lyapunov/digits.yaml[/bold]
    """
    experiment = _read_config(config, epochs, set_)
    with work(json_), _open_run(experiment, run_dir, resume, overwrite) as opened:
        from .experiments import runner

        with Progress() as progress:
            results, path = runner.run_experiment(
                experiment,
                opened,
                resume=resume,
                data_dir=data_dir,
                download=download,
                command=f"tf-lyapunov run {config}",
                on_epoch=progress,
                say=say,
            )
        print_results(results, path, json_)


# --------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code and never shows a traceback for bad input.

    Set `TF_LYAPUNOV_TRACEBACK=1` to see where an error came from.

    Example:

    >>> main(["--version"])
    tf-lyapunov 0.1.0
    0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *unused, **ignored: say(f"Warning: {message}")
        try:
            code = app(args=arguments, prog_name="tf-lyapunov", standalone_mode=False)
            if code == INTERRUPTED:
                say("Interrupted.")
            return code if isinstance(code, int) else DONE
        except (KeyboardInterrupt, typer.Abort, Interrupted) as interrupt:
            say(str(interrupt) or "Interrupted.")
            return INTERRUPTED
        except BrokenPipeError:  # the reader of stdout, such as `head`, has gone
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except Exception as error:
            if os.environ.get("TF_LYAPUNOV_TRACEBACK") == "1" or not _is_callers(error):
                raise
            _explain(error, "--json" in arguments)
            return BAD_INPUT


def _is_callers(error: Exception) -> bool:
    """Whether an exception is about the input or the machine rather than a defect of ours."""
    if hasattr(error, "format_message"):  # a usage error of the command line
        return True
    kinds = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)
    return isinstance(error, kinds) or type(error).__module__.startswith("tensorflow")


def _explain(error: Exception, as_json: bool) -> None:
    if hasattr(error, "format_message"):
        message = error.format_message()
        command = getattr(getattr(error, "ctx", None), "command_path", "tf-lyapunov")
        message = f"{message.rstrip('.?')}. Try: {command} --help" if message else ""
    else:
        message = str(error).strip() or type(error).__name__
    if message:
        console().print(f"Error: {message}", markup=False, style="red")
    if as_json:
        emit({"error": {"type": type(error).__name__, "message": message}})


if __name__ == "__main__":
    sys.exit(main())
