"""Sorting and reflections in plain Keras layers, without a loss of proven gain.

    [min(a, b), max(a, b)] = R₂·(identity and |·|)·R₁·[a, b],
    R₁ = ½[[1, 1], [1, -1]],   R₂ = [[1, -1], [1, 1]]                                        (1)

with |·| a `PReLU` of slope -1. ‖R₂‖·‖R₁‖ = 1, so that a certificate of the plain model loses
nothing; `Maximum` and `Minimum` of two maps would cost it a factor of √2 each.
"""

import math

import keras
import numpy as np

from tf_lyapunov.layers import activations
from tf_lyapunov.program.weights import inference_value

# Larger groups are sorted by `keras.ops.sort`, which no certificate of a plain model knows.
_LARGEST_NETWORK = 8


def _exchange(pairs, size, orthogonal=False):
    """`(R₁, slopes, R₂)` of (1), as kernels: the smaller of each pair goes to its first place.

    With `orthogonal` both have the factor 1/√2 in (1), as stages that do not pair all entries need.
    """
    scale = math.sqrt(2) if orthogonal else 1.0
    first, slopes, last = np.eye(size), np.ones(size), np.eye(size)
    for low, high in pairs:
        block = np.ix_((low, high), (low, high))
        # Sum at `low`, difference at `high`.
        first[block] = np.array([[0.5, 0.5], [0.5, -0.5]]) * scale
        last[block] = np.array([[1.0, 1.0], [-1.0, 1.0]]) / scale
        slopes[high] = -1.0
    return first, slopes, last


def _folded(p, x, stages):
    """Stages R₁, PReLU, R₂ along the last axis, neighbouring matrices multiplied."""
    first, slopes, pending = stages[0]
    x = _slopes(p, p.dense(x, first), slopes)
    for first, slopes, last in stages[1:]:
        x, pending = _slopes(p, p.dense(x, pending @ first), slopes), last
    return p.dense(x, pending)


def _slopes(p, x, slopes):
    shared = tuple(range(1, len(x.shape) - 1))
    alpha = slopes.reshape((1,) * len(shared) + (-1,))
    return p.new(
        keras.layers.PReLU, shared_axes=shared or None, weights=[alpha], shape=x.shape
    )(x)  # fmt: skip


def _max_min(p, x):
    def pairs(x):
        half = x.shape[-1] // 2
        return _folded(p, x, [_exchange([(i + half, i) for i in range(half)], 2 * half)])

    return p.on_last_axis(x, p.layer.axis, pairs)


def _group_sort(p, x):
    size = x.shape[p.layer.axis]
    group = getattr(p.layer, "group_size", size)

    def by_network(x):
        stages = []
        for r in range(group if group > 2 else group - 1):  # odd-even transposition
            low = [g + i for g in range(0, size, group) for i in range(r % 2, group - 1, 2)]
            stages.append(_exchange([(i, i + 1) for i in low], size, group > 2))
        return _folded(p, x, stages) if stages else x

    def by_operation(x):
        shape = x.shape[1:]
        x = p.reshape(x, (*shape[:-1], size // group, group))
        return p.reshape(keras.ops.sort(x, axis=-1), shape)

    known = group <= _LARGEST_NETWORK
    return p.on_last_axis(x, p.layer.axis, by_network if known else by_operation)


def _householder(p, x):
    angle = inference_value(p.layer.angle, p.layer.angle.dtype) / 2
    half = len(angle)
    s, c = np.diag(np.sin(angle)), np.diag(np.cos(angle))
    # Components along (cos, sin) and along the normal (sin, -cos), whose modulus changes sign.
    first = np.block([[c, s], [s, -c]])
    last = np.block([[c, s], [-s, c]])
    slopes = np.repeat([1.0, -1.0], half)
    return p.on_last_axis(x, p.layer.axis, lambda x: _folded(p, x, [(first, slopes, last)]))


def _prelu(p, x):
    slope = np.clip(inference_value(p.layer.slope, p.layer.compute_dtype), -1.0, 1.0)
    rank = len(x.shape)
    shared = [a % rank for a in p.layer.shared_axes]
    layer = p.new(
        keras.layers.PReLU, shared_axes=shared or None, weights=[slope], shape=x.shape
    )  # fmt: skip
    return layer(x)


def _two_sided(p, x):
    positive = p.new(keras.layers.ReLU)(x)
    negative = p.new(keras.layers.ReLU)(p.scale(x, -1.0))
    return p.new(keras.layers.Concatenate, axis=p.layer.axis)([positive, negative])


RULES = {
    activations.MaxMin: _max_min,
    activations.GroupSort: _group_sort,
    activations.FullSort: _group_sort,
    activations.Householder: _householder,
    activations.LipschitzPReLU: _prelu,
    activations.TwoSidedReLU: _two_sided,
}
