"""Functions of one variable on an interval, as linear pieces with a bound on what they miss.

φ(t) = s_k t + d_k ± e_k on a_k ≤ t ≤ b_k, per unit and piece. Piecewise linear functions are exact
(e = 0, rounding of the intercepts aside); others are cut into cells between knots, on which the
chord errs by at most

    e = min{ max|φ''|·w²/8,  (β - m)(m - α)/(β - α)·w },                                    (P)

with the cell's width w, its chord's slope m, and the slope sector [α, β] of φ: the second is the
largest distance between the chord and the two lines of slopes α and β through its ends.
"""

import dataclasses
import functools

import numpy as np

from tf_lyapunov.program.families.elementwise import FUNCTIONS, Elementwise, Kinked

# Largest |φ''| away from the corners that are listed with it: bounds, rounded up.
_CURVATURES = {
    "tanh": (0.7699, ()),
    "tanh_shrink": (0.7699, ()),
    "sigmoid": (0.09623, ()),
    "log_sigmoid": (0.25, ()),
    "softplus": (0.25, ()),
    "softsign": (2.0, (0.0,)),
    "silu": (0.5, ()),
    "gelu": (0.7979, ()),
    "selu": (1.7582, (0.0,)),
    "hard_silu": (1.0 / 3 + 1e-12, (-3.0, 3.0)),
    "sparse_plus": (0.5, (-1.0, 1.0)),
}
_ERROR = 2.0**-45  # of NumPy's functions, relative to 1 + |t| + |φ(t)|
CELLS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Linear pieces on the intervals of m units.

    Attributes:
        start, stop: float64 (pieces, ..., m), a_k ≤ b_k; together they cover the interval. Pieces
            that do not meet it repeat a point of it.
        slope, intercept, error: float64, broadcastable to these.
        tilt: bound on how far slopes of φ on a piece may lie from `slope`.
    """

    start: np.ndarray
    stop: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray
    error: np.ndarray
    tilt: np.ndarray

    def slopes(self):
        """Bounds on all slopes of φ within the interval, (..., m) each."""
        low = (self.slope - self.tilt) + 0.0 * self.start
        high = (self.slope + self.tilt) + 0.0 * self.start
        return low.min(axis=0), high.max(axis=0)

    def range(self):
        """Bounds on φ over the interval."""
        ends = [self.slope * t + self.intercept for t in (self.start, self.stop)]
        size = np.abs(self.slope) * np.maximum(np.abs(self.start), np.abs(self.stop))
        room = self.error + 4 * 2.0**-52 * (size + np.abs(self.intercept))
        low = (np.minimum(*ends) - room).min(axis=0)
        return low, (np.maximum(*ends) + room).max(axis=0)


def has_pieces(operation):
    """Whether `pieces` knows the operation."""
    return isinstance(operation, (Elementwise, Kinked))


def pieces(operation, low, high, columns):
    """`Pieces` of an elementwise operation on low ≤ t ≤ high.

    Args:
        operation: `Elementwise` or `Kinked`.
        low, high: float64 (..., m), finite; float32 in searches, which prove nothing.
        columns: `Columns` of these m units, for parameters per unit.
    """
    if isinstance(operation, Kinked):
        slopes = np.broadcast_to(operation.slopes, columns.shape).ravel()[columns.index]
        return _between((0.0,), [(slopes, 0.0), (1.0, 0.0)], low, high)
    exact = linear_pieces(operation)
    if exact is not None:
        return _between(*exact, low, high)
    return _cells(operation, low, high)


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """Which units of a sample: their flat index, and the sample's shape."""

    index: np.ndarray
    shape: tuple


def linear_pieces(operation):
    """`(breaks, [(slope, intercept), ...])` of a piecewise linear function, or None."""
    name, parameters = operation.name, dict(operation.parameters)
    if name == "relu":
        slope, cap = parameters.get("negative_slope", 0.0), parameters.get("max_value")
        if cap is None:
            return (0.0,), [(slope, 0.0), (1.0, 0.0)]
        return (0.0, cap), [(slope, 0.0), (1.0, 0.0), (0.0, cap)]
    if name == "leaky_relu":
        return (0.0,), [(parameters.get("negative_slope", 0.2), 0.0), (1.0, 0.0)]
    if name == "soft_shrink":
        edge = parameters.get("threshold", 0.5)
        return (-edge, edge), [(1.0, edge), (0.0, 0.0), (1.0, -edge)]
    return {
        "linear": ((), [(1.0, 0.0)]),
        "abs": ((0.0,), [(-1.0, 0.0), (1.0, 0.0)]),
        "relu6": ((0.0, 6.0), [(0.0, 0.0), (1.0, 0.0), (0.0, 6.0)]),
        "hard_tanh": ((-1.0, 1.0), [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0)]),
        "hard_sigmoid": ((-3.0, 3.0), [(0.0, 0.0), (1 / 6, 0.5), (0.0, 1.0)]),
        "sparse_sigmoid": ((-1.0, 1.0), [(0.0, 0.0), (0.5, 0.5), (0.0, 1.0)]),
    }.get(name)


