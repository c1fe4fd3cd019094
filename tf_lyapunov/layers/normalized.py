"""Layers whose kernels are divided by a proven upper bound of a norm."""

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.keras_order import FLAGS, NUMBERS, extending, formerly
from tf_lyapunov.layers.linear import LipschitzConv, ScaledDense
from tf_lyapunov.spectral.arguments import GAIN_RANGE, positive
from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.gram import (
    SAFE_TRACE,
    eigenvalue_upper_bound,
    product,
    product_terms,
    trace,
    unit_entries,
)
from tf_lyapunov.spectral.norms import kernel_bounds, spectral_norm
from tf_lyapunov.spectral.polar import partner_in_range, top_eigenvector
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype

# Kernels of a smaller norm are not enlarged: their reciprocal would overflow.
SMALLEST = 1e-30
# Power steps behind the gradient of a convolution's norm and the guess that makes its bound tight.
STEERING_STEPS = 8
# Squarings of a Gram matrix, enough but for flat spectra; two more where the bound on σ² exceeds
# an estimate from below by more than this.
FEW_SQUARINGS, CLOSE = 3, 1.04
# Matrices of more entries are multiplied in pieces: rounding adds u times this to σ² at most, where
# all singular values are equal.
UNCUT = 2**18


def norm_scale(bound, entries, estimate, max_gain, shrink_only):
    """s with ‖s·K‖ ≤ `max_gain`, from a bound on ‖K‖.

        s = max_gain/bound, or min(1, max_gain/bound) with `shrink_only`                      (1)

    The value uses `bound` alone; the gradient is that of (1) with the norm's own gradient, taken
    from `estimate`, in place of the bound's.

    Args:
        bound: scalar ≥ the norm of K; or one per column, and so the rest.
        entries: scalar; rounding each entry by u adds at most u·entries to the norm.
        estimate: scalar close to the norm, whose gradient is used.
        max_gain: positive float.
        shrink_only: whether kernels below `max_gain` are left as they are.
    """
    dtype = keras.backend.standardize_dtype(estimate.dtype)
    u = unit_roundoff(dtype)
    bound, entries, near = (ops.stop_gradient(v) for v in (bound, entries, estimate))
    goal = rounded_down(max_gain * (1 - 8 * u), dtype)
    safe = bound + 4 * u * entries
    # The comparison is false for NaN, which must spread to the whole kernel.
    scale = goal / ops.where(safe < SMALLEST, ops.ones_like(safe), safe)
    change = (estimate - near) / ops.where(near < SMALLEST, ops.ones_like(near), near)
    scale = ops.cast(scale * (1 - ops.cast(change, scale.dtype)), dtype)
    if shrink_only:
        inside = bound <= rounded_down(max_gain, bound.dtype)
        scale = ops.where(inside, ops.ones_like(scale), scale)
    return scale


def spectral_norms(kernel):
    """`(bound, ‖W‖_F bound, estimate)` of a matrix from one Gram matrix G of its smaller side.

    The power steps v ← Gv/trace(G) that steer the bound, and whose ‖Wv‖ has the norm's gradient,
    read n² numbers each and not in·units twice.
    """
    frozen = ops.cast(ops.stop_gradient(kernel), work_dtype(kernel))
    axis = -2 if kernel.shape[0] >= kernel.shape[1] else -1
    side, length = min(kernel.shape), max(kernel.shape)
    u, cut = unit_roundoff(frozen.dtype), length * side > UNCUT
    terms = product_terms(length) if cut else length

    def squared(matrix):
        if cut:
            return product(matrix, matrix, axis)
        other = ops.transpose(matrix)
        return ops.matmul(other, matrix) if axis == -2 else ops.matmul(matrix, other)

    def measured(gram, total):
        near, vector = top_eigenvector(gram)
        # ‖ΔG‖ ≤ γ·trace(G), and the trace is a sum of non-negative terms (`gram.dense_bounds`).
        total = total * (1 + 2 * gamma(terms + side, u))
        top = _close_bound(gram, total, near)
        top = ops.minimum(top + gamma(terms, u) * total, total) * (1 + 8 * u)
        sigma, frobenius = (ops.sqrt(v) * (1 + 8 * u) for v in (top, total))
        return ops.where(total < np.inf, sigma, np.nan), frobenius, vector

    def scaled():
        scale, unit = unit_entries(frozen)
        gram = squared(unit)
        sigma, frobenius, vector = measured(gram, trace(gram))
        # Scaling rounds every entry by 2u: ‖ΔW‖ ≤ 2u‖W‖_F.
        return scale * (sigma + 4 * u * frobenius), scale * frobenius * (1 + 8 * u), vector

    with full_precision():
        gram = squared(frozen)
        total = trace(gram)
        low, high = SAFE_TRACE
        sigma, frobenius, vector = cond(
            ops.logical_and(total > low, total < high),
            lambda: measured(gram, total),
            scaled,
        )
    vector = ops.cast(ops.stop_gradient(vector), kernel.dtype)
    image = ops.matmul(kernel, vector) if axis == -2 else ops.matmul(ops.transpose(vector), kernel)
    return sigma, frobenius, euclidean_norm(image)


