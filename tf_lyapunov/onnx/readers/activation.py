"""Functions of every entry alone."""

import math

import keras
import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead
from tf_lyapunov.onnx.readers import linear

_NONNEGATIVE = ("relu", "sigmoid", "softplus", "hard_sigmoid")
_JUMPS = "it jumps, so that it has no Lipschitz constant"


def activated(build, node, signal, name, suffix=""):
    """A Keras activation by its name."""
    tensor = build.layer(node, keras.layers.Activation, signal.tensor, suffix, activation=name)
    return signal.like(tensor, nonnegative=name in _NONNEGATIVE)


def _plain(name):
    return lambda build, node, values: activated(build, node, values[0], name)


def _bare(function, nonnegative=False):
    def read(build, node, values):
        tensor = build.operation(node, function(values[0].tensor))
        return values[0].like(tensor, nonnegative=nonnegative)

    return read


def is_single(value, exact):
    """Whether an attribute is the single precision of a number, or the number."""
    return value in (exact, float(np.float32(exact)))


def _positive(name, value):
    if not (math.isfinite(value) and value > 0):
        raise NotRead(f"it is read for a positive {name}, which is {value:g}")
    return value


def _leaky_relu(build, node, values):
    slope = node.get("alpha", float(np.float32(0.01)))
    if slope < 0:
        return _kinked(build, node, values[0], np.full((1,) * len(values[0].order), slope))
    settings = {"negative_slope": slope}
    return values[0].like(build.layer(node, keras.layers.LeakyReLU, values[0].tensor, **settings))


def _kinked(build, node, signal, slopes):
    """PReLU with slopes that broadcast against the signal's tensor."""
    shared = [1 + i for i, n in enumerate(slopes.shape) if n == 1 and signal.tensor.shape[1 + i]]
    tensor = build.layer(
        node,
        keras.layers.PReLU,
        signal.tensor,
        weights=[np.asarray(slopes, signal.dtype)],
        shared_axes=shared or None,
    )
    return signal.like(tensor)


def _prelu(build, node, values):
    signal, slopes = values
    if not isinstance(slopes, np.ndarray):
        raise NotRead("its slopes are computed from inputs")
    shape = signal.sample
    signal, slopes = build.against(node, signal, slopes)
    if signal.sample != shape:
        raise BadGraph("its slopes have a larger shape than its input")
    slopes = slopes.reshape((1,) * (len(shape) - slopes.ndim) + slopes.shape)
    return _kinked(build, node, signal, slopes)


def _elu(build, node, values):
    alpha = node.get("alpha", 1.0)
    if alpha < 0:
        raise NotRead("it is read for alpha of at least 0")
    if alpha == 1:
        return activated(build, node, values[0], "elu")
    return values[0].like(build.layer(node, keras.layers.ELU, values[0].tensor, alpha=alpha))


def _selu(build, node, values):
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    gamma = node.get("gamma", float(np.float32(scale)))
    steep = node.get("alpha", float(np.float32(alpha)))
    if is_single(gamma, scale) and is_single(steep, alpha):
        return activated(build, node, values[0], "selu")
    _positive("alpha", steep)
    inner = values[0].like(
        build.layer(node, keras.layers.ELU, values[0].tensor, "_elu", alpha=steep)
    )
    return build.scaled(node, inner, gamma, 0.0)


def _celu(build, node, values):
    alpha = _positive("alpha", node.get("alpha", 1.0))
    if alpha == 1:
        return activated(build, node, values[0], "celu")
    tensor = keras.ops.celu(values[0].tensor, alpha=alpha)
    return values[0].like(build.operation(node, tensor))


def _hard_sigmoid(build, node, values):
    alpha, beta = node.get("alpha", float(np.float32(0.2))), node.get("beta", 0.5)
    if is_single(alpha, 1 / 6) and beta == 0.5:
        return activated(build, node, values[0], "hard_sigmoid")
    if alpha == 0.5 and beta == 0.5:
        return activated(build, node, values[0], "sparse_sigmoid")
    inner = build.scaled(node, values[0], alpha, beta, "_line")
    return clipped(build, node, inner, 0.0, 1.0)


def _gelu(build, node, values):
    approximate = node.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise BadGraph(f"it approximates by {approximate!r}")
    if approximate == "none":
        return activated(build, node, values[0], "gelu")
    tensor = keras.ops.gelu(values[0].tensor, approximate=True)
    return values[0].like(build.operation(node, tensor))


def swish(build, node, signal, rate):
    """x·σ(rate·x)."""
    if rate == 1:
        return activated(build, node, signal, "silu")
    if rate == 0:
        return build.scaled(node, signal, 0.5, 0.0)
    inner = build.scaled(node, signal, rate, 0.0, "_rate")
    inner = activated(build, node, inner, "silu", "_silu")
    return linear.divided(build, node, inner, np.asarray(rate, inner.dtype))


