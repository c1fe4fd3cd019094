"""Losses of the strongest rivals: the label's logit against a soft maximum of the others."""

from __future__ import annotations

import math

import keras
from keras import ops

from tf_lyapunov.losses.labels import labelled, not_negative, positive, unchecked_one_hot
from tf_lyapunov.losses.replicas import over_replicas

_register = keras.saving.register_keras_serializable(package="tf_lyapunov")
# As published; between them the softmax neither dies nor saturates.
_SOFTEST, _SHARPEST = 0.005, 250.0


def _split(y_true, y_pred):
    """The label's logit (n,), and the logits with -∞ in its place (n, K)."""
    target = unchecked_one_hot(y_true, y_pred)
    own = ops.sum(target * y_pred, axis=-1)
    return own, ops.where(target > 0, ops.full_like(y_pred, -math.inf), y_pred)


class _RivalHKR(keras.losses.Loss):
    """α·hinge - (own logit - that of the rivals), per sample; the hinge alone for α = ∞."""

    def __init__(self, alpha, min_margin, reduction, name, **kwargs):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.alpha = float(alpha)
        if not self.alpha >= 0:
            raise ValueError(
                f"`alpha` must be non-negative. Received: alpha={alpha!r}. Pass `float('inf')` for "
                "the hinge alone."
            )
        self.min_margin = positive("min_margin", min_margin, "It is a distance between logits.")

    def _combined(self, hinge, separation, y_true, y_pred):
        if self.alpha == math.inf:
            return labelled(hinge, y_true, y_pred)
        return labelled(self.alpha * hinge - separation, y_true, y_pred)

    def get_config(self):
        # JSON has no infinity; float("inf") reads the word.
        alpha = "inf" if self.alpha == math.inf else self.alpha
        return {**super().get_config(), "alpha": alpha, "min_margin": self.min_margin}


@_register
class MulticlassSoftHKR(_RivalHKR):
    """HKR loss in which the rivals of a label count by their softmax.

    With K ≥ 2 logits f, label y, and w the softmax of τ·f_j over j ≠ y,

        loss = Σ_{j≠y} w_j·f_j - f_y + α·[ max(0, m/2 - f_y) + Σ_{j≠y} w_j·max(0, m/2 + f_j) ],
        τ = T·m / max(mean |f|, m), at least 0.005 and at most 250,

    the mean over all logits of the batch (of all replicas together). τ is a constant to the
    gradient; that of w is kept. While logits grow past the margin, the softmax keeps its scale.

    Args:
        alpha: non-negative float α; 0 is the separation alone, `float("inf")` the hinge alone.
        min_margin: positive float m, in units of the logits.
        temperature: positive float T, without units; the larger, the more the strongest rival
            counts.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> loss = MulticlassSoftHKR(alpha=1.0)
    >>> float(loss(np.array([0]), np.array([[1.0, -0.25]])))  # -1.25 + (0 + 0.25)
    -1.0

    Reference: Serrurier et al., "On the explainable properties of 1-Lipschitz neural networks"
    (NeurIPS 2023); `SoftHKRMulticlassLoss` of deel-torchlip with `alpha_mean=0`, whose `alpha` is
    α/(1 + α) and whose loss is this one's over 1 + α. Its moving mean of |f| is state that compiled
    steps cannot all keep; here it is the batch's.
    """

    def __init__(
        self,
        alpha: float = 10.0,
        min_margin: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str = "multiclass_soft_hkr",
        **kwargs,
    ):
        super().__init__(alpha, min_margin, reduction, name, **kwargs)
        self.temperature = positive("temperature", temperature, "The usual value is 1.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        own, rivals = _split(y_true, y_pred)
        weights = ops.softmax(self._sharpness(y_pred) * rivals, axis=-1)
        half = self.min_margin / 2
        separation = own - ops.sum(weights * y_pred, axis=-1)
        hinge = ops.relu(half - own) + ops.sum(weights * ops.relu(half + y_pred), axis=-1)
        return self._combined(hinge, separation, y_true, y_pred)

    def _sharpness(self, y_pred):
        still = ops.stop_gradient(ops.abs(y_pred))
        (means, one), _ = over_replicas(ops.mean(still), ops.ones((), y_pred.dtype))
        mean = ops.maximum(means / one, self.min_margin)
        return ops.clip(self.temperature * self.min_margin / mean, _SOFTEST, _SHARPEST)

    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature}


