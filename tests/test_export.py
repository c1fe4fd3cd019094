"""Plain models: equal outputs, no trace of this library, and certificates that still hold."""

import functools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from tf_lyapunov import layers as ours
from tf_lyapunov.certification import certify, lipschitz_upper_bound
from tf_lyapunov.constraints import SpectralBound
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.export import export_plain, weighted
from tf_lyapunov.export.model import RULES

IMAGE = (6, 5, 4)
# Layer, input shape, and the factor by which the plain model's composed gain may exceed the
# layer's (None: it has no certificate).
CASES = [
    (functools.partial(ours.ConvexPotentialDense, 8, activation="elu"), (6,), 3.001),
    (functools.partial(ours.ConvexPotentialConv1D, 4, kernel_size=4), (6, 3), 3.001),
    (functools.partial(ours.ConvexPotentialConv2D, 4, kernel_size=(3, 2)), IMAGE, 3.001),
    (functools.partial(ours.ConvexPotentialConv2D, 4, max_gain=0.7), IMAGE, 3.001),
    (functools.partial(ours.SoftmaxPotential, 8, 3.0, max_gain=0.7), (6,), 4.0),
    (functools.partial(ours.SDPLipschitzDense, 8, max_gain=0.7), (6,), 4.0),
    (functools.partial(ours.SDPLipschitzConv1D, 8), (6, 3), 4.0),
    (functools.partial(ours.SDPLipschitzConv2D, 8), IMAGE, 4.0),
    (functools.partial(ours.SandwichDense, 5), (6,), 5.0),
    (functools.partial(ours.SandwichConv2D, 4, strides=2), IMAGE, 5.0),
    (functools.partial(ours.CayleyConv2D, 4, 3, 2, activation=ours.MaxMin()), IMAGE, 1),
    (functools.partial(ours.CayleyConv2D, 7, (3, 2), activation="relu", max_gain=2.0), IMAGE, 1),
    (functools.partial(ours.SkewOrthogonalConv2D, 6, 3, activation="relu"), IMAGE, 1),
    (functools.partial(ours.BlockReflectorConv2D, 4, 3, 2, activation="relu"), IMAGE, 1),
    (functools.partial(ours.BlockReflectorDense, 4, activation=ours.MaxMin()), (6,), 1),
    (functools.partial(ours.OrthogonalConv2D, 6, 3, 2, activation="relu"), IMAGE, 1),
    (functools.partial(ours.OrthogonalConv2D, 4, (1, 2), (3, 1), "circular"), IMAGE, 1),
    (functools.partial(ours.OrthogonalConv2DTranspose, 2, 3, 2, activation="relu"), IMAGE, 1),
    (functools.partial(ours.SkewOrthogonalConv2D, 2, 3, strides=2), IMAGE, 1),
    (functools.partial(ours.CayleyDense, 4), (3, 6), 1),
    (functools.partial(ours.BjorckDense, 4, activation=ours.GroupSort()), (6,), 1),
    (functools.partial(ours.OrthogonalDense, 4, "relu"), (6,), 1),
    (functools.partial(ours.OrthogonalDense, 8, activation=ours.GroupSort()), (6,), 1),
    (functools.partial(ours.SpectralDense, 4, activation="tanh"), (6,), 1),
    (functools.partial(ours.FrobeniusDense, 4, use_bias=False), (6,), 1),
    (functools.partial(ours.NormalizedDense, 4), (6,), 1),
    (functools.partial(ours.AlmostOrthogonalDense, 4), (6,), 1),
    (functools.partial(ours.AlmostOrthogonalConv1D, 4, 3, padding="causal"), (6, 3), 1),
    (functools.partial(ours.AlmostOrthogonalConv2D, 4, 3, dilation_rate=2), IMAGE, 1),
    (functools.partial(ours.SpectralConv1D, 4, 3), (6, 3), 1),
    (functools.partial(ours.SpectralConv2D, 4, 3, 2, activation=ours.Householder()), IMAGE, 1),
    (ours.MaxMin, IMAGE, 1),
    (functools.partial(ours.MaxMin, axis=1), IMAGE, 1),
    (ours.GroupSort, IMAGE, 1),
    (functools.partial(ours.GroupSort, 3, axis=1), IMAGE, 1),
    (functools.partial(ours.GroupSort, 4), (8,), 1),
    (functools.partial(ours.GroupSort, 1), (8,), 1),
    (ours.FullSort, (5,), 1),
    (ours.FullSort, (3, 12), None),
    (functools.partial(ours.GroupSort, 10), (2, 20), None),
    (functools.partial(ours.Householder, axis=1), IMAGE, 1),
    (functools.partial(ours.LipschitzPReLU, -0.5, shared_axes=(1, 2)), IMAGE, 1),
    (ours.TwoSidedReLU, (6,), 1.4143),
    (functools.partial(ours.ScaledAveragePooling2D, 3, 2, "same"), IMAGE, 1.1),
    (functools.partial(ours.ScaledAveragePooling2D, 2), IMAGE, 1),
    (functools.partial(ours.L2NormPooling2D, 3, 2, "same"), IMAGE, None),
    (functools.partial(ours.LpPooling2D, 2, p=3.0), IMAGE, None),
    (functools.partial(ours.LpPooling2D, 2, p=1.0), IMAGE, 1),
    (functools.partial(ours.LpPooling2D, 3, 1, "same", p=float("inf")), IMAGE, 1),
    (ours.ScaledGlobalAveragePooling2D, IMAGE, 1),
    (functools.partial(ours.GlobalL2NormPooling2D, keepdims=True), IMAGE, None),
    (functools.partial(ours.InvertibleDownSampling, 2), (6, 4, 3), 1),
    # The plain form cuts and joins: one factor for every group and end.
    (functools.partial(ours.ShiftMixing, 0.25), (3, 2, 5), 3.0),
    (functools.partial(ours.ShiftMixing, 0.3, "channels_first"), (4, 3), 5**0.5),
    (functools.partial(ours.InvertibleUpSampling, 2), (6, 4, 8), 1),
    (functools.partial(ours.InvertibleDownSampling, 2, "channels_first"), (3, 6, 4), 1),
    (functools.partial(ours.InvertibleUpSampling, 2, "channels_first"), (8, 6, 4), 1),
    (functools.partial(ours.ChannelPadding, 7), IMAGE, 1),
    (functools.partial(ours.Truncate, 3, axis=1), IMAGE, 1),
    (functools.partial(ours.Padding2D, 1, "reflect"), IMAGE, 4.0),
    (functools.partial(ours.BatchCentering, axis=2), IMAGE, 1),
    (functools.partial(ours.PositionBias, "normal"), IMAGE, 1),
    (functools.partial(ours.LocalResponseNormalization, 1, alpha=0.5), IMAGE, None),
]


