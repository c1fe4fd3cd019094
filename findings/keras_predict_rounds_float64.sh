#!/usr/bin/env bash
# `predict` of a float64 Keras 3.15.1 model rounds its NumPy inputs to float32 before the model sees
# them; calling the model does not.
#
# Expected: a model whose Input and layers are float64 predicts from the float64 numbers it is given.
# Seen: the data adapter casts arrays to `keras.config.floatx()` ("float32"), whatever the model's
# dtypes: 2**24 + 1 arrives as 2**24. `model(x)` keeps it. With `set_floatx("float64")` both agree.
# (JAX backend with 64-bit mode on.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2
cd "$folder"
KERAS_BACKEND=jax JAX_ENABLE_X64=1 "$folder/env/bin/python" - <<'END'
import keras
import numpy as np

inputs = keras.Input((1,), dtype="float64")
layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype="float64")
model = keras.Model(inputs, layer(inputs))
x = np.array([[2.0**24 + 1]])
predicted = float(model.predict(x, verbose=0)[0, 0])
called = float(keras.ops.convert_to_numpy(model(x))[0, 0])
print("keras", keras.__version__, "predict:", predicted, "call:", called, "given:", x[0, 0])
assert called == x[0, 0] and predicted == 2.0**24, "changed"
keras.config.set_floatx("float64")
again = keras.Model(inputs, layer(inputs))
assert float(again.predict(x, verbose=0)[0, 0]) == x[0, 0], "changed"
END
