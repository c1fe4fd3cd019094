"""The time that a search for bounds may take: what is left of it, and whether a step fits.

Factorisations cannot be cut short. Before one begins, its flops are set against the rate that this
machine reaches now, other programs on it included.
"""

import math
import time

import numpy as np

# Side of the product of matrices that measures the rate, and flops of steps that always fit.
_SIDE, _SMALL = 256, 1e8
# Flops per second where nothing was measured.
_RATE = 1e10


class Budget:
    """Seconds since it was made, and how many of them are left.

    Args:
        seconds: positive number, possibly infinite; None for no limit.

    Example:

    >>> Budget(60.0).fits(1e3), Budget(1e-6).fits(1e15)
    (True, False)
    """

    def __init__(self, seconds=None):
        self.seconds = math.inf if seconds is None else float(seconds)
        self.deadline = time.monotonic() + self.seconds
        self._rate = None

    def left(self):
        """Seconds that are left, 0 if none are."""
        return max(self.deadline - time.monotonic(), 0.0)

    def is_up(self):
        """Whether none are left."""
        return self.left() <= 0.0

    def part(self, share):
        """A `Budget` of a share of what is left."""
        found = Budget(share * self.left())
        found._rate = self._rate
        return found

    def fits(self, flops):
        """Whether a step of so many flops, at the rate of products of matrices, ends in time.

        What takes milliseconds always fits.
        """
        if self.seconds == math.inf or flops <= _SMALL:
            return True
        left = self.left()
        if left <= 0.0:
            return False
        if self._rate is None:
            self._rate = measured_rate()
        return flops <= self._rate * left


def measured_rate():
    """Flops per second of a product of two float64 matrices, as it is now."""
    matrix = np.full((_SIDE, _SIDE), 1.0 / _SIDE)
    matrix @ matrix  # wakes the library up
    begin = time.perf_counter()
    matrix @ matrix
    seconds = time.perf_counter() - begin
    return 2.0 * _SIDE**3 / seconds if seconds > 0 else _RATE


def proof_flops(widths):
    """Flops of one attempt to prove (8.1) for signals of these sizes, with its smallest ρ.

    Factors, Schur complements and their residuals per block, as flops of plain products.
    """
    sizes = [float(w) for w in widths[:-1]]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return 12 * sum(w**3 for w in sizes) + 8 * sum(a * b * (a + b) for a, b in pairs)


def closed_form_flops(widths):
    """Flops of the closed form's multipliers."""
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    return sum(6.0 * a**3 + 4.0 * a * b * min(a, b) + 30.0 * min(a, b) ** 3 for a, b in pairs)


def products_flops(widths):
    """Flops of LipLT: products of all runs of layers and their norms."""
    total = 0.0
    for layer in range(1, len(widths)):
        rows = float(widths[layer])
        for j in range(layer - 1, -1, -1):
            side = min(rows, widths[j])
            total += 2 * rows * widths[j] * side + 30 * side**3
            if j:
                total += 2 * rows * widths[j] * widths[j - 1]
    return total
