"""A network as steps, and bounds from its weights alone: no number of a certificate enters."""

import dataclasses
import hashlib
import json

import numpy as np

from tf_lyapunov.verification.arithmetic import (
    SLACK,
    SMALLEST,
    UNIT,
    product_up,
    row_norms_up,
    times,
)
from tf_lyapunov.verification.operations import Activation, Identity, Linear, Merge, Move
from tf_lyapunov.verification.rounding import exact


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One operation of a network.

    Attributes:
        name: the layer's name, with a suffix for its parts (`"dense/relu"`).
        inputs: names of the steps that it reads.
        shape: of its output, without the batch axis.
        operation: see `operations`; None for the input.
        dtype: name of the type that the model computes it in.
    """

    name: str
    inputs: tuple
    shape: tuple
    operation: object
    dtype: str = "float64"


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What identifies a layer: its kind and settings as text, and a digest of its weights."""

    name: str
    settings: str
    weights: str


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Steps in topological order, the input first.

    Attributes:
        steps: tuple of `Step`.
        logits: name of the step before a final softmax or sigmoid.
        layers: tuple of `LayerRecord`, in the order of the model's graph.
        casts: names of the dtypes that the model casts its input to, one after the other.
    """

    steps: tuple
    logits: str
    layers: tuple
    casts: tuple = ()

    def __getitem__(self, name):
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def gains(self, parts=()):
        """Bound on the gain from the input to every step, and of every step alone, by name.

        Series multiply; sums and differences add; a concatenation is the root of a sum of squares.

        Args:
            parts: `(start, end, bound)` of gains from one step to a later one.
        """
        reach, own = {}, {}
        for step in self.steps:
            if step.operation is None:
                reach[step.name], own[step.name] = 1.0, 1.0
            elif isinstance(step.operation, Merge):
                count = len(step.inputs)
                own[step.name] = 1 / count if step.operation.kind == "average" else 1.0
                reach[step.name] = step.operation.combine([reach[i] for i in step.inputs])
            else:
                own[step.name] = step.operation.gain()
                reach[step.name] = product_up(own[step.name], reach[step.inputs[0]])
            for start, end, bound in parts:
                if end == step.name:
                    reach[end] = min(reach[end], product_up(reach[start], bound))
        return reach, own

    def evaluate(self, x, arithmetic=exact):
        """Logits (n, K) lie within the second array of the first.

        Args:
            x: float64 (n, …).
            arithmetic: `rounding.exact`: the logits of the exact function, up to what the dtypes
                lose by underflow; or `rounding.computed`: those that the model itself computes.

        Raises:
            OverflowError: if a value is beyond the dtype that it is computed in.
        """
        values = {self.steps[0].name: (x, np.zeros_like(x))}
        last = {}
        for index, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.inputs, index))
        for index, step in enumerate(self.steps):
            if step.operation is not None:
                read = [values[name] for name in step.inputs]
                values[step.name] = forward(step, read, arithmetic)
                value, error = values[step.name]
                largest = exact(step.dtype).largest
                if arithmetic is exact and not np.all(np.abs(value) + error <= largest):
                    raise OverflowError(
                        f"values at step {step.name!r} are beyond the largest of {step.dtype}"
                    )
            if step.name == self.logits:
                return values[step.name]
            for name in [n for n in values if last.get(n, -1) <= index and n != step.name]:
                del values[name]
        raise KeyError(self.logits)

    def head(self):
        """`(name of its input, weight, error)` of the dense step that makes the logits, or None."""
        step = self[self.logits]
        if not isinstance(step.operation, Linear) or len(step.shape) != 1:
            return None
        return step.inputs[0], step.operation.weight, step.operation.weight_error

    def chain(self, start):
        """The dense chain from step `start` to the logits, as a `Chain`.

        Raises:
            ValueError: if there is no such chain: a branch, a merge, or a layer without a matrix.
        """
        steps, step = [], self[self.logits]
        readers = {}
        for other in self.steps:
            for name in other.inputs:
                readers[name] = readers.get(name, 0) + 1
        while step.name != start:
            if len(step.inputs) != 1:
                raise ValueError(f"no chain leads from {start!r} to the logits")
            steps.append(step)
            step = self[step.inputs[0]]
            if step.name != start and readers[step.name] != 1:
                raise ValueError(f"the chain branches at {step.name!r}")
        weights, errors, slopes, pending = [], [], [], None
        for step in reversed(steps):
            operation = step.operation
            if isinstance(operation, Activation):
                found = operation.slopes()
                pending = found if pending is None else _product(pending, found)
                continue
            is_unmoved = isinstance(operation, Move) and not operation.pads
            if is_unmoved or isinstance(operation, Identity):
                continue
            shape = self[step.inputs[0]].shape
            found = operation.matrix(shape) if hasattr(operation, "matrix") else None
            if found is None:
                raise ValueError(f"step {step.name!r} has no matrix of a size that fits")
            weight, error = found
            is_linear = pending is None or pending == (1.0, 1.0)
            if weights and is_linear:
                weights[-1], errors[-1] = times(weight, weights[-1], error, errors[-1])
            else:
                if weights:
                    slopes.append(pending)
                elif not is_linear:
                    raise ValueError("a chain must begin with a linear layer")
                weights.append(weight)
                errors.append(error)
            pending = None
        if not weights or pending is not None:
            raise ValueError("a chain must end with a linear layer")
        return Chain(tuple(weights), tuple(errors), tuple(slopes))


def forward(step, read, arithmetic=exact):
    """`(values, errors)` of a step.

    Args:
        step: `Step`.
        read: list of `(values, errors)` of the steps that it reads.
        arithmetic: see `Network.evaluate`.
    """
    rounding = arithmetic(step.dtype)
    read = [(v, e + rounding.cast * (np.abs(v) + e) + rounding.tiny) for v, e in read]
    if isinstance(step.operation, Merge):
        read = [([v for v, _ in read], [e for _, e in read])]
    return step.operation.forward(*read[0], rounding)


def _product(first, second):
    """Slopes of two functions in a row."""
    ends = [a * b for a in first for b in second]
    room = 4 * UNIT * max(map(abs, ends)) + SMALLEST
    return min(ends) - room, max(ends) + room


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """f(x) = W_n φ_{n-1}(… φ_1(W_1 x) …), every W_l known up to an entrywise error.

    Attributes:
        weights: arrays (outputs, inputs) from the input on.
        errors: arrays of the same shapes, or 0.0.
        slopes: (alpha, beta) of φ_l.
    """

    weights: tuple
    errors: tuple
    slopes: tuple

    def output_difference(self, i, j):
        """The chain of f_i - f_j."""
        last, error = self.weights[-1], self.errors[-1]
        row = last[i : i + 1] - last[j : j + 1]
        spread = 2 * UNIT * np.abs(row)
        if np.ndim(error):
            spread = (spread + error[i : i + 1] + error[j : j + 1]) * SLACK
        return Chain((*self.weights[:-1], row), (*self.errors[:-1], spread), self.slopes)


def column_distances(weight, error):
    """Upper bounds on ‖w_i - w_j‖ for the rows of the last layer's weight, (K, K)."""
    classes = len(weight)
    found = np.zeros((classes, classes))
    for i in range(classes):
        rows = weight[i] - weight
        spread = 2 * UNIT * np.abs(rows)
        if np.ndim(error):
            spread = spread + error[i] + error
        found[i] = row_norms_up(np.abs(rows) + spread * SLACK) * (1 + 4 * UNIT)
    return found


def record(name, kind, settings, arrays):
    """`LayerRecord` of a layer."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    text = json.dumps([kind, settings], sort_keys=True)
    return LayerRecord(name, text, state.hexdigest())
