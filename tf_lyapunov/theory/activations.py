"""Sectors of every elementwise activation of Keras 3.15, from their derivatives.

Reads Keras objects by their names and attributes only: nothing is imported from Keras.
"""

import math
import sys
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.theory.arguments import finite_float

# The derivatives below are evaluated with fewer than 2⁸ roundings at values of size about one;
# a stationary point off by 2⁻⁴⁰ moves an extremum by 2⁻⁸⁰ only.
_ALLOWANCE = 2.0**-44
# Smallest and largest slope; `Sector.of` makes a `Sector` of them.
Slopes = tuple[float, float]


def _outwards(low: float, high: float) -> Slopes:
    """Range around computed slopes; exact 0 and 1 (limits, not computed) are kept."""

    def push(value, sign):
        return value if value in (0.0, 1.0) else value + sign * _ALLOWANCE * max(1.0, abs(value))

    return (push(low, -1.0), push(high, 1.0))


def _extremal_slopes(slope, curvature_sign, limits=(0.0, 1.0), reach=40.0) -> Slopes:
    """Range of a smooth activation's slope: its limits at ±∞ and its stationary points.

    Args:
        slope: the derivative φ', a scalar function.
        curvature_sign: an array function with the sign of φ''.
        limits: φ' at -∞ and +∞.
        reach: |x| beyond which φ' is monotone.
    """
    grid = np.linspace(-reach, reach, 8001)
    signs = np.sign(curvature_sign(grid))
    candidates = list(limits)
    for index in np.flatnonzero(signs[:-1] != signs[1:]):
        left, right = grid[index], grid[index + 1]
        sign_left = np.sign(curvature_sign(np.array(left)))
        for _ in range(60):
            middle = 0.5 * (left + right)
            if np.sign(curvature_sign(np.array(middle))) == sign_left:
                left = middle
            else:
                right = middle
        candidates.append(slope(0.5 * (left + right)))
    return _outwards(min(candidates), max(candidates))


