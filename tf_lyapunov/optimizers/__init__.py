"""Optimizers that keep what a guarantee needs while they train: orthogonal kernels."""

from tf_lyapunov.optimizers.marks import is_marked, mark_orthogonal
from tf_lyapunov.optimizers.stiefel import Stiefel, check_orthogonal, restore_orthogonal

__all__ = [
    "Stiefel",
    "check_orthogonal",
    "is_marked",
    "mark_orthogonal",
    "restore_orthogonal",
]