def _close_bound(gram, total, near):
    """`eigenvalue_upper_bound` by few squarings, and by more where these leave it too loose."""
    top = eigenvalue_upper_bound(gram, total, near=near, squarings=FEW_SQUARINGS)
    return cond(
        top <= CLOSE * near,
        lambda: top,
        lambda: eigenvalue_upper_bound(gram, total, near=near, squarings=FEW_SQUARINGS + 2),
    )


def euclidean_norm(image):
    """‖v‖ as ⟨v, v/‖v‖⟩ with the second factor held fixed: the norm's gradient, and 0 at 0."""
    unit = unit_entries(ops.stop_gradient(image))[1]
    direction = unit / ops.sqrt(ops.maximum(ops.sum(ops.square(unit)), 0.5))
    return ops.sum(direction * image)


def spectrally_normalized(kernel, max_gain, linear_map=None, *, shrink_only=False, rank=None):
    """A kernel whose map has a norm of at most `max_gain` in exact arithmetic, as stored.

    Args:
        kernel: tensor in Keras' layout.
        max_gain, shrink_only: see `norm_scale`.
        linear_map: `LinearMap`, or `None` for a matrix.
        rank: m with ‖K‖_F² ≤ m‖W‖² for maps on large images; ‖K‖_F ≤ √m·max_gain is then
            enforced on images smaller than the kernel too, where it does not follow.

    Returns:
        Tensor of the kernel's shape and type; NaN everywhere if an entry is not finite.

    Example:

    >>> import numpy as np
    >>> w = spectrally_normalized(np.diag([3.0, 1.0]).astype("float32"), 1.0)
    >>> 0.99 < float(np.linalg.norm(np.asarray(w), 2)) <= 1.0
    True
    """
    kernel = ops.convert_to_tensor(kernel)
    estimate = spectral_norm(kernel, linear_map, iterations=STEERING_STEPS)
    frozen, near = ops.stop_gradient(kernel), ops.stop_gradient(estimate)
    near = ops.where(near > SMALLEST, near, ops.ones_like(near))
    bound, entries = kernel_bounds(frozen, linear_map, near=near)
    if rank is not None:
        taps = math.prod(kernel.shape[:-2])
        bound = ops.maximum(bound, entries / math.sqrt(taps * rank))
    scale = norm_scale(bound, entries, estimate, max_gain, shrink_only)
    return kernel * ops.cast(scale, kernel.dtype)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SpectralDense(ScaledDense):
    """Dense layer normalised by an upper bound of its operator norm.

        y = φ(x K + b),   K = W·max_gain/bound(W),   bound(W) ≥ σ(W)

    The bound is above σ by 2% at most, where power iteration has converged, and proven
    (`spectral_norms`): power iteration alone, which others divide by, is always below.

    Args:
        units: width of the output.
        shrink_only: leave W as it is while bound(W) ≤ max_gain.
        *args, **kwargs: what Keras' layer takes next, in its order (`activation`, `use_bias`,
            `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> import keras, numpy as np
    >>> layer = SpectralDense(3)
    >>> layer.build((None, 5))
    >>> bool(0.98 < np.linalg.norm(layer.effective_values()["kernel"], 2) <= 1.0)
    True

    Reference: Miyato et al. (2018), spectral normalization; sound form.
    """

    @formerly("units", "shrink_only", kept=1, mistaken=NUMBERS)
    @extending(ScaledDense)
    def __init__(self, units, *args, shrink_only=False, **kwargs):
        super().__init__(units, *args, **kwargs)
        self.shrink_only = bool(shrink_only)

    def _scale(self, kernel):
        return norm_scale(*spectral_norms(kernel), self.max_gain, self.shrink_only)

    def get_config(self):
        return {**super().get_config(), "shrink_only": self.shrink_only}


