"""Progress: drawn where somebody looks and only after two seconds; it changes no result."""

import io
import threading
import types

import keras
import numpy as np
import pytest

import tf_lyapunov as tfl
from tf_lyapunov import progress
from tf_lyapunov.progress import reports_progress, shown, stage, steps


class Terminal(io.StringIO):
    """Standard error that somebody looks at, and an event at every drawing."""

    def __init__(self):
        super().__init__()
        self.drawn = threading.Event()

    def isatty(self):
        return True

    def write(self, text):
        count = super().write(text)
        self.drawn.set()
        return count


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "_clock", found)
    monkeypatch.setattr(progress, "INTERVAL", 1e-3)
    return found


def looked_at(monkeypatch, stream, **modules):
    """Makes a stream standard error (pytest sets its own anew between fixtures and tests)."""
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=stream, modules=modules))
    monkeypatch.setenv("TERM", "xterm")
    return stream


@pytest.fixture
def terminal(monkeypatch):
    return looked_at(monkeypatch, Terminal())


def drawn(stream):
    """What is drawn next, within ten seconds."""
    stream.drawn.clear()
    assert stream.drawn.wait(10), "nothing was drawn"
    return stream.getvalue().split("\r")[-1].rstrip()


def network(softmax=False):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, "relu"), keras.layers.Dense(3)]
    return keras.Sequential(
        [keras.Input((5,)), *layers, *([keras.layers.Softmax()] if softmax else [])]
    )


X = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")


def test_a_bar_appears_after_two_seconds_and_not_before(clock, terminal):
    with shown(name="certify"), stage("layers", 4) as layers:
        layers.advance()
        clock.now = 1.99
        assert not terminal.drawn.wait(0.1)
        clock.now = 2.0
        assert drawn(terminal) == "certify: layers 1/4 [=====               ] 0:02, 0:06 left"
    # The line is wiped out, so that what is printed next stands alone.
    assert terminal.getvalue().endswith(" \r")


def test_what_is_over_within_two_seconds_draws_nothing(clock, terminal):
    with shown(name="certify"), stage("layers", 2) as layers:
        clock.now = 1.9
        layers.advance(2)
    assert terminal.getvalue() == ""


def test_a_stage_without_steps_is_drawn_too(clock, terminal):
    with shown(name="certify"), stage("comparing"):
        clock.now = 63.0
        assert drawn(terminal) == "certify: comparing 1:03"


def test_nested_stages_count_together(clock, terminal):
    with shown(name="bracket"):
        with stage("attacks", 4) as attacks:
            attacks.advance()
            with stage("batches", 2) as batches:
                batches.advance()
                clock.now = 3.0
                line = drawn(terminal)
    # One attack and a half of four in three seconds.
    assert line == "bracket: attacks 1/4, batches 1/2 [========            ] 0:03, 0:05 left"


def test_calls_within_a_call_are_drawn_by_that_one(clock, terminal):
    @reports_progress
    def inner():
        with stage("layers", 3):
            return drawn(terminal)

    with shown(name="bracket"):
        clock.now = 2.5
        assert inner().startswith("bracket: inner, layers 0/3")
        with shown(False), stage("hidden", 3):
            assert "hidden" not in drawn(terminal)


def test_nothing_is_drawn_in_a_pipe_unless_it_is_asked_for(clock, monkeypatch):
    pipe = Terminal()
    pipe.isatty = lambda: False
    looked_at(monkeypatch, pipe)
    with shown(name="certify"), stage("layers", 2):
        clock.now = 10.0
        assert not pipe.drawn.wait(0.1)
    with shown(True, "certify"), stage("layers", 2):
        clock.now = 20.0
        assert drawn(pipe).startswith("certify: layers 0/2")


def test_nothing_is_drawn_in_a_terminal_where_it_is_unwanted(clock, terminal):
    with shown(False, "certify"), stage("layers", 2):
        clock.now = 10.0
        assert not terminal.drawn.wait(0.1)


