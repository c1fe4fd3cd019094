"""Adversarial attacks with honest failure reports, on any Keras backend."""

from tf_lyapunov.attacks.apgd import APGD
from tf_lyapunov.attacks.base import Attack, AttackResult
from tf_lyapunov.attacks.carlini_wagner import CarliniWagner
from tf_lyapunov.attacks.decoupled import DDN, FMN
from tf_lyapunov.attacks.ensemble import AutoAttack, Ensemble, EnsembleResult
from tf_lyapunov.attacks.fab import FAB
from tf_lyapunov.attacks.gradient import FGM, FGSM, PGD
from tf_lyapunov.attacks.lbfgs import LBFGS
from tf_lyapunov.attacks.linearised import DeepFool
from tf_lyapunov.attacks.minimal import (
    HotCold,
    IterativePerturbation,
    MinimalAttack,
    MinimalFGS,
    MinimalFGV,
)
from tf_lyapunov.attacks.square import Square

__all__ = [
    "APGD",
    "DDN",
    "FAB",
    "FGM",
    "FGSM",
    "FMN",
    "LBFGS",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "CarliniWagner",
    "DeepFool",
    "Ensemble",
    "EnsembleResult",
    "HotCold",
    "IterativePerturbation",
    "MinimalAttack",
    "MinimalFGS",
    "MinimalFGV",
    "Square",
]
