"""CPU seconds and values of bounds against an earlier build.

TFL_EARLIER names the folder of the earlier build (a git worktree of d3f34db, say); without it only
this build is measured. Every number comes from a process of its own (`timed_bounds.py`), with the
threads that BLAS takes by itself. The earlier build is given up after five minutes: its row then
says how much CPU it had used.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys

TITLE = "Bounds of networks with random weights: CPU seconds, earlier / this build"
SCALE = True
_GIVEN_UP = object()
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Seconds after which the earlier build is given up.
LIMIT = 300
SCRIPT = pathlib.Path(__file__).resolve().with_name("timed_bounds.py")
CASES = (
    ("lipschitz_upper_bound", "DepthwiseConv2D", 32),
    ("lipschitz_upper_bound", "MobileNetV2", 32),
    ("lipschitz_upper_bound", "VGG16", 32),
    ("lipschitz_upper_bound", "ResNet50", 32),
    ("layer_indices", 784, 50),
    ("project", "ResNet50", 224),
    ("verify_property", 5, 50, 8.0),
    ("monitored_epoch", 8, "watched"),
    ("monitored_epoch", 1000, "watched"),
)
# This build alone. Keras' Xception takes no smaller images.
LARGE = (
    ("lipschitz_upper_bound", "VGG16", 64),
    ("lipschitz_upper_bound", "DenseNet121", 64),
    ("lipschitz_upper_bound", "Xception", 71),
    ("lipschitz_upper_bound", "ConvNeXtTiny", 64),
    ("lipschitz_upper_bound", "EfficientNetV2B0", 64),
    ("monitored_epoch", 1000, "bare"),
)


def measure(quick):
    """One row per case, and larger ones on this build alone.

    The values are the bound; the radius² of the cone; none; the parts that were bounded; the CPU
    seconds of the quickest epoch.
    """
    earlier, found = os.environ.get("TFL_EARLIER"), []
    for case in CASES[: 2 if quick else None]:
        row, now = {"what": " ".join(map(str, case))}, ran(ROOT, *case)
        if earlier:
            row |= _compared(now, ran(pathlib.Path(earlier).resolve(), *case, limit=LIMIT))
        found.append(row | _own(now))
        print(found[-1], file=sys.stderr, flush=True)
    for case in () if quick else LARGE:
        found.append({"what": " ".join(map(str, case))} | _own(ran(ROOT, *case)))
        print(found[-1], file=sys.stderr, flush=True)
    return {"rows": found}


def _compared(now, then):
    """Columns of a row about the earlier build."""
    if then[2] is _GIVEN_UP:
        return {"earlier CPU s": f"> {then[0]:.0f}", "ratio": f"> {then[0] / now[0]:.0f}"}
    columns = {"earlier CPU s": then[0], "ratio": then[0] / now[0]}
    return columns if now[2] is None else columns | {"value / earlier": now[2] / then[2]}


def _own(now):
    row = {"CPU s": now[0], "wall s": now[1]}
    return row if now[2] is None else row | {"value": now[2]}


def ran(root, *arguments, limit=None, threads=None):
    """(CPU seconds, wall seconds, value) of one process; `_GIVEN_UP` for one beyond its limit."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    if threads is not None:
        environment |= {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "OMP", "MKL")}
    before = _cpu_of_children()
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), *map(str, (root, *arguments))],
            cwd=root,
            env=environment | {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return _cpu_of_children() - before, limit, _GIVEN_UP
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _cpu_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
