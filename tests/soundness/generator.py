"""Random odd but legal Keras models, each a function of its seed alone.

`build(seed)` gives a `Case`: a model, inputs, and its float64 twin, the same code run under the
float64 policy with the weights that the layers use (cast where they cast). The twin shares no code
with the library. Models are small, so that each is a matter of milliseconds.
"""

import dataclasses
import functools
import tempfile
import warnings
from pathlib import Path

import keras
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import numpy as np
from keras import ops
from soundness import pieces

from tf_lyapunov.layers.base import EffectiveLayer
from tf_lyapunov.layers.condensing import fix
from tf_lyapunov.optimizers import Stiefel, is_marked

L = keras.layers
POLICIES = (
    *("float32",) * 14,
    *("mixed_float16", "mixed_bfloat16", "float64") * 2,
    *("float16", "bfloat16"),
)
ATTEMPTS = 30


@dataclasses.dataclass
class Case:
    """A model, its inputs, its twin (or None), and where a single output decides.

    Attributes:
        x: inputs (n, …); those of a model with several inputs are flattened and joined, (n, size).
        shapes: of every input, without the batch.
        make_twin: makes the twin from the model's weights when it is first asked for, or None.
    """

    seed: int
    model: keras.Model
    make_twin: object
    x: np.ndarray
    shapes: list
    threshold: float
    policy: str
    described: str

    @functools.cached_property
    def twin(self):
        return self.make_twin() if self.make_twin is not None else None

    @property
    def input_dtype(self):
        return np.dtype(self.x.dtype)

    def argument(self, x):
        """What the model is called on: an array, or one for every input."""
        if len(self.shapes) == 1:
            return x
        sizes = np.cumsum([int(np.prod(s)) for s in self.shapes])[:-1]
        parts = np.split(x.reshape(len(x), -1), sizes, axis=1)
        return [p.reshape(len(x), *s) for p, s in zip(parts, self.shapes, strict=True)]


class Kept:
    """What both runs of a seed share: its random numbers and the names of what was chosen."""

    def __init__(self, seed, attempt, twin=False, compute=None):
        # What the model computes in; the twin, in float64, must not round where it does not.
        self.models = compute or self.compute
        self.rng = np.random.default_rng([seed, attempt])
        # `Input` follows floatx, not the policy: the twin's inputs would be rounded to float32.
        self.input_dtype = "float64" if twin else None
        self.names = []

    def held(self, value):
        """A constant as the model's graph holds it, which is what its twin computes with too."""
        value = np.asarray(value, dtype=np.dtype(self.models)).astype(np.float64)
        return float(value) if value.ndim == 0 else ops.cast(value, self.compute)

    def pick(self, choices):
        choices = list(choices)
        return choices[self.rng.integers(len(choices))]

    def chance(self, share):
        return self.rng.random() < share

    @property
    def compute(self):
        return keras.config.dtype_policy().compute_dtype


def _construct(k):
    start, x, shapes, dtype = pieces.beginning(k)
    for _ in range(int(k.rng.integers(1, 5))):
        x = pieces.step(k, x)
        if any(s is None or s > 40 for s in x.shape[1:]) or len(x.shape) < 2:
            raise ValueError("too large")
    y, threshold = pieces.ending(k, x)
    model = keras.Model(start, y)
    form = k.pick(["none"] * 12 + ["functional", "sequential", "subclassed"])
    if form != "none" and len(shapes) == 1:
        model = _wrapped(k, model, form)
    return model, threshold, shapes, dtype


def _wrapped(k, model, form):
    """The model within another one."""
    k.names.append(f"wrapped in {form}")
    outer = keras.Input(model.inputs[0].shape[1:], dtype=model.inputs[0].dtype)
    if form == "functional":
        return keras.Model(outer, model(outer))
    if form == "sequential":
        return keras.Sequential([outer, model])
    held = Holder(model)
    held(np.zeros((1, *model.inputs[0].shape[1:]), dtype=model.inputs[0].dtype))
    return held


