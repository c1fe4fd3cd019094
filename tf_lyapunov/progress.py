"""One line on stderr for what lasts: the stage, how much of it is done, how long it may take.

Work says where it is by `stage` and `steps`, wherever it is called from; whoever was called first
decides by `shown` whether that is drawn. Without it nothing is drawn, and nothing that is drawn
changes a result.
"""

import contextlib
import contextvars
import functools
import os
import shutil
import sys
import threading
import time

from tf_lyapunov.forking import refuse_dead_fork
from tf_lyapunov.interruption import uninterrupted

# Seconds before anything is drawn, and between two drawings.
DELAY, INTERVAL = 2.0, 0.2
_BAR = 20
_LEAST_SHARE = 0.01
_DISPLAY = contextvars.ContextVar("display", default=None)
_DRAWING = threading.Lock()
_clock = time.monotonic


def reports_progress(function):
    """Decorates a function with an argument `progress=None`: what it does is drawn accordingly.

    `None`: in a terminal and a notebook. Calls within one that draws are drawn by that one. In a
    process that was forked after TensorFlow was used it raises at once, where it would hang.
    """

    @functools.wraps(function)
    def reporting(*args, progress=None, **kwargs):
        refuse_dead_fork(function.__name__)
        with shown(progress, function.__name__):
            return function(*args, **kwargs)

    return reporting


@contextlib.contextmanager
def shown(progress=None, name=""):
    """Within it, stages are drawn if `progress` is True, or None in a terminal and a notebook.

    Args:
        progress: `True`, `False` or `None`.
        name: first word of the line.

    Raises:
        TypeError: if `progress` is something else.
    """
    if not (progress is None or isinstance(progress, bool)):
        raise TypeError(
            "`progress` must be True, False, or None for True in a terminal and a notebook. "
            f"Received: progress={progress!r}."
        )
    outer = _DISPLAY.get()
    is_part = progress is None or (progress and outer is not None and outer.is_drawn)
    if is_part and outer is not None and outer.is_open:
        with stage(name):
            yield
        return
    display = Display(name, progress or (progress is None and is_watched()))
    token = _DISPLAY.set(display)
    try:
        display.start()
        yield
    finally:
        with uninterrupted():
            display.stop()
            _DISPLAY.reset(token)


def is_watched():
    """Whether somebody sees stderr as it grows: a terminal, or a notebook."""
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    if ask is not None and getattr(ask(), "kernel", None) is not None:
        return True
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


class Stage:
    """A part of the work, or a part of that one.

    Args:
        name: what is done, a few words.
        total: number of steps, or None where it is unknown.
    """

    def __init__(self, name, total=None):
        self.name, self.total = name, total
        self.done, self.begin = 0, _clock()

    def advance(self, steps=1):
        """So many more steps are done."""
        self.done += steps

    def __str__(self):
        if self.total is not None:
            return f"{self.name} {self.done}/{self.total}"
        return f"{self.name} {self.done}" if self.done else self.name


@contextlib.contextmanager
def stage(name, total=None):
    """A stage of the work; yields a `Stage` to `advance`."""
    display = _DISPLAY.get()
    entered = Stage(name, total)
    if display is None:
        yield entered
        return
    display.stages.append(entered)
    try:
        yield entered
    finally:
        display.stages.remove(entered)


def steps(items, name, total=None):
    """The items one by one, a step of a stage each.

    Example:

    >>> list(steps("ab", "letters"))
    ['a', 'b']
    """
    total = len(items) if total is None and hasattr(items, "__len__") else total
    with stage(name, total) as entered:
        for item in items:
            yield item
            entered.advance()


class Display:
    """The stages of one call, and the line that shows them, which is gone when the call ends.

    A thread of its own draws: what lasts may have no steps, and Ctrl-C, which reaches the main
    thread alone, never comes in the middle of a drawing. Of several calls at once one is drawn.
    """

    def __init__(self, name, is_drawn):
        self.name, self.is_drawn, self.stages = name, is_drawn, []
        self._begin, self._width = _clock(), 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True, name="progress")

    def start(self):
        """Begins to draw, two seconds later."""
        if self.is_drawn:
            self._thread.start()

    def stop(self):
        """Wipes the line out."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    @property
    def is_open(self):
        """Whether the call that it is for goes on."""
        return not self._end.is_set()

    def _draw(self):
        while _clock() - self._begin < DELAY:
            if self._end.wait(INTERVAL):
                return
        with _DRAWING:
            while not self._end.wait(INTERVAL if self._width else 0):
                room = max(shutil.get_terminal_size().columns - 1, 20)
                text = self.line(_clock())[:room]
                if not _wrote("\r" + text.ljust(self._width)):
                    return
                self._width = len(text)
            _wrote("\r" + " " * self._width + "\r")

    def line(self, now):
        """What is drawn, such as `certify: norms of layers 3/12 [=====     ] 0:05, 0:15 left`."""
        stages = list(self.stages)
        counted = [s for s in stages if s.total is None or s.total > 1]
        text = ", ".join(map(str, counted))
        text = f"{self.name}: {text}" if text else self.name
        counted = [s for s in counted if s.total]
        share = 0.0
        for entered in reversed(counted):
            share = min((entered.done + share) / entered.total, 1.0)
        passed = f"{_minutes(now - self._begin)}"
        if not counted:
            return f"{text} {passed}"
        bar = ("=" * round(_BAR * share)).ljust(_BAR)
        if share >= _LEAST_SHARE:
            spent = now - counted[0].begin
            passed += f", {_minutes(spent / share - spent)} left"
        return f"{text} [{bar}] {passed}"


def _wrote(text):
    """Whether somebody still reads."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        return False
    return True


def _minutes(seconds):
    whole = int(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02d}"
