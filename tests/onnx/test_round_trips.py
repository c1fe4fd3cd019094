"""Keras → ONNX → Keras → ONNX: the same function, the same bounds, the same program."""

import exported
import keras
import numpy as np
import pytest
from test_export_random import random_chain

import tf_lyapunov as tfl
from tf_lyapunov.errors import UnsupportedLayerError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
# Written as compositions of operators, which are read one by one with the product of their gains.
COMPOSED = {"FullSort", "TwoSidedReLU", "SDPLipschitzConv2D", "L2NormPooling2D",
            "LocalResponseNormalization"}  # fmt: skip
# Operators in them that have no gain of their own.
WITHOUT_GAIN = ("TopK", "Mul", "Div", "Erf", "Exp", "Pow", "Sqrt", "Softplus")


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow)
                                        for n in range(25, 500, 25))])  # fmt: skip
def test_what_is_written_and_read_again_is_the_same(first, tmp_path):
    whole = 0
    for seed in range(first, first + 25):
        model, rng = random_chain(seed), np.random.default_rng(seed)
        tfl.export_onnx(model, tmp_path / "one.onnx", rng=rng)
        try:
            read = tfl.load_onnx(tmp_path / "one.onnx")
        except UnsupportedLayerError as error:
            assert any(f"operator {name} " in str(error) for name in WITHOUT_GAIN), error
            continue
        again, whole = read.to_keras(), whole + 1
        x = rng.normal(size=(3, *model.inputs[0].shape[1:])).astype("float32")
        own, other = (keras.ops.convert_to_numpy(m(x)) for m in (model, again))
        assert np.all(np.abs(own - other) <= 1e-6 * (1 + np.abs(own).max())), seed
        gain, bound = (tfl.lipschitz_upper_bound(m).gain_upper_bound for m in (model, read))
        # Folded settings are rounded to float32, a relative 2⁻²⁴ each, of which there are a few.
        assert bound >= gain * (1 - 2.0**-18), seed
        kinds = {type(layer).__name__ for layer in model.layers}
        if not kinds & COMPOSED:
            assert bound <= gain * (1 + 2.0**-18), seed
        tfl.export_onnx(again, tmp_path / "two.onnx", rng=rng)
        assert tfl.load_onnx(tmp_path / "two.onnx").program.digest() == read.program.digest()
    assert whole >= 10


def test_what_was_read_is_written_in_a_models_place(tmp_path):
    layers = [keras.layers.Conv2D(2, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((5, 4, 1)), *layers, keras.layers.Dense(3)])
    tfl.export_onnx(model, tmp_path / "one.onnx")
    tfl.export_onnx(tfl.load_onnx(tmp_path / "one.onnx"), tmp_path / "two.onnx")
    x = np.random.default_rng(0).normal(size=(4, 5, 4, 1)).astype("float32")
    one, two = (exported.outputs(tmp_path / f"{name}.onnx", x) for name in ("one", "two"))
    assert np.allclose(one, two, rtol=1e-5, atol=1e-5)
