"""Symbols of convolutions: the matrices that act at each frequency of a circulant."""

import dataclasses
import itertools
import math

import numpy as np

from tf_lyapunov.theory.rounding import UNIT_ROUNDOFF

# Points per degree of a Gram symbol beyond which more frequencies gain less than 5e-5.
FINE = 50
# Entries of a symbol that are made at once.
_CACHED = 2**16


class Symbol:
    """The symbol (1/√s)·[K̂(f), K̂(f + N/s), …] of groups of channels, frequency by frequency.

    A real kernel's symbol at -f is the conjugate of that at f: of each pair one is kept.

    Args:
        blocks: `(groups, *taps, in, out)` float64.
        axes: one `Axis` per spatial axis.
        periods: N of every axis, a multiple of its stride.
    """

    def __init__(self, blocks, axes, periods):
        self.groups, (self.ci, self.co) = len(blocks), blocks.shape[-2:]
        self.kernels = blocks.reshape(self.groups, -1, self.ci * self.co)
        self.axes, self.periods = axes, periods
        self.grid = [n // a.stride for n, a in zip(periods, axes, strict=True)]
        self.strides = [a.stride for a in axes]
        self.aliases = math.prod(self.strides)
        self.frequencies = halved(self.grid)
        steps = [range(a.taps) for a in axes]
        self.offsets = np.array(list(itertools.product(*steps))) * [a.dilation for a in axes]

    @classmethod
    def of_angles(cls, symbol, counts):
        """A symbol's matrices at the angles 2πj/counts, where nothing is strided."""
        axes = [dataclasses.replace(a, dilation=1) for a in symbol.axes]
        blocks = symbol.kernels.reshape(
            symbol.groups, *(a.taps for a in axes), symbol.ci, symbol.co
        )
        return cls(blocks, axes, counts)

    @property
    def shape(self):
        """Rows and columns of the matrix at a frequency, columns being the fewer."""
        wide = self.aliases * self.ci
        return (wide, self.co) if wide >= self.co else (self.co, wide)

    def at(self, chosen):
        """Matrices `(len(chosen), groups, rows, columns)` at the chosen frequencies, complex128."""
        f = self.frequencies[chosen]
        shifts = itertools.product(*(range(s) for s in self.strides))
        moved = [f + np.array(j, dtype=int) * self.grid for j in shifts]
        waves = np.stack([_waves(m, self.offsets, self.periods) for m in moved], axis=1)
        flat = np.moveaxis(self.kernels, 0, 1).reshape(len(self.offsets), -1)
        symbol = np.empty((waves.shape[0] * self.aliases, flat.shape[1]), np.complex128)
        phases = waves.reshape(-1, len(self.offsets))
        # What is copied between real and complex numbers stays in the cache.
        step = max(1, _CACHED // len(phases))
        for start in range(0, flat.shape[1], step):
            part, place = flat[:, start : start + step], np.s_[:, start : start + step]
            symbol.real[place], symbol.imag[place] = phases.real @ part, phases.imag @ part
        if self.aliases > 1:
            symbol /= math.sqrt(self.aliases)
        symbol = symbol.reshape(len(f), self.aliases, self.groups, self.ci, self.co)
        symbol = symbol.swapaxes(1, 2).reshape(len(f), self.groups, -1, self.co)
        if self.aliases * self.ci < self.co:
            symbol = np.conj(symbol.swapaxes(-1, -2))
        return symbol

    def error(self):
        """Bound `(groups,)` on the Frobenius norm of what `at` errs by, at any frequency.

        A phase errs by less than 16u, a sum over taps by γ; entries sum up by Cauchy-Schwarz.
        """
        taps = len(self.offsets)
        norms = np.linalg.norm(self.kernels, axis=(1, 2))
        return 8 * (taps + 4) * math.sqrt(taps) * UNIT_ROUNDOFF * norms


def _waves(frequencies, offsets, periods):
    """exp(-2πi Σ f·d/N), the angle of every axis reduced exactly."""
    total = 1.0
    for axis, n in enumerate(periods):
        turns = np.outer(frequencies[:, axis], offsets[:, axis]) % n
        total = total * np.exp(-2j * np.pi * (turns / n))
    return total


def halved(grid):
    """One of every pair f, -f (modulo the grid), shape (count, axes)."""
    kept, _ = partners(grid)
    return np.stack(np.unravel_index(kept, grid), -1)


def partners(grid):
    """Ranks of the frequencies f that `halved` keeps, and of -f."""
    index = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)
    other = np.ravel_multi_index(tuple((-index % grid).T), grid)
    kept = np.flatnonzero(np.arange(len(index)) <= other)
    return kept, other[kept]


def sampled(axes, density=16):
    """Axes and periods of a grid that serves every size, and by what its largest norm may be short.

    A trigonometric polynomial of degree D that is at most 1, with equality at t₀, stays above
    cos(D(t - t₀)) up to π/D away (Riesz). Applied to 2f/max f - 1, f ≥ 0 the Gram symbol, with the
    next of N points at most π/N away: max f ≤ f(nearest)/cos²(πD/2N), axis by axis, and σ = √f.

    Args:
        axes: one `Axis` per spatial axis.
        density: points per degree; 16 cost 0.5% an axis.

    Returns:
        `(axes, periods, inflation)`.
    """
    # Without a stride, dilation only reorders the frequencies.
    axes = [a if a.stride > 1 else dataclasses.replace(a, dilation=1) for a in axes]
    degrees = [(a.extent - 1) // a.stride for a in axes]
    grid = [max(density * degree, 1) for degree in degrees]
    periods = [a.stride * n for a, n in zip(axes, grid, strict=True)]
    cosines = [math.cos(math.pi * D / (2 * n)) for D, n in zip(degrees, grid, strict=True)]
    return axes, periods, 1 / math.prod(cosines)


def circulant(axes):
    """Axes and periods of the circulant whose compression the zero-padded map is.

    An axis longer than `FINE` points per degree of its Gram symbol is sampled by those points.

    Returns:
        `(axes, periods, inflation)` as for `sampled`.
    """
    found = []
    for axis in axes:
        (other,), (period,), inflation = sampled([axis], FINE)
        short = axis.period <= period
        found.append((axis, axis.period, 1.0) if short else (other, period, inflation))
    kept, periods, inflations = zip(*found, strict=True)
    return list(kept), list(periods), math.prod(inflations)
