"""Several replicas train to the weights of one, survive kills, and write their files once."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
from worker_processes import Processes, until

from tf_lyapunov.cli import BAD_INPUT, DONE
from tf_lyapunov.experiments import files
from tf_lyapunov.modelfile import load_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")

EPOCHS = 8
BUDGETS = (0.9, 1.1)
# 120 examples in batches of 25: two replicas share neither 25 nor the last 20 without padding.
CONFIG = f"""
name: distributed
seed: 5
dataset: {{name: blobs}}
model: {{name: mlp, widths: [8]}}
layers: {{budgets: [{BUDGETS[0]}, {BUDGETS[1]}]}}
training:
  epochs: {EPOCHS}
  batch_size: 25
  optimizer: {{name: sgd, learning_rate: 0.3, momentum: 0.9, schedule: {{name: cosine}}}}
  loss: {{name: cross_entropy, temperature: 0.2}}
"""
TWO = ("--strategy", "multiworker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    (path / "config.yaml").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def processes(folder):
    started = Processes(folder)
    yield started
    started.close()


def command(folder, name, *options):
    return ("train", folder / "config.yaml", "--run-dir", folder / name, *options)


@pytest.fixture(scope="module")
def single(folder, processes):
    code, log = processes.run(*command(folder, "single"))
    assert code == DONE, log
    return folder / "single"


@pytest.fixture(scope="module")
def two_workers(folder, processes):
    workers = processes.cluster(*command(folder, "workers", *TWO))
    codes = [processes.wait(child) for child, _ in workers]
    assert codes == [DONE, DONE], [log.read_text() for _, log in workers]
    return folder / "workers"


def weights(run):
    return load_model(run / files.MODEL).get_weights()


def history(run):
    return json.loads((run / files.METRICS_JSON).read_text())


def assert_equal_within_rounding(first, second):
    """A sum over two halves is rounded differently; momentum and 40 steps carry it on."""
    for a, b in zip(weights(first), weights(second), strict=True):
        assert np.abs(a - b).max() <= 512 * np.finfo("float32").eps * max(1.0, np.abs(a).max())


def assert_within_budgets(run):
    kernels = [w.astype(float) for w in weights(run) if w.ndim == 2]
    for kernel, budget in zip(kernels, BUDGETS, strict=True):
        assert np.linalg.norm(kernel, 2) <= budget * (1 + 4 * np.finfo(float).eps)
    assert any(
        np.linalg.norm(k, 2) > 0.9 * b for k, b in zip(kernels, BUDGETS, strict=True)
    )  # they bind


def test_two_workers_train_to_the_weights_of_one_process(single, two_workers):
    assert_equal_within_rounding(single, two_workers)
    assert_within_budgets(two_workers)
    for one, two in zip(history(single), history(two_workers), strict=True):
        assert one["accuracy"] == pytest.approx(two["accuracy"], abs=2 / 25)  # batches of 26
        assert one["val_accuracy"] == pytest.approx(two["val_accuracy"], abs=1e-6)
        assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-3)


def test_only_the_chief_writes_and_says_so_in_the_record(two_workers):
    assert len(history(two_workers)) == EPOCHS
    names = sorted(p.name for p in (two_workers / files.CHECKPOINTS).iterdir())
    assert names == [f"epoch-{e:06d}.npz" for e in (EPOCHS - 1, EPOCHS)]
    noted = json.loads((two_workers / files.RECORD).read_text())["execution"]
    assert noted["workers"] == noted["replicas"] == 2 and noted["global_batch_size"] == 25


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_worker_costs_nothing_after_a_restart(folder, processes, two_workers, victim):
    path = folder / f"killed-{victim}"
    workers = processes.cluster(*command(folder, path.name, *TWO))
    until(lambda: (path / files.METRICS_JSON).exists() and len(history(path)) >= 2)
    time.sleep(random.Random(victim).uniform(0, 0.05))
    os.kill(workers[victim][0], signal.SIGKILL)
    assert processes.wait(workers[victim][0]) == -signal.SIGKILL
    survivor, log = workers[1 - victim]
    assert processes.wait(survivor) != DONE, log.read_text()  # by itself
    done = len(history(path))
    assert 2 <= done < EPOCHS and not (path / files.MODEL).exists()
    again = processes.cluster(*command(folder, path.name, *TWO, "--resume"))
    assert [processes.wait(child) for child, _ in again] == [DONE, DONE], again[0][1].read_text()
    assert "Continuing after epoch" in again[0][1].read_text()
    for a, b in zip(weights(path), weights(two_workers), strict=True):
        assert np.array_equal(a, b)
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in history(path)]
    assert plain == [{k: v for k, v in r.items() if k != "seconds"} for r in history(two_workers)]


def test_mirrored_replicas_train_to_the_weights_of_one(folder, processes, single):
    options = ("--strategy", "mirrored", "--devices", "2", "--deterministic")
    code, log = processes.run(*command(folder, "mirrored", *options))
    assert code == DONE, log
    assert_equal_within_rounding(single, folder / "mirrored")
    assert_within_budgets(folder / "mirrored")


@pytest.mark.parametrize("how", ["halves", pytest.param("two", marks=pytest.mark.slow)])
def test_batch_normalization_takes_the_statistics_of_all_replicas(folder, processes, how):
    """Whole batches: examples that only pad a batch would be part of its statistics."""
    text = CONFIG.replace("[8]", "[8], batch_norm: true").replace("size: 25", "size: 24")
    (folder / "normalized.yaml").write_text(text.replace(f"epochs: {EPOCHS}", "epochs: 2"))

    def command(name, *options):
        return "train", folder / "normalized.yaml", "--run-dir", folder / name, *options

    expected, found = folder / f"normalized-one-{how}", folder / f"normalized-{how}"
    code, log = processes.run(*command(expected.name))
    assert code == DONE, log
    if how == "halves":
        code, log = processes.run(*command(found.name, "--strategy", "mirrored", "--devices", "2"))
        assert code == DONE, log
    else:  # workers whose statistics differ would end with other codes
        workers = processes.cluster(*command(found.name, *TWO))
        codes = [processes.wait(child) for child, _ in workers]
        assert codes == [DONE, DONE], workers[0][1].read_text()
    moving = [w for w in load_model(expected / files.MODEL).weights if "moving" in w.path]
    assert len(moving) == 2 and not np.allclose(moving[1], 1)
    assert_equal_within_rounding(expected, found)


REPLICAS = """
import numpy as np
from tf_lyapunov import datasets
from tf_lyapunov.experiments import execution, files, training
from tf_lyapunov.experiments.reading import load_config

