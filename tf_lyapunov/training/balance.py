"""What keeps boxes small while training through bounds begins: initial kernels, regularizers."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.attacks.inputs import checked_seed
from tf_lyapunov.program.graph import read_graph
from tf_lyapunov.spectral.reading import is_linear, linear_maps
from tf_lyapunov.training.boxes import as_box

# τ of both regularizers, as published.
_TOLERANCE = 0.5
_LEAST = 1e-12


def initialize_for_bounds(model, seed=0):
    """Draws kernels for which boxes neither grow nor shrink from layer to layer.

        W ~ N(0, 2π/n²),   n inputs of every output

    for every dense and convolution kernel of Keras' own layers but the last; half of that width
    where the layer reads a sum of branches. Biases, normalizations and the layers of this library,
    whose kernels are computed, stay as they are.

    Args:
        model: built model.
        seed: of the numbers.

    Returns:
        The model.

    Raises:
        ValueError: if there is no kernel to draw.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu"),
    ...                           keras.layers.Dense(3)])
    >>> kernel = keras.ops.convert_to_numpy(initialize_for_bounds(model).layers[0].kernel)
    >>> bool(abs(kernel.std() / (math.sqrt(2 * math.pi) / 64) - 1) < 0.1)
    True

    Reference: Shi, Wang, Zhang, Yi, Hsieh, "Fast certified robust training with short warmup"
    (NeurIPS 2021), section 3.1, as published and released.
    """
    graph, generator = read_graph(model), np.random.default_rng(checked_seed(seed))
    sums = {c.name for c in graph.calls if type(c.operation).__name__ == "Add"}
    calls = [
        c for c in graph.calls if isinstance(c.operation, keras.Layer) and is_linear(c.operation)
    ]
    last = calls[-1].operation if calls else None
    drawn = set()
    for call in calls:
        layer = call.operation
        if layer is last or id(layer) in drawn:
            continue
        drawn.add(id(layer))
        for kernel, linear_map in linear_maps(layer, call.inputs[0].shape):
            width = math.sqrt(2 * math.pi) / _inputs(kernel.shape, linear_map.kind)
            if call.inputs[0].producer in sums:
                width = width / 2
            kernel.assign(generator.normal(0.0, width, kernel.shape))
    if not drawn:
        raise ValueError(
            "`model` must hold dense or convolution layers before its last one. Received: model "
            f"{model.name!r} without."
        )
    return model


def _inputs(shape, kind):
    taps = math.prod(shape[:-2])
    if kind == "depthwise":
        return taps
    return taps * shape[-1 if kind == "conv_transpose" else -2]


def balance(flow, signals):
    """The two regularizers of Shi et al., a scalar tensor.

    With d_0 the mean half width of the input's box, d_i of the boxes before m activations, and
    p_i, q_i of the means and of the variances of middles of boxes above zero to those below it,

        Σ_i [(τ - d_0/d_i)₊ + (τ - min(p_i, 1/p_i))₊ + (τ - min(q_i, 1/q_i))₊]/(τ·m),   τ = ½.

    Args:
        flow: `boxflow.BoxFlow`.
        signals: of its `signals`.
    """
    first = ops.mean(as_box(signals[0]).radius)
    total = ops.zeros((), dtype=first.dtype)
    for k in flow.activations:
        box = as_box(signals[k])
        middle, wide = box.middle, ops.maximum(ops.mean(box.radius), _LEAST)
        total = total + ops.relu(_TOLERANCE - first / wide)
        active = ops.cast(box.low > 0, middle.dtype)
        inactive = ops.cast(box.high < 0, middle.dtype)
        square = ops.square(middle - ops.mean(middle))
        for above, below in (
            (ops.mean(middle * active), -ops.mean(middle * inactive)),
            (ops.sum(square * active), ops.sum(square * inactive)),
        ):
            # Where one side is empty there is nothing to balance.
            both = (above > _LEAST) & (below > _LEAST)
            above, below = (ops.where(both, v, ops.ones_like(v)) for v in (above, below))
            ratio = ops.minimum(above / below, below / above)
            total = total + ops.relu(_TOLERANCE - ratio)
    return total / (_TOLERANCE * max(len(flow.activations), 1))
