"""Rates of the machine at hand: products, passes over memory, kinds of layers, a short step."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import statistics
import time
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.planning.devices import DEVICES, GIGA, Device, Efficiency
from tf_lyapunov.spectral.compilation import compiled
from tf_lyapunov.spectral.precision import full_precision

ROUNDS = 5
# Seconds that a timing repeats a short operation for: as long as a few steps, so that both see the
# same share of what others take of the machine. Medians, not minima, for the same reason.
SHORTEST = 0.2


Clock = Callable[[], float]


def seconds_of(function, *arguments, rounds=ROUNDS, clock: Clock = time.perf_counter) -> float:
    """Median time of a compiled function of tensors, over `rounds` rounds, after one to compile."""
    wait(function(*arguments))
    started = clock()
    wait(function(*arguments))
    repeats = max(1, min(200, int(SHORTEST / max(clock() - started, 1e-6))))
    found = []
    for _ in range(rounds):
        started = clock()
        for _ in range(repeats):
            result = function(*arguments)
        wait(result)
        found.append((clock() - started) / repeats)
    return statistics.median(found)


def step_seconds(
    model, batch_size, *, steps=4, rounds=3, clock: Clock = time.perf_counter
) -> float:
    """Median time of a step of `fit` on random inputs and labels of a compiled model.

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
    return statistics.median(watch.seconds[1:]) / steps


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

    Times a matrix product and a pass over memory; by the difference between training networks with
    and without them, a layer call (`call`), a bound (`bound`), a larger input (`feed`), batch
    normalization, and convolutions of few and of many channels, which tell products (`convolution`)
    from passes over the entries (`layout`); a step of a tiny network (`step`), and one of a small
    convolutional network, whose time over the sum of its parts is `factor`. Takes two minutes.

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
        Efficiency(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, "measured here"),
        "measured here",
    )
    return _with_steps(_with_layers(rough, clock), clock)


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


def _with_layers(device, clock):
    """The device with what calls, convolutions and normalization take."""
    k, batch = keras.layers, 128 if device.name == "cpu" else 256

    def one(make, *arguments, shape, times=4, steps=8, **options):
        return _marginal(lambda: make(*arguments, **options), shape, batch, times, steps, clock)

    call = one(k.Activation, "tanh", shape=(4,), times=16, steps=50).seconds
    few, many = (
        one(k.Conv2D, channels, 3, padding="same", shape=(side, side, channels))
        for side, channels in ((28, 16), (14, 64))
    )
    normalization = one(k.BatchNormalization, shape=(28, 28, 16))
    # seconds = flops / rate + bytes / bandwidth, of both convolutions
    system = [[few.flops, few.bytes], [many.flops, many.bytes]]
    by_flop, by_byte = map(
        float, np.linalg.solve(system, [few.seconds - call, many.seconds - call])
    )
    if by_flop <= 0 or by_byte <= 0:  # noise: products explain the one, a plain pass the other
        by_flop, by_byte = many.seconds / many.flops, 1 / device.bandwidth
    passing = max(normalization.seconds - call, 0.1 * normalization.seconds)
    return _replace(
        device,
        call=call / 2,
        bound=_bound_overhead(batch, clock),
        feed=_feed(batch, clock),
        convolution=1 / by_flop / device.peak("tensor_float32"),
        layout=1 / by_byte / device.bandwidth,
        normalization=normalization.bytes / passing / device.bandwidth,
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    seconds: float
    flops: float
    bytes: float


def _marginal(make, shape, batch, times, steps, clock):
    """What each of `times` layers adds to a step."""
    from tf_lyapunov.planning.counting import layer_costs
    from tf_lyapunov.planning.steps import moved_bytes

    networks = []
    for count in (0, times):
        # The first layer has weights, so that a gradient passes through all others.
        ends = keras.layers.Dense(shape[-1]), keras.layers.Flatten(), keras.layers.Dense(2)
        middle = (make() for _ in range(count))
        networks.append(keras.Sequential([keras.Input(shape), ends[0], *middle, *ends[1:]]))
    cost = layer_costs(networks[1])[1]
    return _Part(
        _added(networks, batch, steps, clock) / times,
        batch * (cost.forward + cost.backward),
        moved_bytes(cost, batch, "float32"),
    )


def _bound_overhead(batch, clock, times=4):
    """Seconds of a guaranteed bound that has next to nothing to multiply."""
    networks = []
    for bound in (None, SpectralBound(1.0)):
        dense = (keras.layers.Dense(4, kernel_constraint=bound) for _ in range(times))
        networks.append(keras.Sequential([keras.Input((4,)), *dense, keras.layers.Dense(2)]))
    return _added(networks, batch, 50, clock) / times


def _feed(batch, clock, entries=8192):
    """Seconds per byte that a step takes to get a larger input, of which it reads next to none."""
    networks = []
    for count in (4, entries):
        layers = keras.layers.Cropping1D((0, count - 4)), keras.layers.Flatten()
        networks.append(keras.Sequential([keras.Input((count, 1)), *layers, keras.layers.Dense(2)]))
    return _added(networks, batch, 20, clock) / (4 * batch * (entries - 4))


def _added(networks, batch, steps, clock):
    """Median seconds by which a step of the second network exceeds one of the first."""
    for network in networks:
        _compiled(network)
    # In turn, so that both see the same machine.
    rounds = [
        [step_seconds(n, batch, steps=steps, rounds=1, clock=clock) for n in networks]
        for _ in range(ROUNDS)
    ]
    first, second = (statistics.median(column) for column in zip(*rounds, strict=True))
    return max(second - first, 1e-3 * first)


def _with_steps(device, clock):
    """The device with `step` and `factor` from two small networks."""
    from tf_lyapunov.planning.counting import layer_costs
    from tf_lyapunov.planning.steps import compute_seconds

    tiny = _compiled(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    step = step_seconds(tiny, 8, steps=100, clock=clock)
    device = _replace(device, step=step)
    network, batch = _compiled(small_network()), 256
    costs = layer_costs(network)
    parts = compute_seconds(costs, device, batch, "float32")
    measured = step_seconds(network, batch, steps=4, rounds=ROUNDS, clock=clock)
    waiting = step + 4 * batch * costs[0].inputs * device.efficiency.feed
    return _replace(device, factor=max((measured - waiting) / (parts - waiting), 0.1))


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
