"""Derivatives on every backend, and the largest amplification that a search finds."""

import keras
import numpy as np


def gradient(function, x):
    """Gradient, float64, of a scalar function of one array."""
    return gradient_and_beside(lambda x: (function(x), x), x)[0]


def gradient_and_beside(function, x):
    """Gradient of the first of two results of a function, and the second one, as arrays."""
    x = keras.ops.convert_to_tensor(x)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        # Else the gradients of a model's weights, too, would be computed.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            value, beside = function(x)
        found = tape.gradient(value, x)
    elif backend == "jax":
        import jax

        found, beside = jax.grad(function, has_aux=True)(x)
    elif backend == "torch":
        x = x.detach().clone().requires_grad_(True)
        value, beside = function(x)
        value.backward()
        found, beside = x.grad, beside.detach()
    found, beside = (keras.ops.convert_to_numpy(part) for part in (found, beside))
    return np.asarray(found, dtype=np.float64), beside


def numerical_gradient(function, x, step):
    """Central differences of a scalar function of a float64 array."""
    x = np.asarray(x, dtype=np.float64)
    found = np.zeros(x.size)
    for i in range(x.size):
        moved = np.zeros(x.size)
        moved[i] = step
        moved = moved.reshape(x.shape)
        found[i] = (function(x + moved) - function(x - moved)) / (2 * step)
    return found.reshape(x.shape)


def amplification(function, shape, *, distance=0.5, scale=1.0, starts=16, steps=40, seed=0):
    """Largest ‖f(u) - f(v)‖/‖u - v‖ over pairs at `distance`: sampled, then by gradient ascent."""
    ops, rng = keras.ops, np.random.default_rng(seed)
    axes = tuple(range(1, len(shape) + 1))
    pairs = rng.normal(size=(starts, 2, *shape)).astype("float32") * scale
    best = 0.0

    def changes(pair):
        u, e = pair[:, 0], pair[:, 1]
        e = e * (distance / ops.sqrt(ops.sum(ops.square(e), axis=axes, keepdims=True)))
        moved = ops.reshape(function(u + e) - function(u), (starts, -1))
        return ops.sqrt(ops.sum(ops.square(moved), axis=-1) + 1e-30) / distance

    def climbed(pair):
        found = changes(pair)
        return ops.sum(ops.log(found)), found

    for _ in range(steps):
        slope, found = gradient_and_beside(climbed, pairs)
        best = max(best, float(np.max(found)))
        size = np.sqrt(np.sum(slope**2, axis=(*(1 + np.array(axes)),), keepdims=True))
        pairs = pairs + (0.1 * scale * slope / np.maximum(size, 1e-12)).astype("float32")
    return best
