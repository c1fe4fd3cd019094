"""Orthogonal convolutions as exponentials of skew ones."""

import math

import keras
from keras import ops

from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.keras_order import IMAGES, extending, formerly, without
from tf_lyapunov.layers.linear import (
    LipschitzLinear,
    known_image,
    per_axis,
    space_to_depth,
    space_to_depth_shape,
)
from tf_lyapunov.layers.normalized import spectrally_normalized
from tf_lyapunov.spectral.arguments import GAIN_RANGE, count, positive
from tf_lyapunov.spectral.orthogonal import exponential_action, skew_kernel
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.orthogonal import truncated_exponential_norm_upper_bound


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SkewOrthogonalConv2D(LipschitzLinear):
    """Convolution by the exponential of a skew filter, a truncated series (SOC).

        y = φ(g·P(Σ_{k<n} Lᵏ/k! ∗ E x) + b),   L[t] = ½(M[t] - M[k-1-t]ᵀ)·c,   ‖L‖ ≤ skew_norm

    *Skew with zero padding.* The adjoint of the convolution with L on the infinite grid is the one
    with L[k-1-t]ᵀ = -L[t]: it is skew. "Same" zero padding with odd k embeds the image (P*),
    convolves and crops (P), and (P L P*)* = P L* P* = -P L P*: skew as well, bit for bit.

    *Norm.* A skew map is normal with spectrum i[-ρ, ρ], ρ ≤ skew_norm, so the series has the norm
    max |s_n(iθ)|, which is at most 1 for 5 and for 12 terms (`truncated_exponential_norm_upper_
    bound`), and divided out (g ≤ max_gain) where it is not. With 12 terms singular values lie
    within 2·skew_norm¹²/12! of max_gain. Both numbers of terms obey the bound; outputs of training
    and inference differ by up to skew_norm⁵/5! = 0.8%, as published.

    E adds zero channels where filters exceed the input's, P drops the last ones in the other
    case; a stride s rearranges s×s pixels into channels first.

    Effective weight: `kernel` (k₁, k₂, n, n), L, n = max(s²·in, filters), on images of
    (⌈H/s⌉, ⌈W/s⌉). Rounding to float16 or bfloat16 keeps L skew and enlarges ‖L‖, for which g
    provides: `rounding_inflation` is 1 for every type.

    Args:
        filters: output channels.
        kernel_size: odd, an integer or a pair.
        strides: an integer or a pair.
        terms: terms of the series in training.
        inference_terms: terms otherwise.
        skew_norm: bound on ‖L‖.
        shrink_only: leave the skew filter as it is while its norm is below `skew_norm`.
        **kwargs: `activation`, `use_bias`, `kernel_initializer`, regularizers of the raw kernel, …
            as in `keras.layers.Conv2D`, and `max_gain`.

    Raises:
        ValueError: if a side of the kernel is even, or the layer is built for images of unknown
            size, or it is told to do what it cannot: another padding, channels first, groups,
            dilation.

    Example:

    >>> import numpy as np
    >>> layer = SkewOrthogonalConv2D(3, 3, use_bias=False)
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 6, 3)).astype("float32")
    >>> y = keras.ops.convert_to_numpy(layer(x))
    >>> bool(np.allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5))
    True

    Reference: Singla and Feizi (2021), Theorems 2 to 4; the norm of L and of the series bounded in
    sound form.
    """

    @formerly(
        "filters",
        "kernel_size",
        "strides",
        "terms",
        "inference_terms",
        "skew_norm",
        "shrink_only",
        kept=3,
    )
    @extending(LipschitzLinear, positional=False)
    def __init__(
        self,
        filters,
        kernel_size=3,
        strides=1,
        *,
        terms=5,
        inference_terms=12,
        skew_norm=1.0,
        shrink_only=False,
        **kwargs,
    ):
        kwargs = without(self, kwargs, padding=("same",), **IMAGES)
        super().__init__(**kwargs)
        self.filters = count("filters", filters)
        self.kernel_size = per_axis("kernel_size", kernel_size, 2)
        self.strides = per_axis("strides", strides, 2)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(
                "`kernel_size` must be odd: an even filter has no centre to be skew about. "
                f"Received: kernel_size={kernel_size}."
            )
        self.terms = count("terms", terms, 100)
        self.inference_terms = count("inference_terms", inference_terms, 100)
        self.skew_norm = positive("skew_norm", skew_norm, GAIN_RANGE)
        self.shrink_only = bool(shrink_only)

    def build(self, input_shape):
        shape = known_image(input_shape, self)
        self.input_spec = keras.layers.InputSpec(shape=(None, *shape))
        *sizes, channels = space_to_depth_shape(shape, self.strides)
        width = max(channels, self.filters)
        self.linear_map = LinearMap("conv", (*sizes, width), padding="same")
        self._add_kernel((*self.kernel_size, width, width))
        self._add_bias(self.filters)
        self._build_activation(input_shape)
        self._track_effective({"kernel": self.kernel.shape}, [self.kernel], self._parametrised)

    def _parametrised(self, kernel, training=False):
        return (
            spectrally_normalized(
                skew_kernel(kernel),
                self.skew_norm,
                self.linear_map,
                shrink_only=self.shrink_only,
                rank=kernel.shape[-1],
            ),
        )

    def output_scale(self, terms):
        """g with g·‖Σ_{k<n} Lᵏ/k!‖ ≤ max_gain for the filter in the compute dtype (a float)."""
        width, taps = self.kernel.shape[-1], math.prod(self.kernel_size)
        norm = self.skew_norm
        norm *= self._cast_inflation(width, taps, taps * width * width, norm)
        return self.max_gain / truncated_exponential_norm_upper_bound(terms, norm)

    def call(self, x, training=None):
        (kernel,) = self.effective(training)
        terms = self.terms if training else self.inference_terms
        x = space_to_depth(x, self.strides)
        width = kernel.shape[-1]
        x = ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, width - x.shape[-1]]])
        y = exponential_action(
            x,
            lambda z: ops.conv(z, kernel, padding="same", data_format="channels_last"),
            terms,
        )
        y = y[..., : self.filters]
        scale = self.output_scale(terms)
        if scale != 1.0:
            y = y * rounded_down(scale, self.compute_dtype)
        return self._activated(y)

    def compute_output_shape(self, input_shape):
        shape = known_image(input_shape, self)
        return (input_shape[0], *space_to_depth_shape(shape, self.strides)[:2], self.filters)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": list(self.kernel_size),
            "strides": list(self.strides),
            "terms": self.terms,
            "inference_terms": self.inference_terms,
            "skew_norm": self.skew_norm,
            "shrink_only": self.shrink_only,
        }
