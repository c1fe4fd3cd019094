"""The train command on the other backends, and `keras.distribution` for JAX."""

import json

import numpy as np
import pytest
from worker_processes import free_ports, start

from tf_lyapunov.experiments import files
from tf_lyapunov.modelfile import load_model

BUDGETS = (0.9, 1.1)
CONFIG = f"""
name: elsewhere
dataset: {{name: blobs}}
model: {{name: mlp, widths: [8]}}
layers: {{budgets: [{BUDGETS[0]}, {BUDGETS[1]}]}}
training:
  epochs: 3
  batch_size: 25
  optimizer: {{name: sgd, learning_rate: 0.3, momentum: 0.9}}
  loss: {{name: cross_entropy, temperature: 0.2}}
"""


def train(folder, name, backend, *options, **environment):
    (folder / "config.yaml").write_text(CONFIG)
    command = ("train", folder / "config.yaml", "--run-dir", folder / name, *options)
    log = folder / f"{name}-{len(list(folder.glob('*.log')))}.log"
    return start(log, *command, KERAS_BACKEND=backend, **environment), log


def finish(process, log):
    assert process.wait(timeout=300) == 0, log.read_text()
    return log.read_text()


def weights(run):
    return load_model(run / files.MODEL).get_weights()


def assert_within_budgets(run):
    for kernel, budget in zip((w for w in weights(run) if w.ndim == 2), BUDGETS, strict=True):
        norm = np.linalg.norm(kernel.astype(float), 2)
        assert norm <= budget * (1 + 4 * np.finfo(float).eps)


def assert_equal_within_rounding(first, second):
    for a, b in zip(weights(first), weights(second), strict=True):
        assert np.abs(a - b).max() <= 512 * np.finfo("float32").eps


@pytest.fixture(scope="module", params=["jax", "torch"])
def trained(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    finish(*train(folder, "run", request.param))
    return request.param, folder


def test_the_train_command_keeps_its_budgets(trained):
    backend, folder = trained
    assert_within_budgets(folder / "run")
    versions = json.loads((folder / "run" / files.VERSIONS).read_text())
    assert versions["backend"] == backend


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits(trained):
    backend, folder = trained
    finish(*train(folder, "cut", backend, "--epochs", "2"))
    assert "Continuing after epoch 2" in finish(*train(folder, "cut", backend, "--resume"))
    for a, b in zip(weights(folder / "cut"), weights(folder / "run"), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_two_devices_of_jax_train_to_the_weights_of_one(trained):
    backend, folder = trained
    if backend != "jax":
        pytest.skip("only JAX has keras.distribution")
    finish(*train(folder, "two", backend, "--strategy", "mirrored", "--devices", "2"))
    assert_within_budgets(folder / "two")
    assert_equal_within_rounding(folder / "two", folder / "run")


@pytest.mark.slow
def test_loss_scaling_on_two_devices_of_jax_continues_after_an_interruption(trained):
    backend, folder = trained
    if backend != "jax":
        pytest.skip("only JAX has keras.distribution")
    options = ("--strategy", "mirrored", "--devices", "2", "--precision", "mixed_float16")
    finish(*train(folder, "half", backend, *options))
    finish(*train(folder, "part", backend, *options, "--epochs", "2"))
    finish(*train(folder, "part", backend, *options, "--resume"))
    for a, b in zip(weights(folder / "half"), weights(folder / "part"), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_two_processes_of_jax_train_to_the_weights_of_one(trained):
    backend, folder = trained
    if backend != "jax":
        pytest.skip("only JAX has keras.distribution")
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    config = {"cluster": {"worker": addresses}}
    workers = []
    for index in range(2):
        config["task"] = {"type": "worker", "index": index}
        options = ("--strategy", "multiworker")
        workers.append(train(folder, "workers", backend, *options, TF_CONFIG=json.dumps(config)))
    for process, log in workers:
        finish(process, log)
    assert_within_budgets(folder / "workers")
    assert_equal_within_rounding(folder / "workers", folder / "run")
