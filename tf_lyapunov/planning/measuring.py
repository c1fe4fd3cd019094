"""Rates of the machine at hand: a product, a convolution, a pass over memory, and a short step."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import time
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from tf_lyapunov.planning.devices import DEVICES, GIGA, Device, Efficiency
from tf_lyapunov.spectral.compilation import compiled
from tf_lyapunov.spectral.precision import full_precision

ROUNDS = 5
# Seconds that a timing repeats a short operation for.
SHORTEST = 0.05


Clock = Callable[[], float]


def seconds_of(function, *arguments, rounds=ROUNDS, clock: Clock = time.perf_counter) -> float:
    """Least time of a compiled function of tensors, over `rounds` rounds, after one to compile."""
    wait(function(*arguments))
    started = clock()
    wait(function(*arguments))
    repeats = max(1, min(200, int(SHORTEST / max(clock() - started, 1e-6))))
    best = float("inf")
    for _ in range(rounds):
        started = clock()
        for _ in range(repeats):
            result = function(*arguments)
        wait(result)
        best = min(best, (clock() - started) / repeats)
    return best


def step_seconds(
    model, batch_size, *, steps=4, rounds=3, clock: Clock = time.perf_counter
) -> float:
    """Least time of a step of `fit` on random inputs and labels of a compiled model.

    Args:
        model: compiled classifier with logits.
        batch_size: samples per step.
        steps: steps per epoch.
        rounds: epochs that are timed, after one that compiles.
        clock: in place of wall time; `time.process_time` on a shared machine.

    Returns:
        Seconds per step.
    """
    rng = np.random.default_rng(0)
    shape = tuple(model.input_shape[1:])
    x = rng.normal(size=(batch_size * steps, *shape)).astype("float32")
    y = rng.integers(0, model.output_shape[-1], len(x))
    watch = _Stopwatch(clock)
    model.fit(x, y, batch_size=batch_size, epochs=rounds + 1, verbose=0, callbacks=[watch])
    return min(watch.seconds[1:]) / steps


class _Stopwatch(keras.callbacks.Callback):
    def __init__(self, clock):
        super().__init__()
        self.clock, self.seconds = clock, []

    def on_epoch_begin(self, epoch, logs=None):
        gc.collect()
        self.started = self.clock()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(self.clock() - self.started)


def measure(name: str | None = None, *, clock: Clock = time.perf_counter) -> Device:
    """Calibrate the device of the active backend.

    Times a matrix product, a 3×3 convolution, a pass over memory, a step of a tiny network
    (`step`) and one of a small convolutional network, whose time over the sum of its parts is
    `factor`. Takes about twenty seconds.

    Args:
        name: device that is expected here, or None for whichever it is.
        clock: in place of wall time; `time.process_time` counts all cores' seconds, and leaves
            out what others take of a shared CPU.

    Returns:
        `Device` whose rates are those of this machine, all shares of a "peak" that is what the
        product reached.

    Raises:
        ValueError: if the device `name` is not here.

    Example: `measure("cpu").efficiency.source` is `"measured here"`.
    """
    found = present_device()
    if name is not None and name != found:
        raise ValueError(
            f"A machine can measure its own devices only. Received: {name!r}, where {found!r} is "
            "the device of the active backend."
        )
    listed = DEVICES[found]
    product = _product_rate("float32", clock)
    peaks = {"float32": product}
    if found != "cpu":
        peaks["tensor_float32"] = _product_rate("float32", clock, contextlib.nullcontext)
        peaks["float16"] = _product_rate("bfloat16", clock)
        if keras.backend.backend() != "jax":  # which has no 64-bit types by default
            peaks["float64"] = _product_rate("float64", clock)
    rough = Device(
        found,
        _memory(found),
        _bandwidth(clock),
        peaks,
        listed.link,
        Efficiency(
            product=1.0,
            convolution=_convolution_rate(clock) / peaks.get("tensor_float32", product),
            bandwidth=1.0,
            step=0.0,
            call=listed.efficiency.call,
            factor=1.0,
            source="measured here",
        ),
        "measured here",
    )
    return _with_steps(rough, clock)


def present_device() -> str:
    """Name in `DEVICES` of what the active backend computes on; "cpu" without an accelerator.

    Raises:
        ValueError: if it is an accelerator that is not listed.
    """
    kind = _device_kind()
    if kind is None:
        return "cpu"
    compact = kind.replace(" ", "").replace("-", "").lower()
    for name in DEVICES:  # longer names stand first
        if name != "cpu" and name.replace("-", "").lower() in compact:
            return name
    raise ValueError(f"The device is not listed. Received: {kind!r}. Known: {', '.join(DEVICES)}.")


def _device_kind():
    backend = keras.backend.backend()
    if backend == "jax":
        device = importlib.import_module("jax").devices()[0]
        return None if device.platform == "cpu" else device.device_kind
    if backend == "tensorflow":
        config = importlib.import_module("tensorflow").config
        found = config.list_physical_devices("GPU")
        return config.experimental.get_device_details(found[0])["device_name"] if found else None
    torch = importlib.import_module("torch")
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _with_steps(device, clock):
    """The device with `step` and `factor` from two small networks."""
    from tf_lyapunov.planning.counting import layer_costs
    from tf_lyapunov.planning.steps import compute_seconds

    tiny = _compiled(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    step = step_seconds(tiny, 8, steps=100, clock=clock)
    device = _replace(device, step=step)
    network, batch = _compiled(small_network()), 64
    parts = compute_seconds(layer_costs(network), device, batch, "float32")
    measured = step_seconds(network, batch, steps=6, clock=clock)
    return _replace(device, factor=max((measured - step) / parts, 0.1))


def small_network():
    """The network whose step calibrates `factor`: convolutions, normalization, pool, dense."""
    k = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 3)),
            k.Conv2D(32, 3, padding="same"),
            k.BatchNormalization(),
            k.ReLU(),
            k.Conv2D(64, 3, padding="same"),
            k.ReLU(),
            k.MaxPooling2D(),
            k.Conv2D(128, 3, strides=2, padding="same"),
            k.ReLU(),
            k.Flatten(),
            k.Dense(128),
            k.ReLU(),
            k.Dense(10),
        ]
    )


def _compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return model


def _replace(device, **changes):
    return dataclasses.replace(device, efficiency=dataclasses.replace(device.efficiency, **changes))


def _product_rate(dtype, clock, precision=full_precision):
    """FLOP/s of a large product."""
    side = 1024 if _device_kind() is None else 8192
    x = ops.cast(np.random.default_rng(0).normal(size=(side, side)).astype("float32"), dtype)
    with precision():
        return 2 * side**3 / seconds_of(compiled(ops.matmul), x, x, clock=clock)


def _convolution_rate(clock):
    batch, channels = (16, 64) if _device_kind() is None else (256, 256)
    rng = np.random.default_rng(0)
    x = ops.convert_to_tensor(rng.normal(size=(batch, 28, 28, channels)).astype("float32"))
    kernel = ops.convert_to_tensor(rng.normal(size=(3, 3, channels, channels)).astype("float32"))
    seconds = seconds_of(
        compiled(lambda a, b: ops.conv(a, b, padding="same")), x, kernel, clock=clock
    )
    return 2 * batch * 28 * 28 * 9 * channels**2 / seconds


def _bandwidth(clock):
    """Bytes per second of a pass that reads and writes 64 MB."""
    x = ops.ones((2**24,), "float32")
    return 2 * 4 * 2**24 / seconds_of(compiled(lambda a: a * 2.0 + 1.0), x, clock=clock)


def _memory(found):
    if found != "cpu":
        return DEVICES[found].memory
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 16 * GIGA


def wait(result):
    """Devices compute while Python goes on: reading one entry waits for them."""
    first = keras.tree.flatten(result)[0]
    if hasattr(first, "block_until_ready"):
        first.block_until_ready()
    else:
        ops.convert_to_numpy(first if len(first.shape) == 0 else ops.ravel(first)[:1])
