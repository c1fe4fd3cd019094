"""Losses for classifiers whose gain is bounded.

A network with a small gain cannot make its logits large, so plain cross-entropy never gets
confident and underfits. The losses here reward margins instead: temperatures and offsets live in
the loss, never in the model, and so change no certificate.
"""

from tf_lyapunov.losses.efficient import EfficientMargin, OffsetCrossEntropy
from tf_lyapunov.losses.margins import (
    CertificateRegularization,
    HingeMargin,
    LossAnnealing,
    MultiMargin,
    TemperatureCrossEntropy,
)
from tf_lyapunov.losses.soft_transport import CategoricalHinge, LseHKR, MulticlassSoftHKR
from tf_lyapunov.losses.transport import HKR, KR, MulticlassHinge, MulticlassHKR

__all__ = [
    "HKR",
    "KR",
    "CategoricalHinge",
    "CertificateRegularization",
    "EfficientMargin",
    "HingeMargin",
    "LossAnnealing",
    "LseHKR",
    "MultiMargin",
    "MulticlassHKR",
    "MulticlassHinge",
    "MulticlassSoftHKR",
    "OffsetCrossEntropy",
    "TemperatureCrossEntropy",
]
