"""`verify-property`: from a network's file and a property's to an answer and a checked proof."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction

import keras
import numpy as np
import pytest
from command_line import call

from tf_lyapunov.cli import BAD_INPUT, DONE, NOT_PROVED
from tf_lyapunov.local.inputtree import ProvedBoxes
from tf_lyapunov.vnnlib import deciding, subjects
from tf_lyapunov.vnnlib.files import read_vnnlib
from tf_lyapunov.vnnlib.reading import parse

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

# y = (relu(x0 + x1) - relu(x1 - x2), relu(x0 + x1) + 0.5), for x of shape (1, 1, 3).
KERNELS = (
    np.array([[1, 0], [1, 1], [0, -1]], np.float32),
    np.array([[1, 1], [-1, 0]], np.float32),
)
BIASES = (np.zeros(2, np.float32), np.array([0, 0.5], np.float32))
DECLARED = "".join(f"(declare-const {v} Real)\n" for v in ("X_0", "X_1", "X_2", "Y_0", "Y_1"))


def boxed(low, high):
    return "".join(f"(assert (<= X_{i} {high}))(assert (>= X_{i} {low}))\n" for i in range(3))


# Within the unit box y0 ≤ 2 - 0, with equality at x = (1, 1, x2 ≥ 1); and y0 ≥ -1 at (0, 1, 0) + …
PROPERTIES = {
    "unsat": DECLARED + boxed(0, 1) + "(assert (>= Y_0 2.001))",
    "sat": DECLARED + boxed(0, 1) + "(assert (>= Y_0 1.5))",
    "boxes": DECLARED
    + boxed(-1, 1)
    + "(assert (or (and (<= X_0 -0.5) (>= Y_0 1.75)) (and (>= X_0 0.5) (<= Y_1 0.25))))",
    "empty": DECLARED + boxed(0, 1) + "(assert (> X_1 1)) (assert (>= Y_0 0))",
    "decimals": DECLARED
    + boxed("0.1", "0.3")
    + "(assert (>= Y_1 1.0999)) (assert (<= (+ X_0 (* -1 X_1)) 0))",
}


def write_network(path):
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("Flatten", ["x"], ["a"], axis=1),
        helper.make_node("MatMul", ["a", "w0"], ["b"]),
        helper.make_node("Add", ["b", "b0"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "w1", "b1"], ["y"]),
    ]
    held = {"w0": KERNELS[0], "b0": BIASES[0], "w1": KERNELS[1], "b1": BIASES[1]}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, [1, 1, 1, 3])],
        [helper.make_tensor_value_info("y", 1, [1, 2])],
        [numpy_helper.from_array(v, k) for k, v in held.items()],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("properties")
    write_network(path / "net.onnx")
    for name, text in PROPERTIES.items():
        (path / f"{name}.vnnlib").write_text(text)
    keras_model().save(path / "net.keras")
    return path


def keras_model():
    layers = [keras.Input((3,)), keras.layers.Dense(2, "relu"), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.set_weights([KERNELS[0], BIASES[0], KERNELS[1], BIASES[1]])
    return model


def function(x):
    """The network in rational arithmetic, written out by hand."""
    first, second = max(x[0] + x[1], 0), max(x[1] - x[2], 0)
    return [first - second, first + Fraction(1, 2)]


@pytest.mark.parametrize("network", ["net.onnx", "net.keras"])
def test_an_unsat_answer_has_a_proof_that_verify_accepts(folder, tmp_path, capsys, network):
    out, proof = tmp_path / "result.txt", tmp_path / "p.npz"
    code, text, _ = call(
        capsys, "verify-property", folder / network, folder / "unsat.vnnlib",
        "--out", out, "--proof", proof,
    )  # fmt: skip
    assert code == DONE and text == "unsat\n" and out.read_text() == "unsat\n"
    code, text, _ = call(capsys, "verify", proof, folder / network)
    assert code == DONE and text.startswith("VERIFIED")
    assert ("agreed with onnxruntime's" in text) == (network == "net.onnx")


@pytest.mark.parametrize("network", ["net.onnx", "net.keras"])
def test_a_sat_answer_prints_numbers_that_satisfy_the_file_exactly(
    folder, tmp_path, capsys, network
):
    out = tmp_path / "result.txt"
    code, text, err = call(
        capsys, "verify-property", folder / network, folder / "sat.vnnlib", "--out", out
    )
    assert code == DONE and out.read_text() == text
    assert "replayed by " + ("onnxruntime" if network == "net.onnx" else "Keras") in err
    lines = text.splitlines()
    assert lines[0] == "sat" and lines[1].startswith("((") and lines[-1].endswith("))")
    found = {name: Fraction(v) for name, v in re.findall(r"\(([XY]_\d+) (\S+?)\)", text)}
    assert list(found) == ["X_0", "X_1", "X_2", "Y_0", "Y_1"]
    x, y = ([found[f"{k}_{i}"] for i in range(n)] for k, n in (("X", 3), ("Y", 2)))
    assert all(0 <= v <= 1 and Fraction(float(np.float32(float(v)))) == v for v in x)
    assert y[0] >= Fraction(3, 2)
    # Three additions in float32 of numbers up to 2.
    assert all(abs(a - b) <= 6 * 2.0**-24 * 2 for a, b in zip(function(x), y, strict=True))
    assert read_vnnlib(folder / "sat.vnnlib").holds(x, y)


def test_several_boxes_have_a_proof_file_each(folder, tmp_path, capsys):
    proof = tmp_path / "p.npz"
    code, text, _ = call(
        capsys, "verify-property", folder / "net.onnx", folder / "boxes.vnnlib",
        "--proof", proof, "--json",
    )  # fmt: skip
    record = json.loads(text)
    assert code == DONE and record["answer"] == "unsat" and len(record["boxes"]) == 2
    assert record["proof"] == [str(proof), str(tmp_path / "p-2.npz")]
    for path in record["proof"]:
        assert call(capsys, "verify", path, folder / "net.onnx", "--json")[0] == DONE


def test_an_empty_set_is_unsat_and_said_to_be_empty(folder, tmp_path, capsys):
    proof = tmp_path / "p.npz"
    code, text, err = call(
        capsys, "verify-property", folder / "net.onnx", folder / "empty.vnnlib", "--proof", proof
    )
    assert text == "unsat\n" and "empty" in err
    # There is nothing that a file could hold.
    assert code == NOT_PROVED and not proof.exists()


def test_corners_between_the_numbers_of_float32_are_replaced_by_numbers_inside(folder, capsys):
    """Only x0 = x1 = 0.3 gives y1 = 1.1; float32(0.3) lies above 0.3, its neighbour below."""
    code, text, _ = call(
        capsys, "verify-property", folder / "net.onnx", folder / "decimals.vnnlib", "--json"
    )
    found = json.loads(text)["counterexample"]
    assert code == DONE and Fraction(float(np.float32(0.3))) > Fraction("0.3")
    assert read_vnnlib(folder / "decimals.vnnlib").holds(found["inputs"], found["outputs"])


@pytest.mark.parametrize("lie", [-1.0, math.nan, 1.4999999])
def test_a_counterexample_that_onnxruntime_does_not_repeat_is_not_printed(lie):
    subject = subjects.subject_of(keras_model(), replay=lambda x: np.array([lie, 2.0]))
    decision = deciding.decide(subject, parse(PROPERTIES["sat"]), timeout=20)
    assert decision.answer == "unknown" and decision.x is None
    assert "does not satisfy the file itself" in decision.reason


def test_a_counterexample_that_the_exact_function_does_not_repeat_is_not_printed(monkeypatch):
    """The search is made to call every point a counterexample; what follows refuses it."""
    original = deciding.verify_property

    class Wrong:
        is_proved, is_refuted, seconds, timeout = False, True, 0.0, 1.0

        def __init__(self, region):
            self.counterexample = type("Point", (), {"x": region.center.astype(np.float32)})

    def lying(model, region, *arguments, **settings):
        is_point = np.all(region.low == region.high)
        return original(model, region, *arguments, **settings) if is_point else Wrong(region)

    monkeypatch.setattr(deciding, "verify_property", lying)
    subject = subjects.subject_of(keras_model(), replay=lambda x: np.array([2.5, 3.0]))
    decision = deciding.decide(subject, parse(PROPERTIES["unsat"]), timeout=20)
    assert decision.answer == "unknown" and decision.x is None


def test_an_input_that_float32_does_not_hold_gives_no_counterexample():
    text = DECLARED + "(assert (= X_0 0.1))" + boxed(0, 1) + "(assert (>= Y_1 0.55))"
    subject = subjects.subject_of(keras_model())
    decision = deciding.decide(subject, parse(text), timeout=20)
    assert decision.answer == "unknown" and "no number of the type float32" in decision.reason
    # The real input is held by the box that a proof is about.
    never = text.replace("(>= Y_1 0.55)", "(>= Y_1 5)")
    assert deciding.decide(subject, parse(never), timeout=20).answer == "unsat"


def test_conditions_that_are_no_box_are_decided_where_the_box_or_a_point_does():
    tilted = DECLARED + boxed(0, 1) + "(assert (<= (+ X_0 X_1) 1))"
    subject = subjects.subject_of(keras_model())
    for condition, answer in (("(>= Y_0 2.5)", "unsat"), ("(>= Y_0 1.5)", "unknown")):
        query = parse(f"{tilted}(assert {condition})")
        assert deciding.decide(subject, query, timeout=5).answer == answer, condition


def test_without_time_the_answer_is_timeout(folder, tmp_path, capsys):
    code, text, err = call(
        capsys, "verify-property", folder / "net.onnx", folder / "unsat.vnnlib",
        "--timeout", "1e-6", "--out", tmp_path / "r.txt",
    )  # fmt: skip
    assert code == NOT_PROVED and text == "timeout\n" and "time was up" in err
    assert (tmp_path / "r.txt").read_text() == "timeout\n"


def test_a_proof_file_that_the_time_does_not_suffice_for_is_said_to_be_missing(
    folder, tmp_path, capsys, monkeypatch
):
    """As of a proof by parts, whose time is up when the answer is there."""
    original = deciding.verify_property

    def by_parts(*arguments, **settings):
        low, high = np.zeros((2, 3)), np.ones((2, 3))
        high[0, 1] = low[1, 1] = 0.5
        found = original(*arguments, **settings)
        return dataclasses.replace(found, leaves=ProvedBoxes(low, high), branches=3)

    monkeypatch.setattr(deciding, "verify_property", by_parts)
    out, proof = tmp_path / "r.txt", tmp_path / "p.npz"
    command = ("verify-property", folder / "net.onnx", folder / "unsat.vnnlib", "--out", out,
               "--overwrite", "--json", "--proof", proof)  # fmt: skip
    code, text, err = call(capsys, *command, "--proof-timeout", "1e-9")
    record = json.loads(text)
    assert record["answer"] == "unsat" and record["boxes"][0]["branches"] == 3
    assert code == NOT_PROVED and record["proof"] == [] and not proof.exists()
    assert "it was up. Received: 0 seconds" in record["proof_missing"] and "No proof file" in err
    assert out.read_text() == "unsat\n"
    code, text, _ = call(capsys, *command, "--proof-timeout", "60")
    record = json.loads(text)
    assert code == DONE and record["proof"] == [str(proof)] and record["proof_seconds"] > 0
    code, text, _ = call(capsys, "verify", proof, folder / "net.onnx")
    assert code == DONE and "in 2 parts" in text


def test_the_command_about_an_onnx_file_starts_without_tensorflow(folder, tmp_path):
    """In a process of its own, as users call it."""
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    command = [sys.executable, "-m", "tf_lyapunov.cli", "verify-property", folder / "net.onnx",
               folder / "unsat.vnnlib", "--proof", tmp_path / "p.npz"]  # fmt: skip
    done = subprocess.run(
        command, env=environment | {"PYTHONPROFILEIMPORTTIME": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "unsat\n", done.stderr[-2000:]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "keras" in imported and not imported & {"sklearn.base", "IPython.core"}
    if importlib.util.find_spec("jax") is not None:
        assert "tensorflow.python" not in imported


def test_bad_input_is_said_without_a_traceback_and_the_result_is_error(folder, tmp_path, capsys):
    (tmp_path / "more.vnnlib").write_text(PROPERTIES["unsat"].replace("X_2", "X_2")
                                          + "(declare-const X_3 Real)")  # fmt: skip
    (tmp_path / "wrong.vnnlib").write_text(DECLARED + "(assert (<= X_7 1))")
    (tmp_path / "cut.onnx").write_bytes((folder / "net.onnx").read_bytes()[:-40])
    (tmp_path / "there.txt").write_text("mine")
    unsat, net = folder / "unsat.vnnlib", folder / "net.onnx"
    for arguments, message in (
        ((net, tmp_path / "more.vnnlib"), "3 and 2. Received: 4 and 2"),
        ((net, tmp_path / "wrong.vnnlib"), "line 6, column 13"),
        ((net, tmp_path / "absent.vnnlib"), "absent.vnnlib"),
        ((tmp_path / "cut.onnx", unsat), "cut.onnx"),
        ((tmp_path / "net.pb", unsat), "an .onnx or a .keras file"),
    ):
        out = tmp_path / "r.txt"
        code, text, err = call(capsys, "verify-property", *arguments, "--out", out)
        assert code == BAD_INPUT and message in err and text == "", err
        assert out.read_text() == "error\n"
        out.unlink()
    for options, message in (
        (("--out", tmp_path / "there.txt"), "--overwrite"),
        (("--proof", tmp_path / "p.txt"), "must end in .npz"),
        (("--timeout", "-1"), "positive number"),
        (("--timeout", "nan"), "positive number"),
        (("--proof-timeout", "0"), "positive number"),
        (("--out", tmp_path / "absent" / "r.txt"), "directories that exist"),
        (("--out", unsat, "--overwrite"), "does not replace what it is about"),
    ):
        code, text, err = call(capsys, "verify-property", net, unsat, *options)
        assert code == BAD_INPUT and message in err and text == "", err
    assert (tmp_path / "there.txt").read_text() == "mine"
    assert unsat.read_text() == PROPERTIES["unsat"]


def test_what_had_a_part_of_the_time_has_the_rest_of_it(monkeypatch):
    """Two boxes, of which the first is not decided in its half: it is tried again."""
    original, asked = deciding.verify_property, []

    def slow(model, region, *arguments, timeout, **settings):
        asked.append((region.high[0], timeout))
        if len(asked) == 1:
            return type("Open", (), {
                "is_proved": False, "is_refuted": False, "seconds": timeout, "timeout": timeout,
            })()  # fmt: skip
        return original(model, region, *arguments, timeout=timeout, **settings)

    monkeypatch.setattr(deciding, "verify_property", slow)
    subject = subjects.subject_of(keras_model())
    decision = deciding.decide(subject, parse(PROPERTIES["boxes"]), timeout=60)
    assert (
        decision.answer == "unsat" and [found.status for found in decision.found] == ["PROVED"] * 2
    )
    assert [high for high, _ in asked] == [-0.5, 1.0, -0.5]
    assert asked[0][1] <= 30 < asked[2][1]
