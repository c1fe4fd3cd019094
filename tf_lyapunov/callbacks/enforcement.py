"""When `LyapunovMonitor` enforces: counted steps, and the other callbacks that save weights."""

import copy
import hashlib
import math
import sys

import keras
import numpy as np

from tf_lyapunov.constraints import NormalizationBound
from tf_lyapunov.projection import constrained_variables

# Frames between a callback's hook and the list that calls it; subclasses may call `super()`.
_DEPTH = 8


def amortised(model):
    """Variables whose constraint leaves the guarantee to the monitor."""
    for _, variable in constrained_variables(model):
        if getattr(variable.constraint, "guarantee", None) == "monitor":
            yield variable


def steps_leave_bounds(model):
    """Whether an optimizer step may leave a bound that only `project` enforces."""
    return any(
        isinstance(variable.constraint, NormalizationBound)
        or getattr(variable.constraint, "guarantee", None) == "monitor"
        for _, variable in constrained_variables(model)
    )


def fingerprint(model):
    """A digest of all weights: whether they are the ones that were enforced, or reported."""
    state = hashlib.blake2b(digest_size=16)
    for variable in model.weights:
        state.update(
            np.ascontiguousarray(
                keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))
            ).tobytes()
        )
    return state.digest()


class StepCounter:
    """Optimizer steps between guaranteed projections, however many come between two hooks.

    Keras calls a hook once in `steps_per_execution` batches, and a training step may call the
    optimizer more than once a batch. `limit` is what no gap exceeds: the period, or the steps
    between two hooks where these are more.
    """

    def __init__(self):
        self.period = None
        self.since, self._seen, self._stride, self._ratio, self._iterations = 0, 0, 1, 1, 0

    def start(self, model):
        """A new `fit`: reads the least `every` of the constraints, and what one hook covers."""
        self.period = min((v.constraint.every for v in amortised(model)), default=None)
        self._stride = int(getattr(model, "steps_per_execution", None) or 1)
        self._iterations, self._seen, self.since = _iterations(model), 0, 0

    def start_epoch(self):
        self._seen = 0

    def hook(self, batch):
        """Batches since the last hook, of one that comes after batch number `batch`."""
        done = batch + 1
        new = done - self._seen if done > self._seen else done
        self._seen = done
        self._stride = max(self._stride, new)
        self.since += new
        return new

    @property
    def is_due(self):
        """Whether the next hook would come too late."""
        return bool(self.period) and (self.since + self._stride) * self._ratio > self.period

    @property
    def limit(self):
        """Bound on the optimizer steps until the next projection, or None without a period."""
        return self.period and max(self.period, self._stride * self._ratio)

    def measure(self, model):
        """Learns how many optimizer steps a batch takes, from what was counted."""
        if self.since:
            taken = _iterations(model) - self._iterations
            self._ratio = max(self._ratio, math.ceil(taken / self.since))

    def enforced(self, model):
        """The gap ends here."""
        self.measure(model)
        self._iterations, self.since = _iterations(model), 0


def _iterations(model):
    """Calls of the optimizer so far; accumulated gradients count, skipped steps do not."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    counter = getattr(optimizer, "_iterations", None)
    return (
        0
        if counter is None
        else int(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(counter)))
    )


def companions(callback):
    """The `CallbackList` that called this callback, or None in a loop of the user's own.

    Keras gives callbacks no reference to it.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        frame = frame.f_back
        if frame is None:
            return None
        found = frame.f_locals.get("self")
        if isinstance(found, keras.callbacks.CallbackList) and callback in found.callbacks:
            return found
    return None


def batch_savers(callbacks, monitor, *, steps_known):
    """Callbacks that save between epochs; refuses those that act on weights at a wrong time.

    Raises:
        ValueError: if one saves before the monitor has enforced, or swaps weights after it.
    """
    place = callbacks.index(monitor)
    savers = [c for c in callbacks if _save_freq(c) is not None]
    between = [c for c in savers if _save_freq(c) != "epoch"]
    early = [c for c in (between if steps_known else savers) if callbacks.index(c) < place]
    if early:
        raise ValueError(
            "A callback that saves must stand after `LyapunovMonitor`, which enforces the bounds "
            f"that steps leave open. Received: {_named(early)} before it. Put the monitor first "
            "in `callbacks=`."
        )
    swaps = [c for c in callbacks[place:] if getattr(c, "swap_on_epoch", False)]
    if swaps:
        raise ValueError(
            "A callback that swaps weights at the end of an epoch must stand before "
            f"`LyapunovMonitor`, which enforces the bounds on what it leaves. Received: "
            f"{_named(swaps)} after it. Put it first in `callbacks=`."
        )
    return between


def will_save(saver, batch):
    """Whether a callback saves at this batch: asked of a copy, whose counters may move."""
    ask = getattr(copy.copy(saver), "_should_save_on_batch", None)
    return True if ask is None else bool(ask(batch))


class Closing(keras.callbacks.Callback):
    """Stands last in the list, behind whatever restores weights when training begins or ends."""

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def on_train_begin(self, logs=None):
        self.monitor._enforce_once()

    def on_train_end(self, logs=None):
        self.monitor._finish()


def _save_freq(callback):
    """`"epoch"` or a number of batches for a callback that saves, else None."""
    return getattr(callback, "save_freq", None)


def _named(callbacks):
    return ", ".join(
        f"{type(c).__name__}(save_freq={c.save_freq!r})"
        if _save_freq(c) is not None
        else type(c).__name__
        for c in callbacks
    )
