"""Pieces of a random model: operations, activations, nested models, merges, heads."""

import keras
import numpy as np
from keras import ops
from soundness import catalogue, entries  # noqa: F401 (entries fill the catalogue)

L = keras.layers


def operation(k, x):
    """One of `keras.ops` applied in the graph."""
    n = x.shape[-1]
    constant = k.rng.normal(size=(n,)).astype("float32") * k.pick([0.1, 3.0])
    matrix = k.rng.normal(size=(n, 3)).astype("float32")
    back = k.compute
    name, apply = k.pick(
        [
            (
                "cast float16",
                lambda: x if k.models == "float16" else ops.cast(ops.cast(x, "float16"), back),
            ),
            ("cast int32", lambda: ops.cast(ops.cast(x, "int32"), back)),
            ("pad", lambda: ops.pad(x, [[0, 0]] * (len(x.shape) - 1) + [[1, 1]])),
            (
                "pad reflect",
                lambda: ops.pad(x, [[0, 0]] * (len(x.shape) - 1) + [[1, 1]], mode="reflect"),
            ),
            ("flip", lambda: ops.flip(x, axis=-1)),
            ("stack", lambda: ops.mean(ops.stack([x, 3 * x], axis=1), axis=1)),
            ("split", lambda: ops.split(ops.concatenate([x, x], -1), 2, axis=-1)[1]),
            ("mean", lambda: ops.mean(x, axis=-1, keepdims=True) + x),
            ("sum", lambda: ops.sum(x, axis=-1, keepdims=True) - x),
            ("clip", lambda: ops.clip(x, k.held(-0.7), k.held(0.9))),
            ("multiply", lambda: ops.multiply(x, k.held(constant))),
            ("scale", lambda: x * k.held(k.pick([0.3, -2.0, 5.0]))),
            ("matmul", lambda: ops.matmul(x, k.held(matrix))),
            ("where", lambda: ops.where(x > k.held(0.1), 2.0 * x, x)),
            ("max", lambda: ops.maximum(x, k.held(constant))),
            ("square", lambda: x * x),
            ("abs", lambda: ops.abs(x)),
            ("sort", lambda: ops.sort(x, axis=-1)),
            ("sqrt", lambda: ops.sqrt(ops.abs(x) + k.held(0.01))),
            ("divide", lambda: x / 0.25),
            ("roll", lambda: ops.roll(x, 1, axis=-1)),
            ("slice", lambda: x[..., : max(1, n - 1)]),
            ("cumsum", lambda: ops.cumsum(x, axis=-1)),
            ("repeat", lambda: ops.repeat(x, 2, axis=-1)),
            ("round", lambda: ops.round(x)),
            ("norm", lambda: ops.normalize(x, axis=-1)),
        ]
    )
    k.names.append(f"ops {name}")
    return apply()


def nested(k, x):
    """A model within the model."""
    form = k.pick(["functional"] * 4 + ["subclassed", "int32", "float16", "keyword"])
    k.names.append(f"nested {form}")
    if form in ("keyword", "subclassed"):
        inner = Scaled(int(k.rng.integers(2, 5)))
        return inner(x, scale=10.0) if form == "keyword" else inner(x)
    # Where the model computes in half precision the cast rounds nothing, nor must the twin's.
    half = "float16"
    if k.models in ("float16", "bfloat16"):
        half = k.input_dtype or half
    dtype = {"int32": "int32", "float16": half}.get(form)
    start = keras.Input(x.shape[1:], dtype=dtype or k.input_dtype)
    y = start if dtype != "int32" else L.Rescaling(1.0)(start)
    return keras.Model(start, L.Dense(3)(y))(x)


@keras.saving.register_keras_serializable("soundness")
class Scaled(keras.Model):
    """A subclassed model with a keyword."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units, self.dense = units, L.Dense(units, "relu")

    def call(self, x, scale=1.0):
        return self.dense(x) * scale

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def merging(k, x):
    """Arrays, shared layers, the functional forms, the layer after itself."""
    form = k.pick(["array", "shared", "function", "residual"])
    k.names.append(f"merge {form}")
    if form == "array":
        constant = k.rng.normal(size=(1, *x.shape[1:])).astype("float32")
        return k.pick([L.Add, L.Subtract, L.Multiply, L.Maximum, L.Minimum, L.Average])()(
            [x, k.held(constant)]
        )
    side = L.Dense(x.shape[-1], k.pick([None, "relu", "tanh"]))
    if form == "shared":
        return side(side(x))
    if form == "function":
        return k.pick([L.add, L.subtract, L.multiply, L.average, L.maximum, L.minimum])(
            [x, side(x)]
        )
    return x + side(x)


def step(k, x):
    """One more piece of the graph."""
    kind = k.pick(["layer"] * 11 + ["ops", "nested", "merge"])
    if kind != "layer":
        return {"ops": operation, "nested": nested, "merge": merging}[kind](k, x)
    names, share = catalogue.names_for(len(x.shape) - 1)
    return catalogue.applied(k, x, names[k.rng.choice(len(names), p=share)])


def beginning(k):
    """`(symbolic inputs, signal, shapes, dtype)`: one input or several, of any type."""
    shapes = [(2,), (2,), (3,), (5,), (4, 2), (6, 1), (4, 4, 1), (3, 3, 2), (2, 2, 2, 1)]
    form = k.pick(["float"] * 17 + ["float16", "int32", "several"])
    shape = k.pick(shapes)
    if form == "several":
        first = keras.Input(shape, dtype=k.input_dtype)
        second = keras.Input((2,), dtype=k.input_dtype)
        k.names.append("several inputs")
        side = L.Dense(shape[-1])(second)
        side = L.Reshape((1,) * (len(shape) - 1) + (shape[-1],))(side)
        return [first, second], first + side, [shape, (2,)], None
    if form == "float":
        start = keras.Input(shape, dtype=k.input_dtype)
        return start, start, [shape], None
    k.names.append(f"{form} inputs")
    start = keras.Input(shape, dtype=form if form == "int32" else (k.input_dtype or form))
    return start, L.Rescaling(0.5)(start) if form == "int32" else start, [shape], form


def ending(k, x):
    """Logits or probabilities, and the threshold of a single one."""
    if len(x.shape) > 2:
        x = L.Flatten()(x)
    units = k.pick([1, 2, 3, 4])
    x = L.Dense(units, bias_initializer="random_normal")(x)
    if k.chance(0.15):
        return x, 0.0
    if units == 1:
        return (L.Activation("sigmoid")(x), 0.5) if k.chance(0.4) else (x, 0.0)
    form = k.pick(["none", "none", "none", "softmax", "layer", "mask"])
    if form == "mask":
        k.names.append("Softmax mask")
        return L.Softmax()(x, mask=np.array([[True] * (units - 1) + [False]])), 0.0
    return {"none": x, "softmax": L.Activation("softmax")(x), "layer": L.Softmax()(x)}[form], 0.0
