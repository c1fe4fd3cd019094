"""PGD-40 throughput against foolbox's TensorFlow attack."""

import functools
import statistics
import time

from benchmarks.data import mnist_or_digits

TITLE = "PGD-40 against foolbox"


def measure(quick):
    """PGD-40 throughput against foolbox's TensorFlow attack, equal steps, on trained models."""
    try:
        import eagerpy
        import foolbox
    except ImportError:
        return {"rows": [{"what": "skipped: foolbox is missing; install tf_lyapunov[benchmark]"}]}
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_lyapunov as tfl
    from tf_lyapunov import models as zoo

    x, y, source = mnist_or_digits()
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
    return {"rows": rows}
