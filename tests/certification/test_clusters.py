"""Certificates by other processes: loky's, and those of a dask cluster, one of which is killed.

Workers use another backend of Keras than the model: what they do is NumPy's.
"""

import contextlib
import os
import signal
import threading

import joblib
import numpy as np
import pytest
from small_networks import network_of

from tf_lyapunov.certification import certify
from tf_lyapunov.certification.state import Kept

BACKEND = "numpy"


@pytest.fixture(scope="module")
def model():
    return network_of("dense")


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(6, 5)).astype("float32")


@pytest.fixture(scope="module")
def alone(model, x):
    return certify(model, x, method="linear")


def test_processes_prove_what_one_proves_bit_for_bit(model, x, alone, monkeypatch):
    from joblib.externals.loky import get_reusable_executor

    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    try:
        found = certify(model, x, method="linear", jobs=2)
    finally:
        get_reusable_executor().shutdown(wait=True)
    assert found.to_json() == alone.to_json() and np.all(alone.radius > 0)


def threads_of(number):
    import threadpoolctl

    import tf_lyapunov.program.rounding  # noqa: F401

    return {p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"}


@contextlib.contextmanager
def cluster():
    """Two processes, whose tasks dask gives up at once when their worker dies."""
    dask = pytest.importorskip("dask")
    distributed = pytest.importorskip("distributed")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=50,
            env={"KERAS_BACKEND": BACKEND},
        ) as started,
        distributed.Client(started) as client,
    ):
        yield client


def test_a_cluster_proves_the_same_while_one_of_its_workers_is_killed(
    model, x, alone, tmp_path, monkeypatch
):
    with cluster() as client, joblib.parallel_config(backend="dask"):
        victims = sorted(client.run(os.getpid).values())[:1]
        before, added = Kept.add, threading.Event()

        def add(self, number, finding):
            before(self, number, finding)
            if not added.is_set():
                added.set()
                os.kill(victims[0], signal.SIGKILL)

        monkeypatch.setattr(Kept, "add", add)
        found = certify(model, x, method="linear", jobs=2, state=tmp_path / "state")
        assert victims[0] not in client.run(os.getpid).values()
    assert found.to_json() == alone.to_json()
