"""Unsafe sets of a query: boxes of inputs, each with the polyhedra of outputs that break it there.

Every box and polyhedron in float64 holds the one that the file states, exactly or rounded outwards.
A polyhedron's row is scaled until its coefficients are whole numbers, so that its bound alone is
rounded.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from tf_lyapunov.errors import PropertyFileError
from tf_lyapunov.local.property import Property
from tf_lyapunov.vnnlib.formulas import conjunctions

# Numbers of all boxes at most.
_MOST_NUMBERS = 50_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Box:
    """Inputs between two ends, as the file states them.

    Attributes:
        low, high: lists of `Fraction`, None where there is no bound.
        low_strict, high_strict: lists of bool, whether the end itself is left out.
    """

    low: list
    high: list
    low_strict: list
    high_strict: list

    def ends(self):
        """`(low, high)`, float64 (inputs,), that hold the box."""
        low = [-math.inf if v is None else toward(v, np.float64, -1) for v in self.low]
        high = [math.inf if v is None else toward(v, np.float64, 1) for v in self.high]
        return np.array(low, np.float64), np.array(high, np.float64)

    def inside(self, dtype):
        """`(low, high)` of the numbers of a type that lie in it, or None if an input has none."""
        low = np.array([toward(v, dtype, 1, s) for v, s in self._pairs("low")], dtype)
        high = np.array([toward(v, dtype, -1, s) for v, s in self._pairs("high")], dtype)
        return (low, high) if np.all(low <= high) else None

    def _pairs(self, name):
        return zip(getattr(self, name), getattr(self, f"{name}_strict"), strict=True)

    def is_empty(self):
        """Whether no real input lies in it."""
        return any(
            low is not None and high is not None and (low > high or (low == high and (a or b)))
            for low, high, a, b in zip(
                self.low, self.high, self.low_strict, self.high_strict, strict=True
            )
        )

    def cut(self, inequalities, widest):
        """The part of it that satisfies inequalities of one input each, as `widest` reads them."""
        lists = [list(v) for v in (self.low, self.high, self.low_strict, self.high_strict)]
        low, high, low_strict, high_strict = lists
        for held in inequalities:
            [(i, factor)] = held.inputs.items()
            end, strict = (held.widest if widest else held.bound) / factor, held.strict
            if factor > 0:
                if high[i] is None or (end, not strict) < (high[i], not high_strict[i]):
                    high[i], high_strict[i] = end, strict
            elif low[i] is None or (end, strict) > (low[i], low_strict[i]):
                low[i], low_strict[i] = end, strict
        return Box(*lists)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A box of inputs, and the outputs that break the property there.

    Attributes:
        box: `Box`, the smaller one where numbers can be read in two ways.
        low, high: float64 (inputs,), that hold it, and the larger one.
        sets: list of `(rows, bounds, strict)`, {y : rows y ≤ bounds}, < in strict rows.
        is_exact: whether the file states this box, without other conditions on the inputs.
    """

    box: Box
    low: np.ndarray
    high: np.ndarray
    sets: list
    is_exact: bool

    def property(self):
        """`Property` that holds where no output lies in one of the sets."""
        count = sum(len(s[0]) for s in self.sets)
        return Property(
            lambda outputs: self.sets, f"outside of {len(self.sets)} sets of {count} inequalities"
        )


