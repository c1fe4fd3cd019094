"""Values that do not depend on a graph's inputs, computed once, their sizes checked before."""

import numpy as np

from tf_lyapunov.onnx.foreign import BadGraph, NotRead


class Constants:
    """Arrays of a graph by name.

    Args:
        graph: `foreign.OnnxGraph`.
        batch: number of samples, or `signals.BATCH`.
    """

    def __init__(self, graph, batch):
        self.batch = batch
        self._known = dict(graph.constants)

    def get(self, name):
        """The array of this name, or None."""
        return self._known.get(name)

    def keep(self, name, array):
        """Keeps an array."""
        self._known[name] = array

    def fold(self, node, values):
        """What a node of constants gives."""
        if node.kind == "Constant":
            return _constant(node)
        raise NotRead("it is not computed here")


def _constant(node):
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            dtype = {"value_float": "float32", "value_floats": "float32"}.get(name)
            return np.asarray(node.attributes[name], dtype)
    raise NotRead("its value is no number")


def shape_of(node, shape):
    """The result of Shape or Size."""
    if node.kind == "Size":
        return np.array(np.prod(np.array(shape, np.int64)), np.int64)
    start, end = node.get("start", 0), node.get("end", len(shape))
    return np.array(shape[start:end], np.int64)


__all__ = ["BadGraph", "Constants", "shape_of"]
