"""Functions of every entry alone: activations with their parameters."""

import dataclasses
import math
import re

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers import activations as own
from tf_lyapunov.program import rounding
from tf_lyapunov.program.activations import activation_name
from tf_lyapunov.program.gain import FUNCTION_ULPS, ZERO_SLACK, Affine, Gain, Peak, with_cast
from tf_lyapunov.program.operation import Operation, frozen, with_error
from tf_lyapunov.program.refusal import WITHOUT_GAIN, refuse
from tf_lyapunov.program.weights import finite_value, inference_value
from tf_lyapunov.theory.sectors import Sector

_layers = keras.layers

ACTIVATION_LAYERS = (_layers.ReLU, _layers.LeakyReLU, _layers.ELU, _layers.PReLU)
# Piecewise linear: one or two rounded operations. The others are library functions.
_PIECEWISE = {
    "relu",
    "leaky_relu",
    "relu6",
    "linear",
    "hard_tanh",
    "soft_shrink",
    "lipschitz_prelu",
}


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


def _relu(x, negative_slope=0.0, max_value=None):
    above = np.maximum(x, 0.0) if max_value is None else np.clip(x, 0.0, max_value)
    return above if negative_slope == 0 else np.where(x > 0, above, negative_slope * x)


_SELU = (1.0507009873554805, 1.6732632423543772)
# Name -> function of x and the parameters, which are keywords.
FUNCTIONS = {
    "linear": lambda x: x,
    "relu": _relu,
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


def _write_relu(graph, x, negative_slope=0.0, max_value=None):
    if max_value is None and negative_slope == 0:
        return graph.pointwise("Relu", x)
    if max_value is None:
        return _write_leaky(graph, x, negative_slope)
    above = _write_clip(graph, x, 0.0, max_value)
    if negative_slope == 0:
        return above
    below = graph.pointwise("Mul", graph.pointwise("Min", x, 0.0), negative_slope)
    return graph.pointwise("Add", above, below)


def _write_leaky(graph, x, negative_slope=0.2):
    if graph.in_attribute(negative_slope):
        return graph.pointwise("LeakyRelu", x, alpha=float(negative_slope))
    return _write_bent(graph, x, negative_slope)


def _write_bent(graph, x, slopes):
    below = graph.pointwise("Mul", graph.pointwise("Min", x, 0.0), slopes)
    return graph.pointwise("Add", graph.pointwise("Relu", x), below)


def _write_clip(graph, x, low, high):
    return graph.pointwise("Clip", x, low, high)


def _write_ramp(graph, x, slope):
    """The hard sigmoid of this slope at 0."""
    if not graph.is_double:
        return graph.pointwise("HardSigmoid", x, alpha=float(slope), beta=0.5)
    y = graph.pointwise("Add", graph.pointwise("Mul", x, slope), 0.5)
    return _write_clip(graph, y, 0.0, 1.0)


def _write_exponential(graph, x, kind, depth, factor=1.0, rate=1.0, **attributes):
    """factor·x above 0 and factor·depth·(exp(rate·x) - 1) below."""
    if not graph.is_double:
        return graph.pointwise(kind, x, **attributes)
    below = graph.pointwise("Mul", graph.pointwise("Min", x, 0.0), rate)
    below = graph.pointwise("Sub", graph.pointwise("Exp", below), 1.0)
    below = graph.pointwise("Mul", below, factor * depth)
    above = graph.pointwise("Relu", x)
    if factor != 1:
        above = graph.pointwise("Mul", above, factor)
    return graph.pointwise("Add", above, below)


def _write_elu(graph, x, alpha=1.0):
    return _write_exponential(graph, x, "Elu", alpha, alpha=float(alpha))


def _write_celu(graph, x, alpha=1.0):
    return _write_exponential(graph, x, "Celu", alpha, rate=1 / alpha, alpha=float(alpha))


def _write_selu(graph, x):
    gamma, alpha = _SELU
    return _write_exponential(graph, x, "Selu", alpha, gamma, alpha=alpha, gamma=gamma)


def _write_softplus(graph, x):
    if not graph.is_double:
        return graph.pointwise("Softplus", x)
    small = graph.pointwise("Exp", graph.pointwise("Neg", graph.pointwise("Abs", x)))
    small = graph.pointwise("Log", graph.pointwise("Add", small, 1.0))
    return graph.pointwise("Add", graph.pointwise("Relu", x), small)


def _write_log_sigmoid(graph, x):
    return graph.pointwise("Neg", _write_softplus(graph, graph.pointwise("Neg", x)))


def _write_soft_shrink(graph, x, threshold=0.5):
    if graph.in_attribute(threshold):
        return graph.pointwise("Shrink", x, lambd=float(threshold), bias=float(threshold))
    return graph.pointwise("Sub", x, _write_clip(graph, x, -threshold, threshold))


def _write_sparse_plus(graph, x):
    bent = graph.pointwise("Add", _write_clip(graph, x, -1.0, 1.0), 1.0)
    bent = graph.pointwise("Mul", graph.pointwise("Mul", bent, bent), 0.25)
    return graph.pointwise("Add", bent, graph.pointwise("Relu", graph.pointwise("Sub", x, 1.0)))


def _write_squareplus(graph, x, b=4):
    root = graph.pointwise("Add", graph.pointwise("Mul", x, x), b)
    y = graph.pointwise("Add", x, graph.pointwise("Sqrt", root))
    return graph.pointwise("Mul", y, 0.5)


def _write_softsign(graph, x):
    if not graph.is_double:
        return graph.pointwise("Softsign", x)
    return graph.pointwise("Div", x, graph.pointwise("Add", graph.pointwise("Abs", x), 1.0))


def _write_gelu(graph, x, approximate=False):
    if approximate:
        cube = graph.pointwise("Mul", graph.pointwise("Mul", x, x), x)
        inner = graph.pointwise("Add", x, graph.pointwise("Mul", cube, 0.044715))
        inner = graph.pointwise("Mul", inner, math.sqrt(2 / math.pi))
        share = graph.pointwise("Tanh", inner)
    else:
        share = graph.pointwise("Erf", graph.pointwise("Mul", x, math.sqrt(0.5)))
    y = graph.pointwise("Mul", x, graph.pointwise("Add", share, 1.0))
    return graph.pointwise("Mul", y, 0.5)


def _write_times(function):
    """x times a function of it."""
    return lambda graph, x: graph.pointwise("Mul", x, function(graph, x))


# Name -> function of a graph, the name of x in it, and the parameters.
WRITERS = {
    "linear": lambda graph, x: x,
    "relu": _write_relu,
    "relu6": lambda graph, x: _write_clip(graph, x, 0.0, 6.0),
    "leaky_relu": _write_leaky,
    "elu": _write_elu,
    "celu": _write_celu,
    "selu": _write_selu,
    "tanh": lambda graph, x: graph.pointwise("Tanh", x),
    "hard_tanh": lambda graph, x: _write_clip(graph, x, -1.0, 1.0),
    "tanh_shrink": lambda graph, x: graph.pointwise("Sub", x, graph.pointwise("Tanh", x)),
    "soft_shrink": _write_soft_shrink,
    "sigmoid": lambda graph, x: graph.pointwise("Sigmoid", x),
    "hard_sigmoid": lambda graph, x: _write_ramp(graph, x, 1 / 6),
    "sparse_sigmoid": lambda graph, x: _write_ramp(graph, x, 0.5),
    "log_sigmoid": _write_log_sigmoid,
    "softplus": _write_softplus,
    "sparse_plus": _write_sparse_plus,
    "squareplus": _write_squareplus,
    "softsign": _write_softsign,
    "silu": _write_times(lambda graph, x: graph.pointwise("Sigmoid", x)),
    "hard_silu": _write_times(lambda graph, x: _write_ramp(graph, x, 1 / 6)),
    "gelu": _write_gelu,
    "mish": _write_times(lambda graph, x: graph.pointwise("Tanh", _write_softplus(graph, x))),
    "abs": lambda graph, x: graph.pointwise("Abs", x),
}


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

    def write(self, graph, names):
        return WRITERS[self.name](graph, *names, **dict(self.parameters))


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

    def write(self, graph, names):
        (x,) = names
        if graph.is_double:
            return _write_bent(graph, x, self.slopes)
        # Slopes of one axis would meet the last one.
        slopes = self.slopes.reshape((1,) * (len(graph.sizes(x)) - self.slopes.ndim)
                                     + self.slopes.shape)  # fmt: skip
        return graph.pointwise("PRelu", x, slopes)


@dataclasses.dataclass(frozen=True)
class Clipped(Operation):
    """y = min(max(x, low), high), either of them None.

    Attributes:
        low, high: float64, broadcast against a sample.
    """

    low: np.ndarray | None
    high: np.ndarray | None

    def of(self, x):
        """The function of an array."""
        x = x if self.low is None else np.maximum(x, self.low)
        return x if self.high is None else np.minimum(x, self.high)

    def forward(self, signals, precision):
        (signal,) = signals
        value = self.of(signal.value)

        def error():
            limits = (b for b in (self.low, self.high) if b is not None)
            size = max((float(np.max(np.abs(b[np.isfinite(b)]), initial=0.0)) for b in limits),
                       default=0.0)  # fmt: skip
            # Limits may be held in float32 whatever the format.
            own = precision.function / 16 * size if precision.unit < 2.0**-24 else 0.0
            return signal.error + own + precision.tiny + np.zeros_like(value)

        return with_error(signals, value, error)

    def write(self, graph, names):
        (x,) = names
        limits = (self.low, self.high)
        if all(b is not None and np.size(b) == 1 for b in limits) and self.low <= self.high:
            return _write_clip(graph, x, *(b.reshape(()) for b in limits))
        x = x if self.low is None else graph.pointwise("Max", x, self.low)
        return x if self.high is None else graph.pointwise("Min", x, self.high)


def named(name, parameters, layer):
    """`Elementwise` of a function by its Keras name."""
    name = _ALIASES.get(name, name)
    if name not in FUNCTIONS:
        raise unread(layer, f"the function {name!r}")
    sector = _sector(name, parameters)
    parameters = {k: v for k, v in parameters.items() if k != "threshold" or name != "relu"}
    numbers = tuple(sorted((k, v if v is None else float(v)) for k, v in parameters.items()))
    return Elementwise(name, numbers, sector)


def _sector(name, parameters):
    return Sector(-1.0, 1.0) if name == "abs" else Sector.of(name, **parameters)


def unread(layer, what):
    """The error of a function without a float64 evaluation here."""
    return UnsupportedLayerError(
        f"Only Keras's own activations are evaluated apart from the model. Received: layer "
        f"{layer.name!r} of type {type(layer).__name__} with {what}."
    )


def of_layer(layer):
    """Operation of an activation layer."""
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


def elementwise_gain(name, sector, tensor, dtype, value_at_zero):
    """`Gain` of an elementwise function with a known sector: its largest absolute slope."""
    unit = rounding.unit_roundoff(dtype)
    root = math.inf if tensor.size is None else math.sqrt(tensor.size)
    magnitude = sector.magnitude
    offset = rounding.product_up(abs(value_at_zero) * ZERO_SLACK, root)
    if name in _PIECEWISE:
        error = rounding.gamma(4, unit)
        affine = Affine(magnitude, offset, error * max(magnitude, 1.0), error * (offset + root))
        if name in ("relu", "leaky_relu", "relu6", "lipschitz_prelu"):
            affine = Affine(magnitude, offset, error * magnitude, 0.0)
    else:
        error = FUNCTION_ULPS * unit
        affine = Affine(
            magnitude,
            offset,
            error * max(magnitude, 1.0),
            rounding.product_up(error, offset + root),
        )
    affine = with_cast(affine, tensor, dtype, unit)
    slopes = f"[{sector.alpha:.6g}, {sector.beta:.6g}]"
    decision = name if name in ("sigmoid", "log_sigmoid") else None
    return Gain(
        "activation", magnitude, f"{name}, slopes in {slopes}", affine, sector=sector,
        decision=decision, peak=Peak(1.0, 2) if name == "squareplus" else Peak(),
        # √(x² + b) without its square, for whatever b ≥ 0: |√(t + δ) - √t| ≤ √δ.
        flushed=(0.0, root * math.sqrt(2 * rounding.flushed(dtype))) if name == "squareplus"
        else (0.0, 0.0),
    )  # fmt: skip


def sector_gain(activation, tensor, dtype, owner):
    """`Gain` of an elementwise function or activation layer; see `fused.activation_gain`."""
    try:
        sector = Sector.of(activation)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(
            f"{error} Received: layer {owner.name!r} of type {type(owner).__name__} with it."
        ) from None
    name = activation_name(activation)
    if name == "linear":
        return None
    return elementwise_gain(name, sector, tensor, dtype, _value_at_zero(activation))


def _value_at_zero(activation):
    if isinstance(activation, keras.Layer):
        return 0.0  # ReLU without threshold, LeakyReLU, ELU, PReLU
    return float(keras.ops.convert_to_numpy(activation(keras.ops.zeros((1, 1), "float32")))[0, 0])


def _rule(call):
    layer = call.operation
    return sector_gain(layer, call.inputs[0], layer.compute_dtype, layer)


def _prelu_rule(call):
    layer = call.operation
    slopes = np.clip(finite_value(layer, layer.slope, layer.compute_dtype), -1.0, 1.0)
    sector = Sector(float(np.min(slopes, initial=1.0)), 1.0)
    return elementwise_gain(
        "lipschitz_prelu", sector, call.inputs[0], layer.compute_dtype, value_at_zero=0.0
    )


# Attributes of Keras's activation operations that are parameters of the activation.
_PARAMETERS = ("negative_slope", "alpha", "approximate", "threshold", "max_value", "b")


def _bare_name(operation):
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(operation).__name__).lower()
    return _ALIASES.get(name, name)