@_register
class LseHKR(_RivalHKR):
    """HKR loss of the label's logit against the log-sum-exp of the others.

    With K ≥ 2 logits, f = T times them, label y, margin m and p > 0,

        s = (1/t)·log Σ_{j≠y} exp(t·f_j),   t = 2·log(K - 1) / (p·m),
        loss = s - f_y + α·[ max(0, m/2 - f_y) + max(0, m/2 + s) ].

    s is at least the strongest rival and at most p·m/2 above it; with two classes it is the other
    logit. It is smooth where a maximum has kinks, so that all strong rivals are pushed down.

    Args:
        alpha: non-negative float α; 0 is the separation alone, `float("inf")` the hinge alone.
        min_margin: positive float m, in units of T times the logits.
        temperature: positive float T.
        penalty: positive float p: how much of m/2 the soft maximum may exceed the true one by.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> loss = LseHKR(alpha=1.0)
    >>> float(loss(np.array([0]), np.array([[1.0, -0.25]])))  # -1.25 + (0 + 0.25)
    -1.0

    Reference: `LseHKRMulticlassLoss` of deel-torchlip, whose `alpha` is α/(1 + α) and whose loss is
    this one's over 1 + α.
    """

    def __init__(
        self,
        alpha: float = 10.0,
        min_margin: float = 1.0,
        temperature: float = 1.0,
        penalty: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str = "lse_hkr",
        **kwargs,
    ):
        super().__init__(alpha, min_margin, reduction, name, **kwargs)
        self.temperature = positive("temperature", temperature, "The usual value is 1.")
        self.penalty = positive("penalty", penalty, "It is a share of half the margin.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        own, rivals = _split(y_true, self.temperature * y_pred)
        half = self.min_margin / 2
        strongest = _soft_maximum(rivals, y_pred.shape[-1], self.penalty * half)
        hinge = ops.relu(half - own) + ops.relu(half + strongest)
        return self._combined(hinge, own - strongest, y_true, y_pred)

    def get_config(self):
        own = {"temperature": self.temperature, "penalty": self.penalty}
        return {**super().get_config(), **own}


def _soft_maximum(rivals, classes, excess):
    """A smooth function between the maximum of K - 1 finite entries and `excess` above it."""
    if classes == 2:
        return ops.max(rivals, axis=-1)
    sharpness = math.log(classes - 1) / excess
    return ops.logsumexp(sharpness * rivals, axis=-1) / sharpness


@_register
class CategoricalHinge(keras.losses.Loss):
    """Hinge of the label's logit against its strongest rival.

    With K ≥ 2 logits f, label y and margin m,

        loss = max(0, m - f_y + max_{j≠y} f_j),

    which is zero exactly when every pairwise margin reaches m; a network of gain L is then
    certified at radius m/(√2·L). With a temperature T > 0 the maximum is the smooth
    T·log Σ_{j≠y} exp(f_j/T), at most T·log(K - 1) above it.

    Args:
        min_margin: positive float m, in units of the logits.
        temperature: non-negative float T, in units of the logits; 0 is the maximum itself.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> float(CategoricalHinge(1.0)(np.array([0]), np.array([[1.0, 0.5, -2.0]])))
    0.5

    Reference: Crammer and Singer (2001), as published; `CategoricalHinge` of deel-lip, but that
    the latter's strongest rival is never below 0.
    """

    def __init__(
        self,
        min_margin: float = 1.0,
        temperature: float = 0.0,
        reduction: str = "sum_over_batch_size",
        name: str = "categorical_hinge",
        **kwargs,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.min_margin = positive("min_margin", min_margin, "It is a distance between logits.")
        self.temperature = not_negative("temperature", temperature, "0 is the maximum itself.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        own, rivals = _split(y_true, y_pred)
        if self.temperature == 0:
            strongest = ops.max(rivals, axis=-1)
        else:
            strongest = self.temperature * ops.logsumexp(rivals / self.temperature, axis=-1)
        return labelled(ops.relu(self.min_margin - own + strongest), y_true, y_pred)

    def get_config(self):
        own = {"min_margin": self.min_margin, "temperature": self.temperature}
        return {**super().get_config(), **own}
