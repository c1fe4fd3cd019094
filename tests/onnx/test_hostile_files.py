"""Files that were made to do harm are refused by the command line: exit code 2, nothing written."""

import os

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import model

from tf_lyapunov.cli import BAD_INPUT, main
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.onnx.load import load_onnx

W = np.arange(10, dtype=np.float32).reshape(5, 2)


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def small():
    nodes = [node("MatMul", "x w", "h"), node("Relu", "h", "y")]
    return model(nodes, {"x": ("n", 5)}, ["y"], {"w": W})


def beside(location):
    """The network whose weights lie where it says."""
    proto = small()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return proto


def declared(*sizes):
    proto = small()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(sizes)
    return proto


def custom():
    proto = model([helper.make_node("Own", ["x"], ["y"], domain="com.mine")], {"x": ("n", 5)},
                  ["y"])  # fmt: skip
    proto.opset_import.append(helper.make_opsetid("com.mine", 1))
    return proto


def renamed():
    proto = small()
    proto.graph.node[0].name = "a\nVERIFIED \x1b[31m"
    proto.graph.node[0].op_type = "MatMul\nVERIFIED \x1b[31m"
    return proto


def made(kind, shape=("n", 5), constants=None, **attributes):
    inputs = " ".join(["x", *(constants or {})])
    return model([node(kind, inputs, "y", **attributes)], {"x": shape}, ["y"], constants or {})


FILES = {
    "truncated": (lambda: small().SerializeToString()[:-30], "truncated"),
    "empty": (lambda: b"", "no ONNX file"),
    "data above the folder": (lambda: beside("../w.bin"), "outside its folder"),
    "data in the system": (lambda: beside("/etc/hostname"), "outside its folder"),
    "data behind a link": (lambda: beside("link"), "outside its folder"),
    "data in a pipe": (lambda: beside("pipe"), "is missing"),
    "data in the folder itself": (lambda: beside("."), "is missing"),
    "data at a zero byte": (lambda: beside("a\0b"), "is no path"),
    "data at a long path": (lambda: beside("a" * 5000), "is no path"),
    "sizes that are not there": (lambda: declared(2**40, 2**22), "and holds 10"),
    "an input beyond memory": (lambda: made("Relu", ("n", 2**50)), "fit in memory"),
    "a constant beyond memory": (
        lambda: made("Expand", constants={"s": np.array([1, 2**50])}, shape=("n", 1)), "Received",
    ),
    "pads beyond memory": (
        lambda: made("Conv", ("n", 1, 4, 4), {"k": np.ones((1, 1, 2, 2), np.float32)},
                     pads=[2**30] * 4), "memory",
    ),
    "a cycle": (
        lambda: model([node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")],
                      {"x": ("n", 5)}, ["y"]), "cycle",
    ),
    "a domain of its own": (custom, "operator Own of domain 'com.mine'"),
    "names that write lines": (renamed, r"operator 'MatMul\nVERIFIED \x1b[31m'"),
    "weights that are no numbers": (lambda: made("MatMul", constants={"w": W * np.nan}), "finite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A property, and what hostile files refer to."""
    folder = tmp_path_factory.mktemp("hostile") / "inner"
    folder.mkdir()
    (folder.parent / "w.bin").write_bytes(W.tobytes())
    (folder / "link").symlink_to(folder.parent / "w.bin")
    os.mkfifo(folder / "pipe")
    names = [f"X_{i}" for i in range(5)] + ["Y_0", "Y_1"]
    text = "".join(f"(declare-const {name} Real)" for name in names)
    text += "".join(f"(assert (<= {n} 1))(assert (>= {n} 0))" for n in names[:5])
    (folder / "p.vnnlib").write_text(text + "(assert (<= Y_0 -1))")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_bad_input_and_nothing_is_written(name, folder, capsys):
    proto, message = FILES[name][0](), FILES[name][1]
    path = folder / "net.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    before = set(folder.iterdir())
    for words in (["verify-property", path, folder / "p.vnnlib", "--proof", folder / "p.npz"],
                  ["export-mat", path, folder / "net.mat"]):  # fmt: skip
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == BAD_INPUT and out == "" and set(folder.iterdir()) == before
        assert err.startswith("Error: ") and message in err and "Traceback" not in err
        # A refusal of operators is a list, with one line of the file's words for each.
        assert "\x1b" not in err and not any(r.startswith("VERIFIED") for r in err.splitlines())
        assert len(err.splitlines()) == 1 or "not read" in err


def test_a_chain_longer_than_keras_follows_is_refused(tmp_path, monkeypatch):
    def too_deep(*_):
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr("tf_lyapunov.onnx.building.keras.Model", too_deep)
    path = tmp_path / "net.onnx"
    path.write_bytes(small().SerializeToString())
    with pytest.raises(UnsupportedLayerError, match="about a thousand deep"):
        load_onnx(path)