def single(make, shape, seed=0):
    """A model of one layer with random weights, and inputs."""
    model = keras.Sequential([keras.Input(shape), make()])
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "copy" not in variable.name and "effective" not in variable.name:
            if variable.name != "cached":
                variable.assign(0.5 * rng.standard_normal(variable.shape))
    return model, rng.standard_normal((4, *shape)).astype("float32")


def outputs(model, x):
    return np.asarray(ops.convert_to_numpy(model(x)))


def assert_equal(plain, model, x):
    ours_, theirs = outputs(model, x), outputs(plain, x)
    assert np.max(np.abs(ours_ - theirs)) <= 1e-5 * max(1.0, np.max(np.abs(ours_)))


def gain(model):
    return lipschitz_upper_bound(model).gain_upper_bound


def test_every_layer_of_the_library_has_a_plain_form():
    classes = {v for v in vars(ours).values() if isinstance(v, type)} - {ours.LipschitzLayer}
    # No plain layer has a memory of this kind, or multiplies two signals.
    classes -= {ours.RecurrentEquilibrium, ours.RecurrentEquilibriumCell, ours.L2Attention}
    ours_ = {type(single(make, shape)[0].layers[-1]) for make, shape, _ in CASES}
    assert ours_ | {ours.ConvexCombination} == classes == set(RULES)


