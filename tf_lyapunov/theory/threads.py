"""How many threads NumPy's and SciPy's linear algebra uses."""

import concurrent.futures
import contextlib
import contextvars
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


def each_in_threads(function, items, threads=None):
    """`function` of every item, in their order: as many at once as BLAS would use threads for one.

    Each then has one thread of BLAS, and none waits for another. NumPy lets others run meanwhile;
    Python code does not, so that this is for large arrays alone. Within `one_thread`, and where
    the user allows BLAS one thread, it is a plain loop. Whoever may end early closes the generator,
    which holds BLAS at one thread until then.

    Args:
        function: of one item.
        items: of any number.
        threads: how many at once instead; 1 for a plain loop.

    Example:

    >>> list(each_in_threads(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    items = list(items)
    count = min(threads or blas_threads(), len(items))
    if count < 2:
        yield from map(function, items)
        return
    with one_thread():
        pool = concurrent.futures.ThreadPoolExecutor(count)
        try:
            # Settings such as numpy.errstate are the caller's.
            done = [pool.submit(contextvars.copy_context().run, function, i) for i in items]
            while done:
                yield done.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)


def blas_threads():
    """Threads that NumPy's and SciPy's BLAS uses now, at least 1."""
    controllers = _thread_controller().lib_controllers
    return max((c.num_threads or 1 for c in controllers if c.user_api == "blas"), default=1)


@functools.cache
def _thread_controller():
    """Looked up once: finding the libraries of the process takes milliseconds."""
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()
