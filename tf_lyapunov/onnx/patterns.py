"""Compositions of operators that are one function."""

import dataclasses
from collections import Counter

import numpy as np


def fused(graph, constants):
    """The nodes of a graph, with compositions that are one function replaced by it.

    Args:
        graph: `foreign.OnnxGraph`.
        constants: `folding.Constants`.

    Returns:
        List of `OnnxNode`, in an order that is one of the graph's; what a composition leaves
        unread is still there.
    """
    finder = _Finder(graph, constants)
    return [finder.biased(node) or node for node in graph.nodes]


class _Finder:
    def __init__(self, graph, constants):
        self.constants = constants
        self.givers = {name: node for node in graph.nodes for name in node.outputs if name}
        self.uses = Counter(name for node in graph.nodes for name in node.inputs)
        self.uses.update(v.name for v in graph.outputs)

    def biased(self, node):
        """MatMul by a matrix and the Add of a vector that alone reads it."""
        if node.kind != "Add" or node.domain or len(node.inputs) != 2:
            return None
        for product, other in (node.inputs, node.inputs[::-1]):
            found, bias = self.givers.get(product), self.constants.get(other)
            if found is None or bias is None or found.kind != "MatMul" or found.domain:
                continue
            kernel = self.constants.get(found.inputs[1])
            if kernel is None or kernel.ndim != 2 or self.uses[product] != 1:
                continue
            # One value per column, and no axis that the product lacks.
            out = kernel.shape[1]
            if bias.ndim > 1 or bias.size not in (1, out) or found.inputs[0] in (product, ""):
                continue
            name = f"{self._named(found, node)}"
            vector = f"{other}:{node.outputs[0]}:bias"
            self.constants.keep(vector, np.broadcast_to(bias.ravel(), (out,)))
            inputs = (found.inputs[0], found.inputs[1], vector)
            return dataclasses.replace(
                node, name=name, kind="tf_lyapunov.Dense", inputs=inputs, attributes={}, since=None
            )
        return None

    @staticmethod
    def _named(product, total):
        return product.name if not product.name.startswith("MatMul:") else total.name
