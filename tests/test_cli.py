"""The command line: exit codes, one JSON object, clean errors, interrupts that lose nothing."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tf_lyapunov.cli import BAD_INPUT, DONE, INTERRUPTED, NOT_PROVED, main

COMMANDS = (
    "design", "train", "certify", "verify", "attack", "bracket", "evaluate", "report", "run",
    "export-mat", "import-mat", "export-onnx",
)  # fmt: skip
ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """
name: tiny
dataset: {name: blobs}
model: {name: mlp, widths: [8]}
claim: {gain: 2.0}
training:
  epochs: 2
  batch_size: 16
  optimizer: {learning_rate: 0.05}
  loss: {name: cross_entropy, temperature: 0.2}
radii: [0.1, 0.3]
attacks: [{name: pgd, steps: 3}]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["run", str(config), "--run-dir", str(path)]) == DONE
    return path


def call(capsys, *arguments):
    """Exit code, stdout and stderr; no traceback in either."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def call_json(capsys, *arguments):
    code, out, _ = call(capsys, *arguments, "--json")
    return code, json.loads(out)  # fails unless stdout is one JSON object and nothing else


# ------------------------------------------------------------------------------------ design


CLAIM = ("--delta", 0.4, "--nu", -2, "--layers", 3, "--activation", "leaky_relu")


def test_design_prints_budgets_and_verdict(capsys):
    code, out, _ = call(capsys, "design", *CLAIM, "--negative-slope", 0.1, "--rule", "sound")
    assert code == DONE
    assert "PROVED" in out and len(re.findall(r"sigma <= [\d.]+", out)) == 3


def test_design_as_json_can_be_read_as_a_design(capsys):
    from tf_lyapunov.design import Design

    code, record = call_json(capsys, "design", "--gain", 1.5, "--layers", 2)
    assert code == DONE
    assert Design.from_json(json.dumps(record)).gain == 1.5


def test_a_published_design_that_proves_nothing_fails_only_where_a_proof_is_required(capsys):
    claim = ("design", "--delta", 0.89, "--nu", 0.28, "--rule", "lyapunov")
    assert call(capsys, *claim)[0] == DONE
    assert call(capsys, *claim, "--require-proof")[0] == NOT_PROVED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--delta", 1), "`--delta` with `--nu`"),
        (("--delta", 1, "--nu", -1, "--gain", 2), "`--delta` with `--nu`"),
        (("--delta", 1, "--nu", 1), "1/4"),
        (("--delta", -1, "--nu", -1), "delta"),
        (("--gain", -1), "must be positive"),
        (("--gain", 1, "--activation", "softmax"), "softmax"),
        (("--gain", 1, "--activation", "nonsense"), "nonsense"),
        (("--gain", 1, "--weights", "1,x"), "1,x"),
        (("--gain", 1, "--layers", 0), "--layers"),
        (("--delta", 1, "--nu", -1, "--rule", "magic"), "magic"),
    ],
)
def test_impossible_designs_are_bad_input(capsys, arguments, message):
    code, out, err = call(capsys, "design", *arguments)
    assert code == BAD_INPUT and message in err and out == ""


# ------------------------------------------------------------------------------- a whole run


def test_run_prints_the_table_and_leaves_a_report(run, config, tmp_path, capsys):
    code, out, err = call(capsys, "run", config, "--run-dir", tmp_path / "r", "--epochs", 1)
    assert code == DONE
    assert "certified" in out and "report.html" in out
    assert "epoch 1/1" in err
    assert (tmp_path / "r" / "report.html").stat().st_size > 1000


def test_certify_meets_or_fails_a_requirement(run, capsys):
    assert call(capsys, "certify", run)[0] == DONE
    code, record = call_json(capsys, "certify", run, "--require", "0.0001:0.1")
    assert code == DONE and record["failed"] == []
    code, record = call_json(capsys, "certify", run, "--require", "100:0.9")
    assert code == NOT_PROVED and record["failed"][0]["required"] == 0.9
    assert call(capsys, "certify", run, "--require-proof")[0] == DONE


def test_certify_keeps_finished_inputs_and_refuses_another_state(run, tmp_path, capsys):
    state = tmp_path / "state"
    arguments = ("certify", run, "--samples", 2, "--state", state)
    first = call_json(capsys, *arguments, "--method", "linear")
    kept = state.read_bytes()
    assert call_json(capsys, *arguments, "--method", "linear", "--jobs", 1) == first
    assert first[0] == DONE and state.read_bytes() == kept
    code, record = call_json(capsys, *arguments, "--method", "local")
    assert code == BAD_INPUT and "other settings" in record["error"]["message"]
    for wrong in (("--jobs", 0), ("--time-budget", -1)):
        code, record = call_json(capsys, "certify", run, *wrong)
        assert code == BAD_INPUT and "Received: " in record["error"]["message"]


def test_a_published_claim_that_is_not_proved_fails_a_required_proof(tmp_path, capsys):
    path = tmp_path / "published.yaml"
    path.write_text(
        CONFIG.replace("claim: {gain: 2.0}", "claim: {delta: 0.89, nu: 0.28}\nrule: lyapunov")
    )
    arguments = ("train", path, "--run-dir", tmp_path / "r", "--epochs", 1)
    assert call(capsys, *arguments)[0] == DONE
    code, _, err = call(capsys, "certify", tmp_path / "r", "--require-proof")
    assert code == NOT_PROVED and "the design's claim" in err


def test_attack_evaluate_and_report_read_the_run(run, capsys):
    code, record = call_json(
        capsys,
        "attack",
        run,
        "--radius",
        0.2,
        "--steps",
        2,
        "--samples",
        20,
        "--out",
        run / "a.json",
    )
    assert code == DONE and record["samples"] == 20 and len(record["rows"]) == 1
    assert json.loads((run / "a.json").read_text())["rows"] == record["rows"]
    code, record = call_json(capsys, "evaluate", run, "--radius", 0.1, "--radius", 0.2)
    assert code == DONE
    for row in record["rows"]:
        assert row["certified"] <= row["attacked"]["PGD-3"] <= row["clean"]
    code, record = call_json(capsys, "report", run)
    assert code == DONE and record["report"].endswith("report.html")
    assert "certified" in call(capsys, "report", run)[1]


def test_train_resumes_and_refuses_to_overwrite(config, tmp_path, capsys):
    path = tmp_path / "t"
    arguments = ("train", config, "--run-dir", path, "--set", "training.batch_size=32")
    assert call(capsys, *arguments, "--epochs", 1)[0] == DONE
    code, _, err = call(capsys, *arguments)
    assert code == BAD_INPUT and "--resume" in err and "--overwrite" in err
    code, record = call_json(capsys, *arguments, "--resume", "--epochs", 2)
    assert code == DONE and record["resumed_from"] == 1 and record["epochs"] == 2
    assert call(capsys, *arguments, "--overwrite", "--epochs", 1)[0] == DONE


def test_the_default_run_directory_carries_the_experiments_name(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "train", config, "--epochs", 1)[0] == DONE
    assert (tmp_path / "runs" / "tiny" / "model.keras").exists()


# ---------------------------------------------------------------------------------- bad input


def test_a_typo_in_a_configuration_names_the_nearest_key(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("epochs", "epoch"))
    code, _, err = call(capsys, "train", path)
    assert code == BAD_INPUT and "Did you mean `epochs`?" in err and "line 7" in err
    code, record = call_json(capsys, "train", path)
    assert code == BAD_INPUT and record["error"]["type"] == "ConfigError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("certify", "nowhere"), "neither a run directory nor a model file"),
        (("certify", "nowhere", "--require", "3"), "RADIUS:ACCURACY"),
        (("certify", "nowhere", "--require", "-1:2"), "RADIUS:ACCURACY"),
        (("report", "nowhere"), "no run here"),
        (("train", "nowhere.yaml"), "cannot be read"),
        (("train",), "Missing argument"),
        (("trian",), "No such command"),
        (("train", "x", "--epochs", "many"), "--epochs"),
    ],
)
def test_bad_input_is_one_clean_message_and_exit_code_2(capsys, arguments, message):
    code, _, err = call(capsys, *arguments)
    assert code == BAD_INPUT and message in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--radius", -1), "-1"),
        (("--radius", "nan"), "nan"),
        (("--split", "exam"), "exam"),
        (("--samples", 0), "samples=0"),
        (("--data", "digits"), "input shape"),
        (("--data", "mnits"), "mnits"),
    ],
)
@pytest.mark.parametrize("command", ["attack", "evaluate"])
def test_impossible_evaluations_are_bad_input(run, capsys, command, arguments, message):
    code, _, err = call(capsys, command, run, *arguments)
    assert code == BAD_INPUT and message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "magic"), "magic"),
        (("--norm", "l3"), "l3"),
        (("--bounds", "1,0"), "low < high"),
        (("--bounds", "1"), "bounds"),
        (("--loss", "hinge"), "hinge"),
    ],
)
def test_impossible_attacks_are_bad_input(run, capsys, arguments, message):
    code, _, err = call(capsys, "attack", run, *arguments)
    assert code == BAD_INPUT and message in err


def test_a_truncated_model_is_bad_input(run, tmp_path, capsys):
    model = tmp_path / "m.keras"
    model.write_bytes((run / "model.keras").read_bytes()[:-50])
    code, _, err = call(capsys, "certify", model, "--data", "blobs")
    assert code == BAD_INPUT and "truncated" in err


def test_a_missing_data_set_names_how_to_get_it(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("blobs", "mnist"))
    code, _, err = call(
        capsys, "train", path, "--data-dir", tmp_path / "d", "--run-dir", tmp_path / "r"
    )
    assert code == BAD_INPUT and "--download" in err and "--data-dir" in err


def test_a_defect_of_ours_is_not_hidden_as_bad_input(monkeypatch):
    from tf_lyapunov.experiments import reading

    def broken(*unused):
        raise KeyError("a defect")

    monkeypatch.setattr(reading, "load_config", broken)
    with pytest.raises(KeyError):
        main(["train", "x.yaml"])


# --------------------------------------------------------------------------------------- help


def test_every_command_shows_an_example_in_its_help(capsys):
    for command in COMMANDS:
        code, out, _ = call(capsys, command, "--help")
        assert code == DONE
        assert f"Example: tf-lyapunov {command}" in " ".join(out.split())
        assert "--json" in out


# ---------------------------------------------------------------------------------- interrupt


def test_control_c_ends_with_130_and_a_way_to_go_on(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("epochs: 2", "epochs: 100000"))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tf_lyapunov.cli",
            "train",
            str(path),
            "--run-dir",
            str(tmp_path / "r"),
        ],
        env=dict(os.environ, PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "r" / "metrics.csv").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "Traceback" not in err and "--resume" in err
