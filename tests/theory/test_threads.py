"""Work in threads: the order, the caller's settings, the end by an error, and BLAS afterwards."""

import threading

import numpy as np
import pytest

from tf_lyapunov.theory import threads
from tf_lyapunov.theory.threads import blas_threads, each_in_threads, one_thread


@pytest.fixture
def several(monkeypatch):
    """As many threads as on a machine with four cores."""
    monkeypatch.setattr(threads, "blas_threads", lambda: 4)


def test_results_come_in_order_from_several_threads(several):
    meeting = threading.Barrier(4, timeout=60)  # passed only if four are there at once

    def met(i):
        meeting.wait()
        return i, threading.get_ident()

    found = list(each_in_threads(met, range(8)))
    assert [i for i, _ in found] == list(range(8))
    assert threading.get_ident() not in {thread for _, thread in found}


def test_settings_of_the_caller_hold_in_threads(several):
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        list(each_in_threads(lambda x: np.float64(x) * 1e300, [1.0, 1e300]))
    with np.errstate(over="ignore"):
        found = list(each_in_threads(lambda x: np.float64(x) * 1e300, [1.0, 1e300]))
    assert found == [1e300, np.inf]


def test_an_error_ends_the_work_and_leaves_blas_as_it_was(several):
    before, begun = threads._thread_controller().info(), []

    def failing(i):
        begun.append(i)
        if i == 0:
            raise ValueError("the first")
        threading.Event().wait(0.05)

    with pytest.raises(ValueError, match="the first"):
        list(each_in_threads(failing, range(100)))
    assert len(begun) < 100
    assert threads._thread_controller().info() == before


def test_one_thread_is_a_loop_and_results_that_are_given_up_end_it():
    before = blas_threads()
    with one_thread():
        assert blas_threads() == 1
        here = list(each_in_threads(lambda i: threading.get_ident(), range(3)))
        assert here == [threading.get_ident()] * 3
    some = each_in_threads(abs, range(50))
    assert next(some) == 0
    some.close()
    assert blas_threads() == before
