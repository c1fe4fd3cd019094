"""Power of validation: random single mistakes in the reading of random networks.

A mistake counts if it moves some probe by more than ten rounding allowances at the step that holds
it, on values that the model itself gave there: `validate` must then raise `UnfaithfulReading`.
"""

import collections
import contextlib
import dataclasses
from unittest import mock

import keras
import numpy as np

from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.program import validation
from tf_lyapunov.program.families import elementwise, linear, merging, moving, pooling, scaling
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.operation import Signal, frozen
from tf_lyapunov.program.program import precision_of, run
from tf_lyapunov.program.tensors import as_array

L = keras.layers
ALLOWANCES = 10.0
# Mistakes tried in one network: building it costs more than validating it.
EACH = 20


def dense_network(rng, depth):
    """A chain of dense layers, half of them with a normalization behind, or around a residual."""
    width = int(rng.integers(3, 9))
    x = start = keras.Input((width,))
    for _ in range(depth):
        name = rng.choice(["relu", "tanh", "elu", "gelu", "leaky_relu", "sigmoid", "softplus"])
        y = L.Dense(width, str(name), kernel_initializer="he_normal", bias_initializer=_bias())(x)
        if rng.random() < 0.3:
            y = normalization()(y)
        x = x + y if rng.random() < 0.2 else y
    return keras.Model(start, L.Dense(3, bias_initializer=_bias())(x))


def image_network(rng, depth):
    """Convolutions of all kinds, pools, pads and moves, and a head."""
    x = start = keras.Input((7, 6, 2))
    for _ in range(depth):
        small = min(x.shape[1:3]) < 5
        padding = "same" if small else str(rng.choice(["valid", "same"]))
        stride = 1 if small else int(rng.choice([1, 1, 2]))
        options = {"strides": stride, "padding": padding, "bias_initializer": _bias()}
        kind = rng.choice(["conv", "conv", "depthwise", "transpose", "pool", "mean", "pad", "norm"])
        if kind == "conv":
            x = L.Conv2D(int(rng.integers(2, 4)), 3, activation="relu", **options)(x)
        elif kind == "depthwise":
            x = L.DepthwiseConv2D(3, activation="tanh", **options)(x)
        elif kind == "transpose" and not (stride == 2 and max(x.shape[1:3]) > 10):
            x = L.Conv2DTranspose(2, 3, **options)(x)
        elif kind == "pool":
            x = L.MaxPooling2D(2, strides=stride, padding=padding)(x)
        elif kind == "mean":
            x = L.AveragePooling2D(2, strides=stride, padding=padding)(x)
        elif kind == "pad":
            x = L.ZeroPadding2D(((1, 0), (0, 1)))(x)
        else:
            x = normalization()(x)
    x = L.Flatten()(L.Permute((2, 1, 3))(x))
    return keras.Model(start, L.Dense(3, bias_initializer=_bias())(x))


def _bias():
    return keras.initializers.RandomNormal(stddev=0.5)


def normalization():
    return L.BatchNormalization(
        moving_mean_initializer="random_normal",
        moving_variance_initializer=keras.initializers.RandomUniform(0.3, 2.0),
        gamma_initializer=keras.initializers.RandomNormal(1.0, 0.3),
    )


