#!/usr/bin/env bash
# Keras 3.15.1 on TensorFlow 2.21.0: `keras.ops.add` (and the Add layer) takes a column for a row where
# both are equally long.
#
# Expected: broadcasting as in NumPy: (4, 4) + (4, 1) adds one number to each row.
# Seen: if all axes of the second operand but one have length 1, and the long one is as long as the
# first operand has columns (or is long on axis 1), the operand is squeezed and added by
# `tf.nn.bias_add`: along the columns. No error, another result. In a model the long axis can be the
# batch's: for batches of one particular size the outputs of a sample depend on the other samples.
# With the operands in the other order, or by `keras.ops.subtract`, the result is NumPy's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 tensorflow==2.21.0
cd "$folder"
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/env/bin/python" - <<'END'
import keras
import numpy as np

table, column = np.zeros((4, 4), "float32"), np.arange(4, dtype="float32").reshape(4, 1)
found = {
    "add": keras.ops.add(table, column),
    "Add": keras.layers.Add()([table, column]),
    "swapped": keras.ops.add(column, table),
    "subtract": keras.ops.subtract(table, -column),
}
found = {name: keras.ops.convert_to_numpy(value) for name, value in found.items()}
print("keras", keras.__version__, {name: value[1].tolist() for name, value in found.items()})
expected = table + column
assert np.array_equal(found["add"], expected.T) and np.array_equal(found["Add"], expected.T), "changed"
assert np.array_equal(found["swapped"], expected), "changed"
assert np.array_equal(found["subtract"], expected), "changed"

inputs = keras.Input((4,))
score = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(inputs)
model = keras.Model(inputs, keras.layers.Add()([inputs, score]))
x = np.arange(16, dtype="float32").reshape(4, 4)
together = keras.ops.convert_to_numpy(model(x))
alone = np.concatenate([keras.ops.convert_to_numpy(model(x[i : i + 1])) for i in range(4)])
print("a batch of 4, first row:", together[0].tolist(), "- alone:", alone[0].tolist())
assert np.array_equal(alone, x + x.sum(axis=1, keepdims=True)), "changed"
assert not np.array_equal(together, alone), "changed"
END
