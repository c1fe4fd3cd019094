"""Memory and speed of `certify` on inputs that do not fit: tf.data, a generator, a memory map.

Every source is certified in a process of its own. Memory is the process's peak after certifying
the first hundred inputs, and what all of them add to it; speed is against `predict`'s, of the same
source.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

TITLE = "Certifying 200,000 inputs of 400 numbers as they stream in"
SCALE = True
SIZE, COUNT, BATCH = 400, 200_000, 128
SOURCES = ("memory map", "generator", "tf.data")


def measure(quick):
    """One row per source."""
    count = 20_000 if quick else COUNT
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "inputs.npy"
        _write(path, count)
        return {"rows": [_ran(source, path) for source in SOURCES]}


def _write(path, count):
    import numpy as np

    rng = np.random.default_rng(0)
    held = np.lib.format.open_memmap(path, "w+", np.float32, (count, SIZE))
    for start in range(0, count, 10_000):
        held[start : start + 10_000] = rng.uniform(size=held[start : start + 10_000].shape)
    held.flush()


def _ran(source, path):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-P", __file__, source, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(source, path):
    """Prints the row of one source."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tf_lyapunov as tfl
    from tf_lyapunov import models as zoo

    keras.utils.set_random_seed(0)
    model = zoo.mlp((SIZE,), 10, widths=[256, 128], activation="relu")
    x = np.load(path, mmap_mode="r")

    def generated():
        for start in range(0, len(x), BATCH):
            yield (np.array(x[start : start + BATCH]),)

    def given():
        if source == "memory map":
            return x
        if source == "generator":
            return generated()
        signature = (tf.TensorSpec((None, SIZE), tf.float32),)
        return tf.data.Dataset.from_generator(generated, output_signature=signature).prefetch(2)

    few = np.array(x[:100])
    model.predict(few, verbose=0)
    tfl.certify(model, few, progress=False)
    before, pages = _peak(), _mapped()
    begin = time.perf_counter()
    certificate = tfl.certify(model, given(), progress=False)
    certified = time.perf_counter() - begin
    added = _peak() - before - max(_mapped() - pages, 0)
    begin = time.perf_counter()
    model.predict(given(), batch_size=BATCH, verbose=0)
    predicted = time.perf_counter() - begin
    row = {"source": source, "inputs": len(certificate), "MB of inputs": x.nbytes / 1e6}
    row |= {"MB before": before, "MB added": added, "certify, s": certified}
    print(json.dumps(row | {"predict, s": predicted, "speed / predict's": predicted / certified}))


def _peak():
    """The process's own: what `getrusage` calls its peak is its parent's, if that is larger."""
    return _status("VmHWM")


def _mapped():
    """MB of files in memory that the system takes back at will, such as a memory map's pages."""
    return _status("RssFile")


def _status(name):
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


if __name__ == "__main__":
    main(*sys.argv[1:])
