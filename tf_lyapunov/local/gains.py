"""Gains of operations that are neither linear nor elementwise: ball in, ball out."""

import functools
import math

import numpy as np

from tf_lyapunov.local import contractions, maps
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families import pooling as geometry
from tf_lyapunov.program.families.merging import Extreme
from tf_lyapunov.program.families.normalizing import Normalized, normalization_gain
from tf_lyapunov.program.families.norms import WindowNorm, window_norm_gain
from tf_lyapunov.program.families.pooling import Pooled
from tf_lyapunov.program.families.softmax import Softmax


@functools.singledispatch
def radius(operation, shapes, radii):
    """Bound on how far the output moves, in l2, if the inputs move by `radii`.

    Args:
        operation: an `Operation` for which `has_gain` holds.
        shapes: of the inputs' samples.
        radii: list of float.
    """
    raise TypeError(f"No gain is known. Received: {type(operation).__name__}.")


def has_gain(operation):
    """Whether `radius` knows the operation."""
    return radius.dispatch(type(operation)) is not radius.dispatch(object)


def is_known(operation):
    """Whether bounds around an input have any rule for the operation."""
    return maps.is_linear(operation) or has_pieces(operation) or has_gain(operation)


@radius.register
def _(operation: Softmax, shapes, radii):
    # As `program.activations.softmax_gain` proves.
    if not operation.logarithm:
        return 0.5 * radii[0]
    count = math.prod(shapes[0][a - 1] for a in operation.axes)
    return rounding.product_up(rounding.sqrt_up(count), radii[0])


@radius.register
def _(operation: Pooled, shapes, radii):
    if operation.kind == "mean":
        return maps.radius(operation, shapes, radii)
    sizes = shapes[0][1:] if operation.channels_first else shapes[0][:-1]
    if operation.sizes is None:
        return radii[0]
    found = geometry.max_pooling_gain(operation.sizes, operation.strides, operation.padding, sizes)
    return rounding.product_up(float(found), radii[0])


@radius.register
def _(operation: Extreme, shapes, radii):
    """|max(a, b) - max(a', b')| ≤ max(|a - a'|, |b - b'|), entry by entry."""
    size = math.prod(maps.broadcast(shapes))
    repeats = [rounding.sqrt_up(size / max(math.prod(s), 1)) for s in shapes]
    pairs = zip(repeats, radii, strict=True)
    return rounding.root_sum_squares_up(*(rounding.product_up(r, d) for r, d in pairs))


@radius.register
def _(operation: Normalized, shapes, radii):
    shape = operation._split(np.empty((1, *shapes[0]))).shape
    return rounding.product_up(normalization_gain(operation, shape)[0], radii[0])


@radius.register
def _(operation: WindowNorm, shapes, radii):
    return rounding.product_up(window_norm_gain(operation, shapes[0]), radii[0])


__all__ = ["contractions", "has_gain", "is_known", "radius"]
