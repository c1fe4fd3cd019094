"""VNN-LIB 1.0 means what SMT-LIB says, exactly; what is not understood is refused by its place."""

import gzip
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.errors import PropertyFileError
from tf_lyapunov.vnnlib import files, formulas
from tf_lyapunov.vnnlib.answers import decimal, result_text
from tf_lyapunov.vnnlib.files import read_vnnlib
from tf_lyapunov.vnnlib.reading import parse
from tf_lyapunov.vnnlib.sets import cases, toward

DECLARED = "".join(f"(declare-const {v} Real)\n" for v in ("X_0", "X_1", "Y_0", "Y_1"))
SPELLINGS = ["3", "-0.25", "1.5e-1", "+2E2", ".5", "7.", "0.1", "1e-30", "-1.25E+1", "0", "1e40"]
OPERATIONS = {
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "=": lambda a, b: a == b,
}

# The oracle: expressions as nested tuples, their text, and their value by the words themselves.
numbers = st.sampled_from(SPELLINGS) | st.tuples(
    st.just("/"), st.integers(-9, 9).map(str), st.integers(1, 9).map(str)
)


def terms(variables):
    leaves = numbers | st.sampled_from(variables)
    scaled = st.tuples(st.just("*"), numbers, st.sampled_from(variables)) | st.tuples(
        st.just("*"), st.sampled_from(variables), numbers, numbers
    )
    return st.recursive(
        leaves | scaled,
        lambda inner: (
            st.tuples(st.just("+"), inner, inner)
            | st.tuples(st.just("-"), inner)
            | st.tuples(st.just("-"), inner, inner, inner)
            | st.tuples(st.just("/"), inner, st.sampled_from(["3", "-0.5"]))
        ),
        max_leaves=4,
    )


def formulas_of(comparisons):
    return st.recursive(
        comparisons | st.sampled_from(["true", "false"]),
        lambda inner: (
            st.tuples(st.sampled_from(["and", "or"]), inner, inner, inner)
            | st.tuples(st.sampled_from(["and", "or", "not"]), inner)
        ),
        max_leaves=6,
    )


def comparisons(term):
    symbol = st.sampled_from(list(OPERATIONS))
    return st.tuples(symbol, term, term) | st.tuples(symbol, term, term, term)


def text_of(expression):
    if isinstance(expression, str):
        return expression
    return "(" + "  ".join(map(text_of, expression)) + " ) ; said\n"


def value_of(expression, at):
    if isinstance(expression, str):
        if expression in ("true", "false"):
            return expression == "true"
        return at[expression] if expression in at else Fraction(expression)
    name, *parts = expression
    held = [value_of(part, at) for part in parts]
    if name in OPERATIONS:
        return all(OPERATIONS[name](a, b) for a, b in zip(held, held[1:], strict=False))
    if name == "and":
        return all(held)
    if name == "or":
        return any(held)
    if name == "not":
        return not held[0]
    if name == "-" and len(held) == 1:
        return -held[0]
    found = held[0]
    for other in held[1:]:
        found = {"+": found + other, "-": found - other, "*": found * other,
                 "/": found / other if name == "/" else None}[name]  # fmt: skip
    return found


points = st.tuples(*[st.fractions(-3, 3, max_denominator=8) | st.just(Fraction("0.1"))] * 4)


@settings(max_examples=100)
@given(formulas_of(comparisons(terms(["X_0", "X_1", "Y_0", "Y_1"]))), points)
def test_a_formula_holds_where_its_expressions_say_so(expression, point):
    query = parse(DECLARED + f"(assert {text_of(expression)})")
    at = dict(zip(("X_0", "X_1", "Y_0", "Y_1"), point, strict=True))
    assert query.holds(point[:2], point[2:]) == value_of(expression, at)


def in_a_set(query, x, y):
    """Whether a point is in the boxes and polyhedra, whose float64 numbers are taken exactly."""
    for case in cases(query):
        ends = [[Fraction(float(v)) for v in end] for end in (case.low, case.high)]
        if not all(a <= v <= b for a, v, b in zip(ends[0], x, ends[1], strict=True)):
            continue
        for rows, bounds, strict in case.sets:
            held = [
                sum(Fraction(float(c)) * v for c, v in zip(row, y, strict=True))
                - Fraction(float(b))
                for row, b in zip(rows, bounds, strict=True)
            ]
            if all(v < 0 if s else v <= 0 for v, s in zip(held, strict, strict=True)):
                return True
    return False


