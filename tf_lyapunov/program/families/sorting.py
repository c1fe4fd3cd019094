"""Activations that sort, reflect or split entries: they keep distances."""

from tf_lyapunov.layers import activations
from tf_lyapunov.program import rounding
from tf_lyapunov.program.gain import FUNCTION_ULPS, layer_gain
from tf_lyapunov.program.weights import finite_value


def _sorting_rule(call):
    return layer_gain(call, "activation", 1.0, "permutes entries", 0.0)


def _householder_rule(call):
    layer = call.operation
    finite_value(layer, layer.angle, layer.angle.dtype)
    # |v| = 1 exactly; the sine and cosine of the angle are library functions. With e the error of
    # either, y errs by 2(2√2e + …)·‖z‖ from v and by fewer than ten further roundings.
    error = rounding.gamma(8 * FUNCTION_ULPS, rounding.unit_roundoff(layer.compute_dtype))
    return layer_gain(call, "activation", 1.0, "identity or reflection of each pair", error)


def _two_sided_rule(call):
    method = "positive and negative parts, an isometry of norms"
    return layer_gain(call, "activation", 1.0, method, 0.0)


READERS = {}
RULES = {
    activations.MaxMin: _sorting_rule,
    activations.GroupSort: _sorting_rule,
    activations.FullSort: _sorting_rule,
    activations.Householder: _householder_rule,
    activations.TwoSidedReLU: _two_sided_rule,
}
