"""Checks of arguments that all of the theory shares."""

import math


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
