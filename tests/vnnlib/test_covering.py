"""A proof file is about a property only if its boxes and sets hold those of the property's file."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from tf_lyapunov.cli import BAD_INPUT, DONE, NOT_PROVED, main
from tf_lyapunov.verification.properties import LEAF, PropertyClaim
from tf_lyapunov.vnnlib.covering import uncovered
from tf_lyapunov.vnnlib.reading import parse
from tf_lyapunov.vnnlib.sets import cases

DECLARED = "".join(f"(declare-const {v} Real)\n" for v in ("X_0", "X_1", "Y_0", "Y_1"))
BOX = "".join(f"(assert (<= X_{i} 0.1))(assert (>= X_{i} -0.7))\n" for i in range(2))
OUTPUTS = "(assert (or (<= Y_0 (* 0.1 Y_1)) (and (< Y_1 -0.3) (>= Y_0 (+ Y_1 0.2)))))"


def claim_of(case):
    rows, bounds, strict = (np.concatenate(parts) for parts in zip(*case.sets, strict=True))
    lengths = [len(s[0]) for s in case.sets]
    return PropertyClaim(
        case.low / 2 + case.high / 2, case.low, case.high, np.full(2, np.inf), rows, bounds,
        strict.astype(np.int64), np.cumsum([0, *lengths[:-1]]), np.array([LEAF]), np.zeros(1),
    )  # fmt: skip


@pytest.fixture
def claim():
    [case] = cases(parse(DECLARED + BOX + OUTPUTS))
    return claim_of(case)


def test_claims_made_of_a_property_hold_it(claim):
    assert uncovered(parse(DECLARED + BOX + OUTPUTS), [claim]) == []


@pytest.mark.parametrize("text", [
    "(assert (<= X_0 0.05))", "(assert (<= Y_0 5))", "(assert (> X_0 0.1))", "(assert false)",
    "(assert (< (* 2 Y_1) -0.6))",
])  # fmt: skip
def test_smaller_sets_are_held(claim, text):
    assert uncovered(parse(DECLARED + BOX + OUTPUTS + text), [claim]) == []


@pytest.mark.parametrize("box, outputs", [
    (BOX.replace("0.1", "0.1000001"), OUTPUTS),
    (BOX.replace("-0.7", "-0.70000001"), OUTPUTS),
    (BOX, OUTPUTS.replace("0.1 Y_1", "0.11 Y_1")),
    (BOX, OUTPUTS.replace("-0.3", "-0.29999999")),
    (BOX, OUTPUTS.replace("(< Y_1 -0.3)", "(> Y_1 -0.3)")),
    (BOX, OUTPUTS.replace("(< Y_1 -0.3)", "(< Y_0 -0.3)")),
    (BOX, "(assert (>= Y_0 1))"),
    (BOX, ""),
])  # fmt: skip
def test_larger_and_other_sets_are_not(claim, box, outputs):
    [reason] = uncovered(parse(DECLARED + box + outputs), [claim])
    assert reason.startswith("Nothing is claimed of set")


def test_a_strict_row_does_not_hold_one_that_is_not():
    [case] = cases(parse(DECLARED + BOX + "(assert (< Y_0 0.5))"))
    assert uncovered(parse(DECLARED + BOX + "(assert (<= Y_0 0.5))"), [claim_of(case)])
    [case] = cases(parse(DECLARED + BOX + "(assert (<= Y_0 0.5))"))
    assert not uncovered(parse(DECLARED + BOX + "(assert (< Y_0 0.5))"), [claim_of(case)])


def test_balls_and_other_sizes_are_said(claim):
    ball = dataclasses.replace(claim, radii=np.array([1.0, np.inf]))
    assert "about a ball" in uncovered(parse(DECLARED + BOX + OUTPUTS), [ball])[0]
    more = DECLARED + "(declare-const X_2 Real)" + BOX + OUTPUTS
    assert "about 3 and 2" in uncovered(parse(more), [claim])[0]


def test_the_command_line_compares_proof_files_with_a_property(tmp_path, capsys):
    layers = [keras.Input((2,)), keras.layers.Dense(2, "relu", kernel_initializer="ones")]
    keras.Sequential(layers).save(tmp_path / "m.keras")
    union = "(assert (or (and (<= X_0 -0.2) (>= Y_0 1)) (and (>= X_0 -0.1) (>= Y_1 2))))"
    (tmp_path / "p.vnnlib").write_text(DECLARED + BOX + union)
    (tmp_path / "other.vnnlib").write_text(DECLARED + BOX + "(assert (>= Y_0 0.9))")
    model, prop = tmp_path / "m.keras", tmp_path / "p.vnnlib"
    first, second = tmp_path / "a.npz", tmp_path / "a-2.npz"
    assert main(["verify-property", str(model), str(prop), "--proof", str(first)]) == DONE
    capsys.readouterr()
    check = ["verify", str(first), str(model), "--property"]
    assert main([*check, str(prop), "--also", str(second)]) == DONE
    assert "p.vnnlib is unsat" in capsys.readouterr().out
    assert main([*check, str(prop)]) == NOT_PROVED
    assert "Nothing is claimed of set 2" in capsys.readouterr().out
    assert main([*check, str(tmp_path / "other.vnnlib"), "--also", str(second), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["holds"] and not record["property_is_unsat"] and record["also"][0]["holds"]
    assert main(["verify", str(first), str(model), "--also", str(second)]) == BAD_INPUT
