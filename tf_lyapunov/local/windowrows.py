"""Rows of linearised maps behind units of one position, on the windows that the units see.

A row of the adjoint from a unit behind convolutions is zero outside the unit's window. Products
are made on windows alone, and entries brought to their places in the signal where a part of a
linearised map is wanted as a matrix.
"""

import numpy as np

from tf_lyapunov.local import maps
from tf_lyapunov.local.windows import Windowed, Windows, without_padding


def rows_behind(around, source, used):
    """`Rows` of units of a position, on windows where they are worth it.

    Args:
        around: `Around` whose steps before `source` are known.
        source: position.
        used: int (rows,), units of the flat sample.
    """
    windows = on_windows(around, source)
    return Rows(around, source, used) if windows is None else WindowRows(around, windows, used)


def on_windows(around, source):
    """`Windows` behind a position on which rows are worth it, or None."""
    windows = Windows(around.flow, around.trace, source)
    return windows if windows.applies and not windows.pools else None


class Rows:
    """Rows that hold whole signals.

    Args:
        around, source, used: see `rows_behind`.
    """

    def __init__(self, around, source, used):
        self.around, self.source, self.used = around, source, used

    def units(self):
        """Unit vectors, (rows, *shape)."""
        shape = self.around.trace.shape(self.source)
        found = np.zeros((len(self.used), int(np.prod(shape))), self.around.dtype)
        found[np.arange(len(self.used)), self.used] = 1.0
        return found.reshape(len(self.used), *shape)

    def scaled(self, k, c, factors):
        """Rows at position k times factors (n,) of its flat sample."""
        return c * factors.astype(c.dtype).reshape(c.shape[1:])

    def columns(self, k, c, factors=None):
        """Matrix (rows, n) of rows at position k, or of their products with nonzero factors."""
        flat = c.reshape(len(c), -1)
        if factors is None:
            return flat
        own = np.flatnonzero(factors)
        return flat[:, own] * factors[own].astype(c.dtype)

    def back(self, k, c):
        """Adjoint of the linear link that makes position k: list of rows, one entry per input."""
        link = self.around.flow.links[k - 1]
        return maps.adjoint(link.operation, c, self.around._shapes(link))


class WindowRows:
    """The same of rows that hold windows, of a chain of links.

    Args:
        around, used: see `rows_behind`.
        windows: `Windows` that apply, without pools.
    """

    def __init__(self, around, windows, used):
        self.around, self.windows = around, windows
        *self.places, self.channel = np.unravel_index(used, around.trace.shape(windows.source))
        self.known = {}

    def _at(self, k):
        """`(indices, mask)` of the cells of position k, (rows, *window) each."""
        if k not in self.known:
            shape = self.around.trace.shape(k)
            self.known[k] = self.windows.indices(k, self.places, shape)
        return self.known[k]

    def units(self):
        """Unit vectors, (rows, 1, …, channels)."""
        count, shape = len(self.channel), self.around.trace.shape(self.windows.source)
        found = np.zeros((count, shape[-1]), self.around.dtype)
        found[np.arange(count), self.channel] = 1.0
        return found.reshape(count, *[1] * (len(shape) - 1), shape[-1])

    def scaled(self, k, c, factors):
        """As of `Rows`; cells outside the signal are zero already."""
        return c * factors.astype(c.dtype).reshape(-1, c.shape[-1])[self._at(k)[0]]

    def columns(self, k, c, factors=None):
        """As of `Rows`."""
        index, inside = self._at(k)
        inside = np.broadcast_to(inside, index.shape)
        if factors is not None:
            c = self.scaled(k, c, factors)
        shape = self.around.trace.shape(k)
        found = np.zeros((len(c), int(np.prod(shape[:-1])), shape[-1]), c.dtype)
        row = np.arange(len(c)).reshape(-1, *[1] * (index.ndim - 1))
        # Cells outside share their indices with others.
        found[np.broadcast_to(row, index.shape)[inside], index[inside]] = c[inside]
        found = found.reshape(len(c), -1)
        return found if factors is None else found[:, np.flatnonzero(factors)]

    def back(self, k, c):
        """As of `Rows`."""
        operation = self.around.flow.links[k - 1].operation
        channels = self.around.trace.shape(k - 1)[-1]
        shape = (*(size for size, _, _ in self.windows.plans[k - 1]), channels)
        if k in self.windows.linears:
            mask = self._at(k - 1)[1][..., None].astype(c.dtype)
            operation = Windowed(without_padding(operation, shape), mask)
        return maps.adjoint(operation, c, [shape])
