"""Time of an epoch under constraints against plain Keras, interleaved in one run.

Every round trains every variant for one epoch, in rotating order, and gives one ratio per variant.
CPU seconds count all cores and leave out what the machine's other guests take; where the machine is
shared they are what to read. What is timed is the epoch, callbacks included; what a fit does once
(compilation, reading the model's structure) is not.
"""

import gc
import statistics
import time

TITLE = "An epoch under constraints / plain Keras"

# Variant: (guarantee, whether `LyapunovMonitor` runs). The amortised mode needs the monitor.
VARIANTS = {
    "plain": (None, False),
    "every step": ("step", False),
    "every step, monitor": ("step", True),
    "amortised, monitor": ("monitor", True),
}


def measure(quick):
    """Ratios of an MLP (Adam) and of AlexNet (SGD) to themselves without constraints."""
    return {"rows": [*_mlp(quick, 128), *_mlp(quick, 512), *_alexnet(quick)]}


def _mlp(quick, batch):
    import functools

    import keras

    from benchmarks.data import mnist_or_digits
    from tf_lyapunov import models as zoo

    x, y, source = mnist_or_digits()
    x, y = x.reshape(len(x), -1), y
    count = batch * min(len(x) // batch, 100 if quick else 468)
    build = functools.partial(zoo.mlp, x.shape[1:], 10, widths=[256, 128], activation="relu")
    optimizer = functools.partial(keras.optimizers.Adam, 1e-3)
    models = _models(build, optimizer, [1.5] * 3, VARIANTS)
    seconds = _epochs(models, x[:count], y[:count], 3 if quick else 21, batch)
    return _rows(f"MLP {x.shape[1]}-256-128-10 ({source}), batch {batch}", seconds)


def _alexnet(quick):
    import functools

    import keras
    import numpy as np

    from tf_lyapunov import models as zoo

    rng = np.random.default_rng(0)
    steps = 4 if quick else 10
    x = rng.normal(size=(128 * steps, 28, 28, 3)).astype("float32")
    y = rng.integers(0, 10, len(x))
    optimizer = functools.partial(keras.optimizers.SGD, 0.01, momentum=0.9)
    # Without the monitor, whose one reading a real epoch of 390 steps spreads thin.
    variants = {name: VARIANTS[name] for name in ("plain", "every step")}
    models = _models(zoo.alexnet_cifar, optimizer, [1.8] * 5, variants)
    seconds = _epochs(models, x, y, 2 if quick else 7)
    return _rows(f"AlexNet 28x28x3, batch 128, {steps} steps", seconds)


def _models(build, optimizer, budgets, variants):
    """Dict from variant to `(model, callbacks)`, all with the same initial weights."""
    import keras

    import tf_lyapunov as tfl

    models = {}
    for name, (guarantee, watched) in variants.items():
        keras.utils.set_random_seed(0)
        model = build()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(), loss)
        if guarantee is not None:
            tfl.constrain(model, budgets, guarantee=guarantee, every=100)
        monitor = tfl.callbacks.LyapunovMonitor(verbose=0, on_violation="ignore")
        models[name] = (model, [monitor] if watched else [])
    return models


def _epochs(models, x, y, rounds, batch=128):
    """Dict from variant to `[(wall, CPU) seconds of an epoch]`, one entry per round."""
    import keras

    class Stopwatch(keras.callbacks.Callback):
        """To be the last callback, so that an epoch ends after the others'."""

        def on_epoch_begin(self, epoch, logs=None):
            gc.collect()
            self.start = time.perf_counter(), time.process_time()

        def on_epoch_end(self, epoch, logs=None):
            now = time.perf_counter(), time.process_time()
            self.seconds = tuple(n - s for n, s in zip(now, self.start, strict=True))

    watch, names = Stopwatch(), list(models)
    seconds = {name: [] for name in names}
    for attempt in range(rounds + 1):
        for name in names[attempt % len(names) :] + names[: attempt % len(names)]:
            model, callbacks = models[name]
            options = {"batch_size": batch, "epochs": 1, "verbose": 0}
            model.fit(x, y, callbacks=[*callbacks, watch], **options)
            if attempt:  # the first compiles
                seconds[name].append(watch.seconds)
    return seconds


def _rows(name, seconds):
    """Medians of the rounds' ratios, their range, and the ratios of the quickest epochs."""
    rows = []
    for variant, times in seconds.items():
        row = {"model": name, "variant": variant}
        for position, clock in ((1, "CPU"), (0, "wall")):
            mine = [t[position] for t in times]
            plain = [t[position] for t in seconds["plain"]]
            ratios = [a / b for a, b in zip(mine, plain, strict=True)]
            row |= {
                f"{clock} s": statistics.median(mine),
                f"ratio, {clock}": statistics.median(ratios),
                f"least {clock}": min(ratios),
                f"most {clock}": max(ratios),
                f"of quickest, {clock}": min(mine) / min(plain),
            }
        rows.append(row)
    return rows
