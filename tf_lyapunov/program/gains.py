"""Gains of every supported call except dense and convolution layers: one rule per layer class.

A rule returns a `Gain`: how much the output's l2 norm can change per change of the inputs, how
several inputs combine, and a model of the rounding error. What has no rule is refused by name.
"""

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program import lipschitz_layers, own_layers, pooling, registry, rounding
from tf_lyapunov.program.activations import (
    ACTIVATION_LAYERS,
    ZERO_SLACK,
    activation_gain,
    softmax_gain,
)
from tf_lyapunov.program.gain import Affine, Gain, with_cast
from tf_lyapunov.program.linear import LINEAR_LAYERS, BatchNormScale, inference_value
from tf_lyapunov.program.refusals import refuse

_layers = keras.layers
UNCHANGED_LAYERS = (
    _layers.Identity,
    _layers.Dropout,
    _layers.SpatialDropout1D,
    _layers.SpatialDropout2D,
    _layers.SpatialDropout3D,
    _layers.AlphaDropout,
    _layers.GaussianDropout,
    _layers.GaussianNoise,
    _layers.ActivityRegularization,
)
RESHAPING_LAYERS = (
    _layers.Flatten,
    _layers.Reshape,
    _layers.Permute,
    _layers.ZeroPadding1D,
    _layers.ZeroPadding2D,
    _layers.ZeroPadding3D,
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.Cropping3D,
)
MERGING_LAYERS = (
    _layers.Add,
    _layers.Subtract,
    _layers.Average,
    _layers.Concatenate,
    _layers.Maximum,
    _layers.Minimum,
)
POOLING_LAYERS = (
    *pooling.MAX_POOLING,
    *pooling.AVERAGE_POOLING,
    *pooling.GLOBAL_MAX,
    *pooling.GLOBAL_AVERAGE,
)
SUPPORTED_LAYERS = (
    *LINEAR_LAYERS,
    *ACTIVATION_LAYERS,
    _layers.Activation,
    _layers.Softmax,
    *POOLING_LAYERS,
    *pooling.UPSAMPLING,
    *MERGING_LAYERS,
    _layers.BatchNormalization,
    _layers.Rescaling,
    _layers.Normalization,
    _layers.RepeatVector,
    *RESHAPING_LAYERS,
    *UNCHANGED_LAYERS,
    *lipschitz_layers.RULES,
    *own_layers.RULES,
)
registry.keep(SUPPORTED_LAYERS)


def registered_gain(registered, call):
    layer = call.operation
    shapes = [t.shape for t in call.inputs]
    shape = shapes[0] if len(shapes) == 1 else shapes
    value = registry.evaluate(registered, layer, shape)
    dtype = call.outputs[0].dtype
    sizes = [t.size for t in (*call.inputs, *call.outputs)]
    if len(call.outputs) != 1:
        refuse(layer, "it has several outputs")
    affine = Affine(value, math.inf, math.inf, math.inf)
    if None not in sizes:
        zeros = [keras.ops.zeros((1, *t.shape[1:]), dtype=t.dtype) for t in call.inputs]
        arguments = iter(zeros)

        def fill(a):
            return next(arguments) if a in call.inputs else a

        args, kwargs = keras.tree.map_structure(fill, (call.args, call.kwargs))
        at_zero = keras.ops.convert_to_numpy(keras.ops.cast(layer(*args, **kwargs), "float32"))
        offset = float(rounding.euclidean_norms_up(at_zero)[0]) * ZERO_SLACK
        # As for a dense layer from all inputs to all outputs.
        error = rounding.gamma(sum(sizes[:-1]) + 16, rounding.unit_roundoff(dtype))
        width = math.sqrt(min(sum(sizes[:-1]), sizes[-1]))
        affine = Affine(value, offset, error * width * value, error * offset)
    return Gain(
        "declared",
        value,
        "declared by register_gain",
        affine,
        "single" if len(shapes) == 1 else "root_sum_squares",
        (1.0,) * len(shapes),
        f"{type(layer).__name__}: {registered.assumption} Its rounding error is taken to be that "
        "of a dense layer of its size.",
    )


# Activations ------------------------------------------------------------------------------------


def _activation_rule(call):
    layer, tensor = call.operation, call.inputs[0]
    activation = layer.activation if type(layer) is _layers.Activation else layer
    gain = activation_gain(activation, tensor, layer.compute_dtype, layer)
    return gain if gain is not None else _unchanged_rule(call)


def _softmax_rule(call):
    layer = call.operation
    return softmax_gain("softmax", layer.axis, call.inputs[0], layer.compute_dtype)


# Shapes and noise -------------------------------------------------------------------------------


