"""`bracket` on the command line: table, JSON, page, and a run that continues."""

import json

import keras
import numpy as np
from keras import layers

from tf_lyapunov.cli import BAD_INPUT, DONE, main


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def test_brackets_are_printed_written_and_continued(tmp_path, capsys):
    keras.utils.set_random_seed(0)
    path = tmp_path / "m.keras"
    net = [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(8, "tanh"), layers.Dense(10)]
    keras.Sequential(net).save(path)
    base = ("bracket", path, "--data", "digits", "--samples", 12, "--state", tmp_path / "state")
    page, out_file = tmp_path / "page.html", tmp_path / "out.json"
    code, out, err = call(
        capsys, *base, "--published", "--report", page, "--out", out_file, "--json"
    )
    found = json.loads(out)
    assert code == DONE and found == json.loads(out_file.read_text()) and "DDN: 12 inputs" in err
    assert len(found["rows"]) == found["summary"]["inputs"] == 12
    assert all(row["lower"] <= (row["upper"] or np.inf) for row in found["rows"])
    assert "How far apart are proof and attack?" in page.read_text()
    code, out, err = call(capsys, *base)
    assert code == DONE and "median" in out and "inputs perturbed" in out
    assert "DDN: 12 inputs" not in err  # all attacks were kept
    code, out, _ = call(capsys, *base, "--time-budget", 0, "--json")
    layered = json.loads(out)["rows"]
    assert code == DONE  # relaxations around the inputs have raised some, and lowered none
    pairs = [(a["lower"], b["lower"]) for a, b in zip(found["rows"], layered, strict=True)]
    assert all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
    code, _, err = call(capsys, *base, "--time-budget", -1)
    assert code == BAD_INPUT and "time_budget" in err
    code, _, err = call(capsys, *base[:-1], page)
    assert code == BAD_INPUT and "no attack state" in err
