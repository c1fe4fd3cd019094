"""Shared settings: quiet TensorFlow, reproducible hypothesis, and where real data lies."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling takes longer than running here: the passes left out change no arithmetic.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import hypothesis
import oracles
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def tfds_dir():
    """Directory of data sets prepared by TFDS, or skip."""
    candidates = [os.environ.get("TFDS_DATA_DIR"), ROOT.parent / "shared" / "tfds"]
    for candidate in candidates:
        if candidate and pathlib.Path(candidate, "mnist").is_dir():
            return str(candidate)
    pytest.skip("no prepared MNIST: set TFDS_DATA_DIR to a directory that TFDS has prepared")


@pytest.fixture(autouse=True)
def seeded():
    """Same weights in every run, whatever ran before."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(name="jacobian_norm", scope="session")
def jacobian_norm_fixture():
    return oracles.jacobian_norm


@pytest.fixture(name="attack", scope="session")
def attack_fixture():
    return oracles.attack


@pytest.fixture(name="double_precision", scope="session")
def double_precision_fixture():
    return oracles.double_precision
