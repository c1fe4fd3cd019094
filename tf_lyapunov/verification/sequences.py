"""Reads a model of sequences into stages: recurrent layers, and what acts on every step alone.

With `reading`, what knows Keras; no bound is computed here.
"""

import dataclasses
import math
import os
import sys

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.modelfile import load_model
from tf_lyapunov.verification.arithmetic import norm_up, product_up, sqrt_up
from tf_lyapunov.verification.dissipation import Recurrence, Slopes
from tf_lyapunov.verification.layers import activation_operation, is_linear, stored
from tf_lyapunov.verification.network import record
from tf_lyapunov.verification.operations import Activation
from tf_lyapunov.verification.suspicion import (
    check_call,
    check_instance,
    check_layer,
    check_model,
    check_policy,
)

_layers = keras.layers
_SAME = (
    _layers.InputLayer, _layers.Dropout, _layers.SpatialDropout1D, _layers.GaussianNoise,
    _layers.GaussianDropout, _layers.AlphaDropout, _layers.Identity,
)  # fmt: skip
_POINTWISE = (_layers.Activation, _layers.ReLU, _layers.LeakyReLU, _layers.ELU)
# Float32 evaluation of a whole model against float64 of its weights, relative to the outputs.
NEAR = 1e-3
_PASSES = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """A recurrent layer: `step` as `dissipation.Recurrence`, biases, and how it is called."""

    name: str
    step: Recurrence
    bias: np.ndarray
    activation: Activation | None
    every: bool
    backwards: bool

    def forward(self, x):
        """Outputs of sequences (n, steps, inputs) from zero states."""
        x = x[:, ::-1] if self.backwards else x
        s, found = self.step, []
        n, q = s.states, s.units
        state = np.zeros((len(x), n))
        inside = s.neurons[:, n : n + q]
        is_lower = not np.any(np.triu(inside))
        resolvent = None if is_lower else np.linalg.inv(2 * np.eye(q) - inside)
        for t in range(x.shape[1]):
            u = x[:, t]
            known = state @ s.neurons[:, :n].T + u @ s.neurons[:, n + q :].T + self.bias[:q]
            w = self._neurons(known, inside, resolvent)
            signal = np.concatenate([state, w, u], axis=1)
            found.append(signal @ s.output.T + self.bias[q + n :])
            state = signal @ s.step.T + self.bias[q : q + n]
        return np.stack(found, axis=1) if self.every else found[-1]

    def _neurons(self, known, inside, resolvent):
        w = np.zeros_like(known)
        if resolvent is None:  # nilpotent: so many passes are exact
            for _ in range(len(inside)):
                w = self._slope(known + w @ inside.T)
            return w
        z = known
        for _ in range(_PASSES):  # Peaceman and Rachford's splitting
            u = 2 * self._slope(z) - z
            after = 2 * (u + known) @ resolvent.T - u
            if np.max(np.abs(after - z)) <= 1e-13 * (1 + np.max(np.abs(z))):
                break
            z = after
        return self._slope(after)

    def _slope(self, values):
        if self.activation is None:
            return values
        return self.activation.forward(values, np.zeros_like(values))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Pointwise:
    """A layer without memory: its gain, and its function of (n, …, features)."""

    name: str
    gain: float
    forward: object


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Stages from input to output.

    Attributes:
        stages: tuple of `Memory` and `Pointwise`.
        layers: tuple of `network.LayerRecord`.
        shape: (steps or None, features) of one input.
    """

    stages: tuple
    layers: tuple
    shape: tuple

    @property
    def memories(self):
        return tuple(s for s in self.stages if isinstance(s, Memory))

    def forward(self, x):
        for stage in self.stages:
            x = stage.forward(x)
        return x


def read_sequences(model):
    """`(model, Chain)` of a Keras model, or of a `.keras` file.

    Raises:
        UnsupportedLayerError: naming a layer without a rule, or for a model that is no chain.
        ModelFileError: for a file that is not a model.
        ValueError: for weights that are NaN or infinite.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras model or the path of one: a proof file is about a model. "
            f"Received: an object of type {type(model).__name__}."
        )
    stages, records = [], []
    for layer, shape in _chain(model):
        _stage(layer, shape, stages, records)
    size = tuple(model.inputs[0].shape)[1:]
    if len(size) != 2 or size[1] is None:
        raise UnsupportedLayerError(
            "A model of sequences reads arrays (n, steps, features). Received: model "
            f"{model.name!r} of inputs of shape {size}."
        )
    return model, Chain(tuple(stages), tuple(records), size)


