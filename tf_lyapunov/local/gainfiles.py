"""Proof files of local gains: what the verifier proves with the multipliers of the boxes found."""

import dataclasses

import numpy as np

from tf_lyapunov.local.ranges import check_readable, overflow_named, pieces_for
from tf_lyapunov.verification import archive, localgains
from tf_lyapunov.verification.reading import read_with_calls

# What another machine's order of sums may change of a gain, relatively, and a loss that goes
# without saying.
_ROOM, _SMALL = 1e-9, 2e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Ball:
    """How the gain on one ball was found; see `ranges.Source`."""

    network: object
    flow: object
    traced: object
    region: object
    memory: object
    outputs: str
    multipliers: dict = dataclasses.field(default_factory=dict)


def save_gains(path, balls, gains, radius, norm):
    """Writes the proof file of gains on balls; see `outputs.gain_on`.

    Args:
        path: file name.
        balls: list of `Ball`.
        gains: float64 (n,), as found.
        radius, norm: of all balls.
    """
    if not balls:
        raise ValueError("A proof file needs one input or more. Received: none.")
    network = balls[0].network
    check_readable(balls[0])
    model, read, calls = read_with_calls(network.model, balls[0].region.center.shape)
    pieces = {}
    for i, ball in enumerate(balls):
        # Of boxes alone: no row of the logits is bounded.
        own = [p for p in pieces_for(ball, read) if len(p.units)]
        if own:
            pieces[i] = own
    claim = localgains.GainClaim(
        np.stack([ball.region.center for ball in balls]),
        np.full(len(balls), float(radius)),
        gains,
        np.array([localgains.NORMS.index(norm)], np.int64),
    )
    with overflow_named():
        derived = localgains.derived(read, claim, pieces)
    claim = dataclasses.replace(claim, gains=np.maximum(gains, derived * (1 + _ROOM)))
    wrong = [] if np.all(np.isfinite(claim.gains)) else ["A gain has no bound."]
    wrong += localgains.objections(claim, derived)
    with overflow_named():
        wrong = wrong or localgains.contradictions(model, read, calls, claim)
    if wrong:
        raise ValueError(
            "The verifier could not confirm these gains, so no proof file was written. Received: "
            f"model {network.model.name!r}. {' '.join(wrong)}"
        )
    archive.write(path, *localgains.pack(read, claim, pieces, _notes(gains, claim.gains)))


def _notes(found, claimed):
    factors = claimed / np.maximum(found, 1e-300)
    many = int(np.sum(claimed - found > _SMALL * found))
    if many:
        yield (
            f"{many} gains are larger than those found, {float(np.median(factors)):.5g} times as "
            f"large in the median and {float(factors.max()):.5g} times at most: as far as the "
            "verifier's own boxes and maps reach with the multipliers of this file."
        )
