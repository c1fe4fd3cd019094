"""Losses from optimal transport: Kantorovich-Rubinstein, alone and with a hinge."""

from __future__ import annotations

import math

import keras
from keras import ops

from tf_lyapunov.losses.labels import (
    labelled,
    labelled_by_memberships,
    memberships,
    not_negative,
    positive,
    unchecked_one_hot,
)
from tf_lyapunov.losses.margins import HingeMargin
from tf_lyapunov.losses.replicas import over_replicas

_register = keras.saving.register_keras_serializable(package="tf_lyapunov")


def _separation(y_true, y_pred):
    """Per-sample terms whose mean is mean_k (E[f_k | class k] - E[f_k | the rest]).

    The means are those of the whole batch, on all replicas together; a class that is absent, or
    all there is, adds nothing for its empty side.
    """
    member = memberships(y_true, y_pred)
    share = ops.cast(ops.shape(y_pred)[0], y_pred.dtype)
    (size, count), replicas = over_replicas(share, ops.sum(member, axis=0, keepdims=True))
    inside = member / ops.maximum(count, 1.0)
    outside = (1.0 - member) / ops.maximum(size - count, 1.0)
    # Keras divides by the share of this replica, and by their number.
    terms = ops.mean(share * replicas * y_pred * (inside - outside), axis=-1)
    return labelled_by_memberships(terms, y_true, y_pred)


@_register
class KR(keras.losses.Loss):
    """Negative Kantorovich-Rubinstein separation of each class from the rest.

        loss = -mean_k ( E[f_k | class k] - E[f_k | not class k] )

    Over all 1-Lipschitz f its minimum is minus the Wasserstein-1 distance of the two distributions
    (averaged over the classes): for a network of gain 1, -loss is a lower estimate of it. The means
    are those of the whole batch: under `tf.distribute` the counts of the replicas are summed.

    Args:
        reduction: as in Keras.
        name: as in Keras.

    Example:

    >>> import numpy as np
    >>> float(KR()(np.array([[1], [1], [0]]), np.array([[1.0], [3.0], [-1.0]])))
    -3.0

    Reference: Serrurier et al. (CVPR 2021). The negative of deel-lip's `KR` and
    `MulticlassKR`, so that it can be minimised as it is.
    """

    def __init__(self, reduction: str = "sum_over_batch_size", name: str = "kr", **kwargs):
        super().__init__(reduction=reduction, name=name, **kwargs)

    def call(self, y_true, y_pred):
        return -_separation(ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred))


class _HingeKR(keras.losses.Loss):
    """α·hinge - separation; the hinge alone for α = ∞."""

    def __init__(self, alpha, reduction, name, **kwargs):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.alpha = float(alpha)
        if not self.alpha >= 0:
            raise ValueError(
                f"`alpha` must be non-negative. Received: alpha={alpha!r}. Pass `float('inf')` for "
                "the hinge alone."
            )

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        hinge = self.hinge.call(y_true, y_pred)
        if self.alpha == math.inf:
            return hinge
        return self.alpha * hinge - _separation(y_true, y_pred)

    def get_config(self):
        # JSON has no infinity; float("inf") reads the word.
        alpha = "inf" if self.alpha == math.inf else self.alpha
        return {**super().get_config(), "alpha": alpha, "min_margin": self.hinge.min_margin}


@_register
class HKR(_HingeKR):
    """Hinge-regularised Kantorovich-Rubinstein loss of one logit, or of several labels.

        loss = KR(y, f) + α · HingeMargin(y, f)

    Args:
        alpha: non-negative float α; 0 is `KR`, `float("inf")` is `HingeMargin`.
        min_margin: positive float, see `HingeMargin`.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> float(HKR(alpha=10.0)(np.array([[1], [0]]), np.array([[0.25], [-2.0]])))
    -1.0

    Reference: Serrurier et al. (CVPR 2021), as in deel-lip.
    """

    def __init__(
        self,
        alpha: float = 10.0,
        min_margin: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str = "hkr",
        **kwargs,
    ):
        super().__init__(alpha, reduction, name, **kwargs)
        self.hinge = HingeMargin(min_margin)


@_register
class MulticlassHinge(keras.losses.Loss):
    """Hinge that asks the label's logit to be above m/2 and the others to be below -m/2.

    With K logits f and label y,

        loss = Σ_{j≠y} w_j · [ max(0, m/2 - f_y) + max(0, m/2 + f_j) ],

    w_j = 1/K, or in the soft form the softmax of τ·f_j over j ≠ y, which looks at the strongest
    rivals.

    Args:
        min_margin: positive float m, in units of the logits.
        soft_hinge_tau: non-negative float τ; 0 for equal weights.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> float(MulticlassHinge(1.0)(np.array([0]), np.array([[0.25, -0.25]])))
    0.25

    Reference: `MulticlassHinge` of deel-lip, after Serrurier et al. (CVPR 2021).
    """

    def __init__(
        self,
        min_margin: float = 1.0,
        soft_hinge_tau: float = 0.0,
        reduction: str = "sum_over_batch_size",
        name: str = "multiclass_hinge",
        **kwargs,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.min_margin = positive("min_margin", min_margin, "It is a distance between logits.")
        self.soft_hinge_tau = not_negative("soft_hinge_tau", soft_hinge_tau, "0 is the hard form.")

    def call(self, y_true, y_pred):
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        target = unchecked_one_hot(y_true, y_pred)
        half = self.min_margin / 2
        correct = ops.sum(target * y_pred, axis=-1, keepdims=True)
        hinge = ops.relu(half - correct) + ops.relu(half + y_pred)
        if self.soft_hinge_tau == 0:
            return labelled(ops.mean((1.0 - target) * hinge, axis=-1), y_true, y_pred)
        rivals = ops.where(
            target > 0, ops.full_like(y_pred, -math.inf), self.soft_hinge_tau * y_pred
        )
        losses = ops.sum(ops.softmax(rivals, axis=-1) * hinge, axis=-1)
        return labelled(losses, y_true, y_pred)

    def get_config(self):
        own = {"min_margin": self.min_margin, "soft_hinge_tau": self.soft_hinge_tau}
        return {**super().get_config(), **own}


@_register
class MulticlassHKR(_HingeKR):
    """Hinge-regularised Kantorovich-Rubinstein loss for K classes, hard or soft.

        loss = KR(y, f) + α · MulticlassHinge(y, f)

    Args:
        alpha: non-negative float α; 0 is `KR`, `float("inf")` is `MulticlassHinge`.
        min_margin, soft_hinge_tau: see `MulticlassHinge`.
        reduction: as in Keras.
        name: as in Keras.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> loss = MulticlassHKR(alpha=1.0)
    >>> float(loss(np.array([0, 1]), np.array([[1.0, -1.0], [-1.0, 1.0]])))
    -2.0

    Reference: `MulticlassHKR` of deel-lip, after Serrurier et al. (CVPR 2021).
    """

    def __init__(
        self,
        alpha: float = 10.0,
        min_margin: float = 1.0,
        soft_hinge_tau: float = 0.0,
        reduction: str = "sum_over_batch_size",
        name: str = "multiclass_hkr",
        **kwargs,
    ):
        super().__init__(alpha, reduction, name, **kwargs)
        self.hinge = MulticlassHinge(min_margin, soft_hinge_tau)

    def get_config(self):
        return {**super().get_config(), "soft_hinge_tau": self.hinge.soft_hinge_tau}
