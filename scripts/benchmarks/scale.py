"""A step of AlexNet and ResNet50 under constraints against plain Keras, kernel by kernel.

What a step costs in CPU seconds (all cores, the machine's other guests left out) and in wall time:
without constraints, with a guaranteed bound at every step, and amortised: a power step each step,
and one enforcement of all guaranteed bounds, which every k steps spread. `k` is the smallest with
a ratio of at most the limit. Between enforcements theorem (G.1) of `theory.growth` bounds norms.

Under KERAS_BACKEND=jax on a GPU the same runs there, at batch 256.
"""

import gc
import importlib
import time

TITLE = "A step under constraints / plain Keras, at scale"
SCALE = True
CLOCKS = {"CPU": time.process_time, "wall": time.perf_counter}
EVERY = (1, 2, 4, 5, 10, 20, 50, 100)
# Limits of the ratio on a CPU, on a GPU; batch sizes.
LIMITS = {"AlexNet": (1.10, 1.10), "ResNet50": (1.15, 1.10)}
BATCHES = {"AlexNet": (128, 256), "ResNet50": (32, 256)}


def measure(quick):
    """Steps and kernels of both networks."""
    from tf_lyapunov.planning.measuring import present_device

    device = present_device()
    sections = {}
    for name in ("AlexNet", "ResNet50"):
        build, shape, budget = _network(name, quick)
        on_gpu = device != "cpu"
        batch = 4 if quick else BATCHES[name][on_gpu]
        sections[name] = _network_section(build, shape, budget, batch, LIMITS[name][on_gpu], quick)
        gc.collect()
    return {"device": device, "networks": sections}


def rows(section):
    """One row per network, then one per kind of kernel."""
    found = []
    for name, network in section["networks"].items():
        found.append({"what": f"{name}, batch {network['batch']}", **network["ratios"]})
    for name, network in section["networks"].items():
        for kernel in network["kernels"]:
            numbers = {key: value for key, value in kernel.items() if key != "kernel"}
            found.append({"what": f"{name}: {kernel['kernel']}", **numbers})
    return found


def _network(name, quick):
    """(build, input shape, budget of every stage)."""
    from tf_lyapunov import models

    if name == "AlexNet":
        return (lambda: models.alexnet_cifar()), (28, 28, 3), 1.8
    side = 64 if quick else 224
    return (lambda: models.resnet50((side, side, 3))), (side, side, 3), 1.0


def _network_section(build, shape, budget, batch, limit, quick):
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *shape)).astype("float32")
    models = {name: _model(build, budget, g) for name, g in VARIANTS.items()}
    classes = models["plain"].output_shape[-1]
    y = rng.integers(0, classes, batch)
    steppers = {name: _stepper(model, x, y) for name, model in models.items()}
    times = _interleaved(steppers, 2 if quick else 4)
    enforcement, kernels = _enforcement(models["amortised"], 1 if quick else 3)
    section = {"batch": batch, "times": times, "enforcement": enforcement, "kernels": kernels}
    return section | {
        "ratios": _ratios(times, enforcement, limit),
        "growth": _growth(models, steppers),
    }


VARIANTS = {"plain": None, "every step": "step", "amortised": "monitor"}


def _model(build, budget, guarantee):
    import keras

    import tf_lyapunov as tfl
    from tf_lyapunov.bounds.stages import stages

    keras.utils.set_random_seed(0)
    model = build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    if guarantee is not None:
        tfl.constrain(model, [budget] * len(stages(model)), guarantee=guarantee)
    if guarantee == "monitor":
        for variable in _kernels(model):
            variable.constraint.warm_up(variable)
    return model


def _kernels(model):
    """Kernels under a spectral bound."""
    from tf_lyapunov.constraints import SpectralBound
    from tf_lyapunov.projection import constrained_variables

    return [v for _, v in constrained_variables(model) if isinstance(v.constraint, SpectralBound)]


def _stepper(model, x, y):
    """Function that takes one training step on data that is on the device, and waits for it."""
    import keras

    if keras.backend.backend() != "jax":
        x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
        return lambda: model.train_on_batch(x, y)
    jax = importlib.import_module("jax")
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)

    def loss(trainable, others, x, y):
        logits, others = model.stateless_call(trainable, others, x, training=True)
        return model.loss(y, logits), others

    @jax.jit
    def step(trainable, others, slots, x, y):
        (_, others), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, others, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradient, trainable)
        return trainable, others, slots

    state = [
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]
    x, y = jax.device_put(x), jax.device_put(y)

    def run():
        state[:] = step(*state, x, y)
        jax.block_until_ready(state)
        for variable, value in zip(model.trainable_variables, state[0], strict=True):
            variable.assign(value)

    return run