def _between(breaks, lines, low, high):
    """Pieces of a function that is linear between breaks."""
    edges = [-np.inf, *breaks, np.inf]
    shape = low.shape
    # The piece that holds the lower end stands in for those that the interval does not meet.
    first = np.searchsorted(np.array(breaks), low, side="right")
    kind = np.result_type(low.dtype, np.float32)
    slopes = [np.broadcast_to(np.asarray(s, kind), shape) for s, _ in lines]
    shifts = [np.broadcast_to(np.asarray(d, kind), shape) for _, d in lines]
    own_slope, own_shift = np.choose(first, slopes), np.choose(first, shifts)
    found = []
    for k in range(len(lines)):
        start, stop = np.maximum(low, edges[k]), np.minimum(high, edges[k + 1])
        off = start >= stop
        found.append(
            (
                np.where(off, low, start),
                np.where(off, low, stop),
                np.where(off, own_slope, slopes[k]),
                np.where(off, own_shift, shifts[k]),
            )
        )
    start, stop, slope, intercept = (np.stack(part) for part in zip(*found, strict=True))
    # Constants such as 1/6 are rounded once, which the slack of the relaxation holds.
    return Pieces(start, stop, slope, intercept, np.zeros_like(slope), np.zeros_like(slope))


def _cells(operation, low, high):
    """Cells between knots, the corners of the function among them."""
    parameters = dict(operation.parameters)
    curvature, corners = _curvature(operation.name, tuple(operation.parameters))
    share = np.linspace(0.0, 1.0, CELLS + 1).reshape(-1, *[1] * low.ndim)
    knots = low + (high - low) * share
    knots[-1] = high
    for corner in corners:
        knots = np.concatenate([knots, np.clip(corner, low, high)[None]])
    knots = np.sort(knots, axis=0)
    value = FUNCTIONS[operation.name](knots, **parameters)
    start, stop = knots[:-1], knots[1:]
    width = stop - start
    safe = np.maximum(width, 1e-290)
    alpha, beta = operation.sector.alpha, operation.sector.beta
    slope = np.clip(np.where(width > 0, (value[1:] - value[:-1]) / safe, 0.0), alpha, beta)
    intercept = value[:-1] - slope * start
    room = max(beta - alpha, 1e-300)
    error = np.maximum(beta - slope, 0) * np.maximum(slope - alpha, 0) / room * width
    tilt = np.maximum(beta - slope, slope - alpha)
    if curvature is not None:
        error = np.minimum(error, curvature * width**2 / 8)
        tilt = np.minimum(tilt, curvature * width)
    size = 1 + np.abs(knots) + np.abs(value)
    size = np.maximum(size[1:], size[:-1]) + np.abs(slope) * width
    noise = _ERROR * size
    # The chord's slope was found from rounded values, which may move it far on narrow cells.
    missed = np.abs(value[1:] - (slope * stop + intercept)) + noise
    tilt = tilt + np.where(width > 0, 2 * noise / safe, beta - alpha)
    tilt = np.minimum(tilt, beta - alpha)
    return Pieces(start, stop, slope, intercept, error * (1 + 1e-9) + missed + noise, tilt)


@functools.lru_cache(maxsize=64)
def _curvature(name, parameters):
    """`(max|φ''| or None, corners)` of a function."""
    values = dict(parameters)
    if name == "elu":
        return abs(values.get("alpha", 1.0)), (0.0,)
    if name == "celu":
        return 1.0 / abs(values.get("alpha", 1.0)) * (1 + 1e-12), (0.0,)
    if name == "squareplus":
        return 0.5 / np.sqrt(values.get("b", 4.0)) * (1 + 1e-12), ()
    if name == "gelu" and values.get("approximate"):
        return None, ()
    return _CURVATURES.get(name, (None, ()))
