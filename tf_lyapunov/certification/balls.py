"""Certificates are tried on the model itself, at points of the balls that they claim."""

import math

import numpy as np

from tf_lyapunov.bounds.composition import rounding_errors, stays_finite
from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.program import rounding

# Entries of points that are tried at once.
_ENTRIES = 2**19

# Halvings of a radius: what is left of it is then smaller than any number.
_HALVINGS = 64


def without_overflow(network, norms, radius):
    """Radii cut to balls on which no value of the model can overflow in its own formats.

    The exact function may stay within its class where the model gives infinity or NaN: float16
    ends at 65504.

    Args:
        network: `Network`.
        norms: float64 (n,), bounds on the norms of the inputs.
        radius: float64 (n,), proved of the exact function.

    Returns:
        float64 (n,), at most `radius`.
    """
    tensor = network.graph.inputs[0]
    # The model receives no entry beyond its type's largest number.
    largest = rounding.LARGEST.get(tensor.dtype, math.inf) * math.sqrt(tensor.size)

    def fits(norms, radius):
        with np.errstate(over="ignore", invalid="ignore"):
            reached = np.minimum(rounding.up(norms + radius), largest)
            return stays_finite(network, reached, network.logits)

    cut = np.flatnonzero((radius > 0) & ~fits(norms, radius))
    if not len(cut):
        return radius
    radius = radius.copy()
    low, high = np.zeros(len(cut)), np.minimum(radius[cut], largest)
    for _ in range(_HALVINGS):
        middle = low + (high - low) / 2
        fine = fits(norms[cut], middle)
        low, high = np.where(fine, middle, low), np.where(fine, high, middle)
    radius[cut] = low
    return radius


def check_balls(network, x, labels, radius, own):
    """The model keeps its decision at points of the very balls that are claimed, or nothing is.

    At the claimed radius in random directions and towards inputs of other classes; a check that
    catches misreadings, no proof.

    Args:
        network: `Network`.
        x: the first inputs, as the model receives them.
        labels: int64 (n,), at least as many.
        radius: float64 (n,), claimed.
        own: `LogitsModel` of the network.

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
        points = (x[chosen].astype(np.float64) + step.reshape(direction.shape)).astype(x.dtype)
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
            with np.errstate(invalid="ignore"):
                lead = rivals.max(axis=1) - logits[rows, mine]
        broken = np.flatnonzero(inside & (lead > noise))
        if len(broken):
            worst = chosen[broken[0]]
            raise UnfaithfulReading(
                "The model leaves its decision within a radius that its reading would prove. "
                f"Received: input {worst}, radius {radius[worst]:.6g}. No claim about this model "
                "is made; please report it with the model."
            )