@keras.saving.register_keras_serializable("soundness")
class Holder(keras.Model):
    """A subclassed model that calls another one."""

    def __init__(self, inner, **options):
        super().__init__(**options)
        self.inner = inner

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner)
        return {**super().get_config(), "inner": inner}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("inner")), **config)


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
    for (layer, mine), (copy, other) in zip(leaves(model), leaves(twin), strict=True):
        for source, target in zip(mine, other, strict=True):
            value = source.value
            if getattr(source, "autocast", getattr(source, "_autocast", True)) and str(
                source.dtype
            ).startswith("float"):
                value = ops.cast(value, layer.compute_dtype)
            # By NumPy: a backend may flush subnormal numbers as it widens them.
            value = np.asarray(ops.convert_to_numpy(value))
            target.assign(value.astype("float32" if value.dtype.kind == "V" else value.dtype))
        if isinstance(layer, EffectiveLayer):
            fix(copy, layer.effective_values())


def turn(model, seed):
    """A few steps of `Stiefel` along random gradients, where kernels are marked for it."""
    variables = [v for v in model.trainable_variables if is_marked(v)]
    if not variables:
        return
    rng = np.random.default_rng([seed, 7])
    optimizer = Stiefel(keras.optimizers.SGD(0.1))
    for _ in range(2):
        grads = [rng.normal(size=v.shape).astype("float32") for v in variables]
        optimizer.apply(
            [ops.cast(g, v.dtype) for g, v in zip(grads, variables, strict=True)], variables
        )


# Attributes that a user may set after the model was built, with values to set.
ATTRIBUTES = {
    "negative_slope": [4.0, 0.3],
    "max_value": [0.7],
    "alpha": [3.0],
    "epsilon": [0.5, 1e-6],
    "scale": [7.0],
    "offset": [0.9],
    "threshold": [0.4],
    "activation": [
        keras.activations.get(n) for n in ("relu", "linear", "softplus", "tanh", "leaky_relu")
    ],
}
_CHANGED = (L.ReLU, L.LeakyReLU, L.ELU, L.BatchNormalization, L.LayerNormalization, L.Rescaling)


def _is_number(layer, name):
    value = vars(layer)[name]
    number = isinstance(value, (float, int)) and not isinstance(value, bool)
    return number and isinstance(layer, _CHANGED)


def twist(k, model):
    """Something done to the model after it was built, the same to both runs."""
    form = k.pick(["none"] * 12 + ["activation"] * 2 + ["attribute"] * 2 + ["call", "lora"])
    layers = [layer for layer in model._flatten_layers() if not isinstance(layer, keras.Model)]
    if form in ("activation", "attribute"):
        known = ("activation",) if form == "activation" else tuple(ATTRIBUTES)
        may = [
            (layer, name)
            for layer in layers
            for name in known
            if name in vars(layer) and (name == "activation" or _is_number(layer, name))
        ]
        if may:
            layer, name = may[k.rng.integers(len(may))]
            value = k.pick(ATTRIBUTES[name])
            setattr(layer, name, value)
            k.names.append(f"{name} changed")
    elif form == "call":
        layer = k.pick(layers)
        original = layer.call
        layer.call = lambda *a, **o: 5.0 * original(*a, **o)
        k.names.append("call replaced")
    elif form == "lora":
        for layer in layers:
            if hasattr(layer, "enable_lora") and not getattr(layer, "lora_enabled", True):
                layer.enable_lora(1)
                k.names.append("lora")
                break
    for _, variables in leaves(model):
        for variable in variables:
            if "lora" in variable.path:  # its second factor begins at zero
                variable.assign(k.rng.normal(size=variable.shape))


def _run(seed, attempt, policy, prepare=None, twin=False, compute=None):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        k = Kept(seed, attempt, twin, compute)
        keras.utils.set_random_seed(seed)
        model, threshold, shapes, dtype = _construct(k)
        if prepare is not None:
            prepare(model)
        twist(k, model)
    finally:
        keras.config.set_dtype_policy(previous)
    return k, model, threshold, shapes, dtype


