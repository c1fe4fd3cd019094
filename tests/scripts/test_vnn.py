"""The runs of benchmark instances: what is asked, kept and told; and the competition's scripts."""

import csv
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def vnn():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("vnn.run")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def data(tmp_path):
    text = "(declare-const X_0 Real) (declare-const Y_0 Real) (assert (<= X_0 1))"
    for name in ("acasxu", "mnistfc"):
        (tmp_path / name).mkdir()
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "relu")])
        model.save(tmp_path / name / "net.keras")
        for k, rest in enumerate(("(>= X_0 -1)", "(>= X_0 0.5)")):
            full = f"{text}(assert {rest})(assert (<= Y_0 -1))"
            (tmp_path / name / f"prop_{k}.vnnlib").write_text(full)
        lines = "".join(f"net.keras,prop_{k}.vnnlib,{60 + k}\n" for k in range(2))
        (tmp_path / name / f"{name}_instances.csv").write_text(lines)
    return tmp_path


def test_instances_are_those_of_the_lists(vnn, data, tmp_path):
    found = vnn.instances(data)
    assert [i.key for i in found] == [
        f"{name}/net.keras/prop_{k}.vnnlib" for name in ("acasxu", "mnistfc") for k in range(2)
    ]
    assert [i.timeout for i in found] == [60, 61, 60, 61]
    assert [i.key for i in vnn.instances(data, only="mnistfc", limit=1, timeout=3)] == [
        "mnistfc/net.keras/prop_0.vnnlib"
    ]
    (tmp_path / "some.csv").write_text("acasxu,net.keras,prop_1.vnnlib\n\n")
    [only] = vnn.instances(data, listed=tmp_path / "some.csv")
    assert only.property == "prop_1.vnnlib" and only.timeout == 116


def record(key, answer, proof=None, seconds=1.5, network="net.onnx", replayed=None,
           timeout=116.0):  # fmt: skip
    name, _, prop = key.partition("/")
    return {
        "key": key, "benchmark": name, "network": network, "property": prop, "timeout": timeout,
        "answer": answer, "seconds": seconds, "branches": 7, "proof": proof, "proof_files": 1,
        "check_seconds": 0.25, "note": "why", "replayed": replayed, "proof_seconds": None,
        "proof_bytes": 2048, "parts": 3, "load": 1.0,
    }  # fmt: skip


def test_tables_count_answers_and_name_what_is_open(vnn):
    held = [
        record("acasxu/a", "unsat", "verified"), record("acasxu/b", "unsat", "none", 4.0),
        record("acasxu/c", "sat", seconds=0.5, replayed=True),
        record("acasxu/d", "timeout", seconds=60.5, timeout=60.0),
        record("mnistfc/e", "error"),
    ]  # fmt: skip
    text = vnn.table(held)
    assert (
        "| acasxu | 45 networks | 60, 116 | 4 | 2 | 1 | 0 | 1 | 0 | 3 of 4 | 1 of 1 | 1 of 2 | 0 "
        "| 1.5 | 4.0 |  |  | 0.2 | 0.2 | 2 |"
    ) in text
    assert "| acasxu/d | 60 | timeout | 60.5 |" in text
    assert "| acasxu/c | 116 | sat | 0.5 | 7 | replayed | 3 |  | 0.2 | 2.0 | 1.0 |" in text
    assert "- acasxu/d: timeout. why" in text and "- acasxu/b: none. why" in text
    rows = list(csv.DictReader(io.StringIO(vnn.as_csv(held))))
    assert [row["answer"] for row in rows] == ["unsat", "unsat", "sat", "timeout", "error"]


