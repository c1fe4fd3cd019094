"""Almost-orthogonal layers: columns rescaled by the row sums of their Gram matrix."""

import itertools
import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.linear import LipschitzConv, ScaledDense, with_gain
from tf_lyapunov.spectral.gram import PIECE, product, product_terms, unit_entries
from tf_lyapunov.spectral.polar import differentiable_gram, partner_in_range
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# Columns whose row sum, relative to the largest entry squared, is smaller are only shrunk.
FLOOR = 2.0**-40
# Matrices of more entries are multiplied in pieces: rounding adds u times this to a sum at most.
UNCUT = 2**18


def rescaled(kernel):
    """Kernel whose map has norm ≤ 1, in exact arithmetic as stored: one factor per input channel.

        K[t] = diag(d)·W[t],   d_c = (Σ_{c',δ} |Σ_t W[t]W[t+δ]ᵀ|_{cc'})^(-1/2)             (1)

    Let J be the map on the infinite grid, D its rescaling, and G = JᵀJ, whose entry at two input
    positions δ apart is the inner sum. diag(Σ_j |G|_ij) - G is diagonally dominant, hence ⪰ 0,
    so that DGD ⪯ I and ‖JD‖ ≤ 1. Strides, zero padding and cropping select rows and columns of
    JD; dilation reorders them. A smaller d_c keeps the bound: the rounding of G, bounded by
    γ·|W|(|W|ᵀ1) row by row, is added to the sums.

    Args:
        kernel: `(*k, in, out)` tensor; a matrix has no spatial axis.

    Returns:
        Tensor of the same shape and type; 0 for 0, NaN if an entry is not finite.

    Example: orthogonal kernels are left as they are.

    >>> w = np.asarray(rescaled(3 * np.eye(2, dtype="float32")))
    >>> bool(np.allclose(w, np.eye(2), atol=1e-4))
    True

    Reference: Prach and Lampert (2022), Theorems 1 and 2; sound form.
    """
    kernel = ops.convert_to_tensor(kernel)
    given, dtype = kernel.dtype, work_dtype(kernel)
    spatial, (a, b) = tuple(kernel.shape[:-2]), kernel.shape[-2:]
    taps = math.prod(spatial)
    scale, _ = unit_entries(ops.stop_gradient(kernel))
    # The result does not depend on the scale: no gradient is lost.
    unit = ops.cast(kernel / scale, dtype)
    rows = ops.reshape(unit, (taps * a, b))
    u, stored = unit_roundoff(dtype), max(unit_roundoff(dtype), unit_roundoff(given))
    terms = product_terms(b) + taps + 2
    with full_precision():
        gram = product(rows, rows, axis=-1)
        sums = _autocorrelation_sums(gram, spatial, a)
    size = ops.abs(ops.stop_gradient(rows))
    reach = ops.sum(ops.reshape(size * ops.sum(size, axis=0), (taps, a, b)), axis=(0, 2))
    # Sums of non-negative terms, in two stages; at most 1e-30 is lost to underflow.
    sums = sums * (1 + gamma(2 * a + 2 * taps + 8, u))
    sums = sums + gamma(terms, u) * (1 + gamma(taps * a + b + 8, u)) * reach + FLOOR
    margin = 8 * u + 8 * stored * math.sqrt(taps * min(a, b))
    factor = (1 - margin) / ops.sqrt(sums)
    return ops.cast(unit * factor[:, None], given)


def _autocorrelation_sums(gram, spatial, channels):
    """Σ_{c',δ} |Σ_t W[t]W[t+δ]ᵀ|_{cc'} from the products of all pairs of taps."""
    taps = math.prod(spatial)
    if taps == 1:
        return ops.sum(ops.abs(gram), axis=-1)
    gather, weights = _shift_matrix(spatial)
    pairs = ops.transpose(ops.reshape(gram, (taps, channels, taps, channels)), (0, 2, 1, 3))
    shifts = ops.matmul(
        ops.cast(gather, gram.dtype), ops.reshape(pairs, (taps * taps, channels * channels))
    )
    sizes = ops.abs(ops.reshape(shifts, (-1, channels, channels)))
    # The shift -δ has the transposed products.
    both = ops.sum(sizes, axis=2) + ops.sum(sizes, axis=1) * ops.cast(weights, gram.dtype)[:, None]
    return ops.sum(both, axis=0)


def _shift_matrix(spatial):
    """0/1 matrix from pairs of taps (t, t') to shifts δ = t' - t, one of each ±δ.

    Returns also 1 per shift, and 0 for δ = 0, which is its own opposite.
    """
    positions = list(itertools.product(*(range(k) for k in spatial)))
    zero = (0,) * len(spatial)
    index, rows = {}, []
    for pair, (t, other) in enumerate(itertools.product(positions, positions)):
        shift = tuple(q - p for p, q in zip(t, other, strict=True))
        if shift >= zero:
            rows.append((index.setdefault(shift, len(index)), pair))
    gather = np.zeros((len(index), len(positions) ** 2), "float32")
    gather[tuple(np.array(rows).T)] = 1.0
    return gather, np.array([float(shift != zero) for shift in index], "float32")


