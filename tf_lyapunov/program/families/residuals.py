"""Convex combinations of a branch and its input."""

from fractions import Fraction

import numpy as np

from tf_lyapunov.layers.residual import ConvexCombination
from tf_lyapunov.program import rounding
from tf_lyapunov.program.families.merging import Weighted
from tf_lyapunov.program.gain import Affine, Gain
from tf_lyapunov.program.weights import finite_value
from tf_lyapunov.theory.rounding import round_up


def _share(layer):
    """t, as it is used: widened to float32 at least, never rounded."""
    return float(np.clip(finite_value(layer, layer.mixture, layer.mixture.dtype)[0], 0.0, 1.0))


def _read(call):
    # 1 - t rounds by one unit more than a stored weight: `Weighted` allows two more than its terms.
    share = _share(call.operation)
    return [Weighted((1.0 - share, share))]


def _combination_rule(call):
    layer, dtype = call.operation, call.operation.compute_dtype
    share = _share(layer)
    weights = (round_up(1 - Fraction(share)), share)
    unit = rounding.unit_roundoff(dtype)
    cast = sum(unit for t in call.inputs if t.dtype != dtype)
    error = rounding.gamma(6, unit) + cast
    method = f"t·L_f + (1 - t)·L_x, t = {share:.6g}"
    return Gain("merge", 1.0, method, Affine(1.0, 0.0, error), "sum", weights)


READERS = {ConvexCombination: _read}
RULES = {ConvexCombination: _combination_rule}
SEVERAL_INPUTS = (ConvexCombination,)
