"""Certificates are tried on the model itself, at points of the balls that they claim."""

import math

import numpy as np

from tf_lyapunov.bounds.composition import rounding_errors, stays_finite, underflow_errors
from tf_lyapunov.errors import UnfaithfulReading
from tf_lyapunov.program import rounding

# Entries of points that are tried at once.
_ENTRIES = 2**19

# Share of a model's logits that rounding is taken for where nothing bounds it.
_GROSS = 1e-2
# Halvings of a radius: what is left of it is then smaller than any number.
_HALVINGS = 64


def without_overflow(network, norms, radius, sources):
    """Radii cut to balls on which no value of the model can overflow in its own formats.

    The exact function may stay within its class where the model gives infinity or NaN: float16
    ends at 65504.

    Args:
        network: `Network`.
        norms: dict of float64 (n,), bounds on the norms of every input by its node's name.
        radius: float64 (n,), proved of the exact function.
        sources: names of the inputs that a perturbation may change.

    Returns:
        float64 (n,), at most `radius`.
    """
    reached = _Reached(network, norms, sources)

    def fits(rows, radius):
        with np.errstate(over="ignore", invalid="ignore"):
            return stays_finite(network, reached(rows, radius), network.logits)

    cut = np.flatnonzero((radius > 0) & ~fits(slice(None), radius))
    return _largest_fitting(radius, cut, np.zeros(len(cut)), fits, reached.largest)


def without_flushing(network, norms, radius, sources, radii):
    """Radii within which the class stays whatever subnormal numbers the device sets to zero.

    Margins may be lower than the exact ones by what `underflow_errors` bounds over the ball.

    Args:
        network, norms, radius, sources: as for `without_overflow`.
        radii: function of rows and of errors, float64, that are added to those of their logits;
            returns radii.

    Returns:
        float64 (n,), at most `radius`.
    """
    reached = _Reached(network, norms, sources)

    def allowed(rows, radius):
        with np.errstate(over="ignore", invalid="ignore"):
            lost = underflow_errors(network, reached(rows, radius), network.logits)
            return radii(rows, lost)

    # What fits a larger radius fits a smaller one.
    first = np.minimum(radius, allowed(slice(None), radius))
    much = first < radius * (1 - 1e-6)
    cut = np.flatnonzero(much)
    return _largest_fitting(
        np.where(much, radius, first),
        cut,
        first[cut],
        lambda rows, r: r <= allowed(rows, r),
        reached.largest,
    )


class _Reached:
    """Norms of the inputs over balls: no entry is beyond its type's largest number."""

    def __init__(self, network, norms, sources):
        self.norms, self.sources = norms, sources
        self.ends = {
            t.producer: rounding.LARGEST.get(t.dtype, math.inf) * math.sqrt(t.size)
            for t in network.graph.inputs
        }
        self.largest = max(self.ends[name] for name in sources)

    def __call__(self, rows, radius):
        return {
            name: np.minimum(
                rounding.up(norm[rows] + (radius if name in self.sources else 0.0)),
                self.ends[name],
            )
            for name, norm in self.norms.items()
        }


def _largest_fitting(radius, rows, low, fits, largest):
    """`radius` with those of `rows` lowered to what `fits(rows, radii)`, as `low` does."""
    if not len(rows):
        return radius
    radius = radius.copy()
    high = np.minimum(radius[rows], largest)
    for _ in range(_HALVINGS):
        middle = low + (high - low) / 2
        fine = fits(rows, middle)
        low, high = np.where(fine, middle, low), np.where(fine, high, middle)
    radius[rows] = low
    return radius


def check_balls(network, x, labels, radius, own, chosen=None, bounds=None):
    """The model keeps its decision at points of the very balls that are claimed, or nothing is.

    At the claimed radius in random directions and towards inputs of other classes; a check that
    catches misreadings, no proof.

    Args:
        network: `Network`.
        x: list with the first rows of every input, as the model receives them.
        labels: int64 (n,), at least as many.
        radius: float64 (n,), of l2 balls within what is claimed.
        own: `LogitsModel` of the network.
        chosen: bool per input, those that may change; None for all.
        bounds: `(low, high)` of valid inputs, or None.

    Raises:
        UnfaithfulReading: naming an input whose decision changes within its radius.
    """
    rng = np.random.default_rng()
    count = len(x[0])
    radius, labels = radius[:count], labels[:count]
    rows = np.flatnonzero((radius > 0) & np.isfinite(radius) & (radius < 1e30))
    moves = [True] * len(x) if chosen is None else list(chosen)
    if not len(rows) or any(a.dtype.kind in "iub" for a, m in zip(x, moves, strict=True) if m):
        return
    rows = rows[: max(_ENTRIES // max(sum(a[0].size for a in x), 1), 1)]
    here = [a[rows] for a in x]
    other = rng.permutation(count)[: len(rows)]
    towards = [a[other].astype(np.float64) - b for a, b in zip(x, here, strict=True)]
    for drawn in ([rng.normal(size=a.shape) for a in here], towards):
        directions = [d if m else np.zeros_like(d) for d, m in zip(drawn, moves, strict=True)]
        size = np.maximum(_norms(directions), 1e-300)
        reach = radius[rows] * (1 - 1e-6) / size
        points = [
            _moved(a, d * reach.reshape(-1, *[1] * (d.ndim - 1)), bounds) if m else a
            for a, d, m in zip(here, directions, moves, strict=True)
        ]
        # What the cast to the model's dtype moved must not leave the ball.
        inside = _norms(
            [p.astype(np.float64) - a for p, a in zip(points, here, strict=True)]
        ) <= radius[rows]  # fmt: skip
        logits = own.predict(points, len(rows))
        norms = {
            name: rounding.euclidean_norms_up(p)
            for name, p in zip(network.inputs, points, strict=True)
        }
        noise = 2 * math.sqrt(2) * rounding_errors(network, norms, network.logits)
        if network.products:  # no bound is known: gross differences alone show
            noise = _GROSS * np.abs(logits).max(axis=1)
        mine = labels[rows]
        if logits.shape[1] == 1:
            lead = np.where(mine == 1, -logits[:, 0], logits[:, 0])
        else:
            each = np.arange(len(logits))
            rivals = logits.copy()
            rivals[each, mine] = -np.inf
            with np.errstate(invalid="ignore"):
                lead = rivals.max(axis=1) - logits[each, mine]
        broken = np.flatnonzero(inside & (lead > noise))
        if len(broken):
            worst = rows[broken[0]]
            raise UnfaithfulReading(
                "The model leaves its decision within a radius that its reading would prove. "
                f"Received: input {worst}, radius {radius[worst]:.6g}. No claim about this model "
                "is made; please report it with the model."
            )


def _moved(x, step, bounds):
    """x + step among the valid inputs, which are no farther from x, in the model's dtype."""
    points = x.astype(np.float64) + step
    return (points if bounds is None else np.clip(points, *bounds)).astype(x.dtype)


def _norms(arrays):
    """l2 norms of the rows of several arrays together."""
    return np.linalg.norm(
        np.stack([np.linalg.norm(a.reshape(len(a), -1), axis=1) for a in arrays]), axis=0
    )
