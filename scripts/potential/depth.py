"""Depth: time and memory of convex potential networks of up to 1000 layers, in fresh processes.

All layers have one shape, so that one compiled function serves them all: tracing a Keras graph of
1000 layers takes longer than training it. What is computed is `ConvexPotentialConv2D`'s own call,
with its proven bound of the norm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

DEPTHS = (200, 1000)
CHANNELS, BATCH, STEPS = 30, 32, 3


def measure_depth(path: Path, quick: bool) -> list[dict]:
    """Measures every depth with and without rematerialisation; what `path` holds is kept."""
    from tf_lyapunov.writing import write_text

    found = json.loads(path.read_text()) if path.exists() else []
    for depth in (10, 20) if quick else DEPTHS:
        for remat in (False, True):
            if any((r["depth"], r["rematerialised"]) == (depth, remat) for r in found):
                continue
            found.append(in_new_process(depth, remat, STEPS if depth == DEPTHS[-1] else 2))
            print(found[-1], flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def in_new_process(depth: int, remat: bool, steps: int) -> dict:
    """The record of `train` in a process of its own, whose memory is its own."""
    command = [sys.executable, __file__, str(depth), str(steps), *(["--remat"] if remat else [])]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or "no message").splitlines()[-1])
    return json.loads(result.stdout.strip().splitlines()[-1])


def train(depth: int, steps: int, remat: bool = False) -> dict:
    """Trains on 8×8 digits with the multi-margin loss and Adam 1e-3; losses, seconds, memory.

    Args:
        depth: number of convex potential convolutions of 30 channels, 3×3.
        steps: steps on one batch of 32 images.
        remat: whether a layer's intermediate values are computed again in the backward pass.

    Returns:
        dict, JSON-able; memory is the largest resident size of this process, in MB.
    """
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    from tf_lyapunov import layers
    from tf_lyapunov.losses import MultiMargin

    images, labels = load_digits(return_X_y=True)
    x = tf.constant((images[:BATCH] / 16).astype("float32").reshape(-1, 8, 8, 1))
    x, y = layers.ChannelPadding(CHANNELS)(x), labels[:BATCH]
    template = layers.ConvexPotentialConv2D()
    template.build(x.shape)
    constants = [v.value for v in template.non_trainable_variables]

    @tf.function
    def layer(x, kernel, bias):
        return template.stateless_call([kernel, bias], constants, x, training=True)[0]

    call = tf.recompute_grad(layer) if remat else layer
    shapes = [v.shape for v in template.trainable_variables]
    initial = (keras.initializers.GlorotUniform(seed=0), keras.initializers.Zeros())
    weights = [
        keras.Variable(i, s) for _ in range(depth) for i, s in zip(initial, shapes, strict=True)
    ]
    optimizer, loss = keras.optimizers.Adam(1e-3), MultiMargin(0.7)
    pool = layers.ScaledAveragePooling2D(4)
    optimizer.build(weights)
    losses, seconds, before = [], [], _peak()
    for _ in range(steps):
        started = time.process_time()
        with tf.GradientTape() as tape:
            z = x
            for i in range(depth):
                z = call(z, weights[2 * i].value, weights[2 * i + 1].value)
            value = loss(y, tf.reshape(pool(z), (BATCH, -1))[:, :10])
        gradients = tape.gradient(value, [w.value for w in weights])
        optimizer.apply(gradients, weights)
        losses.append(float(value))
        seconds.append(time.process_time() - started)
    return {
        "depth": depth,
        "rematerialised": remat,
        "losses": losses,
        "cpu_per_step": min(seconds),
        "mb_before": before,
        "mb": _peak(),
    }


def _peak() -> float:
    """Largest resident size so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` would count the starting process too
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("depth", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--remat", action="store_true")
    options = parser.parse_args()
    print(json.dumps(train(options.depth, options.steps, options.remat)))
