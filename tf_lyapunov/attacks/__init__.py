"""Adversarial attacks with honest failure reports, on any Keras backend."""

from tf_lyapunov.attacks.base import Attack, AttackResult
from tf_lyapunov.attacks.gradient import FGM, FGSM, PGD

__all__ = ["FGM", "FGSM", "PGD", "Attack", "AttackResult"]
