"""Orthogonal layers by the Cayley transform: dense, and circular convolutions per frequency."""

import math

import keras
from keras import ops

from tf_lyapunov.layers.keras_order import IMAGES, extending, without
from tf_lyapunov.layers.linear import (
    LipschitzDense,
    LipschitzLinear,
    known_image,
    per_axis,
    space_to_depth,
    space_to_depth_shape,
    with_gain,
)
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.orthogonal import (
    block_fourier,
    cayley,
    cayley_factors,
    circular_symbol,
    fourier_bases,
)
from tf_lyapunov.spectral.precision import unit_roundoff


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class CayleyDense(LipschitzDense):
    """Dense layer with orthonormal columns (or rows, if wider than its input).

        y = φ(x K + b),   K = max_gain·Q,   Q = [(I+A)⁻¹(I-A); -2V(I+A)⁻¹],   A = U - Uᵀ + VᵀV

    [U; V] is the raw kernel, or its transpose if units > in. ‖K‖ ≤ max_gain as stored: the
    excess that rounding leaves is measured and divided out, so that all singular values lie just
    below max_gain.

    Args:
        units: width of the output.
        *args, **kwargs: what `keras.layers.Dense` takes next, in its order (`activation`,
            `use_bias`, `kernel_initializer`, regularizers of the raw kernel, …), and `max_gain`.

    Example:

    >>> import numpy as np
    >>> layer = CayleyDense(3)
    >>> layer.build((None, 5))
    >>> kernel = layer.effective_values()["kernel"]
    >>> bool(np.allclose(kernel.T @ kernel, np.eye(3), atol=1e-5))
    True

    Reference: Trockman and Kolter (2021), section 3; as published, with the excess divided out.
    """

    def _parametrised(self, kernel, training=False):
        if kernel.shape[0] >= kernel.shape[1]:
            q = cayley(kernel)
        else:
            q = ops.transpose(cayley(ops.transpose(kernel)))
        return (with_gain(q, self.max_gain, min(kernel.shape)),)

    def _applied(self, x, kernel):
        tall = kernel.shape[0] >= kernel.shape[1]
        q, factor = cayley_factors(kernel if tall else ops.transpose(kernel))
        factor = with_gain(ops.reshape(factor, ()), self.max_gain, min(kernel.shape))
        return ops.matmul(x, q if tall else ops.transpose(q)) * factor


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class CayleyConv2D(LipschitzLinear):
    """Orthogonal convolution with circular padding, one Cayley transform per frequency.

        ŷ(θ) = x̂(θ)·Q(θ),   Q(θ) = max_gain·Cayley(Ŵ(θ)),   Ŵ(θ) = Σ_t W[t]exp(iθ·t)

    Q(θ) has orthonormal columns, or rows if there are more filters than input channels: the layer
    then keeps norms. A stride s rearranges s×s pixels into channels first (zeros are added at the
    end of sides that s does not divide), so that norms are kept from 4·in filters at stride 2.
    ‖y‖ ≤ max_gain·‖x‖ as stored: the transform is unitary and every Q(θ) is divided by its
    measured excess.

    Effective weights: `real`, `imag` (H'·(⌊W'/2⌋+1), in', filters), Q at the frequencies of
    `fourier_bases((H', W'))` (first axis of the image slowest), in' = s²·in. In float16 and
    bfloat16 the transform runs in float32 and Q is rounded: `rounding_inflation` is
    1 + u√(2·min(in', filters)), and for float16 2⁻¹⁴√(2·in'·filters)/max_gain more.

    Args:
        filters: output channels.
        kernel_size: of the raw kernel W; the orthogonal map reaches over the whole image.
        strides: an integer or a pair.
        **kwargs: `activation`, `use_bias`, `kernel_initializer`, regularizers of the raw kernel, …
            as in `keras.layers.Conv2D`, and `max_gain`.

    Raises:
        ValueError: if built for images of unknown size, or told to do what it cannot: another
            padding, channels first, groups, dilation.

    Example:

    >>> import numpy as np
    >>> layer = CayleyConv2D(3, 3, use_bias=False)
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 6, 3)).astype("float32")
    >>> y = keras.ops.convert_to_numpy(layer(x))
    >>> bool(np.allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-4))
    True

    Reference: Trockman and Kolter (2021), sections 3 and 4; as published, with the excess divided
    out.
    """

    @extending(LipschitzLinear, positional=False)
    def __init__(self, filters, kernel_size, strides=1, **kwargs):
        kwargs = without(self, kwargs, padding=("circular",), **IMAGES)
        super().__init__(**kwargs)
        self.filters = count("filters", filters)
        self.kernel_size = per_axis("kernel_size", kernel_size, 2)
        self.strides = per_axis("strides", strides, 2)

    def build(self, input_shape):
        shape = known_image(input_shape, self)
        self.input_spec = keras.layers.InputSpec(shape=(None, *shape))
        *self.sizes, channels = space_to_depth_shape(shape, self.strides)
        self._sides = (channels, self.filters)
        self._add_kernel((*self.kernel_size, *self._raw_sides()))
        self._add_bias(self.filters)
        self._build_activation(input_shape)
        self._bases = fourier_bases(self.sizes)
        frequencies = self.sizes[0] * (self.sizes[1] // 2 + 1)
        stack = (frequencies, channels, self.filters)
        self._track_effective({"real": stack, "imag": stack}, [self.kernel], self._parametrised)

    def _raw_sides(self):
        return self._sides

    def _orthogonal(self, real, imag):
        """Contractions with nearly orthonormal columns or rows for symbols of the raw kernel."""
        tall = real.shape[-2] >= real.shape[-1]
        if not tall:
            real, imag = ops.swapaxes(real, -1, -2), ops.swapaxes(imag, -1, -2)
        real, imag = cayley(real, imag)
        if not tall:
            real, imag = ops.swapaxes(real, -1, -2), ops.swapaxes(imag, -1, -2)
        return real, imag

    def _parametrised(self, kernel, training=False):
        real, imag = self._orthogonal(*circular_symbol(kernel, self.sizes))
        # The bases are rounded too: as matrices of Frobenius norms √W and √2H, used twice each.
        u = unit_roundoff(kernel.dtype)
        high, wide = self.sizes
        gain = self.max_gain / (1 + 2.2 * u * (math.sqrt(wide) + math.sqrt(2 * high)))
        rank = 2 * min(self._sides)
        return with_gain(real, gain, rank), with_gain(imag, gain, rank)

    def call(self, x, training=None):
        real, imag = (ops.cast(q, self.work_dtype) for q in self.effective(training))
        block = ops.concatenate(
            [ops.concatenate([real, imag], axis=-1), ops.concatenate([-imag, real], axis=-1)],
            axis=-2,
        )
        x = space_to_depth(ops.cast(x, self.work_dtype), self.strides)
        bases = [ops.cast(b, self.work_dtype) for b in self._bases]
        y = ops.cast(block_fourier(x, block, bases), self.compute_dtype)
        return self._activated(y)

    @property
    def rounding_inflation(self):
        a, b = self._sides
        # Each block is rounded for itself, so that there is one tap.
        return self._cast_inflation(2 * min(a, b), 1, 2 * a * b)

    def compute_output_shape(self, input_shape):
        shape = known_image(input_shape, self)
        return (input_shape[0], *space_to_depth_shape(shape, self.strides)[:2], self.filters)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": list(self.kernel_size),
            "strides": list(self.strides),
        }
