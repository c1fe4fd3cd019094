"""The time that a search for bounds may take: what is left of it, and whether a step fits.

Factorisations cannot be cut short. Before one begins, its flops are set against the rate that this
machine reaches now, other programs on it included.
"""

import math
import time

import numpy as np

# Side of the product of matrices that measures the rate, and flops of steps that always fit.
_SIDE, _SMALL = 256, 1e8
# Seconds that are measured at least, so that other programs have their turn; flops per second where
# the clock does not move.
_LEAST, _RATE = 0.02, 1e10


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

    def seconds_for(self, flops):
        """Seconds of a step of so many flops, at the rate of products of matrices; 0 unlimited."""
        if self.seconds == math.inf or flops <= _SMALL:
            return 0.0
        if self._rate is None:
            self._rate = measured_rate()
        return flops / self._rate

    def fits(self, flops):
        """Whether a step of so many flops ends in time. What takes milliseconds always does."""
        if self.seconds == math.inf or flops <= _SMALL:
            return True
        left = self.left()
        return left > 0.0 and self.seconds_for(flops) <= left

    def before(self, flops):
        """`time.monotonic()` value at which a search ends so that a last step fits; None if never.

        A fifth of the time is kept for it in any case.
        """
        if self.seconds == math.inf:
            return None
        return self.deadline - max(0.2 * self.left(), 1.5 * self.seconds_for(flops))


def measured_rate():
    """Flops per second of products of float64 matrices, as it is now."""
    matrix = np.full((_SIDE, _SIDE), 1.0 / _SIDE)
    matrix @ matrix  # wakes the library up
    count, seconds, begin = 0, 0.0, time.perf_counter()
    while count < 1 or (seconds < _LEAST and count < 100):
        matrix @ matrix
        count += 1
        seconds = time.perf_counter() - begin
    return 2.0 * count * _SIDE**3 / seconds if seconds > 0 else _RATE


def proof_flops(widths):
    """Flops of one attempt to prove (8.1) for signals of these sizes, with its smallest ρ.

    Factors, Schur complements and their residuals per block, as flops of plain products.
    """
    sizes = [float(w) for w in widths[:-1]]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return 7 * sum(w**3 for w in sizes) + 5 * sum(a * b * (a + b) for a, b in pairs)


def closed_form_flops(widths):
    """Flops of the closed form's multipliers."""
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    return sum(3.0 * a**3 + 4.0 * a * b * min(a, b) + 15.0 * min(a, b) ** 3 for a, b in pairs)


def products_flops(widths):
    """Flops of LipLT: products of all runs of layers and their norms."""
    total = 0.0
    for layer in range(1, len(widths)):
        rows = float(widths[layer])
        for j in range(layer - 1, -1, -1):
            side = min(rows, widths[j])
            total += 2 * rows * widths[j] * side + 15 * side**3
            if j:
                total += 2 * rows * widths[j] * widths[j - 1]
    return total