def _unchanged_rule(call):
    layer, tensor = call.operation, call.inputs[0]
    dtype = call.outputs[0].dtype
    affine = Affine()
    if tensor.dtype != dtype:
        affine = with_cast(affine, tensor, dtype, rounding.unit_roundoff(dtype))
    is_noise = type(layer) in UNCHANGED_LAYERS and type(layer) is not _layers.Identity
    return Gain("identity", 1.0, "identity at inference" if is_noise else "identity", affine)


def _reshaping_rule(call):
    return dataclasses.replace(
        _unchanged_rule(call), kind="reshape", method="moves, drops or pads entries by zeros"
    )


def _repeat_rule(call):
    repeats = rounding.sqrt_up(call.operation.n)
    return Gain("reshape", repeats, "repeats every entry", Affine(repeats))


# Pooling ----------------------------------------------------------------------------------------


def _max_pooling_rule(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    value = pooling.max_pooling_gain(layer.pool_size, layer.strides, layer.padding, sizes)
    method = f"max pooling {_by(layer.pool_size)}/{_by(layer.strides)}, overlap counted"
    return Gain("pooling", value, method, Affine(value))


def _average_pooling_rule(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    value = pooling.average_pooling_gain(layer.pool_size, layer.strides, layer.padding, sizes)
    method = f"average pooling {_by(layer.pool_size)}/{_by(layer.strides)}, norm of its matrix"
    return _averaging(value, method, math.prod(layer.pool_size), layer)


def _global_max_rule(call):
    return Gain("pooling", 1.0, "maximum over all positions")


def _global_average_rule(call):
    layer = call.operation
    sizes = pooling.spatial_sizes(layer, call.inputs[0].shape)
    terms = math.inf if None in sizes else math.prod(sizes)
    value = pooling.global_average_gain(sizes)
    return _averaging(value, "mean over all positions, 1/√N", terms, layer)


def _averaging(value, method, terms, layer):
    error = rounding.gamma(terms + 2, rounding.unit_roundoff(layer.compute_dtype))
    # A matrix without negative entries equals its absolute value, which scales the error.
    return Gain("pooling", value, method, Affine(value, 0.0, error * value))


def _upsampling_rule(call):
    layer = call.operation
    value = pooling.upsampling_gain(layer)
    if value is None:
        refuse(layer, f"only nearest-neighbour upsampling has a rule, not {layer.interpolation!r}")
    return Gain("reshape", value, "repeats every entry", Affine(value))


def _by(sizes):
    return "×".join(str(int(s)) for s in sizes)


# Merging ----------------------------------------------------------------------------------------


def broadcast_weights(inputs, output):
    """√(times that each input's entries appear in the output) for elementwise merging."""
    weights = []
    for tensor in inputs:
        if tensor.shape == output.shape:
            weights.append(1.0)
        elif None in (tensor.size, output.size):
            raise UnsupportedLayerError(
                "Merging tensors of different shapes needs known sizes. "
                f"Received: shapes {tensor.shape} and {output.shape}. Fix the input size."
            )
        else:
            weights.append(rounding.sqrt_up(output.size / tensor.size))
    return tuple(weights)


def merged_gain(name, inputs, output, dtype, axis=None):
    """`Gain` of Add, Subtract, Average (triangle inequality), Maximum, Minimum, Concatenate (√Σ).

    |max(a, b) - max(a', b')| ≤ max(|a - a'|, |b - b'|) per entry, so its square is at most the
    sum of the squares.
    """
    unit = rounding.unit_roundoff(dtype)
    count = len(inputs)
    cast = sum(unit for t in inputs if t.dtype != dtype)
    if name == "Concatenate":
        rank = len(output.shape)
        if axis % rank == 0:
            raise UnsupportedLayerError("Concatenating along the batch axis mixes inputs.")
        weights, rule, value = (1.0,) * count, "root_sum_squares", 1.0
        return Gain("merge", value, "concatenation, √Σ L²", Affine(1.0, 0.0, cast), rule, weights)
    weights = broadcast_weights(inputs, output)
    if name in ("Maximum", "Minimum"):
        method = f"elementwise {name.lower()}, √Σ L²"
        return Gain("merge", 1.0, method, Affine(1.0, 0.0, cast), "root_sum_squares", weights)
    error = rounding.gamma(count + 1, unit) + cast
    if name == "Average":
        value = float(rounding.up(1 / count)) if count & (count - 1) else 1 / count
        return Gain("merge", value, "mean, Σ L / k", Affine(value, 0.0, error), "sum", weights)
    method = "sum of branches, Σ L" if name == "Add" else "difference of branches, Σ L"
    return Gain("merge", 1.0, method, Affine(1.0, 0.0, error), "sum", weights)


def _merging_rule(call):
    layer = call.operation
    axis = getattr(layer, "axis", None)
    name = type(layer).__name__
    return merged_gain(name, call.inputs, call.outputs[0], layer.compute_dtype, axis)


# Scaling ----------------------------------------------------------------------------------------


def _batch_norm_rule(call):
    layer, output = call.operation, call.outputs[0]
    if layer.axis % len(output.shape) == 0:
        refuse(layer, "it normalizes along the batch axis")
    scale = BatchNormScale.of(layer)
    method = "largest |γ|/√(var + e) (no linear layer directly before it)"
    return Gain("batch normalization", scale.gain, method, scale.affine(output))


def diagonal_gain(kind, method, scales, shifts, output, dtype):
    """`Gain` of y = scales·x + shifts with broadcastable float64 arrays."""
    value = float(np.max(np.abs(scales), initial=0.0))
    size = math.inf if output.size is None else output.size
    norm = float(rounding.euclidean_norms_up(shifts.reshape(1, -1))[0])
    offset = rounding.product_up(norm, math.sqrt(size / shifts.size))
    error = rounding.gamma(6, rounding.unit_roundoff(dtype))
    affine = Affine(value, offset, error * value, rounding.product_up(error, offset))
    return Gain(kind, value, method, affine)


def _rescaling_rule(call):
    layer, dtype = call.operation, call.operation.compute_dtype
    scales = np.asarray(layer.scale, dtype=np.float64)
    shifts = np.asarray(layer.offset, dtype=np.float64)
    if not (np.all(np.isfinite(scales)) and np.all(np.isfinite(shifts))):
        raise ValueError(f"Layer {layer.name!r} must have finite numbers. Received: {layer.scale}.")
    tensor = call.inputs[0]
    if scales.ndim and keras.config.image_data_format() == "channels_first":
        refuse(layer, "Keras turns its numbers where images have channels first")
    # Keras records the input's shape, whatever the numbers broadcast it to.
    unknown = tuple(n or 2**31 for n in tensor.shape[1:])
    try:
        fits = np.broadcast_shapes(unknown, scales.shape, shifts.shape) == unknown
    except ValueError:
        fits = False
    if not fits:
        refuse(layer, f"its numbers do not fit inputs of shape {tensor.shape}")
    gain = diagonal_gain("scaling", "largest |scale|", scales, shifts, call.outputs[0], dtype)
    return _input_cast(gain, tensor, dtype)


def _normalization_rule(call):
    layer, dtype = call.operation, call.operation.compute_dtype
    if layer.mean is None:
        raise ValueError(f"Layer {layer.name!r} must be adapted or given a mean and a variance.")
    mean, variance = layer.input_mean, layer.input_variance
    if mean is None:  # adapted to data: weights, cast at inference
        mean, variance = (inference_value(v, dtype) for v in (layer.mean, layer.variance))
    mean, variance = (np.asarray(v, dtype=np.float64) for v in (mean, variance))
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance)) and np.all(variance >= 0)):
        raise ValueError(f"Layer {layer.name!r} must have a finite mean and variance ≥ 0.")
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        scales, shifts, method = deviation, mean, "largest standard deviation"
    else:
        scales, shifts, method = 1 / deviation, mean / deviation, "1 / smallest standard deviation"
    # Root, floor and quotient each round once in float64.
    scales = scales * (1 + 4 * rounding.UNIT_ROUNDOFF["float64"])
    gain = diagonal_gain("scaling", method, scales, shifts, call.outputs[0], dtype)
    return _input_cast(gain, call.inputs[0], dtype)


