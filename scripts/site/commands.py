"""The page of the command line: every command, its arguments and options, as `--help` says."""

import re
import sys


def page():
    """Markdown of all commands, made without Keras."""
    import typer

    started, sys.argv[0] = sys.argv[0], "tf-lyapunov"  # the library then leaves Keras alone
    try:
        from tf_lyapunov.cli import app
    finally:
        sys.argv[0] = started
    root = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Exit codes: 0 done, 1 a required claim is not proved, 2 bad input, 130 interrupted. "
        "Results go to stdout, messages to stderr; `--json` prints one JSON object and nothing "
        "else. "
        "`tf-lyapunov --install-completion` completes names in your shell.",
        "",
    ]
    for name, command in root.commands.items():
        lines += _command(f"tf-lyapunov {name}", command)
    return "\n".join(lines)


def _command(path, command):
    if hasattr(command, "commands"):
        return [
            line
            for name, inner in command.commands.items()
            for line in _command(f"{path} {name}", inner)
        ]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([path, *(a.metavar or a.name.upper() for a in arguments)])
    lines = [
        f"## `{path}`",
        "",
        _markdown(command.help or ""),
        "",
        "```",
        f"{usage} [OPTIONS]",
        "```",
        "",
    ]
    lines += ["| argument or option | |", "|---|---|"]
    for parameter in arguments:
        lines.append(f"| `{parameter.metavar or parameter.name}` | {_cell(parameter.help)} |")
    for option in options:
        names = ", ".join(f"`{text}`" for text in (*option.opts, *option.secondary_opts))
        default = option.default
        known = default not in (None, False, "", ()) and not callable(default)
        lines.append(
            f"| {names} | {_cell(option.help)}{f' Default: {default}.' if known else ''} |"
        )
    return [*lines, ""]


def _cell(text):
    return _markdown(text or "").replace("|", "\\|").replace("\n", " ")


def _markdown(text):
    """Rich's marks as Markdown."""
    pieces = re.split(r"(`.*?`)", re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", text, flags=re.S))
    return "".join(p if p.startswith("`") else p.replace("[", r"\[") for p in pieces)
