"""Reader of VNN-LIB 1.0: declarations of reals X_i and Y_j, and assertions about linear terms.

Read are `(declare-const X_0 Real)` (also `(declare-fun X_0 () Real)`), `(assert FORMULA)` with
`and`, `or`, `not`, `true`, `false`, `<=`, `<`, `>=`, `>` and `=` as SMT-LIB defines them, and terms
of `+`, `-`, `*`, `/`, numbers (decimals, also with a sign or an exponent) and variables. Commands
`set-logic` and `set-info` say nothing about the set. Everything else is refused with its line and
column.
"""

import bisect
import re

from tf_lyapunov.errors import PropertyFileError
from tf_lyapunov.vnnlib import terms
from tf_lyapunov.vnnlib.formulas import And, Or, Query

# Nesting of expressions at most.
MOST_NESTED = 200
TOKEN = re.compile(r"""[ \t\r\n]+|;[^\n\r]*|([()])|([^\s()";|]+)|("(?:[^"]|"")*")""")
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})", re.ASCII)
_COMPARISONS = ("<=", "<", ">=", ">", "=")
_NEGATED = {"<=": ">", "<": ">=", ">=": "<", ">": "<=", "=": "!="}
_ARITHMETIC = {
    "+": lambda parts: _total(parts),
    "-": terms.difference,
    "*": terms.product,
    "/": terms.quotient,
}


def parse(text, source="the text"):
    """The `Query` of a text of VNN-LIB 1.0, see `files.read_vnnlib`.

    Example:

    >>> from fractions import Fraction
    >>> query = parse('''
    ... (declare-const X_0 Real) ; one input
    ... (declare-const Y_0 Real)
    ... (assert (or (and (<= X_0 1.5e-1) (>= X_0 (- 0.25))) (= X_0 (/ 1 3))))
    ... (assert (> Y_0 X_0))
    ... ''')
    >>> query.holds([0.15], [0.2]), query.holds([Fraction(1, 3)], [1]), query.holds([0.2], [1])
    (True, True, False)
    """
    return _Reader(text, source).query()


