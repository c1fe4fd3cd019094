"""VNN-LIB 2.0, read by the package `vnnlib` and taken from its syntax tree.

One network with one input and one output, of the types real, float16, float32 or float64. A number
that the declared type cannot hold is read both as written and as either neighbour of the type: the
unsafe set holds all three readings, and a counterexample must satisfy each of them.
"""

import re
from fractions import Fraction
from math import prod

import numpy as np

from tf_lyapunov.errors import PropertyFileError
from tf_lyapunov.vnnlib import terms
from tf_lyapunov.vnnlib.formulas import And, Or, Query
from tf_lyapunov.vnnlib.sets import toward

# The package reads nested expressions by recursion in C, without limits of its own.
_MOST_CHARACTERS, _MOST_NESTED = 2**24, 200
_TYPES = {"Real": None, "F16": np.float16, "F32": np.float32, "F64": np.float64}
_SYMBOLS = {
    "LessEqual": "<=",
    "LessThan": "<",
    "GreaterEqual": ">=",
    "GreaterThan": ">",
    "Equal": "=",
    "NotEqual": "!=",
}


def parse_version_2(text, source="the text"):
    """The `Query` of a text of VNN-LIB 2.0.

    Raises:
        PropertyFileError: for what the package refuses, several networks, hidden nodes, several
            inputs or outputs, other types, and terms that are not linear.
        ImportError: without the package `vnnlib`.

    Example:

    >>> text = '''(vnnlib-version <2.0>)
    ... (declare-network N (declare-input X real [2]) (declare-output Y real [1]))
    ... (assert (<= X[1] 0.5)) (assert (== Y[0] (- X[0])))'''
    >>> query = parse_version_2(text)
    >>> query.shapes, query.holds([3, 0.5], [-3]), query.holds([3, 0.5], [3])
    (((2,), (1,)), True, False)
    """
    try:
        import vnnlib
    except ImportError as error:
        raise ImportError(
            "Files of VNN-LIB 2.0 need the package vnnlib. Install it with: "
            "pip install 'tf_lyapunov[onnx]'"
        ) from error
    _check_sizes(text, source)
    try:
        tree = vnnlib.parse_query_string(text)
    except Exception as error:  # the package's own, or any that crosses from C
        raise PropertyFileError(
            f"The property file is refused by the package vnnlib. Received: {source}: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error
    return _Tree(tree, source).query()


def _check_sizes(text, source):
    depth = deepest = 0
    version = re.search(r"\(\s*vnnlib-version\s*<\s*([0-9.]*)", text)
    if version is not None and version[1] != "2.0":
        raise PropertyFileError(
            f"Versions 1.0 and 2.0 of VNN-LIB are read. Received: {version[1]}, in {source}."
        )
    if len(text) > _MOST_CHARACTERS:
        raise PropertyFileError(
            f"A file of VNN-LIB 2.0 may have {_MOST_CHARACTERS} characters at most. Received: "
            f"{len(text)}, in {source}."
        )
    for line in text.split("\n"):
        for sign in line.split(";")[0]:
            depth += (sign == "(") - (sign == ")")
            deepest = max(deepest, depth)
    if deepest > _MOST_NESTED:
        raise PropertyFileError(
            f"Expressions nest {_MOST_NESTED} deep at most. Received: {deepest}, in {source}."
        )


class _Tree:
    """Reads the package's tree."""

    def __init__(self, tree, source):
        self.tree, self.source = tree, source
        networks = tree.networks
        if len(networks) != 1:
            self.refuse(f"A property must be about one network. It declares {len(networks)}.")
        network = networks[0]
        for held, word in ((network.inputs, "input"), (network.outputs, "output")):
            if len(held) != 1:
                self.refuse(f"A network must have one {word}. It declares {len(held)}.")
        if network.hidden:
            self.refuse("Hidden nodes are not supported. It declares some.")
        if network.equal_to or network.isometric_to:
            self.refuse("Relations to other networks are not supported. It declares one.")
        self.given, self.found = network.inputs[0], network.outputs[0]

    def query(self):
        """`Query` of all assertions."""
        for held in (self.given, self.found):
            if held.dtype.name not in _TYPES:
                self.refuse(
                    "Types must be real, float16, float32 or float64. "
                    f"{held.name} is {held.dtype.name}."
                )
        shapes = tuple(tuple(map(int, held.shape)) for held in (self.given, self.found))
        formula = And(tuple(self.formula(a.expr) for a in self.tree.assertions))
        return Query(*map(prod, shapes), formula, shapes, self.source)

    def formula(self, node):
        kind = type(node).__name__
        if kind in ("And", "Or"):
            return {"And": And, "Or": Or}[kind](tuple(self.formula(part) for part in node.args))
        if kind not in _SYMBOLS:
            self.refuse(f"A formula of the kind {kind} is not supported.", node)
        place = (_line(node), None)
        try:
            sides = [self.term(side, _type(node)) for side in (node.lhs, node.rhs)]
            return terms.compared(_SYMBOLS[kind], *sides, place)
        except terms.NotLinear as error:
            self.refuse(str(error), node)

    def term(self, node, dtype):
        kind = type(node).__name__
        if kind == "Var":
            return self.variable(node)
        if kind in ("Float", "Int", "IntExpr", "Literal"):
            return _read(terms.number(node.lexeme), dtype, node.lexeme)
        if kind == "Negate":
            return terms.difference([self.term(node.expr, dtype)])
        if kind == "Plus":
            first, *others = [self.term(part, dtype) for part in node.args]
            for other in others:
                first = first.plus(other)
            return first
        if kind == "Minus":
            parts = [self.term(part, dtype) for part in (node.head, *node.rest)]
            return terms.difference(parts)
        if kind == "Multiply":
            return terms.product([self.term(part, dtype) for part in node.args])
        self.refuse(f"A term of the kind {kind} is not supported.", node)

    def variable(self, node):
        is_input = node.name == self.given.name
        declared = self.given if is_input else self.found
        if node.name != declared.name:
            self.refuse(f"{node.name} is no input or output of the network.", node)
        shape, indices = tuple(declared.shape), tuple(node.indices)
        if len(shape) != len(indices) or any(
            not 0 <= i < n for i, n in zip(indices, shape, strict=True)
        ):
            self.refuse(f"{node.name} needs one index within each of {shape}.", node)
        position = int(np.ravel_multi_index(indices, shape)) if shape else 0
        return terms.Linear.variable(is_input, position)

    def refuse(self, reason, node=None):
        line = None if node is None else _line(node)
        where = self.source if line is None else f"{self.source}, line {line}"
        shown = "" if node is None else f"{str(node).strip()[:60]!r} in "
        raise PropertyFileError(f"{reason} Received: {shown}{where}.")


def _read(value, dtype, lexeme):
    if value is None:
        raise terms.NotLinear(f"{lexeme} is no number.")
    if dtype is None:
        return terms.Linear.number(value)
    ends = [toward(value, dtype, sign) for sign in (-1, 1)]
    if not all(np.isfinite(v) for v in ends):
        raise terms.NotLinear("A number must be one that the declared type holds.")
    return terms.Linear.number(*(Fraction(float(v)) for v in ends))


def _type(node):
    """NumPy type of a comparison's variables, the least exact one; None for reals."""
    found = [_TYPES[n.dtype.name] for n in _nodes(node) if type(n).__name__ == "Var"]
    floats = [t for t in found if t is not None]
    return max(floats, key=lambda t: np.finfo(t).eps) if floats else None


def _line(node):
    """Line of the first name or number within a node, or None."""
    return next((n.line for n in _nodes(node) if hasattr(n, "line")), None)


def _nodes(node):
    yield node
    for child in node.children():
        yield from _nodes(child)
