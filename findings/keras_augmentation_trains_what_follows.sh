#!/usr/bin/env bash
# Keras 3.15.1: a plain call `model(x)` of a model that begins with an augmentation layer trains the
# batch normalizations behind it: their moving statistics move. Without that layer, or with Dropout
# or GaussianNoise in its place, they stay, and `training=False` keeps them in any case.
#
# Expected: a call without `training` is inference, outside of `fit`, for every layer alike; `predict`
# and `model(x)` agree, and a model that is only looked at stays as it is.
# Seen: the augmentation layers take training=True for granted, and the layers called after them take
# it over. Code that evaluates models by calling them must pass training=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2
cd "$folder"
KERAS_BACKEND=jax "$folder/env/bin/python" - <<'END'
import keras
import numpy as np

layers = keras.layers
x = np.random.default_rng(0).uniform(size=(8, 4, 4, 3)).astype("float32")


def moves(first, **call):
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4, 4, 3)), *first, norm])
    before = keras.ops.convert_to_numpy(norm.moving_mean).copy()
    model(x, **call)
    return not np.array_equal(before, keras.ops.convert_to_numpy(norm.moving_mean))


print("keras", keras.__version__)
for name, first, expected in (
    ("none", [], False),
    ("Dropout", [layers.Dropout(0.1)], False),
    ("GaussianNoise", [layers.GaussianNoise(0.1)], False),
    ("RandomFlip", [layers.RandomFlip()], True),
    ("RandomCrop", [layers.RandomCrop(3, 3)], True),
    ("RandomContrast", [layers.RandomContrast(0.5, value_range=(0, 1))], True),
):
    found = moves(first), moves(first, training=False)
    print(f"{name:15} model(x) moves the statistics: {found[0]}, with training=False: {found[1]}")
    assert found == (expected, False), "changed"
END
