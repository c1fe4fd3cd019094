"""Time and packages that `import tf_lyapunov` adds to `import keras`."""

import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
TITLE = "Imports"


def measure(quick):
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
    row = {"added, s (median)": statistics.median(seconds), "packages imported": heavy}
    return {"rows": [row]}
