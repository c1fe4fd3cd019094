"""Work on many items, here or by joblib's workers: processes, or machines of a cluster.

`each` gives every result as soon as it is there. What is lost with a worker is done again; what no
worker finishes is an error, after all others have been given.
"""

import contextlib
import hashlib
import itertools
import numbers
import pickle
import warnings

import numpy as np

from tf_lyapunov.errors import DistributionError

# Calls of joblib in a row that may fail before anything more is finished.
_FAILURES = 4
# Bytes of the work up to which it travels with every task. Beyond, joblib keeps one copy for all
# (in shared memory, or on one machine of a cluster, with which it may be lost).
_SMALL = 2**20
# Tasks per worker and call, of joblib's backends that give nothing before all is done.
_ROUND = 4
# The work that this process did last, by its digest.
_HELD = {}


def checked_jobs(jobs):
    """`jobs` as joblib takes it: a whole number that is not 0, or None.

    Raises:
        TypeError, ValueError: if it is something else.

    Example:

    >>> checked_jobs(-1)
    -1
    """
    if jobs is None:
        return None
    if isinstance(jobs, bool) or not isinstance(jobs, numbers.Integral):
        raise TypeError(
            "`jobs` must be a whole number of workers, or None for joblib's own setting. "
            f"Received: jobs={jobs!r}."
        )
    if jobs == 0:
        raise ValueError(
            "`jobs` must not be 0. Received: jobs=0. Pass 1 for this process alone, -1 for one "
            "worker per core, -2 for one fewer."
        )
    return int(jobs)


def each(work, task, items, jobs=1):
    """Pairs of items and `work(task(item))`, in the order in which they are finished.

    Args:
        work: function of a task. For other processes it is pickled, once a process, and must not
            change; the same tasks give the same results, wherever they are done.
        task: function of an item that makes its task when a worker is about to be free; None ends
            the work there: of later items none is begun.
        items: distinct integers.
        jobs: 1 for this process, without joblib; other numbers, and None, as `joblib.Parallel`
            takes them: negative ones count from the number of cores, None is the setting of
            `joblib.parallel_config`, whose backend is used.

    Raises:
        ImportError: without joblib, where it is needed.
        DistributionError: if workers are lost again and again, or the cluster is gone.
    """
    if jobs == 1:
        for item in items:
            given = task(item)
            if given is None:
                return
            yield item, work(given)
        return
    joblib = _joblib()
    # Suspects were begun when something was lost. They come last, one by one, so that whoever ends
    # its worker ends no other's work.
    waiting, suspects, failures = list(items), set(), 0
    _check_backend()
    packed = pickle.dumps(work, protocol=5)
    key = hashlib.sha256(packed).hexdigest()
    while waiting:
        # A copy anew for every call: the last one may be lost with its machine.
        whole = packed if len(packed) <= _SMALL else np.frombuffer(packed, np.uint8).copy()
        some = [i for i in waiting if i not in suspects] or waiting[:1]
        before, tasks = len(waiting), _Tasks(task, some)
        try:
            for item, result, error in _call(joblib, whole, key, tasks, jobs):
                if error is not None:
                    tasks.error = error
                    break
                waiting.remove(item)
                yield item, result
            if len(waiting) == before and not tasks.over and tasks.error is None:
                raise RuntimeError("joblib gave no result")
            failures = 0
        except Exception as lost:
            failures = failures + 1 if len(waiting) == before else 1
            suspects |= tasks.begun
            waiting.sort(key=tasks.begun.__contains__)
            if tasks.error is None and failures >= _FAILURES:
                raise DistributionError(_words(waiting, lost)) from lost
        if tasks.error is not None:
            raise tasks.error
        if tasks.over:
            return


