#!/usr/bin/env bash
# Keras 3.15.1 on PyTorch 2.13.0 computes the product of two float64 tensors in float32.
#
# Expected: `keras.ops.matmul` of float64 operands is accurate to 1e-16, as on TensorFlow.
# Seen: the result says float64, its error is that of float32 (5e-8 relative, measured below), and a
# Dense layer with dtype="float64" likewise. Elementwise operations keep float64. A bound computed
# "in float64" through keras.ops is none on this backend; NumPy's product is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 torch==2.13.0 numpy
cd "$folder"
KERAS_BACKEND=torch "$folder/env/bin/python" - <<'END'
import keras
import numpy as np

rng = np.random.default_rng(0)
a, b = rng.normal(size=(50, 80)), rng.normal(size=(80, 30))
scale = np.abs(a) @ np.abs(b)


def error(product):
    return float(np.max(np.abs(keras.ops.convert_to_numpy(product) - a @ b) / scale))


tensors = [keras.ops.convert_to_tensor(v, dtype="float64") for v in (a, b)]
product = keras.ops.matmul(*tensors)
layer = keras.layers.Dense(30, use_bias=False, dtype="float64")
layer.build((None, 80))
layer.kernel.assign(b)
found = {"matmul": error(product), "Dense": error(layer(tensors[0]))}
print("keras", keras.__version__, keras.backend.standardize_dtype(product.dtype), found)
assert keras.backend.standardize_dtype(product.dtype) == "float64"
assert all(1e-10 < value < 1e-6 for value in found.values()), "changed"
END
