"""Oracles for certificates: Jacobians, gradient ascent and float64 copies of models."""

import keras
import numpy as np
import pytest


def _tensorflow():
    return pytest.importorskip("tensorflow", reason="these oracles differentiate with TensorFlow")


# TensorFlow's own hold their constants in float32, whatever the dtype of the signal.
_EXACT = {
    keras.activations.gelu: lambda x: 0.5 * x * (1 + keras.ops.erf(x / np.sqrt(np.float64(2)))),
    keras.activations.leaky_relu: lambda x: keras.ops.where(x > 0, x, np.float64(0.2) * x),
}


def double_precision(model, shape):
    """The model with float64 arithmetic and the weights that inference uses."""

    def clone(layer):
        copy = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
        if hasattr(copy, "activation"):
            copy.activation = _EXACT.get(copy.activation, copy.activation)
        return copy

    copy = keras.models.clone_model(
        model, clone_function=clone, input_tensors=keras.Input(shape, dtype="float64")
    )
    copy.set_weights([np.asarray(w, dtype=np.float64) for w in model.get_weights()])
    return copy


def jacobian_norm(function, shape, *, points=1, seed=0):
    """Largest spectral norm of the Jacobian over random points of many sizes."""
    tf = _tensorflow()
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(points, *shape)) * np.geomspace(0.1, 4.0, points).reshape(
        -1, *([1] * len(shape))
    )
    x = tf.constant(x.astype("float32"))
    # Watched variables would have their gradients computed too, for nothing.
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(x)
        y = tf.reshape(function(x), (points, -1))
        entries = [y[:, k] for k in range(y.shape[1])]
    zero = tf.UnconnectedGradients.ZERO
    rows = [tape.gradient(e, x, unconnected_gradients=zero).numpy() for e in entries]
    matrix = np.stack([r.reshape(points, -1) for r in rows], axis=1).astype(np.float64)
    return float(np.linalg.svd(matrix, compute_uv=False).max())


def attack(model, x, labels, radius, *, steps=40, seed=0):
    """Gradient ascent on the worst margin within each input's own l2 radius, in float64.

    Returns the smallest margin found for each input, evaluated by `model` in float64.
    """
    tf = _tensorflow()
    rng = np.random.default_rng(seed)
    x = np.asarray(x, dtype=np.float64)
    radius = np.asarray(radius).reshape(-1, *([1] * (x.ndim - 1)))
    axes = tuple(range(1, x.ndim))

    def project(e):
        norm = np.sqrt(np.sum(e**2, axis=axes, keepdims=True))
        return e * np.minimum(1.0, radius / np.maximum(norm, 1e-300))

    best = np.full(len(x), np.inf)
    e = project(rng.normal(size=x.shape) * radius)
    for _ in range(steps):
        point = tf.constant(x + e)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(point)
            logits = model(point, training=False)
            mine = tf.gather(logits, labels, batch_dims=1)
            others = logits - 1e30 * tf.one_hot(labels, logits.shape[1], dtype=logits.dtype)
            margins = mine - tf.reduce_max(others, axis=1)
        best = np.minimum(best, margins.numpy())
        step = -tape.gradient(margins, point).numpy()
        norm = np.sqrt(np.sum(step**2, axis=axes, keepdims=True))
        e = project(e + 0.2 * radius * step / np.maximum(norm, 1e-300))
    return best
