"""Claims about models that multiply signals: of the exact function, around each input alone.

Such a model has no gain on all of space, so that no model of rounding by gains reaches beyond a
product. Margins are those of the exact function, proved by bounds around each input; what the
evaluation at the input may err by is bounded entry by entry, operation by operation.
"""

import dataclasses
import math

import numpy as np

from tf_lyapunov.program import rounding
from tf_lyapunov.program.operation import EXACT, Signal
from tf_lyapunov.program.program import precision_of, run

_HALVINGS = 64


@dataclasses.dataclass(frozen=True)
class Exact:
    """The `composition.Allowance` of claims about the exact function: none.

    Attributes:
        count: number of inputs.
    """

    count: int

    def __call__(self, i, extra):
        """For input i and everything within the l2 distance `extra`."""
        return 0.0

    def of(self, rows, extra):
        """The same for several inputs, float64."""
        return np.zeros(self.count)[rows]


def evaluation_errors(network, x, precision="float64"):
    """Bounds on the l2 distance between computed and exact logits, float64 (n,).

    Args:
        network: `Network` whose program is read.
        x: list of arrays (n, …), one per input.
        precision: `"float64"`, or `"model"` for the model's own formats.
    """
    logits = _signals(network, x, 0.0, precision)[-1]
    return rounding.euclidean_norms_up(np.nan_to_num(logits.error, nan=np.inf))


def without_overflow(network, x, radius):
    """Radii of l2 balls on which no value of the model can overflow in its own formats.

    Every signal is enclosed entry by entry on the ball, the model's rounding included; sums on the
    way to it are bounded by gains, and those of a product by Cauchy's inequality.

    Args:
        network: `Network`.
        x: list with the array (n, …) of its one input.
        radius: float64 (n,).

    Returns:
        float64 (n,), at most `radius`; 0 where a ball that small was not found.
    """
    radius = np.array(radius)
    for _ in range(_HALVINGS):
        rows = np.flatnonzero(radius > 0)
        rows = rows[~_fits(network, [a[rows] for a in x], radius[rows])] if len(rows) else rows
        if not len(rows):
            return radius
        radius[rows] /= 2
    radius[rows] = 0.0
    return radius


def _signals(network, x, radius, precision):
    """`Signal` of every step up to the logits, in order, after those of the inputs."""
    program = network.program
    known, found = {}, []
    for name, array in zip(program.inputs, x, strict=True):
        value = np.asarray(array, np.float64)
        known[name] = Signal(value, np.broadcast_to(radius, value.shape) + np.zeros_like(value))
        found.append(known[name])
    with np.errstate(all="ignore"):
        for step in program.steps:
            form = EXACT if precision == "float64" else precision_of(step)
            leave = 1 if step.name == program.decision else 0
            known[step.name] = run(step, [known[n] for n in step.inputs], form, leave)
            found.append(known[step.name])
            if step.name in (program.output, program.decision):
                break
    return found


def _fits(network, x, radius):
    shape = (-1, *[1] * (x[0].ndim - 1))
    signals = _signals(network, x, radius.reshape(shape), "model")
    names = [*network.program.inputs, *(step.name for step in network.program.steps)]
    known = {
        name: rounding.euclidean_norms_up(np.nan_to_num(np.abs(s.value) + s.error, nan=np.inf))
        for name, s in zip(names, signals, strict=False)
    }
    last = {node.call: node.name for node in network.nodes}
    dtypes = network.dtypes
    fits, norms = np.ones(len(radius), bool), {}
    with np.errstate(over="ignore", invalid="ignore"):
        for node in network.nodes:
            if node.kind == "input":
                norms[node.name] = known[node.name]
                continue
            reads = [w * norms[k] for w, k in zip(node.weights, node.inputs, strict=True)]
            size = math.prod(reads) if node.kind == "product" else (
                node.gain_upper_bound * sum(reads) + node.affine.offset)  # fmt: skip
            largest = rounding.LARGEST.get(dtypes.get(node.call), math.inf) / 2
            fits &= (size <= largest) & (node.peak.of(sum(reads)) <= largest)
            if node.call in known and last[node.call] == node.name:
                size = np.fmin(size, known[node.call])
            norms[node.name] = size
            if node.name == network.logits:
                break
    return fits


def sentences(network, errors, dtypes):
    """What the claims are about, for `Certificate.assumptions`.

    Args:
        network: `Network`.
        errors: float64 (n,), of the model's own logits at the inputs.
        dtypes: str, the formats that it computes in.
    """
    names = ", ".join(network.products[:5]) + (", …" if len(network.products) > 5 else "")
    return [
        f"Steps that multiply signals have no gain on all of space: {names}. Radii rest on bounds "
        "on the ball around each input, and are about the exact function of the weights: what the "
        f"model's own rounding in {dtypes} adds elsewhere on the ball is not bounded. At the "
        f"inputs themselves its logits are within {float(np.max(errors)):.3g} of the exact ones.",
    ]