def test_a_notebook_is_looked_at_and_a_missing_stderr_is_not(monkeypatch):
    looked_at(monkeypatch, None)
    assert not progress.is_watched()
    shell = types.SimpleNamespace(kernel=object())
    module = types.SimpleNamespace(get_ipython=lambda: shell)
    looked_at(monkeypatch, None, IPython=module)
    assert progress.is_watched()
    module.get_ipython = lambda: None
    assert not progress.is_watched()


def test_a_dumb_terminal_gets_no_bar(monkeypatch, terminal):
    assert progress.is_watched()
    monkeypatch.setenv("TERM", "dumb")
    assert not progress.is_watched()


def test_a_line_is_no_longer_than_the_terminal(clock, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with shown(name="certify"), stage("a stage with a name of many words", 5):
        clock.now = 2.0
        assert len(drawn(terminal)) <= 39


def test_a_reader_that_has_gone_changes_nothing(clock, monkeypatch):
    class Closed(Terminal):
        def write(self, text):
            self.drawn.set()
            raise BrokenPipeError

    gone = looked_at(monkeypatch, Closed())
    with shown(True, "certify"):
        clock.now = 5.0
        assert gone.drawn.wait(10)
        assert list(steps([1, 2], "steps")) == [1, 2]


def test_of_two_threads_at_once_one_is_drawn_and_both_work(clock, terminal):
    clock.now, both = 10.0, threading.Barrier(3)

    def work(name):
        with shown(True, name), stage("steps", 2):
            clock.now += 5
            both.wait(10)
            both.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    both.wait(10)
    drawn(terminal)
    names = {line.split(":")[0] for line in terminal.getvalue().split("\r") if ":" in line}
    both.wait(10)
    for thread in threads:
        thread.join(10)
    assert len(names) == 1
    assert progress._DISPLAY.get() is None


def test_a_thread_of_its_own_belongs_to_no_display():
    found = []
    with shown(True, "certify"):
        thread = threading.Thread(target=lambda: found.append(progress._DISPLAY.get()))
        thread.start()
        thread.join()
    assert found == [None]


CALLS = {
    "certify": lambda model, **options: tfl.certify(model, X, **options).radius,
    "certify auto": lambda model, **options: tfl.certify(model, X, method="auto", **options).radius,
    "local": lambda model, **options: tfl.certify(model, X, method="local", **options).radius,
    "lipschitz_upper_bound": lambda model, **options: (
        tfl.lipschitz_upper_bound(model, **options).gain_upper_bound
    ),
    "layer_indices": lambda model, **options: tfl.layer_indices(model.layers[1], **options).nu,
    "minimal_perturbation_lower_bound": lambda model, **options: (
        tfl.minimal_perturbation_lower_bound(model, X, **options).bound
    ),
    "constrain": lambda model, **options: tfl.constrain(model, [0.5, 0.5], **options).get_weights()[
        0
    ],
    "project": lambda model, **options: tfl.project(model, **options).get_weights()[0],
    "bracket": lambda model, **options: (
        tfl.bracket(model, X, attacks=tfl.attacks.MinimalFGV(), **options).upper
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_progress_changes_no_result(name, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "INTERVAL", 1e-2)
    stream = looked_at(monkeypatch, Terminal())
    with_it = CALLS[name](network(), progress=True)
    assert stream.getvalue().startswith("\r" + name.split()[0] if name != "local" else "\rcertify")
    stream = looked_at(monkeypatch, Terminal())
    without = CALLS[name](network(), progress=False)
    assert stream.getvalue() == ""
    np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("name", CALLS)
def test_progress_of_another_type_is_refused(name):
    model = network()
    before = model.get_weights()
    with pytest.raises(TypeError, match=r"`progress` must be True, False.*Received: progress='y'"):
        CALLS[name](model, progress="y")
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
