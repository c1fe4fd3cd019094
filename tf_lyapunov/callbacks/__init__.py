"""Callbacks for `fit`.

`LyapunovMonitor` watches a claim, says it, and enforces its constraints; `MarginRamp` raises the
radius that a loss asks for.
"""

from tf_lyapunov.callbacks.monitor import ClaimLost, LyapunovMonitor
from tf_lyapunov.callbacks.ramp import MarginRamp
from tf_lyapunov.callbacks.reading import Reading
from tf_lyapunov.callbacks.schedule import LossParamScheduler

__all__ = ["ClaimLost", "LossParamScheduler", "LyapunovMonitor", "MarginRamp", "Reading"]