single = st.tuples(
    st.sampled_from(["<=", "<", ">=", ">", "="]),
    st.sampled_from(["X_0", "X_1", ("*", "-3", "X_0"), ("-", "X_1", "0.1")]),
    st.sampled_from(["0.1", "0.5", "-0.7", "1e-3", "0"]),
)
output = st.tuples(
    st.sampled_from(["<=", "<", ">=", ">"]),
    terms(["Y_0", "Y_1"]),
    st.sampled_from(["0.1", "0.5", "-0.7", "0"]),
)
BOUNDED = "".join(f"(assert (<= {v} 1)) (assert (>= {v} -1.0))" for v in ("X_0", "X_1"))


@settings(max_examples=100)
@given(formulas_of(single | output), points)
def test_boxes_and_polyhedra_hold_every_point_of_the_file(expression, point):
    query = parse(DECLARED + BOUNDED + f"(assert {text_of(expression)})")
    try:
        found = in_a_set(query, point[:2], point[2:])
    except PropertyFileError as error:
        assert "whole numbers of 53 bits" in str(error) or "float64 holds" in str(error)
        return
    inside = query.holds(point[:2], point[2:])
    assert found or not inside
    # Points of few digits are off every rounded bound unless they lie on one.
    if found and not inside:
        at = dict(zip(("X_0", "X_1", "Y_0", "Y_1"), point, strict=True))
        near = [Fraction(s) * Fraction(1, 10**12) for s in (-1, 1)]
        moved = [
            value_of(expression, {**at, "X_0": at["X_0"] + a, "X_1": at["X_1"] + b,
                                  "Y_0": at["Y_0"] + c, "Y_1": at["Y_1"] + d})
            and all(abs(v) <= 1 for v in (at["X_0"] + a, at["X_1"] + b))
            for a in (0, *near) for b in (0, *near) for c in (0, *near) for d in (0, *near)
        ]  # fmt: skip
        assert any(moved)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(st.fractions() | st.floats(-1e39, 1e39).map(Fraction), st.booleans(), st.booleans())
def test_the_next_number_of_a_type_is_beyond_the_value_and_the_nearest_there(
    dtype, value, up, strict
):
    sign = 1 if up else -1
    found = toward(value, dtype, sign, strict)
    with np.errstate(over="ignore"):
        before = np.nextafter(found, dtype(-sign * np.inf))

    def beyond(number):
        if np.isinf(number):
            return (number > 0) == up
        away = (Fraction(float(number)) - value) * sign
        return away > 0 or (away == 0 and not strict)

    assert found.dtype == dtype and beyond(found) and not beyond(before)


ACAS = "".join(f"(declare-const X_{i} Real)\n" for i in range(5)) + "".join(
    f"(declare-const Y_{i} Real)\n" for i in range(5)
)


def box_of(low, high):
    return "".join(
        f"(assert (<= X_{i} {b}))\n(assert (>= X_{i} {a}))\n"
        for i, (a, b) in enumerate(zip(low, high, strict=True))
    )


def test_a_threshold_of_one_output_is_a_box_and_one_row():
    low, high = (
        ("0.6", "-0.5", "-0.5", "0.45", "-0.5"),
        ("0.679857769", "0.5", "0.5", "0.5", "-0.45"),
    )
    query = parse(ACAS + "; Unsafe if COC >= 1500\n" + box_of(low, high)
                  + "(assert (>= Y_0 3.991125645861615))")  # fmt: skip
    [case] = cases(query)
    assert case.is_exact and len(case.sets) == 1
    # 0.6 and 0.679857769 have no double: the box ends beyond them, by one number at most.
    assert Fraction(case.low[0]) <= Fraction("0.6") < Fraction(np.nextafter(case.low[0], 1))
    assert Fraction(case.high[0]) >= Fraction("0.679857769")
    rows, bounds, strict = case.sets[0]
    assert rows.tolist() == [[-1, 0, 0, 0, 0]] and not strict.any()
    assert Fraction(bounds[0]) >= Fraction("-3.991125645861615")


