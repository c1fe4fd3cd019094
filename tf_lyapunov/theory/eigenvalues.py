"""Largest eigenvalues of many positive semidefinite matrices from above, by Cholesky factors.

A finished Cholesky factorisation of sI - G is a proof that λ_max(G) ≤ s but for its rounding. It
takes n³/3 products, where eigenvalues take ten times as many, so eigenvalues are computed of the
few matrices that seem largest, and factors of all.
"""

import numpy as np
from scipy.linalg import blas, lapack

from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF

# Up to this side, stacks of matrices are factorised by one call, and eigenvalues are cheap.
SMALL_SIDE = 24
# Above this side Lanczos steps find the largest eigenvalue sooner than a full solver.
LANCZOS_SIDE = 160
# Up to this side many formed matrices are factorised by one call, of about so many entries: that
# much is done in vain where one of them fails.
STACKED_SIDE, _STACKED = 160, 2**17
# Residual of an eigenvector at which Lanczos ends, relative: the eigenvalue is off by its square.
_RITZ = 1e-8
# Sides from which a factor takes the place of the triangle that is not used, and rows of a strip.
_IN_PLACE, _STRIP = 2048, 256
# Relative margins tried above a computed eigenvalue until a factorisation proves one.
_MARGINS = (2.0**-42, 2.0**-30, 2.0**-20, 2.0**-14, 2.0**-10, 2.0**-6, 0.1, 0.5, 2.0, 8.0)


def gamma(terms):
    """γ_n = nu/(1 - nu) of float64."""
    return terms * UNIT_ROUNDOFF / (1 - terms * UNIT_ROUNDOFF)


def cholesky_error(side, shift, is_complex=False):
    """What a finished factorisation of sI - G, G ⪰ 0, leaves open: λ_max(G) ≤ s + this.

    The factors R satisfy R*R = sI - G + E with ‖E‖ ≤ γ/(1 - γ)·trace(sI - G) and trace ≤ n·s, where
    γ = γ_{n+1}, for complex entries with the roundoff 2√2u; the diagonal s - g_ii is rounded once
    more.

    Reference: Demmel (1989); Rump, "Verification of positive definiteness" (2006).
    """
    g = gamma((4 if is_complex else 1) * (side + 3))
    return 1.01 * (g / (1 - g) * side + 4 * UNIT_ROUNDOFF) * shift + side * side * 1e-300


class Grams:
    """A sequence of Gram matrices G = A*A whose largest eigenvalues are to be bounded together.

    Args:
        count: their number.
        factor: function of an index to A, `(terms, side)`, float64 or complex128.
        terms: products per entry of G, for the rounding of forming it: γ·trace(G).
        order: indices in the order in which to look at them; the largest first saves work.
    """

    def __init__(self, count, factor, terms, order=None):
        self.count, self.factor, self.terms = count, factor, terms
        self.order = range(count) if order is None else order

    def formed(self, i):
        """One of them.

        Args:
            i: index.

        Returns:
            `(triangle, trace, forming)`: `(n, n)` in Fortran order, whose lower triangle is that of
            G or its conjugate; a bound on the trace but for its rounding; and on the norm of what
            the triangle errs by.
        """
        a = self.factor(i)
        triangle, trace = gram(a)
        return triangle, trace, forming_error(self.terms, trace, np.iscomplexobj(a))


def largest_eigenvalue(grams, tol=0.0):
    """Upper bound on max_i λ_max(A_i* A_i), above it by rounding and by `tol` relatively.

    The first matrix gets an eigenvalue λ, and a factorisation of tI - G with t a little above it;
    every other one needs but the factorisation, and raises t by an eigenvalue of its own if that
    fails.

    Args:
        grams: `Grams`.
        tol: float ≥ 0, relative: what the bound may exceed the largest eigenvalue by, in exchange
            for fewer eigenvalues.

    Returns:
        float, proved.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> stack = rng.normal(size=(3, 40, 30))
    >>> t = largest_eigenvalue(Grams(3, stack.__getitem__, 40))
    >>> bool(1.0 <= t / max(np.linalg.norm(a, 2) ** 2 for a in stack) < 1 + 1e-11)
    True
    """
    t = 0.0
    for i in grams.order:
        triangle, trace, forming = grams.formed(i)
        if not trace < np.inf:  # NaN either: nothing is known
            return np.inf
        if trace * (1 + 1e-10) + forming <= t or is_below(triangle, t, forming):
            continue
        t = max(t, _proved(triangle, trace, forming, tol))
    return t


def _proved(triangle, trace, forming, tol):
    """A t that a factorisation proves, from an eigenvalue that is no proof."""
    side, is_complex = len(triangle), np.iscomplexobj(triangle)
    top = _top(triangle)
    for margin in _MARGINS:
        t = top * (1 + max(margin, tol))
        t += 1.1 * (forming + cholesky_error(side, t, is_complex))
        if is_below(triangle, t, forming):
            return t
    return trace * (1 + gamma(side + 4)) + forming


