"""Keras constraints: bounds on the gain of a layer's map, and the Parseval networks' heuristic.

Keras applies a constraint at the end of every optimizer step and nowhere else: not after
building, loading, `set_weights` or averaging of weights. `tf_lyapunov.project(model)` applies
the bounds at once.
"""

from tf_lyapunov.constraints.bounds import ConicBound, NormalizationBound, SpectralBound
from tf_lyapunov.constraints.parseval import ParsevalFrame

__all__ = ["ConicBound", "NormalizationBound", "ParsevalFrame", "SpectralBound"]