class _Reader:
    """Reads one text.

    Expressions are `(place, word)` or `(place, list of expressions)`, places being offsets.
    """

    def __init__(self, text, source):
        self.text, self.source = text, source
        self.declared = {"X": set(), "Y": set()}
        self.lines = None

    def query(self):
        found = []
        for expression in self.expressions():
            self.command(expression, found)
        for kind, word in (("X", "input"), ("Y", "output")):
            count = len(self.declared[kind])
            if not count:
                raise PropertyFileError(
                    f"A property must declare an {word}, {kind}_0. Received: {self.source}, "
                    "without one."
                )
            missing = next((i for i in range(count) if i not in self.declared[kind]), None)
            if missing is not None:
                raise PropertyFileError(
                    f"The {word}s must be {kind}_0 to {kind}_{count - 1}, as many as are declared. "
                    f"Received: {self.source}, without {kind}_{missing}."
                )
        counts = (len(self.declared["X"]), len(self.declared["Y"]))
        return Query(*counts, And(tuple(found)), None, self.source)

    def expressions(self):
        """Expressions that stand outside of all others, one by one."""
        open_, position = [], 0
        text, length = self.text, len(self.text)
        match = TOKEN.match
        while position < length:
            token = match(text, position)
            if token is None:
                self.refuse("No word, number or comment may look like this.", position)
            if token.lastindex == 1:
                if token[1] == "(":
                    if len(open_) >= MOST_NESTED:
                        self.refuse(f"Expressions nest {MOST_NESTED} deep at most.", position)
                    open_.append((position, []))
                elif not open_:
                    self.refuse("This parenthesis closes nothing.", position)
                else:
                    done = open_.pop()
                    if open_:
                        open_[-1][1].append(done)
                    else:
                        yield done
            elif token.lastindex is not None:
                if not open_:
                    self.refuse("Commands stand in parentheses.", position)
                open_[-1][1].append((position, token[0]))
            position = token.end()
        if open_:
            self.refuse("This parenthesis is never closed.", open_[-1][0])

    def command(self, expression, found):
        place, parts = expression
        name = parts[0][1] if parts else ""
        if name == "assert" and len(parts) == 2:
            formula = self.formula(parts[1], False)
            # Conjunctions of the file, side by side.
            found.extend(formula.parts if isinstance(formula, And) else (formula,))
        elif name == "declare-const" and len(parts) == 3:
            self.declare(parts[1], parts[2])
        elif name == "declare-fun" and len(parts) == 4 and parts[2][1] == []:
            self.declare(parts[1], parts[3])
        elif name not in ("set-logic", "set-info"):
            self.refuse("A command must be (declare-const NAME Real) or (assert FORMULA).", place)

    def declare(self, name, kind):
        if kind[1] != "Real":
            self.refuse("Variables are of the sort Real.", kind[0])
        match = _VARIABLE.fullmatch(name[1]) if isinstance(name[1], str) else None
        if match is None:
            self.refuse("Variables are named X_0, X_1, … and Y_0, Y_1, ….", name[0])
        held, position = self.declared[match[1]], int(match[2])
        if position in held:
            self.refuse(f"{name[1]} is declared twice.", name[0])
        held.add(position)

    def formula(self, expression, negated):
        """The formula of an expression, or of its negation."""
        place, parts = expression
        if parts in ("true", "false"):
            return And(()) if (parts == "true") != negated else Or(())
        name = parts[0][1] if isinstance(parts, list) and parts else None
        if name in ("and", "or"):
            kind = And if (name == "and") != negated else Or
            held = tuple(self.formula(part, negated) for part in parts[1:])
            return held[0] if len(held) == 1 else kind(held)
        if name == "not" and len(parts) == 2:
            return self.formula(parts[1], not negated)
        if not isinstance(name, str) or name not in _COMPARISONS or len(parts) < 3:
            self.refuse("A formula must be a comparison of two terms, `and`, `or` or `not`.", place)
        with self.linear(place):
            held = [self.term(part) for part in parts[1:]]
            pairs = zip(held, held[1:], strict=False)
            where = self.place(place)
            symbol = _NEGATED[name] if negated else name
            found = tuple(terms.compared(symbol, a, b, where) for a, b in pairs)
        if len(found) == 1:
            return found[0]
        return (Or if negated else And)(found)

    def term(self, expression):
        place, parts = expression
        if isinstance(parts, str):
            match = _VARIABLE.fullmatch(parts)
            if match is not None:
                if int(match[2]) not in self.declared[match[1]]:
                    self.refuse(f"{parts} is not declared before its use.", place)
                return terms.Linear.variable(match[1] == "X", int(match[2]))
            with self.linear(place):
                value = terms.number(parts)
            if value is None:
                self.refuse("A term must be a number, X_i, Y_j, or a sum or product.", place)
            return terms.Linear.number(value)
        name = parts[0][1] if parts else None
        least = 2 if name == "-" else 3
        if not isinstance(name, str) or name not in _ARITHMETIC or len(parts) < least:
            self.refuse("A term must be +, -, * or / of terms.", place)
        with self.linear(place):
            return _ARITHMETIC[name]([self.term(part) for part in parts[1:]])

    def linear(self, place):
        return _Named(self, place)

    def place(self, offset):
        """`(line, column)` of an offset, both from 1."""
        if self.lines is None:
            self.lines = [0, *(m.end() for m in re.finditer("\n", self.text))]
        line = bisect.bisect_right(self.lines, offset)
        return line, offset - self.lines[line - 1] + 1

    def refuse(self, reason, offset):
        line, column = self.place(offset)
        shown = self.text[offset : offset + 40].split("\n")[0]
        raise PropertyFileError(
            f"{reason} Received: {shown!r} in {self.source}, line {line}, column {column}."
        )


class _Named:
    """Names the place of terms that are not linear."""

    def __init__(self, reader, place):
        self.reader, self.offset = reader, place

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, terms.NotLinear):
            self.reader.refuse(str(error), self.offset)


def _total(parts):
    found = parts[0]
    for part in parts[1:]:
        found = found.plus(part)
    return found
