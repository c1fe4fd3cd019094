"""Layers whose kernels are divided by a proven upper bound of a norm."""

import math

import keras
from keras import ops

from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.linear import LipschitzConv, LipschitzDense
from tf_lyapunov.spectral.arguments import GAIN_RANGE, positive
from tf_lyapunov.spectral.gram import frobenius_norm_upper_bound, unit_entries
from tf_lyapunov.spectral.norms import kernel_bounds, spectral_norm
from tf_lyapunov.spectral.precision import gamma, unit_roundoff

# Kernels of a smaller norm are not enlarged: their reciprocal would overflow.
SMALLEST = 1e-30
# Power steps behind the gradient of a norm and the guess that makes its bound tight.
STEERING_STEPS = 8


def divided(kernel, bound, entries, estimate, max_gain, shrink_only):
    """A kernel of norm at most `max_gain`, from a bound on the norm of a raw one.

        K·max_gain/bound, or K·min(1, max_gain/bound) with `shrink_only`                     (1)

    The value uses `bound` alone; the gradient is that of (1) with the norm's own gradient, taken
    from `estimate`, in place of the bound's.

    Args:
        kernel: tensor.
        bound: scalar ≥ its norm.
        entries: scalar; rounding each entry by u adds at most u·entries to the norm.
        estimate: scalar close to the norm, whose gradient is used.
        max_gain: positive float.
        shrink_only: whether kernels below `max_gain` are left as they are.
    """
    u = unit_roundoff(kernel.dtype)
    bound, entries, near = (ops.stop_gradient(v) for v in (bound, entries, estimate))
    goal = rounded_down(max_gain * (1 - 8 * u), kernel.dtype)
    safe = bound + 4 * u * entries
    # The comparison is false for NaN, which must spread to the whole kernel.
    scale = goal / ops.where(safe < SMALLEST, ops.ones_like(safe), safe)
    change = (estimate - near) / ops.where(near < SMALLEST, ops.ones_like(near), near)
    scale = ops.cast(scale * (1 - change), kernel.dtype)
    if shrink_only:
        inside = bound <= rounded_down(max_gain, bound.dtype)
        scale = ops.where(inside, ops.ones_like(scale), scale)
    return kernel * scale


