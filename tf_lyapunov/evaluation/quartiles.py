"""Columns of results in a few numbers that JSON can hold."""

import math

import numpy as np


def quartiles(values):
    """The three quartiles, each a value that occurs, or None for no values.

    >>> quartiles([1.0, 2.0, math.inf])
    [2.0, 2.0, None]
    """
    if not len(values):
        return None
    # Infinities stay infinite: interpolation would make NaN of them.
    found = np.quantile(values, (0.25, 0.5, 0.75), method="higher")
    return [plain(v) for v in found]


def plain(value):
    """A number as JSON has it: None for infinity and NaN."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(value):
    """What `plain` gave, as text."""
    return "infinite" if value is None else f"{value:.4g}"
