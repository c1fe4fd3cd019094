#!/usr/bin/env bash
# Keras 3.15.1 on TensorFlow 2.21.0: the first `fit` after `compile("adam")` traces the whole training step
# twice, although the model is built and every batch has one shape.
#
# Expected: one trace, since model, metrics and optimizer are known when `fit` starts.
# Seen: on this backend the optimizer makes its variables while the step is traced for the first time, and
# `tf.function` then traces again: `train_step` runs twice in Python before the first step is computed, and
# what it does to Python objects is done twice. After `optimizer.build(model.trainable_variables)` it runs
# once; plain "sgd", which has no variables for weights, does so by itself. The trace is most of the time of
# a short fit. Whoever keeps a tensor of the first trace (a cache in a constraint, a layer or a loss) meets
# it in the second one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 tensorflow==2.21.0
cd "$folder"
TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=tensorflow "$folder/env/bin/python" - <<'END'
import keras
import numpy as np
import tensorflow as tf


class Counted(keras.Sequential):
    traces = 0

    def train_step(self, data):
        self.traces += 1
        return super().train_step(data)


def traces(optimizer, early):
    model = Counted([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile(optimizer, "mse")
    assert model.built
    if early:
        model.optimizer.build(model.trainable_variables)
    x, y = np.zeros((64, 6), "float32"), np.zeros((64, 3), "float32")
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    return model.traces


print("keras", keras.__version__, "tensorflow", tf.__version__)
found = {(name, early): traces(name, early) for name in ("adam", "sgd") for early in (False, True)}
for (name, early), count in found.items():
    print(f"{name}, variables made {'before fit' if early else 'by fit'}: {count} traces")
wanted = {("adam", False): 2, ("adam", True): 1, ("sgd", False): 1, ("sgd", True): 1}
assert found == wanted, "changed"
END
