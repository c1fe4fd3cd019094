"""`export_vnnlib`: what other verifiers are asked is the claim, number for number."""

import dataclasses
import json
from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lyapunov.certification import Certificate, certify
from tf_lyapunov.cli import BAD_INPUT, DONE, main
from tf_lyapunov.vnnlib import deciding, exporting, subjects
from tf_lyapunov.vnnlib.exporting import export_vnnlib, property_text
from tf_lyapunov.vnnlib.files import read_vnnlib
from tf_lyapunov.vnnlib.reading import parse
from tf_lyapunov.vnnlib.sets import cases

small = st.floats(-2, 2, width=32)


@given(
    st.lists(small, min_size=1, max_size=3), st.integers(0, 2), st.floats(1e-6, 1),
    st.lists(st.fractions(-3, 3), min_size=6, max_size=6), st.sampled_from([None, (-1.0, 1.0)]),
)  # fmt: skip
def test_a_property_is_the_ball_with_the_outputs_that_break_the_claim(x, label, radius, point, box):
    ends = (None, None) if box is None else tuple(np.full(len(x), v) for v in box)
    query = parse(property_text(np.float32(x), label, radius, 3, ends))
    far = Fraction(radius)
    for shift in (Fraction(0), far, -far, far + Fraction(1, 10**40), point[0] * far):
        moved = [Fraction(v) + shift for v in x]
        y = point[3:]
        within = abs(shift) <= far and all(box is None or -1 <= v <= 1 for v in moved)
        broken = any(y[j] >= y[label] for j in range(3) if j != label)
        assert query.holds(moved, y) == (within and broken)


@pytest.mark.parametrize("label, breaks", [(1, lambda y: y <= 0), (0, lambda y: y >= 0)])
def test_a_single_output_decides_by_its_sign(label, breaks):
    query = parse(property_text(np.float32([0.5]), label, 0.25, 1))
    for y in (-1, 0, 1):
        assert query.holds([Fraction(1, 2)], [Fraction(y)]) == breaks(y)


