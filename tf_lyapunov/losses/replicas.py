"""Sums over the replicas of a training step, for losses that are no means over the examples."""

import importlib

import keras


def over_replicas(*values):
    """Each value summed over the replicas of `tf.distribute`, and how many they are.

    Elsewhere the values themselves and 1: on JAX a step sees the whole batch, however it is laid
    out, and on PyTorch Keras trains on one device.

    Args:
        values: float tensors that do not depend on the weights, of equal shapes on all replicas.

    Returns:
        List of tensors and a float.

    Example:

    >>> sums, replicas = over_replicas(keras.ops.ones(2))
    >>> keras.ops.convert_to_numpy(sums[0]).tolist(), replicas
    ([1.0, 1.0], 1.0)
    """
    if keras.backend.backend() == "tensorflow":
        context = importlib.import_module("tensorflow").distribute.get_replica_context()
        # None outside of `Strategy.run`, where there is one batch.
        if context is not None and context.num_replicas_in_sync > 1:
            return context.all_reduce("sum", list(values)), float(context.num_replicas_in_sync)
    return list(values), 1.0
