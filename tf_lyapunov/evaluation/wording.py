"""Numbers and sentences of the report: what is proved, in plain words, rounded to the safe side."""

from __future__ import annotations

import dataclasses
import decimal
import math
from typing import Any

MISSING = "n/a"
_DIGITS = 4
# Differences of float32 outputs keep about three digits at the radii in use, so a measured gain
# counts as above its bound only beyond this factor.
_MEASURED_SLACK = 1 + 2.0**-10
# Designs by gains alone write δ → ∞ as a number near 1e9.
_STANDS_FOR_INFINITY = 1e6


def number(value: float | None, digits: int = _DIGITS) -> str:
    """`value` with `digits` significant digits, rounded to nearest; for measured numbers."""
    return _significant(value, digits, decimal.ROUND_HALF_EVEN)


def round_up(value: float | None, digits: int = _DIGITS) -> str:
    """`value` with `digits` significant digits, never below `value` as float64; for upper bounds.

    Example:
        >>> round_up(1.00001), round_up(0.25), round_up(None)
        ('1.001', '0.25', 'n/a')
    """
    return _significant(value, digits, decimal.ROUND_CEILING)


def round_down(value: float | None, digits: int = _DIGITS) -> str:
    """`value` with `digits` significant digits, never above `value`; for radii and margins."""
    return _significant(value, digits, decimal.ROUND_FLOOR)


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal, rounded to nearest.

    Example:
        >>> percent(0.98765), percent_down(0.98765), percent(None)
        ('98.8%', '98.7%', 'n/a')
    """
    return _percent(value, decimal.ROUND_HALF_EVEN)


def percent_down(value: float | None) -> str:
    """A share as a percentage with one decimal, never above `value`; for certified accuracies."""
    return _percent(value, decimal.ROUND_FLOOR)


def percent_up(value: float | None) -> str:
    """A share as a percentage with one decimal, never below `value`; for shares of a budget."""
    return _percent(value, decimal.ROUND_CEILING)


def _decimal(value: Any) -> decimal.Decimal | None:
    if value is None or isinstance(value, (bool, str)):
        return None
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):  # undefined in a template, or no number
        return None
    # The shortest decimal that reads back as this float64, so that 1.31 is shown as 1.31 although
    # the nearest float64 lies 5e-17 above it.
    return decimal.Decimal(repr(value)) if math.isfinite(value) else None


def _significant(value: Any, digits: int, rounding: str) -> str:
    exact = _decimal(value)
    if exact is None:
        return MISSING
    if exact == 0:
        return "0"
    rounded = decimal.Context(prec=digits, rounding=rounding).plus(exact)
    if -4 <= rounded.adjusted() < 7:
        text = format(rounded, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return format(rounded.normalize(), "e")


def _percent(value: Any, rounding: str) -> str:
    exact = _decimal(value)
    if exact is None:
        return MISSING
    return f"{(exact * 100).quantize(decimal.Decimal('0.1'), rounding=rounding)}%"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The report's conclusion.

    Attributes:
        state: "proved" (what was promised holds for the trained weights), "certified" (nothing
            was promised, single inputs are certified), "not_proved", "broken" (an attack
            contradicts a proof: a defect), or "none".
        headline: one line.
        promise: what was promised, or "".
        sentences: what is proved, what is not, each a plain sentence.
    """

    state: str
    headline: str
    promise: str
    sentences: tuple[str, ...]


def verdict(results) -> Verdict:
    """Conclusion of a cleaned `results.Results`, in words for a newcomer."""
    design, certificate = results.design or {}, results.certificate or {}
    promise, sentences = _promise(design), []
    proved_gain = proved_gain_of(results)
    claimed_gain = design.get("gain")
    state = "none"
    if design:
        state, more = _design_state(design, proved_gain, claimed_gain)
        sentences += more
    if certificate or proved_gain is not None:
        if state == "none" and certificate.get("verdict", "PROVED") == "PROVED":
            state = "certified"
        sentences += _certified(results, proved_gain, certificate)
    contradictions = _contradictions(results, proved_gain)
    if contradictions:
        return Verdict(
            "broken",
            "Contradiction: a measurement breaks a proof on this page",
            promise,
            (*contradictions, "Rely on no number here, and please report this as a defect."),
        )
    headline = {
        "proved": "Proved: the trained network keeps what was promised",
        "certified": "No promise was made; decisions are certified one by one",
        "not_proved": "Not proved: the promise is not established for this network",
        "none": "Nothing is proved: no decision could be certified"
        if certificate
        else "Nothing is proved: this run has neither a design nor a certificate",
    }[state]
    return Verdict(state, headline, promise, tuple(sentences))


