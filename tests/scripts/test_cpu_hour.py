"""The equal-time table: what is chosen on what, what is trained how often, and what is kept."""

import dataclasses
import importlib
import json
import pathlib
import sys

import keras
import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
NAMES = ("potential.cpu_hour", "potential.rebuild", "potential.jobs", "potential.training")
ROWS, HELD, TESTED = 120, 40, 30


@pytest.fixture
def hour(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("potential.cpu_hour")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    y, y_test = np.arange(ROWS) % 3, np.arange(TESTED) % 3
    x, x_test = (rng.normal(size=(len(v), 8, 8, 1)).astype("float32") / 9 for v in (y, y_test))
    for images, labels in ((x, y), (x_test, y_test)):
        images[np.arange(len(labels)), labels, labels] += 1.0
    return x, y, x_test, y_test


ENTRIES = ("spectral", "cayley", "sdp", "lipnext")


@pytest.fixture
def table(hour, data, monkeypatch, tmp_path):
    """A table whose trainings are made up: wider networks prove more, `cayley` most."""
    made, proved = [], []

    def trained(entry, dataset, settings, x, y, minutes, seed, folder, clock):
        made.append((entry, settings, len(x), minutes, seed, clock))
        return keras.Sequential(), 60 * minutes + seed

    def measured(model, x, y, radii, attacked=0):
        entry, settings = made[-1][:2]
        proved.append(x)
        share = 0.1 * settings.width + 0.3 * (entry == "cayley") + 0.02 * ENTRIES.index(entry)
        share += 0.05 * (settings.loss == "efficient_margin")
        return {"images": len(x), "clean": 0.9, "certified": [share] * len(radii),
                "gain_upper_bound": 1.0, "attacked": [], "broken": 0}  # fmt: skip

    monkeypatch.setattr(hour, "trained", trained)
    monkeypatch.setattr(hour, "proved", measured)
    plan = hour.Plan(trials=3, seeds=(0, 1), entries=ENTRIES, validation=HELD)
    found = hour.Table("mnist", data, plan, tmp_path, say=lambda line: None)
    found.made, found.proved = made, proved
    return found


def test_settings_are_chosen_on_validation_images_and_the_test_set_is_read_after_a_training(
    hour, table, data
):
    rows = table.rows()
    plan = table.plan
    trials = [m for m in table.made if m[3] == plan.trial_minutes]
    runs = [m for m in table.made if m[3] != plan.trial_minutes]
    assert {m[2] for m in trials} == {ROWS - HELD} and {m[2] for m in runs} == {ROWS}
    for model, images in zip(table.made, table.proved, strict=True):
        own = data[0][ROWS - HELD :] if model in trials else data[2]
        assert np.array_equal(images, own)
    best = {m[1].width for m in trials if m[0] == "cayley"}
    settings, share = rows["chosen"]["cayley"]
    assert settings.width == max(best) and share >= 0.1 * max(best) + 0.3
    # Every family's trials are of the same settings.
    drawn = {entry: [m[1] for m in trials if m[0] == entry][:3] for entry in ENTRIES}
    assert all(drawn[entry] == drawn["spectral"] for entry in ENTRIES)
    assert rows["order"][0] == "cayley"
    long = [m for m in runs if m[3] == plan.long_minutes]
    assert [m[0] for m in long] == rows["order"][:3] and {m[4] for m in long} == {0}
    assert {m[4] for m in runs if m[0] == "sdp" and m[3] == plan.minutes} == {0, 1}
    assert {k: v.loss for k, v in rows["apart"].items()} == {k: k for k in hour.LOSSES}


def test_finished_work_is_kept_and_other_work_is_not_mistaken_for_it(hour, table, data, tmp_path):
    rows, count = table.rows(), len(table.made)
    again = hour.Table("mnist", data, table.plan, tmp_path, say=lambda line: None)
    assert again.rows() == rows and len(table.made) == count
    text = hour.text_of(again, rows)
    for entry in ENTRIES:
        assert f"\n| {entry} | 10 | 2 |" in text
    assert "\n| cayley | 60 | 1 |" in text and "broke 0 certificates" in text
    longer = dataclasses.replace(table.plan, minutes=11.0)
    hour.Table("mnist", data, longer, tmp_path, say=lambda line: None).rows()
    assert {m[3] for m in table.made[count:]} == {11.0}
    other = dataclasses.replace(table.plan, clock="wall")
    hour.Table("mnist", data, other, tmp_path, say=lambda line: None).rows()
    assert len(table.made) > 2 * count and "device minutes" in hour.text_of(
        hour.Table("mnist", data, other, tmp_path), rows
    )


def test_a_training_keeps_orthogonal_kernels_takes_the_time_it_has_and_goes_on(
    hour, data, tmp_path, monkeypatch
):
    settings = hour.Settings(loss="efficient_margin", learning_rate=0.02)
    monkeypatch.setattr(hour, "seconds_per_step", lambda *arguments: 1.0)
    monkeypatch.setattr(hour, "BATCH", 40)
    asked = ("orthogonal", "mnist", settings, *data[:2], 0.1, 0, tmp_path / "run", "cpu")
    model, seconds = hour.trained(*asked)
    lines = (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()
    assert len(lines) == 2  # of three steps, a second each
    assert seconds == pytest.approx(sum(json.loads(line)["cpu"] for line in lines))
    found = hour.proved(model, *data[2:], [0.05, 0.1], attacked=10)
    assert found["gain_upper_bound"] < 2 + 1e-3 and found["broken"] == 0
    assert found["clean"] >= found["certified"][0] >= found["certified"][1]
    monkeypatch.setattr(keras.Model, "fit", None)  # nothing is left to train
    again, same = hour.trained(*asked)
    assert same == seconds
    assert all(map(np.array_equal, again.get_weights(), model.get_weights()))


def test_settings_are_chosen_for_the_radius_that_is_asked_for(
    hour, table, data, monkeypatch, tmp_path
):
    looked_at, proved = [], hour.proved

    def watched(model, x, y, radii, *more):
        looked_at.append(radii)
        return proved(model, x, y, radii, *more)

    monkeypatch.setattr(hour, "proved", watched)
    changes = {"entries": ("cayley",), "long_minutes": 0, "losses_apart": False}
    plan = dataclasses.replace(table.plan, aim=1.58, **changes)
    far = hour.Table("mnist", data, plan, tmp_path, say=lambda line: None)
    rows = far.rows()
    assert rows["apart"] == {} and len(table.made) == plan.trials + len(plan.seeds)
    text = hour.text_of(far, rows)
    assert [1.58] in looked_at and [0.3] not in looked_at and "proved at 1.58; " in text
    assert all(m[1].aim == 1.58 for m in table.made)
    _, more = hour.compiled("spectral", "mnist", hour.Settings(loss="efficient_margin", aim=1.58),
                            *data[:2], 10, 0)  # fmt: skip
    assert more[0].radius == pytest.approx(1.58)
    count = len(table.made)
    table.search("cayley")  # another radius, other trials
    assert len(table.made) == count + plan.trials and table.made[-1][1].aim == 0.3


@pytest.mark.parametrize("broken", [0, 2])
def test_the_table_leaves_those_of_the_paper_alone(hour, monkeypatch, tmp_path, broken):
    rebuild = importlib.import_module("potential.rebuild")
    asked = []
    monkeypatch.setattr(hour, "measure", lambda *arguments: asked.append(arguments) or broken)
    (tmp_path / "run.json").write_text("{}")
    options = ["--only", "cpu_hour", "--out", str(tmp_path), "--aim", "1.58", "--losses-together"]
    assert rebuild.main(options) == bool(broken)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "{}"
    plan, folder = asked[0][1:3]
    assert (plan.aim, plan.losses_apart, folder) == (1.58, False, tmp_path / "cpu_hour")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--families", "cayley,magic"], "unknown families magic"),
        (["--datasets", "svhn"], "unknown datasets svhn"),
        (["--minutes", "0"], "must be positive"),
        (["--seeds", "one"], "--seeds numbers"),
        (["--aim", "0"], "--aim must be"),
        (["--only", "cpu_minute"], "unknown parts cpu_minute"),
    ],
)
def test_what_is_not_there_ends_with_a_message(hour, capsys, arguments, said):
    rebuild = importlib.import_module("potential.rebuild")
    with pytest.raises(SystemExit) as end:
        rebuild.main(["--only", "cpu_hour", *arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err
