"""A whole run leaves every file, and each step can be repeated from the files alone."""

import json
import shutil

import numpy as np
import pytest

from tf_lyapunov import datasets
from tf_lyapunov.certification import Certificate
from tf_lyapunov.errors import ModelFileError, RunDirectoryError
from tf_lyapunov.experiments import files, runner
from tf_lyapunov.experiments.config import AttackConfig
from tf_lyapunov.experiments.reading import parse_config

# A few hundred float32 operations lie between the two computations of a small layer's norm.
ROUNDING = 256 * np.finfo("float32").eps
CONFIG = """
name: small
title: A small <b>run</b>
dataset: {name: blobs}
model: {name: mlp, widths: [8]}
claim: {gain: 2.0}
training:
  epochs: 3
  batch_size: 16
  optimizer: {learning_rate: 0.05}
  loss: {name: cross_entropy, temperature: 0.2}
radii: [0.1, 0.4]
attacks:
- {name: pgd, steps: 5}
- {name: fgm}
- {name: pgd, steps: 5, norm: linf}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "small"
    with files.RunDirectory(path).open() as run:
        results, report = runner.run_experiment(
            parse_config(CONFIG), run, command="tf-lyapunov run x"
        )
    return path, results, report


def test_a_run_leaves_every_file(finished):
    path, _, report = finished
    names = {p.name for p in path.iterdir()}
    assert names >= set(files.ARTIFACTS) - {files.PLOTS}
    assert report == path / files.REPORT
    assert not [name for name in names if ".tmp" in name]


def test_the_results_are_consistent_and_prove_what_they_say(finished):
    _, results, _ = finished
    for row in results.rows:
        for name, attacked in row["attacked"].items():
            assert attacked <= row["clean"]
            if "l∞" not in name:
                assert row["certified"] <= attacked
        assert not any(row["broken"].values())
    assert [row["radius"] for row in results.rows] == [0.1, 0.4]
    assert set(results.rows[0]["attacked"]) == {"PGD-5", "FGM", "PGD-5 l∞"}
    assert results.gain["measured_max"] <= results.gain["upper_bound"] <= results.gain["claimed"]
    assert results.gain["claimed"] == 2.0
    assert [row["name"] for row in results.layers] == ["dense_1", "logits"]
    for row in results.layers:
        # The bound is computed apart from the constraint's and rounded up on its own.
        assert 0 < row["sigma_upper_bound"] <= row["budget"] * (1 + ROUNDING)
    assert results.design["check"]["holds"] is True
    assert len(results.history) == 3 and results.dataset["test"] == 60
    assert set(results.seconds) == {"training", "certification", "attack"}


def test_the_weakest_inputs_and_counts_by_class_are_those_of_the_certificate(finished):
    path, results, report = finished
    assert results.classes["attacks"] == ["PGD-5", "FGM"] and results.classes["radii"] == [0.1, 0.4]
    for place, row in enumerate(results.rows):
        sums = {
            key: sum(c[key][place] for c in results.classes["rows"]) / 60
            for key in ("certified", "attacked")
        }
        assert sums["certified"] == pytest.approx(row["certified"], rel=1e-12)
        # Right under every l2 attack, so that no single one may find more.
        assert row["certified"] <= sums["attacked"]
        assert sums["attacked"] <= min(row["attacked"][n] for n in ("PGD-5", "FGM")) + 1e-12
    radii = np.sort(Certificate.load(path / files.CERTIFICATE).radius)
    weakest = [e["radius"] for e in results.examples if e["role"] == "weakest"]
    assert weakest == radii[radii > 0][: len(weakest)].tolist() and len(weakest) == 4
    assert all(e["distance"] >= e["radius"] for e in results.examples)
    assert len((path / files.ATTACK_JSON).read_text()) < 20_000
    assert "decided most narrowly" in report.read_text()


def test_the_report_escapes_what_users_write(finished):
    _, _, report = finished
    text = report.read_text()
    assert "A small &lt;b&gt;run&lt;/b&gt;" in text and "A small <b>run</b>" not in text


def test_the_attacks_table_is_written_as_csv(finished):
    header = (finished[0] / files.ATTACK_CSV).read_text().splitlines()[0].split(",")
    assert header[:4] == ["radius", "count", "clean", "certified"]
    assert "attacked/PGD-5" in header and "gain/PGD-5/max" in header


def test_the_report_is_made_again_from_the_files(finished):
    path, results, _ = finished
    before = (path / files.RESULTS).read_text()
    (path / files.RESULTS).unlink()
    with runner.open_run(path) as run:
        again, _ = runner.report_run(run)
    assert again == results
    assert (path / files.RESULTS).read_text() == before


def test_a_repeated_certification_gives_the_same_certificate(finished):
    path, results, _ = finished
    with runner.open_target(path) as opened:
        certificate = runner.certify_target(opened)
        assert certificate.gain_upper_bound == results.gain["upper_bound"]
        assert opened.design.budgets[0] == results.layers[0]["budget"]


def test_a_model_file_alone_can_be_certified_and_attacked(finished, tmp_path):
    model = tmp_path / "m.keras"
    shutil.copy(finished[0] / files.MODEL, model)
    out = tmp_path / "certificate.json"
    with runner.open_target(model, data="blobs") as opened:
        certificate = runner.certify_target(opened, samples=10, out=out)
        found = runner.attack_target(opened, [AttackConfig(name="fgm")], [0.2], samples=10)
    assert len(certificate.radius) == 10 and found["samples"] == 10
    assert out.exists() and sorted(p.name for p in tmp_path.iterdir()) == [out.name, model.name]


def test_data_of_another_shape_are_refused_and_of_equal_size_reshaped(finished):
    path = finished[0]
    with (
        runner.open_target(path, data="digits") as opened,
        pytest.raises(ValueError, match="shape"),
    ):
        opened.arrays("test", None)
    with runner.open_target(path) as opened:
        opened.data = datasets.Dataset(
            "flat",
            *(np.zeros((4, 3, 2), "float32"), np.zeros(4, "int64")) * 3,
        )
        x, _ = opened.arrays("test", 2)
        assert x.shape == (2, 6)
        with pytest.raises(ValueError, match="samples=0"):
            opened.arrays("test", 0)


def test_targets_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="neither a run directory nor a model file"):
        with runner.open_target(tmp_path / "nothing"):
            pass
    (tmp_path / "m.keras").write_text("x")
    with pytest.raises(ValueError, match="no `--data`"):
        with runner.open_target(tmp_path / "m.keras"):
            pass
    with pytest.raises(RunDirectoryError, match="no run here"):
        with runner.open_target(tmp_path):
            pass
    (tmp_path / files.CONFIG).write_text(CONFIG)
    with pytest.raises(RunDirectoryError, match="not trained to its end"):
        with runner.open_target(tmp_path):
            pass


def test_a_damaged_design_is_reported(finished, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(finished[0], path)
    (path / files.DESIGN).write_text('{"format"')
    with pytest.raises(RunDirectoryError, match="file of the run is damaged"):
        with runner.open_target(path):
            pass


def test_a_baseline_has_a_certificate_but_no_design(tmp_path):
    text = CONFIG.replace("claim: {gain: 2.0}\n", "")
    with files.RunDirectory(tmp_path / "run").open() as run:
        results, _ = runner.run_experiment(parse_config(text), run)
    assert results.design is None and results.certificate["verdict"] == "PROVED"
    assert any("baseline" in note for note in results.notes)
    assert not run.has(files.DESIGN)


def test_budgets_set_by_hand_hold_and_are_not_called_a_design(tmp_path):
    text = CONFIG.replace("claim: {gain: 2.0}", "layers: {budgets: [1.5, 0.5]}")
    with files.RunDirectory(tmp_path / "run").open() as run:
        results, _ = runner.run_experiment(parse_config(text), run)
    assert results.design is None
    assert [row["budget"] for row in results.layers] == [1.5, 0.5]
    for row in results.layers:
        assert row["sigma_upper_bound"] <= row["budget"] * (1 + ROUNDING)
    assert any("by hand" in note for note in results.notes)


def test_names_of_attacks_tell_them_apart():
    names = {
        runner.attack_name(AttackConfig(**spec))
        for spec in (
            {"name": "fgm"},
            {"name": "fgm", "norm": "linf"},
            {"name": "pgd"},
            {"name": "pgd", "restarts": 3},
            {"name": "pgd", "loss": "margin"},
            {"name": "pgd", "bounds": (0, 1)},
        )
    }
    assert len(names) == 6


def test_run_json_is_valid_json(finished):
    record = json.loads((finished[0] / files.RECORD).read_text())
    assert record["command"] == "tf-lyapunov run x" and record["date"]


@pytest.mark.parametrize(
    "name",
    [
        files.RECORD,
        files.ATTACK_JSON,
        files.VERSIONS,
        files.DESIGN,
        files.METRICS_JSON,
        files.CERTIFICATE,
    ],
)
def test_damage_is_refused_with_the_files_name_and_the_rest_stays(finished, tmp_path, name):
    """Flipped bits, cuts, and other JSON: never another exception, never a changed number."""
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    original = (path / name).read_bytes()
    with files.RunDirectory(path).open(resume=True) as run:
        truth = runner.compose_results(run)
    rng = np.random.default_rng(len(name))
    damaged = [b"", b"null", b"7", b"{}", b"[[1]]", b'[{"a": []}]', original[:-9], b"[" * 9000]
    for _ in range(40):
        flipped = bytearray(original)
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        (path / name).write_bytes(content)
        with files.RunDirectory(path).open(resume=True) as run:
            try:
                found = runner.compose_results(run)
            except RunDirectoryError as error:
                assert name in str(error)
                refused += 1
            else:  # white space, or a file without entries; numbers of metrics.json are not sealed
                assert name == files.METRICS_JSON or content == b"{}" or found == truth
    assert refused > len(damaged) // 2
    (path / name).write_bytes(original)
    with files.RunDirectory(path).open(resume=True) as run:
        assert runner.compose_results(run) == truth