def row_sum_scale(kernel, max_gain):
    """d with ‖W·diag(d)‖ ≤ max_gain, `(units,)`, or ‖diag(d)·W‖, `(in, 1)` if units > in.

        d_j = max_gain·(Σ_k |G|_jk)^(-1/2),   G = WᵀW, or WWᵀ                               (2)

    (1) of a matrix, for the smaller of its two Gram matrices. Forming G errs by γ‖w_j‖‖w_k‖ in
    each entry, which is added. Costs 2·in·units·min(in, units) flops, and as many for the gradient.
    """
    axis = -2 if kernel.shape[0] >= kernel.shape[1] else -1
    side, given, dtype = min(kernel.shape), kernel.dtype, work_dtype(kernel)
    u, stored = unit_roundoff(dtype), max(unit_roundoff(dtype), unit_roundoff(given))
    length = max(kernel.shape)
    pieces = 1 if length * side <= UNCUT else math.ceil(length / PIECE)
    terms = math.ceil(length / pieces) + pieces + 6
    with full_precision():
        matrix = ops.cast(kernel, dtype)
        partner, unit = partner_in_range(matrix)
        gram = differentiable_gram(matrix, axis, partner, pieces)
    squares = ops.diagonal(ops.stop_gradient(gram))
    norms = ops.sqrt(ops.maximum(squares, 0.0) * (1 + 2 * gamma(terms, u)))
    largest = ops.max(squares)
    largest = ops.where(largest > 0, largest, ops.ones_like(largest))
    forming = gamma(terms, u) * norms * ops.sum(norms) + FLOOR * largest
    sums = (ops.sum(ops.abs(gram), axis=-1) + forming) * (1 + gamma(2 * side + 16, u))
    scale = (1 / ops.sqrt(sums)) / unit
    goal = max_gain * (1 - 8 * u - 8 * stored * math.sqrt(side))
    scale = ops.cast(scale * rounded_down(goal, dtype), given)
    return scale if axis == -2 else scale[:, None]


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class AlmostOrthogonalDense(ScaledDense):
    """Dense layer with the almost-orthogonal rescaling of its rows or columns (AOL).

        y = φ(x K + b),   K = max_gain·W·diag(d),   d_j = (Σ_k |WᵀW|_jk)^(-1/2)

    with W and Wᵀ exchanged if units > in, so that the Gram matrix is that of the smaller side (the
    paper rescales inputs; its bound holds for Wᵀ alike, and only the smaller side can be
    orthogonal). ‖K‖ ≤ max_gain for every W, with equality for orthogonal ones, which training
    approaches from below.

    Args:
        units: width of the output.
        *args, **kwargs: what Keras' layer takes next, in its order (`activation`, `use_bias`,
            `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> layer = AlmostOrthogonalDense(3)
    >>> layer.build((None, 5))
    >>> bool(np.linalg.norm(layer.effective_values()["kernel"], 2) <= 1.0)
    True

    Reference: Prach and Lampert (2022), Theorem 1; sound form (smaller side, rounding).
    """

    def _scale(self, kernel):
        return row_sum_scale(kernel, self.max_gain)


class _AlmostOrthogonalConv(LipschitzConv):
    @property
    def kernel_rank(self):
        # The unstrided map is bounded: one phase.
        a, b = self.kernel.shape[-2:]
        return self.groups * min(a, b // self.groups)

    def _parametrised(self, kernel, training=False):
        rank = math.prod(kernel.shape[:-2]) * self.kernel_rank
        # Groups are maps side by side, each of its own filters.
        parts = [rescaled(part) for part in ops.split(kernel, self.groups, axis=-1)]
        joined = parts[0] if self.groups == 1 else ops.concatenate(parts, axis=-1)
        return (with_gain(joined, self.max_gain, rank),)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class AlmostOrthogonalConv2D(_AlmostOrthogonalConv):
    """Convolution with the almost-orthogonal rescaling of its input channels (AOL).

        y = φ(K ∗ x + b),   K[t] = max_gain·diag(d)W[t],
        d_c = (Σ_{c',δ} |Σ_t W[t]W[t+δ]ᵀ|_{cc'})^(-1/2)

    ‖K‖ ≤ max_gain for every W, image size, stride and zero padding.

    Args:
        filters, kernel_size, strides, padding, data_format, dilation_rate, groups: as in
            `keras.layers.Conv2D`, and in its order (default padding `"same"`).
        *args, **kwargs: what Keras' layer takes next, in its order (`activation`, `use_bias`,
            `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> layer = AlmostOrthogonalConv2D(4, 3, strides=2)
    >>> layer.build((None, None, None, 2))
    >>> layer.compute_output_shape((None, 7, 6, 2))
    (None, 4, 3, 4)

    Reference: Prach and Lampert (2022), Theorem 2; as published, with rounding provided for.
    """

    rank = 2


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class AlmostOrthogonalConv1D(_AlmostOrthogonalConv):
    """`AlmostOrthogonalConv2D` with one spatial axis; `padding` may also be `"causal"`.

    Args:
        filters, kernel_size, strides, padding, data_format, dilation_rate, groups: as in
            `keras.layers.Conv1D`, and in its order.
        *args, **kwargs: what Keras' layer takes next, in its order (`activation`, `use_bias`,
            `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> layer = AlmostOrthogonalConv1D(4, 3)
    >>> layer.compute_output_shape((None, 7, 2))
    (None, 7, 4)
    """

    rank = 1
