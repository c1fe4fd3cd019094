"""Ctrl-C between what belongs together: it waits, or what was done is undone."""

import contextlib
import signal
import threading

import keras
import numpy as np


@contextlib.contextmanager
def uninterrupted():
    """Within it Ctrl-C waits until the block has ended; for short blocks that must be whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # it reaches the main thread alone
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # not set from Python, and nothing to be set again
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *_: waiting.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


class Undo:
    """Whatever ends the block early undoes what was noted in it, last things first.

    Example:

    >>> class Thing:
    ...     size = 1
    >>> thing = Thing()
    >>> with contextlib.suppress(KeyboardInterrupt), Undo() as undo:
    ...     undo.set(thing, "size", 2)
    ...     raise KeyboardInterrupt
    >>> thing.size
    1
    """

    def __init__(self):
        self._steps = []

    def note(self, function, *arguments):
        """To be called if the block fails."""
        self._steps.append((function, arguments))

    def set(self, thing, name, value):
        """Sets an attribute."""
        self.note(setattr, thing, name, getattr(thing, name))
        setattr(thing, name, value)

    def assign(self, variable, value):
        """Assigns a value to a Keras variable."""
        self.keep(variable)
        variable.assign(value)

    def keep(self, variable):
        """Notes the value of a Keras variable that is about to change."""
        held = np.array(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable)))
        self.note(variable.assign, held)

    def __enter__(self):
        return self

    def __exit__(self, kind, *unused):
        if kind is not None:
            with uninterrupted():
                for function, arguments in reversed(self._steps):
                    function(*arguments)