def _chain(model):
    """Pairs of a layer and the shape of its input, from input to output."""
    check_model(model)
    if not model.built or len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UnsupportedLayerError(
            "A proof can be verified for a built model with one input and one output. Received: "
            f"model {model.name!r}."
        )
    inside = getattr(model, "_functional", None) or model
    found, tensor = [], inside.outputs[0]
    while tensor is not inside.inputs[0]:
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        check_call(node, False)
        tensor = node.input_tensors[0]
        if isinstance(operation, keras.Model):
            found += list(reversed(_chain(operation)))
        else:
            found.append((operation, tuple(tensor.shape)))
    return list(reversed(found))


def _stage(layer, shape, stages, records):
    kind = type(layer)
    cell = _cell(layer)
    if cell is not None:
        stage, settings, arrays = _memory(layer, cell)
        stages.append(stage)
        records.append(record(layer.name, "RecurrentEquilibrium", settings, arrays))
        return
    if kind is _layers.TimeDistributed and type(layer.layer) is _layers.Dense:
        check_layer(layer)
        _stage(layer.layer, (shape[0], *shape[2:]), stages, records)
        return
    check_layer(layer)
    if layer.compute_dtype not in ("float32", "float64"):
        _refuse(layer, f"it computes in {layer.compute_dtype}")
    settings, arrays = [list(shape[1:])], []
    if kind in _SAME:
        pass
    elif kind is _layers.Dense:
        if getattr(layer, "quantization_mode", None) is not None:
            _refuse(layer, "it is quantized")
        kernel = stored(layer.kernel, layer.compute_dtype)
        bias = np.zeros(kernel.shape[1])
        if layer.bias is not None:
            bias = stored(layer.bias, layer.compute_dtype)
        stages.append(Pointwise(layer.name, norm_up(kernel), lambda x, w=kernel, b=bias: x @ w + b))
        if not is_linear(layer.activation):
            operation = _slopes(layer.activation, layer)
            stages.append(_pointwise(layer, operation))
            settings += [operation.name, operation.parameters]
        arrays = [kernel, bias]
    elif kind in _POINTWISE:
        operation = activation_operation(layer, layer, shape[1:])
        if isinstance(operation, Activation):
            stages.append(_pointwise(layer, operation))
            settings += [operation.name, operation.parameters]
    elif kind is _layers.GlobalAveragePooling1D and layer.data_format == "channels_last":
        gain = sqrt_up(1.0 / shape[1] * (1 + 2.0**-50)) if shape[1] else 1.0
        stages.append(Pointwise(layer.name, gain, lambda x: x.mean(axis=1)))
    elif kind is _layers.Flatten:
        stages.append(Pointwise(layer.name, 1.0, lambda x: x.reshape(len(x), -1)))
    else:
        _refuse(layer, "it has no rule for sequences")
    records.append(record(layer.name, kind.__name__, settings, arrays))


def _pointwise(layer, operation):
    def forward(x):
        return operation.forward(x, np.zeros_like(x))[0]

    return Pointwise(layer.name, operation.gain(), forward)


def _slopes(activation, layer):
    operation = activation_operation(activation, layer, ())
    if not isinstance(operation, Activation):
        _refuse(layer, "its activation is not elementwise")
    return operation


