"""Twelve instances of the VNN-COMP's ACAS Xu and mnist_fc, where the data is there.

Known since Katz et al. (2017, Reluplex): property 1 holds on all networks of ACAS Xu, properties 3
and 4 on all but 1_7, 1_8 and 1_9. A `sat` is its own proof. Only instances that take a second or
two are among them; `scripts/vnn/run.py` runs all.
"""

import os
import pathlib
import tarfile

import numpy as np
import pytest

from tf_lyapunov.vnnlib.deciding import decide
from tf_lyapunov.vnnlib.files import read_vnnlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
ACAS = "ACASXU_run2a_{}_batch_2000.onnx"
INSTANCES = [
    ("acasxu", ACAS.format("1_1"), "prop_1", "unsat"),
    ("acasxu", ACAS.format("3_3"), "prop_1", "unsat"),
    ("acasxu", ACAS.format("5_9"), "prop_1", "unsat"),
    ("acasxu", ACAS.format("2_1"), "prop_2", "sat"),
    ("acasxu", ACAS.format("3_1"), "prop_2", "sat"),
    ("acasxu", ACAS.format("5_3"), "prop_2", "sat"),
    ("acasxu", ACAS.format("1_7"), "prop_3", "sat"),
    ("acasxu", ACAS.format("2_3"), "prop_3", "unsat"),
    ("acasxu", ACAS.format("1_9"), "prop_4", "sat"),
    ("acasxu", ACAS.format("2_3"), "prop_4", "unsat"),
    ("mnistfc", "mnist-net_256x2.onnx", "prop_1_0.05", "sat"),
    ("mnistfc", "mnist-net_256x2.onnx", "prop_2_0.03", "unsat"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the benchmarks; what the instances name is taken out of `shared/data/vnn.tar.xz`."""
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    found, archive = os.environ.get("TFL_VNN_DIR"), ROOT.parent / "shared" / "data" / "vnn.tar.xz"
    if found and pathlib.Path(found, "acasxu").is_dir():
        return pathlib.Path(found)
    if not archive.is_file():
        pytest.skip("no benchmark data: set TFL_VNN_DIR to a folder with acasxu/ and mnistfc/")
    path = tmp_path_factory.mktemp("benchmarks")
    wanted = {f"vnn/{suite}/{name}" for suite, network, prop, _ in INSTANCES
              for name in (network, f"{prop}.vnnlib")}  # fmt: skip
    with tarfile.open(archive) as file:
        held = [member for member in file if member.name in wanted]
        file.extractall(path, held, filter="data")
    assert len(held) == len(wanted)
    return path / "vnn"


@pytest.mark.parametrize("benchmark, network, name, answer", INSTANCES)
def test_the_answer_is_the_known_one(folder, benchmark, network, name, answer):
    from tf_lyapunov.vnnlib.subjects import onnx_replay, open_subject

    path = folder / benchmark / network
    query = read_vnnlib(folder / benchmark / f"{name}.vnnlib")
    found = decide(open_subject(path), query, timeout=60)
    assert found.answer == answer, found.reason
    if answer == "sat":
        assert query.holds(found.x, found.y) and found.x.dtype == np.float32
        np.testing.assert_array_equal(onnx_replay(path)(found.x), found.y)
