"""Keras layers in float64 with the weights that a model's own layers use at inference: an oracle.

Nothing of the package's reading is used but the layers themselves: Keras computes.
"""

import keras
import numpy as np

from tf_lyapunov.layers.activations import Householder
from tf_lyapunov.layers.base import EffectiveLayer, rounded_down
from tf_lyapunov.layers.condensing import fix
from tf_lyapunov.layers.potential import PotentialLayer
from tf_lyapunov.layers.residual import ConvexCombination
from tf_lyapunov.layers.skew import SkewOrthogonalConv2D

# They use their weights as stored, whatever their compute dtype.
UNROUNDED = (keras.layers.BatchNormalization, Householder, ConvexCombination)


def in_float64(layer, inputs):
    """A copy of `layer` that computes in float64, built on arrays `inputs`."""
    config = {
        key: value
        for key, value in layer.get_config().items()
        if not key.endswith(("regularizer", "constraint", "initializer"))
    }
    if isinstance(getattr(layer, "activation", None), keras.Layer):
        held = layer.activation
        inner = type(held).from_config({**held.get_config(), "dtype": "float64"})
        config["activation"] = keras.saving.serialize_keras_object(inner)
    if isinstance(layer, PotentialLayer):
        config["max_gain"] = rounded_down(layer.max_gain, layer.compute_dtype)
    copy = type(layer).from_config({**config, "dtype": "float64"})
    copy(inputs)
    kept = {id(v) for p in layer._flatten_layers() if type(p) in UNROUNDED for v in p.variables}
    for mine, weight in zip(copy.variables, layer.variables, strict=True):
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(weight.dtype)):
            dtype = weight.dtype if id(weight) in kept else layer.compute_dtype
            mine.assign(keras.ops.cast(keras.ops.cast(weight, dtype), "float64"))
    if isinstance(layer, EffectiveLayer):
        fix(copy, layer.effective_values())
    if isinstance(layer, SkewOrthogonalConv2D):
        scale = layer.output_scale(layer.inference_terms)
        scale = 1.0 if scale == 1.0 else rounded_down(scale, layer.compute_dtype)
        copy.output_scale = lambda terms: scale
    return copy


def evaluated(layer, inputs):
    """float64 output of the copy on a list of arrays."""
    tensors = [keras.ops.convert_to_tensor(np.asarray(x, "float64")) for x in inputs]
    argument = tensors[0] if len(tensors) == 1 else tensors
    mode = {"training": False} if layer._call_has_training_arg else {}
    result = keras.ops.convert_to_numpy(in_float64(layer, argument)(argument, **mode))
    assert result.dtype == np.float64
    return result
