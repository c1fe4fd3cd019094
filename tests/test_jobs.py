"""Work spread by joblib: every result once, errors as they are, lost work done again."""

import itertools
import sys
import threading
import time

import joblib
import pytest
from joblib.parallel import ThreadingBackend

from tf_lyapunov.errors import DistributionError
from tf_lyapunov.jobs import checked_jobs, each


class Losing(ThreadingBackend):
    """Loses the task of every number in `losses`, as often as it says there."""

    losses = {}  # noqa: RUF012

    def submit(self, func, callback=None):
        number = func.items[0][1][2]
        if self.losses.get(number, 0) > 0:
            self.losses[number] -= 1
            func = gone
        return super().submit(func, callback)


def gone():
    raise OSError("a worker is gone")


class Listing(ThreadingBackend):
    """Gives nothing before all is done, as ray's backend."""

    supports_return_generator = False


joblib.register_parallel_backend("losing", Losing)
joblib.register_parallel_backend("listing", Listing)


def square(number):
    return number * number


def failing(number):
    if number == 3:
        raise KeyError(number)
    return number


def itself(number):
    return number


@pytest.mark.parametrize("backend", ["threading", "listing", "losing"])
@pytest.mark.parametrize("jobs", [1, 2, -1, None])
def test_every_result_is_given_once_whatever_the_backend(backend, jobs):
    with joblib.parallel_config(backend=backend, n_jobs=2):
        found = list(each(square, itself, range(40), jobs))
    assert sorted(found) == [(i, i * i) for i in range(40)]


@pytest.mark.parametrize("backend", ["threading", "listing"])
def test_none_ends_the_work_and_what_is_begun_is_given(backend):
    asked = []

    def task(number):
        asked.append(number)
        return number if number < 5 else None

    with joblib.parallel_config(backend=backend):
        found = list(each(square, task, range(100), 2))
    assert sorted(found) == [(i, i * i) for i in range(5)]
    assert asked == list(range(6))


@pytest.mark.parametrize("backend", ["threading", "listing"])
@pytest.mark.parametrize("where", ["work", "task"])
def test_an_error_of_the_work_is_raised_as_it_is_and_not_tried_again(backend, where):
    asked = []

    def task(number):
        asked.append(number)
        return failing(number) if where == "task" else number

    with joblib.parallel_config(backend=backend), pytest.raises(KeyError):
        list(each(failing if where == "work" else itself, task, range(8), 2))
    assert asked.count(3) == 1


def test_an_error_that_cannot_be_sent_is_told_in_words():
    with (
        joblib.parallel_config(backend="threading"),
        pytest.raises(RuntimeError, match=r"ValueError.*stuck"),
    ):
        list(each(stuck, itself, range(3), 2))


def stuck(number):
    raise ValueError("stuck", threading.Lock())


def test_what_is_lost_with_a_worker_is_done_again():
    Losing.losses = {3: 2, 17: 1}  # none is finished when they are lost, so quick are the others
    with joblib.parallel_config(backend="losing"):
        found = list(each(square, itself, range(20), 2))
    assert sorted(found) == [(i, i * i) for i in range(20)]
    assert Losing.losses == {3: 0, 17: 0}


def test_workers_that_are_lost_for_ever_end_in_an_error_that_says_what_is_not_done():
    Losing.losses = {3: 10**6}
    found = []
    with joblib.parallel_config(backend="losing"), pytest.raises(DistributionError) as error:
        for item, _ in each(square, itself, range(6), 2):
            found.append(item)
    Losing.losses = {}
    assert "OSError: a worker is gone" in str(error.value) and "numbers 3." in str(error.value)
    assert sorted(found) == [0, 1, 2, 4, 5]  # all but the one that ends its worker


def test_a_consumer_that_stops_leaves_no_thread_and_no_warning(recwarn):
    before = threading.active_count()
    with joblib.parallel_config(backend="threading"):
        found = each(slowly, itself, itertools.islice(itertools.count(), 50), 2)
        next(found)
        found.close()  # the second task is still being done
    end = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)  # that task runs to its end
    assert threading.active_count() <= before
    assert not [w for w in recwarn if "tasks" in str(w.message)]


def slowly(number):
    time.sleep(0.5 * number)
    return number


@pytest.mark.parametrize("jobs", [1.5, "2", True])
def test_jobs_that_are_no_number_are_refused(jobs):
    with pytest.raises(TypeError, match="Received: jobs="):
        checked_jobs(jobs)


def test_no_jobs_at_all_are_refused():
    with pytest.raises(ValueError, match="Received: jobs=0"):
        checked_jobs(0)


def test_processes_are_not_forked():
    with (
        joblib.parallel_config(backend="multiprocessing"),
        pytest.raises(ValueError, match="forks"),
    ):
        list(each(square, itself, range(3), 2))


def test_one_job_needs_no_joblib_and_several_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    assert list(each(square, itself, range(2), 1)) == [(0, 0), (1, 1)]
    with pytest.raises(ImportError, match=r"tf_lyapunov\[jobs\]"):
        list(each(square, itself, range(2), 2))