def is_below(triangle, t, forming=0.0):
    """Whether λ_max ≤ t is proved of a matrix within `forming` (in norm) of a computed G.

    Args:
        triangle: `(n, n)`, Fortran order; its lower triangle is G's. Of large ones the other
            triangle is written to, and nothing else is left changed.
        t: float.
        forming: float.
    """
    side, is_complex = len(triangle), np.iscomplexobj(triangle)
    shift = t * (1 - 8 * UNIT_ROUNDOFF) - forming
    shift -= cholesky_error(side, max(shift, 0.0), is_complex)
    diagonal = np.diagonal(triangle).real.copy()
    if not shift > 0 or not np.all(diagonal < shift):
        return False
    solve = lapack.zpotrf if is_complex else lapack.dpotrf
    lower = is_complex or side < _IN_PLACE
    matrix = -triangle if lower else _mirrored(triangle)
    places = np.diag_indices(side)
    matrix[places] = shift - diagonal
    factor, info = solve(matrix, lower=int(lower), overwrite_a=1, clean=0)
    proved = info == 0 and bool(np.all(np.isfinite(np.diagonal(factor))))
    if not lower:
        triangle[places] = diagonal
    return proved


def largest_of_formed(stack, traces, forming, order, t=0.0, tol=0.0):
    """`largest_eigenvalue` of matrices that are formed already, many factorised by one call.

    Args:
        stack: `(count, n, n)` in C order, whose upper triangles are those of G or its conjugate.
        traces: `(count,)`, bounds on traces but for their rounding.
        forming: `(count,)`, bounds on the norm of what the triangles err by.
        order: indices in the order in which to look at them.
        t: float, proved of others: the result is at least this.
        tol: as for `largest_eigenvalue`.

    Example:

    >>> stack = np.stack([np.diag([1.0, 2.0]), np.diag([4.0, 3.0])])
    >>> t = largest_of_formed(stack, np.array([3.0, 7.0]), np.zeros(2), [0, 1])
    >>> 4.0 <= t < 4.0 + 1e-10
    True
    """
    if not np.all(traces < np.inf):  # NaN either: nothing is known
        return np.inf
    size = max(1, _STACKED // stack.shape[-1] ** 2)
    for start in range(0, len(order), size):
        t = _raised(stack, traces, forming, order[start : start + size], t, tol)
    return t


def _raised(stack, traces, forming, chosen, t, tol):
    if _are_below(stack[chosen], t, forming[chosen]):
        return t
    if len(chosen) == 1:
        (i,) = chosen
        return max(t, _proved(stack[i].T, float(traces[i]), float(forming[i]), tol))
    half = len(chosen) // 2
    t = _raised(stack, traces, forming, chosen[:half], t, tol)
    return _raised(stack, traces, forming, chosen[half:], t, tol)


def _are_below(stack, t, forming):
    """`is_below` of all matrices of a stack, which is written to: their upper triangles are G's."""
    side, is_complex = stack.shape[-1], np.iscomplexobj(stack)
    shifts = t * (1 - 8 * UNIT_ROUNDOFF) - forming
    shifts -= cholesky_error(side, np.maximum(shifts, 0.0), is_complex)
    diagonals = np.diagonal(stack, axis1=1, axis2=2).real.copy()
    if not np.all(shifts > 0) or not np.all(diagonals < shifts[:, None]):
        return False
    matrices = np.negative(stack, out=stack)
    places = np.arange(side)
    matrices[:, places, places] = shifts[:, None] - diagonals
    try:
        factors = np.linalg.cholesky(matrices.swapaxes(1, 2))  # it reads the lower triangles
    except np.linalg.LinAlgError:
        return False
    return bool(np.all(np.isfinite(np.diagonal(factors, axis1=1, axis2=2))))


def _mirrored(triangle):
    """The same array, with minus the lower triangle in the upper one: no copy is made."""
    side = len(triangle)
    for start in range(0, side, _STRIP):
        stop = min(start + _STRIP, side)
        triangle[:start, start:stop] = -triangle[start:stop, :start].T
        corner = triangle[start:stop, start:stop]
        corner[...] = np.tril(corner) - np.tril(corner, -1).T
    return triangle


def forming_error(terms, trace, is_complex=False):
    """What forming a Gram matrix of this trace by sums of so many products errs by, in norm."""
    return gamma((4 if is_complex else 1) * (terms + 2)) * 1.01 * trace


def gram(a):
    """Lower triangle of A*A (or its conjugate) in Fortran order, and its trace."""
    a = np.ascontiguousarray(a)
    # A C-ordered matrix is its transpose in Fortran order: no copy is made.
    triangle = (blas.zherk if np.iscomplexobj(a) else blas.dsyrk)(1.0, a.T, lower=1)
    return triangle, float(np.trace(triangle).real)


def _top(triangle):
    """The largest eigenvalue, as computed: it steers and proves nothing."""
    side = len(triangle)
    if side <= LANCZOS_SIDE:
        return max(float(np.linalg.eigvalsh(triangle)[-1]), 0.0)
    from scipy.sparse.linalg import LinearOperator

    # Half of the bytes of A, or fewer, and one pass for A*A.
    multiply = blas.zhemv if np.iscomplexobj(triangle) else blas.dsymv

    def apply(v):
        return multiply(1.0, triangle, v.ravel(), lower=1)

    start = np.random.default_rng(0).normal(size=side).astype(triangle.dtype)
    operator = LinearOperator((side, side), matvec=apply, dtype=triangle.dtype)
    return _lanczos(operator, start, lambda: apply(start))


def largest_of_stack(stack, terms, tol=0.0):
    """`largest_eigenvalue` of the Gram matrices of a stack of small matrices, a few calls for all.

    Args:
        stack: `(count, terms, side)`, float64 or complex128.
        terms: products per entry of the Gram matrices.
        tol: as for `largest_eigenvalue`.

    Example:

    >>> stack = np.random.default_rng(0).normal(size=(3, 4, 3))
    >>> t = largest_of_stack(stack, 4)
    >>> bool(1.0 <= t / max(np.linalg.norm(a, 2) ** 2 for a in stack) < 1 + 1e-11)
    True
    """
    side, is_complex = stack.shape[-1], np.iscomplexobj(stack)
    if side == 1:
        squares = np.sum(stack.real**2 + stack.imag**2, axis=(1, 2))
        return float(squares.max()) * (1 + gamma(stack.shape[1] + 4))
    grams = np.conj(stack.swapaxes(-1, -2)) @ stack
    trace = float(np.trace(grams, axis1=-2, axis2=-1).real.max())
    forming = forming_error(terms, trace, is_complex)
    if not trace < np.inf:
        return np.inf
    top = float(np.linalg.eigvalsh(grams)[:, -1].max())
    for margin in _MARGINS:
        t = top * (1 + max(margin, tol))
        t += 1.1 * (forming + cholesky_error(side, t, is_complex))
        shift = t * (1 - 8 * UNIT_ROUNDOFF) - forming
        shift -= cholesky_error(side, shift, is_complex)
        try:
            factors = np.linalg.cholesky(shift * np.eye(side) - grams)
        except np.linalg.LinAlgError:
            continue
        if np.all(np.isfinite(factors)):
            return t
    return trace * (1 + gamma(side + 4)) + forming


def largest_banded(gram, terms, tol=0.0):
    """`largest_eigenvalue` of one sparse, real Gram matrix, by factors of its band.

    Args:
        gram: sparse `(n, n)`.
        terms: products per entry, at most.
        tol: as for `largest_eigenvalue`.

    Example:

    >>> import scipy.sparse
    >>> line = scipy.sparse.diags([1.0, 1.0], [0, 1], shape=(50, 50)).tocsr()
    >>> t = largest_banded((line.T @ line).tocsr(), 2)
    >>> bool(1.0 <= t / np.linalg.norm(line.toarray(), 2) ** 2 < 1 + 1e-11)
    True
    """
    entries = gram.tocoo()
    side = gram.shape[0]
    below = entries.row >= entries.col
    rows, columns, values = entries.row[below], entries.col[below], entries.data[below]
    width = int(np.max(rows - columns, initial=0))
    if width > side // 2:
        triangle = np.zeros((side, side), order="F")
        triangle[rows, columns] = values
        check = is_below
    else:
        triangle = np.zeros((width + 1, side), order="F")
        triangle[rows - columns, columns] = values
        check = _band_is_below
    trace = float(gram.diagonal().sum())
    forming = forming_error(terms, trace)
    top = _sparse_top(gram)
    for margin in _MARGINS:
        t = top * (1 + max(margin, tol))
        t += 1.1 * (forming + cholesky_error(side, t))
        if check(triangle, t, forming):
            return t
    return trace * (1 + gamma(side + 4)) + forming


def _band_is_below(band, t, forming):
    """`is_below` of a matrix in LAPACK's lower band storage."""
    side = band.shape[1]
    shift = t * (1 - 8 * UNIT_ROUNDOFF) - forming
    shift -= cholesky_error(side, max(shift, 0.0))
    if not shift > 0 or not np.all(band[0] < shift):
        return False
    matrix = -band
    matrix[0] = shift - band[0]
    factor, info = lapack.dpbtrf(matrix, lower=1, overwrite_ab=1)
    return info == 0 and bool(np.all(np.isfinite(factor[0])))


def _sparse_top(gram):
    start = np.random.default_rng(0).normal(size=gram.shape[0])
    return _lanczos(gram, start, lambda: gram @ start)


def _lanczos(operator, start, image):
    """The largest eigenvalue as found by a limited number of restarts; no proof."""
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh

    options = {"k": 1, "v0": start, "return_eigenvectors": False, "maxiter": 100}
    options["ncv"], options["tol"] = min(32, len(start)), _RITZ
    try:
        return max(float(eigsh(operator, **options)[0].real), 0.0)
    except ArpackNoConvergence as stopped:
        if len(stopped.eigenvalues):
            return max(float(stopped.eigenvalues[0].real), 0.0)
    except ArpackError:
        pass
    # A Rayleigh quotient: the margins tried above it make up for what it lacks.
    return max(float(np.vdot(start, image()).real / np.vdot(start, start).real), 0.0)
