"""Keras → ONNX → Keras → ONNX: the same function, the same bounds, the same program."""

import exported
import keras
import numpy as np
import pytest
from onnx_files import form
from test_export_random import random_chain

import tf_lyapunov as tfl

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def gains(*models):
    return [tfl.lipschitz_upper_bound(m).gain_upper_bound for m in models]


def there_and_back(model, folder, rng, dtype="float32"):
    """What is read of a model's file, and whether that is written as the same file."""
    one, two = folder / "one.onnx", folder / "two.onnx"
    tfl.export_onnx(model, one, rng=rng, dtype=dtype)
    read = tfl.load_onnx(one)
    again = read.to_keras()
    tfl.export_onnx(again, two, rng=rng, dtype=dtype)
    x = rng.normal(size=(3, *model.inputs[0].shape[1:])).astype("float32")
    own, other = (keras.ops.convert_to_numpy(m(x)) for m in (model, again))
    assert np.all(np.abs(own - other) <= 1e-6 * (1 + np.abs(own).max()))
    return read, form(one) == form(two)


@pytest.mark.parametrize(
    "first, count", [(0, 12), *(pytest.param(n, 61, marks=pytest.mark.slow)
                                for n in range(12, 500, 61))]
)  # fmt: skip
def test_what_is_written_and_read_again_is_the_same(first, count, tmp_path):
    for seed in range(first, first + count):
        model = random_chain(seed)
        read, same = there_and_back(model, tmp_path, np.random.default_rng(seed))
        gain, bound = gains(model, read)
        kinds = {type(layer).__name__ for layer in model.layers}
        interpolated = any(getattr(layer, "interpolation", "") == "bilinear"
                           for layer in model.layers)  # fmt: skip
        if "SDPLipschitzConv2D" in kinds:  # its two convolutions are read one by one
            assert bound >= gain * (1 - 1e-9), seed
        elif interpolated:  # a matrix per axis, whose norms are bounded one by one
            assert abs(bound - gain) <= 2.0**-18 * gain, seed
        else:
            assert abs(bound - gain) <= 1e-9 * gain, seed
        if not interpolated:
            # Axes and pads of these may be moved otherwise the second time.
            assert same or kinds & {"Permute", "Conv2DTranspose"}, seed
            second = tfl.load_onnx(tmp_path / "two.onnx").program
            assert second.digest() == read.program.digest(), seed


COMPOSED = [
    *(f"sorting: {name}" for name in ("maxmin", "pairs", "groups of rows", "all", "householder")),
    *(f"two_sided: {name}" for name in ("image", "rows")),
    *(f"norms: {name}" for name in ("1-norm", "largest", "norm pooling", "global norm")),
    *("response: image", "response: vector", "softmax: two axes", "scaling: batch, rows"),
    *(f"elementwise: {name}" for name in ("tanh_shrink", "log_sigmoid", "sparse_plus", "gelu",
                                          "squareplus of b", "relu with a slope")),
    *("linear: conv1d causal", "merging: average", "pooling: mean same"),
]  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composition_that_is_written_is_read_as_the_layer_it_was(name, tmp_path):
    model = exported.made(name)
    read, same = there_and_back(model, tmp_path, np.random.default_rng(0))
    gain, bound = gains(model, read)
    assert same or keras.backend.backend() == "torch"
    assert abs(bound - gain) <= 1e-9 * gain


@pytest.mark.parametrize("name, factor", [
    ("fourier: cayley", 8), ("fourier: cayley, sorted", 1.001), ("sandwich: 2d", 32),
    ("norms: 3.5-norm", 1 + 1e-6),
])  # fmt: skip
def test_maps_of_frequencies_and_powers_are_read_with_the_gain_of_their_stages(
    name, factor, tmp_path
):
    model = exported.made(name)
    read, _ = there_and_back(model, tmp_path, np.random.default_rng(0))
    gain, bound = gains(model, read)
    assert gain * (1 - 1e-6) <= bound <= gain * factor


@pytest.mark.parametrize("dtype, room", [("float32", 2.0**-23), ("float64", 1e-9)])
def test_settings_are_rounded_to_the_files_format_and_nothing_else_is(dtype, room, tmp_path):
    layers = [keras.layers.Rescaling(1 / 127.5, -0.3), keras.layers.Dense(3, activation="tanh")]
    model = exported.chain((4,), *layers)
    read, same = there_and_back(model, tmp_path, np.random.default_rng(0), dtype)
    gain, bound = gains(model, read)
    assert same and abs(bound - gain) <= room * gain
    assert dtype == "float64" or bound != gain


def test_what_was_read_is_written_in_a_models_place(tmp_path):
    layers = [keras.layers.Conv2D(2, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((5, 4, 1)), *layers, keras.layers.Dense(3)])
    tfl.export_onnx(model, tmp_path / "one.onnx")
    tfl.export_onnx(tfl.load_onnx(tmp_path / "one.onnx"), tmp_path / "two.onnx")
    x = np.random.default_rng(0).normal(size=(4, 5, 4, 1)).astype("float32")
    one, two = (exported.outputs(tmp_path / f"{name}.onnx", x) for name in ("one", "two"))
    assert np.allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 3), (1, 1, 3), (1, 3, 2), (3, 1, 2), (1, 1, 1, 2), (1, 2, 1, 2)]
)
def test_single_pixels_repeated_along_axes_are_written_as_they_were_read(shape, tmp_path):
    kind = getattr(keras.layers, f"UpSampling{len(shape) - 1}D")
    inputs = keras.Input(shape)
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(kind(2)(inputs)))
    model = exported.drawn(keras.Model(inputs, outputs), 0)
    read, same = there_and_back(model, tmp_path, np.random.default_rng(0))
    gain, bound = gains(model, read)
    assert same
    assert abs(bound - gain) <= 1e-9 * gain
    assert tfl.load_onnx(tmp_path / "two.onnx").program.digest() == read.program.digest()