def test_attention_by_distances_is_refused_by_name():
    model = keras.Sequential([keras.Input((3, 4)), ours.L2Attention(name="distances")])
    with pytest.raises(UnsupportedLayerError, match="distances"):
        export_plain(model)


@pytest.mark.parametrize(("make", "shape", "factor"), CASES)
def test_a_plain_model_computes_the_same_and_its_gain_is_proved(make, shape, factor):
    model, x = single(make, shape)
    plain = export_plain(model)
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    assert_equal(plain, model, x)
    if factor is None:
        with pytest.raises(UnsupportedLayerError):
            gain(plain)
    else:
        assert gain(plain) <= factor * gain(model) * (1 + 1e-5)


LARGE = (ours.SandwichConv2D, ours.CayleyConv2D, ours.SkewOrthogonalConv2D)


@pytest.mark.parametrize(
    ("make", "shape", "factor"), [case for case in CASES if getattr(case[0], "func", None) in LARGE]
)
def test_circular_and_skew_maps_of_large_images_are_convolutions(make, shape, factor, monkeypatch):
    monkeypatch.setattr(weighted, "_MATERIALISED", 0)
    model, x = single(make, shape)
    plain = export_plain(model)
    assert_equal(plain, model, x)
    assert any(type(layer) is keras.layers.Conv2D for layer in plain.layers)
    assert np.isfinite(gain(plain))


def nested():
    image = keras.Input((6, 6, 1), name="image")
    inner = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            ours.SpectralConv2D(4, 3, activation=ours.MaxMin()),
            ours.ConvexPotentialConv2D(3),
        ],
        name="inner",
    )
    x = ours.ChannelPadding(4)(keras.layers.Rescaling(1 / 4)(image))
    y = inner(inner(x))  # called twice
    x = ours.ConvexCombination(0.3)([x, y])
    x = keras.layers.BatchNormalization()(x) * 2.0
    x = keras.layers.Dropout(0.5)(keras.layers.Flatten()(x))
    x = keras.layers.Dense(6, "relu", kernel_constraint=SpectralBound(2.0))(x)
    x = keras.layers.Softmax()(ours.NormalizedDense(3)(x))
    return keras.Model(image, x, name="nested")


def test_a_nested_model_with_shared_layers_and_operations_is_exported():
    model = nested()
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((8, 6, 6, 1)).astype("float32")
    norm = next(v for v in model.layers if type(v) is keras.layers.BatchNormalization)
    norm.moving_mean.assign(rng.standard_normal(4))
    norm.gamma.assign(rng.standard_normal(4))
    plain = export_plain(model)
    assert_equal(plain, model, x)
    model.layers[-2].kernel.assign(np.zeros((6, 3)))
    assert np.ptp(outputs(model, x)) < 1e-6 < np.ptp(outputs(plain, x))  # nothing is shared


def test_a_new_process_loads_it_without_the_library(tmp_path):
    model = nested()
    x = np.random.default_rng(1).standard_normal((4, 6, 6, 1)).astype("float32")
    export_plain(model).save(tmp_path / "plain.keras")
    np.savez(tmp_path / "data.npz", x=x, y=outputs(model, x))
    code = (
        "import sys, keras, numpy as np\n"
        "sys.modules['tf_lyapunov'] = None\n"  # an import would raise
        "model, data = keras.models.load_model('plain.keras'), np.load('data.npz')\n"
        "y = keras.ops.convert_to_numpy(model(data['x']))\n"
        "assert np.allclose(y, data['y'], atol=1e-5), y - data['y']\n"
    )
    # Keras on NumPy starts quickest.
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_certificate_stays_valid():
    model = keras.Sequential(
        [
            keras.Input((5, 5, 1)),
            ours.CayleyConv2D(4, 3, activation=ours.MaxMin()),
            ours.SkewOrthogonalConv2D(4, 3, activation=ours.Householder()),
            ours.ScaledGlobalAveragePooling2D(),
            ours.BatchCentering(),
            ours.BjorckDense(8, activation=ours.GroupSort()),
            ours.NormalizedDense(3),
        ]
    )
    x = np.random.default_rng(2).standard_normal((32, 5, 5, 1))
    before, after = certify(model, x), certify(export_plain(model), x)
    assert np.median(before.radius) > 1e-2
    assert np.array_equal(before.predictions, after.predictions)
    np.testing.assert_allclose(after.radius, before.radius, atol=1e-3 * before.radius.max())


