"""Gram matrices of a convolution at every frequency, formed a part of the frequencies at a time.

The Gram symbol G(φ) = K̂(φ)*K̂(φ) of a kernel of t taps an axis is a trigonometric polynomial of
degree t - 1 in every angle φ. Its values at M = 2t - 1 angles an axis give all others,

    G(φ) = Σ_j w_j G(2πj/M),   w_j = Π_axes (1/M) Σ_{|k| < t} cos k(φ - 2πj/M),

which takes a fixed number of products an entry, where forming G takes as many as the kernel has
channels.
"""

import math

import numpy as np
from scipy.linalg import blas

from tf_lyapunov.theory.eigenvalues import (
    STACKED_SIDE,
    Grams,
    cholesky_error,
    forming_error,
    gamma,
    gram,
    largest_eigenvalue,
    largest_of_formed,
)
from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF
from tf_lyapunov.theory.symbols import Symbol, partners

# Symbols, and stacks of small matrices, are made in parts of this many entries.
ENTRIES = 2**21
# Entries of Gram matrices held at once, at most.
_HELD = 2**25
# Lanczos steps for the order in which matrices are looked at, of small and of larger ones: an
# eigenvalue that is computed in vain takes as much as so many steps of all.
_STEPS, _MORE_STEPS = 3, 4


def largest_of_symbol(symbol, tol=0.0):
    """`eigenvalues.largest_eigenvalue` of a symbol's Gram matrices at all frequencies.

    Args:
        symbol: `Symbol` of one group of channels.
        tol: float ≥ 0.

    Example:

    >>> from tf_lyapunov.theory.operators import LinearMap, as_convolution
    >>> kernel = np.random.default_rng(0).normal(size=(3, 3, 30, 40))
    >>> blocks, axes = as_convolution(kernel, LinearMap("conv", (20, 20, 30)))
    >>> t = largest_of_symbol(Symbol(blocks, axes, [21, 21]))
    >>> top = max(np.linalg.norm(np.fft.fft2(kernel, (21, 21), (0, 1)), 2, (2, 3)).ravel())
    >>> bool(1.0 <= t / top**2 < 1 + 1e-9)
    True
    """
    grams = gram_symbols(symbol)
    if grams.side > STACKED_SIDE:
        return largest_eigenvalue(grams, tol)
    t = 0.0
    for stack, traces, forming, order in grams.stacks():
        t = largest_of_formed(stack, traces, forming, order, t, tol)
    return t


def gram_symbols(symbol):
    """`Grams` of a symbol's only group at all its frequencies, in the cheaper of two ways.

    Args:
        symbol: `Symbol` of one group of channels.

    Example:

    >>> from tf_lyapunov.theory.eigenvalues import largest_eigenvalue
    >>> from tf_lyapunov.theory.operators import LinearMap, as_convolution
    >>> kernel = np.random.default_rng(0).normal(size=(3, 3, 30, 40))
    >>> blocks, axes = as_convolution(kernel, LinearMap("conv", (20, 20, 30)))
    >>> grams = gram_symbols(Symbol(blocks, axes, [21, 21]))
    >>> top = max(np.linalg.norm(np.fft.fft2(kernel, (21, 21), (0, 1)), 2, (2, 3)).ravel())
    >>> bool(1.0 <= largest_eigenvalue(grams) / top**2 < 1 + 1e-9)
    True
    """
    return (InterpolatedGrams if interpolates(symbol) else FormedGrams)(symbol)


def interpolates(symbol):
    """Whether combinations of few Gram matrices of a symbol take fewer products than all."""
    rows, side = symbol.shape
    count = len(symbol.frequencies)
    samples = math.prod(2 * a.taps - 1 for a in symbol.axes) // 2 + 1
    if symbol.aliases > 1 or 2 * samples * side**2 > _HELD:
        return False
    # Products an entry of G: those of the samples, and of their combinations; those of all.
    return samples * (rows + count) < 0.8 * count * rows


