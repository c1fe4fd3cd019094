#!/usr/bin/env bash
# Keras 3.15.1 on PyTorch 2.13.0 computes the product of two float64 tensors in float32.
#
# Expected: `keras.ops.matmul` of float64 operands, and a Dense layer with dtype="float64", are accurate
# to 1e-16, as on TensorFlow.
# Seen: the type of the result follows floatx: matmul returns float32, with an error of 1.8e-7 relative to
# |A||B|, and so does the Dense layer. Elementwise operations keep float64. A bound computed
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
layer = keras.layers.Dense(30, use_bias=False, dtype="float64")
layer.build((None, 80))
layer.kernel.assign(b)
products = {"matmul": keras.ops.matmul(*tensors), "Dense": layer(tensors[0])}
for name, product in products.items():
    dtype = keras.backend.standardize_dtype(product.dtype)
    print("keras", keras.__version__, name, dtype, error(product))
    assert 1e-10 < error(product) < 1e-5, "changed"
assert keras.backend.standardize_dtype(products["matmul"].dtype) == "float32", "changed"
kept = keras.ops.add(*[tensors[0]] * 2)
print("add", keras.backend.standardize_dtype(kept.dtype))
assert keras.backend.standardize_dtype(kept.dtype) == "float64", "changed"
END
