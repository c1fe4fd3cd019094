"""Laplacian networks: the label signal on the batch's graph changes little from layer to layer."""

from __future__ import annotations

import itertools

import keras
from keras import ops

from tf_lyapunov.attacks.logits import two_columns
from tf_lyapunov.layers import TwoSidedReLU
from tf_lyapunov.losses.labels import class_of_sign, one_hot
from tf_lyapunov.spectral.arguments import count, positive
from tf_lyapunov.training.base import TrainingModel


def label_smoothness(features, labels, power=2):
    """Smoothness of the label signal on the cosine graph of a batch.

        s = tr(Yᵀ Lᵐ Y),   L = D - C,   C_ij = <h_i, h_j> / (‖h_i‖‖h_j‖),   D = diag(C·1)    (1)

    computed in float32 or better. A zero row has similarity 0 to every other, and no gradient.

    Args:
        features: h, tensor (n, ...), not negative at ReLU outputs.
        labels: Y, one-hot, (n, classes).
        power: m, a positive integer.

    Returns:
        Scalar tensor; 0 where all samples are of one class.

    Example:

    >>> import numpy as np
    >>> h = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], "float32")
    >>> float(label_smoothness(h, np.eye(2, dtype="float32")[[0, 1, 1]], power=1))
    2.0

    Reference: Lassance, Gripon, Ortega, "Laplacian networks" (2018), eq. (2); as published.
    """
    h = _wide(ops.reshape(features, (ops.shape(features)[0], -1)))
    y = ops.cast(labels, h.dtype)
    # Scaled first: squares of large or tiny activations would leave float32.
    top = ops.stop_gradient(ops.max(ops.abs(h), axis=1, keepdims=True))
    alive = top > 0
    h = h / ops.where(alive, top, ops.ones_like(top))
    square = ops.sum(ops.square(h), axis=1, keepdims=True)
    h = h / ops.sqrt(ops.where(alive, square, ops.ones_like(square)))
    similarity = ops.matmul(h, ops.transpose(h))
    degree = ops.sum(similarity, axis=1, keepdims=True)

    def laplacian(signal):
        return degree * signal - ops.matmul(similarity, signal)

    half = y
    for _ in range(power // 2):
        half = laplacian(half)
    return ops.sum(half * (laplacian(half) if power % 2 else half))


def _wide(x):
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class LaplacianModel(TrainingModel):
    """Trains a classifier with the Laplacian smoothness penalty at its ReLU outputs.

        loss = (compiled loss) + γᵐ · mean_l |s_l - s_{l-1}|                               (1)

    over consecutive named layers, with s of `label_smoothness`. A heuristic about the boundary
    between classes; it bounds no gain. s grows as the (m+1)-th power of the batch size. The
    penalty is part of training alone: `evaluate` reports the compiled loss. Cost: one more
    product of the batch's features with their transpose per layer.

    `fit` runs on every backend. Wrapped into an `AdversarialModel`, the penalty is taken on the
    adversarial inputs too. `.plain` is the model to use, save and certify.

    Args:
        model: functional or sequential classifier, or a training method around one.
        layers: names of at least two layers with ReLU outputs, from the input on.
        gamma: γ > 0.
        power: m, a positive integer.

    Raises:
        TypeError: if `layers` holds no names.
        ValueError: if a name is unknown, fewer than two are given, a layer is no ReLU, or `model`
            has no graph.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"),
    ...                           keras.layers.Dense(3, "relu", name="b"), keras.layers.Dense(2)])
    >>> LaplacianModel(model, ["a", "b"]).plain is model
    True

    Reference: Lassance, Gripon, Ortega, "Laplacian networks" (2018), section 3; as published.
    """

    def __init__(self, model, layers=(), gamma=0.01, power=2, **kwargs):
        if isinstance(layers, str):
            raise TypeError(f"`layers` must be a sequence of names. Received: layers={layers!r}.")
        super().__init__(model, layers, **kwargs)
        self.gamma = positive("gamma", gamma, (1e-12, 1e12))
        self.power = count("power", power, 64)
        relus = [layer.name for layer in self.plain.layers if _is_relu(layer)]
        others = [name for name in self.layer_names if name not in relus]
        if others or len(set(self.layer_names)) < 2:
            raise ValueError(
                "The Laplacian penalty compares consecutive ReLU outputs: `layers` must name at "
                f"least two different ones. Received: layers={self.layer_names}. Model "
                f"{self.plain.name!r} has {relus}."
            )

    def objective(self, owner, x, y, found, sample_weight):
        own = class_of_sign(y, found["outputs"])
        labels = one_hot(own, ops.cast(two_columns(found["outputs"]), "float32"))
        hidden = [found["layers"][name] for name in self.layer_names]
        s = [label_smoothness(h, labels, self.power) for h in hidden]
        changes = [ops.abs(b - a) for a, b in itertools.pairwise(s)]
        penalty = self.gamma**self.power * sum(changes) / len(changes)
        loss = super().objective(owner, x, y, found, sample_weight)
        return loss + ops.cast(penalty, loss.dtype)

    def get_config(self):
        own = {"layers": self.layer_names, "gamma": self.gamma, "power": self.power}
        return {**super().get_config(), **own}


def _is_relu(layer):
    if isinstance(layer, keras.layers.ReLU):
        return not layer.negative_slope
    return isinstance(layer, TwoSidedReLU) or (
        getattr(layer, "activation", None) is keras.activations.relu
    )
