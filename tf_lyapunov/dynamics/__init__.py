"""Systems with memory: supply rates over sequences, and what weights prove of them.

A supply rate is what `layers.RecurrentEquilibrium` is made for, or what `certify_dynamics` is asked
about; `Indices` is the one of `tf_lyapunov` itself.
"""

from tf_lyapunov.dynamics.certificate import DynamicsCertificate, StageGain
from tf_lyapunov.dynamics.certifying import certify_dynamics
from tf_lyapunov.dynamics.splitting import split_gain, supplies_of
from tf_lyapunov.dynamics.systems import System
from tf_lyapunov.theory.supply_rates import Contracting, L2Gain, Supply

__all__ = [
    "Contracting",
    "DynamicsCertificate",
    "L2Gain",
    "StageGain",
    "Supply",
    "System",
    "certify_dynamics",
    "split_gain",
    "supplies_of",
]
