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

from tf_lyapunov.theory.eigenvalues import Grams, cholesky_error, forming_error, gamma, gram
from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF
from tf_lyapunov.theory.symbols import Symbol, partners

# Symbols, and stacks of small matrices, are made in parts of this many entries.
ENTRIES = 2**21
# Entries of Gram matrices held at once, at most.
_HELD = 2**25
# Power steps for the order in which matrices are looked at.
_STEPS = 2


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
        for start in range(0, self.count, self.part):
            self.start, stop = start, min(start + self.part, self.count)
            self.held = self.made(start, stop)
            order = np.argsort(-self.estimates(self.held), kind="stable")
            yield from (self.start + order).tolist()


class FormedGrams(_InParts):
    """Gram matrices formed from the symbol's, one by one.

    Args:
        symbol: `Symbol` of one group.
    """

    def made(self, start, stop):
        return self.symbol.at(slice(start, stop))[:, 0]

    def estimates(self, stack):
        return _estimates(stack)

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
        """‖G v‖ after a few power steps; for their order alone."""
        found = np.empty(len(stack))
        for i, rows in enumerate(stack):
            v = np.ones(self.side, np.complex128)
            v[::2] *= 1.25  # off any symmetry of the all-ones vector
            for _ in range(_STEPS):
                v = blas.zhemv(1.0, rows.T, v / np.linalg.norm(v), lower=1)
                if not np.any(v):
                    break
            found[i] = np.linalg.norm(v)
        return found

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


def _estimates(stack):
    """‖A v‖ after a few power steps for every matrix of a stack; for their order alone."""
    v = np.ones((len(stack), stack.shape[2], 1)) / math.sqrt(stack.shape[2]) + 0j
    v[:, ::2] *= 1.25  # off any symmetry of the all-ones vector
    adjoint = np.conj(stack.swapaxes(-1, -2))
    tiny = np.finfo(float).tiny
    for _ in range(_STEPS):
        v = adjoint @ (stack @ v)
        v /= np.maximum(np.linalg.norm(v, axis=1, keepdims=True), tiny)
    return np.linalg.norm(stack @ v, axis=(1, 2))
