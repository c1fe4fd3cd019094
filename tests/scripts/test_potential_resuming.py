"""Trainings of `scripts/potential` that were killed go on, and end as if they had not been."""

import importlib
import json
import pathlib
import sys

import keras
import numpy as np
import pytest

from tf_lyapunov import datasets

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
NAMES = ("potential.boxes", "potential.cpu_hour", "potential.training")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield lambda name: importlib.import_module(f"potential.{name}")
    for name in NAMES:
        sys.modules.pop(name, None)


class Killed(Exception):
    pass


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.uniform(-0.5, 0.5, (48, 8, 8, 1)).astype("float32"), np.arange(48) % 3


def weights_of(train, folder, monkeypatch):
    """Weights of a training at once, and of one that is killed while its last epoch is kept."""
    whole = train(folder / "whole")
    training = sys.modules["potential.training"]
    write, kept = training.write_checkpoint, []

    def struck(*arguments):
        if len(kept) == 2:
            raise Killed
        kept.append(write(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_checkpoint", struck)
        with pytest.raises(Killed):
            train(folder / "killed")
    kept[-1].write_bytes(kept[-1].read_bytes()[:-40])  # and the newest one is damaged
    resumed = train(folder / "killed")
    lines = (folder / "killed" / "epochs.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert not list((folder / "killed").rglob("*.npz"))
    return whole, resumed


def quick(module, monkeypatch):
    """Three steps an epoch, of a second each."""
    monkeypatch.setattr(module, "seconds_per_step", lambda *arguments: 1.0)
    monkeypatch.setattr(module, "BATCH", 16)
    return module


def test_a_killed_training_ends_as_if_it_had_not_been(script, data, tmp_path, monkeypatch, capsys):
    training = script("training")

    def train(folder):
        folder.mkdir(exist_ok=True)
        keras.utils.set_random_seed(0)
        hidden = [keras.layers.Flatten(), keras.layers.Dropout(0.5, name="drop", seed=1)]
        steps = [keras.Input((8, 8, 1)), *hidden, keras.layers.Dense(3, name="last")]
        model = keras.Sequential(steps, name="network")
        model.compile("adam", "mse")
        batches = datasets.Batches(data[0], np.eye(3)[data[1]], batch_size=16, seed=0)
        clock = training.Clock(folder / "epochs.jsonl")
        final = folder / "final.weights.h5"
        training.fit_to_end(model, batches, 3, [clock], folder / "checkpoints", final)
        kept = [np.array(v) for v in model.get_weights()]
        model.load_weights(final)
        assert all(map(np.array_equal, kept, model.get_weights()))
        return kept

    whole, resumed = weights_of(train, tmp_path, monkeypatch)
    assert all(map(np.array_equal, whole, resumed))
    assert "corrupt" in capsys.readouterr().out


@pytest.mark.slow
def test_bounds_grow_on_from_where_they_were(script, data, tmp_path, monkeypatch):
    boxes = quick(script("boxes"), monkeypatch)
    settings = boxes.Settings(width=1)

    def train(folder):
        return boxes.trained(settings, *data, 0.15, 0, folder).get_weights()

    whole, resumed = weights_of(train, tmp_path, monkeypatch)
    assert all(map(np.array_equal, whole, resumed))
    radii = [json.loads(line)["bound_radius"] for line in (tmp_path / "killed/epochs.jsonl").open()]
    assert radii[0] < radii[1] < radii[2] and radii[2] == pytest.approx(0.12)


@pytest.mark.slow
def test_orthogonal_kernels_and_ramps_go_on(script, data, tmp_path, monkeypatch):
    hour = quick(script("cpu_hour"), monkeypatch)
    settings = hour.Settings(loss="efficient_margin", learning_rate=0.02)

    def train(folder):
        asked = ("orthogonal", "mnist", settings, *data, 0.15, 0, folder, "cpu")
        return hour.trained(*asked)[0].get_weights()

    whole, resumed = weights_of(train, tmp_path, monkeypatch)
    assert all(map(np.array_equal, whole, resumed))


def test_without_a_search_no_image_chooses(script, tmp_path, monkeypatch):
    boxes = script("boxes")
    monkeypatch.setattr(boxes, "load", lambda *a: [np.zeros((6, 8, 8, 1)), np.arange(6)] * 2)
    monkeypatch.setattr(boxes, "trained", lambda *arguments: keras.Sequential())
    found = {"method": "box", "inputs": 6, "accuracy": 0.5, "certified": 0.5, "seconds": 1.0}
    monkeypatch.setattr(boxes, "proved", lambda *arguments: found)
    assert boxes.main(["--out", str(tmp_path), "--trials", "0"]) == 0
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["chosen_on"].startswith("nothing") and facts["search_cpu"] == 0
    with pytest.raises(SystemExit):
        boxes.main(["--trials", "-1"])


def test_a_run_of_other_settings_is_moved_aside_and_kept(data, script, tmp_path, monkeypatch):
    boxes = quick(script("boxes"), monkeypatch)
    settings, folder = boxes.Settings(width=1), tmp_path / "final_0"
    own = boxes.trained(settings, *data, 0.05, 0, folder).get_weights()
    monkeypatch.setattr(boxes, "fit_to_end", lambda robust, *arguments: None)
    boxes.trained(settings, *data, 0.06, 0, folder)
    kept = boxes.built(settings, data[0].shape[1:], 1, 0).plain
    kept.load_weights(tmp_path / "final_0_old_1" / "final.weights.h5")
    for before, after in zip(own, kept.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
