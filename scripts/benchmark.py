"""Measures what the README promises, as ratios within one run, and saves a table and JSON.

    python scripts/benchmark.py [--only norms --only overhead ...] [--quick] [--out DIR]

Sections: `norms` (bounds against the materialised truth), `overhead` (an epoch under constraints
against plain Keras), `clipping` (accuracy under clipped and under scaled kernels), `attacks`
(PGD-40 against foolbox's TensorFlow attack), `certify` (10,000 inputs against `model.predict`),
`imports` (time that `import tf_lyapunov` adds).
"""

import datetime
import functools
import gc
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import typer

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECTIONS = ("norms", "overhead", "clipping", "attacks", "certify", "imports")


def machine():
    """What the figures were measured on."""
    import keras
    import numpy as np

    model = ""
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "numpy": np.__version__,
    }


# Norms.


def _layers(quick):
    """Keras convolutions of every kind, with their input shapes."""
    import keras

    k = keras.layers
    cases = [(k.Dense(20), (30,)), (k.Dense(64), (17,))]
    for stride in (1, 2, 3):
        for padding in ("same", "valid"):
            common = {"strides": stride, "padding": padding}
            cases += [
                (k.Conv1D(6, 5, **common), (17, 3)),
                (k.Conv2D(6, 3, **common), (9, 10, 4)),
                (k.Conv2D(8, 4, groups=2, **common), (8, 8, 4)),
                (k.DepthwiseConv2D(3, depth_multiplier=2, **common), (9, 9, 5)),
                (k.SeparableConv2D(6, 3, **common), (9, 8, 3)),
                (k.Conv2DTranspose(4, 3, **common), (6, 5, 3)),
                (k.Conv1DTranspose(4, 4, **common), (11, 3)),
            ]
            if not quick:
                cases.append((k.Conv3D(3, 3, **common), (5, 6, 5, 2)))
    for padding in ("same", "valid", "causal"):
        cases.append((k.Conv1D(5, 3, dilation_rate=2, padding=padding), (15, 3)))
    cases += [
        (k.Conv2D(4, 3, dilation_rate=2, padding="same"), (9, 9, 3)),
        (k.Conv2D(4, 5, padding="same"), (6, 6, 3)),
        (k.Conv2D(16, 3, padding="same"), (14, 14, 8)),
    ]
    return cases


def norms(quick):
    """Ratio bound / float64 truth over all kinds: never below 1, equal to 1 where exact."""
    import dataclasses

    import keras
    import numpy as np

    from tf_lyapunov.spectral.norms import kernel_norm_upper_bound
    from tf_lyapunov.spectral.reading import linear_maps
    from tf_lyapunov.theory.norms import norm_upper_bound
    from tf_lyapunov.theory.operators import convolution_matrix

    ratios = {}

    def note(name, ratio):
        ratios.setdefault(name, []).append(float(ratio))

    for layer, shape in _layers(quick):
        layer.build((None, *shape))
        for variable, linear_map in linear_maps(layer):
            kernel = keras.ops.convert_to_numpy(variable)
            truth = np.linalg.norm(convolution_matrix(kernel, linear_map).toarray(), 2)
            exact = norm_upper_bound(kernel, linear_map)
            kind = "exact" if exact.exact else "larger maps"
            note(f"certificate, {kind} (float64)", exact.value / truth)
            training = kernel_norm_upper_bound(variable, linear_map)
            note("constraint, known size (float32)", float(training) / truth)
            if linear_map.kind == "dense":
                continue
            frequency = norm_upper_bound(kernel, linear_map, method="frequency")
            note("certificate, by frequency (float64)", frequency.value / truth)
            free = dataclasses.replace(linear_map, input_shape=None)
            supremum = _supremum(kernel, linear_map)
            note(
                "certificate, any size (float64) / supremum",
                norm_upper_bound(kernel, free).value / supremum,
            )
            note(
                "constraint, any size (float32) / supremum",
                float(kernel_norm_upper_bound(variable, free)) / supremum,
            )
    return [
        {"what": name, "cases": len(r), "smallest ratio": min(r), "largest ratio": max(r)}
        for name, r in ratios.items()
    ]


