"""Proof files of regions of attraction: `loops.LoopClaim` and a controller's weights."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.digits import at_least, at_most
from tf_lyapunov.verification import archive, claimed, loops, translation
from tf_lyapunov.verification.outcome import Outcome, reasons_against

_PLANT = {"a": "f8", "b": "f8", "enters": "f8", "reads": "f8", "kinds": "i8", "sectors": "f8"}
_OWN = {"box": "f8", "first": "f8", "widths": "f8", "shape": "f8", "rate": "f8", "lam": "f8",
        "mu": "f8"}  # fmt: skip
_KINDS = {**{f"plant_{name}": kind for name, kind in _PLANT.items()}, **_OWN, "trim": "i8"}
_PROBES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class FileClaim:
    """A `loops.LoopClaim`, and whether π(0) ≠ 0 is taken off what the controller gives."""

    loop: loops.LoopClaim
    trim: bool


def pack(network, claim, notes=()):
    """`(header, arrays)` for `archive.write`."""
    loop = claim.loop
    arrays = {f"plant_{name}": getattr(loop.plant, name) for name in _PLANT}
    arrays |= {name: getattr(loop, "reads" if name == "widths" else name) for name in _OWN}
    arrays["trim"] = np.array([claim.trim], np.int64)
    return claimed.pack(archive.LOOPS, network, arrays, (), notes)


def unpack(header, arrays):
    """`(layers, claim, notes)` of a file's contents.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown or of the wrong form.
    """
    layers, fields, pieces, notes = claimed.unpack(header, arrays, _KINDS)
    if pieces:
        raise ValueError("a region of attraction has no multipliers of boxes")
    trim = fields.pop("trim")
    if trim.shape != (1,) or trim[0] not in (0, 1):
        raise ValueError("it does not say whether the controller's offset is taken off")
    plant = loops.Plant(**{name: fields.pop(f"plant_{name}") for name in _PLANT})
    loop = loops.LoopClaim(plant, reads=fields.pop("widths"), **fields)
    loop.check()
    return layers, FileClaim(loop, bool(trim[0])), notes


def offset_of(controller):
    """`(bound on |π(0)|, whether π(0) ≠ 0 is proved)`."""
    most = float(np.max(np.abs(controller.offset) + controller.offset_doubt, initial=0.0))
    away = bool(np.any(np.abs(controller.offset) > controller.offset_doubt))
    return most, away


def inner_radius(shape):
    """Radius of a ball that the ellipsoid xᵀPx ≤ 1 holds, rounded down."""
    from tf_lyapunov.verification.arithmetic import down, largest_eigenvalue_up, sqrt_up

    largest = sqrt_up(largest_eigenvalue_up(shape))
    return float(down(1 / largest)) if 0 < largest < math.inf else 0.0


def probes(claim):
    """States of the box, (n, states), at which a controller is compared with its reading."""
    rng = np.random.default_rng()
    box = claim.loop.box
    return rng.uniform(-1.0, 1.0, (_PROBES, len(box))) * box


def contradictions(model, network, calls, claim):
    """`translation.contradictions` at random states of the box."""
    states = probes(claim)
    tried = translation.Tried(states, np.zeros(len(states), int), np.zeros(len(states)))
    return translation.contradictions(
        model, network, tuple(translation.Call(*call) for call in calls), tried
    )


def objections(network, claim):
    """Sentences on what a claim says and the weights and multipliers do not imply."""
    if any("int" in dtype for dtype in network.casts):
        yield "The controller rounds states to whole numbers."
        return
    controller = loops.controller_of(network)
    if offset_of(controller)[1] and not claim.trim:
        yield "The controller is not 0 at the equilibrium, and the claim does not take that off."
    yield from loops.objections(claim.loop, controller)


@dataclasses.dataclass(frozen=True, eq=False)
class LoopVerification(Outcome):
    """Outcome of `verify` for a proof file of a region of attraction.

    Attributes:
        holds: the claim follows from the controller's weights.
        reasons: why not; empty if it holds.
        claim: `loops.LoopClaim`, as the file says.
        radius: of a ball that the ellipsoid holds, as derived here; 0 if nothing could be.
        notes: what the file says of itself, unchecked.
        seconds: wall time.
    """

    holds: bool
    reasons: tuple
    claim: loops.LoopClaim
    radius: float
    notes: tuple
    seconds: float

    def explain(self):
        """Plain text: whether the file's claim follows from the weights, and if not, why."""
        claim = self.claim
        lines = [
            f"{'VERIFIED' if self.holds else 'NOT VERIFIED'}: region of attraction of a plant with "
            f"{len(claim.box)} states under the model's control."
        ]
        lines += [f"  - {reason}" for reason in self.reasons]
        if self.holds:
            lines.append(
                "  From every state of the file's ellipsoid, which holds the ball of radius "
                f"{at_least(self.radius)} and lies in the file's box, the loop goes to 0; V falls "
                f"to {at_most(claim.rate[0])} of itself or less in every step."
            )
            said = loops.stated(claim)
            if said:
                lines.append(f"  Assumed, not proved: {said}, and the plant's matrices.")
        return "\n".join(lines + self.closing("random states of the box"))

    def fields(self):
        """JSON-safe dict of the outcome, without what the file says of itself."""
        return {
            "holds": bool(self.holds),
            "reasons": list(self.reasons),
            "states": len(self.claim.box),
            "rate": float(self.claim.rate[0]),
            "radius": self.radius,
        }


def checked(layers, claim, notes, model, network, calls):
    """`LoopVerification` of a file's contents, see `rechecking.verify`."""
    begin = time.monotonic()

    def check():
        return list(objections(network, claim)) or contradictions(model, network, calls, claim)

    reasons = reasons_against(layers, network, check)
    radius = 0.0 if reasons else inner_radius(claim.loop.shape)
    seconds = time.monotonic() - begin
    return LoopVerification(not reasons, tuple(reasons), claim.loop, radius, notes, seconds)
