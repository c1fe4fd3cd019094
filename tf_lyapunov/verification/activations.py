"""The verifier's own table of activations: slopes, and values with their errors."""

import math

import numpy as np

from tf_lyapunov.verification.arithmetic import SLACK
from tf_lyapunov.verification.rounding import FLOAT64

# NumPy's and libm's tanh, exp, log1p, erf, composed a few times: relative to 1 + |input|.
_LIBRARY = 32
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _logistic(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _relu(x, negative_slope=0.0, max_value=None):
    value = np.where(x > 0, x, negative_slope * x)
    return value if max_value is None else np.minimum(value, max_value)


def _relu_slopes(negative_slope=0.0, max_value=None):
    slopes = [negative_slope, 1.0] + ([] if max_value is None else [0.0])
    return min(slopes), max(slopes)


def _gelu(x, approximate=False):
    if approximate:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _elu(x, alpha=1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


# name: (slopes from the parameters, values). The irrational slopes are rounded outwards here, and
# the tests compare them with the derivatives' extrema.
TABLE = {
    "linear": (lambda: (1.0, 1.0), lambda x: x),
    "relu": (_relu_slopes, _relu),
    "relu6": (lambda: (0.0, 1.0), lambda x: np.clip(x, 0.0, 6.0)),
    "leaky_relu": (_relu_slopes, _relu),
    "elu": (lambda alpha=1.0: (min(0.0, alpha), max(1.0, alpha)), _elu),
    "selu": (
        lambda: (0.0, 1.7580993408474),
        lambda x: _SELU_SCALE * _elu(x, _SELU_ALPHA),
    ),
    "tanh": (lambda: (0.0, 1.0), np.tanh),
    "sigmoid": (lambda: (0.0, 0.25), _logistic),
    "log_sigmoid": (lambda: (0.0, 1.0), lambda x: -np.logaddexp(0.0, -x)),
    "hard_sigmoid": (
        lambda: (0.0, math.nextafter(1 / 6, 1.0)),
        lambda x: np.clip(x / 6 + 0.5, 0.0, 1.0),
    ),
    "softplus": (lambda: (0.0, 1.0), lambda x: np.logaddexp(0.0, x)),
    "softsign": (lambda: (0.0, 1.0), lambda x: x / (1 + np.abs(x))),
    "silu": (lambda: (-0.09983932012887, 1.09983932012887), lambda x: x * _logistic(x)),
    "gelu": (
        lambda approximate=False: (
            (-0.12899306865878, 1.12899306865878)
            if approximate
            else (-0.12890414518516, 1.12890414518516)
        ),
        _gelu,
    ),
    "mish": (
        lambda: (-0.11252612238947, 1.08849816125173),
        lambda x: x * np.tanh(np.logaddexp(0.0, x)),
    ),
}
_PIECEWISE = ("linear", "relu", "relu6", "leaky_relu", "hard_sigmoid")


def slopes(name, parameters):
    """`(alpha, beta)` with alpha ≤ (φ(s) - φ(t))/(s - t) ≤ beta for all s ≠ t."""
    alpha, beta = TABLE[name][0](**parameters)
    return float(alpha), float(beta)


def evaluate(name, parameters, values, errors, rounding=FLOAT64):
    """φ(values) and the errors that it inherits and makes.

    Args:
        name, parameters: of `TABLE`.
        values, errors: float64 arrays.
        rounding: `rounding.Rounding` of the arithmetic.
    """
    alpha, beta = slopes(name, parameters)
    result = TABLE[name][1](values, **parameters)
    steepest = max(abs(alpha), abs(beta))
    unit, size = rounding.unit, 1 + np.abs(values)
    own = 4 * unit * (np.abs(result) + 1) if name in _PIECEWISE else _LIBRARY * unit * size
    if name in ("relu", "relu6", "leaky_relu"):
        own = (4 * unit + rounding.settings) * np.abs(result)
    else:
        own = own + 4 * rounding.settings * size
    return result, (steepest * errors + max(steepest, 1.0) * own) * SLACK
