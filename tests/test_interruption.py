"""Ctrl-C, wherever it comes, leaves a model as it was or as it was to be, and nothing else."""

import contextlib
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import progress
from tf_lyapunov.interruption import Undo, uninterrupted
from tf_lyapunov.layers import CayleyDense, GroupSort
from tf_lyapunov.program import rounding

X = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
PACKAGE = os.path.dirname(tfl.__file__)
# Between the guards' own instructions nothing guards.
GUARDS = ("interruption.py", "progress.py", "restoring.py")
# JAX compiles the layers of every model anew.
PLACES = 4 if keras.backend.backend() == "jax" else 12
FUNCTIONS = ("train_function", "test_function", "predict_function")
CONSTRAINTS = ("kernel_constraint", "bias_constraint", "gamma_constraint")


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = keras.layers.Dense(4, "relu"), keras.layers.Dense(3)

    def call(self, x):
        return self.head(self.hidden(x))


def plain():
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, name="hidden"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(3, name="head"),
            keras.layers.Softmax(),
        ]
    )
    model.compile("sgd", "mse")
    return model


def lipschitz():
    return keras.Sequential(
        [
            keras.Input((5,)),
            CayleyDense(4, activation=GroupSort()),
            keras.layers.Dense(3, name="head"),
        ]
    )


def subclassed():
    model = Subclassed()
    model(X)
    return model


def built(kind):
    keras.utils.set_random_seed(3)
    model = {"plain": plain, "lipschitz": lipschitz, "subclassed": subclassed}[kind]()
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            layer.kernel.assign(3 * layer.kernel)  # outside of the bounds that are set below
    for name in FUNCTIONS:
        if hasattr(model, name):
            setattr(model, name, print)  # compiled functions to be kept, or reset
    return model


def state(model):
    """All that a call may have touched: of the model, of Keras, of the process."""
    layers = list(model._flatten_layers())
    return {
        "values": [keras.ops.convert_to_numpy(v).copy() for v in model.variables],
        "constraints": [v.constraint for v in model.trainable_variables],
        "attributes": [getattr(la, name, None) for la in layers for name in CONSTRAINTS],
        "functions": [getattr(model, name, None) for name in FUNCTIONS],
        "nodes": [(len(la._inbound_nodes), len(la._outbound_nodes)) for la in layers],
        "calls": [getattr(la, "activation", None) for la in layers],
        "keras": (
            keras.config.floatx(),
            keras.config.epsilon(),
            keras.config.dtype_policy().name,
            sorted(keras.saving.get_custom_objects()),
        ),
        "contexts": (rounding._IN_FLOAT64.get(), progress._DISPLAY.get(), np.geterr()),
        "process": (signal.getsignal(signal.SIGINT), random.getstate(), os.getcwd()),
        "threads": sorted(t.name for t in threading.enumerate() if t.name == "progress"),
    }


def differing(first, second):
    """Names of what differs between two states."""
    values = zip(first["values"], second["values"], strict=True)
    found = {key for key in first if key != "values" and first[key] != second[key]}
    return found if all(np.array_equal(a, b) for a, b in values) else {*found, "values"}


class CtrlC:
    """Presses Ctrl-C when the package is about to run its line number `at`."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *unused):
        sys.settrace(self._before)

    def _trace(self, frame, event, argument):
        name = frame.f_code.co_filename
        inside = name.startswith(PACKAGE) and not name.endswith(GUARDS)
        return self._line if inside else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self._line


CHANGES = {
    "constrain": lambda model: tfl.constrain(
        model, {la.name: 0.5 for la in model.layers if la.name in ("hidden", "head")}
    ),
    "project": tfl.project,
}
READS = {
    "certify": lambda model: tfl.certify(model, X, precision="float64"),
    "lipschitz_upper_bound": tfl.lipschitz_upper_bound,
    "minimal_perturbation_lower_bound": lambda model: tfl.minimal_perturbation_lower_bound(
        model, X
    ),
}


def prepared(kind, name):
    model = built(kind)
    if name == "project":
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dense):
                layer.kernel.constraint = tfl.constraints.SpectralBound(0.5)
    return model


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    """Whatever is written goes to a folder that is empty afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(pathlib.Path(tmp_path).iterdir())


