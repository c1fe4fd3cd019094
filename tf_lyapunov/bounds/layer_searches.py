"""Searches for one layer's indices from its matrix, in units in which floats do not overflow."""

import math

import numpy as np

from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.program import rounding
from tf_lyapunov.theory.spectra import smallest_eigenvalue

UNIT = rounding.UNIT_ROUNDOFF["float64"]


def diagonal_indices(weight, sector, delta, search, solver="structured"):
    """What `search` finds for the network whose last layer is the identity, ν first; or None."""
    size = float(np.linalg.norm(weight, 2)) * sector.magnitude
    # In units of the output in which the gain is about one; powers of two are exact.
    unit = math.ldexp(1.0, math.frexp(size)[1] - 1) if size else 1.0
    if not (math.isfinite(size) and math.isfinite(delta * unit)):
        return None
    chain = Chain((weight / unit, np.eye(len(weight))), (sector,))
    found = search(chain, delta * unit, solver=solver)
    if found is None:
        return None
    with np.errstate(over="ignore"):
        return _in_units(found[0], unit), found[1] / unit


def linear_nu(weight, slope, delta):
    """Largest ν of y = slope·Wx: the smallest eigenvalue of its supply form, rounded down.

    None where the form is beyond float64.
    """
    outputs, inputs = weight.shape
    largest = float(np.max(np.abs(weight), initial=0.0))
    power, (slope, more) = math.frexp(largest)[1], math.frexp(slope)
    # In units of the output in which entries are about one, so that no square underflows.
    try:
        unit = math.ldexp(1.0, power + more)
    except OverflowError:
        return None
    weight, delta = np.ldexp(weight, -power), delta * unit
    square = np.zeros((inputs, inputs))
    shared = min(inputs, outputs)
    square[:shared] = slope * weight[:shared]
    with np.errstate(over="ignore", invalid="ignore"):
        form = (square + square.T) / 2 - delta * slope**2 * (weight.T @ weight)
        form = (form + form.T) / 2
    if unit == 0.0 or not np.all(np.isfinite(form)):
        return None
    value, bound = smallest_eigenvalue(form)
    size = abs(slope) * float(np.linalg.norm(weight))
    forming = rounding.gamma(outputs + 8, UNIT) * (size + abs(delta) * size**2)
    nu = _in_units(float(rounding.down(value - bound - 1.01 * forming)), unit)
    return nu if math.isfinite(nu) else None


def _in_units(nu, unit):
    """ν·unit for a power of two, rounded down where it underflows."""
    found = nu * unit
    return found if abs(found) >= np.finfo(float).tiny else float(rounding.down(found))
