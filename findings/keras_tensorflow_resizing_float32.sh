#!/usr/bin/env bash
# Image resizing of a float64 layer of Keras 3.15.1 is computed in float32 on TensorFlow 2.21.0, and
# labelled float64; on JAX 0.10.2 it is computed in float64.
#
# Expected: `Resizing(…, dtype="float64")` of a float64 image errs by about 1e-16.
# Seen: on TensorFlow every number of the float64 result is a float32 number, off by about 3e-8, with
# no warning; so are those of UpSampling2D(interpolation="bilinear"). A twin of a model in float64,
# made to measure the model's rounding, has the same rounding in it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  keras==3.15.1 tensorflow-cpu==2.21.0 jax==0.10.2
cd "$folder"
cat > resize.py <<'END'
import sys

import keras
import numpy as np

x = np.random.default_rng(0).uniform(size=(1, 5, 5, 1))
layers = [
    keras.layers.Resizing(3, 3, dtype="float64"),
    keras.layers.UpSampling2D(2, interpolation="bilinear", dtype="float64"),
]
for layer in layers:
    found = keras.ops.convert_to_numpy(layer(x))
    single = bool(np.array_equal(found, found.astype("float32")))
    moved = np.max(np.abs(found - 1 - keras.ops.convert_to_numpy(layer(x - 1))))
    print(keras.backend.backend(), layer.name, found.dtype, "all float32 numbers:", single, moved)
    assert found.dtype == np.float64, "changed"
    assert single == (sys.argv[1] == "tensorflow"), "changed"
    assert (moved > 1e-9) == single, "changed"
END
export TF_CPP_MIN_LOG_LEVEL=3
KERAS_BACKEND=tensorflow "$folder/env/bin/python" resize.py tensorflow
KERAS_BACKEND=jax JAX_ENABLE_X64=1 "$folder/env/bin/python" resize.py jax
