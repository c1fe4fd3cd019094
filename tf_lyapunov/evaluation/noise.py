"""Noise of a given strength: Gaussian by signal-to-noise ratio, and dropped features."""

from __future__ import annotations

import math

import keras
import numpy as np

# Samples that share one generator, so that a longer data set begins like a shorter one.
_BLOCK = 256


def gaussian_noise(x, snr, *, seed=0):
    """Inputs plus white Gaussian noise of an exact signal-to-noise ratio.

        x + n,   n = ‖x‖ · 10^(-SNR/20) · g/‖g‖,   SNR = 20·log10(‖x‖/‖n‖) dB            (1)

    Rescaling the draw g makes the ratio hold for every sample, not on average. Nothing is clipped.

    Args:
        x: array (n, ...), finite, no sample zero.
        snr: finite float, in dB.
        seed: int.

    Returns:
        float32 array of the shape of x.

    Raises:
        ValueError: for NaN, an SNR that is not finite, or a zero sample, whose ratio is undefined.

    Example:

    >>> x = np.ones((2, 4))
    >>> noisy = gaussian_noise(x, 20.0)
    >>> signal_to_noise(x, noisy).round(4).tolist()
    [20.0, 20.0]

    Reference: Bontonou et al., Figure 4, as published.
    """
    x, length = _signals(x, snr)
    scale = length * 10 ** (-snr / 20)
    result = np.empty(x.shape, np.float32)
    for block, start in enumerate(range(0, len(x), _BLOCK)):
        part = slice(start, start + _BLOCK)
        noise = np.random.default_rng([seed, block]).standard_normal(x[part].shape)
        noise *= _columns(scale[part] / _lengths(noise), x.ndim)
        result[part] = x[part] + noise
    return result


def signal_to_noise(x, noisy):
    """20·log10(‖x‖/‖noisy - x‖) of every sample, in dB, float64; infinite without noise."""
    x, noisy = (np.asarray(a, np.float64) for a in (x, noisy))
    with np.errstate(divide="ignore"):
        return 20 * np.log10(_lengths(x) / _lengths(noisy - x))


def linf_radius(x, snr):
    """l∞ radius at which a step ±radius in every coordinate has a signal-to-noise ratio.

        radius = ‖x‖ · 10^(-SNR/20) / √(features)                                        (1)

    An FGSM step whose gradient is zero somewhere, or that is clipped, has a larger ratio.

    Args:
        x: array (n, ...), finite, no sample zero.
        snr: finite float, in dB.

    Returns:
        float64 array (n,).

    Example:

    >>> linf_radius(np.full((1, 4), 0.5), 20.0).round(12).tolist()
    [0.05]

    Reference: Bontonou et al., section 5 (FGSM at SNR 33), as published.
    """
    x, length = _signals(x, snr)
    return length * 10 ** (-snr / 20) / math.sqrt(math.prod(x.shape[1:]))


def _signals(x, snr):
    if isinstance(snr, bool) or not isinstance(snr, (int, float, np.number)):
        raise TypeError(f"`snr` must be a number, in dB. Received: snr={snr!r}.")
    if not math.isfinite(snr):
        raise ValueError(f"`snr` must be finite. Received: snr={snr}.")
    x = np.asarray(x, np.float64)
    if x.ndim < 2 or not np.all(np.isfinite(x)):
        raise ValueError(
            f"`x` must be a finite array (n, ...). Received: shape {x.shape}, or NaN or infinity."
        )
    length = _lengths(x)
    if np.any(length == 0):
        raise ValueError(
            "The signal-to-noise ratio of a zero input is undefined. Received: zero samples "
            f"{np.flatnonzero(length == 0)[:5].tolist()}. Leave them out."
        )
    return x, length


def _lengths(x):
    return np.linalg.norm(x.reshape(len(x), -1), axis=1)


def _columns(values, ndim):
    return values.reshape(-1, *[1] * (ndim - 1))


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class _DroppedFeatures(keras.layers.Layer):
    """Dropout that acts at inference."""

    def __init__(self, rate, seed, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.random = rate, keras.random.SeedGenerator(seed)

    def call(self, x):
        return keras.random.dropout(x, self.rate, seed=self.random)

    def compute_output_shape(self, input_shape):
        return input_shape


def with_dropped_features(model, layers, rate, *, seed=0):
    """Copy of a model that loses a share of some layers' outputs at every evaluation.

        h ← h ⊙ m / (1 - rate),   m_i = 0 with probability `rate`, else 1                 (1)

    Args:
        model: functional or sequential model, built.
        layers: names of the layers.
        rate: float in (0, 1).
        seed: int; equal calls in equal order drop equal features.

    Returns:
        A functional model with weights of its own, copied.

    Raises:
        ValueError: for unknown names, no names, a rate out of range, or a model without a graph.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="h"),
    ...                           keras.layers.Dense(2)])
    >>> len(with_dropped_features(model, ["h"], 0.25).layers)
    4

    Reference: Lassance, Gripon, Ortega, "Laplacian networks" (2018), section 4 (dropout of block
    outputs at rates 0.25 and 0.4), as published.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise ValueError(f"`rate` must lie in (0, 1). Received: rate={rate!r}.")
    owner = next(base for base in type(model).__mro__ if "call" in vars(base))
    if owner.__name__ not in ("Functional", "Sequential"):
        raise ValueError(
            "Features can be dropped in functional and sequential models. Received: "
            f"{type(model).__name__} {model.name!r}."
        )
    known = [layer.name for layer in model.layers]
    missing = [name for name in layers if name not in known]
    if missing or not layers or isinstance(layers, str):
        raise ValueError(
            f"`layers` must name layers of the model. Received: layers={layers!r}. "
            f"Model {model.name!r} has {known}."
        )
    position = {name: i for i, name in enumerate(layers)}

    def call(layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        if layer.name not in position:
            return outputs
        number = position[layer.name]
        return _DroppedFeatures(rate, 1000 * seed + number, name=f"dropped_{number}")(outputs)

    if isinstance(model, keras.Sequential):
        graph = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    else:
        graph = model
    copy = keras.models.clone_model(graph, call_function=call)
    copy.set_weights(model.get_weights())
    return copy
