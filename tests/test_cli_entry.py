"""The installed command in a real process: stderr holds its own messages and nothing else."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def process(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-m", "tf_lyapunov.cli", *map(str, arguments)],
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_design_prints_nothing_on_stderr():
    found = process("design", "--gain", 1.5, "--layers", 2)
    assert found.returncode == 0 and "PROVED" in found.stdout
    assert found.stderr == ""


def test_certify_prints_nothing_on_stderr(tmp_path):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(3)]
    )
    model.save(tmp_path / "m.keras")
    found = process("certify", tmp_path / "m.keras", "--data", "blobs", "--samples", 5)
    assert found.returncode == 0 and "certified accuracy" in found.stdout
    assert found.stderr == ""


def test_what_tensorflow_says_is_shown_to_those_who_ask_and_when_the_import_fails():
    pytest.importorskip("tensorflow")
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        pytest.skip("another backend prints nothing as it loads")
    assert process("--version", TF_CPP_MIN_LOG_LEVEL="0").stderr != ""
    failed = process("--version", KERAS_BACKEND="nonsense")
    assert failed.returncode != 0 and "nonsense" in failed.stderr


def test_a_closed_stderr_is_no_error():
    command = f"exec 2>&-; {sys.executable} -m tf_lyapunov.cli --version"
    found = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0 and found.stdout.startswith("tf-lyapunov ")
