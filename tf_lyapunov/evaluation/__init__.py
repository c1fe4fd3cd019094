"""Accuracy under attack, noise and corruptions; tables, plots and the HTML report."""

from tf_lyapunov.evaluation.accuracy import (
    MeasuredGain,
    accuracy_under_attack,
    largest_measured_gain,
    logits,
    measured_gain,
)
from tf_lyapunov.evaluation.measures import SuiteResult
from tf_lyapunov.evaluation.report import render_report, terminal_table, write_report
from tf_lyapunov.evaluation.results import Results
from tf_lyapunov.evaluation.suite import evaluate_suite, load_suite

__all__ = [
    "MeasuredGain",
    "Results",
    "SuiteResult",
    "accuracy_under_attack",
    "evaluate_suite",
    "largest_measured_gain",
    "load_suite",
    "logits",
    "measured_gain",
    "render_report",
    "terminal_table",
    "write_report",
]
