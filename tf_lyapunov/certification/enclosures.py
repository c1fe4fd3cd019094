"""Radii by bounds around inputs in proof files: what the verifier proves with the multipliers."""

import dataclasses

import numpy as np

from tf_lyapunov.local.flow import flow_of
from tf_lyapunov.local.maxima import is_window_maximum
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.progress import steps
from tf_lyapunov.verification.around import evidence
from tf_lyapunov.verification.around.balls import Gains
from tf_lyapunov.verification.around.claims import attempt, margin_rows, region_around
from tf_lyapunov.verification.around.pairs import expanded
from tf_lyapunov.verification.operations import Activation, GlobalPooling, MaxPooling

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
    places = _places(network, flow_of(proof.network)) if records else None
    radius, pieces = np.array(derived), {}
    order = sorted(i for i in records if certificate.radius[i] > derived[i])
    for i in steps(order, "writing bounds around inputs"):
        found = [] if places is None else _pieces(network, places, records[i])

        def tried(r, i=i, found=found):
            region = region_around(cast[i], inputs[i], r, certificate.norm, bounds)
            try:
                return attempt(network, gains, region, int(labels[i]), errors[i], found)
            except OverflowError:
                return None

        height = float(np.min(margin_rows(logits.shape[1], int(labels[i])) @ logits[i]))
        reached, around = _reached(tried, height, certificate.radius[i], derived[i])
        if around is not None:
            radius[i], pieces[i] = reached, _pruned(network, around, found)
    return Enclosed(radius, pieces, tuple(_words(certificate.radius, radius, records, places)))


def _reached(tried, height, radius, least):
    """A radius above `least` that is proved, and its `Surroundings`; or `least` and None.

    Margins fall from `height` at the centre, ever faster as a rule, so that the line through what
    was found at a radius too large reaches zero before they do.
    """
    for _ in range(_TRIES):
        if not radius > least:
            break
        found = tried(radius)
        if found is not None and found.holds:
            return radius, found.around
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


# From positions of a flow to the verifier's steps ------------------------------------------------


def _places(network, flow):
    """`(steps by position of an output, steps by position that it reads)`, or None if they differ.

    The elementwise steps and maxima of both readings stand in the same order, under the same names.
    """
    mine = [
        (k, link)
        for k, link in enumerate(flow.links, 1)
        if (has_pieces(link.operation) and getattr(link.operation, "name", "") != "linear")
        or is_window_maximum(link.operation)
    ]
    theirs = []
    for number, step in enumerate(network.steps):
        operation = step.operation
        if (isinstance(operation, Activation) and operation.name != "linear") or (
            isinstance(operation, MaxPooling)
            or (isinstance(operation, GlobalPooling) and not operation.mean)
        ):
            theirs.append(number)
        if step.name == network.logits:
            break
    if len(mine) != len(theirs):
        return None
    numbers = {step.name: number for number, step in enumerate(network.steps)}
    outputs, sources = {}, {flow.output: numbers[network.logits]}
    for (k, link), number in zip(mine, theirs, strict=True):
        step = network.steps[number]
        if step.name.split("/")[0] != link.name.split("/")[0]:
            return None
        outputs[k] = number
        sources.setdefault(link.inputs[0], numbers[step.inputs[0]])
    return outputs, sources


def _pieces(network, places, record):
    """List of `evidence.Piece` of a `recording.Record`."""
    outputs, sources = places
    found = []
    for block in record.blocks:
        if block.source not in sources:
            continue
        target = sources[block.source]
        parts, rows = [], 2 * len(block.units)
        for k, held in block.steps.items():
            rows = len(held.shares)
            parts.append(evidence.Part(outputs[k], held.columns, held.shares, held.ends, held.logs))
        splits = tuple((outputs[k], unit, point) for k, unit, point in block.splits)
        if parts:
            found.append(
                evidence.Piece(target, block.units, rows, tuple(parts), splits, block.margin)
            )
    return found
