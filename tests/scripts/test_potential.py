"""The rebuild of Meunier et al.: its networks, its text, and the depth it measures."""

import dataclasses
import importlib
import json
import pathlib
import sys

import keras
import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
NAMES = ("potential.depth", "potential.jobs", "potential.tables", "potential.training")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def record(job, clean=0.99, certified=(0.95, 0.9, 0.85), broken=0):
    return {
        "identity": job.identity(),
        "epochs": [{"epoch": 1, "accuracy": 0.5}],
        "clean": clean,
        "certified": list(certified),
        "curve": np.linspace(clean, 0, 31).tolist(),
        "gain_upper_bound": 1.25,
        "verdict": "PROVED",
        "certify_cpu": 1.0,
        "pgd": [0.9, 0.8, 0.7, 0.6],
        "broken": broken,
        "parameters": 7,
        "seconds": {"cpu": 2.0, "wall": 3.0, "cpu_per_epoch": 2.0, "wall_per_epoch": 3.0},
    }


def all_jobs(jobs):
    parts = ("table_2", "table_3", "table_4", "table_5", "figure_3", "figures_4_5", "relaxed")
    found = [*jobs.mnist_jobs(False), *jobs.family_jobs(False), *jobs.small_cifar_jobs(False)]
    return found + [job for part in parts for job in jobs.cifar_jobs(part, False, 200)]


def test_every_row_that_the_authors_trained_has_a_network_of_its_own(scripts):
    jobs = scripts("potential.jobs")
    found = all_jobs(jobs)
    names = [job.name for job in found]
    assert len(set(names)) == len(names)
    for part, table in (("table_2", jobs.TABLE_2), ("table_3", jobs.TABLE_3)):
        labels = {job.label for job in found if job.part == part}
        assert labels == {name for name, row in table.items() if row[4] is not None}
    assert sum(job.part == "table_4" for job in found) == 12
    json.dumps([job.identity() for job in found])


def test_equal_time_gives_cheap_layers_more_epochs(scripts):
    jobs = scripts("potential.jobs")
    cost = {"cayley": 4.0, "sandwich": 8.0, "almost_orthogonal": 1.0}
    records = {f"epochs_{f}": {"seconds": {"cpu_per_epoch": s}} for f, s in cost.items()}
    found = {job.label: job.epochs for job in jobs.equal_time_jobs(False, records)}
    epochs = jobs.family_jobs(False)[0].epochs
    assert found == {"cayley": epochs, "sandwich": epochs // 2, "almost_orthogonal": 4 * epochs}


def test_results_hold_every_record_and_count_broken_certificates(scripts, tmp_path):
    pytest.importorskip("matplotlib")
    jobs, tables = scripts("potential.jobs"), scripts("potential.tables")
    machine = {"backend": "x", "keras": "3", "python": "3", "cores": 2, "cpu": "some CPU"}
    facts = {"date": "2026-01-01", "machine": machine, "quick": False, "cifar": ""}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "models").mkdir()
    for job in all_jobs(jobs):
        path = tmp_path / "models" / f"{job.name}.json"
        path.write_text(json.dumps(record(job, broken=job.name == "table_2_cpl_s")))
    assert tables.write_results(tmp_path) == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "1 CERTIFICATES BROKEN" in text
    for label in (
        "CPL-XL, batch 128, ours",
        "SOC-20, ours",
        "1000 layers",
        "h = 0.01, ours",
        "LiResNet of 32 channels",
    ):
        assert label in text, label
    assert len((tmp_path / "networks.csv").read_text().splitlines()) == len(all_jobs(jobs)) + 1
    for name in (
        "certified",
        "families",
        "figure_1_cifar10",
        "figure_2_cifar100",
        "figure_4",
        "cifar_small",
    ):
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000


def test_a_training_that_another_table_holds_is_not_repeated(scripts, tmp_path):
    jobs, training = scripts("potential.jobs"), scripts("potential.training")
    first = jobs.family_jobs(False)[0]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{first.name}.json").write_text(json.dumps(record(first, clean=0.123)))
    again = dataclasses.replace(first, name="other", part="equal_time")
    found = training.run(again, {}, tmp_path, {})
    assert found["clean"] == 0.123 and found["identity"] == again.identity()
    assert (tmp_path / "models" / "other.json").exists()
    other = dataclasses.replace(again, name="longer", epochs=first.epochs + 1, dataset="blobs")
    with pytest.raises(KeyError):  # it would be trained: there is no directory for its data
        training.run(other, {}, tmp_path, {})


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="recompute_grad is TensorFlow's"
)
def test_a_thousand_layers_train(scripts):
    losses = scripts("potential.depth").in_new_process(1000, False, 3)["losses"]
    assert np.all(np.isfinite(losses)) and losses[2] < losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="recompute_grad is TensorFlow's"
)
def test_memory_is_linear_in_depth_and_rematerialisation_saves_most_of_it(scripts):
    depth = scripts("potential.depth")

    def grown(layers, remat):
        found = depth.in_new_process(layers, remat, 1)
        return found["mb"] - found["mb_before"], found["losses"][0]

    (small, _), (large, loss), (saved, same) = grown(60, False), grown(240, False), grown(240, True)
    # What does not depend on depth only lowers the ratio of 4; allocators waste a fifth.
    assert large < 4.8 * small
    assert saved < 0.7 * large and same == pytest.approx(loss, rel=1e-6)
