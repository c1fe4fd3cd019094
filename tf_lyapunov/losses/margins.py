"""Losses that reward a margin: cross-entropies with temperature and offset, and hinges."""

from __future__ import annotations

import math

import keras
from keras import ops

from tf_lyapunov.losses.labels import (
    labelled,
    labelled_by_memberships,
    margins,
    memberships,
    not_negative,
    positive,
    unchecked_one_hot,
)

_register = keras.saving.register_keras_serializable(package="tf_lyapunov")


@_register
class TemperatureCrossEntropy(keras.losses.Loss):
    """Cross-entropy of the logits divided by a temperature, on the scale of the logits.

    With logits f, label y, temperature T > 0 and margin m ≥ 0,

        loss = T · log Σ_j exp((f_j - f_y + m·[j ≠ y]) / T).

    A single logit f is that of class 1 beside 0 for class 0: T·log(1 + exp((m ∓ f)/T)).
    T = 1, m = 0 is plain cross-entropy; T = 1/τ, m = 0 the τ-cross-entropy; T = 1/4, m = √2 the
    margin-calibrated cross-entropy of almost-orthogonal layers. As T → 0 the loss becomes the hinge
    max_{j≠y} (f_j - f_y + m)₊. The factor T in front keeps the gradient with respect to the logits
    at most √2 for every T, so learning rates carry over. A network of gain L is certified at radius
    r where its margin is above √2·L·r: that is the natural size of m.

    Args:
        temperature: positive float T, in units of the logits.
        margin: non-negative float m, in units of the logits.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> loss = TemperatureCrossEntropy(temperature=0.1)
    >>> bool(loss(np.array([0]), np.array([[1.0, 0.0, 0.0]])) < 1e-4)
    True
    >>> one, two = np.array([[0.3], [-0.2]]), np.array([[0.0, 0.3], [0.0, -0.2]])
    >>> bool(abs(loss(np.array([1, 0]), one) - loss(np.array([1, 0]), two)) < 1e-6)
    True

    Reference: Béthune et al., "Pay attention to your loss" (NeurIPS 2022), whose τ is 1/T; Prach
    and Lampert, "Almost-orthogonal layers" (ECCV 2022), whose t and u are T and m.
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
        self.temperature = positive(
            "temperature", temperature, "Values below 1 sharpen the loss of a small-gain network."
        )
        self.margin = not_negative("margin", margin, "Pass 0 for no margin.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        entropy = _cross_entropy(y_true, y_pred, self.temperature, self.margin)
        return labelled(self.temperature * entropy, y_true, y_pred)

    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature, "margin": self.margin}


def _cross_entropy(y_true, y_pred, temperature, margin):
    """log Σ_j exp((f_j - f_y + m·[j ≠ y]) / T) per sample."""
    if y_pred.shape[-1] == 1:
        sign = 2 * memberships(y_true, y_pred) - 1
        return ops.softplus((margin - sign * y_pred)[..., 0] / temperature)
    target = unchecked_one_hot(y_true, y_pred)
    correct = ops.sum(target * y_pred, axis=-1, keepdims=True)
    shifted = (y_pred - correct + margin * (1.0 - target)) / temperature
    return ops.logsumexp(shifted, axis=-1)


@_register
class LossAnnealing(keras.losses.Loss):
    """Cross-entropy with offset and temperature whose pull fades as the margin grows (LA).

    With p = exp(-ℓ) the probability of the label y under logits f - ξ·e_y over T,

        ℓ = log Σ_j exp((f_j - f_y + ξ·[j ≠ y]) / T),   loss = T · (1 - p)^β · ℓ.

    β = 0 is `TemperatureCrossEntropy(T, ξ)`. A large β gives up the hardest gains of samples that
    already have their margin, and spreads a limited capacity over the others.

    Args:
        temperature: positive float T, in units of the logits.
        offset: non-negative float ξ, in units of the logits.
        beta: 0, or a float of at least 1 (between them the derivative is unbounded at p = 1).
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> loss = LossAnnealing(temperature=1.0, offset=0.0, beta=1.0)
    >>> round(float(loss(np.array([0]), np.array([[0.0, 0.0]]))), 6)  # ½·log 2
    0.346574

    Reference: Lai et al., "Enhancing certified robustness via block reflector orthogonal layers
    and logit annealing loss" (ICML 2025), who call it logit annealing; defaults of the released
    code.
    """

    def __init__(
        self,
        temperature: float = 0.75,
        offset: float = 2.0,
        beta: float = 5.0,
        reduction: str = "sum_over_batch_size",
        name: str = "loss_annealing",
        **kwargs,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.temperature = positive("temperature", temperature, "A usual value is 0.75.")
        self.offset = not_negative("offset", offset, "Pass 0 for no offset.")
        self.beta = not_negative("beta", beta, "A usual value is 5.")
        if 0 < self.beta < 1:
            raise ValueError(f"`beta` must be 0 or at least 1. Received: beta={beta!r}.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        entropy = _cross_entropy(y_true, y_pred, self.temperature, self.offset)
        if self.beta > 0:
            # Rounding may leave the entropy of a sure label below 0.
            entropy = ops.relu(entropy)
            entropy = ops.power(-ops.expm1(-entropy), self.beta) * entropy
        return labelled(self.temperature * entropy, y_true, y_pred)

    def get_config(self):
        own = {"temperature": self.temperature, "offset": self.offset, "beta": self.beta}
        return {**super().get_config(), **own}


@_register
class CertificateRegularization(keras.losses.Loss):
    """A loss minus a reward for the certified radius of correct decisions.

    With logits f of Lipschitz constant L and label y,

        loss = base(y, f) - γ · max(0, f_y - max_{j≠y} f_j) / (√2·L).

    Args:
        gamma: non-negative float γ, per unit of radius.
        gain: positive float L, the bound that the model is built for; it only sets the scale of
            the reward, nothing is certified by it.
        loss: the base, a Keras loss of logits that has a value per sample; by default
            `TemperatureCrossEntropy()`, which is plain cross-entropy.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `loss` is no `keras.losses.Loss`.

    Example:

    >>> import numpy as np
    >>> loss = CertificateRegularization(0.5, loss=MultiMargin(0.7))
    >>> round(float(loss(np.array([0]), np.array([[2.0, 0.0]]))), 6)  # 0 - 0.5·√2
    -0.707107

    Reference: Singla, Singla and Feizi, "Improved deterministic l2 robustness on CIFAR-10 and
    CIFAR-100" (ICLR 2022), as published.
    """

    def __init__(
        self,
        gamma: float = 0.5,
        gain: float = 1.0,
        loss=None,
        reduction: str = "sum_over_batch_size",
        name: str = "certificate_regularization",
        **kwargs,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.gamma = not_negative("gamma", gamma, "The usual value is 0.5.")
        self.gain = positive("gain", gain, "A network of 1-Lipschitz layers has gain 1.")
        self.loss = TemperatureCrossEntropy() if loss is None else keras.losses.get(loss)
        if not isinstance(self.loss, keras.losses.Loss):
            raise TypeError(f"`loss` must be a `keras.losses.Loss`. Received: loss={loss!r}.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        margin = margins(unchecked_one_hot(y_true, y_pred), y_pred)
        reward = self.gamma / (math.sqrt(2.0) * self.gain)
        return labelled(self.loss.call(y_true, y_pred) - reward * ops.relu(margin), y_true, y_pred)

    def get_config(self):
        own = {"gamma": self.gamma, "gain": self.gain, "loss": keras.losses.serialize(self.loss)}
        return {**super().get_config(), **own}


@_register
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

    Raises:
        ValueError: if the margin is out of range.

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
        self.margin = positive("margin", margin, "The papers' value is 0.7 for gain 1.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        target = unchecked_one_hot(y_true, y_pred)
        correct = ops.sum(target * y_pred, axis=-1, keepdims=True)
        hinge = ops.relu(self.margin - correct + y_pred) * (1.0 - target)
        return labelled(ops.mean(hinge, axis=-1), y_true, y_pred)

    def get_config(self):
        return {**super().get_config(), "margin": self.margin}


@_register
class HingeMargin(keras.losses.Loss):
    """Hinge loss that asks for a distance of `min_margin` between the two classes of each output.

    With outputs f_k and signs s_k = ±1 for membership of class k,

        loss = mean_k max(0, m/2 - s_k·f_k).

    Args:
        min_margin: positive float m, in units of the logits.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if the margin is out of range.

    Example:

    >>> import numpy as np
    >>> float(HingeMargin(1.0)(np.array([[1], [0]]), np.array([[0.25], [-2.0]])))
    0.125

    Reference: Serrurier et al. (CVPR 2021); labels and m/2 as in deel-lip.
    """

    def __init__(
        self,
        min_margin: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str = "hinge_margin",
        **kwargs,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.min_margin = positive("min_margin", min_margin, "It is a distance between logits.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        sign = 2.0 * memberships(y_true, y_pred) - 1.0
        hinge = ops.mean(ops.relu(self.min_margin / 2 - sign * y_pred), axis=-1)
        return labelled_by_memberships(hinge, y_true, y_pred)

    def get_config(self):
        return {**super().get_config(), "min_margin": self.min_margin}