def proved_gain_of(results) -> float | None:
    """The proved upper bound of the network's gain, from the gain table or the certificate."""
    bound = results.gain.get("upper_bound")
    return (results.certificate or {}).get("gain_upper_bound") if bound is None else bound


def _promise(design: dict[str, Any]) -> str:
    gain = design.get("gain")
    if gain is None:
        return ""
    return (
        "However two inputs are chosen, the network's output scores differ by at most "
        f"{round_up(gain)} times the distance between the inputs."
    )


def _design_state(design, proved_gain, claimed_gain) -> tuple[str, list[str]]:
    check = design.get("check") or {}
    rule = design.get("rule") or "unknown"
    if design.get("verdict") == "PROVED" and check.get("holds"):
        return "proved", [
            "The design proves the promise for all networks whose layers stay within their "
            "budgets, and upper bounds of every layer show that the trained ones do."
        ]
    sentences = []
    if design.get("verdict") != "PROVED":
        sentences.append(
            f"The layers' budgets come from the rule “{rule}”, which does not prove the promise: "
            "it is kept to rebuild published results."
        )
    elif check:
        sentences.append(
            "The design proves the promise for networks within their budgets, but the check of "
            "the trained layers failed."
        )
    else:
        sentences.append(
            "The design proves the promise for networks within their budgets; whether the trained "
            "layers are was not checked in this run."
        )
    if proved_gain is not None and claimed_gain is not None and proved_gain <= claimed_gain:
        sentences.append(
            "What the promise says about distances holds all the same: the certificate's own bound "
            f"on the gain, {round_up(proved_gain)}, is within it."
        )
    return "not_proved", sentences


def _certified(results, proved_gain, certificate) -> list[str]:
    sentences = []
    if proved_gain is not None:
        sentences.append(
            f"Proved for the trained network: moving an input by a distance d moves its output "
            f"scores by at most {round_up(proved_gain)} × d."
        )
    certified = [row for row in results.rows if row.get("certified") is not None]
    positive = [row for row in certified if row.get("radius")]
    if positive:
        row = positive[0]
        count = f" of the {row['count']} test inputs" if row.get("count") else " of the test inputs"
        sentences.append(
            f"Proved input by input: {percent_down(row['certified'])}{count} are classified "
            f"correctly, and no change of length up to {number(row['radius'])} can alter that."
        )
    elif certificate.get("median_radius"):
        sentences.append(
            "Half of the inputs have a certified radius of at least "
            f"{round_down(certificate['median_radius'])}."
        )
    elif certificate.get("median_radius") is not None:
        sentences.append("For half of the inputs or more, no radius is proved.")
    return sentences


def _contradictions(results, proved_gain) -> list[str]:
    found, others = [], attacks_outside_l2(results)
    for row in results.rows:
        for name, broken in (row.get("broken") or {}).items():
            if broken:
                found.append(
                    f"The attack “{name}” broke {broken} certificates at radius "
                    f"{number(row.get('radius'))}."
                )
        attacked = row.get("attacked") or {}
        for name, accuracy in attacked.items():
            certified = row.get("certified")
            if name in others or None in (accuracy, certified):
                continue
            # Shares of n inputs differ by at least 1/n: this tolerance hides none below n = 10⁹.
            if accuracy < certified - 1e-9:
                found.append(
                    f"At radius {number(row.get('radius'))} the accuracy under “{name}”, "
                    f"{percent(accuracy)}, is below the certified accuracy, {percent(certified)}."
                )
    for example in results.examples:
        radius, distance = example.get("radius"), example.get("distance")
        # Radii are rounded down and distances up when they are computed.
        if None not in (radius, distance) and distance < radius:
            found.append(
                f"Input {example.get('index')} is decided otherwise at distance "
                f"{round_up(distance)}, within its certified radius {round_down(radius)}."
            )
    measured = results.gain.get("measured_max")
    if None not in (measured, proved_gain) and measured > proved_gain * _MEASURED_SLACK:
        found.append(
            f"A measured gain of {number(measured)} exceeds the proved bound of "
            f"{number(proved_gain)}."
        )
    return found


def class_name(results, number: int | None) -> str:
    """Name of a class, or its number where the data set names none."""
    return _named(results.dataset.get("class_names"), number, str(number))


def feature_name(results, change: dict[str, Any]) -> str:
    """Name of a feature, or its place counted from one."""
    place = str(change.get("feature", ""))
    return _named(results.dataset.get("feature_names"), change.get("index"), f"feature {place}")


def _named(names, number, otherwise):
    if isinstance(names, list) and isinstance(number, int) and 0 <= number < len(names):
        return str(names[number])
    return otherwise


@dataclasses.dataclass(frozen=True)
class DesignTests:
    """Which test proves a design's claim, and what the others mean.

    Attributes:
        decisive: (name, result) of the tests behind the verdict.
        aside: sentences about tests that the verdict does not rest on, or ().
    """

    decisive: tuple[tuple[str, str], ...]
    aside: tuple[str, ...]