@pytest.fixture(scope="module")
def model():
    layers = [keras.Input((2,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(3)]
    built = keras.Sequential(layers)
    # Every class is somewhere: relu(x0), relu(-x0) and relu(x1).
    first = np.array([[1, -1, 0], [0, 0, 1]], np.float32)
    built.set_weights([first, np.zeros(3), np.eye(3) + 0.125, np.array([0, 0.25, 0])])
    return built


@pytest.fixture(scope="module")
def certificate(model):
    x = np.random.default_rng(0).normal(size=(5, 2)).astype("float32")
    return x, certify(model, x, method="linear", norm="linf")


@pytest.fixture
def written(monkeypatch):
    """Stands in for the ONNX writer, which has tests of its own; keeps what it was asked for."""
    module = type(exporting)("tf_lyapunov.onnx.export")
    asked = []

    def export_onnx(model, path):
        asked.append(model)
        path.write_bytes(b"onnx")

    module.export_onnx = export_onnx
    monkeypatch.setitem(__import__("sys").modules, "tf_lyapunov.onnx.export", module)
    return asked


def test_a_certificates_claims_are_unsat_and_larger_ones_are_sat(
    model, certificate, tmp_path, written
):
    x, proof = certificate
    found = export_vnnlib(model, x, tmp_path / "claim", certificate=proof)
    assert written == [model] and found.network.read_bytes() == b"onnx"
    assert found.positions == tuple(np.flatnonzero(proof.radius > 0)) and len(found.positions) > 2
    subject = subjects.subject_of(model)
    for path, i in zip(found.properties, found.positions, strict=True):
        [case] = cases(read_vnnlib(path))
        assert np.all(case.low <= x[i] - proof.radius[i])
        assert deciding.decide(subject, read_vnnlib(path), timeout=20).answer == "unsat"
    rows = (tmp_path / "claim" / "instances.csv").read_text().splitlines()
    assert rows[0] == f"network.onnx,input-{found.positions[0]}.vnnlib,116"
    # The power of the question: far beyond the radius other classes are found.
    wide = export_vnnlib(
        model, x, tmp_path / "wide", labels=proof.labels, radius=100.0 + proof.radius
    )
    answers = [deciding.decide(subject, read_vnnlib(p), timeout=20) for p in wide.properties[:2]]
    assert [a.answer for a in answers] == ["sat", "sat"]


def test_what_cannot_be_stated_is_refused_and_nothing_is_written(
    model, certificate, tmp_path, written
):
    x, proof = certificate
    other = keras.models.clone_model(model)
    ball = dataclasses.replace(proof, norm="l2")
    cut = dataclasses.replace(proof, within="0.0 to 1.0")
    none = dataclasses.replace(proof, radius=np.zeros(5))
    out = tmp_path / "claim"
    for subject, settings, message in (
        (model, {"certificate": ball}, "balls of l∞ alone"),
        (model, {"labels": proof.labels, "radius": 1.0, "norm": "l1"}, "norm='l1'"),
        (model, {"certificate": cut}, "Pass the same `bounds`"),
        (model, {"certificate": none}, "positive radius"),
        (model, {}, "Received: neither"),
        (model, {"certificate": proof, "labels": [0], "radius": 1.0}, "Received: both"),
        (model, {"labels": proof.labels[:3], "radius": 1.0}, "for each of 5 inputs"),
        (model, {"labels": proof.labels + 7, "radius": 1.0}, "classes of a model"),
        (model, {"labels": proof.labels, "radius": np.nan}, "finite numbers ≥ 0"),
        (model, {"labels": proof.labels, "radius": 1.0, "bounds": (1, 0)}, "low ≤ high"),
        (other, {"certificate": proof}, "must be this model's"),
    ):
        with pytest.raises(ValueError) as error:
            export_vnnlib(subject, x, out, **settings)
        assert message in str(error.value), message
    assert not out.exists() and not written


def test_files_that_are_there_stay_without_overwrite(model, certificate, tmp_path, written):
    x, proof = certificate
    (tmp_path / "network.onnx").write_bytes(b"mine")
    with pytest.raises(ValueError, match="without `overwrite`"):
        export_vnnlib(model, x, tmp_path, certificate=proof)
    assert (tmp_path / "network.onnx").read_bytes() == b"mine"
    export_vnnlib(model, x, tmp_path, certificate=proof, overwrite=True)
    assert (tmp_path / "network.onnx").read_bytes() == b"onnx"


def test_behind_a_sigmoid_the_threshold_is_one_half(tmp_path, written):
    layers = [keras.Input((2,)), keras.layers.Dense(1, "sigmoid")]
    export_vnnlib(keras.Sequential(layers), np.zeros((1, 2), "float32"), tmp_path, labels=[1],
                  radius=0.5)  # fmt: skip
    query = read_vnnlib(tmp_path / "input-0.vnnlib")
    assert query.holds([0, 0], [0.5]) and not query.holds([0, 0], [0.75])


def test_the_command_line_writes_the_claims_of_a_certificate(tmp_path, capsys, written):
    layers = [keras.Input((6,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(3)]
    keras.Sequential(layers).save(tmp_path / "m.keras")
    data = ("--data", "blobs", "--samples", "6")
    saved = ("--method", "linear", "--norm", "linf", "--out", str(tmp_path / "c.json"))
    assert main(["certify", str(tmp_path / "m.keras"), *data, *saved]) == DONE
    command = ["export-vnnlib", str(tmp_path / "m.keras"), str(tmp_path / "claim"), *data[:2]]
    capsys.readouterr()
    assert main([*command, "--certificate", str(tmp_path / "c.json"), "--json"]) == DONE
    record = json.loads(capsys.readouterr().out)
    radii = Certificate.load(tmp_path / "c.json").radius
    assert record["inputs"] == np.flatnonzero(radii > 0).tolist()
    assert all((tmp_path / "claim" / f"input-{i}.vnnlib").is_file() for i in record["inputs"])
    assert main([*command, "--radius", "0.1"]) == BAD_INPUT
    assert main(command) == BAD_INPUT


def test_the_written_question_is_decided_from_its_files_alone(model, certificate, tmp_path, capsys):
    """From a certificate to an ONNX file and back to a proof, by the command line."""
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    x, proof = certificate
    found = export_vnnlib(model, x, tmp_path / "claim", certificate=proof)
    net, prop, file = str(found.network), str(found.properties[0]), str(tmp_path / "p.npz")
    assert main(["verify-property", net, prop, "--proof", file]) == DONE
    assert capsys.readouterr().out == "unsat\n"
    assert main(["verify", file, net, "--property", prop]) == DONE
    assert "is unsat" in capsys.readouterr().out
    wide = export_vnnlib(model, x, tmp_path / "wide", labels=proof.labels, radius=100.0)
    assert main(["verify-property", net, str(wide.properties[0])]) == DONE
    assert capsys.readouterr().out.startswith("sat\n((X_0 ")
