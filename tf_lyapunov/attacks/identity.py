"""What tells two models apart: layers, settings, wiring and what inference reads."""

from collections.abc import Mapping

import keras
import numpy as np


def described(model):
    """Classes, settings and wiring of a model's layers, as nested lists of plain values.

    Layers are numbered: Keras' names depend on what was built before.
    """
    layers = list(model._flatten_layers())
    numbers = {layer.name: f"#{i}" for i, layer in enumerate(layers)}

    def plain(value):
        if isinstance(value, Mapping):
            return {str(k): plain(value[k]) for k in sorted(value, key=str) if k != "name"}
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, str):
            return numbers.get(value, value)
        return value if isinstance(value, (int, float, type(None))) else type(value).__name__

    return [
        (type(layer).__name__, getattr(layer, "compute_dtype", ""), plain(_config(layer)))
        for layer in layers
    ]


def inference_state(model):
    """Arrays that the outputs depend on: weights, and effective weights that are held fixed."""
    layers = list(model._flatten_layers())
    fixed = [v for layer in layers if getattr(layer, "_condensed", False) for v in layer._cache]
    return [np.asarray(keras.ops.convert_to_numpy(v)) for v in (*model.weights, *fixed)]


def _config(layer):
    try:
        return layer.get_config()
    except NotImplementedError:  # subclassed, without a configuration
        return {}
