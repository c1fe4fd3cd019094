"""`train`, `report` and `run`: experiments that a configuration file describes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Progress, emit, print_results, say, work
from .application import (
    Config,
    DataDir,
    Download,
    Epochs,
    Json,
    Overwrite,
    Resume,
    RunDir,
    Set,
)


def _read_config(path: Path, epochs: int | None, overrides: list[str] | None):
    from ..experiments.reading import load_config

    extra = list(overrides or [])
    if epochs is not None:
        extra.append(f"training.epochs={epochs}")
    return load_config(path, extra)


def _run_path(config, run_dir: Path | None) -> Path:
    return run_dir if run_dir is not None else Path("runs", config.name)


@contextlib.contextmanager
def _open_run(config, run_dir: Path | None, resume: bool, overwrite: bool):
    from ..experiments.files import RunDirectory

    path = _run_path(config, run_dir)
    with RunDirectory(path).open(resume=resume, overwrite=overwrite) as run:
        yield run


@contextlib.contextmanager
def _train_run(execution, config, run_dir: Path | None, resume: bool, overwrite: bool):
    """The run directory: the chief opens it, the other workers only read it."""
    if execution.strategy == "multiworker":
        from ..experiments.files import RunDirectory
        from ..experiments.rendezvous import Cluster

        if not Cluster.from_environment().is_chief:
            yield RunDirectory(_run_path(config, run_dir))
            return
    with _open_run(config, run_dir, resume, overwrite) as run:
        yield run


def train(
    config: Config,
    run_dir: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    epochs: Epochs = None,
    set_: Set = None,
    data_dir: DataDir = None,
    download: Download = False,
    strategy: Annotated[str, typer.Option(help="none, mirrored, multiworker or tpu.")] = "none",
    devices: Annotated[
        int | None, typer.Option(help="Replicas in this process. Default: one per GPU, else one.")
    ] = None,
    scaling: Annotated[
        str,
        typer.Option(help="Global batch and learning rate by replicas: none, linear, sqrt, auto."),
    ] = "none",
    worker_timeout: Annotated[
        float, typer.Option(help="Seconds in which all workers of TF_CONFIG must come.")
    ] = 60.0,
    tpu: Annotated[str, typer.Option(help="Name or address of the TPU.")] = "",
    precision: Annotated[
        str, typer.Option(help="float32, mixed_bfloat16 or mixed_float16.")
    ] = "float32",
    jit: Annotated[bool, typer.Option("--jit", help="Compile training steps with XLA.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only kernels that repeat their bits.")
    ] = False,
    json_: Json = False,
) -> None:
    """Train the model of an experiment under its claim; a kill at any moment loses one epoch.

    Example: [bold]tf-lyapunov train configs/lyapunov/digits.yaml --resume[/bold]

    On two GPUs: [bold]tf-lyapunov train CONFIG --strategy mirrored --scaling auto[/bold]
    """
    experiment = _read_config(config, epochs, set_)
    with contextlib.ExitStack() as stack:
        stack.enter_context(work(json_))
        from ..experiments.execution import Execution

        execution = Execution(
            strategy, devices, scaling, worker_timeout, tpu, precision, jit, deterministic
        )
        opened = _train_run(execution, experiment, run_dir, resume, overwrite)
        run = stack.enter_context(opened)
        from ..experiments import runner

        with Progress() as progress:
            trained = runner.train_experiment(
                experiment,
                run,
                resume=resume,
                data_dir=data_dir,
                download=download,
                execution=execution,
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


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    json_: Json = False,
) -> None:
    """Write the HTML report of a run from the files that are there, and print its table.

    Example: [bold]tf-lyapunov report runs/digits[/bold]
    """
    with work(json_):
        from ..experiments import runner

        with runner.open_run(run) as opened:
            results, path = runner.report_run(opened)
        print_results(results, path, json_)


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
        from ..experiments import runner

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
