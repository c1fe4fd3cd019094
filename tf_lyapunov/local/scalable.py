"""Norms of one matrix under many weights of its rows."""

import functools
import math

import numpy as np
import scipy.sparse

from tf_lyapunov.program import rounding
from tf_lyapunov.theory.eigenvalues import Grams, forming_error, gram, largest_eigenvalue

UNIT = rounding.UNIT_ROUNDOFF["float64"]
# What a norm may exceed the computed one by, which spares factorisations that just fail.
_TOLERANCE = 1e-6
_FIRST, _LATER = 24, 6
# Share of nonzero entries up to which products of sparse matrices are faster.
_SPARSE = 0.05


class Scalable:
    """Bounds on ‖diag(d)·A‖ for any d ≥ 0.

    Of a wide A the Gram matrix AAᵀ is formed once, and DAAᵀD from it for every d: two products more
    per entry.

    Args:
        matrix: A, float32 or float64 (rows, columns).
    """

    def __init__(self, matrix):
        self.matrix, self.gram = matrix, None

    @functools.cached_property
    def size(self):
        """‖A‖_F from above."""
        return float(rounding.euclidean_norms_up(self.matrix.reshape(1, -1))[0])

    @functools.cached_property
    def is_sparse(self):
        """Whether Gram matrices are cheaper from the nonzero entries alone."""
        return np.count_nonzero(self.matrix) <= _SPARSE * self.matrix.size

    def norm(self, at, d):
        """Upper bound on the spectral norm, its square proved by a Cholesky factor.

        Args:
            at: int, rows that are used, in ascending order; the others count as zero.
            d: float64 (len(at),).
        """
        if len(at) > self.matrix.shape[1]:
            rows = self.matrix if len(at) == len(self.matrix) else self.matrix[at]
            return spectral_norm(d[:, None] * rows, self.is_sparse)
        largest = float(np.max(np.abs(self.matrix), initial=0.0))
        high = float(np.max(d, initial=0.0))
        if not (0 < largest < np.inf and 0 < high < np.inf):
            return largest * high
        # Squares neither over- nor underflow; powers of two are exact.
        scale, power = (2.0 ** math.floor(math.log2(v)) for v in (largest, high))
        if self.gram is None:
            self.gram, _ = gram(np.asarray(self.matrix, np.float64).T / scale)
        d = d / power
        triangle = np.asfortranarray(self.gram[np.ix_(at, at)])
        triangle *= d[:, None]
        triangle *= d
        found = largest_eigenvalue(_Formed(triangle, self.matrix.shape[1] + 4), _TOLERANCE)
        return math.sqrt(found) * (1 + 8 * UNIT) * scale * power

    def estimate(self, at, d, vector=None):
        """`(norm, vector)` by power iteration from an earlier one, a little enlarged: a guess."""
        matrix, steps = self.matrix, _LATER
        if len(at) < len(matrix):
            matrix = matrix[at]
        d = d.astype(matrix.dtype)
        if vector is None or len(vector) != matrix.shape[1]:
            steps = _FIRST
            vector = matrix[np.argmax(d * d * np.einsum("ij,ij->i", matrix, matrix))]
        size = 0.0
        for _ in range(steps):
            norm = float(np.linalg.norm(vector))
            if norm == 0:
                break
            image = d * (matrix @ (vector / norm))
            size = float(np.linalg.norm(image))
            vector = (d * image) @ matrix
        return size * 1.008, vector


class _Formed(Grams):
    """One Gram matrix that is there already.

    Args:
        triangle: float64 (n, n), Fortran order, of which the lower triangle counts.
        terms: products per entry.
    """

    def __init__(self, triangle, terms):
        super().__init__(1, None, terms)
        self.triangle = triangle

    def formed(self, i):
        """As of `Grams`."""
        trace = float(np.trace(self.triangle))
        return self.triangle, trace, forming_error(self.terms, trace)


def spectral_norm(matrix, is_sparse=False):
    """Upper bound on ‖A‖₂, its largest eigenvalue proved by a Cholesky factor.

    Args:
        matrix: A, (rows, columns).
        is_sparse: whether A*A is formed from the nonzero entries of a tall A: the same sums.
    """
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if not 0 < largest < np.inf:
        return largest
    # Squares neither over- nor underflow; a power of two is exact, but for what counts for nothing.
    scale = 2.0 ** math.floor(math.log2(largest))
    a = np.asarray(matrix, np.float64) / scale
    a = a if len(a) >= a.shape[1] else a.T
    if is_sparse:
        entries = scipy.sparse.csr_array(a)
        grams = _Formed((entries.T @ entries).toarray(order="F"), len(a))
    else:
        grams = Grams(1, lambda i: a, len(a))
    found = largest_eigenvalue(grams, _TOLERANCE)
    return math.sqrt(found) * (1 + 8 * UNIT) * scale
