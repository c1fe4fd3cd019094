"""Parts of a network in which branches meet, each as one matrix inequality.

Signals are z_0, what the part reads, and the results z_k = φ_k(y_k) of elementwise functions; what
is linear between them is multiplied out, so that for the differences of two inputs

    y_k = Σ_{j<k} A_kj z_j,    f = Σ_j C_j z_j.

For slopes in [α_k, β_k], m = (α+β)/2, p = αβ and any diagonal Λ_k ≥ 0, ‖f‖² ≤ ρ‖z_0‖² wherever

    ρ‖z_0‖² - ‖Σ_j C_jz_j‖² + Σ_k (z_kᵀΛ_kz_k - 2m z_kᵀΛ_ky_k + p y_kᵀΛ_ky_k)  ≥  0.

It sees where branches cancel, which the rule of sums does not. A chain is the case without any.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.verification.arithmetic import SLACK, TINY, UNIT, is_semidefinite, times
from tf_lyapunov.verification.inequalities import (
    add_block,
    narrow_weight,
    sector_terms,
    transposed_pair,
    unfit,
)
from tf_lyapunov.verification.operations import Activation, Identity, Linear, Merge, Move

# Entries of all signals together: the matrix has their square.
LARGEST = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A part of a network in the form above.

    A linear function of the signals is a dict from their numbers to `(matrix, entrywise error)`.

    Attributes:
        sizes: of z_0, z_1, ….
        reads: y_1, y_2, ….
        slopes: (α, β) of φ_1, φ_2, ….
        outputs: f.
        names: of the steps that make z_1, z_2, ….
    """

    sizes: tuple
    reads: tuple
    slopes: tuple
    outputs: dict
    names: tuple

    def output_difference(self, i, j):
        """The graph of f_i - f_j."""
        found = {}
        for k, (matrix, error) in self.outputs.items():
            row = matrix[i : i + 1] - matrix[j : j + 1]
            spread = 2 * UNIT * np.abs(row) + TINY
            if np.ndim(error):
                spread = (spread + error[i : i + 1] + error[j : j + 1]) * SLACK
            found[k] = row, spread
        return dataclasses.replace(self, outputs=found)


def refusal(graph, multipliers):
    """Why multipliers do not fit a graph at all, or None."""
    return unfit(graph.sizes[1:], graph.slopes, multipliers, "part")


def proves_gain(graph, multipliers):
    """Whether the multipliers prove that the squared gain from z_0 to f is at most ρ."""
    if refusal(graph, multipliers) is not None:
        return False
    if not (math.isfinite(multipliers.squared) and multipliers.squared > 0):
        return False
    ends = np.cumsum([0, *graph.sizes])
    matrix, error = np.zeros((2, int(ends[-1]), int(ends[-1])))
    for k, read in enumerate(graph.reads):
        weight, spread = _row(graph, read, k + 1)
        before, here = slice(0, ends[k + 1]), slice(*ends[k + 1 : k + 3])
        lam, sector = multipliers.values[k], multipliers.sectors[k]
        sector_terms(matrix, error, weight, spread, lam, sector, before, here)
    first, every = slice(0, ends[1]), slice(0, ends[-1])
    add_block(matrix, error, (first, first), multipliers.squared * np.eye(ends[1]))
    last, spread = _row(graph, graph.outputs, len(graph.sizes))
    gram, gram_error = times(last.T, last, *transposed_pair(spread))
    add_block(matrix, error, (every, every), -gram, gram_error)
    return is_semidefinite((matrix + matrix.T) / 2, (error + error.T) * SLACK)


def _row(graph, form, count):
    """A linear function as one matrix over the first signals, and its errors."""
    height = len(next(iter(form.values()))[0])
    ends = np.cumsum([0, *graph.sizes[:count]])
    matrix, errors = np.zeros((2, height, int(ends[-1])))
    for k, (part, error) in form.items():
        matrix[:, ends[k] : ends[k + 1]] = part
        errors[:, ends[k] : ends[k + 1]] = error
    return matrix, errors


# Reading ----------------------------------------------------------------------------------------