def _input_cast(gain, tensor, dtype):
    unit = rounding.unit_roundoff(dtype)
    return dataclasses.replace(gain, affine=with_cast(gain.affine, tensor, dtype, unit))


LAYER_RULES = {
    **dict.fromkeys(UNCHANGED_LAYERS, _unchanged_rule),
    **dict.fromkeys(RESHAPING_LAYERS, _reshaping_rule),
    **dict.fromkeys((*ACTIVATION_LAYERS, _layers.Activation), _activation_rule),
    **dict.fromkeys(MERGING_LAYERS, _merging_rule),
    **dict.fromkeys(pooling.MAX_POOLING, _max_pooling_rule),
    **dict.fromkeys(pooling.AVERAGE_POOLING, _average_pooling_rule),
    **dict.fromkeys(pooling.GLOBAL_MAX, _global_max_rule),
    **dict.fromkeys(pooling.GLOBAL_AVERAGE, _global_average_rule),
    **dict.fromkeys(pooling.UPSAMPLING, _upsampling_rule),
    _layers.Softmax: _softmax_rule,
    _layers.RepeatVector: _repeat_rule,
    _layers.BatchNormalization: _batch_norm_rule,
    _layers.Rescaling: _rescaling_rule,
    _layers.Normalization: _normalization_rule,
    **lipschitz_layers.RULES,
    **own_layers.RULES,
}
