"""Training continues bit for bit after a kill at any moment, and keeps every row of its metrics."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from tf_lyapunov import datasets
from tf_lyapunov.errors import ConfigError, RunDirectoryError
from tf_lyapunov.experiments import files, objectives, training
from tf_lyapunov.experiments.reading import parse_config
from tf_lyapunov.modelfile import load_model

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Dropout, momentum, a schedule: everything that has a state. Most tests need no claim, and are
# much faster without one.
PLAIN = """
name: resumed
seed: 3
dataset: {name: blobs}
model: {name: mlp, widths: [8], dropout: 0.3}
training:
  epochs: %d
  batch_size: 16
  optimizer: {name: %s, learning_rate: 0.02, schedule: {name: triangular}%s}
  loss: {name: cross_entropy, temperature: 0.2}
"""
CONFIG = PLAIN.replace("training:", "claim: {gain: 2.0}\ntraining:")


def config(epochs=4, optimizer="adam", text=PLAIN):
    return parse_config(text % (epochs, optimizer, ", momentum: 0.9" * (optimizer == "sgd")))


def trained(path, cfg, *, resume=False, on_epoch=None, say=print, data=None):
    data = data or datasets.load("blobs", seed=cfg.seed)
    with files.RunDirectory(path).open(resume=resume) as run:
        return training.train(cfg, run, data, resume=resume, on_epoch=on_epoch, say=say)


class Stop(Exception):
    """Raised in the middle of training in place of a kill."""


def stop_after(epochs, error=Stop):
    def on_epoch(done, of, row):
        if done == epochs:
            raise error

    return on_epoch


def rows(path):
    """The metrics without the clock."""
    history = json.loads((path / files.METRICS_JSON).read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def same_weights(first, second):
    pairs = zip(first.get_weights(), second.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "kind", ["adam", "sgd", "guaranteed", pytest.param("amortised", marks=pytest.mark.slow)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, kind):
    if kind == "guaranteed":
        cfg = config(text=CONFIG)
    elif kind == "amortised":
        # 3 does not divide the steps of an epoch: the counter must go on across it.
        text = (CONFIG % (4, "adam", "")).replace(
            "  loss:", "  guarantee: monitor\n  every: 3\n  loss:"
        )
        cfg = parse_config(text)
    else:
        cfg = config(optimizer=kind)
    whole = trained(tmp_path / "whole", cfg)
    with pytest.raises(Stop):
        trained(tmp_path / "cut", cfg, on_epoch=stop_after(2))
    resumed = trained(tmp_path / "cut", cfg, resume=True)
    assert resumed.resumed_from == 2
    assert same_weights(whole.model, resumed.model)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert [row["epoch"] for row in rows(tmp_path / "cut")] == [1, 2, 3, 4]
    lines = (tmp_path / "cut" / files.METRICS_CSV).read_text().splitlines()
    assert len(lines) == 5
    # A finished run stays as it is.
    again = trained(tmp_path / "cut", cfg, resume=True)
    assert again.resumed_from == 4 and same_weights(whole.model, again.model)


def test_the_test_above_can_fail(tmp_path):
    """Negative control: without the optimizer's and the seeds' state the weights differ."""
    cfg = config()
    whole = trained(tmp_path / "whole", cfg)
    with pytest.raises(Stop):
        trained(tmp_path / "cut", cfg, on_epoch=stop_after(2))
    restore = training.restore

    def forgetful(model, checkpoint):
        restore(model, checkpoint)
        for variable in model.variables:
            if "seed_generator_state" in variable.path:
                variable.assign(variable.value * 0)

    training.restore = forgetful
    try:
        resumed = trained(tmp_path / "cut", cfg, resume=True)
    finally:
        training.restore = restore
    assert not same_weights(whole.model, resumed.model)


def test_a_corrupt_newest_checkpoint_falls_back_and_says_so(tmp_path):
    cfg = config()
    whole = trained(tmp_path / "whole", cfg)
    with pytest.raises(Stop):
        trained(tmp_path / "cut", cfg, on_epoch=stop_after(3))
    newest = tmp_path / "cut" / files.CHECKPOINTS / "epoch-000003.npz"
    newest.write_bytes(newest.read_bytes()[:-100])
    said = []
    resumed = trained(tmp_path / "cut", cfg, resume=True, say=said.append)
    assert resumed.resumed_from == 2
    assert any("corrupt" in message for message in said)
    assert same_weights(whole.model, resumed.model)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_resuming_where_nothing_is_starts_from_the_beginning(tmp_path):
    fresh = trained(tmp_path / "fresh", config(2), resume=True)
    assert fresh.resumed_from == 0 and len(fresh.history) == 2


def test_more_epochs_may_be_added_when_the_learning_rate_does_not_depend_on_them(tmp_path):
    constant = PLAIN.replace("schedule: {name: triangular}", "schedule: {name: constant}")
    two, four = (parse_config(constant % (n, "adam", "")) for n in (2, 4))
    whole = trained(tmp_path / "whole", four)
    trained(tmp_path / "longer", two)
    longer = trained(tmp_path / "longer", four, resume=True)
    assert longer.resumed_from == 2 and same_weights(whole.model, longer.model)
    with pytest.raises(RunDirectoryError, match="already further"):
        trained(tmp_path / "longer", two, resume=True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(Stop):
        trained(path, config(text=CONFIG), on_epoch=stop_after(1))
    return path


@pytest.mark.parametrize(
    ("change", "field"),
    [("seed: 3", "seed=4"), ("gain: 2.0", "gain=3.0"), ("epochs: 4", "epochs=6")],
)
def test_a_run_is_not_resumed_with_another_configuration(begun, tmp_path, change, field):
    shutil.copytree(begun, tmp_path / "run")
    key, _, value = field.partition("=")
    other = parse_config((CONFIG % (4, "adam", "")).replace(change, f"{key}: {value}"))
    with pytest.raises(RunDirectoryError, match=f"another configuration. Received: .*{field}"):
        trained(tmp_path / "run", other, resume=True)


def test_a_run_is_not_resumed_with_other_data(begun):
    cfg, other = config(text=CONFIG), datasets.load("blobs", seed=9)
    with pytest.raises(RunDirectoryError, match="other data"):
        trained(begun, cfg, resume=True, data=other)


def test_an_interrupt_says_how_to_go_on_and_loses_nothing(tmp_path):
    cfg = config()
    with pytest.raises(KeyboardInterrupt, match=r"after 2 of 4 epochs.*--resume"):
        trained(tmp_path / "cut", cfg, on_epoch=stop_after(2, KeyboardInterrupt))
    assert trained(tmp_path / "cut", cfg, resume=True).resumed_from == 2


def test_a_diverging_run_is_stopped_with_the_reason_and_its_last_good_state(tmp_path):
    text = PLAIN % (4, "sgd", "")
    with pytest.raises(ValueError, match=r"not finite.*learning_rate=1e\+30"):
        trained(tmp_path / "run", parse_config(text.replace("0.02", "1.0e30")))
    assert not (tmp_path / "run" / files.MODEL).exists()


def test_training_stops_when_it_is_accurate_enough_and_stays_stopped(tmp_path):
    text = (PLAIN % (50, "adam", "")).replace("epochs:", "stop_at_accuracy: 0.5\n  epochs:")
    cfg = parse_config(
        text.replace("dropout: 0.3", "dropout: 0.0").replace("triangular", "constant")
    )
    done = trained(tmp_path / "run", cfg)
    assert 5 <= len(done.history) < 50
    window = [row["accuracy"] for row in done.history[-5:]]
    assert np.mean(window) >= 0.5
    again = trained(tmp_path / "run", cfg, resume=True)
    assert len(again.history) == len(done.history) and same_weights(done.model, again.model)


def test_every_budget_holds_after_training(tmp_path):
    done = trained(tmp_path / "run", config(2, text=CONFIG))
    kernels = [layer.kernel for layer in done.model.layers if hasattr(layer, "kernel")]
    for kernel, budget in zip(kernels, done.design.budgets, strict=True):
        sigma = np.linalg.norm(keras.ops.convert_to_numpy(kernel).astype(float), 2)
        assert sigma <= budget * (1 + 4 * np.finfo(float).eps)
    loaded = load_model(tmp_path / "run" / files.MODEL)
    assert same_weights(done.model, loaded)


def test_weight_decay_is_in_the_loss_and_not_on_the_biases(tmp_path):
    text = PLAIN % (1, "adam", "")
    data = datasets.load("blobs", seed=3)
    model = training.build_model(parse_config(text), data)
    training.add_weight_decay(model, 0.5)
    expected = sum(0.5 * np.sum(w.astype(float) ** 2) for w in model.get_weights() if w.ndim == 2)
    for variable in model.trainable_variables:
        if variable.value.shape == (8,):
            variable.assign(variable.value + 1.0)
    losses = keras.ops.convert_to_numpy(sum(model.losses))
    assert np.isclose(losses, expected, rtol=1e-6)


def test_a_claim_is_not_designed_for_a_model_that_branches():
    """The cascade's theorem is about chains: its budgets would prove nothing here."""
    text = (CONFIG % (1, "adam", "")).replace("mlp, widths: [8], dropout: 0.3", "residual_mlp")
    cfg = parse_config(text)
    with pytest.raises(ConfigError, match=r"chain of layers.*layers\.budgets"):
        training.make_design(cfg, training.build_model(cfg, datasets.load("blobs")))


