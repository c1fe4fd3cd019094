"""Boxes around every signal of a model as differentiable tensors, by the families of its program.

A model is read once (`box_flow`), operation by operation, and an operation without a rule is
refused by name. A rule computes with the layer's own variables, so that gradients reach them, on
every backend and inside compiled functions. The arithmetic is the model's own, to nearest: these
boxes train, they prove nothing.

Rules:

- linear maps: W m + b ± |W| r of the middle m and half width r; of an l2 ball of radius ε, where
  no box was taken before, W x + b ± ε·(norms of the rows of W);
- what grows in every input (pools, sorts, merges, moves, most activations): its own values at both
  ends; what falls in an input, at its other end;
- what has a valley or a kink: the extremes of both ends and of that point, where it lies inside;
- batch normalization: with stored statistics or with those of the clean batch.
"""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.intervals import GROWING
from tf_lyapunov.local.maps import is_flattening
from tf_lyapunov.program.families import (
    elementwise,
    linear,
    merging,
    moving,
    norms,
    scaling,
    separable,
    two_sided,
)
from tf_lyapunov.program.graph import read_graph
from tf_lyapunov.program.replay import arguments
from tf_lyapunov.program.vocabulary import operations_of
from tf_lyapunov.program.weights import is_linear
from tf_lyapunov.training.boxparts import Affine, Ends, Normalization, Reshaped, Sizes, Summed

# What depends on one entry alone, growing or falling.
_MONOTONE = (scaling.Scaled, two_sided.Halves)
# Where activations that also fall turn: they fall before and grow behind.
_VALLEYS = {
    "abs": 0.0,
    "relu": 0.0,
    "leaky_relu": 0.0,
    "silu": -1.2784645427610738,
    "gelu": -0.7517915246935645,
    "hard_silu": -1.5,
    "mish": -1.1924312145041832,
}
_TANH_GELU = -0.7524614220710162


@dataclasses.dataclass(frozen=True)
class BoxFlow:
    """Parts of a model in topological order; position 0 is the input, part k makes k + 1.

    Attributes:
        parts: tuple of parts.
        names: tuple of the steps' names.
        activations: positions before the elementwise functions.
    """

    parts: tuple
    names: tuple
    activations: tuple

    @property
    def normalizes(self):
        """Whether it holds a batch normalization."""
        return any(isinstance(p, Normalization) for p in self.parts)

    def signals(self, region, clean=None):
        """Signals at every position around a region.

        Args:
            region: `Box` or `RoundBall` of the inputs.
            clean: the inputs themselves, whose statistics batch normalizations take, or None.
        """
        found, values = [region], [clean]
        for part in self.parts:
            before = None if clean is None else values[part.inputs[0]]
            found.append(part.signal([found[i] for i in part.inputs], before))
            if clean is not None:
                values.append(part.value([values[i] for i in part.inputs]))
        return found


def box_flow(model):
    """`BoxFlow` of a built model with one input.

    Raises:
        UnsupportedLayerError: that lists the steps without a rule.
    """
    graph = read_graph(model)
    places, parts, names, activations, refused = {}, [], [], [], {}
    places[graph.inputs[0].producer] = 0
    for call in graph.calls:
        inputs = tuple(places.get(t.producer, 0) for t in call.inputs)
        try:
            found = list(_parts(call, inputs, len(parts)))
        except UnsupportedLayerError as error:
            refused[call.name] = str(error)
            found = []
        for part in found:
            if getattr(part, "name", None) is not None:
                activations.append(part.inputs[0])
            parts.append(part)
            names.append(call.name)
        places[call.name] = len(parts) if found else inputs[0]
    if refused:
        raise UnsupportedLayerError(
            "Training through bounds needs a rule for every step of the model. Received: "
            + "; ".join(f"step {name!r}: {why}" for name, why in refused.items())
            + ". Known are dense and convolution layers, pools, normalizations of batches, "
            "elementwise activations, sorts, merges and moves."
        )
    end = places[graph.output.producer]
    parts, names = parts[:end], names[:end]
    return BoxFlow(tuple(parts), tuple(names), tuple(k for k in activations if k < end))


