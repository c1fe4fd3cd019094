"""Integers that are computed of the number of samples n, known for every n at once.

Such a number is an affine function of n. It is held as its value at n = `BATCH` and at n = 1, which
determine it; what is no affine function, or is decided by n, is refused.
"""

import numpy as np

from tf_lyapunov.onnx.foreign import NotRead
from tf_lyapunov.onnx.signals import BATCH

_DECIDES = "what it gives is decided by the number of samples"
_LARGEST = 2.0**62
# Operators that move the entries of their first operand alone, as others say.
_MOVES = ("Gather", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Flatten", "Split")
# Operators whose other operands are sizes, of which `BATCH` stands for one sample.
SIZES = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
_ORDER = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Max", "Min")


def folded(node, values, alone, fold):
    """`(result, result at one sample)` of a node some of whose operands depend on n.

    Args:
        node: `OnnxNode`.
        values: arrays or None, at n = `BATCH`.
        alone: the same at n = 1.
        fold: function of the node and operands.

    Raises:
        NotRead: where the result is no affine function of n for all n ≥ 1.
    """
    if any(np.shape(v) != np.shape(a) for v, a in zip(values, alone, strict=True)):
        raise NotRead("the size of a constant depends on the number of samples")
    marks = [None if v is None else v != a for v, a in zip(values, alone, strict=True)]
    counted = [k for k, m in enumerate(marks) if m is not None and np.any(m)]
    if node.kind in ("Div", "Mod"):
        return _quotients(node, values, alone)
    if not _is_affine(node, values, alone, marks, counted):
        raise NotRead(_DECIDES)
    found, single = fold(node, values), fold(node, alone)
    parts = found if isinstance(found, list) else [found]
    if any(p.dtype.kind in "iu" and np.any(np.abs(p.astype(float)) > _LARGEST) for p in parts):
        raise NotRead("it computes a number of samples that is too large")
    return found, single


def _is_affine(node, values, alone, marks, counted):
    kind = node.kind
    if kind in ("Concat", "Add", "Sub", "Neg", "Identity", "Shape", "Size"):
        return True
    if kind in _MOVES or kind == "Where":
        return (0 in counted) == (kind in _MOVES) and (kind == "Where" or counted == [0])
    if kind in SIZES:
        return counted == [SIZES[kind]] or (kind != "ConstantOfShape" and counted == [0])
    if kind == "Cast":  # to integers that hold it
        return node.get("to") in (6, 7, 13) and np.all(np.abs(values[0]) < 2**31)
    if kind == "Mul":
        return not np.any(marks[0] & marks[1])
    if kind == "ReduceProd":
        return counted == [0] and np.count_nonzero(marks[0]) == 1
    # An affine difference keeps its sign if both ends have one, and is zero if both are.
    return kind in _ORDER and len(values) == 2 and _is_ordered(kind, values, alone)


def _is_ordered(kind, values, alone):
    first = np.sign(np.subtract(*alone))
    last = np.sign(np.subtract(*values))
    if kind in ("Max", "Min"):
        return np.all(first * last >= 0)
    return np.all(first == last)


def _quotients(node, values, alone):
    """Quotients, and remainders, that are the same affine function for all n."""
    (a, b), (a1, b1) = np.broadcast_arrays(*values), np.broadcast_arrays(*alone)
    if np.any(b == 0) or np.any(b1 == 0) or a.dtype.kind not in "iu":
        raise NotRead(_DECIDES)
    slope, fixed = (a - a1) // (BATCH - 1), b == b1
    is_whole = fixed & (slope % b == 0)
    if node.kind == "Mod":
        if not np.all(is_whole & (b > 0) & (a1 >= 0) & (slope >= 0)):
            raise NotRead(_DECIDES)
        return a1 % b, a1 % b
    is_exact = is_whole & (a1 % b1 == 0)
    # The same multiple of a divisor that depends on n too.
    is_multiple = (a % b == 0) & (a1 % b1 == 0) & (a // b == a1 // b1)
    is_multiple &= np.sign(b) == np.sign(b1)
    is_constant = fixed & (a == a1) & (a >= 0) & (b > 0)
    if not np.all(is_exact | is_multiple | is_constant):
        raise NotRead(_DECIDES)
    return a // b, a1 // b1
