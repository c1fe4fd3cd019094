"""Numbers shown as guarantees are rounded to the safe side, and verdicts say what is true."""

from decimal import Decimal

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tf_lyapunov.evaluation import wording
from tf_lyapunov.evaluation.results import Results

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(finite, st.integers(1, 8))
def test_shown_upper_bounds_are_never_below_the_value(value, digits):
    assert Decimal(wording.round_up(value, digits)) >= Decimal(repr(value))


@given(finite, st.integers(1, 8))
def test_shown_lower_bounds_are_never_above_the_value(value, digits):
    assert Decimal(wording.round_down(value, digits)) <= Decimal(repr(value))


@given(st.floats(1e-300, 1e300), st.integers(1, 8))
def test_rounding_moves_a_number_by_less_than_one_unit_of_its_last_digit(value, digits):
    unit = Decimal(10) ** (Decimal(repr(value)).adjusted() - digits + 1)
    for show in (wording.number, wording.round_up, wording.round_down):
        assert abs(Decimal(show(value, digits)) - Decimal(repr(value))) < unit


@given(st.integers(1, 10_000), st.data())
def test_certified_percentages_are_exact_or_rounded_down(count, data):
    share = data.draw(st.integers(0, count))
    shown = Decimal(wording.percent_down(share / count).removesuffix("%"))
    assert 0 <= Decimal(100 * share) / count - shown < Decimal("0.1")


def test_a_decimal_share_is_shown_as_itself():
    assert [wording.percent_down(k / 1000) for k in (289, 290, 570, 1000)] == [
        "28.9%",
        "29.0%",
        "57.0%",
        "100.0%",
    ]


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf"), "text", True, object()])
def test_what_is_no_finite_number_is_shown_as_missing(missing):
    for show in (wording.number, wording.round_up, wording.round_down, wording.percent):
        assert show(missing) == wording.MISSING


def design(**changes):
    return {"rule": "sound", "verdict": "PROVED", "gain": 2.0, "check": {"holds": True}, **changes}


def verdict(**fields):
    return wording.verdict(Results(title="t", **fields))


def test_a_proved_design_with_a_holding_check_is_proved():
    assert verdict(design=design()).state == "proved"


@pytest.mark.parametrize(
    "changes", [{"verdict": "NOT_PROVED"}, {"check": {"holds": False}}, {"check": None}]
)
def test_a_design_alone_never_makes_a_proof(changes):
    found = verdict(design=design(**changes), gain={"upper_bound": 1.5})
    assert found.state == "not_proved"
    assert any("within it" in sentence for sentence in found.sentences)
    found = verdict(design=design(**changes), gain={"upper_bound": 2.5})
    assert not any("within it" in sentence for sentence in found.sentences)


def test_a_certificate_without_a_design_certifies_decisions_only():
    found = verdict(certificate={"verdict": "PROVED", "gain_upper_bound": 3.0})
    assert (found.state, found.promise) == ("certified", "")
    assert any("at most 3 × d" in sentence for sentence in found.sentences)


def test_a_certificate_that_proves_nothing_is_not_a_success():
    found = verdict(certificate={"verdict": "NOT_PROVED", "gain_upper_bound": 3.0})
    assert found.state == "none"
    assert "no decision" in found.headline


@pytest.mark.parametrize(
    "row",
    [
        {"radius": 0.1, "certified": 0.5, "attacked": {"PGD": 0.499}},
        {"radius": 0.1, "certified": 0.5, "attacked": {"PGD": 0.6}, "broken": {"PGD": 1}},
    ],
)
def test_a_broken_certificate_overrides_every_proof(row):
    found = verdict(design=design(), rows=[row])
    assert found.state == "broken"
    assert any("PGD" in sentence for sentence in found.sentences)


def test_a_measured_gain_above_its_bound_is_a_contradiction():
    assert verdict(gain={"upper_bound": 1.0, "measured_max": 1.01}).state == "broken"
    assert verdict(gain={"upper_bound": 1.0, "measured_max": 1.0001}).state != "broken"


def test_an_attack_in_another_norm_contradicts_no_l2_certificate():
    row = {"radius": 0.1, "certified": 0.5, "attacked": {"PGD l∞": 0.1}}
    attacks = [{"name": "PGD l∞", "norm": "linf"}]
    assert verdict(design=design(), rows=[row], attacks=attacks).state == "proved"
    assert verdict(design=design(), rows=[row]).state == "broken"


def test_the_meaning_of_a_radius_uses_the_size_of_the_input():
    text = wording.radius_meaning(
        Results(title="t", rows=[{"radius": 0.5}], dataset={"input_shape": [2, 2, 1]})
    )
    assert "4 input values" in text and "all of them by 0.25" in text
    assert wording.radius_meaning(Results(title="t")) == ""