class _SpectralConv(LipschitzConv):
    """Convolution divided by a bound on the norm of its map at the layer's own input size."""

    @formerly("filters", "kernel_size", "shrink_only", kept=2, mistaken=FLAGS)
    @extending(LipschitzConv)
    def __init__(self, filters, kernel_size, *args, shrink_only=False, **kwargs):
        super().__init__(filters, kernel_size, *args, **kwargs)
        self.shrink_only = bool(shrink_only)

    def build(self, input_shape):
        super().build(input_shape)
        if self.linear_map.input_shape is not None:
            # The bound is that of this size: no other may be fed.
            self.input_spec = keras.layers.InputSpec(shape=(None, *input_shape[1:]))

    def _parametrised(self, kernel, training=False):
        return (
            spectrally_normalized(
                kernel,
                self.max_gain,
                self.linear_map,
                shrink_only=self.shrink_only,
                rank=self.kernel_rank,
            ),
        )

    def get_config(self):
        return {**super().get_config(), "shrink_only": self.shrink_only}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SpectralConv2D(_SpectralConv):
    """Convolution normalised by an upper bound of the norm of its true map.

        y = φ(K ∗ x + b),   K = W·max_gain/bound(W)

    bound(W) ≥ ‖W‖ for the zero-padded, strided, dilated map at the input size the layer is built
    with, or for every size (within 5%) where it is built with an unknown one. It is within 1% of
    the norm of the smallest periodic map that contains this one. Zero padding lowers that of the
    map itself, the more the larger kernels are beside images.

    Args:
        filters, kernel_size, strides, padding, data_format, dilation_rate, groups: as in
            `keras.layers.Conv2D`, and in its order (default padding `"same"`).
        shrink_only: leave W as it is while bound(W) ≤ max_gain.
        *args, **kwargs: what Keras' layer takes next, in its order (`activation`, `use_bias`,
            `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> layer = SpectralConv2D(4, 3, strides=2)
    >>> layer.build((None, 9, 8, 2))
    >>> layer.effective_values()["kernel"].shape
    (3, 3, 2, 4)

    Reference: sound form of spectral normalization for convolutions (see
    `tf_lyapunov.spectral.convolution`).
    """

    rank = 2


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SpectralConv1D(_SpectralConv):
    """`SpectralConv2D` with one spatial axis; `padding` may also be `"causal"`.

    Args:
        filters, kernel_size, strides, padding, data_format, dilation_rate, groups: as in
            `keras.layers.Conv1D`, and in its order.
        shrink_only: leave W as it is while bound(W) ≤ max_gain.
        *args, **kwargs: what Keras' layer takes next, in its order (`activation`, `use_bias`,
            `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> layer = SpectralConv1D(4, 3, padding="causal")
    >>> layer.compute_output_shape((None, 9, 2))
    (None, 9, 4)
    """

    rank = 1