def _parts(call, inputs, count):
    """Parts of a call, the first of which would be number `count`."""
    operations = operations_of(call)
    layer = call.operation
    if isinstance(layer, keras.Layer) and is_linear(layer):
        maps = sum(isinstance(o, linear.Linear) for o in operations)
        yield Affine(call, inputs)
        if len(operations) > maps:
            (operation,) = operations[maps:]
            yield _of_ends(operation, layer.activation, (count + 1,), call)
        return
    if not operations:
        return
    if type(layer) is keras.layers.BatchNormalization:
        yield Normalization(call, inputs)
        return
    if len(operations) > 1 and not all(isinstance(o, GROWING) for o in operations):
        kinds = ", ".join(type(o).__name__ for o in operations)
        raise _unknown(call, f"the operations {kinds} in one step")
    yield _of_ends(operations[0], _replay(call), inputs, call)


def _replay(call):
    """The call itself as a function of its tensors."""
    producers = [t.producer for t in call.inputs]

    def function(*tensors):
        # One tensor may be read twice.
        known = {name: (t,) for name, t in zip(producers, tensors, strict=True)}
        args, kwargs = arguments(call, known)
        found = keras.tree.flatten(call.operation(*args, **kwargs))[0]
        # Layers of a narrow type return it; bounds stay in the type that they came in.
        return keras.ops.cast(found, tensors[0].dtype)

    return function


def _of_ends(operation, function, inputs, call):
    """The part of one operation that `function` computes."""
    if isinstance(operation, elementwise.Elementwise):
        name, parameters = operation.name, dict(operation.parameters)
        grows = operation.sector.alpha >= 0
        if not grows and name not in _VALLEYS:
            raise _unknown(call, f"the activation {name!r}, which also falls")
        valley = None if grows else _VALLEYS[name]
        if name == "gelu" and parameters.get("approximate"):
            valley = _TANH_GELU
        slope = None
        if name in ("relu", "leaky_relu") and parameters.get("max_value") is None:
            slope = parameters.get("negative_slope", 0.0 if name == "relu" else 0.2)
            slope = float(slope) if 0 <= slope <= 1 else None
        return Ends(function, inputs, valley=valley, name=name, slope=slope)
    if isinstance(operation, elementwise.Kinked):
        # Slopes are trained: whatever their signs become, 0 is where the function turns.
        return Ends(function, inputs, mixed=True, valley=0.0, name="prelu")
    if isinstance(operation, merging.Weighted):
        shapes = {t.shape for t in (*call.inputs, *call.outputs)}
        falling = tuple(w < 0 for w in operation.weights)
        fixed = not getattr(call.operation, "weights", None)
        if len(shapes) > 1 or not fixed:
            return Ends(function, inputs, falling)
        return Summed(function, inputs, tuple(map(float, operation.weights)))
    if isinstance(operation, moving.Moved):
        shape = call.inputs[0].shape[1:]
        if None not in shape and is_flattening(operation, math.prod(shape)):
            return Reshaped(function, inputs, shape)
    if isinstance(operation, GROWING):
        return Ends(function, inputs)
    if isinstance(operation, _MONOTONE):
        return Ends(function, inputs, mixed=True)
    if isinstance(operation, norms.WindowNorm):
        return Ends(function, inputs) if operation.p is None else Sizes(function, inputs)
    if isinstance(operation, separable.Separable) and all(
        np.all(m >= 0) for m in operation.matrices
    ):
        return Ends(function, inputs)
    raise _unknown(call, f"an operation of type {type(operation).__name__}")


def _unknown(call, what):
    kind = type(call.operation).__name__
    return UnsupportedLayerError(f"{kind} has no rule for {what}")


def margins(flow, signals, c, *, lines):
    """Lower bounds of linear functions of a model's outputs.

    Args:
        flow: `BoxFlow`.
        signals: of `BoxFlow.signals`.
        c: coefficients (n, rows, outputs).
        lines: whether to go back to the input by the lines of CROWN, where all boxes are those
            given; else no further than the dense layers at the end, for which the boxes hold.

    Returns:
        Tensor (n, rows).
    """
    held, total = {len(flow.parts): c}, 0.0
    for k in range(len(flow.parts), 0, -1):
        if k not in held:
            continue
        c, part = held.pop(k), flow.parts[k - 1]
        cheap = getattr(part, "is_dense", False) or isinstance(part, Reshaped)
        found = None
        if hasattr(part, "back") and (lines or cheap):
            found = part.back(c, [signals[i] for i in part.inputs])
        if found is None:
            total = total + signals[k].least(c)
            continue
        for i, own in zip(part.inputs, found[0], strict=True):
            held[i] = held[i] + own if i in held else own
        total = total + found[1]
    return total if 0 not in held else total + signals[0].least(held[0])
