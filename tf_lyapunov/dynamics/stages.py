"""A model with memory as a chain of stages: recurrent layers and what acts on every step alone."""

import dataclasses
import math
from fractions import Fraction

import keras
import numpy as np
from keras.src.models.functional import Functional

from tf_lyapunov.dynamics.systems import System, cell_of, system_of
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.theory.rounding import sqrt_up
from tf_lyapunov.theory.sectors import Sector
from tf_lyapunov.verification.arithmetic import norm_up

_SAME = (
    keras.layers.InputLayer,
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.GaussianNoise,
    keras.layers.GaussianDropout,
    keras.layers.AlphaDropout,
    keras.layers.Identity,
    keras.layers.Flatten,
)
_ACTIVATIONS = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
)
_SUPPORTED = (
    "RecurrentEquilibrium, RNN of a RecurrentEquilibriumCell, Dense, TimeDistributed(Dense), "
    "GlobalAveragePooling1D, Flatten, elementwise activations and layers that do nothing at "
    "inference"
)


@dataclasses.dataclass(frozen=True, eq=False)
class StaticStage:
    """A layer without memory.

    Attributes:
        name: of the layer.
        gain: proven l2 gain per step, hence of sequences.
        kernel, bias: of a dense map, float64, or None.
        activation: φ behind it, a Keras function, or None.
        kind: `"dense"`, `"activation"`, `"average"`, `"flatten"` or `"same"`.
    """

    name: str
    gain: float
    kind: str
    kernel: np.ndarray | None = None
    bias: np.ndarray | None = None
    activation: object = None


def stages_of(model):
    """`System`s and `StaticStage`s of a model or layer, in order.

    Raises:
        UnsupportedLayerError: for a layer without a rule, a model that is no chain, a 16-bit type.
        ValueError: if weights are not finite, or a layer is not built.
    """
    if cell_of(model) is not None:
        return [_recurrent(model)]
    if not isinstance(model, keras.Model):
        return [system_of(model)]  # refuses by name
    if not model.built:
        raise ValueError(
            "A model must be built, or its sizes are unknown. Received: unbuilt model "
            f"{model.name!r}. Call it on data first."
        )
    found = [_stage(layer, shape) for layer, shape in _chain(model)]
    return [stage for stage in found if stage is not None]


def _chain(model):
    """Pairs of a layer and the shape of its input, from input to output."""
    if type(model) not in (keras.Sequential, Functional):
        raise UnsupportedLayerError(
            "`certify_dynamics` reads Sequential and functional models and layers. Received: "
            f"{type(model).__name__}, whose `call` may do anything."
        )
    inside = getattr(model, "_functional", None) or model
    if len(inside.inputs) != 1 or len(inside.outputs) != 1:
        raise UnsupportedLayerError(
            "A chain has one input and one output. Received: a model with "
            f"{len(inside.inputs)} inputs and {len(inside.outputs)} outputs."
        )
    # From the output back: every tensor has one operation that made it, of one tensor.
    found, tensor = [], inside.outputs[0]
    while tensor is not inside.inputs[0]:
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        parents = list(node.input_tensors)
        if len(parents) != 1:
            raise UnsupportedLayerError(
                "`certify_dynamics` reads chains of layers. Received: "
                f"{type(operation).__name__} {operation.name!r} with {len(parents)} inputs, such "
                "as a merge, or an initial state that is given."
            )
        if not isinstance(operation, keras.Layer):
            _refuse(operation)
        tensor = parents[0]
        if isinstance(operation, keras.Model):
            found += list(reversed(_chain(operation)))
        else:
            found.append((operation, tuple(tensor.shape)))
    return list(reversed(found))


def _stage(layer, shape):
    kind = type(layer)
    if "call" in vars(layer):
        raise UnsupportedLayerError(
            f"The `call` of {kind.__name__} {layer.name!r} was replaced; it may do anything."
        )
    if cell_of(layer) is not None:
        return _recurrent(layer)
    if layer.compute_dtype not in ("float32", "float64"):
        raise UnsupportedLayerError(
            "Systems in time are certified in float32 and float64. Received: "
            f"{kind.__name__} {layer.name!r} with dtype policy {layer.dtype_policy.name!r}."
        )
    if kind in _SAME:
        is_flat = kind is keras.layers.Flatten
        return StaticStage(layer.name, 1.0, "flatten") if is_flat else None
    if kind is keras.layers.TimeDistributed and type(layer.layer) is keras.layers.Dense:
        return _stage(layer.layer, (shape[0], *shape[2:]))
    if kind is keras.layers.Dense and getattr(layer, "quantization_mode", None) is None:
        kernel = _finite(layer, layer.kernel)
        bias = None if layer.bias is None else _finite(layer, layer.bias)
        gain = norm_up(kernel) * Sector.of(layer.activation).magnitude
        gain = math.nextafter(gain, math.inf)
        return StaticStage(layer.name, gain, "dense", kernel, bias, layer.activation)
    if kind in _ACTIVATIONS:
        gain = Sector.of(layer).magnitude
        return StaticStage(layer.name, gain, "activation", activation=layer)
    if kind is keras.layers.GlobalAveragePooling1D and layer.data_format == "channels_last":
        steps = shape[1] or 1
        return StaticStage(layer.name, sqrt_up(Fraction(1, steps)), "average")
    return _refuse(layer)


def _recurrent(layer):
    if getattr(layer, "return_state", False):
        raise UnsupportedLayerError(
            "`certify_dynamics` reads layers that return outputs alone. Received: layer "
            f"{layer.name!r} with return_state=True."
        )
    return system_of(layer)


def _finite(layer, variable):
    value = np.asarray(keras.ops.convert_to_numpy(variable), dtype=np.float64)
    if not np.all(np.isfinite(value)):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}. The model "
            "has diverged; no bound on it exists."
        )
    return value


def _refuse(layer):
    kind = type(layer).__name__
    why = ""
    if kind in ("Masking", "Embedding"):
        why = " Masked steps repeat outputs, which no supply rate covers."
    if kind in ("LSTM", "GRU", "SimpleRNN"):
        why = " It has no gain over sequences of any length."
    if kind == "Bidirectional":
        why = " Certify its two layers one by one: a concatenation has the root of their squares."
    raise UnsupportedLayerError(
        f"{kind} {layer.name!r} has no rule for sequences.{why} Supported: {_SUPPORTED}."
    )


__all__ = ["StaticStage", "System", "stages_of"]