@pytest.mark.parametrize("kind", ["plain", "lipschitz"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_whole_or_not_at_all_wherever_ctrl_c_comes(name, kind, monkeypatch):
    # Projecting takes long to compile; how far it shrinks kernels is not what this is about.
    monkeypatch.setattr(tfl.constraints.SpectralBound, "project", lambda self, kernel: kernel / 4)
    change, model = CHANGES[name], prepared(kind, name)
    with CtrlC(at=None) as counted:
        change(model)
    outcomes = set()
    places = np.unique(np.linspace(1, counted.lines, PLACES).astype(int))
    for place in places:
        model = prepared(kind, name)
        before = state(model)
        with contextlib.suppress(KeyboardInterrupt), CtrlC(place):
            change(model)
            pytest.fail(f"Ctrl-C at line {place} was lost")
        after = state(model)
        if not differing(before, after):
            outcomes.add("before")
            change(model)  # and it can be done after all
            assert differing(before, state(model))
        else:
            done = prepared(kind, name)
            change(done)
            whole = [keras.ops.convert_to_numpy(v) for v in done.variables]
            pairs = zip(after["values"], whole, strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs), f"half done at line {place}"
            outcomes.add("after")
    assert "before" in outcomes


@pytest.mark.parametrize("kind", ["plain", "lipschitz", "subclassed"])
@pytest.mark.parametrize("name", ["certify", "lipschitz_upper_bound"])
def test_a_reading_leaves_everything_as_it_was_wherever_ctrl_c_comes(name, kind):
    read = READS[name]
    read(built(kind))  # what is imported and compiled once
    model = built(kind)
    before = state(model)
    with CtrlC(at=None) as counted:
        read(model)
    # Caches that were stale are fresh now.
    assert differing(before, state(model)) <= ({"values"} if kind == "lipschitz" else set())
    for place in np.unique(np.linspace(1, counted.lines - 1, PLACES).astype(int)):
        model = built(kind)
        before = state(model)
        with contextlib.suppress(KeyboardInterrupt), CtrlC(place) as pressed:
            read(model)
            # What was read before is not read again in every respect.
            assert pressed.lines < place, f"Ctrl-C at line {place} was lost"
            continue
        assert not differing(before, state(model)), f"not as before at line {place}"


@pytest.mark.parametrize("name", [*CHANGES, *READS])
def test_each_of_the_first_steps_may_be_interrupted(name, monkeypatch):
    """The steps that progress counts, one after the other, up to the last."""
    monkeypatch.setattr(tfl.constraints.SpectralBound, "project", lambda self, kernel: kernel / 4)
    call = {**CHANGES, **READS}[name]
    for place in range(1, 12):
        model, seen = prepared("plain", name), []

        def advance(stage, steps=1, place=place, seen=seen):
            seen.append(stage)
            if len(seen) == place:
                raise KeyboardInterrupt

        monkeypatch.setattr(progress.Stage, "advance", advance)
        before = state(model)
        try:
            call(model)
        except KeyboardInterrupt:
            assert not differing(before, state(model)), f"not as before at step {place}"
        else:
            assert place > 1 and len(seen) < place
            return


def test_an_error_on_the_way_leaves_a_model_unconstrained():
    model = built("plain")
    before = state(model)
    with pytest.raises(ValueError, match="Received"):
        tfl.constrain(model, [0.5, -1.0])
    assert not differing(before, state(model))


def test_ctrl_c_waits_for_the_end_of_a_short_block():
    handler = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done and signal.getsignal(signal.SIGINT) is handler


def test_a_handler_of_the_users_own_is_called_and_kept():
    seen, before = [], signal.getsignal(signal.SIGINT)
    handler = lambda *arguments: seen.append(arguments[0])  # noqa: E731
    signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not seen
        assert seen == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_let_through():
    found = []

    def work():
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_what_is_undone_is_undone_in_reverse():
    variable = keras.Variable([1.0])
    with pytest.raises(KeyboardInterrupt), Undo() as undo:
        undo.assign(variable, [2.0])
        undo.assign(variable, [3.0])
        raise KeyboardInterrupt
    assert keras.ops.convert_to_numpy(variable).tolist() == [1.0]
    with Undo() as undo:
        undo.assign(variable, [2.0])
    assert keras.ops.convert_to_numpy(variable).tolist() == [2.0]


def test_a_file_is_whole_or_not_there_when_ctrl_c_comes(tmp_path, monkeypatch):
    proof = tfl.certify(built("plain"), X)
    for name in ("proof.npz", "proof.json"):
        with CtrlC(at=None) as counted:
            proof.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        for place in np.unique(np.linspace(1, counted.lines, 10).astype(int)):
            with contextlib.suppress(KeyboardInterrupt), CtrlC(place):
                proof.save(tmp_path / name)
            left = list(tmp_path.iterdir())
            assert not left or [p.name for p in left] == [name]
            if left:
                assert left[0].stat().st_size == len(whole)
                left[0].unlink()