def test_a_run_continues_where_it_was_cut(vnn, data, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []

    def called(arguments, limit):
        calls.append(list(map(str, arguments)))
        if arguments[0] == "verify":
            return 0, json.dumps({"leaves": 5, "also": [{"leaves": 2}]}), 0.1
        pathlib.Path(arguments[arguments.index("--out") + 1]).write_text("unsat\n")
        proof = [str(arguments[arguments.index("--proof") + 1]), "second.npz"]
        found = {"answer": "unsat", "seconds": 2.0, "reason": "so", "boxes": [{"branches": 3}] * 2,
                 "proof": proof, "proof_missing": None}  # fmt: skip
        return 0, json.dumps(found), 2.5

    monkeypatch.setattr(vnn, "_called", called)
    proofs = ("--proofs", str(tmp_path / "proofs"))
    arguments = ["--data", str(data), "--out", str(out), *proofs]
    assert vnn.main([*arguments, "--limit", "1"]) == 0
    assert [c[0] for c in calls] == ["verify-property", "verify"] * 2
    assert calls[1][-3:] == ["--also", "second.npz", "--json"] and "--property" in calls[1]
    lines = out / "instances.jsonl"
    first = json.loads(lines.read_text().splitlines()[0])
    assert first["parts"] == 7 and 0 <= first["seconds"] < 2 and first["proof"] == "verified"
    lines.write_text(lines.read_text() + '{"key": "acasxu/net.keras/prop_1')  # killed there
    del calls[:]
    assert vnn.main(arguments) == 0
    assert [c[2].split("/")[-1] for c in calls if c[0] != "verify"] == ["prop_1.vnnlib"] * 2
    assert "| 2 | 2 | 0 |" in (out / "RESULTS.md").read_text()
    del calls[:]
    assert vnn.main(arguments) == 0 and calls == []


def test_counterexamples_are_run_once_more(vnn, tmp_path, monkeypatch, data):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    graph = onnx.parser.parse_graph("net (float[1, 1] x) => (float[1, 1] y) { y = Relu(x) }")
    model = onnx.helper.make_model(graph, ir_version=8,
                                   opset_imports=[onnx.helper.make_opsetid("", 13)])  # fmt: skip
    onnx.save(model, tmp_path / "n.onnx")
    text = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 1))(assert (>= X_0 0))"
    (tmp_path / "p.vnnlib").write_text(text + "(assert (>= Y_0 0.25))")
    files = tmp_path / "n.onnx", tmp_path / "p.vnnlib"
    assert vnn.replayed(*files, "sat\n((X_0 0.5)\n(Y_0 0.5))\n")
    for wrong in ("(X_0 0.5)\n(Y_0 0.75)", "(X_0 0.125)\n(Y_0 0.125)", "(X_0 2)\n(Y_0 2)",
                  "(X_0 0.3)\n(Y_0 0.3)"):  # fmt: skip
        assert not vnn.replayed(*files, f"sat\n({wrong})\n")
    assert vnn.replayed(tmp_path / "n.keras", files[1], "sat") is None

    def called(arguments, limit):
        pathlib.Path(arguments[arguments.index("--out") + 1]).write_text("sat\n((X_0 1)\n(Y_0 1))")
        return 0, json.dumps({"reason": "so", "boxes": [], "proof": []}), 1.0

    monkeypatch.setattr(vnn, "_called", called)
    for found in (True, False):
        monkeypatch.setattr(vnn, "replayed", lambda *a, found=found: found)
        out = tmp_path / str(found)
        arguments = ["--data", str(data), "--out", str(out), "--only", "acasxu", "--no-proofs"]
        assert vnn.main(arguments) == int(not found)


def test_refused_proofs_and_errors_are_exit_code_1(vnn, data, tmp_path, monkeypatch):
    for code, text in ((2, json.dumps({"error": {"message": "bad"}})), (None, "")):
        monkeypatch.setattr(vnn, "_called", lambda *a, c=code, t=text: (c, t, 1.0))
        out = tmp_path / str(code)
        arguments = ["--data", str(data), "--out", str(out), "--only", "acasxu", "--no-proofs"]
        assert vnn.main(arguments) == 1
        assert (
            json.loads((out / "instances.jsonl").read_text().splitlines()[0])["answer"] == "error"
        )


def bash(script, *arguments, tool="exit 7", folder):
    """Runs a script of the competition with a stand-in for the installed command."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    for name in ("tf-lyapunov", "python"):
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{tool}\n")
        (bin_ / name).chmod(0o755)
    return subprocess.run(
        ["bash", str(SCRIPTS / "vnncomp" / script), *map(str, arguments)],
        env={**os.environ, "TFL_VENV": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_competitions_scripts_leave_an_answer_whatever_happens(tmp_path):
    net, prop, out = tmp_path / "a b.onnx", tmp_path / "p.vnnlib", tmp_path / "r.txt"
    net.touch(), prop.touch()
    run = ("run_instance.sh", "v1", "acasxu", net, prop, out, 116)
    done = bash(
        *run,
        tool='echo "$@" >&2; [ "$2" = "' + str(net) + '" ] && echo unsat > "$7"',
        folder=tmp_path,
    )
    assert done.returncode == 0 and out.read_text() == "unsat\n", done.stderr
    assert "--timeout 114 --out" in done.stderr
    done = bash(*run, tool="exit 2", folder=tmp_path)
    assert done.returncode != 0 and out.read_text() == "error\n"
    done = bash(*run[:-1], 10, tool='echo "$@" >&2; echo timeout > "$7"; exit 1', folder=tmp_path)
    assert done.returncode == 0 and out.read_text() == "timeout\n" and "--timeout 9 " in done.stderr
    assert bash("run_instance.sh", "v2", "acasxu", net, prop, out, 1, folder=tmp_path).returncode
    prepare = ("prepare_instance.sh", "v1", "acasxu", net)
    assert bash(*prepare, prop, tool="exit 0", folder=tmp_path).returncode == 0
    assert bash(*prepare, tmp_path / "absent", tool="exit 0", folder=tmp_path).returncode == 1
    assert bash("install_tool.sh", "v9", folder=tmp_path).returncode == 1
