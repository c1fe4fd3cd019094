"""Pair statistics of a whole training set: time and memory, each in a process of its own."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

TITLE = "Opposite-class pairs, all compared exactly"
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Reads images, counts, and writes what was found and what it took; NumPy and SciPy alone compute.
_COUNT = """
import dataclasses, pathlib, re, sys, time
import numpy as np
from tf_lyapunov.theory.localized import pair_statistics
with np.load(sys.argv[1]) as file:
    x, y, thresholds, norm = file["x"], file["y"], file["thresholds"], float(file["norm"])
started, busy = time.perf_counter(), time.process_time()
found = pair_statistics(x, y, thresholds, norm=2 if norm == 2 else np.inf)
took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
status = pathlib.Path("/proc/self/status")
if status.exists():  # the largest resident size so far, in KiB
    took["peak_gib"] = int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) / 2**20
np.savez(sys.argv[2], **dataclasses.asdict(found), **took)
"""
TOOK = ("seconds", "cpu_seconds", "peak_gib")


def counted(x, y, thresholds, norm):
    """`pair_statistics` in a process of its own, and what it took.

    Returns:
        `(PairStatistics, {"seconds", "cpu_seconds", "peak_gib" (Linux)})`.
    """
    import numpy as np

    from tf_lyapunov.theory.localized import PairStatistics

    with tempfile.TemporaryDirectory() as directory:
        given, found = (str(pathlib.Path(directory, name)) for name in ("x.npz", "found.npz"))
        np.savez(given, x=x.reshape(len(x), -1), y=y, thresholds=thresholds, norm=norm)
        environment = {**os.environ, "KERAS_BACKEND": "numpy", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", _COUNT, given, found], env=environment, check=True)
        with np.load(found) as file:
            values = {name: file[name] for name in file.files}
    took = {name: float(values[name]) for name in TOOK if name in values}
    names = [field.name for field in dataclasses.fields(PairStatistics)]
    values = {name: v.item() if v.ndim == 0 else v for name, v in values.items()}
    return PairStatistics(**{**{name: values[name] for name in names}, "norm": norm}), took


def measure(quick):
    """Counts all pairs of MNIST (or digits): in l2 of 60,000, in l∞ of a subsample."""
    import numpy as np

    from tf_lyapunov.theory.localized import compatibility_thresholds

    x, y, source = _images()
    sizes = [(2, 2000), (np.inf, 2000)]
    if not quick:
        sizes += [(2, 15_000), (2, 60_000), (np.inf, 5000)]
    rows = []
    for norm, count in sizes:
        count = min(count, len(x))
        slopes = np.geomspace(0.125, 8, 49) if norm == 2 else np.geomspace(1.05, 16, 33)
        thresholds = compatibility_thresholds(slopes, norm=norm)
        found, took = counted(x[:count], y[:count], thresholds, norm)
        row = {"data": source, "norm": "l2" if norm == 2 else "linf", "samples": count, **took}
        if count <= 2000:
            closer = brute_force(x[:count], y[:count], thresholds, norm)
            row["equals brute force"] = str(bool(np.array_equal(closer, found.closer)))
        rows.append(row)
    return {"rows": rows, "scale": scale_law(rows)}


def brute_force(x, y, thresholds, norm):
    """Opposite-class pairs closer than each threshold, from all differences in float64."""
    import numpy as np

    x = x.reshape(len(x), -1).astype(np.float64)
    closer = np.zeros(len(thresholds), int)
    for i in range(len(x) - 1):
        change = x[i + 1 :][y[i + 1 :] != y[i]] - x[i]
        if norm == 2:
            distances = np.sqrt(np.einsum("ij,ij->i", change, change))
        else:
            distances = np.abs(change).max(axis=1, initial=0)
        closer += (distances[:, None] < thresholds).sum(axis=0)
    return closer


def scale_law(rows):
    """CPU hours and GiB of 10⁶ samples, by n² and n, from the largest l2 count."""
    row = max((r for r in rows if r["norm"] == "l2"), key=lambda r: r["samples"])
    share = 1e6 / row["samples"]
    law = {"samples": 1_000_000, "cpu_hours": row["cpu_seconds"] * share**2 / 3600}
    return {**law, "gib": row["peak_gib"] * share} if "peak_gib" in row else law


def _images():
    """The whole training split of MNIST, which `mnist_or_digits` shortens, or digits."""
    import numpy as np

    from benchmarks.data import _data_dir, mnist_or_digits
    from tf_lyapunov import datasets

    try:
        data = datasets.load("mnist", data_dir=_data_dir(), validation=1)
    except ValueError:
        return mnist_or_digits()
    x = np.concatenate([data.x_val, data.x_train])
    return x, np.concatenate([data.y_val, data.y_train]), "MNIST"