def _interleaved(steppers, rounds):
    """Dict from variant to dict from clock to the least seconds of a step, in rotating order."""
    for run in steppers.values():
        run()
    seconds = {name: {clock: [] for clock in CLOCKS} for name in steppers}
    for _ in range(rounds):
        for name, run in steppers.items():
            started = {clock: now() for clock, now in CLOCKS.items()}
            run()
            for clock, now in CLOCKS.items():
                seconds[name][clock].append(now() - started[clock])
    return {name: {c: min(v) for c, v in found.items()} for name, found in seconds.items()}


def _enforcement(model, rounds):
    """Seconds of one enforcement of every bound with its warm-up, and a row per kind of kernel."""
    from tf_lyapunov.planning import bound_cost
    from tf_lyapunov.planning.measuring import wait
    from tf_lyapunov.theory.threads import one_thread

    total, kinds = dict.fromkeys(CLOCKS, 0.0), {}
    for variable in _kernels(model):
        constraint = variable.constraint
        linear_map = constraint.linear_map(variable.shape)
        best = dict.fromkeys(CLOCKS, float("inf"))
        wait(constraint.enforce(variable))
        for _ in range(rounds):
            started = {clock: now() for clock, now in CLOCKS.items()}
            wait(constraint.enforce(variable))
            for clock, now in CLOCKS.items():
                best[clock] = min(best[clock], now() - started[clock])
        cost = bound_cost(variable.shape, linear_map)
        text = "×".join(map(str, variable.shape)) + f" at {linear_map.input_shape[:-1] or ''}"
        kind = kinds.setdefault(
            text,
            {
                "kernel": text,
                "kernels": 0,
                "matrices": cost.frequencies,
                "CPU ms": 0.0,
                "GFLOP": 0.0,
            },
        )
        kind["kernels"] += 1
        kind["CPU ms"] += 1e3 * best["CPU"]
        kind["GFLOP"] += cost.flops / 1e9
        for clock in CLOCKS:
            total[clock] += best[clock]
    started = {clock: now() for clock, now in CLOCKS.items()}
    with one_thread():
        for variable in _kernels(model):
            variable.constraint.warm_up(variable)
    for clock, now in CLOCKS.items():
        total[f"warm-up, {clock}"] = now() - started[clock]
    found = sorted(kinds.values(), key=lambda kind: -kind["CPU ms"])
    for kind in found:
        kind["GFLOP per CPU s"] = 1e3 * kind["GFLOP"] / kind["CPU ms"]
    return total, found


def _ratios(times, enforcement, limit):
    row = {}
    for clock in CLOCKS:
        plain = times["plain"][clock]
        once = enforcement[clock] + enforcement[f"warm-up, {clock}"]
        row[f"plain s, {clock}"] = plain
        row[f"every step, {clock}"] = times["every step"][clock] / plain
        row[f"steering alone, {clock}"] = times["amortised"][clock] / plain
        amortised = {k: (times["amortised"][clock] + once / k) / plain for k in EVERY if k > 1}
        ratios = {1: times["every step"][clock] / plain, **amortised}
        k = next((k for k, ratio in ratios.items() if ratio <= limit), None)
        row[f"k for {limit}, {clock}"] = "none" if k is None else k
        for shown in (10, 100):
            row[f"every {shown}, {clock}"] = ratios[shown]
    return row


def _growth(models, steppers, steps=(1, 5)):
    """Largest proved norm over its bound, k amortised steps after an enforcement, by k.

    By theorem (G.1) of `theory.growth`, with the distance that each kernel has moved.
    """
    import keras
    import numpy as np

    from tf_lyapunov.theory.growth import growth_upper_bound, patch_overlap

    def read(variable):
        return keras.ops.convert_to_numpy(variable.value).astype(float)

    kernels = _kernels(models["amortised"])
    for variable in kernels:
        variable.assign(variable.constraint.enforce(variable))
    reference = [read(variable) for variable in kernels]
    found, done = {}, 0
    for count in steps:
        for _ in range(count - done):
            steppers["amortised"]()
        done, ratios = count, []
        for variable, start in zip(kernels, reference, strict=True):
            constraint = variable.constraint
            overlap = patch_overlap(start.shape, constraint.linear_map(start.shape))
            moved = float(np.linalg.norm(read(variable) - start))
            frobenius = float(np.linalg.norm(start))
            bound = growth_upper_bound(constraint.max_gain, frobenius, [moved], overlap)
            ratios.append(bound / constraint.max_gain)
        found[str(count)] = max(ratios)
    return found
