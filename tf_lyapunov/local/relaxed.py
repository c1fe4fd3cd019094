"""Which operations have a relaxation, and those of several variables around a point."""

import numpy as np

from tf_lyapunov.local.maxima import is_window_maximum
from tf_lyapunov.local.normalized import NormalizedCurve
from tf_lyapunov.local.pieces import has_pieces
from tf_lyapunov.local.products import ProductCurve
from tf_lyapunov.local.softmax import LogSoftmaxCurve, SoftmaxCurve
from tf_lyapunov.local.windownorms import NormCurve
from tf_lyapunov.program.families.normalizing import Normalized
from tf_lyapunov.program.families.norms import WindowNorm
from tf_lyapunov.program.families.products import Product
from tf_lyapunov.program.families.softmax import Softmax


def is_relaxed(operation):
    """Whether bounds around an input go through an operation that is not linear."""
    return has_pieces(operation) or is_window_maximum(operation) or is_curved(operation)


def is_curved(operation):
    """Whether `curve_of` knows the operation."""
    if isinstance(operation, WindowNorm):
        return operation.p == 2.0
    return isinstance(operation, (Softmax, Normalized, Product))


def curve_of(operation, shape, center, low, high, radius=np.inf):
    """The `Curve` of an operation around some centres.

    Args:
        operation: one that `is_curved`.
        shape: of a sample.
        center, low, high: (centres, inputs), z⁰ and the box that holds it.
        radius: ρ, the same for all centres.
    """
    kind = {
        Softmax: SoftmaxCurve,
        Normalized: NormalizedCurve,
        WindowNorm: NormCurve,
        Product: ProductCurve,
    }
    if isinstance(operation, Softmax) and operation.logarithm:
        kind[Softmax] = LogSoftmaxCurve
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return kind[type(operation)](operation, tuple(shape), center, low, high, radius)
