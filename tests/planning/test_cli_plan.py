import json

import pytest

from tf_lyapunov.cli import BAD_INPUT, DONE, main

CONFIG = "{dataset: {name: mnist}, model: {name: mlp}, layers: {budgets: [1, 1, 1]}}"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_plan_prints_tables(config, capsys):
    assert main(["plan", config, "--devices", "8xH100", "--layers"]) == DONE
    shown = capsys.readouterr().out
    for word in (
        "small: mlp on 8xH100",
        "40.48k",
        "all-reduce",
        "data sheet",
        "not measured",
        "quickest",
    ):
        assert word in shown


def test_plan_prints_one_json_object(config, capsys):
    assert main(["plan", config, "--devices", "2x8xA100", "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["parameters"] == 40_480
    assert found["devices"]["replicas"] == 16
    assert found["chosen"]["fits"] is True
    assert found["devices"]["efficiency"]["source"] == "assumed, not measured"
    assert len(found["bounds"]) == 3
    assert found["chosen"]["training_seconds"] == pytest.approx(
        found["data"]["epochs"] * found["chosen"]["epoch_seconds"]
    )


@pytest.mark.parametrize(
    "extra",
    [
        ["--devices", "8xH1000"],
        ["--devices", "0xH100"],
        ["--devices", "many"],
        ["--precision", "float8"],
        ["--network", "0"],
        ["--set", "training.batch_sise=3"],
        ["--set", "training.batch_size=4", "--devices", "8xH100"],
        ["--measure", "--devices", "H100"],
        ["--unknown"],
    ],
)
def test_bad_input_ends_with_two_and_no_traceback(config, capsys, extra):
    assert main(["plan", config, *extra]) == BAD_INPUT
    shown = capsys.readouterr()
    assert "Error:" in shown.err and "Traceback" not in shown.err


def test_a_missing_file_ends_with_two(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "none.yaml")]) == BAD_INPUT
    assert "cannot be read" in capsys.readouterr().err
