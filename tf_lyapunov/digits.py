"""Numbers of claims as text that claims no more than the number does."""

import decimal
import math


def at_most(value, digits=9):
    """An upper bound, as text that is not below it.

    >>> at_most(2 / 3, 3), at_most(0.25, 3), at_most(1e-9 / 3, 3)
    ('0.667', '0.25', '3.34e-10')
    """
    return _beyond(float(value), digits, decimal.ROUND_CEILING)


def at_least(value, digits=9):
    """A lower bound, as text that is not above it.

    >>> at_least(2 / 3, 3), at_least(-2 / 3, 3), at_least(float("-inf"))
    ('0.666', '-0.667', '-inf')
    """
    return _beyond(float(value), digits, decimal.ROUND_FLOOR)


def exactly(matrix):
    """A matrix with every number to its last digit: rounded ones would be another claim.

    >>> import numpy as np
    >>> exactly(np.array([[1 / 3, -1.0]]))
    '[[ 0.3333333333333333, -1.                ]]'
    """
    import numpy as np  # `--help` needs none

    return np.array2string(np.asarray(matrix), floatmode="unique", threshold=16, separator=", ")


def _beyond(value, digits, rounding):
    if math.isinf(value) or math.isnan(value):
        return str(value)
    found = decimal.Context(prec=digits, rounding=rounding).create_decimal_from_float(value)
    return f"{float(found):.{digits}g}"
