"""The large rebuilds: every row has a configuration, options reach it, results say what is true."""

import importlib
import json
import pathlib
import sys

import pytest

from tf_lyapunov.errors import ConfigError

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
NAMES = ("lyapunov.runs", "lyapunov.cifar", "lyapunov.imagenet")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in [
        n for n in sys.modules if n.startswith(("rebuild_", "lyapunov.tables", "benchmarks"))
    ]:
        del sys.modules[name]


def options(scripts, text="", parts=()):
    return scripts["lyapunov.runs"].parser("", parts).parse_args(text.split())


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_row_has_a_configuration_that_the_options_reach(scripts, name):
    script, runs = scripts[name], scripts["lyapunov.runs"]
    assert set(script.PARTS) == set(script.HEADINGS)
    given = options(scripts, "--epochs 3 --subset 64 --samples 5 --pgd-steps 10")
    for row in [row for rows in script.PARTS.values() for row in rows]:
        config = runs.configured(row, given)
        assert config.training.epochs == 3 and config.samples == 5 and config.dataset.limit == 64
        pgd = next(attack for attack in config.attacks if attack.name == "pgd")
        assert pgd.steps == 10 and pgd.relative_step == 0.2
        assert row.endswith("_fgm") == (config.training.adversarial is not None)
        quick = runs.configured(row, options(scripts), script.quick_overrides(row))
        assert quick.training.epochs == 1 and quick.samples == 16


def test_table_3_has_a_row_for_every_printed_number(scripts):
    imagenet = scripts["lyapunov.imagenet"]
    printed = imagenet.printed()
    assert len(printed) == 28 and printed["lyapunov-imagenet_074_033", 0.4] == 0.36
    for name in imagenet.PARTS["table_3"]:
        config = scripts["lyapunov.runs"].configured(name, options(scripts))
        assert (config.name, config.radii[0]) in printed
        assert config.dataset.name == "imagenet2012" and config.model.name == "resnet50"


def test_published_bounds_are_those_of_the_printed_rule(scripts):
    runs = scripts["lyapunov.runs"]
    for row, delta, nu in (("imagenet_074_033", 0.74, 0.33), ("imagenet_100_024_fgm", 1.0, 0.24)):
        config = runs.configured(f"lyapunov/{row}", options(scripts))
        assert config.layers.scope == "kernel"
        # Four decimals are printed in the file.
        assert abs(config.layers.uniform - (1 / delta**2 + 2 * nu / delta)) <= 5e-5


def test_rows_and_parts_can_be_chosen_and_unknown_ones_are_refused(scripts):
    runs, parts = scripts["lyapunov.runs"], {"a": ["x/one", "x/two"], "b": ["y/three"]}
    assert runs.chosen(options(scripts), parts) == parts
    assert runs.chosen(options(scripts, "--only b two"), parts) == {
        "a": ["x/two"],
        "b": ["y/three"],
    }
    with pytest.raises(ConfigError, match="nine"):
        runs.chosen(options(scripts, "--only nine"), parts)


def test_the_strategy_reaches_the_execution(scripts):
    given = options(scripts, "--strategy mirrored --devices 2 --scaling linear --deterministic")
    found = scripts["lyapunov.runs"].execution(given)
    assert (found.strategy, found.devices, found.scaling) == ("mirrored", 2, "linear")
    assert found.deterministic and found.precision == "float32"


def finished(name, certified, broken=0):
    rows = [
        {
            "radius": radius,
            "count": 16,
            "clean": 0.5,
            "certified": certified,
            "attacked": {"FGM": 0.45, "PGD-100": 0.4},
            "gain": {"FGM": {"max": 0.9, "mean": 0.5}},
            "broken": {"FGM": broken},
        }
        for radius in (0.1, 0.4)
    ]
    return {
        "name": name,
        "label": f"label of {name}",
        "part": "table_3",
        "epochs": 2,
        "asked_epochs": 2,
        "batch": 16,
        "train_images": 64,
        "test_images": 16,
        "clean": 0.5,
        "gain_upper_bound": 1.0,
        "seconds": {"training": 60.0},
        "rows": rows,
    }


@pytest.mark.parametrize("broken", [0, 1])
def test_results_show_the_papers_numbers_and_every_contradiction(scripts, tmp_path, broken):
    runs, imagenet = scripts["lyapunov.runs"], scripts["lyapunov.imagenet"]
    argv = ["--data-dir", "/somewhere/private", "--epochs", "2"]
    how = runs.provenance("lyapunov/imagenet.py", options(scripts, " ".join(argv)), argv, "none")
    records = [finished("lyapunov-imagenet_074_033", 0.25, broken)]
    text = runs.write_results(
        tmp_path, "Title", imagenet.HEADINGS, records, how, imagenet.printed()
    )
    assert ("CONTRADICTION" in text) == bool(broken)
    assert "private" not in text and "--data-dir DIR --epochs 2" in text
    assert "36" in text and "25" in text  # the paper's accuracy at 0.4, and what is certified
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["records"][0]["rows"][1]["certified"] == 0.25
    assert (tmp_path / "rows.csv").read_text().count("\n") == 3
    assert (tmp_path / "table_3.svg").stat().st_size < 300_000


def test_results_hold_the_runs_of_earlier_calls(scripts, tmp_path, monkeypatch):
    runs = scripts["lyapunov.runs"]
    parts = {"a": ["x/one", "x/two"], "b": ["y/three"]}
    for name in ("x-two", "y-three"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / runs.files.RESULTS).write_text("{}")
    monkeypatch.setattr(runs, "record", lambda path, part: (part, path.name))
    assert runs.finished(tmp_path, parts) == [("a", "x-two"), ("b", "y-three")]
