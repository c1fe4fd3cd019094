"""Replicas against one process on the same cores: time of an epoch, and the weights in the end.

Each way to train has its own processes, which live through all rounds; every round trains every way
for one epoch, in turn, and gives one ratio. All start from the same weights, see the same global
batches under the same budgets, and hand in their weights after the first epoch, which compiles and
is not timed. On shared cores each replica's constraints cost what one process's do: the smaller the
network, the more of the step that is.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

TITLE = "Replicas / one process on the same cores"
SCALE = True
WAYS = {
    "one process": "none",
    "mirrored, 2": "mirrored",
    "mirrored, 2, by Keras' fit": "fit",
    "two workers": "multiworker",
}
BATCH = 128
# Steps of an epoch, and rounds.
NETWORKS = {"2C2F": (100, 9), "AlexNet 28×28": (8, 7)}


def measure(quick):
    """Throughput of constrained networks, and how far the trained weights are apart."""
    rows = []
    for network, (steps, rounds) in NETWORKS.items():
        rows += _compared(network, *((4, 3) if quick else (steps, rounds)))
    return {"rows": rows, "batch": BATCH}


def _compared(network, steps, rounds):
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: pathlib.Path(folder, f"{way}.npz") for name, way in WAYS.items()}
        started = {name: _start(network, way, paths[name], steps) for name, way in WAYS.items()}
        try:
            seconds = {name: [] for name in WAYS}
            for attempt in range(rounds + 1):
                for name, processes in started.items():
                    found = _ask(processes, "epoch")
                    if attempt:
                        seconds[name].append(max(found))
                    else:
                        _ask(processes, "save")
        finally:
            for process in [p for processes in started.values() for p in processes]:
                process.kill()
                process.communicate()
        weights = {name: list(np.load(path).values()) for name, path in paths.items()}
    plain, scale = weights["one process"], max(np.abs(w).max() for w in weights["one process"])
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["one process"], times, strict=True)]
        pairs = zip(weights[name], plain, strict=True)
        rows.append(
            {
                "network": network,
                "way": name,
                "examples/s": BATCH * steps / statistics.median(times),
                "throughput / one process": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "goal": 0.9 if name == "mirrored, 2" else "",
                "rounds": rounds,
                "steps": steps,
                "weights' difference / largest": float(
                    max(np.abs(a - b).max() for a, b in pairs) / scale
                ),
            }
        )
    return rows


def _start(network, way, path, steps):
    """The processes of one way to train, ready for commands."""
    count = 2 if way == "multiworker" else 1
    environment = dict(os.environ, KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
    root = pathlib.Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    addresses = [f"localhost:{port}" for port in _free_ports(count)]
    processes = []
    for index in range(count):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, network, way, str(path), str(steps)],
                env=environment | ({"TF_CONFIG": json.dumps(task)} if count > 1 else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    return processes


def _free_ports(count):
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _ask(processes, command):
    for process in processes:
        process.stdin.write(command + "\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in processes]
    if not all(answers):
        raise RuntimeError(f"A process of the benchmark ended. Received: {answers}.")
    return [float(answer) for answer in answers]


def _serve(network, way, path, steps):
    """In a process of its own: trains an epoch, or saves the weights, when told to."""
    import time

    answers, sys.stdout = sys.stdout, sys.stderr
    import keras
    import numpy as np

    import tf_lyapunov as tfl
    from tf_lyapunov import datasets, models
    from tf_lyapunov.bounds.stages import stages
    from tf_lyapunov.experiments.distribution import Replicated
    from tf_lyapunov.experiments.opening import open_distribution

    if way in ("mirrored", "fit"):
        distribution = open_distribution("mirrored", devices=2)
    else:
        distribution = open_distribution(way, timeout=300)
    if way == "fit":
        distribution = Replicated("mirrored", distribution.strategy, distribution.replicas)
    rng = np.random.default_rng(0)
    shape = (28, 28, 1 if network == "2C2F" else 3)
    x = rng.normal(size=(BATCH * steps, *shape)).astype("float32")
    batches = datasets.Batches(x, rng.integers(0, 10, len(x)), BATCH, seed=0)
    with distribution.scope():
        model = models.cnn(shape, 10) if network == "2C2F" else models.alexnet_cifar()
        # Within a scope every replica draws its own initial weights: they are given instead.
        arrays = [rng.normal(size=w.shape) for w in model.get_weights()]
        model.set_weights([a / max(1, a.size // a.shape[-1]) ** 0.5 for a in arrays])
        tfl.constrain(model, [2.0] * len(stages(model)))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
        epoch = 0
        for line in sys.stdin:
            started = time.perf_counter()
            if line.strip() == "epoch":
                distribution.fit(
                    model,
                    batches,
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    callbacks=[batches.epoch_callback()],
                )
                epoch += 1
            elif distribution.is_chief:
                np.savez(path, *model.get_weights())
            print(time.perf_counter() - started, file=answers, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:4], int(sys.argv[4]))
