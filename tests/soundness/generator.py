"""Random odd but legal Keras models, each a function of its seed alone.

`build(seed)` gives a `Case`: a model, inputs, and its float64 twin, the same code run under the
float64 policy with the weights that the layers use (cast where they cast). The twin shares no code
with the library. Models are small, so that each is a matter of milliseconds.
"""

import dataclasses
import functools
import warnings

import keras
import numpy as np
from keras import ops

L = keras.layers
POLICIES = ("float32",) * 7 + ("mixed_float16", "mixed_bfloat16", "float64")
ATTEMPTS = 30


@dataclasses.dataclass
class Case:
    """A model, its inputs, its twin (or None), and where a single output decides."""

    seed: int
    model: keras.Model
    twin: keras.Model
    x: np.ndarray
    threshold: float
    policy: str
    described: str

    @property
    def input_dtype(self):
        return np.dtype(self.x.dtype)


class Kept:
    """What both runs of a seed share: its random numbers and the names of what was chosen."""

    def __init__(self, seed, attempt, twin=False):
        self.rng = np.random.default_rng([seed, attempt])
        # `Input` follows floatx, not the policy: the twin's inputs would be rounded to float32.
        self.input_dtype = "float64" if twin else None
        self.names = []

    def pick(self, choices):
        choices = list(choices)
        return choices[self.rng.integers(len(choices))]

    def chance(self, share):
        return self.rng.random() < share

    @property
    def compute(self):
        return keras.config.dtype_policy().compute_dtype


@keras.saving.register_keras_serializable("soundness")
def own_steep(x):
    return 3.0 * ops.tanh(x) + 0.1 * x


def activations(k):
    """Every form in which a user may name an activation."""
    names = [
        *("relu", "tanh", "sigmoid", "elu", "selu", "gelu", "softplus", "softsign", "silu"),
        *("leaky_relu", "relu6", "hard_sigmoid", "hard_silu", "mish", "celu", "hard_tanh"),
        *("tanh_shrink", "soft_shrink", "hard_shrink", "squareplus", "log_sigmoid", "sparse_plus"),
        *("linear", "exponential", "softmax", "glu", "threshold", "sparse_sigmoid"),
    ]
    name = k.pick(names)
    form = k.pick(["string", "function", "layer", "partial", "wrapped", "ops", "own"])
    function = keras.activations.get(name)
    k.names.append(f"{form} {name}")
    if form == "function":
        return function
    if form == "layer":
        return L.Activation(name)
    if form == "partial":
        return k.pick(
            [
                functools.partial(keras.activations.relu, negative_slope=2.5),
                functools.partial(keras.activations.gelu, approximate=True),
                functools.partial(keras.activations.leaky_relu, negative_slope=0.4),
                functools.partial(keras.activations.elu, alpha=3.0),
                functools.partial(keras.activations.relu, max_value=1.5, threshold=0.5),
            ]
        )
    if form == "wrapped":
        return functools.wraps(function)(lambda x: 4.0 * function(x))
    if form == "ops":
        return k.pick([ops.gelu, ops.leaky_relu, ops.relu, ops.elu, ops.sin, ops.square, ops.silu])
    return own_steep if form == "own" else name


def activation_layers(k):
    return k.pick(
        [
            lambda: L.ReLU(),
            lambda: L.ReLU(max_value=2.0, negative_slope=0.3, threshold=0.1),
            lambda: L.LeakyReLU(negative_slope=1.7),
            lambda: L.PReLU(alpha_initializer="random_normal"),
            lambda: L.ELU(alpha=2.0),
            lambda: L.Softmax(axis=k.pick([-1, 1])),
            lambda: L.Activation(activations(k)),
            lambda: L.Activation("relu"),
        ]
    )()


def norms(k):
    statistics = {
        "moving_mean_initializer": "random_normal",
        "moving_variance_initializer": keras.initializers.RandomUniform(0.01, 4.0),
        "gamma_initializer": keras.initializers.RandomNormal(1.0, 1.0),
    }
    return k.pick(
        [
            lambda: L.BatchNormalization(**statistics),
            lambda: L.BatchNormalization(**statistics, epsilon=0.1),
            lambda: L.LayerNormalization(epsilon=k.pick([0.5, 0.01, 1e-3])),
            lambda: L.LayerNormalization(),
            lambda: L.GroupNormalization(groups=-1),
            lambda: L.UnitNormalization(),
            lambda: L.RMSNormalization(epsilon=0.1),
            lambda: L.Rescaling(k.pick([0.1, 3.0, -2.0]), offset=0.3),
            lambda: L.Normalization(mean=0.5, variance=k.pick([0.01, 4.0]), invert=k.chance(0.3)),
        ]
    )()


