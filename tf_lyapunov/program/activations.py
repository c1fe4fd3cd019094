"""Gains of activations: elementwise functions by their slope sectors, softmax by its Jacobian."""

import math

import keras

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import Affine, Gain, with_cast
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
# Units in the last place, relative to 1 + |input|, to which libraries evaluate tanh, erf, exp, …
FUNCTION_ULPS = 16
# Value at zero is read in float32, where it is accurate to a few units in the last place.
ZERO_SLACK = 1 + 1e-3


def activation_gain(activation, tensor, dtype, owner):
    """`Gain` of an activation function or layer on `tensor`, or None for the identity.

    Args:
        activation: a Keras activation function, an activation layer, or None.
        tensor: `graph.Tensor` that it is applied to.
        dtype: compute dtype.
        owner: the layer that applies it, for messages.

    Raises:
        UnsupportedLayerError: for activations without a proven sector.
    """
    name = activation_name(activation)
    if is_softmax(activation):
        axis = getattr(activation, "axis", -1)
        return softmax_gain(name, axis, tensor, dtype)
    if isinstance(activation, keras.Layer) and type(activation) not in ACTIVATION_LAYERS:
        if type(activation) is _layers.Activation:
            return activation_gain(activation.activation, tensor, dtype, owner)
        raise UnsupportedLayerError(
            "A layer held as an activation must be ReLU, LeakyReLU, ELU, PReLU or Activation. "
            f"Received: {activation.name!r} of type {type(activation).__name__}."
        )
    try:
        sector = Sector.of(activation)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(
            f"{error} Received: layer {owner.name!r} of type {type(owner).__name__} with it."
        ) from None
    if name == "linear":
        return None
    return elementwise_gain(name, sector, tensor, dtype, _value_at_zero(activation))


def is_softmax(activation):
    """Whether this is Keras's own softmax or log-softmax; a user's `softmax` may be anything."""
    own = (keras.activations.softmax, keras.activations.log_softmax)
    return type(activation) is _layers.Softmax or any(activation is f for f in own)


def innermost(layer):
    """The activation layer that a layer holds as its activation, however deep, or the layer."""
    while isinstance(getattr(layer, "activation", None), keras.Layer):
        layer = layer.activation
    return layer


def current_config(layer):
    """A layer's configuration as it computes now: for ELU Keras repeats what it was made with."""
    config = layer.get_config()
    return {**config, "alpha": layer.alpha} if type(layer) is _layers.ELU else config


def activation_name(activation):
    """Short lower-case name of an activation function or layer."""
    if activation is None:
        return "linear"
    if isinstance(activation, keras.Layer):
        names = {"ReLU": "relu", "LeakyReLU": "leaky_relu", "ELU": "elu", "PReLU": "leaky_relu"}
        kind = type(activation).__name__
        return names.get(kind, kind.lower())
    return getattr(activation, "__name__", type(activation).__name__)


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
        decision=decision,
    )  # fmt: skip


def _value_at_zero(activation):
    if isinstance(activation, keras.Layer):
        return 0.0  # ReLU without threshold, LeakyReLU, ELU, PReLU
    return float(keras.ops.convert_to_numpy(activation(keras.ops.zeros((1, 1), "float32")))[0, 0])


def softmax_gain(name, axis, tensor, dtype):
    """Softmax has gain 1/2, log-softmax √K.

    diag(p) - ppᵀ has absolute row sums 2p_i(1 - p_i) ≤ 1/2. I - 1pᵀ is an oblique projection,
    whose norm is that of its complement 1pᵀ: √K‖p‖ ≤ √K.
    """
    rank = len(tensor.shape)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(a % rank for a in axes)
    if 0 in axes:
        raise UnsupportedLayerError(
            f"A softmax over the batch axis mixes inputs. Received: {name} with axis={axis}."
        )
    classes = [tensor.shape[a] for a in axes]
    count = None if None in classes else math.prod(classes)
    if name == "log_softmax" and count is None:
        raise UnsupportedLayerError(
            "A log-softmax over an axis of unknown size has no known gain. "
            f"Received: input shape {tensor.shape}."
        )
    unit = rounding.unit_roundoff(dtype)
    size = math.inf if tensor.size is None else tensor.size
    terms = math.inf if count is None else count + FUNCTION_ULPS
    error = rounding.gamma(terms, unit)
    if name == "softmax":
        value, offset = 0.5, math.sqrt(size)
        affine = Affine(value, offset, 4 * unit * math.sqrt(size), error * math.sqrt(size))
    else:
        value = rounding.sqrt_up(count)
        offset = math.sqrt(size) * (math.log(count) * ZERO_SLACK + 1e-6)
        affine = Affine(value, offset, 4 * unit * value, error * (offset + math.sqrt(size)))
    last = axes == (rank - 1,)
    affine = with_cast(affine, tensor, dtype, unit)
    return Gain("softmax", value, f"{name} Jacobian", affine, decision=name if last else None)
