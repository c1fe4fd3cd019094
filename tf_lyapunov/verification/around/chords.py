"""Slopes of the chords of an activation from one point to the others of an interval.

    α ≤ (φ(t) - φ(t⁰))/(t - t⁰) ≤ β        for all t ≠ t⁰ of the interval                        (C)

is the sector of φ around t⁰ that a feedback loop at rest at t⁰ sees: of tanh at 0 on ±1 it is
[tanh 1, 1], where the slopes on the interval begin at 1 - tanh² 1. On a piece of `pieces` that does
not hold t⁰, |φ(t) - mt - d| ≤ e, so that the chord lies between (mt + d ± e - φ(t⁰))/(t - t⁰), each
monotonic in t: the ends decide. On a piece that is a line and holds t⁰ the chord is its slope; on
others near t⁰ it is between the slopes of φ there (mean value theorem).
"""

import numpy as np

from tf_lyapunov.verification.arithmetic import SLACK, UNIT
from tf_lyapunov.verification.around.pieces import pieces

# Share of the way to each end within which slopes stand for chords.
_NEAR = 0.25
# Doubt about t⁰, as a share of the width near it, from which slopes are used throughout.
_SURE = 1e-3


def chords(operation, point, doubt, low, high):
    """Bounds `(alpha, beta)` of (C), float64 (m,) each, rounded outwards.

    Args:
        operation: an `operations.Activation`.
        point, doubt: float64 (m,): |t⁰ - point| ≤ doubt.
        low, high: float64 (m,) with low ≤ t⁰ ≤ high.
    """

    def units(values):
        return np.broadcast_to(values, point.shape)

    def on(start, stop):
        return pieces(operation, start, stop, units)

    low, high = np.minimum(low, point - doubt), np.maximum(high, point + doubt)
    least, largest = operation.slopes()
    value, noise = (v[0] for v in operation.forward(point[None], doubt[None]))
    whole = on(low, high)
    if np.all(whole.error == 0):  # lines
        parts, near = [whole], None
    else:
        left, right = point + _NEAR * (low - point), point + _NEAR * (high - point)
        left, right = np.minimum(left, point - doubt), np.maximum(right, point + doubt)
        parts, near = [on(low, left), on(right, high)], on(left, right)
    alpha, beta = np.full(point.shape, np.inf), np.full(point.shape, -np.inf)
    for part in parts:
        for start, stop, slope, shift, error in zip(
            part.start, part.stop, part.slope, part.shift, part.error, strict=True
        ):
            holds = (start <= point + doubt) & (point - doubt <= stop)
            # A line through t⁰; of an empty piece the line is φ's at its single point.
            alpha = np.where(holds, np.minimum(alpha, slope), alpha)
            beta = np.where(holds, np.maximum(beta, slope), beta)
            for end in (start, stop):
                step = end - point
                room = np.abs(step) - doubt
                rise = slope * end + shift - value
                size = np.abs(slope * end) + np.abs(shift) + np.abs(value)
                spread = (error + noise + 8 * UNIT * size + np.abs(rise) * UNIT) * SLACK
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    middle = rise / step
                    # (rise ± spread)/(step ± doubt), both off by little.
                    off = (spread + np.abs(middle) * doubt) / room * SLACK
                    off = off + 8 * UNIT * np.abs(middle)
                    under, over = middle - off, middle + off
                under = np.where(room > 0, np.nan_to_num(under, nan=-np.inf), -np.inf)
                over = np.where(room > 0, np.nan_to_num(over, nan=np.inf), np.inf)
                alpha = np.where(holds, alpha, np.minimum(alpha, under))
                beta = np.where(holds, beta, np.maximum(beta, over))
    if near is not None:
        alpha, beta = np.minimum(alpha, near.low), np.maximum(beta, near.high)
        unsure = doubt > _SURE * np.minimum(point - left, right - point)
        alpha = np.where(unsure, whole.low, alpha)
        beta = np.where(unsure, whole.high, beta)
    else:
        # A line that holds t⁰ says nothing of chords to other pieces, which were all looked at;
        # where t⁰ may lie on either of two, slopes are all that is known.
        several = doubt > 0
        alpha = np.where(several, whole.low, alpha)
        beta = np.where(several, whole.high, beta)
    return np.clip(alpha, least, largest), np.clip(beta, least, largest)
