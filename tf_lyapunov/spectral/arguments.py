"""Checks of the arguments that constraints and regularizers share."""

import math

import numpy as np

# Float32 squares of numbers in this range, times the sizes of kernels, stay representable.
GAIN_RANGE = (1e-12, 1e12)


def from_known(cls, config, known):
    """An object of `cls` from a config that holds no key outside `known`."""
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(
            f"The configuration of a {cls.__name__} must hold only {sorted(known)}. "
            f"Received: {unknown}."
        )
    return cls(**config)


def positive_or_none(name, value, limits):
    """`positive`, or `None`, which leaves a layer unconstrained."""
    if value is None:
        return None
    return positive(name, value, limits, " Pass `None` to leave the layer unconstrained.")


def finite(name, value):
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite. Received: {name}={value}.")
    return float(value)


def positive(name, value, limits, hint=""):
    """`value` as a positive float within `limits`; `hint` ends the error's text."""
    value = finite(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be positive. Received: {name}={value}.{hint}")
    if not limits[0] <= value <= limits[1]:
        raise ValueError(
            f"`{name}` must be between {limits[0]} and {limits[1]}. Received: {name}={value}."
        )
    return value


def count(name, value, most=10**9):
    """`value` as an integer from 1 to `most`."""
    whole = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (whole and int(value) == value and 1 <= value <= most):
        raise ValueError(f"`{name}` must be an integer from 1 to {most}. Received: {name}={value}.")
    return int(value)