@pytest.mark.parametrize(
    "layers",
    [
        (ours.ConvexPotentialDense(8), ours.SDPLipschitzDense(8)),
        (ours.SandwichDense(8), ours.SandwichDense(6)),
    ],
)
def test_layers_whose_parts_must_be_bounded_together_are_by_the_automatic_method(layers):
    model = keras.Sequential([keras.Input((6,)), *layers, ours.NormalizedDense(3)])
    rng = np.random.default_rng(3)
    # Found to the tolerance of the search, which depends on the weights.
    model.set_weights([rng.standard_normal(w.shape) for w in model.get_weights()])
    plain, x = export_plain(model), rng.standard_normal((8, 6))
    composed, found = certify(plain, x), certify(plain, x, method="auto", time_budget=900.0)
    original = certify(model, x).gain_upper_bound
    assert composed.gain_upper_bound > 1.3 * original
    assert found.gain_upper_bound <= original * (1 + 1e-3)


@pytest.mark.parametrize("cls", [ours.SpectralDense, ours.ConvexPotentialDense, ours.SandwichDense])
def test_an_activation_that_is_a_layer_is_copied(cls):
    held = keras.layers.LeakyReLU(negative_slope=0.1)
    model, x = single(functools.partial(cls, 4, activation=held), (6,))
    plain = export_plain(model)
    assert_equal(plain, model, x)
    copies = [getattr(layer, "activation", None) for layer in plain.layers]
    assert sum(isinstance(v, keras.layers.LeakyReLU) for v in copies) == 1
    assert not any(v is held for v in copies)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("make", "shape", "factor"), [CASES[i] for i in (0, 2, 4, 7, 9, 10, 15, 23)]
)
def test_half_formats_are_exported_in_kind(make, shape, factor, dtype):
    """Equal up to a few roundings of that format: the same weights, summed in another order."""
    model, x = single(functools.partial(make, dtype=dtype), shape)
    plain = export_plain(model)
    expected, found = (outputs(m, x).astype(np.float64) for m in (model, plain))
    unit = 2.0**-8 if dtype == "mixed_bfloat16" else 2.0**-11
    size = max(1.0, np.max(np.abs(expected)))
    assert np.max(np.abs(found - expected)) <= 16 * unit * size


def test_what_refers_to_the_library_otherwise_is_refused():
    @keras.saving.register_keras_serializable(package="tf_lyapunov")
    class Custom(ours.SpectralDense):
        pass

    model = keras.Sequential([keras.Input((3,)), Custom(2)])
    with pytest.raises(UnsupportedLayerError, match="Custom"):
        export_plain(model)


def test_a_layer_that_keras_cannot_write_is_refused():
    scaled = functools.partial(lambda x, factor: factor * x, factor=7.0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(scaled, name="mine")])
    with pytest.raises(UnsupportedLayerError, match="Received: layer 'mine'"):
        export_plain(model)


def test_a_recurrent_layer_is_copied_with_the_activation_of_its_cell():
    layer = keras.layers.LSTM(2)
    model = keras.Sequential([keras.Input((3, 2)), layer])
    layer.cell.activation = keras.activations.relu
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
    assert np.allclose(export_plain(model)(x), model(x), atol=1e-6)


def test_nested_layers_keep_their_names_where_no_other_has_them():
    inner = keras.Sequential(
        [
            keras.Input((3,)),
            ours.SpectralDense(4, name="hidden"),
            keras.layers.Dense(3, name="same"),
        ],
        name="inner",
    )
    model = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(2, name="same")])
    names = [layer.name for layer in export_plain(model).layers[1:]]
    assert names == ["hidden", "inner_same", "same"]
