"""Conditions on the inputs and outputs of a network, in exact rational numbers.

A formula is an `Inequality`, or `And` or `Or` of formulas. `And(())` holds always, `Or(())` never.
"""

import dataclasses
import math
from fractions import Fraction

from tf_lyapunov.errors import PropertyFileError

# Sets of a disjunction of conjunctions, and inequalities in all of them, at most.
MOST_SETS, MOST_INEQUALITIES = 10_000, 2_000_000


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Inequality:
    """Σ a_i x_i + Σ c_j y_j ≤ bound, or < if it is strict.

    Attributes:
        inputs, outputs: dicts from positions to their coefficients, `Fraction`, none of them 0.
        bound: `Fraction`; where numbers can be read in two ways, the smaller one.
        widest: the larger one.
        strict: whether it is <.
        place: `(line, column)` in the file; the column may be None.
    """

    inputs: dict
    outputs: dict
    bound: Fraction
    widest: Fraction
    strict: bool
    place: tuple

    def holds(self, x, y):
        """Whether it holds at inputs and outputs, sequences of `Fraction`."""
        value = sum((a * x[i] for i, a in self.inputs.items()), Fraction(0))
        value += sum((c * y[j] for j, c in self.outputs.items()), Fraction(0))
        return value < self.bound if self.strict else value <= self.bound


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class And:
    """All parts hold."""

    parts: tuple

    def holds(self, x, y):
        """Whether it holds at inputs and outputs, sequences of `Fraction`."""
        return all(part.holds(x, y) for part in self.parts)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Or:
    """One part holds at least."""

    parts: tuple

    def holds(self, x, y):
        """Whether it holds at inputs and outputs, sequences of `Fraction`."""
        return any(part.holds(x, y) for part in self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """What a VNN-LIB file asks: is there an input x with outputs y = f(x) for which this holds?

    Attributes:
        inputs, outputs: how many numbers the file declares, in the order of its declarations.
        formula: of x and y.
        shapes: `(inputs, outputs)` as the file declares them, or None.
        source: name of the file.

    Example:

    >>> from tf_lyapunov.vnnlib.reading import parse
    >>> text = "(declare-const X_0 Real) (declare-const Y_0 Real)"
    >>> query = parse(text + "(assert (<= X_0 0.1)) (assert (< Y_0 (* 2 X_0)))")
    >>> query.holds([Fraction(1, 10)], [0.1]), query.holds([0.1], [0.1])
    (True, False)
    """

    inputs: int
    outputs: int
    formula: And
    shapes: tuple | None = None
    source: str = "the text"

    def holds(self, x, y):
        """Whether finite numbers, taken exactly, satisfy what the file states.

        Args:
            x, y: sequences of `inputs` and `outputs` numbers, floats or `Fraction`.
        """
        if not all(math.isfinite(v) for v in (*x, *y)):
            return False
        return self.formula.holds(*([_exact(v) for v in values] for values in (x, y)))


def _exact(value):
    return value if isinstance(value, Fraction) else Fraction(float(value))


def sizes(formula):
    """`(sets, inequalities)` that a formula has as a disjunction of conjunctions."""
    if isinstance(formula, Inequality):
        return 1, 1
    counts = [sizes(part) for part in formula.parts]
    if isinstance(formula, Or):
        return sum(n for n, _ in counts), sum(m for _, m in counts)
    if any(n == 0 for n, _ in counts):
        return 0, 0
    sets = math.prod(n for n, _ in counts)
    return sets, sum(m * (sets // n) for n, m in counts)


def conjunctions(formula):
    """A formula as a disjunction of conjunctions: a list of tuples of `Inequality`.

    Raises:
        PropertyFileError: if there would be too many, before they are made.
    """
    sets, total = sizes(formula)
    if sets > MOST_SETS or total > MOST_INEQUALITIES:
        raise PropertyFileError(
            f"A property may have {MOST_SETS} unsafe sets of {MOST_INEQUALITIES} inequalities in "
            f"all, at most. Received: more. Split the file into several."
        )
    return _expanded(formula)


def _expanded(formula):
    if isinstance(formula, Inequality):
        return [(formula,)]
    if isinstance(formula, Or):
        return [clause for part in formula.parts for clause in _expanded(part)]
    if sizes(formula)[0] == 0:
        return []
    # Parts of one set first: they are joined once.
    single = [_expanded(part) for part in formula.parts if sizes(part)[0] == 1]
    found = [tuple(held for (clause,) in single for held in clause)]
    for part in formula.parts:
        if sizes(part)[0] != 1:
            own = _expanded(part)
            found = [clause + other for clause in found for other in own]
    return found
