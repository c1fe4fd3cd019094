"""CPU seconds and bounds of `lipschitz_upper_bound` against an earlier build.

TFL_EARLIER names the folder of the earlier build (a git worktree of 51a20b7, say); without it only
this build is measured. Every number comes from a process of its own, with the threads that BLAS
takes by itself, after one bound of a small network (what TensorFlow traces once is left out).
"""

import json
import os
import pathlib
import subprocess
import sys

TITLE = "Bounds of networks with random weights: CPU seconds, earlier / this build"
SCALE = True
ROOT = pathlib.Path(__file__).resolve().parents[2]
WORK = """
import json, sys, time
import keras
import tf_lyapunov as tfl

root, name, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert tfl.__file__.startswith(root), f"{tfl.__file__} is not the build in {root}."
keras.utils.set_random_seed(0)
Input, layers = keras.Input, keras.layers
small = keras.Sequential([Input((4, 4, 2)), layers.Conv2D(2, 3, padding="same"), layers.Flatten()])
tfl.lipschitz_upper_bound(small)
shape = (side, side, 3)
if name == "DepthwiseConv2D":
    shape = (side, side, 16)
    model = keras.Sequential([Input(shape), layers.DepthwiseConv2D(3, padding="same")])
else:
    build = getattr(keras.applications, name)
    model = build(weights=None, include_top=False, input_shape=shape)
start = time.process_time(), time.perf_counter()
bound = tfl.lipschitz_upper_bound(model).gain_upper_bound
print(json.dumps([time.process_time() - start[0], time.perf_counter() - start[1], bound]))
"""
CASES = (
    ("DepthwiseConv2D", 32),
    ("MobileNetV2", 32),
    ("VGG16", 32),
    ("ResNet50", 32),
)
# Keras' Xception takes no smaller images.
LARGE = (("VGG16", 64), ("DenseNet121", 64), ("Xception", 71), ("ConvNeXtTiny", 64))


def measure(quick):
    """One row per network, and larger images on this build alone."""
    earlier, found = os.environ.get("TFL_EARLIER"), []
    for name, side in CASES[: 2 if quick else None]:
        row = {"what": f"{name} at {side}×{side}"}
        now = _ran(ROOT, name, side)
        if earlier:
            then = _ran(pathlib.Path(earlier), name, side)
            row |= {"earlier CPU s": then[0], "ratio": then[0] / now[0]}
            row |= {"bound / earlier": now[2] / then[2]}
        found.append(row | {"CPU s": now[0], "wall s": now[1]})
    for name, side in () if quick else LARGE:
        now = _ran(ROOT, name, side)
        found.append({"what": f"{name} at {side}×{side}", "CPU s": now[0], "wall s": now[1]})
    return {"rows": found}


def _ran(root, *arguments):
    """(CPU seconds, wall seconds, bound) of one process."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", WORK, *map(str, (root, *arguments))],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])
