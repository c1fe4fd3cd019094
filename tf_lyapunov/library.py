"""What `import tf_lyapunov` gives, with Keras: everything that loading a model must know.

The command line imports it with the first command that works, so that `--help` and `--version`
need no Keras.
"""

# ruff: noqa: F401
import importlib.util

from tf_lyapunov import startup

try:
    with startup.quiet():
        import keras
except ImportError as error:
    missing = (error.name or "").split(".")[0]
    if missing not in ("tensorflow", "jax", "torch") or importlib.util.find_spec(missing):
        raise
    raise ImportError(
        f"Keras found no backend: {missing!r} is not installed. Set KERAS_BACKEND=jax or torch "
        "(whichever is installed), or install tf_lyapunov[tensorflow].",
        name=missing,
    ) from None

# Importing these registers what `keras.models.load_model` must know.
from tf_lyapunov import (
    attacks,
    callbacks,
    constraints,
    layers,
    losses,
    metrics,
    optimizers,
    regularizers,
    training,
)
from tf_lyapunov.bounds.layer_indices import layer_indices
from tf_lyapunov.certification import certify, lipschitz_upper_bound, register_gain
from tf_lyapunov.certification.perturbation import minimal_perturbation_lower_bound
from tf_lyapunov.design import Design, spectral_design
from tf_lyapunov.export import condense, export_plain
from tf_lyapunov.growth import growth_upper_bounds
from tf_lyapunov.projection import constrain, project
from tf_lyapunov.theory.balls import L2, Linf
from tf_lyapunov.theory.sectors import Indices, Sector
