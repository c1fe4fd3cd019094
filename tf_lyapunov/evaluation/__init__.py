"""Accuracy under attack, tables, plots and the HTML report."""

from tf_lyapunov.evaluation.accuracy import (
    MeasuredGain,
    accuracy_under_attack,
    largest_measured_gain,
    logits,
    measured_gain,
)
from tf_lyapunov.evaluation.report import Results, render_report, terminal_table, write_report

__all__ = [
    "MeasuredGain",
    "Results",
    "accuracy_under_attack",
    "largest_measured_gain",
    "logits",
    "measured_gain",
    "render_report",
    "terminal_table",
    "write_report",
]
