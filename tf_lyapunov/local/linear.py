"""Radii by bounds around each input, for `certify`."""

import time

import numpy as np

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.flow import Whole, flow_of
from tf_lyapunov.local.maps import is_linear
from tf_lyapunov.local.maxima import is_window_maximum
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.radii import Prover, margin_rows
from tf_lyapunov.local.recording import record

# Bytes of multipliers that a certificate keeps, so that its radii can be re-checked.
LARGEST_RECORDS = 2**29


def linear_radii(network, x, labels, classes, radius, allowance, *, norm="l2", bounds=None,
                 deadline=np.inf, keep=True):  # fmt: skip
    """Radii at which every margin stays above its allowance, by bounds around each input.

    Args:
        network: `Network`.
        x: inputs (n, …) as the model receives them.
        labels: int64 (n,).
        classes: number of logits.
        radius: float64 (n,), radii that are proved already, in `norm`.
        allowance: function of an input's index and a radius: what its margins must exceed.
        norm, bounds: see `certify`.
        deadline: `time.monotonic()` at which the search stops.
        keep: whether multipliers are recorded.

    Returns:
        `(radius, sentences, records)`: radii at least those given, and a dict from numbers of
        inputs that they enlarged to `recording.Record`, None if these are too large, or unwanted.

    Raises:
        UnsupportedLayerError: if the model has several inputs.
    """
    flow = flow_of(network)
    prover = Prover(flow, norm, bounds)
    found = np.array(radius, dtype=np.float64)
    begun, records, held = 0, {} if keep else None, 0
    begin = time.monotonic()
    for i, point in enumerate(np.asarray(x)):
        if time.monotonic() > deadline:
            break
        begun = i + 1
        rows = margin_rows(classes, int(labels[i]))
        # Splits of units must not take the time of inputs that have no bound yet.
        share = begin + (deadline - begin) * begun / len(x)
        answer = prover.radius(
            point.astype(np.float64),
            rows,
            lambda r, i=i: allowance(i, r),
            start=float(found[i]),
            deadline=deadline,
            split_deadline=share,
        )
        if answer.radius > found[i]:
            found[i] = answer.radius
            if records is not None:
                records[i] = record(flow, answer.trace, answer)
                held += records[i].nbytes
                records = records if held <= LARGEST_RECORDS else None
    wider = found > radius
    sentences = [
        f"Bounds around each input (linear relaxations that join balls and boxes) enlarged the "
        f"radius of {np.mean(wider):.1%} of them; proved in float64 with a bound on the rounding."
    ]
    if begun < len(x):
        sentences.append(
            f"Time was up after {begun} of {len(x)} inputs; the others keep their radius by gains."
        )
    by_gain = passed(flow)
    if by_gain:
        sentences.append(f"Steps that pass balls by their gain alone: {', '.join(by_gain)}.")
    return found, sentences, records


def passed(flow):
    """Names of the steps without a relaxation."""
    names = [
        link.name
        for link in flow.links
        if isinstance(link.operation, Whole)
        or not (
            is_linear(link.operation)
            or has_pieces(link.operation)
            or is_window_maximum(link.operation)
        )
    ]
    return list(dict.fromkeys(names))


def check_applies(network):
    """Refuses models that bounds around an input do not apply to, before anything is computed.

    Raises:
        UnsupportedLayerError: if the model has several inputs.
    """
    if len(network.inputs) != 1:
        raise UnsupportedLayerError(
            "method='linear' needs a model with one input. Received: "
            f"{len(network.inputs)} inputs. Concatenate them inside the model."
        )
