"""`configs list | show | copy`: the experiment files that come with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import console, emit
from .application import Json, Replace

configs = typer.Typer(
    help="Experiment files that come with the library: list, show, copy.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `configs list` shows it.")]


@configs.command("list")
def list_configs(
    part: Annotated[str, typer.Argument(metavar="[PART]", help="Only names with this.")] = "",
    json_: Json = False,
) -> None:
    """Names, data sets and titles; `train`, `run` and `plan` take a name instead of a file.

    Example: [bold]tf-lyapunov configs list mnist[/bold]
    """
    from ..experiments.reading import load_config
    from ..experiments.shipped import shipped_configs

    rows = []
    for name, path in shipped_configs().items():
        if part in name:
            config = load_config(path)
            rows.append({"name": name, "dataset": config.dataset.name, "title": config.title})
    if json_:
        emit({"configs": rows})
        return
    from rich.table import Table

    table = Table("name", "data set", "title", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["dataset"], row["title"])
    console(stderr=False).print(table)


@configs.command()
def show(name: Name) -> None:
    """Print an experiment file, its comments included.

    Example: [bold]tf-lyapunov configs show lyapunov/digits[/bold]
    """
    from ..experiments.shipped import shipped_config

    typer.echo(shipped_config(name).read_text(encoding="utf-8"), nl=False)


@configs.command()
def copy(
    name: Name,
    to: Annotated[
        Path | None, typer.Argument(metavar="[TO]", help="File or directory. Default: here.")
    ] = None,
    overwrite: Replace = False,
) -> None:
    """Copy an experiment file, to be changed and run.

    Example: [bold]tf-lyapunov configs copy lyapunov/digits mine.yaml[/bold]
    """
    from ..errors import OutputFileError
    from ..experiments.shipped import shipped_config
    from ..writing import atomic_path

    source = shipped_config(name)
    target = Path() if to is None else to
    target = target / source.name if target.is_dir() else target
    if target.exists() and not overwrite:
        raise OutputFileError(
            f"A file is there already. Received: {target}. Pass `--overwrite` to replace it."
        )
    with atomic_path(target) as temporary:
        temporary.write_bytes(source.read_bytes())
    typer.echo(f"Written to {target}. Next: tf-lyapunov run {target}")