def network_of(seed):
    """One of the random networks; every fifth is 50 layers deep, every seventh in 16 bits."""
    rng = np.random.default_rng([seed, 3])
    keras.utils.set_random_seed(seed)
    previous = keras.config.dtype_policy()
    if seed % 7 == 3:
        keras.config.set_dtype_policy(str(rng.choice(["mixed_float16", "mixed_bfloat16"])))
    try:
        if seed % 5 == 0:
            return dense_network(rng, 50)
        depth = int(rng.integers(1, 12))
        return dense_network(rng, depth) if seed % 2 else image_network(rng, 1 + depth // 2)
    finally:
        keras.config.set_dtype_policy(previous)


# Mistakes: functions of an operation and random numbers, which give another operation, or None.


def _of(kind):
    def wrapped(change):
        def mistake(operation, rng):
            return change(operation, rng) if type(operation) is kind else None

        MISTAKES[change.__name__.strip("_").replace("_", " ")] = mistake
        return mistake

    return wrapped


MISTAKES = {}


@_of(linear.Linear)
def _dropped_bias(o, rng):
    return None if o.bias is None else dataclasses.replace(o, bias=None)


@_of(linear.Linear)
def _rolled_bias(o, rng):
    if o.bias is None or o.bias.size < 2:
        return None
    return dataclasses.replace(o, bias=frozen(np.roll(o.bias, 1)))


@_of(linear.Linear)
def _transposed_kernel(o, rng):
    if o.kernel.shape[-1] != o.kernel.shape[-2]:
        return None
    return dataclasses.replace(o, kernel=frozen(np.swapaxes(o.kernel, -1, -2)))


@_of(linear.Linear)
def _flipped_kernel(o, rng):
    axis = int(rng.integers(o.kernel.ndim))
    return dataclasses.replace(o, kernel=frozen(np.flip(o.kernel, axis)))


@_of(linear.Linear)
def _lost_cast(o, rng):
    kernel = o.kernel.astype(np.float16)
    return dataclasses.replace(o, kernel=frozen(kernel))


@_of(linear.Linear)
def _one_weight_off(o, rng):
    kernel = np.array(o.kernel)
    kernel.flat[rng.integers(kernel.size)] *= 1.01
    return dataclasses.replace(o, kernel=frozen(kernel))


@_of(linear.Linear)
def _swapped_spatial_axes(o, rng):
    if o.kernel.ndim != 4 or o.kernel.shape[0] != o.kernel.shape[1]:
        return None
    return dataclasses.replace(o, kernel=frozen(np.swapaxes(o.kernel, 0, 1)))


@_of(linear.Linear)
def _other_padding_side(o, rng):
    """Read one cell further along an axis: the kernel moves within a larger one of zeros."""
    if o.kernel.ndim != 4 or o.linear_map.kind == "dense":
        return None
    axis = int(rng.integers(2))
    return dataclasses.replace(o, kernel=frozen(np.roll(o.kernel, 1, axis)))


@_of(elementwise.Elementwise)
def _other_function(o, rng):
    names = [n for n in ("relu", "tanh", "elu", "silu", "softsign", "mish") if n != o.name]
    return dataclasses.replace(o, name=str(rng.choice(names)), parameters=())


@_of(elementwise.Elementwise)
def _other_slope(o, rng):
    if o.name not in ("leaky_relu", "relu"):
        return None
    return dataclasses.replace(o, name="leaky_relu", parameters=(("negative_slope", 0.21),))


@_of(elementwise.Elementwise)
def _other_form_of_gelu(o, rng):
    if o.name != "gelu":
        return None
    approximate = 1.0 - float(dict(o.parameters).get("approximate", 0.0))
    return dataclasses.replace(o, parameters=(("approximate", approximate),))


@_of(scaling.Scaled)
def _other_epsilon(o, rng):
    """1e-3 where the layer holds 2e-3, at a variance near 1."""
    return dataclasses.replace(o, scale=frozen(o.scale * (1 - 5e-4)))


@_of(scaling.Scaled)
def _dropped_shift(o, rng):
    return dataclasses.replace(o, shift=frozen(0.0 * o.shift))


@_of(scaling.Scaled)
def _statistics_of_another_channel(o, rng):
    axis = int(np.argmax(o.scale.shape)) if o.scale.ndim else None
    if axis is None or o.scale.size < 2:
        return None
    return dataclasses.replace(o, scale=frozen(np.roll(o.scale, 1, axis)))


@_of(moving.Moved)
def _entries_exchanged(o, rng):
    index = np.array(o.index)
    a, b = rng.integers(index.size, size=2)
    index.flat[[a, b]] = index.flat[[b, a]]
    return dataclasses.replace(o, index=index)


@_of(moving.Moved)
def _swapped_axis(o, rng):
    index = np.array(o.index)
    if index.ndim < 2:
        return dataclasses.replace(o, index=np.roll(index, 1))
    turned = np.swapaxes(index, 0, 1)
    return dataclasses.replace(o, index=turned.reshape(index.shape))


@_of(pooling.Pooled)
def _other_kind_of_pool(o, rng):
    return dataclasses.replace(o, kind="mean" if o.kind == "max" else "max")


@_of(pooling.Pooled)
def _other_window(o, rng):
    if o.sizes is None or o.padding != "same":
        return None
    return dataclasses.replace(o, sizes=(o.sizes[0] + 1, *o.sizes[1:]))


@_of(merging.Weighted)
def _other_sign_of_a_sum(o, rng):
    return dataclasses.replace(o, weights=(*o.weights[:-1], -o.weights[-1]))


@_of(merging.Weighted)
def _one_signal_of_a_sum_left_out(o, rng):
    return dataclasses.replace(o, weights=(0.0, *o.weights[1:]))


def mistaken(program, rng):
    """`(name, index of the step, program)` with one random mistake, or None where none applies."""
    index = int(rng.integers(len(program.steps)))
    step = program.steps[index]
    if not step.operations:
        return None
    place = int(rng.integers(len(step.operations)))
    name = str(rng.choice([*MISTAKES, "operation left out"]))
    operations = list(step.operations)
    if name == "operation left out":
        if len(operations) < 2:
            return None
        del operations[place]
    else:
        other = MISTAKES[name](operations[place], rng)
        if other is None:
            return None
        operations[place] = other
    wrong = dataclasses.replace(step, operations=tuple(operations))
    steps = (*program.steps[:index], wrong, *program.steps[index + 1 :])
    return name, index, dataclasses.replace(program, steps=steps)


class Observed:
    """A model, what it gave once on its inputs, and its reading, to be tried with mistakes."""

    def __init__(self, seed):
        self.model = network_of(seed)
        self.network = read_network(self.model, bounded=False)
        rng = np.random.default_rng([seed, 5])
        shape = self.model.inputs[0].shape[1:]
        self.x = rng.normal(size=(24, *shape)).astype("float32")
        self.calls = {call.name: call for call in self.network.graph.calls}
        # Probes to judge a mistake by; validation draws others.
        drawn = np.concatenate([rng.normal(size=(4, *shape)) * s for s in (0.1, 1.0, 10.0)])
        self.probes = validation.Replay(self.network)([drawn.astype("float32")])

    def moves(self, index, wrong):
        """By how many allowances a mistake moves some probe at its step, at most."""
        right = self.network.program.steps[index]
        precision, signals = precision_of(right), []
        for tensor in self.calls[right.name].inputs:
            value = as_array(self.probes[tensor.producer][tensor.index])
            signals.append(Signal(value, np.zeros_like(value)))
        with np.errstate(all="ignore"):
            true = run(right, list(signals), precision)
            try:
                other = run(wrong, list(signals), precision).value
            except (ValueError, IndexError):
                return np.inf  # it does not even fit
            if other.shape != true.value.shape:
                return np.inf
            ratio = np.abs(other - true.value) / np.maximum(true.error, 1e-300)
        return float(np.max(np.nan_to_num(ratio, nan=0.0), initial=0.0))

    def with_program(self, program):
        network = dataclasses.replace(self.network)
        network.__dict__["program"] = program
        return network


@contextlib.contextmanager
def replayed_once():
    """Validation's calls of one model, remembered: a mistake in the reading changes none."""
    kept = {}
    replay, own = validation.Replay, validation.own_outputs

    class Kept(replay):
        def __call__(self, inputs, until=None):
            key = id(self.network.model)
            if key not in kept:
                known = super().__call__(inputs, until)
                first = [known[t.producer][0] for t in self.network.graph.inputs]
                # The model is kept too, or another might get its number.
                kept[key] = known, own(self.network.model, first), self.network.model
            return kept[key][0]

    with (
        mock.patch.object(validation, "Replay", Kept),
        mock.patch.object(validation, "own_outputs", lambda model, _: kept[id(model)][1]),
    ):
        yield


def measure(mistakes, seed=0):
    """Tries so many mistakes; see `Power`."""
    found = Power(collections.Counter(), collections.Counter(), [])
    rng, number, observed, left = np.random.default_rng(seed), seed, None, 0
    with replayed_once():
        while sum(found.tried.values()) < mistakes:
            if not left:
                observed, left = Observed(number), EACH
                number += 1
                validation.validate(observed.network, [observed.x], rng=rng)  # it is read rightly
            drawn = mistaken(observed.network.program, rng)
            if drawn is None:
                continue
            name, index, program = drawn
            moved = observed.moves(index, program.steps[index])
            if moved <= ALLOWANCES:
                found.small[name] += 1
                left -= 1
                continue
            left -= 1
            found.tried[name] += 1
            try:
                validation.validate(observed.with_program(program), [observed.x], rng=rng)
            except (UnfaithfulReading, ValueError, IndexError):
                continue  # an operation that does not fit says so itself
            found.missed.append((name, number - 1, index, moved))
    return found


@dataclasses.dataclass
class Power:
    """Outcome.

    Attributes:
        tried: by kind of mistake, those that move some probe by more than ten allowances.
        small: those that do not.
        missed: `(kind, network's seed, step, allowances)` of those that validation lets pass.
    """

    tried: collections.Counter
    small: collections.Counter
    missed: list

    @property
    def count(self):
        return sum(self.tried.values())

    @property
    def caught(self):
        return self.count - len(self.missed)
