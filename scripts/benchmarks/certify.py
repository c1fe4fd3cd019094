"""Cost of certification against `model.predict`."""

import functools
import statistics
import time

TITLE = "Certification"


def measure(quick):
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
    return {"rows": rows}
