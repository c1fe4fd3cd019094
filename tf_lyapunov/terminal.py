"""What the command line prints: results to stdout, messages and progress to stderr."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import typer

from tf_lyapunov.digits import at_most


def console(stderr: bool = True):
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def say(message: str) -> None:
    console().print(message, markup=False, style="dim")


def emit(record: dict) -> None:
    from .experiments.files import to_json

    # Written to the real stdout: inside `work`, sys.stdout is stderr.
    _real_stdout().write(to_json(_finite(record)))
    _real_stdout().flush()


_STDOUT: list = []


def _real_stdout():
    return _STDOUT[-1] if _STDOUT else sys.stdout


class Interrupted(Exception):
    """Carries the message of a KeyboardInterrupt past typer, which drops it."""


@contextlib.contextmanager
def work(as_json: bool):
    """Around a command's work: with --json, whatever prints to stdout prints to stderr."""
    with contextlib.ExitStack() as stack:
        if as_json:
            _STDOUT.append(sys.stdout)
            stack.callback(_STDOUT.pop)
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise Interrupted(str(interrupt)) from None


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


class Progress:
    """One line on stderr that shows how far training is; plain lines where there is no terminal."""

    def __init__(self):
        from rich import progress

        target = console()
        self._bar = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[metrics]}"),
            console=target,
            transient=True,
        )
        self._live, self._task, self._printed = target.is_terminal, None, 0

    def __enter__(self) -> Progress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *unused) -> None:
        if self._live:
            self._bar.stop()

    def __call__(self, epoch: int, epochs: int, row: dict) -> None:
        shown = [f"loss {row['loss']:.4f}", f"accuracy {row['accuracy']:.3f}"]
        if "val_accuracy" in row:
            shown.append(f"validation {row['val_accuracy']:.3f}")
        if "gain_upper_bound" in row:
            shown.append(f"gain ≤ {at_most(row['gain_upper_bound'], 4)}")
        text = "  ".join(shown)
        if self._live:
            if self._task is None:
                self._task = self._bar.add_task("training", total=epochs, metrics=text)
            self._bar.update(self._task, completed=epoch, metrics=text)
        elif epoch == epochs or epoch - self._printed >= max(1, epochs // 10):
            self._printed = epoch
            say(f"epoch {epoch}/{epochs}  {text}")


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        parts = [f"radius {row['radius']:g}", f"clean {row['clean']:.4f}"]
        if row.get("certified") is not None:
            parts.append(f"certified {row['certified']:.4f}")
        parts += [f"under {name} {value:.4f}" for name, value in row.get("attacked", {}).items()]
        typer.echo("  ".join(parts))


def print_results(results, path: Path, json_: bool) -> None:
    if json_:
        emit({**results.to_dict(), "report": str(path)})
        return
    from .evaluation.report import terminal_table

    console(stderr=False).print(terminal_table(results))
    typer.echo(f"Report: {path}")