def test_a_model_that_does_not_fit_the_data_is_a_configuration_error():
    text = (CONFIG % (1, "adam", "")).replace("name: mlp, widths: [8], dropout: 0.3", "name: cnn")
    with pytest.raises(ConfigError, match="does not fit the data set"):
        training.build_model(parse_config(text), datasets.load("blobs"))


def test_the_triangular_schedule_has_its_corners():
    schedule = objectives.PiecewiseLinear([0, 4, 8, 10], [0.0, 1.0, 0.05, 0.0])
    rates = [
        float(keras.ops.convert_to_numpy(schedule(step))) for step in (0, 2, 4, 6, 8, 9, 10, 99)
    ]
    assert np.allclose(rates, [0, 0.5, 1, 0.525, 0.05, 0.025, 0, 0], atol=1e-7)


# ---------------------------------------------------------------------------------- real kills

# Imports once, then forks a child for every line on stdin: children die, imports are kept.
SCRIPT = """
import os, sys
from tf_lyapunov import datasets
from tf_lyapunov.experiments import files, objectives, training
from tf_lyapunov.experiments.reading import parse_config
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        config = parse_config(open(sys.argv[1]).read())
        with files.RunDirectory(sys.argv[2]).open(resume=True) as run:
            training.train(config, run, datasets.load("blobs", seed=config.seed), resume=True)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def epochs_done(path):
    try:
        return len(json.loads((path / files.METRICS_JSON).read_text()))
    except FileNotFoundError:
        return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    epochs, path = 16, tmp_path / "killed"
    text = PLAIN % (epochs, "adam", "")
    (tmp_path / "config.yaml").write_text(text)
    zygote = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "config.yaml"), str(path)],
        env=dict(os.environ, PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="3"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def start():
        zygote.stdin.write("start\n")
        zygote.stdin.flush()
        return int(zygote.stdout.readline())

    try:
        for target in (1, 5, 9):
            child = start()
            deadline = time.monotonic() + 120
            while epochs_done(path) < target:
                assert time.monotonic() < deadline, "training does not advance"
                time.sleep(0.002)
            time.sleep(random.Random(target).uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            assert int(zygote.stdout.readline()) == signal.SIGKILL
            assert target <= epochs_done(path) < epochs
        start()
        assert int(zygote.stdout.readline()) == 0
    finally:
        zygote.kill()
        zygote.communicate()
    whole = trained(tmp_path / "whole", parse_config(text))
    assert same_weights(whole.model, load_model(path / files.MODEL))
    assert rows(path) == rows(tmp_path / "whole")
    assert [p.name for p in path.rglob("*") if ".tmp" in p.name] == []
