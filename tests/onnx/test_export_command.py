"""`tf-lyapunov export-onnx`: one file or one clean message."""

import json

import exported
import keras
import numpy as np
import pytest
from command_line import call

from tf_lyapunov.cli import BAD_INPUT, DONE

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.keras"
    layers = [keras.layers.Dense(5, "relu"), keras.layers.Dense(3)]
    exported.chain((4,), *layers).save(path)
    return path


def test_a_model_is_exported_and_described(model, tmp_path, capsys):
    out = tmp_path / "net.onnx"
    code, text, _ = call(capsys, "export-onnx", model, out)
    assert code == DONE and f"Written to {out}: opset 17, float32." in text
    assert "onnxruntime" in text and "A check, not a proof." in text
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    expected = keras.saving.load_model(model)(x)
    expected = keras.ops.convert_to_numpy(expected)
    assert np.allclose(exported.outputs(out, x), expected, atol=1e-5)


def test_as_json_with_settings(model, tmp_path, capsys):
    out = tmp_path / "net.onnx"
    arguments = ("--dtype", "float64", "--opset", 18, "--json")
    code, text, _ = call(capsys, "export-onnx", model, out, *arguments)
    record = json.loads(text)
    assert code == DONE and record["written"] == str(out)
    assert (record["dtype"], record["opset"]) == ("float64", 18)
    assert record["probes"] > 0 and record["largest_difference"] < 1e-12
    assert record["unsupported_by_onnxruntime"] == []
    (shape,) = record["inputs"].values()
    assert shape == [None, 4]
    assert onnx.load(out).opset_import[0].version == 18


def test_files_are_replaced_only_on_request(model, tmp_path, capsys):
    out = tmp_path / "net.onnx"
    out.write_bytes(b"mine")
    code, _, err = call(capsys, "export-onnx", model, out)
    assert code == BAD_INPUT and "--overwrite" in err and out.read_bytes() == b"mine"
    assert call(capsys, "export-onnx", model, out, "--overwrite")[0] == DONE
    onnx.checker.check_model(onnx.load(out))


def test_bad_input_is_one_clean_message(model, tmp_path, capsys):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "junk.keras").write_bytes(b"junk")
    out = tmp_path / "net.onnx"
    for arguments, message in (
        ((tmp_path / "absent.keras", out), "no such file"),
        ((tmp_path / "junk.keras", out), "junk.keras"),
        ((model, tmp_path / "net.txt"), "end in .onnx"),
        ((model, tmp_path / "folder.onnx", "--overwrite"), "a directory"),
        ((model, out, "--dtype", "half"), "float32"),
        ((model, out, "--opset", "3"), "opset=3"),
        ((model, out, "--opset", "x"), "--opset"),
        ((model, out, "--input-shape", "4,x"), "--input-shape"),
        ((model, out, "--input-shape", "5"), ""),
    ):
        code, text, err = call(capsys, "export-onnx", *arguments)
        assert code == BAD_INPUT and message in err and not text, (arguments, err)
    assert not out.exists()
