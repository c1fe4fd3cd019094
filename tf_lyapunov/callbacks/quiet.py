"""Keeps what a monitor writes to `logs` out of Keras' progress bar, and nowhere else."""

import keras


class Hiding(keras.callbacks.Callback):
    """Stands before a progress bar and takes the monitor's entries out of the logs."""

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor
        self.held = {}

    def on_epoch_end(self, epoch, logs=None):
        names = self.monitor.logged if logs is not None else ()
        self.held = {name: logs.pop(name) for name in names if name in logs}


class Returning(keras.callbacks.Callback):
    """Stands behind the progress bar and puts them back, for those that follow."""

    def __init__(self, hiding):
        super().__init__()
        self.hiding = hiding
        self.monitor = hiding.monitor

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs.update(self.hiding.held)


def hide_from_progress_bars(callbacks, monitor):
    """Puts a `Hiding` and a `Returning` around every progress bar behind the monitor, in place."""
    for callback in [c for c in callbacks if isinstance(c, (Hiding, Returning))]:
        if callback.monitor is monitor:
            callbacks.remove(callback)
    place = callbacks.index(monitor)
    bars = [c for c in callbacks[place:] if isinstance(c, keras.callbacks.ProgbarLogger)]
    for bar in bars:
        hiding = Hiding(monitor)
        callbacks.insert(callbacks.index(bar), hiding)
        callbacks.insert(callbacks.index(bar) + 1, Returning(hiding))
