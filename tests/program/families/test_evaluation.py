"""Every layer of the library is evaluated as it computes, within proven bounds on its rounding.

The oracle is Keras itself in float64 (`float64_layers`): after some steps of training, on random
inputs of several scales.
"""

import functools
import math

import keras
import numpy as np
import pytest
from float64_layers import evaluated

from tf_lyapunov import layers as ours
from tf_lyapunov.certification import read_network
from tf_lyapunov.program.operation import EXACT, Precision, Signal
from tf_lyapunov.program.program import run
from tf_lyapunov.program.validation import validate_on_probes

IMAGE, ODD, SERIES, VECTOR = (6, 6, 4), (5, 7, 3), (7, 4), (6,)
sort = ours.GroupSort(2)
response = ours.LocalResponseNormalization
CASES = {
    "maxmin": (ours.MaxMin, IMAGE),
    "maxmin, rows": (functools.partial(ours.MaxMin, axis=1), IMAGE),
    "group sort": (functools.partial(ours.GroupSort, 3), VECTOR),
    "group sort, rows": (functools.partial(ours.GroupSort, 3, axis=1), IMAGE),
    "full sort": (ours.FullSort, SERIES),
    "householder": (ours.Householder, IMAGE),
    "two-sided": (functools.partial(ours.TwoSidedReLU, axis=2), IMAGE),
    "prelu": (ours.LipschitzPReLU, IMAGE),
    "prelu, shared": (functools.partial(ours.LipschitzPReLU, shared_axes=(1, 2)), IMAGE),
    "response": (functools.partial(response, 1, 1.0, 0.5, 0.75), IMAGE),
    "response, power": (
        functools.partial(response, 2, 2.0, 2.0, 1.3),
        IMAGE,
    ),
    "response, wide": (functools.partial(response, 9, axis=1), IMAGE),
    "1-norm": (functools.partial(ours.LpPooling2D, 2, 1, p=1.0), IMAGE),
    "2-norm": (functools.partial(ours.LpPooling2D, (3, 2), (2, 1), "same", p=2.0), ODD),
    "3.5-norm": (functools.partial(ours.LpPooling2D, 2, p=3.5), IMAGE),
    "largest": (functools.partial(ours.LpPooling2D, 3, 2, "same", p=math.inf), ODD),
    "norm pooling": (functools.partial(ours.L2NormPooling2D, 3, 2, "same"), ODD),
    "scaled mean": (functools.partial(ours.ScaledAveragePooling2D, 3, 2, "same"), ODD),
    "scaled mean, wide strides": (functools.partial(ours.ScaledAveragePooling2D, 2, 3), ODD),
    "global norm": (ours.GlobalL2NormPooling2D, ODD),
    "global mean": (functools.partial(ours.ScaledGlobalAveragePooling2D, keepdims=True), ODD),
    "shift": (functools.partial(ours.ShiftMixing, 0.25), (3, 4, 5)),
    "down": (functools.partial(ours.InvertibleDownSampling, (3, 2)), IMAGE),
    "up": (functools.partial(ours.InvertibleUpSampling, 2), IMAGE),
    "padding": (functools.partial(ours.ChannelPadding, 7), IMAGE),
    "circular": (functools.partial(ours.Padding2D, ((1, 0), (2, 3))), IMAGE),
    "symmetric": (functools.partial(ours.Padding2D, (2, 1), "symmetric"), IMAGE),
    "truncation": (functools.partial(ours.Truncate, 3, axis=1), IMAGE),
    "centering": (ours.BatchCentering, IMAGE),
    "position": (functools.partial(ours.PositionBias, "normal"), IMAGE),
    "combination": (ours.ConvexCombination, IMAGE),
    "potential": (functools.partial(ours.ConvexPotentialDense, 8, activation="elu"), VECTOR),
    "potential 1d": (functools.partial(ours.ConvexPotentialConv1D, 5, kernel_size=4), SERIES),
    "potential 2d": (
        functools.partial(ours.ConvexPotentialConv2D, 5, kernel_size=(3, 2), max_gain=0.7),
        ODD,
    ),
    "potential, published": (functools.partial(ours.ConvexPotentialDense, norm="power"), VECTOR),
    "l2 attention": (functools.partial(ours.L2Attention, 1, 0.9), SERIES),
    "softmax potential": (functools.partial(ours.SoftmaxPotential, 5, 3.0), SERIES),
    "sdp": (functools.partial(ours.SDPLipschitzDense, 8, activation="tanh"), SERIES),
    "sdp 1d": (functools.partial(ours.SDPLipschitzConv1D, 5), SERIES),
    "sdp 2d": (functools.partial(ours.SDPLipschitzConv2D, 3, kernel_size=(2, 4)), ODD),
    "sandwich": (functools.partial(ours.SandwichDense, 5, activation="softplus"), SERIES),
    "sandwich 2d": (functools.partial(ours.SandwichConv2D, 4, strides=(2, 3)), ODD),
    "cayley": (functools.partial(ours.CayleyDense, 8, activation="relu"), VECTOR),
    "cayley 2d": (functools.partial(ours.CayleyConv2D, 4, 3, (2, 1)), ODD),
    "cayley 2d, sorted": (
        functools.partial(ours.CayleyConv2D, 8, 2, activation=ours.GroupSort(2)),
        IMAGE,
    ),
    "reflector": (functools.partial(ours.BlockReflectorDense, 8, activation="relu"), VECTOR),
    "cayley 2d, reflector": (functools.partial(ours.BlockReflectorConv2D, 4, 3, (2, 1)), ODD),
    "orthogonal 2d": (functools.partial(ours.OrthogonalConv2D, 4, 3, 2), ODD),
    "orthogonal 2d, circular": (
        functools.partial(ours.OrthogonalConv2D, 4, 3, 2, "circular", activation=ours.MaxMin()),
        ODD,
    ),
    "orthogonal 2d, transposed": (functools.partial(ours.OrthogonalConv2DTranspose, 2, 3, 2), ODD),
    "skew 2d": (functools.partial(ours.SkewOrthogonalConv2D, 6, 3, activation="relu"), ODD),
    "skew 2d, strides": (functools.partial(ours.SkewOrthogonalConv2D, 4, (1, 3), 2), ODD),
    "björck": (functools.partial(ours.BjorckDense, 4), VECTOR),
    "orthogonal": (functools.partial(ours.OrthogonalDense, 4, activation=ours.MaxMin()), VECTOR),
    "spectral": (functools.partial(ours.SpectralDense, 4, activation=ours.MaxMin()), VECTOR),
    "spectral 1d": (functools.partial(ours.SpectralConv1D, 4, 3, 2, padding="causal"), SERIES),
    "spectral 2d": (functools.partial(ours.SpectralConv2D, 4, 3, 2), ODD),
    "frobenius": (functools.partial(ours.FrobeniusDense, 4), VECTOR),
    "normalized": (functools.partial(ours.NormalizedDense, 4), VECTOR),
    "almost orthogonal": (functools.partial(ours.AlmostOrthogonalDense, 4), VECTOR),
    "almost orthogonal 1d": (functools.partial(ours.AlmostOrthogonalConv1D, 4, 3), SERIES),
    "almost orthogonal 2d": (functools.partial(ours.AlmostOrthogonalConv2D, 4, 2), ODD),
}


