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
        calls = [
            functools.partial(model.predict, x, verbose=0),
            functools.partial(tfl.certify, model, x),
            functools.partial(tfl.certify, model, x[:1]),
        ]
        # Wall and CPU seconds of each, after a first round that compiles.
        rounds = [[_seconds(call) for call in calls] for _ in range(6)][1:]
        predict, prove, once = ([r[i][0] for r in rounds] for i in range(3))
        rows.append(
            {
                "model": name,
                "inputs": len(x),
                "predict, s": statistics.median(predict),
                "certify, s": statistics.median(prove),
                "one-off norms (certify one input), s": statistics.median(once),
                "ratio without one-off": _ratio(rounds, 0),
                "the same, of CPU time": _ratio(rounds, 1),
            }
        )
    return {"rows": rows}


def _seconds(call):
    """Wall and CPU seconds of a call."""
    begin = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def _ratio(rounds, clock):
    """Median of (certify - its one-off part) / predict."""
    return statistics.median((c[clock] - o[clock]) / p[clock] for p, c, o in rounds)
