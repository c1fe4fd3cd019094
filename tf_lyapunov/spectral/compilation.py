"""How computations outside of a model's step run: compiled by the backend."""

import importlib

import keras


def compiled(function):
    """`function` as one graph: `tf.function` (without XLA), `jax.jit`, or itself under torch.

    Args:
        function: of tensors, to tensors, without side effects.

    Returns:
        A function of the same tensors.

    Example:

    >>> float(compiled(lambda x: 2 * x)(keras.ops.convert_to_tensor(1.5)))
    3.0
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        graph = importlib.import_module("tensorflow").function(function, autograph=False)
        # TensorFlow counts the first traces of several layers' functions as retraces of one.
        graph._omit_frequent_tracing_warning = True
        return graph
    if backend == "jax":
        return importlib.import_module("jax").jit(function)
    return function
