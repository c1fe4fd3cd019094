"""Numbers of claims as text that claims no more than the number does."""

import math


def at_most(value, digits=9):
    """An upper bound, as text that is not below it.

    >>> at_most(2 / 3, 3), at_most(0.25, 3), at_most(1e-9 / 3, 3)
    ('0.667', '0.25', '3.34e-10')
    """
    return _beyond(float(value), digits, math.inf)


def at_least(value, digits=9):
    """A lower bound, as text that is not above it.

    >>> at_least(2 / 3, 3), at_least(-2 / 3, 3), at_least(float("-inf"))
    ('0.666', '-0.667', '-inf')
    """
    return _beyond(float(value), digits, -math.inf)


def _beyond(value, digits, end):
    text = f"{value:.{digits}g}"
    if math.isinf(value) or value == 0 or math.isnan(value):
        return text
    # A unit in the last digit that is shown.
    unit = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits)
    for step in range(3):
        text = f"{value + math.copysign(step * unit, end):.{digits}g}"
        if float(text) >= value if end > 0 else float(text) <= value:
            return text
    return repr(value)
