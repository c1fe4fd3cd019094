"""Commands that take a model file take an ONNX file too."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import tf_lyapunov as tfl
from tf_lyapunov.cli import BAD_INPUT, DONE, main
from tf_lyapunov.data.arrays import Dataset
from tf_lyapunov.experiments.targets import Opened

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`net.keras` and the file `net.onnx` of the same small network on digits."""
    folder = tmp_path_factory.mktemp("onnx")
    keras.utils.set_random_seed(0)
    net = [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(4, "relu"), layers.Dense(10)]
    model = keras.Sequential(net)
    model.save(folder / "net.keras")
    tfl.export_onnx(model, folder / "net.onnx")
    return folder


def test_an_onnx_file_is_certified_as_the_keras_file_is(folder, capsys):
    found = []
    for name in ("net.keras", "net.onnx"):
        words = ("certify", folder / name, "--data", "digits", "--samples", 4, "--json")
        code, out, err = call(capsys, *words)
        assert code == DONE and ("agreed with onnxruntime's" in err) == (name == "net.onnx")
        found.append(json.loads(out))
    bounds = [f["gain_upper_bound"] for f in found]
    assert abs(bounds[0] - bounds[1]) <= 1e-9 * bounds[0]


def test_an_onnx_file_is_attacked_and_written_for_matlab(folder, capsys, tmp_path):
    base = (folder / "net.onnx", "--data", "digits", "--samples", 2, "--json")
    code, out, _ = call(capsys, "attack", *base, "--steps", 2, "--radius", 0.5)
    assert code == DONE and json.loads(out)["rows"]
    code, out, _ = call(capsys, "export-mat", folder / "net.onnx", tmp_path / "net.mat")
    assert code == DONE and (tmp_path / "net.mat").exists()


def test_a_broken_onnx_file_is_bad_input(folder, capsys, tmp_path):
    (tmp_path / "net.onnx").write_bytes((folder / "net.onnx").read_bytes()[:300])
    for path in (tmp_path / "net.onnx", tmp_path / "none.onnx"):
        code, _, err = call(capsys, "certify", path, "--data", "digits")
        assert code == BAD_INPUT and str(path) in err


def test_images_are_turned_for_a_network_with_channels_first():
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype("float32")
    y = np.zeros(2, int)
    model = keras.Sequential([keras.Input((3, 4, 5)), layers.Flatten(), layers.Dense(2)])
    data = Dataset("images", x, y, x, y, x, y)
    found, _ = Opened(model, data).arrays("test", None)
    assert np.array_equal(found, np.moveaxis(x, -1, 1))
