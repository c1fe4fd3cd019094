#!/usr/bin/env bash
# In Keras 3.15.1 a nested Functional model whose Input is int32 truncates the real numbers that an
# outer model hands it, without a word, when the model is built and when it runs.
#
# Expected: an error or a warning where float32 signals meet an int32 Input.
# Seen: 0.9 arrives as 0 and -1.7 as -1; the composed function is a staircase, though every layer in
# it looks like an ordinary Dense layer. A float16 Input rounds likewise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2
cd "$folder"
KERAS_BACKEND=jax "$folder/env/bin/python" - <<'END'
import warnings

import keras
import numpy as np

warnings.simplefilter("error")
outer = keras.Input((1,))
functions = {}
for dtype in ("int32", "float16"):
    inner_input = keras.Input((1,), dtype=dtype)
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    inner = keras.Model(inner_input, dense(inner_input))
    functions[dtype] = keras.Model(outer, inner(outer))
x = np.array([[0.9], [-1.7], [2.999], [1 + 2.0**-12]], "float32")
for dtype, model in functions.items():
    y = keras.ops.convert_to_numpy(model(x))
    print("keras", keras.__version__, dtype, x.ravel().tolist(), "->", y.ravel().tolist())
    rounded = x.astype(dtype).astype("float32")
    assert np.array_equal(y, rounded) and not np.array_equal(y, x), "changed"
END