def operation(k, x):
    """One of `keras.ops` applied in the graph."""
    n = x.shape[-1]
    constant = k.rng.normal(size=(n,)).astype("float32") * k.pick([0.1, 3.0])
    matrix = k.rng.normal(size=(n, 3)).astype("float32")
    back = k.compute
    name, apply = k.pick(
        [
            ("cast float16", lambda: ops.cast(ops.cast(x, "float16"), back)),
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
            ("clip", lambda: ops.clip(x, -0.7, 0.9)),
            ("multiply", lambda: ops.multiply(x, ops.cast(constant, back))),
            ("scale", lambda: x * k.pick([0.3, -2.0, 5.0])),
            ("matmul", lambda: ops.matmul(x, ops.cast(matrix, back))),
            ("where", lambda: ops.where(x > 0.1, 2.0 * x, x)),
            ("max", lambda: ops.maximum(x, ops.cast(constant, back))),
            ("square", lambda: x * x),
            ("abs", lambda: ops.abs(x)),
            ("sort", lambda: ops.sort(x, axis=-1)),
            ("sqrt", lambda: ops.sqrt(ops.abs(x) + 0.01)),
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
    form = k.pick(["functional", "int32", "float16", "keyword", "sequential", "subclassed"])
    k.names.append(f"nested {form}")
    if form in ("keyword", "subclassed"):
        inner = Scaled(int(k.rng.integers(2, 5)))
        return inner(x, scale=10.0) if form == "keyword" else inner(x)
    dtype = {"int32": "int32", "float16": "float16"}.get(form)
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
    """Residual, concatenated, multiplied; with an array; by a shared layer."""
    form = k.pick(["residual", "concat", "array", "product", "shared", "maximum", "dot"])
    k.names.append(f"merge {form}")
    if form == "array":
        constant = k.rng.normal(size=(1, *x.shape[1:])).astype("float32")
        return k.pick([L.Add, L.Subtract, L.Multiply, L.Maximum, L.Minimum, L.Average])()(
            [x, ops.cast(constant, k.compute)]
        )
    side = L.Dense(x.shape[-1], k.pick([None, "relu", "tanh"]))
    if form == "shared":
        return side(side(x))
    if form == "concat":
        return L.Concatenate()([x, side(x)])
    if form == "product":
        return L.Multiply()([x, side(x)])
    if form == "dot":
        return L.Concatenate()([x, L.Dot(-1)([x, x])]) if len(x.shape) == 2 else side(x)
    return k.pick([L.Add, L.Average, L.Subtract, L.Maximum])()([x, side(x)])


def kernels(k, rank):
    """A layer with a kernel for signals of this rank (1 vector, 2 sequence, 3 image, 4 volume)."""
    units, act = int(k.rng.integers(1, 5)), k.pick([None, "relu", "tanh", activations(k)])
    if rank == 1 or k.chance(0.15):
        equation = k.pick(["dense", "dense", "einsum", "time"])
        if rank > 1 and equation == "time":
            return L.TimeDistributed(L.Dense(units, act))
        if equation == "einsum":
            return L.EinsumDense("...x,xy->...y", units, activation=act, bias_axes="y")
        return L.Dense(units, act, use_bias=k.chance(0.8), bias_initializer="random_normal")
    dim = rank - 1
    stride = k.pick([1, 1, 2])
    options = {
        "padding": k.pick(["valid", "same"] + (["causal"] if dim == 1 else [])),
        "activation": act,
        "bias_initializer": "random_normal",
    }
    size = k.pick([1, 2, 3])
    kind = k.pick(["Conv", "Conv", "DepthwiseConv", "SeparableConv", "Transpose"])
    dilation = k.pick([1, 2]) if stride == 1 else 1
    if kind == "Transpose":
        options["padding"] = k.pick(["valid", "same"])
        return getattr(L, f"Conv{dim}DTranspose")(units, size, strides=stride, **options)
    if kind in ("DepthwiseConv", "SeparableConv") and dim < 3:
        options["padding"] = k.pick(["valid", "same"])
        first = () if kind == "DepthwiseConv" else (units,)
        options["depth_multiplier"] = k.pick([1, 2])
        return getattr(L, f"{kind}{dim}D")(
            *first, size, strides=stride, dilation_rate=dilation, **options
        )
    return getattr(L, f"Conv{dim}D")(units, size, strides=stride, dilation_rate=dilation, **options)


def moves(k, x):
    """Pools, shapes, pads, preprocessing."""
    rank = len(x.shape) - 1
    choices = [lambda: L.Flatten(), lambda: L.Dropout(0.5), lambda: L.Identity()]
    choices += [lambda: L.GaussianNoise(0.5), lambda: L.ActivityRegularization(0.1)]
    if rank == 1:
        choices += [lambda: L.RepeatVector(2), lambda: L.Reshape((-1, 1))]
    else:
        dim = rank - 1
        pool = k.pick(["MaxPooling", "AveragePooling"])
        padding = k.pick(["valid", "same"])
        size, stride = k.pick([2, 3]), k.pick([None, 1, 2])
        choices += [
            lambda: getattr(L, f"{pool}{dim}D")(size, strides=stride, padding=padding),
            lambda: getattr(L, f"Global{pool}{dim}D")(keepdims=k.chance(0.5)),
            lambda: getattr(L, f"ZeroPadding{dim}D")(1),
            lambda: getattr(L, f"Cropping{dim}D")(1),
            lambda: getattr(L, f"UpSampling{dim}D")(2),
            lambda: L.Permute(tuple(int(i) for i in k.rng.permutation(rank) + 1)),
            lambda: L.SpatialDropout1D(0.5) if dim == 1 else L.Flatten(),
        ]
        if dim == 2:
            choices += [
                lambda: L.Resizing(3, 2, interpolation=k.pick(["bilinear", "nearest"])),
                lambda: L.CenterCrop(2, 2),
                lambda: L.UpSampling2D(2, interpolation="bilinear"),
                lambda: L.RandomFlip(),
                lambda: L.RandomRotation(0.1),
                lambda: L.RandomContrast(0.5),
            ]
    return k.pick(choices)()


def step(k, x):
    """One more piece of the graph."""
    kind = k.pick(["kernel"] * 5 + ["activation"] * 2 + ["norm", "ops", "nested", "merge", "move"])
    if kind in ("ops", "nested", "merge"):
        return {"ops": operation, "nested": nested, "merge": merging}[kind](k, x)
    if kind == "move":
        layer = moves(k, x)
    elif kind == "kernel":
        layer = kernels(k, len(x.shape) - 1)
    else:
        layer = activation_layers(k) if kind == "activation" else norms(k)
    k.names.append(type(layer).__name__)
    return layer(x)


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
    form = k.pick(["none", "none", "softmax", "layer", "mask"])
    if form == "mask":
        k.names.append("Softmax mask")
        return L.Softmax()(x, mask=np.array([[True] * (units - 1) + [False]])), 0.0
    return {"none": x, "softmax": L.Activation("softmax")(x), "layer": L.Softmax()(x)}[form], 0.0


def _construct(k, shape):
    x = start = keras.Input(shape, dtype=k.input_dtype)
    for _ in range(int(k.rng.integers(1, 5))):
        x = step(k, x)
        if any(s is None or s > 40 for s in x.shape[1:]):
            raise ValueError("too large")
    y, threshold = ending(k, x)
    return keras.Model(start, y), threshold


def leaves(model):
    """Layers that hold variables of their own, with them."""
    for layer in model._flatten_layers():
        variables = [*layer._trainable_variables, *layer._non_trainable_variables]
        yield layer, variables


def weigh(model, factor):
    """Scales the kernels in turn by `factor` and by its inverse."""
    if factor == 1.0:
        return
    for _, variables in leaves(model):
        for variable in variables:
            if "kernel" in variable.path:
                value = np.asarray(ops.convert_to_numpy(ops.cast(variable.value, "float32")))
                variable.assign(value.astype(np.float64) * factor)
                factor = 1 / factor


def copy_used_weights(model, twin):
    """Gives the twin the weights that the model's layers compute with."""
    for (layer, mine), (_, other) in zip(leaves(model), leaves(twin), strict=True):
        for source, target in zip(mine, other, strict=True):
            value = source.value
            if getattr(source, "autocast", getattr(source, "_autocast", True)) and str(
                source.dtype
            ).startswith("float"):
                value = ops.cast(value, layer.compute_dtype)
            target.assign(ops.convert_to_numpy(ops.cast(value, target.dtype)))


def twist(k, model):
    """Something done to the model after it was built, the same to both runs."""
    form = k.pick(["none"] * 6 + ["activation", "call", "slope"])
    if form == "none":
        return
    layers = [layer for layer in model.layers if hasattr(layer, "activation")]
    if form == "activation" and layers:
        layer = k.pick(layers)
        layer.activation = keras.activations.get(k.pick(["relu", "linear", "softplus", "tanh"]))
        k.names.append("activation changed")
    elif form == "call" and k.chance(0.5):
        layer = k.pick(model.layers[1:])
        original = layer.call
        layer.call = lambda *a, **o: 5.0 * original(*a, **o)
        k.names.append("call replaced")
    elif form == "slope":
        for layer in model.layers:
            if isinstance(layer, L.LeakyReLU):
                layer.negative_slope = 4.0
                k.names.append("slope changed")


def _run(seed, attempt, policy, prepare=None, twin=False):
    k = Kept(seed, attempt, twin)
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(seed)
        shape = k.pick([(2,), (2,), (3,), (5,), (4, 2), (6, 1), (4, 4, 1), (3, 3, 2), (2, 2, 2, 1)])
        model, threshold = _construct(k, shape)
        if prepare is not None:
            prepare(model)
        twist(k, model)
    finally:
        keras.config.set_dtype_policy(previous)
    return k, model, threshold, shape


def build(seed):
    """The `Case` of a seed, or raises if no attempt gave a model that computes."""
    rng = np.random.default_rng([seed, 999])
    policy = POLICIES[rng.integers(len(POLICIES))]
    use = rng.random()
    factor = [1.0] * 8 + [1e-4, 1e4, 1e-38, 1e37, 1e-20]
    factor = factor[rng.integers(len(factor))]
    scale = [0.05, 1.0, 1.0, 5.0][rng.integers(4)]
    for attempt in range(ATTEMPTS):

        def prepare(model):
            weigh(model, factor)
            if use < 0.1:  # a first use, after which something may be changed
                model.predict(x0(model), verbose=0)

        def x0(model):
            return np.zeros((1, *model.inputs[0].shape[1:]), dtype=model.inputs[0].dtype)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                k, model, threshold, shape = _run(seed, attempt, policy, prepare)
                dtype = "float64" if policy == "float64" else "float32"
                x = (rng.normal(size=(4, *shape)) * scale).astype(dtype)
                values = ops.convert_to_numpy(
                    ops.cast(model(ops.convert_to_tensor(x), training=False), "float32")
                )
                if values.ndim != 2 or not np.all(np.isfinite(values)):
                    raise ValueError("no finite outputs")
                twin = _run(seed, attempt, "float64", twin=True)[1]
                copy_used_weights(model, twin)
        except Exception:  # an illegal combination: try the next
            continue
        scaled = [f"kernels × {factor:g}"] if factor != 1.0 else []
        described = ", ".join([policy, *scaled, *k.names])
        if use > 0.9 and _clones(k):
            model, cloned = _clone(model)
            described += ", cloned" * cloned
        if any("changed" in n for n in k.names):
            # The last activation may be another one than the model was built with.
            threshold = 0.5 if _ends_in_sigmoid(model) else 0.0
        return Case(seed, model, twin, x, threshold, policy, described)
    raise ValueError(f"No model of seed {seed} computes.")


def _ends_in_sigmoid(model):
    return getattr(model.layers[-1], "activation", None) is keras.activations.sigmoid


def _clone(model):
    """`(clone with the same weights, True)`, or the model where a function cannot be written."""
    try:
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
    except (TypeError, ValueError):
        return model, False
    return copy, True


def _clones(k):
    """Whether a clone is the same function: it is not where a layer was changed afterwards."""
    return not any(
        word in n for n in k.names for word in ("changed", "replaced", "nested", "wrapped")
    )


def plain(seed, layers=1):
    """A `Case` that holds nothing odd: a float32 chain of dense layers with ReLU between them."""
    keras.utils.set_random_seed(seed)
    hidden = [L.Dense(3, "relu") for _ in range(layers - 1)]

    def chain(dtype):
        kept = [L.Dense(h.units, "relu", dtype=dtype) for h in hidden]
        return keras.Sequential([keras.Input((2,), dtype=dtype), *kept, L.Dense(3, dtype=dtype)])

    model, twin = chain("float32"), chain("float64")
    twin.set_weights([np.asarray(w, dtype=np.float64) for w in model.get_weights()])
    x = np.random.default_rng(seed).normal(size=(4, 2)).astype("float32")
    return Case(seed, model, twin, x, 0.0, "float32", "plain")
