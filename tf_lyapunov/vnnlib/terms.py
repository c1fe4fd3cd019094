"""Linear terms of VNN-LIB, and comparisons of them.

A number that a type cannot hold may be read as written or as rounded to the type, so a term's
constant is an interval; coefficients must be exact.
"""

import dataclasses
import re
from fractions import Fraction

from tf_lyapunov.vnnlib.formulas import And, Inequality, Or

# Bits of a numerator or denominator at most, so that no file takes forever.
_MOST_BITS = 2**16
# Characters of a number, and its exponent, at most.
_MOST_DIGITS, _MOST_EXPONENT = 2000, 5000
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?", re.ASCII)


class NotLinear(ValueError):
    """A term is no linear function of inputs and outputs; says why."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """Σ a_i x_i + Σ c_j y_j + constant, low ≤ constant ≤ high.

    Attributes:
        inputs, outputs: dicts from positions to `Fraction`.
        low, high: `Fraction`.
    """

    inputs: dict
    outputs: dict
    low: Fraction
    high: Fraction

    @classmethod
    def number(cls, low, high=None):
        """A constant."""
        return cls({}, {}, low, low if high is None else high)

    @classmethod
    def variable(cls, is_input, position):
        """x_i or y_j."""
        held = {position: Fraction(1)}
        return cls(held if is_input else {}, {} if is_input else held, Fraction(0), Fraction(0))

    def is_number(self):
        """Whether no variable is in it."""
        return not self.inputs and not self.outputs

    def plus(self, other):
        """The sum of two terms."""
        return Linear(
            _added(self.inputs, other.inputs),
            _added(self.outputs, other.outputs),
            _small(self.low + other.low),
            _small(self.high + other.high),
        )

    def times(self, factor):
        """The product with a number."""
        if factor == 0:
            return Linear.number(Fraction(0))
        ends = sorted((_small(self.low * factor), _small(self.high * factor)))
        return Linear(
            {i: _small(a * factor) for i, a in self.inputs.items()},
            {j: _small(c * factor) for j, c in self.outputs.items()},
            *ends,
        )


def difference(terms):
    """The first of some terms less the others; the negative of a single one."""
    first, *others = terms
    if not others:
        return first.times(Fraction(-1))
    for other in others:
        first = first.plus(other.times(Fraction(-1)))
    return first


def product(terms):
    """A product in which one term at most has variables.

    Raises:
        NotLinear: if several have, or a factor can be read in two ways.
    """
    found = Linear.number(Fraction(1))
    for term in terms:
        if not found.is_number() and not term.is_number():
            raise NotLinear("A product of two variables is not linear.")
        factor, other = (found, term) if found.is_number() else (term, found)
        found = other.times(_exact(factor))
    return found


def quotient(terms):
    """The first of some terms divided by numbers.

    Raises:
        NotLinear: if a divisor has variables, is 0, or can be read in two ways.
    """
    found, *others = terms
    for other in others:
        if not other.is_number():
            raise NotLinear("A quotient by a variable is not linear.")
        divisor = _exact(other)
        if divisor == 0:
            raise NotLinear("A quotient by zero has no value.")
        found = found.times(1 / divisor)
    return found


def compared(symbol, left, right, place):
    """The formula `left symbol right`.

    Args:
        symbol: `<=`, `<`, `>=`, `>`, `=` or `!=`.
        left, right: `Linear`.
        place: `(line, column)`.
    """
    if symbol in (">=", ">"):
        return compared({">=": "<=", ">": "<"}[symbol], right, left, place)
    if symbol == "=":
        return And(tuple(compared("<=", *pair, place) for pair in ((left, right), (right, left))))
    if symbol == "!=":
        return Or(tuple(compared("<", *pair, place) for pair in ((left, right), (right, left))))
    term, strict = difference((left, right)), symbol == "<"
    if term.is_number() and term.low == term.high:
        # Nothing else is known of it than its truth.
        return And(()) if (term.low < 0 if strict else term.low <= 0) else Or(())
    return Inequality(term.inputs, term.outputs, -term.high, -term.low, strict, place)


def number(text):
    """A numeral, a decimal, or one with a sign or an exponent, exactly; None for other texts."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    if len(text) > _MOST_DIGITS or abs(int(match[1] or 0)) > _MOST_EXPONENT:
        raise NotLinear(
            f"A number may have {_MOST_DIGITS} digits and an exponent of {_MOST_EXPONENT}, at most."
        )
    return Fraction(text)


def _added(first, second):
    found = dict(first)
    for key, value in second.items():
        total = _small(found.get(key, Fraction(0)) + value)
        if total:
            found[key] = total
        else:
            found.pop(key, None)
    return found


def _exact(number):
    if number.low != number.high:
        raise NotLinear("A factor must be a number of the declared type, which rounds this one.")
    return number.low


def _small(number):
    if number.numerator.bit_length() + number.denominator.bit_length() > _MOST_BITS:
        raise NotLinear(f"A number may have {_MOST_BITS} bits at most.")
    return number
