"""Functions of every entry alone: activations with their parameters."""

import dataclasses
import functools
import sys

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import activations as own
from tf_lyapunov.program.activations import ACTIVATION_LAYERS
from tf_lyapunov.program.linear import inference_value
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.theory.sectors import Sector

_layers = keras.layers


def _erf(x):
    from scipy.special import erf

    return erf(x)


def _logistic(x):
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1 + small)


def _softplus(x):
    return np.logaddexp(0.0, x)


def _gelu(x, approximate=False):
    if approximate:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / np.sqrt(2)))


_SELU = (1.0507009873554805, 1.6732632423543772)
# Name -> function of x and the parameters, which are keywords.
FUNCTIONS = {
    "linear": lambda x: x,
    "relu": lambda x, negative_slope=0.0, max_value=None: np.where(
        x > 0, x if max_value is None else np.minimum(x, max_value), negative_slope * x
    ),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "leaky_relu": lambda x, negative_slope=0.2: np.where(x > 0, x, negative_slope * x),
    "elu": lambda x, alpha=1.0: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0))),
    "celu": lambda x, alpha=1.0: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0) / alpha)),
    "selu": lambda x: _SELU[0] * np.where(x > 0, x, _SELU[1] * np.expm1(np.minimum(x, 0.0))),
    "tanh": np.tanh,
    "hard_tanh": lambda x: np.clip(x, -1.0, 1.0),
    "tanh_shrink": lambda x: x - np.tanh(x),
    "soft_shrink": lambda x, threshold=0.5: np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0),
    "sigmoid": _logistic,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0.0, 1.0),
    "sparse_sigmoid": lambda x: np.clip(0.5 * (x + 1), 0.0, 1.0),
    "log_sigmoid": lambda x: -_softplus(-x),
    "softplus": _softplus,
    "sparse_plus": lambda x: np.where(x <= -1, 0.0, np.where(x < 1, (x + 1) ** 2 / 4, x)),
    "squareplus": lambda x, b=4: 0.5 * (x + np.sqrt(x * x + b)),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "silu": lambda x: x * _logistic(x),
    "hard_silu": lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
    "gelu": _gelu,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "abs": np.abs,
}
_ALIASES = {"swish": "silu", "hard_swish": "hard_silu", "absolute": "abs", "re_lu": "relu"}


@dataclasses.dataclass(frozen=True)
class Elementwise(Operation):
    """y = φ(x) entry by entry, with slopes in a sector.

    Attributes:
        name: key of `FUNCTIONS`.
        parameters: tuple of (name, number).
        sector: `Sector` of φ.
    """

    name: str
    parameters: tuple
    sector: Sector

    def forward(self, signals, precision):
        (signal,) = signals
        with np.errstate(over="ignore", invalid="ignore"):
            value = FUNCTIONS[self.name](signal.value, **dict(self.parameters))

        def error():
            own_part = precision.function * (1 + np.abs(signal.value) + np.abs(value))
            return self.sector.magnitude * signal.error + own_part + 4 * precision.tiny

        return with_error(signals, value, error)


@dataclasses.dataclass(frozen=True)
class Kinked(Operation):
    """y = x for x > 0 and slope·x below, with a slope per entry (PReLU).

    Attributes:
        slopes: float64, broadcast against a sample.
    """

    slopes: np.ndarray

    def forward(self, signals, precision):
        (signal,) = signals
        value = np.where(signal.value > 0, signal.value, self.slopes * signal.value)

        def error():
            steepest = np.maximum(np.abs(self.slopes), 1.0)
            size = steepest * (signal.error + 4 * precision.function * np.abs(signal.value))
            return size + 4 * precision.tiny

        return with_error(signals, value, error)


def is_keras_own(activation):
    """Whether a function is the very object that Keras holds under its module and name."""
    module = sys.modules.get(getattr(activation, "__module__", None) or "")
    name = getattr(activation, "__name__", "")
    return getattr(module, name, None) is activation and module.__name__.split(".")[0] == "keras"


def of_activation(activation, layer):
    """`Operation` of what a layer applies at its end, or None for the identity.

    Raises:
        UnsupportedLayerError: for a function that is not Keras' own, or has no entry here.
    """
    while isinstance(activation, _layers.Activation) and type(activation) is _layers.Activation:
        activation = activation.activation
    if activation is None or activation is keras.activations.linear:
        return None
    if isinstance(activation, keras.Layer):
        reader = READERS.get(type(activation))
        if reader is None:
            raise unread(layer, f"its activation of type {type(activation).__name__}")
        return _of_layer(activation)
    parameters = {}
    if isinstance(activation, functools.partial):
        parameters, activation = dict(activation.keywords), activation.func
    if not is_keras_own(activation):
        raise unread(layer, f"the activation {getattr(activation, '__name__', activation)!r}")
    name = activation.__name__
    if name == "gelu" and ".ops" in activation.__module__:
        parameters = {"approximate": True, **parameters}
    return named(name, parameters, layer)


def named(name, parameters, layer):
    """`Elementwise` of a function by its Keras name."""
    name = _ALIASES.get(name, name)
    if name not in FUNCTIONS:
        raise unread(layer, f"the function {name!r}")
    sector = Sector(-1.0, 1.0) if name == "abs" else Sector.of(name, **parameters)
    parameters = {k: v for k, v in parameters.items() if k != "threshold" or name != "relu"}
    numbers = tuple(sorted((k, v if v is None else float(v)) for k, v in parameters.items()))
    return Elementwise(name, numbers, sector)


def unread(layer, what):
    """The error of a function without a float64 evaluation here."""
    return UnsupportedLayerError(
        f"Only Keras's own activations are evaluated apart from the model. Received: layer "
        f"{layer.name!r} of type {type(layer).__name__} with {what}."
    )


def _of_layer(layer):
    kind = type(layer)
    if kind is _layers.PReLU:
        return Kinked(frozen(inference_value(layer.alpha, layer.compute_dtype)))
    if kind is own.LipschitzPReLU:
        return Kinked(frozen(np.clip(inference_value(layer.slope, layer.compute_dtype), -1, 1)))
    if kind is _layers.ReLU:
        settings = {"negative_slope": layer.negative_slope, "max_value": layer.max_value}
        return named("relu", settings, layer)
    if kind is _layers.LeakyReLU:
        return named("leaky_relu", {"negative_slope": layer.negative_slope}, layer)
    return named("elu", {"alpha": layer.alpha}, layer)


def _read_activation(call):
    found = of_activation(call.operation, call.operation)
    return [] if found is None else [found]


READERS = {
    _layers.Activation: _read_activation,
    **dict.fromkeys(ACTIVATION_LAYERS, lambda call: [_of_layer(call.operation)]),
}
