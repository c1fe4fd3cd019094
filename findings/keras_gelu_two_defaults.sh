#!/usr/bin/env bash
# Keras 3.15.1 has two functions named gelu with opposite defaults: `keras.activations.gelu` is the
# exact one, `keras.ops.gelu` (also `keras.ops.nn.gelu`) the tanh approximation.
#
# Expected: the same name without arguments is the same function, so that one can stand for the other
# when a layer is rewritten with keras.ops.
# Seen: they differ by up to 4.7e-4 (at x = 2.6875), far more than float32's rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2
cd "$folder"
KERAS_BACKEND=jax "$folder/env/bin/python" - <<'END'
import keras
import numpy as np

x = np.linspace(-5, 5, 4001, dtype="float32")
exact = keras.ops.convert_to_numpy(keras.activations.gelu(x))
other = keras.ops.convert_to_numpy(keras.ops.gelu(x))
approximate = keras.ops.convert_to_numpy(keras.activations.gelu(x, approximate=True))
gap = float(np.max(np.abs(exact - other)))
place = float(x[np.argmax(np.abs(exact - other))])
print("keras", keras.__version__, "largest difference", gap, "at", place)
assert np.allclose(other, approximate, atol=1e-6), "changed"
assert 4e-4 < gap < 5e-4, "changed"
END
