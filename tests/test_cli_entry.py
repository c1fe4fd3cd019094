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


@pytest.mark.slow  # the next one starts the same way
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
    command = ("design", "--gain", 1.5, "--layers", 2)
    assert process(*command, TF_CPP_MIN_LOG_LEVEL="0").stderr != ""
    failed = process(*command, KERAS_BACKEND="nonsense")
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


def told(code, **environment):
    """What `code` prints in a fresh process that believes to be the command line."""
    code = "import sys; sys.argv = ['tf-lyapunov']\n" + code
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not found.returncode, found.stderr
    return found.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["certify", "--help"]])
def test_help_and_version_need_neither_keras_nor_scipy(arguments):
    printed = told(
        f"from tf_lyapunov.cli import main\ncode = main({arguments!r})\n"
        "print(code, sorted({'keras', 'tensorflow', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    assert printed.splitlines()[-1] == "0 []"


def test_every_public_name_is_there_on_the_command_line_too():
    printed = told(
        "import tf_lyapunov as tfl\n"
        "print([n for n in tfl.__all__ if n not in dir(tfl)], tfl.L2(0.5), 'keras' in sys.modules)"
    )
    assert printed.splitlines()[-1] == "[] L2(0.5) True"


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_without_a_backend_the_way_out_is_said_instead_of_a_traceback(backend):
    # What an environment without the package looks like to an import.
    printed = told(
        f"sys.modules[{backend!r}] = None\n"
        "from tf_lyapunov.cli import main\n"
        "sys.stderr = sys.stdout\n"
        "print(main(['design', '--gain', '1', '--layers', '2']))",
        KERAS_BACKEND=backend,
    )
    assert "Set KERAS_BACKEND=jax or torch" in printed and "tf_lyapunov[tensorflow]" in printed
    assert "Traceback" not in printed and printed.splitlines()[-1] == "2"
