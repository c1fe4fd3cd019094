"""A parameter of the loss that changes from epoch to epoch."""

import collections.abc
import math
import numbers

import keras
import numpy as np


class LossParamScheduler(keras.callbacks.Callback):
    """Sets a parameter of the loss at the beginning of every epoch.

    Losses hold their parameters as numbers, which compiled steps contain: where the value changes,
    the step is compiled anew (about a second for a small network, as at the start of `fit`). A
    schedule of a few values costs little; the loss of a validation is that of its epoch. The last
    value stays after training. A parameter of the loss is none of the model: no gain depends on it.

    Args:
        parameter: its name in the loss' `get_config()`, such as `"alpha"` or `"temperature"`.
        schedule: a function from the epoch (an integer from 0) to the value; or a mapping from
            epochs to values, interpolated linearly between them and constant outside.
        verbose: 1 prints every value that is new.

    Raises:
        TypeError: if `schedule` is neither.
        ValueError: if a mapping is empty or holds no finite numbers; in `fit`, if the model has
            not one loss with that parameter, or the loss refuses a value.

    Example:

    >>> import keras, numpy as np
    >>> from tf_lyapunov.losses import HKR
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", HKR(alpha=1.0))
    >>> scheduler = LossParamScheduler("alpha", {0: 0.0, 2: 10.0})
    >>> x, y = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[scheduler])
    >>> history.history["loss_alpha"], model.loss.alpha
    ([0.0, 5.0, 10.0], 10.0)
    """

    def __init__(self, parameter, schedule, *, verbose=0):
        super().__init__()
        if isinstance(schedule, collections.abc.Mapping):
            schedule = _Interpolated(schedule)
        elif not callable(schedule):
            raise TypeError(
                "`schedule` must be a function from the epoch to a value, or a mapping from epochs "
                f"to values. Received: schedule={schedule!r}."
            )
        self.parameter, self.schedule, self.verbose = parameter, schedule, verbose
        self.value = None

    def on_train_begin(self, logs=None):
        loss = self.model.loss
        if not isinstance(loss, keras.losses.Loss):
            raise ValueError(
                "The model must be compiled with one loss, an instance of `keras.losses.Loss`. "
                f"Received: loss={loss!r}. A name or a function has no parameter."
            )
        config = loss.get_config()
        if self.parameter not in config:
            known = sorted(set(config) - {"name", "reduction"})
            raise ValueError(
                f"`parameter` must be one of the loss: {known}. "
                f"Received: parameter={self.parameter!r} for {type(loss).__name__}."
            )

    def on_epoch_begin(self, epoch, logs=None):
        value = self.schedule(epoch)
        loss = self.model.loss
        self.value = float(value) if isinstance(value, numbers.Real) else value
        if loss.get_config()[self.parameter] == self.value:
            return
        # A new one checks the value, and sets what the loss holds in parts of its own.
        new = type(loss).from_config({**loss.get_config(), self.parameter: self.value})
        kept = {name: held for name, held in vars(loss).items() if name.startswith("_dtype")}
        vars(loss).update({**vars(new), **kept})
        # Both contain the numbers of before.
        self.model.make_train_function(force=True)
        if self.model.test_function is not None:
            self.model.make_test_function(force=True)
        if self.verbose:
            print(f"Epoch {epoch + 1}: {self.parameter} of the loss is {self.value:g}.")

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs[f"loss_{self.parameter}"] = self.value


class _Interpolated:
    """Piecewise linear between given epochs."""

    def __init__(self, values):
        points = sorted(values.items())
        flat = [number for point in points for number in point]
        if not points or not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in flat):
            raise ValueError(
                "A schedule must hold at least one epoch, and finite numbers. "
                f"Received: schedule={values!r}."
            )
        self.epochs, self.values = map(list, zip(*points, strict=True))

    def __call__(self, epoch):
        return float(np.interp(epoch, self.epochs, self.values))
