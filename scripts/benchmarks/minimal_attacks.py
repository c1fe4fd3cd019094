"""Median l2 and l∞ distances and times of minimal attacks against foolbox's, on the same models."""

import os
import statistics
import time

from benchmarks.data import mnist_or_digits

TITLE = "Minimal attacks against foolbox"


def measure(quick):
    """Distances and times of the same attack here and in foolbox; AutoAttack's share of success."""
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return {"rows": [{"what": "skipped: foolbox's Keras bridge is TensorFlow's"}]}
    try:
        import foolbox
    except ImportError:
        return {"rows": [{"what": "skipped: foolbox is missing; install tf_lyapunov[benchmark]"}]}
    import numpy as np

    import tf_lyapunov as tfl
    from tf_lyapunov.theory.balls import L2, Linf

    own, peer = tfl.attacks, foolbox.attacks
    rows = []
    for name, model, x in _models(quick):
        labels = np.argmax(model.predict(x, verbose=0), axis=1)
        for box in (None, (0.0, 1.0)):
            pairs = [
                ("DDN", own.DDN, {}, peer.DDNAttack(steps=100)),
                ("FMN", own.FMN, {}, peer.L2FMNAttack(steps=100)),
                ("DeepFool", own.DeepFool, {}, peer.L2DeepFoolAttack()),
                ("FAB", own.FAB, {}, None),
                ("FGV", own.MinimalFGV, {}, None),
                ("L-BFGS", own.LBFGS, {}, None),
                ("DeepFool l∞", own.DeepFool, {"radius": Linf}, peer.LinfDeepFoolAttack()),
                ("FMN l∞", own.FMN, {"radius": Linf}, peer.LInfFMNAttack(steps=100)),
            ]
            carlini = peer.L2CarliniWagnerAttack(6, 200, stepsize=0.05, initial_const=1.0)
            # foolbox maps the box to the line, which makes no sense for a very large one.
            pairs.append(("C&W", own.CarliniWagner, {}, carlini if box else None))
            for title, make, options, theirs in pairs:
                attack = make(bounds=box, **options)
                row = {"model": name, "box": str(box), "attack": title, "inputs": len(x)}
                row |= _timed(_ours(attack, model, x, labels), quick, "ours")
                if theirs is not None:
                    norm = options.get("radius", L2)
                    run = _foolbox(foolbox, theirs, model, x, labels, box, norm)
                    row |= _timed(run, quick, "foolbox")
                    if row["success, ours"] > 0.5 < row["success, foolbox"]:
                        row["distance ratio"] = row["median, ours"] / row["median, foolbox"]
                    for clock in ("", "CPU "):
                        seconds = [row[f"{clock}seconds, {who}"] for who in ("ours", "foolbox")]
                        row[f"{clock}time ratio"] = seconds[0] / seconds[1]
                print(row, flush=True)
                rows.append(row)
            radius = next(r["median, ours"] for r in reversed(rows) if r["attack"] == "C&W")
            start = time.perf_counter()
            result = own.AutoAttack(L2(radius), bounds=box)(model, x, labels)
            rows.append(
                {
                    "model": name,
                    "box": str(box),
                    "attack": result.attack,
                    "found by": str(result.counts),
                    "inputs": len(x),
                    "success, ours": result.success_rate,
                    "seconds, ours": time.perf_counter() - start,
                }
            )
    return {"rows": rows}


def _models(quick):
    """A small MLP on 8×8 digits, and one on MNIST (or digits enlarged), with inputs to attack."""
    import keras

    from tf_lyapunov import datasets
    from tf_lyapunov import models as zoo

    digits = datasets.load("digits")
    cases = [("MLP 64-64-32-10, digits", digits.x_train, digits.y_train, [64, 32], 30)]
    if not quick:
        x, y, source = mnist_or_digits()
        x = x - x.min()  # to [0, 1]
        cases.append((f"MLP 256-128-10, {source}", x[:20000], y[:20000], [256, 128], 3))
    for name, x, y, widths, epochs in cases:
        keras.utils.set_random_seed(0)
        x = x.reshape(len(x), -1).astype("float32")
        model = zoo.mlp(x.shape[1:], num_classes=10, widths=widths, activation="relu")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        model.fit(x, y, epochs=epochs, batch_size=64, verbose=0)
        yield name, model, x[: 200 if quick else 500]


def _ours(attack, model, x, labels):
    return lambda: attack(model, x, labels).distance


def _foolbox(foolbox, attack, model, x, labels, box, norm):
    import numpy as np
    import tensorflow as tf

    bridge = foolbox.TensorFlowModel(model, bounds=box or (-100.0, 100.0))

    def run():
        distances = []
        for i in range(0, len(x), 256):
            part = slice(i, i + 256)
            inputs = tf.constant(x[part]), tf.constant(labels[part], tf.int64)
            _, found, _ = attack(bridge, *inputs, epsilons=None)
            found = found.numpy()
            wrong = np.argmax(model.predict_on_batch(found), axis=1) != labels[part]
            change = found.astype(np.float64) - x[part]
            distances.append(np.where(wrong, norm(0.0).norm(change), np.nan))
        return np.concatenate(distances)

    return run


def _timed(run, quick, who):
    """Median distance if more than half succeed (failures count as far), successes, seconds."""
    import numpy as np

    run()  # compiles
    wall, cpu = [], []
    for _ in range(1 if quick else 3):
        start = time.perf_counter(), time.process_time()
        distance = run()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    found = ~np.isnan(distance)
    median = float(np.median(np.where(found, distance, np.inf)))
    return {
        f"median, {who}": median if np.isfinite(median) else None,
        f"success, {who}": float(np.mean(found)),
        f"seconds, {who}": statistics.median(wall),
        f"CPU seconds, {who}": statistics.median(cpu),
    }
