"""Losses for classifiers whose gain is bounded.

A network with a small gain cannot make its logits large, so plain cross-entropy never gets
confident and underfits. Both losses here reward margins instead: the temperature lives in the
loss, never in the model, and so changes no certificate.
"""

from __future__ import annotations

import math

import keras
from keras import ops


def _positive(name: str, value: float, hint: str) -> float:
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(
            f"`{name}` must be positive and finite. Received: {name}={value!r}. {hint}"
        )
    return number


def _not_negative(name: str, value: float, hint: str) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(
            f"`{name}` must be non-negative and finite. Received: {name}={value!r}. {hint}"
        )
    return number


def _one_hot(y_true, y_pred):
    """One-hot labels in the shape and dtype of the logits, from integers or one-hot rows."""
    classes = y_pred.shape[-1]
    if classes is None or classes < 2:
        raise ValueError(
            "The loss needs at least two logits per sample, one for each class. "
            f"Received: y_pred.shape={tuple(y_pred.shape)}."
        )
    if len(y_true.shape) == len(y_pred.shape):
        if y_true.shape[-1] == classes:
            return ops.cast(y_true, y_pred.dtype)
        if y_true.shape[-1] == 1:
            y_true = ops.squeeze(y_true, axis=-1)
        else:
            raise ValueError(
                "Labels must be integers of shape (batch,) or (batch, 1), or one-hot rows as wide "
                f"as the logits. Received: y_true.shape={tuple(y_true.shape)}, "
                f"y_pred.shape={tuple(y_pred.shape)}."
            )
    return ops.one_hot(ops.cast(y_true, "int32"), classes, dtype=y_pred.dtype)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class TemperatureCrossEntropy(keras.losses.Loss):
    """Cross-entropy of the logits divided by a temperature, on the scale of the logits.

    With logits f, label y, temperature T > 0 and margin m ≥ 0,

        loss = T · log Σ_j exp((f_j - f_y + m·[j ≠ y]) / T).

    T = 1, m = 0 is plain cross-entropy. As T → 0 the loss becomes the hinge
    max_{j≠y} (f_j - f_y + m)₊. The factor T in front keeps the gradient with respect to the logits
    at most √2 for every T, so learning rates carry over. A network of gain L is certified at radius
    r where its margin is above √2·L·r: that is the natural size of m.

    Args:
        temperature: positive float T, in units of the logits.
        margin: non-negative float m, in units of the logits.
        reduction: as in Keras.
        name: as in Keras.

    Example:

    >>> import numpy as np
    >>> loss = TemperatureCrossEntropy(temperature=0.1)
    >>> bool(loss(np.array([0]), np.array([[1.0, 0.0, 0.0]])) < 1e-4)
    True

    Reference: theory.md section 6; the temperature follows Béthune et al., "Pay attention to your
    loss" (NeurIPS 2022), whose τ is 1/T.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        margin: float = 0.0,
        reduction: str = "sum_over_batch_size",
        name: str = "temperature_cross_entropy",
        **kwargs,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.temperature = _positive(
            "temperature", temperature, "Values below 1 sharpen the loss of a small-gain network."
        )
        self.margin = _not_negative("margin", margin, "Pass 0 for no margin.")

    def call(self, y_true, y_pred):
        y_pred = ops.convert_to_tensor(y_pred)
        target = _one_hot(ops.convert_to_tensor(y_true), y_pred)
        correct = ops.sum(target * y_pred, axis=-1, keepdims=True)
        shifted = (y_pred - correct + self.margin * (1.0 - target)) / self.temperature
        return self.temperature * ops.logsumexp(shifted, axis=-1)

    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature, "margin": self.margin}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class MultiMargin(keras.losses.Loss):
    """Multi-class hinge loss, averaged over the classes.

    With K logits f, label y and margin m > 0,

        loss = (1/K) · Σ_{j≠y} max(0, m - f_y + f_j).

    It is zero exactly when every pairwise margin reaches m; a network of gain L is then certified
    at radius m/(√2·L).

    Args:
        margin: positive float m, in units of the logits.
        reduction: as in Keras.
        name: as in Keras.

    Example:

    >>> import numpy as np
    >>> float(MultiMargin(margin=0.5)(np.array([0]), np.array([[1.0, 0.5, 0.75, 0.0]])))
    0.0625

    Reference: Meunier et al. (2022), section 5 (margin 0.7), as published.
    """

    def __init__(
        self,
        margin: float = 0.7,
        reduction: str = "sum_over_batch_size",
        name: str = "multi_margin",
        **kwargs,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.margin = _positive("margin", margin, "The papers' value is 0.7 for gain 1.")

    def call(self, y_true, y_pred):
        y_pred = ops.convert_to_tensor(y_pred)
        target = _one_hot(ops.convert_to_tensor(y_true), y_pred)
        correct = ops.sum(target * y_pred, axis=-1, keepdims=True)
        hinge = ops.relu(self.margin - correct + y_pred) * (1.0 - target)
        return ops.mean(hinge, axis=-1)

    def get_config(self):
        return {**super().get_config(), "margin": self.margin}
