"""Which claimed radii around single inputs are proved, by bounds of the margins at that radius."""

import dataclasses

import numpy as np

from tf_lyapunov.verification.arithmetic import down, row_norms_up, sqrt_up, up
from tf_lyapunov.verification.around.evidence import read
from tf_lyapunov.verification.around.functionals import Functionals
from tf_lyapunov.verification.around.joint import Joint
from tf_lyapunov.verification.around.region import NORMS, Region
from tf_lyapunov.verification.around.surroundings import Surroundings


def margin_rows(classes, label):
    """f_label - f_j for every other class j, or ±f of a single logit, as rows.

    >>> margin_rows(3, 1).tolist()
    [[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]
    """
    if classes == 1:
        return np.array([[1.0 if label == 1 else -1.0]])
    others = np.delete(np.arange(classes), label)
    rows = 0.0 - np.eye(classes)[others]
    rows[:, label] = 1.0
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Attempt:
    """What was found on a region.

    Attributes:
        excess: float; all margins are proved above what their logits err by if it is positive.
            Else that of a margin that is not.
        around: `Surroundings` of the region.
        took_joint: whether balls and input were one problem as well.
    """

    excess: float
    around: Surroundings
    took_joint: bool = False

    @property
    def holds(self):
        """Whether every margin is proved."""
        return self.excess > 0


def attempt(network, gains, region, label, errors, pieces=()):
    """`Attempt` to prove every margin of a label above what its two logits err by, on a region.

    A margin that is split may have its least bound on the branches instead.

    Args:
        network: `network.Network`, `pairs.expanded`.
        gains: `balls.Gains` of it.
        region: `Region`.
        label: int.
        errors: float64 (classes,), of the logits at the centre: what the dtypes lose there.
        pieces: list of `evidence.Piece` of this input.

    Raises:
        ValueError: if the evidence does not fit the network.
        OverflowError: if signals on the region have no bound.
    """
    rows = margin_rows(network[network.logits].shape[-1], label)
    given = read(network, pieces, len(rows))
    need = up(errors if len(errors) == 1 else errors[label] + np.delete(errors, label))
    with np.errstate(over="ignore", invalid="ignore"):
        around = Surroundings(network, gains, region, given.groups)
        around.weigh(given.weights)
        found = down(around.lower(network.logits, Functionals(rows), given.last) - need)
        takes_joint = bool(given.joint) and not np.all(found > 0) and Joint.applies(around)
        if takes_joint:
            joint = Joint(around, given.joint, len(rows))
            other = around.lower(network.logits, Functionals(rows), given.joint, joint=joint)
            found = np.fmax(found, down(other - need))
        # The smallest first: if it is not proved, the others need no branches.
        for i in np.argsort(found):
            if not found[i] > 0 and i in given.branches:
                own = _on_branches(around, rows[i], need[i], given.branches[i])
                found[i] = max(found[i], own)
            if not found[i] > 0:
                return Attempt(float(found[i]), around, takes_joint)
    return Attempt(float(np.min(found)), around, takes_joint)


def _on_branches(around, row, need, branches):
    """What a margin exceeds a number by on every branch, at least, up to the first that fails."""
    least = np.inf
    for branch in range(2 ** len(branches.splits)):
        halves, multipliers = branches.of(branch)
        relaxed = {name: around.relaxed[name].halved(cuts) for name, cuts in halves.items()}
        c = Functionals(row[None])
        found = around.lower(around.network.logits, c, multipliers, relaxed)[0]
        least = min(least, float(down(found - need)))
        if not least > 0:
            break
    return least


def region_around(center, given, radius, norm, bounds):
    """`Region` around the input as the model casts it that holds the ball around the given one.

    Args:
        center: float64 (*shape), cast.
        given: (*shape), as in the file, in float64.
        radius, norm, bounds: see `Region`.
    """
    apart = np.abs(center - given)
    moved = {
        "l2": float(row_norms_up(apart.reshape(1, -1))[0]),
        "l1": float(np.sum(apart)) * (1 + apart.size * 2.0**-52),
        "linf": float(np.max(apart, initial=0.0)),
    }[norm]
    if moved > 0:
        radius = float(up(radius + up(up(moved))))
    return Region(center, radius, norm, bounds)


def converted(radius, norm, size):
    """Radii of balls in a norm that lie within l2 balls: ‖e‖₂ ≤ √n‖e‖_∞ and ‖e‖₂ ≤ ‖e‖₁."""
    if norm != "linf":
        return radius
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(radius), np.maximum(down(radius / sqrt_up(size)), 0.0), radius)


__all__ = ["NORMS", "attempt", "converted", "margin_rows", "region_around"]