def _bare_parameters(operation):
    values = vars(operation)
    return {key: values[key] for key in _PARAMETERS if key in values}


def read_bare(call):
    """The function of a bare call of one tensor, by its name and parameters."""
    operation = call.operation
    return [named(_bare_name(operation), _bare_parameters(operation), operation)]


def bare_gain(call):
    """`Gain` of the same; refused where the name has no sector."""
    operation, tensor = call.operation, call.inputs[0]
    name = _bare_name(operation)
    try:
        sector = _sector(name, _bare_parameters(operation))
    except (UnsupportedLayerError, TypeError) as error:
        known = type(operation).__name__ in WITHOUT_GAIN
        refuse(operation, None if known else f"no proven gain is known for it ({error})")
    at_zero = operation(keras.ops.zeros((1, 1), dtype="float32"))
    at_zero = float(keras.ops.convert_to_numpy(at_zero)[0, 0])
    return elementwise_gain(name, sector, tensor, call.outputs[0].dtype, at_zero)


READERS = dict.fromkeys(
    (*ACTIVATION_LAYERS, own.LipschitzPReLU), lambda call: [of_layer(call.operation)]
)
RULES = {**dict.fromkeys(ACTIVATION_LAYERS, _rule), own.LipschitzPReLU: _prelu_rule}
