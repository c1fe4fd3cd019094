"""Directed rounding through exact rational arithmetic.

Every float64 is a rational number, so a finite expression of floats can be evaluated exactly with
`fractions.Fraction` and rounded once, towards the safe side.
"""

import math
from fractions import Fraction

#: Unit roundoff of float64: a correctly rounded operation is off by at most this much, relatively.
UNIT_ROUNDOFF = 2.0**-53


def round_up(value: Fraction) -> float:
    """Smallest float64 that is not below `value` (infinity if none is finite).

    Example:
        >>> round_up(Fraction(1, 10)) >= Fraction(1, 10)
        True
    """
    try:
        nearest = float(value)
    except OverflowError:
        return math.inf if value > 0 else -1.7976931348623157e308
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)


def round_down(value: Fraction) -> float:
    """Largest float64 that is not above `value` (minus infinity if none is finite).

    Example:
        >>> round_down(Fraction(1, 10)) <= Fraction(1, 10)
        True
    """
    return -round_up(-value)


def exact_product(values) -> Fraction:
    """Product of floats without any rounding."""
    return math.prod((Fraction(value) for value in values), start=Fraction(1))


def sqrt_up(value: Fraction) -> float:
    """Float64 that is not below the square root of a non-negative rational."""
    root = math.sqrt(round_up(value))
    while math.isfinite(root) and Fraction(root) ** 2 < value:
        root = math.nextafter(root, math.inf)
    return root
