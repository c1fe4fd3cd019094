"""VNN-LIB 2.0: the package's syntax tree means what it says, and what it cannot mean is refused."""

from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("vnnlib", reason="the extra `onnx` is not installed")

from tf_lyapunov.errors import PropertyFileError
from tf_lyapunov.vnnlib.files import read_vnnlib
from tf_lyapunov.vnnlib.sets import cases
from tf_lyapunov.vnnlib.version2 import parse_version_2

VERSION = "(vnnlib-version <2.0>)\n"


def network(kind="real", x="[2]", y="[2]"):
    return (
        f"{VERSION}(declare-network N (declare-input X {kind} {x}) (declare-output Y {kind} {y}))\n"
    )


BOX = "".join(f"(assert (<= X[{i}] 1.0)) (assert (>= X[{i}] -1.0))\n" for i in range(2))


@pytest.mark.parametrize("text, holds", [
    ("(assert (<= Y[0] 0.5))", lambda x, y: y[0] <= Fraction(1, 2)),
    ("(assert (< (+ (* 2.0 X[0]) Y[1]) 3.0))", lambda x, y: 2 * x[0] + y[1] < 3),
    ("(assert (>= (- Y[0] Y[1] 0.5) (- X[1])))",
     lambda x, y: y[0] - y[1] - Fraction(1, 2) >= -x[1]),
    ("(assert (== Y[0] 0.5))", lambda x, y: y[0] == Fraction(1, 2)),
    ("(assert (!= Y[0] 0.5))", lambda x, y: y[0] != Fraction(1, 2)),
    ("(assert (or (> Y[0] 1.0) (and (< Y[1] 0.0) (<= X[0] 0.0))))",
     lambda x, y: y[0] > 1 or (y[1] < 0 and x[0] <= 0)),
])  # fmt: skip
def test_formulas_hold_where_they_say(text, holds):
    query = parse_version_2(network() + text)
    values = [Fraction(v) for v in ("-1", "0", "0.4", "0.5", "0.6", "1.5")]
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        x, y = ([values[k] for k in rng.integers(0, len(values), 2)] for _ in "xy")
        assert query.holds(x, y) == holds(x, y)
        seen.add(query.holds(x, y))
    assert seen == {True, False}


def test_an_equality_is_two_inequalities_and_an_inequation_two_sets():
    [case] = cases(parse_version_2(network() + BOX + "(assert (== Y[0] 0.5))"))
    assert case.sets[0][0].tolist() == [[1, 0], [-1, 0]]
    [case] = cases(parse_version_2(network() + BOX + "(assert (!= Y[0] 0.5))"))
    assert [s[2].tolist() for s in case.sets] == [[True], [True]]


def test_indices_run_through_a_tensor_row_by_row():
    query = parse_version_2(network(x="[2,3]", y="[1]") + "(assert (<= X[1,0] 0.5))")
    assert query.shapes == ((2, 3), (1,)) and query.inputs == 6
    x = [9] * 6
    assert not query.holds(x, [0])
    x[3] = 0
    assert query.holds(x, [0])


def test_numbers_that_a_type_rounds_are_read_both_ways():
    """0.1 lies between two numbers of float32: the box holds the upper, a point the lower one."""
    query = parse_version_2(network("float32") + BOX + "(assert (<= X[0] 0.1))")
    [case] = cases(query)
    above = np.float32(0.1)
    below = np.nextafter(above, np.float32(0))
    assert Fraction(float(below)) < Fraction("0.1") < Fraction(float(above))
    assert case.high[0] == above and case.box.inside(np.float32)[1][0] == below
    assert query.holds([below, 0], [0, 0]) and not query.holds([Fraction("0.1"), 0], [0, 0])
    # Reals are exact.
    query = parse_version_2(network("real") + BOX + "(assert (<= X[0] 0.1))")
    assert query.holds([Fraction("0.1"), 0], [0, 0])


def test_contradictory_bounds_are_an_empty_set():
    assert cases(parse_version_2(network() + BOX + "(assert (> X[0] 1.0))")) == []


def test_a_missing_bound_is_refused():
    with pytest.raises(PropertyFileError, match="where X_1 lacks one"):
        cases(parse_version_2(network() + "(assert (<= X[0] 1.0)) (assert (>= X[0] 1.0))"))


TWO = network() + "(declare-network M (declare-input A real [2]) (declare-output B real [2]))\n"


@pytest.mark.parametrize("text, message", [
    (TWO + BOX, "about one network"),
    (VERSION + "(declare-network N (declare-input X real [2]) (declare-input Z real [2])"
     "(declare-output Y real [2]))" + BOX, "one input"),
    (VERSION + '(declare-network N (declare-input X real [2]) (declare-hidden H real [2] "h")'
     "(declare-output Y real [2]))" + BOX, "Hidden nodes"),
    (network("bfloat16") + BOX, "Types must be"),
    (network() + "(assert (<= (* X[0] X[1]) 1.0))", "not linear"),
    (network("float32") + "(assert (<= (* 0.1 X[1]) 1.0))", "declared type, which rounds"),
    (network("float16") + "(assert (<= X[1] 1000000.0))", "declared type holds"),
    (network() + "(assert (<= X[7] 1.0))", "refused by the package vnnlib"),
    (network() + "(assert (<= X[0] 1e-3))", "refused by the package vnnlib"),
    (network() + "(assert (<= " + "(+ 1.0 " * 300 + "X[0]" + ")" * 300 + " 1.0))", "200 deep"),
    (network().replace("2.0", "3.1") + BOX, "Versions 1.0 and 2.0"),
    (VERSION, "refused by the package vnnlib"),
])  # fmt: skip
def test_what_cannot_be_stated_is_refused(text, message):
    with pytest.raises(PropertyFileError) as error:
        parse_version_2(text)
    assert message in str(error.value) and "Received" in str(error.value)


def test_a_file_says_its_version_itself(tmp_path):
    (tmp_path / "two.vnnlib").write_text("; a comment\n" + network() + BOX)
    query = read_vnnlib(tmp_path / "two.vnnlib")
    assert query.shapes == ((2,), (2,)) and str(tmp_path) in query.source


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vnnlib", None)
    with pytest.raises(ImportError, match=r"tf_lyapunov\[onnx\]"):
        parse_version_2(network() + BOX)
