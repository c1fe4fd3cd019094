"""A process forked after TensorFlow was used would hang; it is told so at once."""

import os

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import forking

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def in_child(function):
    """What `function()` raises in a forked child, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            function()
            text = "nothing"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@needs_fork
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="about TensorFlow's threads")
def test_a_fork_after_tensorflow_was_used_is_refused_with_the_way_out():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model(np.zeros((1, 3), "float32"))
    x = np.ones((1, 3), "float32")
    for function in (
        lambda: tfl.certify(model, x),
        lambda: tfl.lipschitz_upper_bound(model),
        lambda: tfl.project(model),
    ):
        said = in_child(function)
        assert said.startswith("RuntimeError") and "spawn" in said and "Received" in said


@needs_fork
def test_a_fork_before_tensorflow_was_used_is_none_of_our_business(monkeypatch):
    monkeypatch.setattr(forking, "sys", type("Empty", (), {"modules": {}}))
    assert in_child(lambda: forking.refuse_dead_fork("certify")) == "nothing"
