"""What an ONNX file computes, compared with a program in float64, operation by operation.

Every operation is repeated in float64 on the values that the file's own nodes gave before it, and
its result compared within a bound on its rounding alone: comparing outputs only has no power in
deep networks. The file as it is written, which a runtime may rearrange, is then compared with its
own nodes run one by one. A check, not a proof.
"""

import dataclasses

import numpy as np

from tf_lyapunov.errors import UnfaithfulExport
from tf_lyapunov.program.operation import Precision, Signal
from tf_lyapunov.program.rounding import UNIT_ROUNDOFF, underflow

# Probes at each of these scales; with zeros they are all compared at once.
SCALES, PROBES = (0.1, 1.0, 10.0), 4
# Entries of inputs that are compared at once, at most (one input of each scale at least).
_ENTRIES = 2**20


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was compared.

    Attributes:
        evaluator: name and version of what ran the file.
        inputs: number of random probes.
        operations: number of operations that agreed.
        difference: largest |file - program| of an output entry.
    """

    evaluator: str
    inputs: int
    operations: int
    difference: float

    def sentence(self):
        """For people."""
        return (
            f"{self.evaluator} agrees with the program in float64 on {self.inputs} probes at each "
            f"of {self.operations} operations; outputs differ by at most {self.difference:.3g}. "
            "A check, not a proof."
        )


def precision_of(dtype):
    """`Precision` of a runtime's arithmetic in float32 or float64.

    Its functions are within 16 units of 1 + |value| (onnxruntime's Tanh reaches 1.00000024, its
    Sigmoid is 0 below -18). In float64 the program rounds as well: every error counts twice.
    """
    unit = UNIT_ROUNDOFF[dtype] * (2 if dtype == "float64" else 1)
    return Precision(unit, underflow(dtype), 0.0, 16 * unit)


def probes(inputs, rng):
    """Random inputs of several scales and zeros, one array per input.

    Args:
        inputs: list of (shape of a sample, dtype).
        rng: `numpy.random.Generator`.
    """
    size = sum(int(np.prod(shape)) for shape, _ in inputs)
    count = int(np.clip(_ENTRIES // (len(SCALES) * max(size, 1)), 1, PROBES))
    found = []
    for shape, dtype in inputs:
        parts = [np.zeros((1, *shape))]
        parts += [rng.normal(size=(count, *shape)) * scale for scale in SCALES]
        x = np.concatenate(parts)
        if "int" in dtype:
            limits = np.iinfo(dtype)
            x = np.clip(np.rint(x), max(limits.min, -(2**20)), min(limits.max, 2**20))
        found.append(x.astype(dtype))
    return found


def compare(records, values, precision):
    """Compares operations with what a file's nodes gave.

    Args:
        records: list of `(step, operation, names of inputs, name of output, name of its node)`.
        values: dict of float64 arrays by name.
        precision: `Precision` of the file's arithmetic.

    Returns:
        Number of operations.

    Raises:
        UnfaithfulExport: naming the first one that differs.
    """
    for step, operation, inputs, output, node in records:
        with np.errstate(all="ignore"):
            read = [Signal(values[n], np.zeros_like(values[n])) for n in inputs]
            signal = operation.forward(read, precision)
        _check(step, f"node output {node!r}", values[output], signal.value, signal.error)
    return len(records)


def check_same(alone, whole, dtype, what):
    """Compares a file's outputs with those of its nodes one by one, or of another batch.

    The same operations on the same values: only how a runtime orders or joins them may differ.
    """
    if alone.shape == whole.shape:
        sizes = np.where(np.isfinite(alone), np.abs(alone), 0.0)
        rows = sizes.max(axis=tuple(range(1, alone.ndim)), keepdims=True, initial=0.0)
        share = 1e-4 if dtype == "float32" else 1e-12
        error = share * (rows + 0.01 * sizes.max(initial=0.0)) + 1e-30 + np.zeros_like(alone)
    else:
        error = None
    _check(what, "the output", whole, alone, error)


def _check(step, where, held, value, error):
    if value.shape != held.shape:
        reason = f"its shape is {held.shape}, that of the program {value.shape}"
        raise _unfaithful(step, where, reason)
    with np.errstate(all="ignore"):
        rows = np.isfinite(value) & (np.abs(value) + error < np.finfo(np.float32).max)
        off = np.where(rows, np.abs(held - value) - error, 0.0)
        off = np.where(rows & ~np.isfinite(held), np.inf, off)
    if np.any(off > 0):
        worst = np.unravel_index(np.argmax(off), off.shape)
        reason = (
            f"it gives {held[worst]:.8g} where the program gives {value[worst]:.8g}, with a "
            f"rounding allowance of {error[worst]:.2g}"
        )
        raise _unfaithful(step, where, reason)


def _unfaithful(step, where, reason):
    return UnfaithfulExport(
        f"The ONNX file contradicts the program. Received: step {step!r}, {where}: {reason}. "
        "Nothing was written. Numbers that overflow in float32 need dtype='float64'; else report "
        "this model, with the versions of onnx and onnxruntime.",
        step,
    )
