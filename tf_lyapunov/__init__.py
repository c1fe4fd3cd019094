"""Training and certifying robust neural networks in Keras 3.

design = tfl.spectral_design(tfl.Indices(delta=0.4, nu=-2.0), sectors)   # claim -> budgets
tfl.constrain(model, design)                                             # plain Keras model
model.fit(x, y, callbacks=[tfl.callbacks.LyapunovMonitor(design)])
proof = tfl.certify(model, x_test, y_test)                               # radius per input
tfl.attacks.PGD(radius=tfl.L2(0.5))(model, x_test, y_test)               # tries to break it
"""

__version__ = "0.2.0"

import importlib

from tf_lyapunov import startup

if not startup.is_command_line():
    from tf_lyapunov.library import (
        L2,
        Design,
        Indices,
        Linf,
        Sector,
        attacks,
        callbacks,
        certify,
        condense,
        constrain,
        constraints,
        export_plain,
        growth_upper_bounds,
        layer_indices,
        layers,
        lipschitz_upper_bound,
        losses,
        metrics,
        minimal_perturbation_lower_bound,
        optimizers,
        project,
        register_gain,
        regularizers,
        spectral_design,
        training,
    )

# Public name: where it is, imported when first used.
_MODULES = {
    "control": "control",
    "datasets": "data.arrays",
    "dynamics": "dynamics",
    "evaluation": "evaluation",
    "experiments": "experiments",
    "models": "models",
    "planning": "planning",
    "streams": "data.streams",
    "theory": "theory",
    "verification": "verification",
}
_FUNCTIONS = {
    "bracket": "tf_lyapunov.evaluation.bracket:bracket",
    "certify_dynamics": "tf_lyapunov.dynamics.certifying:certify_dynamics",
    "Property": "tf_lyapunov.local.property:Property",
    "Region": "tf_lyapunov.local.regions:Region",
    "evaluate": "tf_lyapunov.evaluation.suite:evaluate_suite",
    "export_vnnlib": "tf_lyapunov.vnnlib.exporting:export_vnnlib",
    "export_onnx": "tf_lyapunov.onnx.export:export_onnx",
    "gain_on": "tf_lyapunov.local.outputs:gain_on",
    "output_bounds": "tf_lyapunov.local.outputs:output_bounds",
    "smallest_singular_value": "tf_lyapunov.bounds.singular_values:smallest_singular_value",
    "verify_property": "tf_lyapunov.local.verifying:verify_property",
    "load_onnx": "tf_lyapunov.onnx.load:load_onnx",
    "localized_robustness": "tf_lyapunov.evaluation.localized:localized_robustness",
}

__all__ = [
    "L2",
    "Design",
    "Indices",
    "Linf",
    "Sector",
    "attacks",
    "callbacks",
    "certify",
    "condense",
    "constrain",
    "constraints",
    "export_plain",
    "growth_upper_bounds",
    "layer_indices",
    "layers",
    "lipschitz_upper_bound",
    "losses",
    "metrics",
    "minimal_perturbation_lower_bound",
    "optimizers",
    "project",
    "register_gain",
    "regularizers",
    "spectral_design",
    "training",
]


def __getattr__(name):
    if name in __all__:  # on the command line, where `--help` needs none of them
        return getattr(importlib.import_module("tf_lyapunov.library"), name)
    if name in _MODULES:
        return importlib.import_module(f"tf_lyapunov.{_MODULES[name]}")
    if name in _FUNCTIONS:
        module, function = _FUNCTIONS[name].split(":")
        return getattr(importlib.import_module(module), function)
    raise AttributeError(f"module 'tf_lyapunov' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *_MODULES, *_FUNCTIONS})