def design_tests(design: dict[str, Any]) -> DesignTests:
    """The tests of a `summaries.design_summary`, in words.

    The papers' tests weigh all layers alike. Where a weighted test or the gains prove the claim,
    their failure says nothing, and is told apart from the proof.
    """
    scaled, published = design.get("scaled_margin"), design.get("cascade_margin")
    dominant, bound = design.get("quasi_dominant"), design.get("gain_upper_bound")
    proofs = design.get("layer_proofs")
    by_gain = (design.get("claim") or {}).get("gain") is not None
    decisive, aside = [], []
    if design.get("verdict") == "PROVED":
        weighted = scaled is not None and scaled >= 0 and None not in (proofs or ())
        if weighted and not by_gain:
            decisive.append(
                (
                    "weighted test",
                    f"smallest eigenvalue {round_down(scaled)}, where at least 0 is needed",
                )
            )
        elif bound is not None:
            decisive.append(
                (
                    "product of the layers' gains",
                    f"at most {round_up(bound)}, which the claim allows",
                )
            )
        if published is not None or dominant is not None:
            aside = _aside(design, published, dominant)
        return DesignTests(tuple(decisive), tuple(aside))
    for name, value in (("published test", published), ("weighted test", scaled)):
        if value is not None:
            decisive.append(
                (name, f"smallest eigenvalue {round_down(value)}, where at least 0 is needed")
            )
    if isinstance(dominant, bool):
        decisive.append(("quasi-dominance, published test", "holds" if dominant else "fails"))
    return DesignTests(tuple(decisive), ())


def _aside(design, published, dominant):
    claim = design.get("claim") or {}
    if claim.get("delta") is not None and claim.get("nu") is not None:
        concerns = f"the claim δ = {number(claim['delta'])}, ν = {number(claim['nu'])}"
    else:
        concerns = "the claim"
    found, holds = [], []
    if published is not None:
        found.append(f"its smallest eigenvalue is {round_down(published)}")
        holds.append(published >= 0)
    if isinstance(dominant, bool):
        found.append(f"the matrix is {'' if dominant else 'not '}quasi-dominant")
        holds.append(dominant)
    sentences = [
        f"The papers test {concerns} with the same weight for every layer: "
        f"{' and '.join(found)}. "
        + (
            "By the papers that is enough; the proof above does not need it."
            if any(holds)
            else "That would be enough if the eigenvalue were not negative or the matrix "
            "quasi-dominant. It is not so here, and nothing follows: such a test can fail for "
            "claims that are true, and the proof above does not use it."
        )
    ]
    large = [
        item["delta"]
        for item in design.get("indices") or []
        if item.get("delta") is not None and item["delta"] > _STANDS_FOR_INFINITY
    ]
    if large and not any(holds):
        sentences.append(
            "The numbers are large because this design uses the gains of layers only: an index δ "
            f"of about {number(max(large), 1)} stands for infinity."
        )
    return sentences


def attack_names(rows: list[dict[str, Any]]) -> list[str]:
    """Names of all attacks in the rows, in order of appearance."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row.get("attacked") or {}))
    return list(names)


def attacks_outside_l2(results) -> set[str]:
    """Names of the attacks whose radius is not an l2 norm, which l2 certificates do not cover."""
    return {str(a.get("name")) for a in results.attacks if a.get("norm") not in (None, "l2")}


def radius_meaning(results) -> str:
    """One sentence that makes a radius concrete, or "" without rows or input shape."""
    radii = [row["radius"] for row in results.rows if row.get("radius")]
    shape = results.dataset.get("input_shape")
    if not radii or not shape:
        return ""
    radius, size = radii[-1], math.prod(int(side) for side in shape)
    return (
        f"For example, radius {number(radius)} allows one of the {size} input values to change by "
        f"{number(radius)}, or all of them by {number(radius / math.sqrt(size))}, or anything in "
        "between with the same root of the sum of squares."
    )


def accuracy_alt(rows) -> str:
    """What the chart of accuracy by radius shows, in words."""
    text = "Line chart of accuracy against radius."
    for row in rows[-1:]:
        attacked = [
            f"{percent(value)} under {name}" for name, value in (row.get("attacked") or {}).items()
        ]
        parts = [
            f"{percent(row.get('clean'))} clean",
            f"{percent_down(row.get('certified'))} certified",
            *attacked,
        ]
        text += f" At radius {number(row.get('radius'))}: {', '.join(parts)}."
    return text


def config_text(config: dict[str, Any]) -> str:
    """The configuration as YAML, or "" if there is none."""
    if not config:
        return ""
    import yaml

    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
