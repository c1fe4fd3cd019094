"""Maxima over windows between boxes.

For y = max_i z_i over the cells of a window, l ≤ z ≤ u:

- y ≥ z_k for every cell k; the one largest amid the box is taken;
- with j the cell of the largest u, v the largest u of the other cells, and any α ≥ 0,

      y ≤ α z_j + b,   b = max{ (1 - α)·(u_j if α ≤ 1 else l_j), v - α l_j }.               (M)

Proof of (M). Either y = z_j, and y - α z_j = (1 - α) z_j is at most the first, or y = z_i ≤ v for
another cell, and y - α z_j ≤ v - α l_j. The two meet at α = (u_j - v)/(u_j - l_j), the start; α is
searched as other multipliers are. A cell whose u lies below another's l is never the largest: with
one cell left the maximum is that cell, exactly.
"""

import functools
import math

import numpy as np

from tf_lyapunov.local.relaxation import Multipliers
from tf_lyapunov.program.families import pooling as geometry
from tf_lyapunov.program.families.pooling import Pooled


class WindowMaximum:
    """(M) of a max pooling step around one point; has the methods of `relaxation.Elementwise`.

    Args:
        operation: `Pooled` of kind `"max"`.
        center: (1, *shape), z⁰ as computed.
        low, high: (1, *shape), the box of z.
    """

    def __init__(self, operation, center, low, high):
        self.shape, self.dtype = center.shape[1:], center.dtype
        self.radius = np.inf
        cells, out = windows_of(operation, self.shape)
        self.out = out
        exists = cells >= 0
        low, high = low.ravel(), high.ravel()
        bottom = np.where(exists, low[cells], -np.inf)
        top = np.where(exists, high[cells], -np.inf)
        self.floor, self.ceiling = bottom.max(axis=1), top.max(axis=1)
        active = exists & (top > self.floor[:, None])
        # The cell of the largest l stays, even if its box is that number alone.
        active[np.arange(len(cells)), np.argmax(bottom, axis=1)] = True
        rows = np.arange(len(cells))
        first = np.argmax(np.where(active, top, -np.inf), axis=1)
        others = active.copy()
        others[rows, first] = False
        self.columns = np.flatnonzero(others.any(axis=1))
        middle = np.where(active, (bottom + top) / 2, -np.inf)
        self.below = cells[rows, np.argmax(middle, axis=1)]
        self.above = cells[rows, first]
        self.second = np.where(others, top, -np.inf).max(axis=1)
        self.low, self.high = low[self.above], high[self.above]
        width = np.maximum(self.high - self.low, 1e-30)
        gap = np.where(np.isfinite(self.second), self.high - self.second, width)
        self.alpha = np.clip(gap / width, 0.0, 1.0).astype(self.dtype)
        single = np.ones(len(cells), bool)
        single[self.columns] = False
        self.alpha[single] = 1.0
        self.single = single
        self.overlaps = len(np.unique(self.above)) < len(cells) or len(np.unique(self.below)) < len(
            cells
        )
        size = np.maximum(np.abs(low), np.abs(high))
        self.largest_z = size
        self.largest_value = np.where(exists, size[cells], 0.0).max(axis=1) * 3

    def range(self):
        """Bounds on the maximum over the box."""
        return self.floor.reshape(self.out), self.ceiling.reshape(self.out)

    def start(self, c):
        """`Multipliers` at the α where both parts of (M) meet."""
        share = np.repeat(self.alpha[None, self.columns], len(c), axis=0)
        return Multipliers(share, np.full(len(c), -np.inf, c.dtype), self.columns)

    blank = start

    def _alpha(self, multipliers):
        alpha = np.repeat(self.alpha[None], len(multipliers.share), axis=0)
        alpha[:, self.columns] = np.maximum(multipliers.share, 0.0)
        return alpha

    def _offset(self, alpha):
        """b of (M), and its derivative by α."""
        end = np.where(alpha <= 1, self.high, self.low)
        own, other = (1 - alpha) * end, self.second - alpha * self.low
        own, other = np.where(self.single, 0.0, own), np.where(self.single, 0.0, other)
        slope = np.where(own >= other, -end, -self.low)
        return np.maximum(own, other), slope

    def backward(self, c, multipliers, record=True):
        """`(g, h, memory)`, see `Elementwise.backward`."""
        flat = c.reshape(len(c), -1)
        plus, minus = np.maximum(flat, 0), np.minimum(flat, 0)
        alpha = self._alpha(multipliers)
        offset, slope = self._offset(alpha)
        g = np.zeros((len(c), math.prod(self.shape)), c.dtype)
        parts = ((self.below, plus), (self.above, alpha * minus))
        for cells, part in parts:
            if self.overlaps:
                np.add.at(g.T, cells, part.T)
            else:
                g[:, cells] += part
        h = np.sum(minus * offset, axis=1).astype(c.dtype)
        memory = (flat > 0, minus, alpha, offset, slope) if record else None
        return g.reshape(len(c), *self.shape), h, memory

    def slack(self, c, g, multipliers):
        """What `backward` summed up, in size, per row."""
        flat, own = np.abs(c.reshape(len(c), -1)), np.abs(g.reshape(len(g), -1))
        alpha = 1 + self._alpha(multipliers)
        return 4 * np.sum(flat * alpha * self.largest_value, axis=1) + 4 * (own @ self.largest_z)

    def forward(self, y, memory):
        """`(by_c, by_share, by_log_lam)`, see `Elementwise.forward`."""
        positive, minus, alpha, offset, slope = memory
        flat = np.broadcast_to(y.reshape(len(y), -1), (len(minus), math.prod(self.shape)))
        upper = flat[:, self.above]
        by_c = np.where(positive, flat[:, self.below], alpha * upper + offset)
        by_share = (minus * (upper + slope))[:, self.columns]
        return by_c.reshape(len(minus), *self.out), by_share, np.zeros(len(minus))


