"""The plan's step against the measured one, on a device that was calibrated just before.

On a CPU in CPU seconds, which leave out what the machine's other guests take: rates and steps are
measured by the same clock. The calibrating network is not among the networks. Where the device is
listed, the roofline: arithmetic intensity, the limit it sets, and what a step reached of it.
"""

import time

TITLE = "Planned / measured step"
SCALE = True
FACTOR = 1.5


def measure(quick):
    """Rows of planned and measured steps, with and without constraints."""
    import keras

    from tf_lyapunov.planning.devices import DEVICES, Cluster
    from tf_lyapunov.planning.estimate import plan_model
    from tf_lyapunov.planning.measuring import measure as calibrate
    from tf_lyapunov.planning.measuring import present_device, step_seconds

    device = present_device()
    clock = time.process_time if device == "cpu" else time.perf_counter
    cluster = Cluster(calibrate(clock=clock))
    rows = []
    for name, (build, batch, steps) in _networks(quick).items():
        for every in (0, 1):
            keras.utils.set_random_seed(0)
            model = build()
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
            if every:
                _constrain(model)
            found = plan_model(
                model, cluster, examples=batch, batch=batch, every=every, momentum=True
            ).chosen.step
            seconds = step_seconds(model, batch, steps=steps, rounds=2 if quick else 4, clock=clock)
            row = {
                "network": f"{name}, batch {batch}",
                "constraints": "every step" if every else "none",
                "planned ms": 1e3 * found.total,
                "measured ms": 1e3 * seconds,
                "planned / measured": found.total / seconds,
            }
            rows.append(row | _roofline(model, batch, seconds, cluster.device))
    shares = cluster.device.efficiency
    return {
        "rows": rows,
        "device": device,
        "listed": device in DEVICES,
        "clock": "CPU" if device == "cpu" else "wall",
        "rates": {
            "product GFLOP/s": cluster.device.peaks["float32"] / 1e9,
            "convolution GFLOP/s": cluster.device.peaks["float32"] * shares.convolution / 1e9,
            "memory GB/s": cluster.device.bandwidth / 1e9,
            "step ms": 1e3 * shares.step,
            "factor": shares.factor,
        },
        "within a factor of 1.5": sum(
            1 / FACTOR <= row["planned / measured"] <= FACTOR for row in rows
        ),
    }


def _constrain(model):
    import tf_lyapunov as tfl
    from tf_lyapunov.bounds.stages import stages

    tfl.constrain(model, [1.5] * len(stages(model)))


def _networks(quick):
    """Name to (build, batch, steps of an epoch)."""
    from tf_lyapunov import models

    found = {
        "MLP 784-50-20-10": (lambda: models.mlp((28, 28, 1), 10), 128, 50),
        "MLP 784-256-128-10": (lambda: models.mlp((28, 28, 1), 10, [256, 128]), 128, 50),
        "2C2F": (lambda: models.cnn((28, 28, 1), 10), 128, 10),
        "AlexNet 28×28": (models.alexnet_cifar, 128, 2),
    }
    if quick:
        return dict(list(found.items())[:2])
    return found | {
        "ResNet [2,2,2,2], width 16": (lambda: models.build(RESIDUAL, (28, 28, 3), 10), 64, 2)
    }


RESIDUAL = {"name": "preact_resnet", "width": 16, "batch_norm": True}


def _roofline(model, batch, seconds, device):
    """Intensity, its limit, and what was reached, of a step's products."""
    from tf_lyapunov.planning.counting import layer_costs

    costs = layer_costs(model)
    flops = batch * sum(c.forward + c.backward for c in costs if c.is_map)
    entries = batch * sum(3 * (c.inputs + c.outputs) for c in costs)
    moved = 4 * (entries + 6 * sum(c.parameters for c in costs))
    limit = min(device.peaks["float32"], flops / moved * device.bandwidth)
    return {
        "FLOP/byte": flops / moved,
        "limit GFLOP/s": limit / 1e9,
        "reached GFLOP/s": flops / seconds / 1e9,
        "of the limit": flops / seconds / limit,
    }
