"""Smallest singular values of matrices in float64, from below."""

import math

import numpy as np

from tf_lyapunov.theory.eigenvalues import gamma
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import LinearMap

# More than what products and squares of scaled numbers can lose by underflow.
_UNDERFLOW = 2.0**-500


def smallest_singular_value_lower_bound(matrix):
    """Lower bound on the smallest of the min(m, k) singular values of an m × k matrix.

    For A with at least as many rows as columns (else its transpose) and any matrix R, such as the
    computed pseudoinverse,

        α = ‖I - R A‖_F < 1   ⟹   σ_min(A) ≥ (1 - α) / ‖R‖.

    Sufficient for any R, whatever made it: only products are trusted, and their rounding,
    γ_m·‖R‖_F·‖A‖_F, is part of α. Within 1e-6 of σ_min up to condition numbers of about 1e8.

    Args:
        matrix: array (m, k), read as float64.

    Returns:
        float; 0 where nothing more can be proved, as for singular matrices.

    Raises:
        ValueError: if the matrix has not two axes, no entry, or one that is not finite.

    Example:

    >>> found = smallest_singular_value_lower_bound(np.diag([3.0, 0.5]))
    >>> 0.4999999 < found <= 0.5
    True
    >>> smallest_singular_value_lower_bound(np.ones((3, 2)))
    0.0

    Reference: Rump, "Verified bounds for singular values" (BIT 2011), in its simplest form.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.all(np.isfinite(matrix)):
        raise ValueError(
            "`matrix` must have two axes and finite entries. "
            f"Received: shape {matrix.shape}, or NaN or infinity."
        )
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    largest = float(np.max(np.abs(tall)))
    if largest == 0:
        return 0.0
    exponent = math.frexp(largest)[1]
    # Powers of two are exact; what underflows here is far below what is subtracted at the end.
    tall = np.ldexp(tall, -exponent)
    try:
        inverse = np.linalg.pinv(tall)
    except np.linalg.LinAlgError:
        return 0.0
    if not np.all(np.isfinite(inverse)):
        return 0.0
    rows, columns = tall.shape
    residual = np.eye(columns) - inverse @ tall
    alpha = _frobenius(residual) + 2 * gamma(rows + 2) * _frobenius(inverse) * _frobenius(tall)
    # The subtraction from I is rounded once more, relatively.
    alpha = alpha * (1 + 8 * gamma(1)) + _UNDERFLOW
    norm = norm_upper_bound(inverse, LinearMap("dense", (inverse.shape[0],))).value
    if not alpha < 1 or not norm > 0:
        return 0.0
    bound = (1 - alpha) / norm * (1 - 8 * gamma(1)) - _UNDERFLOW
    if bound <= 0:
        return 0.0
    found = math.ldexp(bound, exponent)
    return found if found >= 2.0**-1000 else 0.0


def _frobenius(matrix):
    """Upper bound on the Frobenius norm of entries far from overflow."""
    return float(np.linalg.norm(matrix)) * (1 + 2 * gamma(matrix.size + 4)) + _UNDERFLOW
