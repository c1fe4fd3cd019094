"""Certificates by other processes: loky's, and those of a dask cluster, one of which is killed.

Workers use another backend of Keras than the model: what they do is NumPy's.
"""

import contextlib
import os
import signal

import joblib
import keras
import numpy as np
import pytest
from keras import layers
from small_proofs import filled

from tf_lyapunov import jobs
from tf_lyapunov.certification import certify
from tf_lyapunov.certification.state import Kept

BACKEND = "numpy"


@pytest.fixture(scope="module")
def model():
    hidden = layers.Dense(6, activation="relu")
    return filled(keras.Sequential([keras.Input((5,)), hidden, layers.Dense(3)]), seed=1)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(10, 5)).astype("float32")


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
    killed, calls = [], []
    add, call = Kept.add, jobs._call

    def adding(self, number, finding):
        add(self, number, finding)
        busy = [place for place, tasks in client.processing().items() if tasks]
        if not killed and busy:
            killed.append(client.run(os.getpid, workers=busy[:1])[busy[0]])
            os.kill(killed[0], signal.SIGKILL)

    def calling(*arguments):
        calls.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(Kept, "add", adding)
    monkeypatch.setattr(jobs, "_call", calling)
    with cluster() as client, joblib.parallel_config(backend="dask"):
        found = certify(model, x, method="linear", jobs=2, state=tmp_path / "state")
    assert len(killed) == 1 and len(calls) >= 2
    assert found.to_json() == alone.to_json()
