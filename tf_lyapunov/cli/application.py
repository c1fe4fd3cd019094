"""The typer application, its exit codes, and the options that several commands share."""

from __future__ import annotations

import contextvars
import functools
import importlib
import time
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__, startup

DONE, NOT_PROVED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="tf-lyapunov",
    help="Design, train, certify and attack robust Keras classifiers.",
    no_args_is_help=True,
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
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Epochs = Annotated[int | None, typer.Option(help="Instead of training.epochs.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a field: training.epochs=9."),
]
Target = Annotated[
    Path, typer.Argument(metavar="RUN_OR_MODEL", help="Run directory, or .keras or .onnx file.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Data set, .npz, .csv or folder of images by class. Default: that of the run."
    ),
]
Label = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column, array or feature with the labels of own data."),
]
Pixels = Annotated[
    str | None,
    typer.Option(help="Own data: half (x/255 - 0.5), unit (x/255) or raw, as the model takes it."),
]
Split = Annotated[str, typer.Option(help="train, val or test.")]
Samples = Annotated[int | None, typer.Option(help="Only the first so many examples.")]
Out = Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")]


_BEGUN = contextvars.ContextVar("begun")


def begun() -> float:
    """`time.monotonic()` when the command began, before the library was imported."""
    return _BEGUN.get()


def command(function):
    """`function` as a command that imports the library when it runs, and not for its help.

    With an argument `network` or `model` that is an ONNX file it starts lightly, see `startup`.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        _BEGUN.set(time.monotonic())
        about = [kwargs.get(name) for name in ("network", "model")]
        if any(isinstance(path, Path) and path.suffix == ".onnx" for path in about):
            startup.light()
        importlib.import_module("tf_lyapunov.library")
        return function(*args, **kwargs)

    return app.command()(run)


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


def numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"`{option}` takes numbers separated by commas. Received: {text!r}."
        ) from None


def model_file(target: Path) -> Path:
    """The `.keras` file of a run directory, or `target` itself."""
    from ..experiments.files import MODEL

    return target / MODEL if target.is_dir() else target


def read_model(path: Path):
    """`(Keras model, what was compared in words)` of a `.keras` or `.onnx` file.

    The words are None for a `.keras` file. What commands open models with.
    """
    if path.suffix != ".onnx" or not path.is_file():
        from ..modelfile import load_model

        return load_model(path), None
    from ..onnx.load import load_onnx

    program = load_onnx(path)
    checked = program.validation
    return program.keras_model, (
        f"Tested, not proved: {path.name} was read as a Keras model with the file's weights, and "
        f"{checked.values} of its values agreed with onnxruntime's on {checked.inputs} random "
        "inputs, within a bound on their rounding."
    )


def load_model(path: Path):
    """The model of `read_model`; what was compared is said."""
    from ..terminal import say

    model, words = read_model(Path(path))
    if words is not None:
        say(words)
    return model


def open_target(
    target: Path,
    data: str | None,
    data_dir: Path | None,
    download: bool,
    label: str | None = None,
    pixels: str | None = None,
):
    """A run directory or a file of any kind that is read, with data: a context of `Opened`."""
    from ..experiments import targets
    from ..terminal import say

    options = {"label": label, "pixels": pixels, "load": load_model, "say": say}
    return targets.open_target(target, data, data_dir, download, **options)
