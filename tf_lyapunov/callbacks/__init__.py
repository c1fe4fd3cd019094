"""Callbacks for `fit`: `LyapunovMonitor` watches a claim, says it, and enforces its constraints."""

from tf_lyapunov.callbacks.monitor import ClaimLost, LyapunovMonitor
from tf_lyapunov.callbacks.reading import Reading
from tf_lyapunov.callbacks.schedule import LossParamScheduler

__all__ = ["ClaimLost", "LossParamScheduler", "LyapunovMonitor", "Reading"]
