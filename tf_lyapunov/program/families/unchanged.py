"""Layers and operations that give back their input at inference, and casts."""

import keras

from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import Affine, Gain, with_cast
from tf_lyapunov.program.refusal import refuse

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


def unchanged_gain(call):
    """`Gain` of a layer that computes the identity in its own dtype."""
    layer, tensor = call.operation, call.inputs[0]
    dtype = call.outputs[0].dtype
    affine = Affine()
    if tensor.dtype != dtype:
        affine = with_cast(affine, tensor, dtype, rounding.unit_roundoff(dtype))
    is_noise = type(layer) in UNCHANGED_LAYERS and type(layer) is not _layers.Identity
    return Gain("identity", 1.0, "identity at inference" if is_noise else "identity", affine)


def _cast_rule(call):
    """A cast to a wider format is exact; a narrower one is a staircase, whatever its steps."""
    tensor, dtype = call.inputs[0], call.outputs[0].dtype
    units = rounding.UNIT_ROUNDOFF
    exact = dtype == tensor.dtype or (
        dtype in units and (tensor.dtype not in units or units[dtype] < units[tensor.dtype])
    )
    if getattr(call.operation, "is_rounding", False) and dtype in units and tensor.dtype in units:
        unit = rounding.unit_roundoff(dtype)
        return Gain("identity", 1.0, f"rounding to {dtype}", Affine(1.0, 0.0, unit))
    if not exact:
        refuse(
            call.operation,
            f"a cast of {tensor.dtype} to {dtype} within the graph is discontinuous",
            advice="Use one dtype, or state it by the layers' dtype policies.",
        )
    # Integers need not fit the format.
    unit = 0.0 if tensor.dtype in units else units[dtype]
    return Gain("identity", 1.0, f"cast to {dtype}", Affine(1.0, 0.0, unit))


def _bare_rule(call):
    return Gain("identity", 1.0, "identity")


def _nothing(call):
    return []


READERS = dict.fromkeys(UNCHANGED_LAYERS, _nothing)
RULES = dict.fromkeys(UNCHANGED_LAYERS, unchanged_gain)
BARE_READERS = dict.fromkeys(("Cast", "StopGradient"), _nothing)
BARE_RULES = {"Cast": _cast_rule, "StopGradient": _bare_rule}