def build(seed):
    """The `Case` of a seed, or raises if no attempt gave a model that computes."""
    rng = np.random.default_rng([seed, 999])
    policy = POLICIES[rng.integers(len(POLICIES))]
    use = rng.random()
    extremes = [1e-4, 1e4, 1e-38, 1e37, 1e-20]
    if policy.endswith("_float16") or policy == "float16":
        extremes = [1e-4, 3e2, 1e-7, 2e3, 1e-3]
    factors = [1.0] * 10 + extremes
    factor = factors[rng.integers(len(factors))]
    scale = [0.05, 1.0, 1.0, 5.0][rng.integers(4)]
    for attempt in range(ATTEMPTS):

        def prepare(model):
            weigh(model, factor)
            if 0.05 < use < 0.4:
                turn(model, seed)
            if use < 0.05:  # a first use, after which something may be changed
                model.predict(x0(model), verbose=0)

        def x0(model):
            inputs = getattr(model, "inputs", None) or []
            found = [np.zeros((1, *t.shape[1:]), dtype=str(t.dtype)) for t in inputs]
            return found[0] if len(found) == 1 else found

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                k, model, threshold, shapes, dtype = _run(seed, attempt, policy, prepare)
                dtype = dtype or ("float64" if policy == "float64" else "float32")
                size = [*shapes[0]] if len(shapes) == 1 else [sum(map(np.prod, shapes))]
                x = rng.normal(size=(4, *size)) * scale
                x = (np.rint(4 * x) if dtype == "int32" else x).astype(dtype)
                case = Case(seed, model, None, x, shapes, threshold, policy, "")
                values = outputs(case)
                if values.ndim != 2 or not np.all(np.isfinite(values)):
                    raise ValueError("no finite outputs")
        except Exception:  # an illegal combination: try the next
            continue
        scaled = [f"kernels × {factor:g}"] if factor != 1.0 else []
        case.described = ", ".join([policy, *scaled, *k.names])
        if use > 0.85 and _clones(k):
            _replace(case, values, _clone if use > 0.92 else _reload)
        if any("changed" in n for n in k.names):
            # The last activation may be another one than the model was built with.
            case.threshold = 0.5 if _ends_in_sigmoid(model) else 0.0
        case.make_twin = functools.partial(_twin, case, model, attempt)
        return case
    raise ValueError(f"No model of seed {seed} computes.")


def outputs(case):
    """Outputs of the model on the case's inputs."""
    x = keras.tree.map_structure(ops.convert_to_tensor, case.argument(case.x))
    found = case.model(x, training=False)
    return ops.convert_to_numpy(ops.cast(found, "float32"))


def _twin(case, model, attempt):
    """The twin with the weights of the model, or None where its code does not run in float64."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compute = keras.dtype_policies.get(case.policy).compute_dtype
            twin = _run(case.seed, attempt, "float64", twin=True, compute=compute)[1]
            copy_used_weights(model, twin)
            # Some layers, or layouts, do not run in float64.
            x = keras.tree.map_structure(ops.convert_to_tensor, case.argument(case.x))
            # An augmentation trains what follows it in a plain call (Keras 3.13).
            twin(x, training=False)
    except Exception:
        return None
    return twin


def _ends_in_sigmoid(model):
    while isinstance(model.layers[-1], keras.Model):
        model = model.layers[-1]
    return getattr(model.layers[-1], "activation", None) is keras.activations.sigmoid


def _replace(case, values, copied):
    """The model by a copy that computes the same; its twin keeps the weights of the first."""
    first = case.model
    try:
        case.model = copied(first)
        # Copies lose the arguments of a partial, which moves a GELU by less than a thousandth.
        room = 1e-5 if case.policy in ("float32", "float64") else 1e-2
        if np.allclose(outputs(case), values, rtol=room, atol=room / 10, equal_nan=True):
            case.described += f", {copied.__name__.strip('_')}"
            return
    except Exception:  # a function that Keras cannot write
        pass
    case.model = first


def _clone(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def _reload(model):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return keras.models.load_model(path, safe_mode=False, compile=False)


def _clones(k):
    """Whether a copy is the same function: it is not where a layer was changed afterwards."""
    return not any(word in n for n in k.names for word in ("changed", "replaced", "lora"))


def plain(seed, layers=1):
    """A `Case` that holds nothing odd: a float32 chain of dense layers with ReLU between them."""
    keras.utils.set_random_seed(seed)
    hidden = [L.Dense(3, "relu") for _ in range(layers - 1)]

    def chain(dtype):
        kept = [L.Dense(h.units, "relu", dtype=dtype) for h in hidden]
        return keras.Sequential([keras.Input((2,), dtype=dtype), *kept, L.Dense(3, dtype=dtype)])

    model, twin = chain("float32"), chain("float64")
    twin.set_weights([np.asarray(w, dtype=np.float64) for w in model.get_weights()])

    def as_made():
        return twin

    x = np.random.default_rng(seed).normal(size=(4, 2)).astype("float32")
    return Case(seed, model, as_made, x, [(2,)], 0.0, "float32", "plain")
