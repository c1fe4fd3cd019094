"""Corrupted images a CPU second: 32×32 colour images, every corruption, median over severities."""

import statistics
import time

TITLE = "Corruptions, images a second of one core"
GOAL = 1000


def measure(quick):
    """A row per corruption, and the median over all of them."""
    import numpy as np

    from tf_lyapunov.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

    count = 256 if quick else 1024
    x = np.random.default_rng(0).uniform(size=(count, 32, 32, 3)).astype("float32")
    rows = []
    for name in CORRUPTIONS:
        corrupt(x[:2], name, 1)  # imports
        rates = []
        for severity in SEVERITIES:
            started = time.process_time()
            corrupt(x, name, severity)
            rates.append(count / (time.process_time() - started))
        rates = {"images / CPU s": statistics.median(rates), "least": min(rates)}
        rows.append({"corruption": name, **rates})
    median = statistics.median(row["images / CPU s"] for row in rows)
    return {"rows": [*rows, {"corruption": "median", "images / CPU s": median, "goal": GOAL}]}
