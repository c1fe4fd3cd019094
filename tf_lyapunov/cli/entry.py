"""`main`: runs a command and turns errors into messages and exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import typer

from ..terminal import Interrupted, console, emit, say
from .application import BAD_INPUT, DONE, INTERRUPTED, app


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code and never shows a traceback for bad input.

    Set `TF_LYAPUNOV_TRACEBACK=1` to see where an error came from.

    Example:

    >>> main(["--version"])
    tf-lyapunov 0.2.0
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
            if os.environ.get("TF_LYAPUNOV_TRACEBACK") == "1" or not is_callers(error):
                raise
            _explain(error, "--json" in arguments)
            return BAD_INPUT


def is_callers(error: Exception) -> bool:
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
