"""Optimizers that keep what a guarantee needs while they train: orthogonal kernels."""

from tf_lyapunov.optimizers.marks import is_marked, mark_orthogonal
from tf_lyapunov.optimizers.stiefel import Stiefel

__all__ = ["Stiefel", "is_marked", "mark_orthogonal"]