def frobenius_norms(kernel, axis=None):
    """`(bound, estimate)` of the Frobenius norm, or (`axis=0`) of the norms of the columns.

    The estimate has the norm's gradient, and 0 at 0.
    """
    rows, columns = kernel.shape
    entries, terms = (rows * columns, rows + columns) if axis is None else (rows, rows)
    partner, scale = partner_in_range(kernel)
    squares = ops.sum(partner * kernel, axis=0)
    if axis is None:
        # Divided by the largest, or a compiler may make one long sum of the two.
        top = ops.stop_gradient(ops.maximum(ops.max(squares), 1e-30))
        squares = top * ops.sum(squares / top)
    still = ops.stop_gradient(squares)
    root = ops.sqrt(still)
    # √(W·W/c²) with the gradient of both factors, and 0 at 0.
    change = (squares - still) / ops.where(root > 0, root, ops.ones_like(root))
    # Squares below the smallest float are lost: at most 1e-36 of a sum.
    bound = root * (1 + gamma(terms + 16, unit_roundoff(kernel.dtype)))
    bound = scale * (bound + 1e-18 * math.sqrt(entries))
    return bound, scale * (root + change)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class FrobeniusDense(ScaledDense):
    """Dense layer normalised by its Frobenius norm.

        y = φ(x K + b),   K = W·max_gain/‖W‖_F,   σ(K) ≤ ‖K‖_F = max_gain

    Exact for a single unit, cheap, and loose otherwise, by at most √min(in, units).

    Args:
        units: width of the output.
        shrink_only: leave W as it is while ‖W‖_F ≤ max_gain.
        *args, **kwargs: what Keras' layer takes next, in its order (`activation`, `use_bias`,
            `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> import numpy as np
    >>> layer = FrobeniusDense(1, max_gain=2.0)
    >>> layer.build((None, 5))
    >>> bool(1.999 < np.linalg.norm(layer.effective_values()["kernel"]) <= 2.0)
    True

    Reference: Béthune et al. (2022), section 2; sound form.
    """

    @formerly("units", "shrink_only", kept=1, mistaken=NUMBERS)
    @extending(ScaledDense)
    def __init__(self, units, *args, shrink_only=False, **kwargs):
        super().__init__(units, *args, **kwargs)
        self.shrink_only = bool(shrink_only)

    def _scale(self, kernel):
        bound, estimate = frobenius_norms(kernel)
        return norm_scale(bound, bound, estimate, self.max_gain, self.shrink_only)

    def get_config(self):
        return {**super().get_config(), "shrink_only": self.shrink_only}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class NormalizedDense(ScaledDense):
    """Last layer with class vectors of norm `row_norm` (last-layer normalisation, LLN).

        y_j = ⟨k_j, x⟩ + b_j,   k_j = w_j·row_norm/‖w_j‖

    Every *output* has a gain of at most `row_norm`; the layer as a map into l2 has
    `max_gain = row_norm·√units`, which follows from it. Certificates read the class vectors:
    min_j (f_c - f_j)/(L·‖k_c - k_j‖) > ε, L the gain of the layers before.

    Args:
        units: number of classes.
        row_norm: positive float.
        shrink_only: leave w_j as it is while ‖w_j‖ ≤ row_norm.
        *args, **kwargs: what `keras.layers.Dense` takes next, in its order (`activation`,
            `use_bias`, `kernel_initializer`, regularizers of the raw kernel, …).

    Example:

    >>> import numpy as np
    >>> layer = NormalizedDense(3)
    >>> layer.build((None, 5))
    >>> norms = np.linalg.norm(layer.effective_values()["kernel"], axis=0)
    >>> bool(np.all((0.9999 < norms) & (norms <= 1.0)))
    True

    Reference: Singla, Singla and Feizi (2022), last layer normalization; as published.
    """

    @formerly("units", "row_norm", "shrink_only", kept=1, mistaken=NUMBERS)
    @extending(ScaledDense, lacking=("max_gain",))
    def __init__(self, units, *args, row_norm=1.0, shrink_only=False, **kwargs):
        row_norm = positive("row_norm", row_norm, GAIN_RANGE)
        if "max_gain" in kwargs:
            raise TypeError(
                "A NormalizedDense is bounded per output. Received: max_gain="
                f"{kwargs['max_gain']}. Pass `row_norm`."
            )
        gain = row_norm * math.sqrt(max(int(units), 1)) * (1 + 2.0**-50)
        super().__init__(units, *args, max_gain=gain, **kwargs)
        self.row_norm, self.shrink_only = row_norm, bool(shrink_only)

    def settings_of_gain(self, gain):
        row_norm = gain / (math.sqrt(self.units) * (1 + 2.0**-49))
        return {
            **super().settings_of_gain(gain),
            "row_norm": positive("row_norm", row_norm, GAIN_RANGE),
        }

    def _scale(self, kernel):
        bound, estimate = frobenius_norms(kernel, axis=0)
        return norm_scale(bound, bound, estimate, self.row_norm, self.shrink_only)

    def get_config(self):
        config = super().get_config()
        del config["max_gain"]
        return {**config, "row_norm": self.row_norm, "shrink_only": self.shrink_only}