def test_the_largest_output_is_one_set_of_four_rows():
    query = parse(ACAS + box_of(["0"] * 5, ["1"] * 5)
                  + "".join(f"(assert (<= Y_{i} Y_0))" for i in range(1, 5)))  # fmt: skip
    [case] = cases(query)
    [(rows, bounds, strict)] = case.sets
    assert rows.shape == (4, 5) and not bounds.any() and not strict.any()
    assert not case.property().resolved(5).breaks(np.array([[1.0, 0, 2, 0, 0]]))[0]
    assert case.property().resolved(5).breaks(np.array([[2.0, 0, 2, 0, 0]]))[0]


def test_an_output_that_is_not_the_least_is_a_set_per_other_output():
    query = parse(ACAS + box_of(["0"] * 5, ["1"] * 5) + """
        (assert (or
            (and (<= Y_0 Y_4))
            (and (<= Y_1 Y_4))
            (and (<= Y_2 Y_4))
            (and (<= Y_3 Y_4))
        ))""")  # fmt: skip
    [case] = cases(query)
    assert [s[0].tolist() for s in case.sets] == [
        [[1.0 if j == i else -1.0 if j == 4 else 0.0 for j in range(5)]] for i in range(4)
    ]


def test_sets_of_several_conjunctions_keep_their_rows_together():
    query = parse(ACAS + box_of(["0"] * 5, ["1"] * 5) + """(assert (or
        (and (<= Y_3 Y_0) (<= Y_3 Y_1) (<= Y_3 Y_2))
        (and (<= Y_4 Y_0) (<= Y_4 Y_1) (<= Y_4 Y_2))
    ))""")  # fmt: skip
    [case] = cases(query)
    assert [len(s[0]) for s in case.sets] == [3, 3]


def test_a_union_of_boxes_has_the_outputs_of_each():
    query = parse(ACAS + """
    (assert (or
        (and (<= X_0 0.7) (>= X_0 -0.1) (<= X_1 0.5) (>= X_1 0.11) (<= X_2 -0.49) (>= X_2 -0.5)
             (<= X_3 0.5) (>= X_3 -0.5) (<= X_4 0.5) (>= X_4 -0.5))
        (and (<= X_0 0.7) (>= X_0 -0.1) (<= X_1 -0.11) (>= X_1 -0.5) (<= X_2 -0.49) (>= X_2 -0.5)
             (<= X_3 0.5) (>= X_3 -0.5) (<= X_4 0.5) (>= X_4 -0.5))
    ))
    (assert (or (and (<= Y_1 Y_0)) (and (<= Y_2 Y_0)) (and (<= Y_3 Y_0)) (and (<= Y_4 Y_0))))
    """)  # fmt: skip
    found = cases(query)
    assert [len(case.sets) for case in found] == [4, 4]
    assert [case.low[1] > 0 for case in found] == [True, False]


def test_clauses_of_inputs_and_outputs_are_boxes_with_their_own_sets():
    query = parse(DECLARED + BOUNDED + """(assert (or
        (and (<= X_0 0.0) (>= Y_0 1.0))
        (and (>= X_0 0.0) (>= X_1 0.5) (< Y_0 -1.0) (> Y_1 2))))""")  # fmt: skip
    first, second = cases(query)
    assert first.high.tolist() == [0, 1] and second.low.tolist() == [0, 0.5]
    assert len(first.sets[0][0]) == 1 and second.sets[0][2].tolist() == [True, True]


