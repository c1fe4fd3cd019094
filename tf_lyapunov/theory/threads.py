"""How many threads NumPy's and SciPy's linear algebra uses."""

import contextlib
import functools
import threading

_lock = threading.Lock()
_held = {"count": 0, "limits": None}


@contextlib.contextmanager
def one_thread():
    """Context in which BLAS uses one thread.

    Threads that wait for one another spin: on two busy cores the eigenvalues of a 256×256 matrix
    took 500 ms of CPU time, against 2 ms with one thread. For many small matrices, and during
    training. May be nested and entered from several threads: the last one out restores the number.

    Example:

    >>> with one_thread():
    ...     round(1.0)
    1
    """
    with _lock:
        if _held["count"] == 0:
            _held["limits"] = _thread_controller().limit(limits=1)
        _held["count"] += 1
    try:
        yield
    finally:
        with _lock:
            _held["count"] -= 1
            if _held["count"] == 0:
                _held["limits"].restore_original_limits()
                _held["limits"] = None


@functools.cache
def _thread_controller():
    """Looked up once: finding the libraries of the process takes milliseconds."""
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()
