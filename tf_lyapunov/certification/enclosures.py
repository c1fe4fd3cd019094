"""Radii by bounds around inputs in proof files: what the verifier proves with the multipliers."""

import dataclasses

import numpy as np

from tf_lyapunov.local.flow import flow_of
from tf_lyapunov.local.places import pieces_of, places_of
from tf_lyapunov.progress import steps
from tf_lyapunov.verification.around.balls import Gains
from tf_lyapunov.verification.around.claims import attempt, margin_rows, region_around
from tf_lyapunov.verification.around.evidence import JOINT
from tf_lyapunov.verification.around.pairs import expanded

# Radii tried for an input until the verifier proves one, and the least step between two.
_TRIES, _STEP = 12, 1e-6
# Losses below this share of a radius go without saying.
_SMALL = 2e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Enclosed:
    """Radii that the verifier proves around inputs.

    Attributes:
        radius: float64 (n,), at most those of the certificate.
        pieces: dict from numbers of inputs to lists of `evidence.Piece`.
        sentences: what was lost, in words.
    """

    radius: np.ndarray
    pieces: dict
    sentences: tuple


def enclosed(certificate, proof, network, derived, logits, errors, inputs, cast):
    """`Enclosed` for a certificate whose radii bounds around inputs enlarged.

    Args:
        certificate: `Certificate`.
        proof: `proofs.Proof` with `records`.
        network: the verifier's `Network`.
        derived: float64 (n,), radii by the global gains, in the certificate's norm, as the
            verifier derives them.
        logits, errors: float64 (n, K), as the verifier evaluates them.
        inputs, cast: the inputs as given and as the model casts them, float64.
    """
    records = proof.records or {}
    network, own = expanded(network, network.gains()[1])
    gains, labels = Gains(own), certificate.labels
    bounds = (-np.inf, np.inf) if proof.bounds is None else proof.bounds
    places = places_of(network, flow_of(proof.network)) if records else None
    radius, pieces = np.array(derived), {}
    order = sorted(i for i in records if certificate.radius[i] > derived[i])
    for i in steps(order, "writing bounds around inputs"):
        found = [] if places is None else pieces_of(places, records[i])

        def tried(r, i=i, found=found):
            region = region_around(cast[i], inputs[i], r, certificate.norm, bounds)
            try:
                return attempt(network, gains, region, int(labels[i]), errors[i], found)
            except OverflowError:
                return None

        height = float(np.min(margin_rows(logits.shape[1], int(labels[i])) @ logits[i]))
        reached, proved = _reached(tried, height, certificate.radius[i], derived[i])
        if proved is not None:
            kept = [p for p in found if proved.took_joint or p.margin != JOINT]
            radius[i], pieces[i] = reached, _pruned(network, proved.around, kept)
    return Enclosed(radius, pieces, tuple(_words(certificate.radius, radius, records, places)))


def _reached(tried, height, radius, least):
    """A radius above `least` that is proved, and its `Attempt`; or `least` and None.

    Margins fall from `height` at the centre, ever faster as a rule, so that the line through what
    was found at a radius too large reaches zero before they do.
    """
    for _ in range(_TRIES):
        if not radius > least:
            break
        found = tried(radius)
        if found is not None and found.holds:
            return radius, found
        share = 0.5
        if found is not None and np.isfinite(found.excess):
            share = min(max(height / (height - found.excess), 0.5), 1.0)
        radius *= share * (1 - _STEP)
    return least, None


def _pruned(network, around, pieces):
    """Pieces without the multipliers of units that are lines on their boxes, which none reads."""
    found = []
    for piece in pieces:
        parts = []
        for part in piece.parts:
            relaxed = around.relaxed[network.steps[part.step].name]
            kept = relaxed.bent[part.columns]
            parts.append(
                dataclasses.replace(part, columns=part.columns[kept], shares=part.shares[:, kept])
            )
        found.append(dataclasses.replace(piece, parts=tuple(parts)))
    return found


def _words(claimed, written, records, places):
    lost = np.array([i for i in sorted(records) if written[i] < claimed[i] * (1 - _SMALL)], int)
    if not len(lost):
        return
    shares = 1 - written[lost] / claimed[lost]
    text = (
        f"{len(lost)} radii are smaller than those of the certificate, by "
        f"{float(np.median(shares)):.2%} in the median and {float(shares.max()):.2%} at most: as "
        "far as the verifier's own balls and boxes reach with the multipliers of this file."
    )
    if places is None:
        text += " The multipliers of these layers cannot be matched, and none is in this file."
    yield text