def test_784_pixels_end_at_numbers_that_float32_holds_next_to_the_files():
    pixels = "".join(f"(declare-const X_{i} Real)\n" for i in range(784))
    outputs = "".join(f"(declare-const Y_{j} Real)\n" for j in range(10))
    text = (
        pixels
        + outputs
        + box_of(["0.0"] * 784, ["0.029999999329447746"] * 784)
        + (
            "(assert (or"
            + "".join(f"(and (>= Y_{j} Y_8))" for j in range(8))
            + "(and (>= Y_9 Y_8))))"
        )
    )
    [case] = cases(parse(text))
    assert len(case.sets) == 9
    # The nearest float32 lies above the decimal, so that its corner is no counterexample.
    nearest = np.float32(0.03)
    assert Fraction(float(nearest)) > Fraction("0.029999999329447746")
    _, high = case.box.inside(np.float32)
    assert np.all(high == np.nextafter(nearest, np.float32(0))) and case.high[0] == nearest


def test_conditions_on_several_inputs_are_left_out_of_the_box_and_said_to_be():
    query = parse(DECLARED + BOUNDED + "(assert (<= (+ X_0 X_1) 0.5)) (assert (>= Y_0 1))")
    [case] = cases(query)
    assert not case.is_exact and case.high.tolist() == [1, 1]
    assert not query.holds([1, 1], [2, 0]) and query.holds([0.25, 0.25], [2, 0])


@pytest.mark.parametrize("contradiction", [
    "(assert (>= X_0 2))", "(assert (< X_0 -1))", "(assert false)", "(assert (or))",
    "(assert (<= 1 0))", "(assert (and (> X_1 0.5) (< X_1 0.5)))", "(assert (not (<= X_0 1)))",
])  # fmt: skip
def test_contradictions_are_empty_sets(contradiction):
    assert cases(parse(DECLARED + BOUNDED + contradiction)) == []


def test_a_point_is_no_contradiction():
    [case] = cases(parse(DECLARED + BOUNDED + "(assert (= X_0 0.1)) (assert (>= Y_0 0))"))
    assert case.low[0] < case.high[0] and case.box.inside(np.float32) is None
    [case] = cases(parse(DECLARED + BOUNDED + "(assert (= X_0 0.5)) (assert (>= Y_0 0))"))
    assert case.low[0] == case.high[0] == 0.5 and case.box.inside(np.float32) is not None