class _Tasks:
    """Tasks of items, one by one, until one of them is None or fails.

    joblib asks for them in threads of its own.
    """

    def __init__(self, task, items):
        self.task, self.items = task, items
        self.over, self.error, self.begun = False, None, set()

    def __iter__(self):
        for item in self.items:
            if self.over or self.error is not None:
                return
            try:
                given = self.task(item)
            except Exception as error:
                self.error = error
                return
            if given is None:
                self.over = True
                return
            self.begun.add(item)
            yield item, given


def _words(waiting, lost):
    shown = ", ".join(map(str, sorted(waiting)[:5])) + (", …" if len(waiting) > 5 else "")
    reason = " ".join(str(lost).split()).rstrip(".")
    return (
        f"Workers were lost {_FAILURES} times without finishing anything more, or the cluster is "
        f"gone. Received: {type(lost).__name__}: {reason[:300]}. Not done: {len(waiting)} inputs, "
        f"numbers {shown}. Check that the workers run, have this package and memory enough, or "
        "pass jobs=1."
    )


def _joblib():
    try:
        import joblib
    except ImportError as error:
        raise ImportError(
            "Several jobs need joblib. Received: a system without it. Install it with "
            "pip install 'tf_lyapunov[jobs]', or pass jobs=1."
        ) from error
    return joblib


def _backend():
    from joblib.parallel import get_active_backend

    return get_active_backend()[0]


def _check_backend():
    if type(_backend()).__name__ == "MultiprocessingBackend":
        raise ValueError(
            "joblib's backend 'multiprocessing' forks a process in which Keras has threads, and "
            "may hang. Received: parallel_config(backend='multiprocessing'). Use 'loky', its "
            "default, or a cluster."
        )


def _call(joblib, whole, key, tasks, jobs):
    """`(item, result, error)` of one call of joblib."""
    backend = _backend()
    if jobs is not None and jobs > 0:
        jobs = min(jobs, max(len(tasks.items), 2))  # what may end its worker is not done here
    calls = (joblib.delayed(_run)(whole, key, item, given) for item, given in tasks)
    common = dict(n_jobs=jobs, backend=backend, batch_size=1)
    with _reporting(backend), _limited(backend):
        if getattr(backend, "supports_return_generator", False):
            parallel = joblib.Parallel(return_as="generator_unordered", **common)
            found = parallel(calls)
            try:
                # Not `yield from`, which closes `found` before the warning is silenced.
                for one in found:  # noqa: UP028
                    yield one
            finally:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that results were given up is no news
                    found.close()
            return
        size = _ROUND * max(backend.effective_n_jobs(-1 if jobs is None else jobs), 1)
        while some := list(itertools.islice(calls, size)):
            yield from joblib.Parallel(**common)(some)


@contextlib.contextmanager
def _reporting(backend):
    """Within it joblib hears of tasks that dask has given up.

    joblib's dask backend waits for ever for tasks that dask reports as errors of its own: whose
    workers died again and again, or that no worker can unpickle.
    """
    if type(backend).__module__ != "joblib._dask":
        yield
        return
    submit = backend.submit

    def reported(function, callback=None):
        future = submit(function, callback)

        def report(ended):
            error = ended.exception()
            if error is not None and callback is not None:
                callback(error)

        future.add_done_callback(report)
        return future

    backend.submit = reported
    try:
        yield
    finally:
        del backend.submit


@contextlib.contextmanager
def _limited(backend):
    """Within it loky's new workers use one BLAS thread each, as far as nobody said otherwise."""
    held = getattr(backend, "inner_max_num_threads", 0)
    if type(backend).__name__ != "LokyBackend" or held is not None:
        yield
        return
    backend.inner_max_num_threads = 1
    try:
        yield
    finally:
        backend.inner_max_num_threads = held


def _run(whole, key, item, given):
    """`(item, result, error)` of one task, in a worker."""
    try:
        work = _HELD.get(key)
        if work is None:
            work = pickle.loads(memoryview(whole))
            _HELD.clear()
            _HELD[key] = work
        return item, work(given), None
    except Exception as error:
        return item, None, _portable(error)


def _portable(error):
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