def _supremum(kernel, linear_map):
    """Supremum of the norm over image sizes: a dense grid of frequencies, from below."""
    import numpy as np

    from tf_lyapunov.theory import norms as bounds
    from tf_lyapunov.theory.operators import as_convolution

    blocks, axes = as_convolution(kernel.astype(float), linear_map)
    points = {1: 2048, 2: 96, 3: 24}[len(axes)]
    periods = [a.stride * points for a in axes]
    return max(bounds._frequency_norm(np.asarray(b), axes, periods)[0] for b in blocks)


# Training overhead.


def _timed_epochs(models, fit, rounds):
    """(wall, CPU) seconds per epoch of each model, interleaved so that drifts hit all alike.

    CPU seconds count both cores and leave out what the machine's other guests take.
    """
    seconds = {name: [] for name in models}
    for name, model in models.items():
        fit(model, name)  # compiles
    for _ in range(rounds):
        for name, model in models.items():
            gc.collect()
            start, cpu = time.perf_counter(), time.process_time()
            fit(model, name)
            seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return seconds


def overhead(quick):
    """Time of an epoch under constraints, relative to plain Keras on the same model and data."""
    return [*_mlp_overhead(quick), *_alexnet_overhead(quick)]


def _rows(name, seconds):
    """Medians over rounds; ratios are to the plain epoch of the same round."""
    rows = []
    for variant, times in seconds.items():
        pairs = list(zip(times, seconds["plain"], strict=True))
        wall = [t[0] / p[0] for t, p in pairs]
        rows.append(
            {
                "model": name,
                "variant": variant,
                "s per epoch": statistics.median(t[0] for t in times),
                "ratio, wall": statistics.median(wall),
                "smallest": min(wall),
                "largest": max(wall),
                "ratio, CPU": statistics.median(t[1] / p[1] for t, p in pairs),
            }
        )
    return rows


def _variants(build, budgets):
    import keras

    import tf_lyapunov as tfl

    models, callbacks = {}, {}
    for name in ("plain", "every step", "amortised"):
        keras.utils.set_random_seed(0)
        model = build()
        callbacks[name] = []
        if name != "plain":
            guarantee = "step" if name == "every step" else "monitor"
            tfl.constrain(model, budgets, guarantee=guarantee, every=100)
            callbacks[name] = [tfl.callbacks.LyapunovMonitor(verbose=0, on_violation="ignore")]
        models[name] = model
    return models, callbacks


def _mlp_overhead(quick):
    import keras
    import numpy as np

    from tf_lyapunov import models as zoo

    rng = np.random.default_rng(0)
    n = 12_800 if quick else 60_032
    x = rng.normal(size=(n, 784)).astype("float32")
    y = rng.integers(0, 10, n)

    def build():
        model = zoo.mlp((784,), 10, widths=[256, 128], activation="relu")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss)
        return model

    models, callbacks = _variants(build, [1.5, 1.5, 1.5])

    def fit(model, name):
        model.fit(x, y, batch_size=128, epochs=1, verbose=0, callbacks=callbacks[name])

    seconds = _timed_epochs(models, fit, 3 if quick else 11)
    return _rows("MLP 784-256-128-10, batch 128", seconds)


def _alexnet_overhead(quick):
    import keras
    import numpy as np

    from tf_lyapunov import models as zoo

    rng = np.random.default_rng(0)
    # At least 20 steps: the constraints run in every step, the monitor once per epoch.
    n = 128 * (4 if quick else 20)
    x = rng.normal(size=(n, 28, 28, 3)).astype("float32")
    y = rng.integers(0, 10, n)

    def build():
        model = zoo.alexnet_cifar()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
        return model

    models, _ = _variants(build, [1.8] * 5)
    del models["amortised"]

    def fit(model, name):
        # The monitor reads once per epoch, which a real epoch of 390 steps spreads thin: without it
        # the ratio is that of the steps.
        model.fit(x, y, batch_size=128, epochs=1, verbose=0)

    seconds = _timed_epochs(models, fit, 2 if quick else 7)
    return _rows("AlexNet 28x28x3, batch 128", seconds)


# Clipping.


