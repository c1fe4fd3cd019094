"""Compositions of operators that are one function: x·σ(x), GELU by erf, a decomposed normalization.

Their parts have no place in a program each (a product of two signals, a quotient), the whole has.
A composition becomes a node of its own, named after the last of its nodes.
"""

import dataclasses
import math
from collections import Counter

import numpy as np

from tf_lyapunov.onnx import compositions
from tf_lyapunov.onnx.compositions import close, is_rounded

_ROOT_HALF, _ROOT_TWO_OVER_PI = math.sqrt(0.5), math.sqrt(2 / math.pi)


def fused(graph, constants):
    """The nodes of a graph, with compositions that are one function replaced by it.

    Args:
        graph: `foreign.OnnxGraph`.
        constants: `folding.Constants`, which takes the constants of compositions.

    Returns:
        List of `OnnxNode` in the graph's order; what a composition leaves unread is still there.
    """
    finder = Finder(graph, constants)
    return [finder.found(node) or compositions.found(finder, node) or node for node in graph.nodes]


@dataclasses.dataclass(frozen=True)
class _Product:
    """factor · product of signals; `None` factors are no numbers."""

    factor: float
    signals: tuple


class Finder:
    """Follows values of a graph back to what they are made of."""

    def __init__(self, graph, constants):
        self.constants = constants
        self.givers = {name: node for node in graph.nodes for name in node.outputs if name}
        self.uses = Counter(name for node in graph.nodes for name in node.inputs)
        self.uses.update(v.name for v in graph.outputs)

    def found(self, node):
        """The node that stands for a composition which ends here, or None."""
        if node.domain:
            return None
        if node.kind == "Add":
            return self._biased(node)
        if node.kind == "Mul":
            return self._gated(node)
        if node.kind == "Div":
            return self._gated(node) or self._softsign(node) or self._normalization(node)
        if node.kind == "Where":
            return self._softplus(node)
        return None

    # Parts --------------------------------------------------------------------------------------

    def giver(self, name, *kinds):
        """The node that gives a value, if it is one of these operators."""
        node = self.givers.get(name)
        return node if node is not None and not node.domain and node.kind in kinds else None

    def number(self, name):
        """The number that a constant holds, or None."""
        value = self.constants.get(name)
        if value is None or value.size != 1 or value.dtype.kind not in "iuf":
            return None
        return float(value.reshape(()))

    def integers(self, name):
        """The integers that a constant holds, as a tuple, or None."""
        value = self.constants.get(name)
        if value is None or value.dtype.kind not in "iu":
            return None
        return tuple(int(n) for n in value.ravel())

    def operands(self, node):
        """`(signal, number)` of a node of two operands, one of which is a number; or None."""
        for name, other in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
            value = self.number(other)
            if value is not None and self.constants.get(name) is None:
                return name, value, other == node.inputs[1]
        return None

    def linear(self, name, whole=None):
        """`(signal, factor)` with the value = factor · signal, through products with numbers.

        `whole` is a signal that is not looked into.
        """
        factor = 1.0
        for _ in range(8):
            if name == whole:
                break
            node = self.giver(name, "Mul", "Div")
            parts = node and self.operands(node)
            if not parts or (node.kind == "Div" and (not parts[2] or parts[1] == 0)):
                break
            name = parts[0]
            factor = factor * parts[1] if node.kind == "Mul" else factor / parts[1]
        return name, factor

    def product(self, name, depth=6, whole=None):
        """The value as a number times signals, through so many products; `whole` is one signal."""
        node = self.giver(name, "Mul", "Div") if depth and name != whole else None
        if node is None or len(node.inputs) != 2:
            return _Product(1.0, (name,))
        parts = self.operands(node)
        if parts:
            signal, value, behind = parts
            if node.kind == "Div" and (not behind or value == 0):
                return _Product(1.0, (name,))
            inner = self.product(signal, depth - 1, whole)
            factor = value if node.kind == "Mul" else 1 / value
            return _Product(inner.factor * factor, inner.signals)
        if node.kind == "Div" or any(self.constants.get(n) is not None for n in node.inputs):
            return _Product(1.0, (name,))
        left, right = (self.product(n, depth - 1, whole) for n in node.inputs)
        return _Product(left.factor * right.factor, left.signals + right.signals)

    def plus_one(self, name):
        """What one is added to, or None."""
        node = self.giver(name, "Add")
        parts = node and self.operands(node)
        return parts[0] if parts and parts[1] == 1 else None

    # Functions ----------------------------------------------------------------------------------

    def _gated(self, node):
        """x times a function of x, which may be a product itself."""
        for depth in range(1, 7):
            found = self.product(node.outputs[0], depth)
            if len(found.signals) != 2:
                continue
            for x, gate in (found.signals, found.signals[::-1]):
                made = self._gate(node, x, gate, found.factor)
                if made is not None:
                    return made
        return None

    def made(self, node, kind, x, attributes, since):
        return dataclasses.replace(node, kind=kind, inputs=(x,), attributes=attributes, since=since)

    def _gate(self, node, x, gate, factor):
        inner = self.giver(gate, "Sigmoid")
        if inner is not None and factor == 1:
            base, rate = self.linear(inner.inputs[0], x)
            if inner.inputs[0] == x:
                return self.made(node, "Swish", x, {"alpha": 1.0}, 24)
            if base == x and self._single(rate):
                return self.made(node, "Swish", x, {"alpha": rate}, 24)
        inner = self.giver(gate, "HardSigmoid")
        if inner is not None and factor == 1 and inner.inputs[0] == x:
            alpha, beta = inner.get("alpha", 0.2), inner.get("beta", 0.5)
            if alpha in (1 / 6, float(np.float32(1 / 6))) and beta == 0.5:
                return self.made(node, "HardSwish", x, {}, 22)
        if is_rounded(factor, 1 / 6) and self._is_relu6(gate, x):
            return self.made(node, "HardSwish", x, {}, 22)
        inner = self.giver(gate, "Tanh")
        if inner is not None and factor == 1:
            soft = self.giver(inner.inputs[0], "Softplus")
            if soft is not None and soft.inputs[0] == x:
                return self.made(node, "Mish", x, {}, 22)
        if factor == 0.5:
            return self._gelu(node, x, gate)
        return None

    @staticmethod
    def _single(rate):
        """Whether a rate is one number of the file, which a product of several would round."""
        return float(np.float32(rate)) == rate

    def _is_relu6(self, gate, x):
        """Whether it is clip(x + 3, 0, 6)."""
        clip = self.giver(gate, "Clip")
        if clip is None:
            return False
        names = [*clip.inputs[1:], "", ""]
        low = self.number(names[0]) if names[0] else clip.get("min")
        high = self.number(names[1]) if names[1] else clip.get("max")
        node = self.giver(clip.inputs[0], "Add")
        parts = node and self.operands(node)
        return bool(parts) and (low, high) == (0, 6) and parts[0] == x and parts[1] == 3

    def _gelu(self, node, x, gate):
        inner = self.plus_one(gate)
        if inner is None:
            return None
        error = self.giver(inner, "Erf")
        if error is not None:
            base, rate = self.linear(error.inputs[0], x)
            if base == x and close(rate, _ROOT_HALF):
                return self.made(node, "Gelu", x, {"approximate": "none"}, 20)
            return None
        tangent = self.giver(inner, "Tanh")
        if tangent is None:
            return None
        base, rate = self.linear(tangent.inputs[0])
        if is_rounded(rate, _ROOT_TWO_OVER_PI) and self._is_cubic(base, x):
            return self.made(node, "Gelu", x, {"approximate": "tanh"}, 20)
        return None

    def _is_cubic(self, name, x):
        """Whether it is x + 0.044715·x³; x may be a product itself."""
        node = self.giver(name, "Add")
        if node is None or x not in node.inputs:
            return False
        other = node.inputs[1] if node.inputs[0] == x else node.inputs[0]
        found = self.product(other, whole=x)
        if not is_rounded(found.factor, 0.044715):
            return False
        if found.signals == (x,) * 3:
            return True
        power = self.giver(found.signals[0], "Pow") if len(found.signals) == 1 else None
        return power is not None and power.inputs[0] == x and self.number(power.inputs[1]) == 3

    def _softsign(self, node):
        """x/(1 + |x|)."""
        inner = self.plus_one(node.inputs[1])
        size = inner and self.giver(inner, "Abs")
        if size is None or size.inputs[0] != node.inputs[0]:
            return None
        return self.made(node, "Softsign", node.inputs[0], {}, 22)

    def _above(self, name):
        """`(value, number)` of the condition that a value is above a single-precision number."""
        node = self.giver(name, "Greater")
        limit = node and self.constants.get(node.inputs[1])
        if limit is None or limit.dtype != np.float32 or limit.size != 1:
            return None
        return node.inputs[0], float(limit.reshape(()))

    def _softplus(self, node):
        """softplus(x), or x where it is above 20: there both are the same in single precision."""
        condition, x, below = node.inputs
        found, soft = self._above(condition), self.giver(below, "Softplus")
        if found is None or soft is None or soft.inputs[0] != x:
            return None
        if found[0] != x or not found[1] >= 20:
            return None
        return self.made(node, "Softplus", x, {}, 22)

    # Maps ---------------------------------------------------------------------------------------

    def _biased(self, node):
        """MatMul by a matrix and the Add of a vector that alone reads it."""
        for product, other in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
            found, bias = self.giver(product, "MatMul"), self.constants.get(other)
            if found is None or bias is None or self.uses[product] != 1:
                continue
            kernel = self.constants.get(found.inputs[1])
            if (
                kernel is None
                or kernel.ndim != 2
                or self.constants.get(found.inputs[0]) is not None
            ):
                continue
            out = kernel.shape[1]
            if bias.ndim > 1 or bias.size not in (1, out):  # one value per column
                continue
            vector = f"{other}:{node.outputs[0]}"
            self.constants.keep(vector, np.broadcast_to(bias.ravel(), (out,)))
            name = node.name if found.name.startswith("MatMul:") else found.name
            inputs = (found.inputs[0], found.inputs[1], vector)
            return dataclasses.replace(
                node, name=name, kind="tf_lyapunov.Dense", inputs=inputs, attributes={}, since=None
            )
        return None

    def _normalization(self, node):
        """z/√(mean z² + ε) over axes, z = x - mean x or z = x."""
        if len(node.inputs) != 2:
            return None
        root = self.giver(node.inputs[1], "Sqrt")
        total = root and self.giver(root.inputs[0], "Add")
        parts = total and self.operands(total)
        variance = parts and self.giver(parts[0], "ReduceMean")
        square = variance and self.giver(variance.inputs[0], "Pow", "Mul")
        axes = square and self.axes(variance)
        if not axes or not parts[1] > 0 or not variance.get("keepdims", 1):
            return None
        base = self.squared(square)
        attributes = {"axes": axes, "epsilon": parts[1]}
        if base is not None and base == node.inputs[0] and self._centred(base, axes) is None:
            return self.made(node, "tf_lyapunov.RootMeanSquare", base, attributes, None)
        x = self._centred(node.inputs[0], axes)
        # The difference may be there twice.
        if x is None or base is None or self._centred(base, axes) != x:
            return None
        return self.made(node, "tf_lyapunov.Normalized", x, attributes, None)

    def _centred(self, name, axes):
        """x of a value x - mean x over axes, or None."""
        difference = self.giver(name, "Sub")
        mean = difference and self.giver(difference.inputs[1], "ReduceMean")
        if not mean or mean.inputs[0] != difference.inputs[0]:
            return None
        same = self.axes(mean) == axes and mean.get("keepdims", 1)
        return mean.inputs[0] if same else None

    def squared(self, node):
        """What a node is the square of, or None."""
        if node.kind == "Pow":
            return node.inputs[0] if self.number(node.inputs[1]) == 2 else None
        return node.inputs[0] if node.inputs[0] == node.inputs[1] else None

    def axes(self, node):
        axes = node.get("axes")
        if axes is None and len(node.inputs) > 1:
            axes = self.constants.get(node.inputs[1])
        return None if axes is None else tuple(int(a) for a in axes)