def _logistic(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _silu() -> Slopes:
    return _extremal_slopes(
        lambda x: _logistic(x) * (1 + x * (1 - _logistic(x))),
        lambda x: 2 + x * (1 - 2 * _logistic(x)),
    )


def _mish() -> Slopes:
    def parts(x):
        return _logistic(x), np.tanh(np.logaddexp(0.0, x))

    def slope(x):
        s, t = parts(x)
        return t + x * s * (1 - t * t)

    def curvature_sign(x):
        s, t = parts(x)
        return 2 + x * (1 - s) - 2 * x * s * t

    return _extremal_slopes(slope, curvature_sign)


def _gelu(approximate: bool = False) -> Slopes:
    if not approximate:
        # φ'(x) = Φ(x) + x·n(x) and φ''(x) = n(x)(2 - x²), n the normal density.
        def slope(x):
            density = math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            return 0.5 * math.erfc(-x / math.sqrt(2)) + x * density

        return _extremal_slopes(slope, lambda x: 2 - x * x)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715  # the definition in Hendrycks & Gimpel

    def inner(x):
        rate = scale * (1 + 3 * cubic * x * x)
        return np.tanh(scale * (x + cubic * x**3)), rate, 6 * scale * cubic * x

    def slope(x):
        t, rate, _ = inner(x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * rate

    def curvature_sign(x):
        t, rate, bend = inner(x)
        return rate + 0.5 * x * (bend - 2 * t * rate * rate)

    return _extremal_slopes(slope, curvature_sign)


def _selu() -> Slopes:
    # Fixed point (mean 0, variance 1) of Klambauer et al., equation 14; slope at 0- is λα > λ.
    e, root_e = math.e, math.sqrt(math.e)
    tail_half, tail_two = math.erfc(math.sqrt(0.5)), math.erfc(math.sqrt(2.0))
    alpha = -math.sqrt(2 / math.pi) / (tail_half * root_e - 1)
    variance = (
        2 * tail_two * e * e
        + math.pi * tail_half**2 * e
        - 2 * (2 + math.pi) * tail_half * root_e
        + math.pi
        + 2
    )
    scale = (1 - tail_half * root_e) * math.sqrt(2 * math.pi / variance)
    return _outwards(0.0, scale * max(alpha, 1.0))


def _relu(negative_slope=0.0, max_value=None, threshold=0.0) -> Slopes:
    slope = finite_float("negative_slope", negative_slope)
    if finite_float("threshold", threshold) != 0.0:
        raise UnsupportedLayerError(
            "Activation 'relu' with a non-zero `threshold` jumps there, so it has no finite slope. "
            f"Received: threshold={threshold}. Use threshold=0."
        )
    slopes = [slope, 1.0]
    if max_value is not None:
        if finite_float("max_value", max_value) < 0.0:
            raise ValueError(f"`max_value` must not be negative. Received: max_value={max_value}.")
        slopes.append(0.0)
    return (min(slopes), max(slopes))


def _prelu(alpha) -> Slopes:
    slopes = np.asarray(alpha, dtype=np.float64)
    if slopes.size == 0 or not np.all(np.isfinite(slopes)):
        raise ValueError("PReLU's `alpha` must be a non-empty array of finite slopes.")
    return (min(1.0, float(slopes.min())), max(1.0, float(slopes.max())))


def _elu(alpha=1.0) -> Slopes:
    alpha = finite_float("alpha", alpha)
    return (min(0.0, alpha), max(1.0, alpha))


def _celu(alpha=1.0) -> Slopes:
    if finite_float("alpha", alpha) <= 0.0:
        raise UnsupportedLayerError(
            f"Activation 'celu' is Lipschitz only for a positive `alpha`. Received: alpha={alpha}."
        )
    return (0.0, 1.0)


def _soft_shrink(threshold=0.5) -> Slopes:
    if finite_float("threshold", threshold) < 0.0:
        raise UnsupportedLayerError(
            "Activation 'soft_shrink' jumps at a negative `threshold`. "
            f"Received: threshold={threshold}."
        )
    return (0.0, 1.0)


def _squareplus(b=4) -> Slopes:
    if finite_float("b", b) < 0.0:
        raise ValueError(f"`b` of squareplus must not be negative. Received: b={b}.")
    return (0.0, 1.0)


def _fixed(low: float, high: float) -> Callable[[], Slopes]:
    return lambda: (low, high)


_SECTORS: dict[str, Callable[..., Slopes]] = {
    "linear": _fixed(1.0, 1.0),
    "relu": _relu,
    "relu6": _fixed(0.0, 1.0),
    "leaky_relu": lambda negative_slope=0.2: _relu(negative_slope),
    "prelu": _prelu,
    "elu": _elu,
    "celu": _celu,
    "selu": cache(_selu),
    "tanh": _fixed(0.0, 1.0),
    "hard_tanh": _fixed(0.0, 1.0),
    "tanh_shrink": _fixed(0.0, 1.0),
    "soft_shrink": _soft_shrink,
    "sigmoid": _fixed(0.0, 0.25),
    "hard_sigmoid": _fixed(0.0, math.nextafter(1 / 6, 1.0)),
    "sparse_sigmoid": _fixed(0.0, 0.5),
    "log_sigmoid": _fixed(0.0, 1.0),
    "softplus": _fixed(0.0, 1.0),
    "sparse_plus": _fixed(0.0, 1.0),
    "squareplus": _squareplus,
    "softsign": _fixed(0.0, 1.0),
    "silu": cache(_silu),
    "hard_silu": _fixed(-0.5, 1.5),
    "gelu": cache(_gelu),
    "mish": cache(_mish),
}
_ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}

_NOT_ELEMENTWISE = "mixes its inputs, so no slope sector describes it"
_REFUSED = {
    "softmax": _NOT_ELEMENTWISE + " (certificates look through a final softmax instead)",
    "log_softmax": _NOT_ELEMENTWISE,
    "sparsemax": _NOT_ELEMENTWISE,
    "glu": _NOT_ELEMENTWISE + " and multiplies them",
    "exponential": "has unbounded slope",
    "threshold": "is discontinuous",
    "hard_shrink": "is discontinuous",
}

# Layers that are an activation, or a linear map followed by one held in `.activation`.
_WITH_ACTIVATION = {
    "Activation", "Dense", "EinsumDense", "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D",
    "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D", "Conv1DTranspose", "Conv2DTranspose",
    "Conv3DTranspose",
}  # fmt: skip


def supported_activations() -> tuple[str, ...]:
    """Names that `Sector.of` accepts.

    Example:
        >>> "gelu" in supported_activations()
        True
    """
    return tuple(sorted(_SECTORS | _ALIASES))


def _named(name: str, params: dict) -> Slopes:
    name = _ALIASES.get(name, name)
    if name in _REFUSED:
        raise UnsupportedLayerError(f"Activation {name!r} {_REFUSED[name]}.")
    if name not in _SECTORS:
        raise UnsupportedLayerError(
            f"Activation {name!r} has no known slope sector. Pass `Sector(alpha, beta)` if you can "
            f"prove one. Supported: {', '.join(supported_activations())}."
        )
    try:
        return _SECTORS[name](**params)
    except TypeError as error:
        if "keyword" in str(error) or "positional" in str(error):
            raise TypeError(
                f"Activation {name!r} does not take these parameters. "
                f"Received: {sorted(params)}. ({error})"
            ) from None
        raise


def _prelu_layer(layer) -> Slopes:
    if not getattr(layer, "built", False):
        raise ValueError(f"Layer {layer.name!r} (PReLU) must be built before its slopes are read.")
    slopes = np.asarray(layer.alpha, dtype=np.float64)
    # Under mixed precision the slopes are cast at inference: half a unit in the last place, twice.
    last_place = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(str(layer.compute_dtype), 0.0)
    spread = last_place * (np.abs(slopes) + 2.0**-13)
    return _prelu(np.stack([slopes - spread, slopes + spread]))


def _layer(layer) -> Slopes:
    kind = type(layer).__name__
    if kind == "ReLU":
        return _relu(layer.negative_slope, layer.max_value, layer.threshold)
    if kind == "LeakyReLU":
        return _relu(layer.negative_slope)
    if kind == "ELU":
        return _elu(layer.alpha)  # not in Keras's get_config
    if kind == "PReLU":
        return _prelu_layer(layer)
    if kind == "Softmax":
        return _named("softmax", {})
    if kind in _WITH_ACTIVATION:
        return slopes_of(layer.activation, {})
    raise UnsupportedLayerError(
        f"Layer {kind!r} is not an activation with a known sector. Supported layers: ReLU, "
        "LeakyReLU, ELU, PReLU, Activation, and dense or convolution layers by their `activation`."
    )


def slopes_of(activation, params: dict) -> Slopes:
    """The slopes of what `Sector.of` takes; documented there."""
    if activation is None:
        return _named("linear", params)
    if isinstance(activation, str):
        return _named(activation, params)
    if isinstance(activation, partial):
        if activation.args:
            raise UnsupportedLayerError("A partial activation may only bind keyword parameters.")
        return slopes_of(activation.func, {**activation.keywords, **params})
    # Only Keras's own objects are trusted by name: a user's `relu` may be anything.
    is_function = hasattr(activation, "__name__") and not isinstance(activation, type)
    module = getattr(activation if is_function else type(activation), "__module__", "") or ""
    if module.split(".")[0] != "keras":
        name = getattr(activation, "__name__", type(activation).__name__)
        raise UnsupportedLayerError(
            f"Activation {name!r} from module {module!r} is not Keras's own, so its slopes are "
            "unknown. Pass `Sector(alpha, beta)` if you can prove one."
        )
    held = activation if is_function else type(activation)
    # A wrapper may carry Keras's module and name: the object itself must be what Keras holds there.
    if getattr(sys.modules.get(module), held.__name__, None) is not held:
        raise UnsupportedLayerError(
            f"Activation {held.__name__!r} carries the name of a function of {module!r} and is "
            "another object, so its slopes are unknown. Pass Keras's own, or `Sector(alpha, beta)`."
        )
    if is_function:
        name = activation.__name__
        if name == "gelu" and ".ops" in module:
            params = {"approximate": True, **params}  # keras.ops.gelu's default, unlike the layer's
        return _named(name, params)
    if params:
        raise TypeError(f"A layer brings its own parameters. Received: {sorted(params)}.")
    return _layer(activation)
