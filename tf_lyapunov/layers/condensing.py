"""Layers that keep their effective weights, whatever becomes of the raw ones."""

import numpy as np
from keras import ops

from tf_lyapunov.layers.base import EffectiveLayer


def fix(layer, values=None):
    """Holds the effective weights of a Lipschitz layer where they are, in training too.

    Nothing is recomputed or compared any more; the raw variables have no effect.

    Args:
        layer: a built `EffectiveLayer`, changed in place.
        values: dict of arrays as `effective_values()` returns; `None` for the present ones.

    Raises:
        ValueError: if the layer is not built, or a weight is not finite.
    """
    values = _finite_values(layer) if values is None else values
    for name, variable in zip(layer._effective_names, layer._cache, strict=True):
        variable.assign(values[name])
    layer.trainable = False
    layer._compute = lambda sources, training=False: [
        ops.convert_to_tensor(v) for v in layer._cache
    ]
    layer._is_fresh = lambda sources: ops.convert_to_tensor(True)
    layer._condensed = True

    def refuse(store):
        raise ValueError(
            f"A condensed layer takes no weights. Received: a file for layer {layer.name!r}. "
            "Load them into the model before it is condensed."
        )

    layer.load_own_variables = refuse


def condense(model):
    """Fixes the effective weights of all Lipschitz layers of a model, in place.

    Inference becomes that of plain layers: no parametrisation is computed and none is compared
    with its cache. The layers can no longer be trained. Saved files hold the raw variables as
    before and load as ordinary, trainable models; for a model that needs this library nowhere use
    `export_plain`.

    Args:
        model: built model or layer; nested models are searched.

    Returns:
        The same model.

    Raises:
        ValueError: if a layer is not built, or a weight is not finite. No layer is changed then.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.layers import SpectralDense
    >>> model = keras.Sequential([keras.Input((3,)), SpectralDense(2)])
    >>> before = model.predict(np.eye(3), verbose=0)
    >>> _ = condense(model).layers[0].kernel.assign(np.zeros((3, 2)))
    >>> bool(np.allclose(model.predict(np.eye(3), verbose=0), before, atol=1e-6))
    True
    """
    layers = [v for v in model._flatten_layers() if isinstance(v, EffectiveLayer)]
    found = [(layer, _finite_values(layer)) for layer in layers]
    for layer, values in found:
        fix(layer, values)
    # Compiled steps have the computation traced into them.
    for function in ("train_function", "test_function", "predict_function"):
        if getattr(model, function, None) is not None:
            setattr(model, function, None)
    return model


def _finite_values(layer):
    if not layer.built:
        raise ValueError(
            f"A layer must be built before it is condensed. Received: unbuilt layer "
            f"{layer.name!r}. Call the model on data first."
        )
    values = layer.effective_values()
    if not all(np.all(np.isfinite(v)) for v in values.values()):
        raise ValueError(
            f"Weights must be finite. Received: NaN or infinity in layer {layer.name!r}."
        )
    return values