config = load_config({config!r})
run = execution.Execution("mirrored", devices=2)
seen = []
inner = training.save_model
def look(model, path):
    pass
training.save_model = look
original = training._fit
def fit(*arguments):
    found = original(*arguments)
    for variable in found.model.variables + found.model.optimizer.variables:
        copies = [np.asarray(v) for v in variable.value.values]
        assert len(copies) == 2, variable.path
        seen.append(np.array_equal(*copies))
    return found
training._fit = fit
directory = files.RunDirectory({path!r}).open()
training.train(config, directory, datasets.load("blobs", seed=5), execution=run)
assert len(seen) > 8 and all(seen), seen
"""


def test_every_variable_has_the_same_bits_on_both_replicas(folder, processes):
    code, log = processes.run(
        code=REPLICAS.format(config=str(folder / "config.yaml"), path=str(folder / "copies"))
    )
    assert code == 0, log


def test_a_worker_that_never_comes_ends_the_run_with_its_name(folder, processes):
    config = {"cluster": {"worker": ["localhost:39871", "localhost:39872"]}}
    for index, expected in ((0, "worker 1 (localhost:39872)"), (1, "does not answer")):
        config["task"] = {"type": "worker", "index": index}
        started = time.monotonic()
        code, log = processes.run(
            *command(folder, f"alone-{index}", *TWO, "--worker-timeout", "2"),
            TF_CONFIG=json.dumps(config),
        )
        assert code == BAD_INPUT and time.monotonic() - started < 30
        assert expected in log and "within 2 s" in log and "Traceback" not in log


SEPARATED = """
import keras, numpy as np, tensorflow as tf
from tf_lyapunov.losses import HKR, KR, MulticlassHKR, MulticlassSoftHKR
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
rng = np.random.default_rng(0)
x = rng.normal(size=(16, 4)).astype("float32")
y = np.repeat([0, 1, 2, 1], [8, 4, 2, 2])  # each replica has classes that the other lacks

def trained(scope, loss):
    with scope:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), loss)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    history = model.fit(data, epochs=3, verbose=0).history["loss"]
    return history, model.get_weights()

import contextlib
for loss in (KR(), HKR(2.0), MulticlassHKR(2.0), MulticlassSoftHKR(2.0)):
    (one, first), (two, second) = (trained(s, loss) for s in (contextlib.nullcontext(),
                                                               strategy.scope()))
    # The gain of a step is below 1; sums over two halves are rounded differently.
    assert np.allclose(one, two, rtol=1e-5, atol=1e-5), (loss.name, one, two)
    for a, b in zip(first, second):
        assert np.abs(a - b).max() < 1e-5, loss.name
    print(loss.name, "alike")
"""


def test_separations_of_two_replicas_are_those_of_the_whole_batch(processes):
    code, log = processes.run(code=SEPARATED)
    assert code == DONE and log.count("alike") == 4, log
