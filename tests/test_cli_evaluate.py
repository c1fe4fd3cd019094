"""`evaluate --suite` on the command line: resumable, comparable, clear about bad input."""

import json

import keras
import pytest
from keras import layers

from tf_lyapunov.cli import BAD_INPUT, DONE, main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("model") / "m.keras"
    net = [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(16, "relu", name="h")]
    keras.Sequential([*net, layers.Dense(10)]).save(path)
    return path


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def test_the_suite_is_written_resumed_and_compared(model, tmp_path, capsys):
    suite = ("evaluate", model, "--data", "digits", "--samples", 20, "--suite")
    few = (
        "--corruption", "fog", "--corruption", "contrast", "--severity", 3, "--snr", 20,
        "--radius", 0.1, "--dropout-layer", "h", "--dropout-rate", 0.5,
    )  # fmt: skip
    first = ("--suite-dir", tmp_path / "a")
    code, out, err = call(capsys, *suite, *few, *first, "--json", "--out", tmp_path / "o.json")
    found = json.loads(out)
    assert code == DONE and "evaluating: corruption fog 3" in err
    assert json.loads((tmp_path / "o.json").read_text()) == found
    kinds = [row["kind"] for row in found["rows"]]
    assert kinds == ["clean", "noise", "fgsm", "pgd", "corruption", "corruption", "dropout"]
    assert (tmp_path / "a" / "suite.csv").exists()
    # Resumed with one more severity: only that is computed, and the baseline lacks it.
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "suite.json").write_text((tmp_path / "a" / "suite.json").read_text())
    compared = (*first, "--baseline", tmp_path / "old")
    code, out, err = call(capsys, *suite, *few, "--severity", 5, *compared)
    assert code == DONE and err.count("evaluating") == 2 and "lacks 2" in out
    code, out, err = call(capsys, *suite, *few, *compared, "--plots")
    assert code == DONE and "evaluating" not in err and "mce: 100.0000" in out
    assert (tmp_path / "a" / "noise.svg").exists() and (tmp_path / "a" / "corruption.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--snr", 20), "--suite"),
        (("--suite",), "--suite-dir"),
        (("--suite", "--suite-dir", "D", "--corruption", "rain"), "rain"),
        (("--suite", "--suite-dir", "D", "--severity", 9), "1 to 5"),
        (("--suite", "--suite-dir", "D", "--only", "rain"), "include"),
        (("--suite", "--suite-dir", "D", "--baseline", "nowhere"), "no suite here"),
        (("--suite", "--suite-dir", "D", "--released"), "cifar10"),
        (("--suite", "--suite-dir", "D", "--dropout-layer", "g", "--only", "dropout"), "'g'"),
    ],
)
def test_impossible_suites_are_bad_input(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    base = ("evaluate", model, "--data", "digits", "--samples", 5)
    code, _, err = call(capsys, *base, *arguments)
    assert code == BAD_INPUT and message in err


def test_data_without_a_range_has_noise_and_no_corruptions(tmp_path, capsys):
    path = tmp_path / "b.keras"
    keras.Sequential([keras.Input((6,)), layers.Dense(3)]).save(path)
    suite = ("evaluate", path, "--data", "blobs", "--suite", "--suite-dir", tmp_path / "s")
    code, out, _ = call(capsys, *suite, "--only", "noise", "--snr", 20, "--json")
    assert code == DONE and [row["kind"] for row in json.loads(out)["rows"]] == ["clean", "noise"]
    code, _, err = call(capsys, *suite, "--only", "corruption")
    assert code == BAD_INPUT and "bounds" in err