def clipping(quick):
    """Accuracy of one network of gain 1.31 whose kernels are clipped softly, or scaled."""
    import keras

    import tf_lyapunov as tfl
    from tf_lyapunov import datasets
    from tf_lyapunov import models as zoo

    x, y, source = _mnist_or_digits()
    train, test = (slice(0, n) for n in ((4000, 500) if quick else (20_000, 5000)))
    test = slice(train.stop, train.stop + test.stop)
    leaky = tfl.Sector.of("leaky_relu", negative_slope=0.1)
    design = tfl.spectral_design(tfl.Indices(0.4, -2.0), [leaky, leaky, tfl.Sector.linear()])
    rows = []
    for shrink in ("clip", "scale"):
        keras.utils.set_random_seed(0)
        model = zoo.mlp(x.shape[1:], 10, widths=[50, 20], negative_slope=0.1)
        tfl.constrain(model, design)
        for layer in model.layers:
            if hasattr(layer, "kernel"):
                layer.kernel.constraint.shrink = shrink
        loss = tfl.losses.TemperatureCrossEntropy(temperature=0.05, margin=0.5)
        model.compile(keras.optimizers.Adam(1e-3), loss)
        batches = datasets.Batches(x[train], y[train], 128, seed=0)
        callbacks = [batches.epoch_callback(), tfl.callbacks.LyapunovMonitor(design, verbose=0)]
        model.fit(batches, epochs=2 if quick else 10, verbose=0, callbacks=callbacks)
        proof = tfl.certify(model, x[test], y[test])
        row = {"data": source, "kernels": shrink, "clean": proof.accuracy}
        row |= {f"certified at {r}": proof.certified_accuracy(r) for r in (0.1, 0.3, 0.5)}
        rows.append({**row, "proved gain": proof.gain_upper_bound})
    return rows


# Attacks.


def attacks(quick):
    """PGD-40 throughput against foolbox's TensorFlow attack, equal steps, on trained models."""
    try:
        import eagerpy
        import foolbox
    except ImportError:
        return [{"what": "skipped: foolbox is missing; install tf_lyapunov[benchmark]"}]
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_lyapunov as tfl
    from tf_lyapunov import models as zoo

    x, y, source = _mnist_or_digits()
    n = 512 if quick else 2048
    rows = []
    builders = {
        "MLP 784-256-128-10": functools.partial(zoo.mlp, widths=[256, 128], activation="relu"),
        "CNN": functools.partial(zoo.cnn, activation="relu"),
    }
    for name, build in builders.items():
        keras.utils.set_random_seed(0)
        model = build(x.shape[1:], num_classes=10)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"])
        model.fit(x, y, batch_size=128, epochs=1, verbose=0)
        inputs, labels = x[:n], y[:n]
        for radius, ball in ((1.0, "L2"), (0.05, "Linf")):
            kind = getattr(tfl, ball)
            ours = tfl.attacks.PGD(radius=kind(radius), steps=40, step=2.5 * radius / 40)
            theirs = {
                "L2": foolbox.attacks.L2ProjectedGradientDescentAttack,
                "Linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
            }[ball](rel_stepsize=2.5 / 40, steps=40, random_start=False)
            fmodel = foolbox.TensorFlowModel(model, bounds=(-100.0, 100.0))
            tensors = eagerpy.astensor(tf.convert_to_tensor(inputs))
            targets = eagerpy.astensor(tf.convert_to_tensor(labels, dtype=tf.int64))

            def run_ours(ours=ours, inputs=inputs, labels=labels, model=model):
                return float(ours(model, inputs, labels).success_rate)

            def run_theirs(
                theirs=theirs, tensors=tensors, targets=targets, fmodel=fmodel, r=radius
            ):
                hits = []
                for start in range(0, len(tensors), 256):
                    part = slice(start, start + 256)
                    _, _, found = theirs(fmodel, tensors[part], targets[part], epsilons=r)
                    hits.append(np.asarray(found.numpy()))
                return float(np.concatenate(hits).mean())

            times = {"ours": [], "foolbox": []}
            rates = {}
            for attempt in range(2 if quick else 4):
                for key, run in (("ours", run_ours), ("foolbox", run_theirs)):
                    start = time.perf_counter()
                    rates[key] = run()
                    if attempt:  # the first call compiles
                        times[key].append(time.perf_counter() - start)
            ours_s, theirs_s = (statistics.median(times[key]) for key in ("ours", "foolbox"))
            rows.append(
                {
                    "model": f"{name} ({source})",
                    "ball": f"{ball}({radius})",
                    "inputs": n,
                    "ours, inputs/s": n / ours_s,
                    "foolbox, inputs/s": n / theirs_s,
                    "throughput ratio": theirs_s / ours_s,
                    "success, ours": rates["ours"],
                    "success, foolbox": rates["foolbox"],
                }
            )
    return rows


