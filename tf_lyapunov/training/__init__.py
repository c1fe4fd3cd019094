"""Training methods that wrap a classifier and work inside `fit`, to compare with or combine.

Each takes a model, `AdversarialModel` and `BoundTraining` also one of the others. Constraints and
regularizers of the model's layers, such as `constraints.ParsevalFrame`, act as in plain training.
"""

from tf_lyapunov.training.adversarial import AdversarialModel
from tf_lyapunov.training.balance import initialize_for_bounds
from tf_lyapunov.training.base import TrainingModel
from tf_lyapunov.training.bounded import BoundTraining
from tf_lyapunov.training.laplacian import LaplacianModel, label_smoothness
from tf_lyapunov.training.nonexpansive import NonexpansiveModel, distance_contraction, l2nn
from tf_lyapunov.training.perturbation import (
    ContractiveModel,
    OutputMarginModel,
    StabilityModel,
    fgs_regularized,
    output_distance,
)

__all__ = [
    "AdversarialModel",
    "BoundTraining",
    "ContractiveModel",
    "LaplacianModel",
    "NonexpansiveModel",
    "OutputMarginModel",
    "StabilityModel",
    "TrainingModel",
    "distance_contraction",
    "fgs_regularized",
    "initialize_for_bounds",
    "l2nn",
    "label_smoothness",
    "output_distance",
]