def _swish(build, node, values):
    return swish(build, node, values[0], node.get("alpha", 1.0))


def _thresholded(build, node, values):
    if node.get("alpha", 1.0) != 0:
        raise NotRead(_JUMPS)
    return activated(build, node, values[0], "relu")


def _shrink(build, node, values):
    threshold, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    if threshold != bias or threshold < 0:
        raise NotRead(_JUMPS)
    tensor = keras.ops.soft_shrink(values[0].tensor, threshold=threshold)
    return values[0].like(build.operation(node, tensor))


def clipped(build, node, signal, low, high):
    """min(max(x, low), high), either of them None or infinite where it does not bind."""
    largest = np.finfo(signal.dtype).max
    low = None if low is None or low <= -largest else low
    high = None if high is None or high >= largest else high
    if any(v is not None and math.isnan(v) for v in (low, high)):
        raise BadGraph("its limits are no numbers")
    below = low is not None and low >= 0
    if low is not None and high is not None:
        if low == 0 and high >= 0:
            tensor = build.layer(node, keras.layers.ReLU, signal.tensor, max_value=high)
            return signal.like(tensor, nonnegative=True)
        # Where they cross, the upper limit holds, which not every backend's `clip` says.
        tensor = keras.ops.clip(signal.tensor, min(low, high), high)
    elif low is not None:
        if low == 0:
            return activated(build, node, signal, "relu")
        tensor = keras.ops.maximum(signal.tensor, np.asarray(low, signal.dtype))
    elif high is not None:
        tensor = keras.ops.minimum(signal.tensor, np.asarray(high, signal.dtype))
    else:
        return signal
    return signal.like(build.operation(node, tensor), nonnegative=below)


def _clip(build, node, values):
    limits = []
    for place, name in ((1, "min"), (2, "max")):
        value = values[place] if len(values) > place else None
        if value is None:
            value = node.get(name)
        elif not isinstance(value, np.ndarray):
            raise NotRead("its limits are computed from inputs")
        elif value.size != 1:
            raise BadGraph("its limits are no numbers")
        limits.append(None if value is None else float(np.reshape(value, ())))
    return clipped(build, node, values[0], *limits)


def _rectified(build, node, values):
    """A choice by the sign, which `compositions` found."""
    if node.get("alpha") == 0:
        return activated(build, node, values[0], "relu")
    return _leaky_relu(build, node, values)


def _bent(build, node, values):
    """A rectifier with a limit and a slope below zero, which `compositions` found."""
    settings = {name: node.get(name) for name in ("max_value", "negative_slope")}
    return values[0].like(build.layer(node, keras.layers.ReLU, values[0].tensor, **settings))


def _square_plus(build, node, values):
    tensor = keras.ops.squareplus(values[0].tensor, b=node.get("b"))
    return values[0].like(build.operation(node, tensor))


def _negative(build, node, values):
    return build.scaled(node, values[0], -1.0, 0.0)


def _power(build, node, values):
    signal, power = values
    if isinstance(power, np.ndarray) and np.all(power == 1):
        return signal
    raise NotRead("a power has no bounded slope, so that it has no global Lipschitz constant")


READERS = {
    "Relu": (14, _plain("relu")),
    "Sigmoid": (13, _plain("sigmoid")),
    "Tanh": (13, _plain("tanh")),
    "Softplus": (22, _plain("softplus")),
    "Softsign": (22, _plain("softsign")),
    "HardSwish": (22, _plain("hard_silu")),
    "Mish": (22, _plain("mish")),
    "LeakyRelu": (16, _leaky_relu),
    "PRelu": (16, _prelu),
    "Elu": (22, _elu),
    "Selu": (22, _selu),
    "Celu": (28, _celu),
    "HardSigmoid": (22, _hard_sigmoid),
    "Gelu": (20, _gelu),
    "Swish": (24, _swish),
    "ThresholdedRelu": (22, _thresholded),
    "Shrink": (9, _shrink),
    "Clip": (13, _clip),
    "Neg": (13, _negative),
    "Abs": (13, _bare(keras.ops.absolute, nonnegative=True)),
    "Pow": (15, _power),
    "tf_lyapunov.LogSigmoid": (0, _plain("log_sigmoid")),
    "tf_lyapunov.SoftShrink": (0, _shrink),
    "tf_lyapunov.TanhShrink": (0, _plain("tanh_shrink")),
    "tf_lyapunov.SparsePlus": (0, _plain("sparse_plus")),
    "tf_lyapunov.Bent": (0, _bent),
    "tf_lyapunov.Rectified": (0, _rectified),
    "tf_lyapunov.SquarePlus": (0, _square_plus),
}