@pytest.mark.parametrize("text, message", [
    ("(assert (<= X_0 X_9))", "X_9 is not declared before its use. Received: 'X_9"),
    ("(assert (<= (* X_0 X_1) 1))", "not linear"),
    ("(assert (<= (* 2 Y_0 X_1) 1))", "not linear"),
    ("(assert (<= (/ X_0 Y_0) 1))", "not linear"),
    ("(assert (<= (/ X_0 0.0) 1))", "by zero"),
    ("(assert (<= (sin X_0) 1))", "+, -, * or /"),
    ("(assert (<= X_0 0x1F))", "A term must be a number"),
    ("(assert (<= X_0 1e))", "A term must be a number"),
    ("(assert (<= X_0 inf))", "A term must be a number"),
    ("(assert (<= X_0 \"1\"))", "A term must be a number"),
    ("(assert (<= X_0))", "A formula must be"),
    ("(assert (implies true false))", "A formula must be"),
    ("(assert X_0)", "A formula must be"),
    ("(assert ())", "A formula must be"),
    ("(assert ((<=) X_0 1))", "A formula must be"),
    ("(assert (<= X_0 1e99999))", "exponent of 5000"),
    ("(assert (<= X_0 " + "1" * 3000 + "))", "2000 digits"),
    ("(assert (<= X_0 (* " + "1e5000 " * 20 + ")))", "bits at most"),
    ("(assert (<= X_0 1)", "never closed"),
    (")", "closes nothing"),
    ("assert", "stand in parentheses"),
    ("(assert " + "(and " * 300 + "true" + ")" * 301, "200 deep"),
    ("(assert (<= X_0 |1|))", "may look like this"),
    ("(check-sat)", "A command must be"),
    ("(define-fun f () Real 1)", "A command must be"),
    ("()", "A command must be"),
    ("(declare-const X_0 Real)", "declared twice"),
    ("(declare-const X_2 Int)", "the sort Real"),
    ("(declare-const X_02 Real)", "are named"),
    ("(declare-const Z Real)", "are named"),
    ("(declare-const X_9 Real)", "without X_2"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(text, message):
    with pytest.raises(PropertyFileError) as error:
        parse(DECLARED + text)
    assert message in str(error.value) and "Received" in str(error.value)


def test_a_refusal_names_line_and_column():
    with pytest.raises(PropertyFileError, match="line 6, column 13"):
        parse(DECLARED + "; a comment\n(assert (<= Q_0 1))")


@pytest.mark.parametrize("text, message", [
    ("(assert (<= X_0 1)) (assert (>= Y_0 0))", "where X_0 lacks one"),
    (BOUNDED + "(assert (or (<= X_0 2) (<= Y_0 (+ X_0 1))))", "inputs and outputs at once"),
    ("(assert (<= X_0 1e400)) (assert (>= X_0 0)) (assert (<= X_1 0)) (assert (>= X_1 0))",
     "where X_0 lacks one"),
    (BOUNDED + "(assert (<= (+ Y_0 (* 0.12345678901234567 Y_1)) 0))", "whole numbers of 53 bits"),
    (BOUNDED + "(assert (<= Y_0 1e400))", "that float64 holds"),
])  # fmt: skip
def test_what_is_no_union_of_boxes_is_refused(text, message):
    with pytest.raises(PropertyFileError) as error:
        cases(parse(DECLARED + text))
    assert message in str(error.value)


def test_too_many_sets_are_refused_before_they_are_made():
    many = BOUNDED + "(assert (or (<= Y_0 0) (>= Y_1 0)))" * 400
    with pytest.raises(PropertyFileError, match="10000 unsafe sets"):
        cases(parse(DECLARED + many))
    assert formulas.sizes(parse(DECLARED + many).formula)[0] == 2**400


def test_a_part_that_never_holds_leaves_no_set_without_the_others_products():
    text = "(declare-const X_0 Real)(declare-const Y_0 Real)"
    both = "(assert (or (<= X_0 1) (>= Y_0 2)))"
    query = parse(text + 60 * both + "(assert (or (and (or) (< X_0 1)) false))")  # 2^60 products
    assert formulas.conjunctions(query.formula) == []


def test_files_may_be_compressed_and_damaged_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 2**16)
    text = DECLARED + BOUNDED
    (tmp_path / "a.vnnlib").write_text(text)
    data = gzip.compress(text.encode())
    (tmp_path / "a.vnnlib.gz").write_bytes(data)
    assert read_vnnlib(tmp_path / "a.vnnlib").inputs == 2
    assert read_vnnlib(tmp_path / "a.vnnlib.gz").holds([0, 0], [0, 0])
    (tmp_path / "cut.vnnlib.gz").write_bytes(data[:-9])
    (tmp_path / "no.vnnlib.gz").write_bytes(text.encode())
    (tmp_path / "latin.vnnlib").write_bytes(b"; \xff\n" + text.encode())
    (tmp_path / "bomb.vnnlib.gz").write_bytes(gzip.compress(b" " * 2**16 + b" "))
    (tmp_path / "empty.vnnlib").write_bytes(b"")
    (tmp_path / "inputs.vnnlib").write_text("(declare-const X_0 Real)")
    for name, message in (
        ("cut.vnnlib.gz", "cannot be read"), ("no.vnnlib.gz", "cannot be read"),
        ("latin.vnnlib", "at byte 2"), ("bomb.vnnlib.gz", "bytes at most"),
        ("empty.vnnlib", "an input, X_0"), ("inputs.vnnlib", "an output, Y_0"),
        ("absent.vnnlib", "cannot be read"), (".", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(PropertyFileError) as error:
            read_vnnlib(tmp_path / name)
        assert message in str(error.value), name


@given(st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=32, allow_nan=False,
       allow_infinity=False))  # fmt: skip
def test_decimals_are_the_numbers_themselves(value):
    assert Fraction(decimal(value)) == Fraction(value) and float(decimal(value)) == value


def test_answers_read_as_the_competition_writes_them():
    assert result_text("unsat") == "unsat\n"
    assert result_text("sat", np.float32([0.1]), [-2.5]) == (
        "sat\n((X_0 0.100000001490116119384765625)\n(Y_0 -2.5))\n"
    )
