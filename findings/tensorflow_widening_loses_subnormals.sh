#!/usr/bin/env bash
# Widening float32 numbers to float64 with TensorFlow 2.21.0 sets subnormal ones to zero, though float64
# holds them exactly; an initializer of Keras 3.15.1 does so too, `set_weights` does not.
#
# Expected: a cast from float32 to float64 loses nothing; two ways to give a layer a weight agree.
# Seen: tf.cast([9e-39], float64) is 0.0 while NumPy's astype gives 9.0e-39; a Dense kernel from
# Constant(9e-39) holds 0.0, the same kernel set by set_weights holds 9e-39, and products treat it as
# 0.0. A copy of a network's weights in float64 has to be made by NumPy to be a copy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 tensorflow-cpu==2.21.0
cd "$folder"
TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=tensorflow "$folder/env/bin/python" - <<'END'
import keras
import numpy as np
import tensorflow as tf

weight = np.array([[9e-39]], dtype="float32")
cast = float(tf.cast(tf.constant(weight), tf.float64)[0, 0])
constant = keras.initializers.Constant(9e-39)
made = keras.layers.Dense(1, use_bias=False, kernel_initializer=constant)
made.build((None, 1))
given = keras.layers.Dense(1, use_bias=False)
given.build((None, 1))
given.set_weights([weight])
product = float(given(np.array([[1e38]], dtype="float32"))[0, 0])
kernels = [float(layer.get_weights()[0][0, 0]) for layer in (made, given)]
print("tensorflow", tf.__version__, "keras", keras.__version__)
print("numpy:", float(weight.astype("float64")[0, 0]), "cast:", cast)
print("from an initializer:", kernels[0], "from set_weights:", kernels[1], "times 1e38:", product)
assert cast == 0.0 and weight.astype("float64")[0, 0] > 0, "changed"
assert kernels[0] == 0.0 and kernels[1] > 0, "changed"
assert product == 0.0, "changed"
END