def read(network, start, end):
    """The `Graph` of everything between two steps.

    Args:
        network: `network.Network`.
        start: name of the step that the part reads; nothing else may lead to its end.
        end: name of the step whose values are f.

    Raises:
        ValueError: if there is no such part, it has a step that is neither linear nor elementwise,
            or is too large.
    """
    inside = _between(network, start, end)
    shape = network[start].shape
    readers = [step for step in inside if start in step.inputs]
    stem = _stem(network, start, readers)
    size = math.prod(shape) if stem is None else stem[0].shape[1]
    bent = [s for s in inside if isinstance(s.operation, Activation)]
    total = size + sum(math.prod(s.shape) for s in bent if not _is_multiple(s.operation))
    if total > LARGEST:
        raise ValueError(f"its signals have {total} entries, more than {LARGEST}")
    sizes, reads, slopes, names, forms = [size], [], [], [], {}
    if stem is None:
        forms[start] = {0: (np.eye(size), 0.0)}
    else:
        forms[readers[0].name] = {0: stem}
    for step in inside:
        if step.name in forms:
            continue
        given, operation = [forms[name] for name in step.inputs], step.operation
        if isinstance(operation, Activation) and _is_multiple(operation):
            forms[step.name] = _multiple(operation.slopes()[0], given[0])
        elif isinstance(operation, Activation):
            number = len(sizes)
            sizes.append(math.prod(step.shape))
            reads.append(given[0])
            slopes.append(operation.slopes())
            names.append(step.name)
            forms[step.name] = {number: (np.eye(sizes[-1]), 0.0)}
        elif isinstance(operation, Merge):
            forms[step.name] = _merged(network, step, given)
        elif type(operation) is Identity or _keeps(operation):  # no final softmax
            forms[step.name] = given[0]
        else:
            weight, error = _matrix(network, step)
            forms[step.name] = {
                k: times(weight, part, error, spread) for k, (part, spread) in given[0].items()
            }
    return Graph(tuple(sizes), tuple(reads), tuple(slopes), forms[end], tuple(names))


def _between(network, start, end):
    """Steps after `start` that `end` depends on, in order."""
    wanted, stack = set(), [end]
    while stack:
        name = stack.pop()
        if name == start or name in wanted:
            continue
        step = network[name]
        if step.operation is None:
            raise ValueError(f"step {end!r} depends on what passes {start!r} by")
        wanted.add(name)
        stack.extend(step.inputs)
    if not wanted:
        raise ValueError(f"step {end!r} is not after {start!r}")
    if not any(start in network[name].inputs for name in wanted):
        raise ValueError(f"step {end!r} does not depend on {start!r}")
    return [step for step in network.steps if step.name in wanted]


def _stem(network, start, readers):
    """`(R, 0)` that stands for the one wide layer that reads the start, or None."""
    if len(readers) != 1 or len(readers[0].inputs) != 1:
        return None
    (step,) = readers
    if not isinstance(step.operation, Linear) or math.prod(step.shape) >= math.prod(
        network[start].shape
    ):
        return None
    root = narrow_weight(*_matrix(network, step))
    return None if root is None else (root, 0.0)


def _matrix(network, step):
    shape = network[step.inputs[0]].shape
    found = step.operation.matrix(shape) if hasattr(step.operation, "matrix") else None
    if found is None:
        raise ValueError(f"step {step.name!r} has no matrix of a size that fits")
    return found


def _is_multiple(operation):
    low, high = operation.slopes()
    return low == high


def _multiple(number, form):
    return {
        k: (number * part, (abs(number) * error + 2 * UNIT * np.abs(number * part) + TINY) * SLACK)
        for k, (part, error) in form.items()
    }


def _keeps(operation):
    return isinstance(operation, Move) and not operation.pads


def _merged(network, step, forms):
    """Sum, difference, mean or concatenation of linear functions."""
    operation = step.operation
    if operation.kind == "concatenate":
        return _joined(network, step, forms)
    if operation.kind not in ("add", "subtract", "average"):
        raise ValueError(f"step {step.name!r} merges by {operation.kind!r}")
    signs = [1.0] * len(forms)
    if operation.kind == "subtract":
        signs[1] = -1.0
    found = {}
    for sign, form in zip(signs, forms, strict=True):
        for k, (part, error) in form.items():
            value = sign * part
            if k in found:
                before, spread = found[k]
                value = before + value
                error = (spread + error + 2 * UNIT * np.abs(value)) * SLACK
            found[k] = value, error
    if operation.kind != "average":
        return found
    count = len(forms)
    return {
        k: (part / count, (error / count + 2 * UNIT * np.abs(part) / count + TINY) * SLACK)
        for k, (part, error) in found.items()
    }


def _joined(network, step, forms):
    shapes = [network[name].shape for name in step.inputs]
    starts = np.cumsum([0, *map(math.prod, shapes)])
    places = [
        np.arange(a, a + math.prod(shape)).reshape(shape)
        for a, shape in zip(starts, shapes, strict=False)
    ]
    order = np.concatenate(places, axis=step.operation.axis - 1).reshape(-1)
    found = {}
    for k in sorted({k for form in forms for k in form}):
        width = next(form[k][0].shape[1] for form in forms if k in form)
        parts, errors = [], []
        for form, shape in zip(forms, shapes, strict=True):
            part, error = form.get(k, (np.zeros((math.prod(shape), width)), 0.0))
            parts.append(part)
            errors.append(np.broadcast_to(error, part.shape))
        found[k] = np.concatenate(parts)[order], np.concatenate(errors)[order]
    return found
