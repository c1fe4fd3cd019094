"""Gradients and compiled functions on the active Keras backend, the only file that imports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np


def sum_gradient(function: Callable, x):
    """Gradient of a scalar function that also returns other tensors.

    Args:
        function: maps `x` to `(scalar, others)`.
        x: tensor of the active backend.

    Returns:
        `(gradient, others)`; the gradient has the shape of `x` and is zero where `function` does
        not depend on `x`.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            value, others = function(x)
        gradient = tape.gradient(value, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return gradient, others
    if backend == "jax":
        import jax

        return jax.grad(function, has_aux=True)(x)
    import torch

    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value, others = function(x)
        if not value.requires_grad:
            return torch.zeros_like(x), others
        (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(x)
    return gradient.detach(), keras.tree.map_structure(lambda t: t.detach(), others)


def compiled(
    function: Callable, variables: Sequence, ranks: Sequence[tuple[str, tuple]]
) -> Callable:
    """One compiled graph of a function of NumPy arrays.

    TensorFlow: one `tf.function` for all batch sizes, without XLA, which is slower on CPUs for
    convolutions. JAX: one `jit` per padded batch size, given the variables as arguments so that
    later training is seen. torch: eager.

    Args:
        function: maps tensors to a tuple of tensors, each with the batch on its first axis.
        variables: Keras variables that `function` reads.
        ranks: dtype and shape of each argument; `None` first marks the batch axis, and -1 another
            axis of any length.

    Returns:
        A function from NumPy arrays to a list of NumPy arrays.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _tensorflow(function, ranks)
    if backend == "jax":
        return _jax(function, variables, ranks)
    if backend == "torch":
        return _torch(function)
    raise ValueError(
        f"Attacks need gradients, from tensorflow, jax or torch. Received: backend {backend!r}."
    )


def _tensorflow(function, ranks):
    import tensorflow as tf

    signature = [
        tf.TensorSpec([None if axis == -1 else axis for axis in shape], dtype)
        for dtype, shape in ranks
    ]
    graph = tf.function(function, input_signature=signature, autograph=False, jit_compile=False)

    def run(*arrays):
        return [output.numpy() for output in graph(*arrays)]

    return run


def _jax(function, variables, ranks):
    import jax

    variables = list(variables)

    @jax.jit
    def graph(values, arrays):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return tuple(function(*arrays))

    def run(*arrays):
        n = next(
            len(a) for a, (_, shape) in zip(arrays, ranks, strict=True) if shape[:1] == (None,)
        )
        # Powers of two bound the number of compilations.
        width = 1 << max(0, n - 1).bit_length()
        padded = [
            np.concatenate([a, np.repeat(a[-1:], width - n, axis=0)])
            if shape[:1] == (None,) and width > n
            else a
            for a, (_, shape) in zip(arrays, ranks, strict=True)
        ]
        values = [variable.value for variable in variables]
        return [np.asarray(output)[:n] for output in graph(values, padded)]

    return run


def _torch(function):
    import torch

    def run(*arrays):
        with torch.no_grad():
            tensors = [keras.ops.convert_to_tensor(a) for a in arrays]
            return [keras.ops.convert_to_numpy(output) for output in function(*tensors)]

    return run