def _cell(layer):
    """The cell of a recurrent equilibrium layer, by identity of the classes, or None."""
    # Nobody has such a layer who has not imported it; the verifier imports nothing that it checks.
    whole = getattr(sys.modules.get("tf_lyapunov.layers.recurrent"), "RecurrentEquilibrium", None)
    part = sys.modules.get("tf_lyapunov.layers.recurrent_cell")
    if whole is None or type(layer) not in (whole, _layers.RNN):
        return None
    return layer.cell if type(layer.cell) is part.RecurrentEquilibriumCell else None


def _memory(layer, cell):
    """`(Memory, settings, arrays)` of a recurrent layer, by the weights that it computes with."""
    for thing in (layer, cell):
        check_instance(thing)
        check_policy(thing)
    if layer.return_state or layer.stateful or cell.compute_dtype not in ("float32", "float64"):
        _refuse(layer, "it returns or keeps its state, or computes in 16 bits")
    values = {
        name: np.asarray(value).astype(np.float64)
        for name, value in cell.effective_values().items()
    }
    names = ("recurrent_kernel", "neuron_kernel", "input_kernel", "output_kernel")
    held = [values[name] for name in (*names, "feedthrough_kernel")]
    n, q, p = cell.states, cell.neurons, cell.units
    bias = np.zeros(q + n + p)
    if cell.bias is not None:
        bias = stored(cell.bias, cell.compute_dtype)
    if not all(np.all(np.isfinite(v)) for v in held):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}."
        )
    rows, output = np.vstack(held[:3]), np.vstack(held[3:]).T
    operation = None
    slopes = (1.0, 1.0)
    if not is_linear(cell.activation):
        operation = _slopes(cell.activation, cell)
        slopes = operation.slopes()
    step = Recurrence(rows[:, q : q + n].T, rows[:, :q].T, output, Slopes(*slopes))
    settings = [
        n, q, p, "linear" if operation is None else [operation.name, operation.parameters],
        bool(layer.return_sequences), bool(layer.go_backwards),
    ]  # fmt: skip
    stage = Memory(layer.name, step, bias, operation, layer.return_sequences, layer.go_backwards)
    return stage, settings, [rows, output, bias]


def gain_of(chain, gains):
    """Product of the gains of all stages, those of the recurrent ones given."""
    given = iter(gains)
    return product_up(
        1.0, *(next(given) if isinstance(s, Memory) else s.gain for s in chain.stages)
    )


def contradictions(model, chain, count=8):
    """Sentences on where a model contradicts its reading, called on random sequences."""
    rng = np.random.default_rng()
    steps = chain.shape[0] or 7
    scales = np.array([0.1, 1.0, 10.0])[rng.integers(3, size=count)]
    x = rng.normal(size=(count, steps, chain.shape[1])) * scales[:, None, None]
    x = x.astype(model.compute_dtype)
    own = np.asarray(keras.ops.convert_to_numpy(model(x, training=False)), np.float64)
    read = chain.forward(x.astype(np.float64))
    if own.shape != read.shape:
        return ["The model gives outputs of another shape than its layers' weights say."]
    size = 1 + np.max(np.abs(read)) + np.max(np.abs(x))
    distance = float(np.max(np.abs(own - read)))
    if not (math.isfinite(distance) and distance <= NEAR * size):
        return [f"The model does not compute what its weights say: it is off by {distance:.3g}."]
    return []


def _refuse(layer, reason):
    raise UnsupportedLayerError(
        f"This layer of sequences cannot be verified: {reason}. Received: layer {layer.name!r} of "
        f"type {type(layer).__name__}. Known: RecurrentEquilibrium, RNN of its cell, Dense, "
        "TimeDistributed(Dense), elementwise activations, GlobalAveragePooling1D, Flatten and "
        "layers that do nothing at inference."
    )