class _InParts(Grams):
    """Those of a part are held at once; within it those come first that seem largest."""

    def __init__(self, symbol):
        rows, self.side = symbol.shape
        self.symbol, self.count, self.terms = symbol, len(symbol.frequencies), rows
        self.part = max(1, ENTRIES // (rows * self.side))
        self.start, self.held = 0, None
        self.of_symbol = float(symbol.error()[0])

    @property
    def order(self):
        for chosen in self._parts():
            yield from chosen.tolist()

    def stacks(self):
        """Arguments of `eigenvalues.largest_of_formed`, a part of the frequencies at a time."""
        for chosen in self._parts():
            stack = np.empty((len(chosen), self.side, self.side), np.complex128)
            traces, forming = np.empty(len(chosen)), np.empty(len(chosen))
            for i in range(len(chosen)):
                triangle, traces[i], forming[i] = self.formed(self.start + i)
                stack[i] = triangle.T
            yield stack, traces, forming, chosen - self.start

    def _parts(self):
        for start in range(0, self.count, self.part):
            self.start, stop = start, min(start + self.part, self.count)
            self.held = self.made(start, stop)
            yield start + np.argsort(-self.estimates(self.held), kind="stable")


class FormedGrams(_InParts):
    """Gram matrices formed from the symbol's, one by one.

    Args:
        symbol: `Symbol` of one group.
    """

    def made(self, start, stop):
        return self.symbol.at(slice(start, stop))[:, 0]

    def estimates(self, stack):
        single = stack.astype(np.complex64)

        def multiply(v):
            image = single @ v[..., None]
            return np.conj(np.conj(image.swapaxes(1, 2)) @ single)[:, 0]

        return _ritz(multiply, len(stack), self.side, _MORE_STEPS)

    def factor(self, i):
        return self.held[i - self.start]

    def formed(self, i):
        """As `Grams.formed`, of the exact symbol: ‖ÂÂ* - AA*‖ ≤ 2‖Â‖·e + e² where ‖Â - A‖ ≤ e."""
        triangle, trace, forming = super().formed(i)
        return triangle, trace, forming + _of_symbol(self.of_symbol, trace)


class InterpolatedGrams(_InParts):
    """Gram matrices as combinations of those at 2t - 1 angles an axis.

    Args:
        symbol: `Symbol` of one group, without strides.
    """

    def __init__(self, symbol):
        super().__init__(symbol)
        self.part = max(1, ENTRIES // self.side**2)
        self.angles = [2 * a.taps - 1 for a in symbol.axes]
        samples = Symbol.of_angles(symbol, self.angles)
        kept, other = partners(self.angles)
        self.samples = np.empty((math.prod(self.angles), self.side**2), np.complex128)
        traces, errors = np.empty(len(kept)), np.empty(len(kept))
        part = max(1, ENTRIES // (self.terms * self.side))
        for start in range(0, len(kept), part):
            for i, a in enumerate(samples.at(slice(start, start + part))[:, 0], start):
                triangle, traces[i] = gram(a)
                errors[i] = forming_error(self.terms, traces[i], True)
                errors[i] += _of_symbol(self.of_symbol, traces[i])
                self.samples[kept[i]] = triangle.T.ravel()
                np.conj(self.samples[kept[i]], out=self.samples[other[i]])
        self.weights, self.reach = self._weights()
        self.error = self._error(traces.max(), errors.max())

    def made(self, start, stop):
        stack = np.empty((stop - start, self.side**2), np.complex128)
        # Weights are real: one product of real matrices.
        np.matmul(
            self.weights[start:stop], self.samples.view(np.float64), out=stack.view(np.float64)
        )
        return stack.reshape(-1, self.side, self.side)

    def estimates(self, stack):
        if self.side > STACKED_SIDE:
            return _ritz(lambda v: self._each(stack, v), len(stack), self.side, _MORE_STEPS)
        single = stack.astype(np.complex64)
        diagonals = np.diagonal(single, axis1=1, axis2=2)

        def multiply(v):
            above = (single @ v[..., None])[..., 0]
            return above + np.conj(np.conj(v[:, None]) @ single)[:, 0] - diagonals * v

        return _ritz(multiply, len(stack), self.side, _STEPS)

    def _each(self, stack, vectors):
        found = np.empty(vectors.shape, np.complex64)
        for i, v in enumerate(vectors):
            found[i] = blas.zhemv(1.0, stack[i].T, v, lower=1)
        return found

    def stacks(self):
        for chosen in self._parts():
            ones = np.ones(len(chosen))
            traces = np.trace(self.held, axis1=1, axis2=2).real + self.side * self.error
            if not np.isfinite(self.error):
                traces = math.inf * ones
            yield self.held, traces, self.error * ones, chosen - self.start

    def formed(self, i):
        """As `Grams.formed`.

        No eigenvalue is below -`error`: that much a row is added to the trace.
        """
        triangle = self.held[i - self.start].T
        trace = float(np.trace(triangle).real)
        if not np.isfinite(self.error):
            return triangle, math.inf, math.inf
        return triangle, trace + self.side * self.error, self.error

    def _weights(self):
        """w, (frequencies, angles), and the largest sum Σ|w_j|."""
        symbol, weights = self.symbol, np.ones((self.count, 1))
        for axis, period, angles, f in zip(
            symbol.axes, symbol.periods, self.angles, symbol.frequencies.T, strict=True
        ):
            # Turns of φ - 2πj/M, times period·M: whole numbers, reduced exactly.
            whole = period * angles
            turns = np.add.outer(f * (axis.dilation * angles), -period * np.arange(angles)) % whole
            own = np.ones((self.count, angles))
            for k in range(1, axis.taps):
                own += 2 * np.cos(2 * np.pi * ((k * turns % whole) / whole))
            weights = (weights[:, :, None] * (own / angles)[:, None, :]).reshape(self.count, -1)
        return weights, float(np.abs(weights).sum(axis=1).max()) * (1 + 1e-9) + 1e-9

    def _error(self, trace, error):
        """Bound on the norm of what any of the matrices errs by.

        With Λ = Σ|w_j|, ‖G_j‖_F ≤ trace: what the samples err by, Λ·error; weights, each a product
        of means of cosines that are off by 16u; and sums of products. What the last term adds is
        for factors: traces of sI - G may be above n·s, by n times this.
        """
        taps = sum(12 + a.taps for a in self.symbol.axes)
        weight = 2.2 * taps * UNIT_ROUNDOFF
        found = self.reach * error + math.prod(self.angles) * weight * trace
        found += 1.5 * gamma(len(self.samples) + 4) * self.reach * trace
        return 1.01 * found + 2 * cholesky_error(self.side, found, True)


def _of_symbol(error, trace):
    return 1.01 * (2 * math.sqrt(trace) * error + error * error)


def _ritz(multiply, count, side, steps):
    """Largest Ritz values of many Hermitian matrices after a few Lanczos steps; no bounds.

    Args:
        multiply: function of vectors `(count, side)`, complex64, to their images.
        count, side: of the matrices.
        steps: how many.
    """
    rng, tiny = np.random.default_rng(0), np.finfo(np.float32).tiny
    start = (rng.normal(size=side) + 1j * rng.normal(size=side)).astype(np.complex64)
    v = np.tile(start / np.linalg.norm(start), (count, 1))
    before, below = np.zeros_like(v), np.zeros((count, 1), np.float32)
    found = np.zeros((count, steps, steps))
    for k in range(steps):
        w = multiply(v)
        across = np.sum(np.conj(v) * w, axis=1, keepdims=True).real
        found[:, k, k] = across[:, 0]
        if k == steps - 1:
            break
        w = w - across * v - below * before
        below = np.linalg.norm(w, axis=1, keepdims=True)
        found[:, k + 1, k] = below[:, 0]
        before, v = v, w / np.maximum(below, tiny)
    if not np.all(np.isfinite(found)):
        return np.zeros(count)
    return np.linalg.eigvalsh(found)[:, -1]  # of the lower triangles
