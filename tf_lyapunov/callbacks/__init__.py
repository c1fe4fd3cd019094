"""Callbacks for `fit`: `LyapunovMonitor` watches a claim, says it, and enforces its constraints."""

from tf_lyapunov.callbacks.monitor import ClaimLost, LyapunovMonitor
from tf_lyapunov.callbacks.reading import Reading

__all__ = ["ClaimLost", "LyapunovMonitor", "Reading"]
