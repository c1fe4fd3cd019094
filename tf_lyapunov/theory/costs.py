"""Says beforehand what long computations will take."""

import functools
import time
import warnings

import numpy as np

from tf_lyapunov.errors import CostWarning

# What is worth saying.
SECONDS, BYTES = 20.0, 2e9
# Matrices of a smaller side take less than that anywhere.
SMALLEST_SIDE = 3000
_SIDE, _TRIES = 512, 3


def announce(what, flops, size, advice=""):
    """Warns of what takes more than `SECONDS` or `BYTES`, before it begins.

    Args:
        what: words, the sentence's subject.
        flops: floating-point operations of matrix products in float64.
        size: bytes.
        advice: a sentence on what else can be done.

    Example:

    >>> with warnings.catch_warnings(record=True) as seen:
    ...     announce("A small product", 1e3, 1e3)
    ...     announce("A product of large matrices", 1e3, 4e9)
    >>> [str(w.message).split(" s and ")[1] for w in seen]
    ['4.0 GB of memory here.']
    """
    seconds = flops / speed()
    if seconds > SECONDS or size > BYTES:
        text = (
            f"{what} takes about {seconds:.0f} s and {size / 1e9:.1f} GB of memory here. {advice}"
        )
        warnings.warn(text.rstrip(), CostWarning, stacklevel=2)


@functools.cache
def speed():
    """Floating-point operations a second of float64 matrix products, measured once."""
    a = np.random.default_rng(0).normal(size=(_SIDE, _SIDE))
    seconds = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * _SIDE**3 / max(min(seconds), 1e-9)
