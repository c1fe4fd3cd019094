"""Checks of arguments that all of the theory shares."""

import math
import numbers


def finite_float(name: str, value) -> float:
    """`value` as a finite Python float, or an error that names the argument.

    Raises:
        TypeError: if `value` is not a real number.
        ValueError: if it is NaN or infinite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a real number. Received: {name}={value!r}.") from None
    if isinstance(value, (bool, str)):
        raise TypeError(f"`{name}` must be a real number. Received: {name}={value!r}.")
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite. Received: {name}={number}.")
    return number


def checked_seconds(name: str, value, *, zero: bool = False) -> float:
    """`value` as a positive number of seconds, infinity included, or an error that says so.

    Args:
        name: of the argument.
        value: what was given.
        zero: whether 0 is one too.

    Raises:
        ValueError: if it is something else.

    Example:

    >>> checked_seconds("time_budget", 2)
    2.0
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and (value > 0 or (zero and value == 0))):
        what = "a number of seconds, at least 0" if zero else "a positive number of seconds"
        raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}.")
    return float(value)