def windows_of(operation, shape):
    """Cells of every window of a max pooling of samples of this shape.

    Returns:
        `(cells, output shape)`: flat input indices (outputs, cells), -1 beyond the edge.

    Example:

    >>> pool = Pooled("max", (2,), (2,), "same", False)
    >>> windows_of(pool, (3, 1))[0].tolist()
    [[0, 1], [2, -1]]
    """
    return _windows(operation, tuple(shape))


@functools.lru_cache(maxsize=64)
def _windows(operation, shape):
    first = operation.channels_first
    spatial, channels = (shape[1:], shape[0]) if first else (shape[:-1], shape[-1])
    rank = len(spatial)
    axes = [
        np.arange(n)[None]
        if operation.sizes is None
        else geometry._cells(n, operation.sizes[a], operation.strides[a], operation.padding)
        for a, n in enumerate(spatial)
    ]
    index, inside = 0, True
    for a, (cells, n) in enumerate(zip(axes, spatial, strict=True)):
        form = [1] * (2 * rank)
        form[a], form[rank + a] = cells.shape
        cells = cells.reshape(form)
        index = index * n + np.clip(cells, 0, n - 1)
        inside = inside & (cells >= 0) & (cells < n)
    counts = [len(cells) for cells in axes]
    index = np.where(inside, index, -1).reshape(math.prod(counts), -1)
    channel = np.arange(channels)
    if first:
        flat = index[None] + channel[:, None, None] * math.prod(spatial)
        flat = np.where(index[None] >= 0, flat, -1)
        out = (channels, *counts)
    else:
        flat = index[:, None] * channels + channel[:, None]
        flat = np.where(index[:, None] >= 0, flat, -1)
        out = (*counts, channels)
    if operation.sizes is None and not operation.keepdims:
        out = (channels,)
    return flat.reshape(-1, index.shape[1]), out


def is_window_maximum(operation):
    """Whether `WindowMaximum` applies."""
    return isinstance(operation, Pooled) and operation.kind == "max"
