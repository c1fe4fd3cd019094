"""Command line: design, train, certify, attack, bracket, evaluate, report, run, and plan.

Exit codes: 0 done, 1 a required claim is not proved, 2 bad input, 130 interrupted. Messages and
progress go to stderr; stdout carries the result, with `--json` one JSON object and nothing else.
"""

from .application import BAD_INPUT, DONE, INTERRUPTED, NOT_PROVED, app, command
from .attacking import attack
from .bracketing import bracket
from .certifying import certify, verify
from .configs import configs
from .designing import design
from .entry import main
from .evaluating import evaluate
from .exchange import export_mat, export_onnx, import_mat
from .experiments import report, run, train
from .planning import plan
from .properties import export_vnnlib, verify_property

for function in (
    design, train, certify, verify, attack, bracket, evaluate, report, run, plan, export_mat,
    import_mat, export_onnx, verify_property, export_vnnlib,
):  # fmt: skip
    command(function)
app.add_typer(configs, name="configs")

__all__ = ["BAD_INPUT", "DONE", "INTERRUPTED", "NOT_PROVED", "app", "main"]