def cases(query):
    """The unsafe set of a `Query` as a list of `Case`, one per box; empty if the set is.

    Conditions on several inputs at once are left out of the sets, which then hold more than the
    file states: enough for `unsat`. Every `sat` is checked against the file itself.

    Raises:
        PropertyFileError: for an input without bounds, a condition on inputs and outputs at once,
            numbers that float64 cannot hold, or too many sets.
    """
    clauses = conjunctions(query.formula)
    if len(clauses) * query.inputs > _MOST_NUMBERS:
        raise PropertyFileError(
            f"A property may have boxes of {_MOST_NUMBERS} numbers in all, at most. Received: "
            f"{len(clauses)} sets of {query.inputs} inputs, in {query.source}. Split the file."
        )
    nothing = [None] * query.inputs, [False] * query.inputs
    whole = Box(nothing[0], nothing[0], nothing[1], nothing[1])
    found = {}
    for clause in clauses:
        single, several, outputs = [], [], []
        for held in clause:
            if held.inputs and held.outputs:
                _refuse("A condition on inputs and outputs at once is not supported.", held, query)
            where = outputs if held.outputs else single if len(held.inputs) == 1 else several
            where.append(held)
        # Whatever is left of neither compares numbers that can be read in two ways.
        if any(_is_false(held) for held in several if not held.inputs):
            continue
        several = [held for held in several if held.inputs]
        widest = whole.cut(single, True)
        if widest.is_empty():
            continue
        low, high = widest.ends()
        open_ = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))
        if open_.size:
            raise PropertyFileError(
                "Every input needs a lower and an upper bound, in each of the sets that `or` "
                f"joins. Received: {query.source}, where X_{open_[0]} lacks one"
                + (f", as {open_.size - 1} others do." if open_.size > 1 else ".")
            )
        key = (low.tobytes(), high.tobytes(), bool(several))
        if key not in found:
            found[key] = Case(whole.cut(single, False), low, high, [], not several)
        found[key].sets.append(_polyhedron(outputs, query))
    return list(found.values())


def toward(value, dtype, sign, strict=False):
    """The number of a floating-point type next to a rational one.

    Args:
        value: `Fraction`.
        dtype: NumPy type.
        sign: 1 for the smallest number ≥ value, -1 for the largest ≤ value.
        strict: whether `value` itself is left out.

    Returns:
        Scalar of the type, infinite where it has no such number.

    Example:

    >>> float(toward(Fraction(1, 10), np.float64, 1)) == 0.1, toward(Fraction(1, 2), np.float32, 1)
    (True, np.float32(0.5))
    """
    with np.errstate(over="ignore"):
        return _toward(value, np.dtype(dtype).type, sign, strict)


def _toward(value, kind, sign, strict):
    try:
        found = kind(float(value))
    except OverflowError:
        found = kind(np.inf if value > 0 else -np.inf)
    step = _STEPS.get(kind, np.nextafter)
    # Rounded to the nearest twice, it may be one of the two numbers around the value, or the next.
    while _side(found, value) * sign > 0:
        found = step(found, kind(-sign * np.inf))
    while _side(found, value) * sign < 0:
        found = step(found, kind(sign * np.inf))
    if strict and _side(found, value) == 0:
        found = step(found, kind(sign * np.inf))
    return found


# NumPy's takes ten times as long.
_STEPS = {np.float64: lambda value, end: np.float64(math.nextafter(value, end))}


def _side(number, value):
    """Sign of a number less a rational value."""
    if np.isinf(number):
        return 1 if number > 0 else -1
    whole, parts = float(number).as_integer_ratio()
    mine, other = whole * value.denominator, value.numerator * parts
    return (mine > other) - (mine < other)


def _is_false(held):
    return held.widest < 0 or (held.strict and held.widest <= 0)


def _polyhedron(inequalities, query):
    """`(rows, bounds, strict)` of inequalities of outputs; every output, where there are none."""
    rows = np.zeros((max(len(inequalities), 1), query.outputs))
    bounds, strict = np.zeros(len(rows)), np.zeros(len(rows), bool)
    for k, held in enumerate(inequalities):
        scale = Fraction(
            math.lcm(*(c.denominator for c in held.outputs.values())),
            math.gcd(*(c.numerator for c in held.outputs.values())),
        )
        # gcd of numerators and lcm of denominators reduce each coefficient to a whole number.
        for j, c in held.outputs.items():
            whole = c * scale
            try:
                rows[k, j] = float(whole)
            except OverflowError:
                rows[k, j] = np.inf
            if not np.isfinite(rows[k, j]) or Fraction(rows[k, j]) != whole:
                _refuse(
                    "The ratio of two factors of outputs must be one of whole numbers of 53 bits "
                    "at most.", held, query,
                )  # fmt: skip
        bounds[k], strict[k] = toward(held.widest * scale, np.float64, 1), held.strict
        if not np.isfinite(bounds[k]):
            _refuse("A bound of outputs must be a number that float64 holds.", held, query)
    return rows, bounds, strict


def _refuse(reason, held, query):
    line, column = held.place
    where = f"line {line}" + ("" if column is None else f", column {column}")
    raise PropertyFileError(f"{reason} Received: {query.source}, {where}.")