def spectrally_normalized(kernel, max_gain, linear_map=None, *, shrink_only=False, rank=None):
    """A kernel whose map has a norm of at most `max_gain` in exact arithmetic, as stored.

    Args:
        kernel: tensor in Keras' layout.
        max_gain, shrink_only: see `divided`.
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
    return divided(kernel, bound, entries, estimate, max_gain, shrink_only)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SpectralDense(LipschitzDense):
    """Dense layer normalised by an upper bound of its operator norm.

        y = φ(x K + b),   K = W·max_gain/bound(W),   bound(W) ≥ σ(W)

    The bound is above σ by less than 1%, and proven (`dense_norm_upper_bound`): power iteration,
    which others divide by, is always below.

    Args:
        units: width of the output.
        shrink_only: leave W as it is while bound(W) ≤ max_gain.
        **kwargs: `activation`, `use_bias`, `kernel_initializer`, `bias_initializer`, `max_gain`.

    Example:

    >>> import keras, numpy as np
    >>> layer = SpectralDense(3)
    >>> layer.build((None, 5))
    >>> bool(0.98 < np.linalg.norm(layer.effective_values()["kernel"], 2) <= 1.0)
    True

    Reference: Miyato et al. (2018), spectral normalization; sound form.
    """

    def __init__(self, units, shrink_only=False, **kwargs):
        super().__init__(units, **kwargs)
        self.shrink_only = bool(shrink_only)

    def _parametrised(self, kernel, training=False):
        return (spectrally_normalized(kernel, self.max_gain, shrink_only=self.shrink_only),)

    def get_config(self):
        return {**super().get_config(), "shrink_only": self.shrink_only}


class _SpectralConv(LipschitzConv):
    """Convolution divided by a bound on the norm of its map at the layer's own input size."""

    def __init__(self, filters, kernel_size, shrink_only=False, **kwargs):
        super().__init__(filters, kernel_size, **kwargs)
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
    with (within about 1%), or for every size (within 5%) where it is built with an unknown one.

    Args:
        filters, kernel_size, strides, padding, dilation_rate: as in `keras.layers.Conv2D`
            (default padding `"same"`), channels last.
        shrink_only: leave W as it is while bound(W) ≤ max_gain.
        **kwargs: `activation`, `use_bias`, `kernel_initializer`, `bias_initializer`, `max_gain`.

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
        filters, kernel_size, strides, padding, dilation_rate: as in `keras.layers.Conv1D`.
        shrink_only: leave W as it is while bound(W) ≤ max_gain.
        **kwargs: `activation`, `use_bias`, `kernel_initializer`, `bias_initializer`, `max_gain`.

    Example:

    >>> layer = SpectralConv1D(4, 3, padding="causal")
    >>> layer.compute_output_shape((None, 9, 2))
    (None, 9, 4)
    """

    rank = 1


def frobenius_norms(kernel, axis=None):
    """`(bound, estimate)` of the Frobenius norm, or (`axis=0`) of the norms of the columns.

    The estimate ⟨K, K/‖K‖⟩ with the second factor held fixed has the norm's gradient, and 0 at 0.
    """
    scale, unit = unit_entries(ops.stop_gradient(kernel))
    u = unit_roundoff(kernel.dtype)
    if axis is None:
        bound = frobenius_norm_upper_bound(unit)
    else:
        squares = ops.sum(ops.square(unit), axis=axis)
        # Squares below the smallest float are lost: at most 1e-36 of a sum.
        bound = ops.sqrt(squares + 1e-36 * kernel.shape[axis])
        bound = bound * (1 + gamma(kernel.shape[axis] + 8, u))
    direction = unit / ops.where(bound < SMALLEST, ops.ones_like(bound), bound)
    return scale * bound * (1 + 8 * u), ops.sum(direction * kernel, axis=axis)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class FrobeniusDense(LipschitzDense):
    """Dense layer normalised by its Frobenius norm.

        y = φ(x K + b),   K = W·max_gain/‖W‖_F,   σ(K) ≤ ‖K‖_F = max_gain

    Exact for a single unit, cheap, and loose otherwise, by at most √min(in, units).

    Args:
        units: width of the output.
        shrink_only: leave W as it is while ‖W‖_F ≤ max_gain.
        **kwargs: `activation`, `use_bias`, `kernel_initializer`, `bias_initializer`, `max_gain`.

    Example:

    >>> import numpy as np
    >>> layer = FrobeniusDense(1, max_gain=2.0)
    >>> layer.build((None, 5))
    >>> bool(1.999 < np.linalg.norm(layer.effective_values()["kernel"]) <= 2.0)
    True

    Reference: Béthune et al. (2022), section 2; sound form.
    """

    def __init__(self, units, shrink_only=False, **kwargs):
        super().__init__(units, **kwargs)
        self.shrink_only = bool(shrink_only)

    def _parametrised(self, kernel, training=False):
        bound, estimate = frobenius_norms(kernel)
        return (divided(kernel, bound, bound, estimate, self.max_gain, self.shrink_only),)

    def get_config(self):
        return {**super().get_config(), "shrink_only": self.shrink_only}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class NormalizedDense(LipschitzDense):
    """Last layer with class vectors of norm `row_norm` (last-layer normalisation, LLN).

        y_j = ⟨k_j, x⟩ + b_j,   k_j = w_j·row_norm/‖w_j‖

    Every *output* has a gain of at most `row_norm`; the layer as a map into l2 has
    `max_gain = row_norm·√units`, which follows from it. Certificates read the class vectors:
    min_j (f_c - f_j)/(L·‖k_c - k_j‖) > ε, L the gain of the layers before.

    Args:
        units: number of classes.
        row_norm: positive float.
        shrink_only: leave w_j as it is while ‖w_j‖ ≤ row_norm.
        **kwargs: `activation`, `use_bias`, `kernel_initializer`, `bias_initializer`.

    Example:

    >>> import numpy as np
    >>> layer = NormalizedDense(3)
    >>> layer.build((None, 5))
    >>> norms = np.linalg.norm(layer.effective_values()["kernel"], axis=0)
    >>> bool(np.all((0.9999 < norms) & (norms <= 1.0)))
    True

    Reference: Singla, Singla and Feizi (2022), last layer normalization; as published.
    """

    def __init__(self, units, row_norm=1.0, shrink_only=False, **kwargs):
        row_norm = positive("row_norm", row_norm, GAIN_RANGE)
        if "max_gain" in kwargs:
            raise TypeError(
                "A NormalizedDense is bounded per output. Received: max_gain="
                f"{kwargs['max_gain']}. Pass `row_norm`."
            )
        gain = row_norm * math.sqrt(max(int(units), 1)) * (1 + 2.0**-50)
        super().__init__(units, max_gain=gain, **kwargs)
        self.row_norm, self.shrink_only = row_norm, bool(shrink_only)

    def _parametrised(self, kernel, training=False):
        bound, estimate = frobenius_norms(kernel, axis=0)
        return (divided(kernel, bound, bound, estimate, self.row_norm, self.shrink_only),)

    def get_config(self):
        config = super().get_config()
        del config["max_gain"]
        return {**config, "row_norm": self.row_norm, "shrink_only": self.shrink_only}
