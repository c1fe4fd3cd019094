"""(3) Layer-wise robustness and the compositional rule of Proposition 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.evaluation.localized import checked, checked_points, norms, ones


@dataclass(frozen=True)
class LayerwiseRobustness:
    """Proposition 1, layer by layer.

    Attributes:
        names: of the layers.
        radii: float64 (L,), r·Π_{k<l} α_k, at which layer l is asked.
        estimates: float64 (L,), α_l by Monte-Carlo sampling: lower estimates.
        product: Π α_l.
        network: α_lim of the whole network at r, estimated.
        contracts: whether every α_l ≤ 1, as Proposition 1 assumes.
        is_consistent: whether network ≤ product, which Proposition 1 implies for the true values;
            a False shows that sampling missed the worst directions of some layer.
    """

    names: tuple
    radii: np.ndarray
    estimates: np.ndarray
    product: float
    network: float
    contracts: bool
    is_consistent: bool


def layerwise_robustness(model, x, radius, *, norm=2, directions=1000, seed=0):
    """α_l of every layer at the radius that Proposition 1 demands of it.

    Layer l is asked at F^(l-1)(x) for changes up to r·Π_{k<l} α_k; then F is (Π α_l)-robust for r.
    The proof needs no α_l ≤ 1; the paper assumes it.

    Args:
        model: a built chain of Keras layers.
        x: the points, (n, …).
        radius: r > 0.
        norm: 2 or `math.inf`.
        directions: Gaussian directions per point and layer.
        seed: of the directions.

    Returns:
        `LayerwiseRobustness`.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Rescaling(0.5),
    ...                           keras.layers.ReLU()])
    >>> found = layerwise_robustness(model, [[1.0, 2.0]], 0.1)
    >>> [round(float(v), 4) for v in found.estimates], found.is_consistent
    ([0.5, 1.0], True)

    Reference: Bontonou et al., Definition 2 and Proposition 1, as published; estimates.
    """
    checked(norm, "logits", "paper", directions, 0)
    x, (radius,) = checked_points(model, x, [radius], norm)
    layers = _chain(model)
    rng = np.random.default_rng(seed)
    signal, reach, alphas, reaches = x.astype(np.float32), float(radius), [], []
    for layer in layers:
        reaches.append(reach)
        alphas.append(_sampled_gain(layer, signal, reach, norm, directions, rng))
        reach *= alphas[-1]
        signal = _apply(layer, signal)
        if reach == 0:  # constant from here on
            reaches += [0.0] * (len(layers) - len(alphas))
            alphas += [0.0] * (len(layers) - len(alphas))
            break

    def whole(z):
        for layer in layers:
            z = layer(z, training=False) if _takes_training(layer) else layer(z)
        return z

    network = _sampled_gain(whole, x.astype(np.float32), float(radius), norm, directions, rng)
    product = math.prod(alphas)
    return LayerwiseRobustness(
        tuple(layer.name for layer in layers),
        np.array(reaches),
        np.array(alphas),
        product,
        network,
        all(a <= 1 for a in alphas),
        network <= product * (1 + 1e-5),
    )


def _chain(model):
    layers = [x for x in model.layers if not isinstance(x, keras.layers.InputLayer)]
    inbound = [x for x in layers if len(x._inbound_nodes) != 1 or isinstance(x.input, list)]
    if inbound or not layers:
        raise UnsupportedLayerError(
            "Proposition 1 concerns chains of layers. Received: model "
            f"{model.name!r}, whose layer {inbound[0].name if inbound else None!r} is used several "
            "times or reads several tensors."
        )
    return layers


def _takes_training(layer):
    return isinstance(layer, keras.Model) or layer._call_has_training_arg


def _apply(layer, x):
    extra = {"training": False} if not isinstance(layer, keras.Layer) or (
        _takes_training(layer)) else {}  # fmt: skip
    return ops.convert_to_numpy(layer(ops.convert_to_tensor(x), **extra))


def _sampled_gain(function, x, radius, norm, directions, rng):
    plain = not isinstance(function, keras.Layer)

    def evaluate(z):
        values = function(ops.convert_to_tensor(z)) if plain else _apply(function, z)
        return ops.convert_to_numpy(values).reshape(len(x), -1).astype(np.float64)

    base, largest = evaluate(x), 0.0
    for _ in range(directions):
        e = rng.standard_normal(x.shape)
        e *= radius / norms(e.reshape(len(x), -1), norm).reshape(len(x), *ones(x))
        moved = (x + e).astype(np.float32)
        sizes = norms((moved.astype(np.float64) - x).reshape(len(x), -1), norm)
        largest = max(largest, float(np.max(norms(evaluate(moved) - base, norm) / sizes)))
    return largest
