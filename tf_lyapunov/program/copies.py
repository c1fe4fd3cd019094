"""Copies of this library's layers that compute in float64 with the weights of the original."""

import keras

from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.condensing import fix
from tf_lyapunov.layers.potential import PotentialLayer
from tf_lyapunov.layers.skew import SkewOrthogonalConv2D
from tf_lyapunov.program.families.fused import HELD
from tf_lyapunov.program.families.skew import skew_scale


def float64_config(layer):
    """Configuration of a layer of this library for an evaluation in float64 (`fix_as_used`).

    Args:
        layer: a built `LipschitzLayer`.
    """
    config = {
        key: value for key, value in layer.get_config().items() if not key.endswith("initializer")
    }
    activation = getattr(layer, "activation", None)
    if type(activation) in HELD:
        inner = type(activation).from_config({**activation.get_config(), "dtype": "float64"})
        config["activation"] = keras.saving.serialize_keras_object(inner)
    if isinstance(layer, PotentialLayer):
        config["max_gain"] = rounded_down(layer.max_gain, layer.compute_dtype)
    return config


def fix_as_used(copy, layer):
    """Makes a copy in float64 compute with the weights that `layer` uses at inference.

    Its own, computed from the raw variables in float64, would be others.

    Args:
        copy: the built copy, changed in place.
        layer: the original.
    """
    fix(copy, layer.effective_values())
    if isinstance(layer, SkewOrthogonalConv2D):
        scale = skew_scale(layer)
        copy.output_scale = lambda terms: scale
