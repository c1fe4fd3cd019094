"""Shared settings: quiet TensorFlow, reproducible hypothesis, and where real data lies."""

import contextlib
import gc
import os
import pathlib
import signal
import sys
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import oracles
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Processes that compute on JAX share what they compile, which is most of their time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

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


# A shell's background jobs ignore Ctrl-C, and so would the tests that press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    """Same weights in every run, whatever ran before."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="session")
def traced_once():
    """Optimizers have their variables before a step is traced, as Keras does on JAX and torch.

    On TensorFlow it makes them while it traces, and then traces again: a fifth of a short fit. Its
    own order is that of the tests which run in new processes, and of `traced_twice`.
    """
    import keras
    from keras.src.callbacks.callback_list import CallbackList

    if keras.backend.backend() != "tensorflow":
        yield
        return
    # What `fit` makes last before its first step. Classes of models are left alone: the verifier
    # believes unchanged ones only.
    make = CallbackList.__init__

    def built_before(self, callbacks=None, add_history=False, add_progbar=False, model=None, **kw):
        optimizer = getattr(model, "optimizer", None)
        if EARLY["variables"] and add_history and optimizer is not None and not optimizer.built:
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)
        make(self, callbacks, add_history, add_progbar, model, **kw)

    with mock.patch.object(CallbackList, "__init__", built_before):
        yield


EARLY = {"variables": True}


@pytest.fixture
def traced_twice(monkeypatch):
    """Keras' own order on TensorFlow: what the first trace leaves behind meets a second one."""
    monkeypatch.setitem(EARLY, "variables", False)


@pytest.fixture(autouse=True, scope="module")
def settled():
    """What a module's tests share, and what outlives them.

    TensorFlow's kernels are made once a module and not once a test: setting a seed would forget
    them, some milliseconds each. They hold no random numbers, since Keras draws without a state.
    What outlives a module's tests is not searched for garbage again: that takes seconds.
    """
    with kernels_kept():
        yield
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def kernels_kept():
    if "tensorflow" not in sys.modules:
        yield
        return
    from tensorflow.python import pywrap_tfe
    from tensorflow.python.eager import context

    with mock.patch.object(pywrap_tfe, "TFE_ContextClearCaches", lambda _: None):
        yield
    context.context().clear_kernel_cache()


@pytest.fixture(name="jacobian_norm", scope="session")
def jacobian_norm_fixture():
    return oracles.jacobian_norm


@pytest.fixture(name="attack", scope="session")
def attack_fixture():
    return oracles.attack


@pytest.fixture(name="double_precision", scope="session")
def double_precision_fixture():
    return oracles.double_precision