def _mnist_or_digits():
    """MNIST training images with a channel axis, or digits enlarged, where MNIST is absent."""
    import numpy as np

    from tf_lyapunov import datasets

    try:
        data = datasets.load("mnist", data_dir=_data_dir())
        return data.x_train, data.y_train, "MNIST"
    except ValueError:
        data = datasets.load("digits")
        images = np.asarray(data.x_train).reshape(-1, 8, 8, 1)
        return np.kron(images, np.ones((1, 3, 3, 1), "float32")), data.y_train, "digits, enlarged"


def _data_dir():
    if os.environ.get("TFDS_DATA_DIR"):
        return os.environ["TFDS_DATA_DIR"]
    beside = ROOT.parent / "shared" / "tfds"
    return str(beside) if beside.is_dir() else None


# Certification.


def certify(quick):
    """Cost of certifying 10,000 inputs against `model.predict` on them."""
    import keras
    import numpy as np

    import tf_lyapunov as tfl
    from tf_lyapunov import models as zoo

    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2000 if quick else 10_000, 28, 28, 1)).astype("float32")
    rows = []
    builders = {
        "MLP 784-256-128-10": functools.partial(zoo.mlp, widths=[256, 128], activation="relu"),
        "CNN": functools.partial(zoo.cnn, activation="relu"),
    }
    for name, build in builders.items():
        keras.utils.set_random_seed(0)
        model = build(x.shape[1:], num_classes=10)
        predict, prove, once = [], [], []
        for attempt in range(4):
            start = time.perf_counter()
            model.predict(x, verbose=0)
            middle = time.perf_counter()
            tfl.certify(model, x)
            end = time.perf_counter()
            tfl.certify(model, x[:1])
            after = time.perf_counter()
            if attempt:
                predict.append(middle - start)
                prove.append(end - middle)
                once.append(after - end)
        rows.append(
            {
                "model": name,
                "inputs": len(x),
                "predict, s": statistics.median(predict),
                "certify, s": statistics.median(prove),
                "one-off norms (certify one input), s": statistics.median(once),
                "ratio without one-off": statistics.median(
                    (c - o) / p for c, o, p in zip(prove, once, predict, strict=True)
                ),
            }
        )
    return rows


# Imports.


def imports(quick):
    """Seconds that `import tf_lyapunov` adds after `import keras`, and the packages it imports."""
    code = (
        "import time, keras, sys; before = set(sys.modules); t = time.perf_counter(); "
        "import tf_lyapunov; t = time.perf_counter() - t; "
        "print(t, sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    seconds, heavy = [], "[]"
    for _ in range(3 if quick else 7):
        command = [sys.executable, "-c", code]
        line = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        first, _, heavy = line.strip().partition(" ")
        seconds.append(float(first))
    return [{"added, s (median)": statistics.median(seconds), "packages imported": heavy}]


def _show(name, rows):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*(f"{v:.6g}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=160).print(table)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}.")] = None,
    quick: Annotated[bool, typer.Option(help="Smaller sizes, fewer rounds.")] = False,
    out: Annotated[pathlib.Path, typer.Option(help="Where benchmark.json goes.")] = ROOT
    / "scripts"
    / "results",
):
    """Runs the benchmarks and merges them into OUT/benchmark.json."""
    from tf_lyapunov.writing import write_text

    chosen = only or list(SECTIONS)
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        raise typer.BadParameter(f"Unknown sections {unknown}; choose from {SECTIONS}.")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "benchmark.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen:
        rows = globals()[name](quick)
        results[name] = {"machine": machine(), "quick": quick, "rows": rows}
        _show(name, rows)
        write_text(path, json.dumps(results, indent=1, default=float) + "\n")
    if any(not math.isfinite(v) for v in _floats(results)):
        raise SystemExit("A benchmark returned NaN or infinity.")


def _floats(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [f for item in value for f in _floats(item)]
    return [value] if isinstance(value, float) else []


if __name__ == "__main__":
    typer.run(main)
