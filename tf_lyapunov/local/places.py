"""From positions of a flow to the steps of the verifier's own reading: multipliers in its terms."""

from tf_lyapunov.local.maxima import is_window_maximum
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.verification.around import evidence
from tf_lyapunov.verification.operations import Activation, GlobalPooling, MaxPooling


def places_of(network, flow):
    """`(steps by position of an output, steps by position that it reads)`, or None if they differ.

    The elementwise steps and maxima of both readings stand in the same order, under the same names.

    Args:
        network: the verifier's `network.Network`, expanded.
        flow: `Flow` of the same model.
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


def pieces_of(places, record):
    """List of `evidence.Piece` of a `recording.Record`.

    Args:
        places: as `places_of` gives them.
    """
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