@functools.cache
def trained(name, dtype="float32"):
    """A classifier around the layer after some steps, and the layer."""
    make, shape = CASES[name]
    layer = make(dtype=dtype)
    inputs = keras.Input(shape)
    pair = [inputs, keras.layers.Activation("tanh", dtype=dtype)(inputs)]
    hidden = layer(pair if isinstance(layer, ours.ConvexCombination) else inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(hidden)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Eagerly: tracing lasts longer than these steps.
    model.compile(keras.optimizers.Adam(0.08), loss, run_eagerly=True)
    rng = np.random.default_rng(0)
    if dtype != "float32":
        # Training in half formats is slow on a CPU: weights as far from their first values.
        for weight in layer.trainable_variables:
            weight.assign_add(rng.normal(size=weight.shape) * 0.3)
        return model, layer
    # Six steps at this rate move the weights as far as two dozen at a usual one.
    for _ in range(6):
        x = rng.normal(size=(8, *shape)).astype("float32")
        model.train_on_batch(x, rng.integers(0, 3, 8))
    return model, layer


def samples(model, layer, count=6):
    """Inputs of the layer of several scales, as lists of arrays that float32 holds."""
    rng = np.random.default_rng(1)
    sizes = np.geomspace(0.05, 20.0, count)
    sources = layer.input if isinstance(layer.input, list) else [layer.input]
    return [
        (rng.normal(size=(count, *t.shape[1:])) * sizes.reshape(-1, *[1] * (len(t.shape) - 1)))
        .astype("float16")
        .astype("float64")
        for t in sources
    ]


def step_of(model, layer):
    network = read_network(model)
    assert not network.program.unread
    return next(s for s in network.program.steps if s.name == layer.name)


def test_the_cases_hold_every_layer_of_the_library():
    # Layers with memory are no programs: `certify_dynamics` is about them.
    apart = {ours.LipschitzLayer, ours.RecurrentEquilibrium, ours.RecurrentEquilibriumCell}
    everything = {
        cls for cls in (getattr(ours, name) for name in ours.__all__) if isinstance(cls, type)
    }
    assert {type(make()) for make, _ in CASES.values()} == everything - apart


@pytest.mark.parametrize("name", CASES)
def test_a_program_computes_what_keras_does_in_float64(name):
    model, layer = trained(name)
    step, inputs = step_of(model, layer), samples(model, layer)
    found = run(step, [Signal(x) for x in inputs], EXACT)
    exact = evaluated(layer, inputs)
    assert found.value.shape == exact.shape
    errors = [Signal(x, np.zeros_like(x)) for x in inputs]
    allowed = run(step, errors, Precision.of("float64")).error
    assert np.all(np.abs(found.value - exact) <= allowed)
    # Numbers among a layer's settings are float32 in every format.
    spread = np.std(exact)
    assert np.median(allowed) <= 1e-4 * spread
    own = keras.ops.convert_to_numpy(
        layer([x.astype("float32") for x in inputs] if len(inputs) > 1 else
              inputs[0].astype("float32"))
    )  # fmt: skip
    bound = run(step, errors, Precision.of("float32")).error
    assert np.all(np.abs(own - exact) <= bound)
    assert np.median(bound) <= 1e-3 * spread
    validate_on_probes(read_network(model), rng=np.random.default_rng(2))


@pytest.mark.parametrize("name", CASES)
def test_errors_of_the_inputs_are_followed(name):
    """Changes within the stated errors, of random and of equal sign, stay within the bound."""
    model, layer = trained(name)
    step, inputs = step_of(model, layer), samples(model, layer)
    rng = np.random.default_rng(3)
    value = run(step, [Signal(x) for x in inputs], EXACT).value
    sizes = [rng.uniform(0.0, 0.2, x.shape) * np.abs(x).max() for x in inputs]
    signals = [Signal(x, e) for x, e in zip(inputs, sizes, strict=True)]
    bound = run(step, signals, EXACT).error
    reached = 0.0
    for trial in range(6):
        signs = [rng.uniform(-1, 1, x.shape) if trial else np.ones(x.shape) for x in inputs]
        moved = [Signal(x + s * e) for x, s, e in zip(inputs, signs, sizes, strict=True)]
        change = np.abs(run(step, moved, EXACT).value - value)
        assert np.all(change <= bound * (1 + 1e-9) + 1e-12)
        reached = max(reached, np.max(change / np.maximum(bound, 1e-300)))
    # A convolution by transforms is bounded by the absolute values of both transforms.
    transformed = name.startswith(("sandwich 2d", "cayley 2d"))
    assert reached > (5e-4 if transformed else 0.05)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "name",
    ["householder", "response", "3.5-norm", "scaled mean", "combination", "potential 2d", "sdp",
     "sandwich 2d", "cayley 2d", "skew 2d"],
)  # fmt: skip
def test_half_formats_are_covered(name, dtype):
    model, layer = trained(name, dtype)
    step, inputs = step_of(model, layer), samples(model, layer)
    exact = run(step, [Signal(x) for x in inputs], EXACT).value
    half = layer.compute_dtype
    given = [keras.ops.cast(x, half) for x in inputs]
    held = [np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")), float)
            for v in given]  # fmt: skip
    signals = [Signal(x, np.abs(x - h)) for x, h in zip(inputs, held, strict=True)]
    own = layer(given if len(given) > 1 else given[0])
    own = keras.ops.convert_to_numpy(keras.ops.cast(own, "float32")).astype(np.float64)
    bound = run(step, signals, Precision.of(half)).error
    assert np.all(np.abs(own - exact) <= bound)
    assert np.any(np.abs(own - exact) > 1e-3 * bound)
