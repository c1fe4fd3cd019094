"""Certificates are tried on the model itself, at points of the balls that they claim."""

import math

import numpy as np

from tf_lyapunov.bounds.composition import rounding_errors
from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.program import rounding

# Entries of points that are tried at once.
_ENTRIES = 2**19


def check_balls(network, x, labels, radius, own, bounds=None):
    """The model keeps its decision at points of the very balls that are claimed, or nothing is.

    At the claimed radius in random directions and towards inputs of other classes; a check that
    catches misreadings, no proof.

    Args:
        network: `Network`.
        x: the first inputs, as the model receives them.
        labels: int64 (n,), at least as many.
        radius: float64 (n,), of l2 balls within what is claimed.
        own: `LogitsModel` of the network.
        bounds: `(low, high)` of valid inputs, or None.

    Raises:
        UnfaithfulReading: naming an input whose decision changes within its radius.
    """
    rng = np.random.default_rng()
    radius, labels = radius[: len(x)], labels[: len(x)]
    chosen = np.flatnonzero((radius > 0) & np.isfinite(radius) & (radius < 1e30))
    if not len(chosen) or x.dtype.kind in "iub":
        return
    chosen = chosen[: max(_ENTRIES // max(x[0].size, 1), 1)]
    towards = x[rng.permutation(len(x))][: len(chosen)].astype(np.float64) - x[chosen]
    for direction in (rng.normal(size=(len(chosen), *x.shape[1:])), towards):
        flat = direction.reshape(len(chosen), -1)
        size = np.maximum(np.linalg.norm(flat, axis=1), 1e-300)
        step = flat / size[:, None] * (radius[chosen] * (1 - 1e-6))[:, None]
        points = x[chosen].astype(np.float64) + step.reshape(direction.shape)
        if bounds is not None:  # valid inputs are no farther away after that
            points = np.clip(points, *bounds)
        points = points.astype(x.dtype)
        # What the cast to the model's dtype moved must not leave the ball.
        moved = (points.astype(np.float64) - x[chosen]).reshape(len(chosen), -1)
        inside = np.linalg.norm(moved, axis=1) <= radius[chosen]
        logits = own.predict(points, len(points))
        norms = rounding.euclidean_norms_up(points)
        noise = 2 * math.sqrt(2) * rounding_errors(network, norms, network.logits)
        mine = labels[chosen]
        if logits.shape[1] == 1:
            lead = np.where(mine == 1, -logits[:, 0], logits[:, 0])
        else:
            rows = np.arange(len(logits))
            rivals = logits.copy()
            rivals[rows, mine] = -np.inf
            lead = rivals.max(axis=1) - logits[rows, mine]
        broken = np.flatnonzero(inside & (lead > noise))
        if len(broken):
            worst = chosen[broken[0]]
            raise UnfaithfulReading(
                "The model leaves its decision within a radius that its reading would prove. "
                f"Received: input {worst}, radius {radius[worst]:.6g}. No claim about this model "
                "is made; please report it with the model."
            )
