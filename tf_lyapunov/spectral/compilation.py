"""How computations outside of a model's step run: compiled by the backend, or on one thread."""

import contextlib
import functools
import importlib
import importlib.util

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


def one_thread():
    """Context in which NumPy's BLAS uses one thread, if `threadpoolctl` is installed.

    Threads that wait for one another spin: on two busy cores the eigenvalues of a 256×256 matrix
    took 500 ms of CPU time, against 2 ms with one thread. For small matrices during training.

    Example:

    >>> with one_thread():
    ...     round(float(keras.ops.sum(keras.ops.ones(3))))
    3
    """
    controller = _thread_controller()
    return contextlib.nullcontext() if controller is None else controller.limit(limits=1)


@functools.cache
def _thread_controller():
    """Looked up once: finding the libraries of the process takes milliseconds."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    return importlib.import_module("threadpoolctl").ThreadpoolController()
