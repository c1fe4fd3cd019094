"""Sandwich layers: an activation between two maps that are bounded together, not one by one.

    z = g·√2 Aᵀ Ψ φ(√2 Ψ⁻¹ B x + b),   AAᵀ + BBᵀ = I,   Ψ = diag(ψ) > 0                       (1)

is g-Lipschitz for every φ with slopes in [0, 1], although the product of the norms of its two maps
may reach 2g: `theory.potential.sandwich_gain_upper_bound`. U = [Aᵀ; Bᵀ] is the Cayley transform
of one raw matrix (`spectral.orthogonal.cayley`, whose result has ‖U‖ ≤ 1 as stored).
"""

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.layers.keras_order import IMAGES, extending, without
from tf_lyapunov.layers.linear import (
    known_image,
    per_axis,
    space_to_depth,
    space_to_depth_shape,
)
from tf_lyapunov.layers.potential import monotone_activation
from tf_lyapunov.layers.weighted import WeightedLayer
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.orthogonal import (
    block_fourier,
    cayley,
    cayley_factors,
    circular_symbol,
    fourier_bases,
)
from tf_lyapunov.spectral.precision import unit_roundoff
from tf_lyapunov.theory.potential import sandwich_gain_upper_bound

# ψ = exp(raw) within exp(±4): beyond, the two maps of (1) use up float16's range.
LARGEST_LOGARITHM = 4.0
# Relative error of an entry of √2·g·ψ·U and √2·U/ψ beside its cast, in units of roundoff.
ENTRY_ROUNDINGS = 6


class Sandwich(WeightedLayer):
    """What the dense and the convolutional layer share.

    Args:
        units: number of hidden and of output units or channels.
        activation: φ, slopes in [0, 1].
        *args, **kwargs: of `WeightedLayer`, such as `use_bias`, and `max_gain`.
    """

    @extending(WeightedLayer)
    def __init__(self, units, activation="relu", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._units = count("units", units)
        self.activation = monotone_activation(activation)

    def _build(self, taps, inputs, blocks, copies):
        """Raw variables of a kernel `(*taps, units + inputs, units)`; the shapes of what they give.

        Args:
            taps: spatial sizes of the kernel.
            inputs: number of input channels.
            blocks: shape of the leading axes of the effective weights.
            copies: 1 for real, 2 for complex matrices as real blocks.
        """
        units = self._units
        self._add_kernel((*taps, units + inputs, units))
        # The length of the kernel, in units of that of Glorot's initialisation.
        self.length = self.add_weight(name="length", shape=(), initializer="ones", autocast=False)
        self.psi_logarithm = self.add_weight(
            name="psi_logarithm", shape=(units,), initializer="zeros", autocast=False
        )
        self._add_bias(units)
        self._inputs = inputs
        shapes = {
            "inner": (*blocks, copies * inputs, copies * units),
            "outer": (*blocks, copies * units, copies * units),
        }
        sources = [self.kernel, self.length, self.psi_logarithm]
        self._track_effective(shapes, sources, self._weights)
        self.built = True

    def _orthogonal(self, kernel):
        """`(top, bottom)` of the Cayley transform, as real matrices or blocks of them."""
        raise NotImplementedError

    def _of_length(self, kernel, length):
        size = math.prod(kernel.shape)
        usual = 2 * size / (self._inputs + 2 * self._units) / math.prod(kernel.shape[:-2])
        norm = ops.sqrt(ops.sum(ops.square(kernel)) + 1e-30)
        return kernel * (length * math.sqrt(usual) / norm)

    def _weights(self, kernel, length, logarithm, training):
        top, bottom = self._orthogonal(self._of_length(kernel, length))
        psi = ops.exp(ops.clip(logarithm, -LARGEST_LOGARITHM, LARGEST_LOGARITHM))
        psi = ops.tile(psi, bottom.shape[-1] // self._units)
        outer = math.sqrt(2) * self._gain * psi * top
        return math.sqrt(2) / psi * bottom, ops.swapaxes(outer, -1, -2)

    @property
    def _gain(self):
        """g, less what rounding in `work_dtype` may add."""
        u = unit_roundoff(self.work_dtype)
        return self.max_gain * (1 - 4 * ENTRY_ROUNDINGS * u * math.sqrt(self._units))

    @property
    def rounding_inflation(self):
        """(1 + u√n + v)² for 16-bit compute types: the cast moves each entry by at most u of it.

        ‖[A B]‖_F ≤ √n, n the units; v covers the entries below the normal range of float16. 1 in
        float32 and float64, where rounding is provided for.
        """
        if self.compute_dtype == self.work_dtype:
            return 1.0
        excess = unit_roundoff(self.compute_dtype) * math.sqrt(self._units)
        if self.compute_dtype == "float16":
            entries = math.sqrt(2 * self._units * (self._units + self._inputs))
            excess += 2.0**-25 * math.exp(LARGEST_LOGARITHM) * entries / min(self.max_gain, 1.0)
        return (1 + excess) ** 2

    def gain_upper_bound(self):
        """Proven bound, float64, on the layer's gain: from its weights, not from `max_gain`."""
        values = self.effective_values()
        logarithm = np.asarray(ops.convert_to_numpy(self.psi_logarithm)).astype(np.float64)
        psi = np.exp(np.clip(logarithm, -LARGEST_LOGARITHM, LARGEST_LOGARITHM))
        # Any positive weights prove a bound; these are nearly the best ones.
        weights = np.tile(psi, values["inner"].shape[-1] // len(psi)) * math.sqrt(self._gain)
        return sandwich_gain_upper_bound(values["inner"], values["outer"], weights)

    def get_config(self):
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
        }


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SandwichDense(Sandwich):
    """Sandwich layer on the last axis.

        z = g·√2 Aᵀ Ψ φ(√2 Ψ⁻¹ B x + b),   AAᵀ + BBᵀ = I,   g = max_gain

    Gain at most `max_gain` at every value of the variables, in float32 and float64 without any
    tolerance; 16-bit compute types add `rounding_inflation`. Linear with `activation="linear"`.

    Args:
        units: number of hidden and output units.
        activation: φ, a Keras activation with slopes in [0, 1].
        use_bias, kernel_initializer, …: as in `keras.layers.Dense`, and in its order.
        max_gain: g.

    Raises:
        ValueError: if an argument is out of range, or φ is not monotone and 1-Lipschitz.

    Example:

    >>> import numpy as np, keras
    >>> layer = SandwichDense(3)
    >>> tuple(layer(np.ones((2, 4), "float32")).shape)
    (2, 3)
    >>> bool(0.99 < layer.gain_upper_bound() <= 1.0)
    True

    Reference: Wang and Manchester (2023), Direct Parameterization of Lipschitz-Bounded Deep
    Networks, equation (11); sound form (divided by the excess of the computed Cayley transform).
    """

    @property
    def units(self):
        return self._units

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "SandwichDense needs an input with a last axis of known size. "
                f"Received: input_shape={input_shape}."
            )
        self._build((), int(input_shape[-1]), (), 1)

    def _orthogonal(self, kernel):
        q = cayley(kernel)
        return q[: self._units], q[self._units :]

    def call(self, inputs, training=None):
        if self._in_factors(training):
            return self._applied(inputs)
        inner, outer = self.effective(training)
        hidden = ops.matmul(inputs, inner)
        if self.bias is not None:
            hidden = hidden + self.bias
        return ops.matmul(self.activation(hidden), outer)

    def _applied(self, inputs):
        """`call` in training: scales meet the units of the batch, not the matrices."""
        kernel, length, logarithm = (ops.convert_to_tensor(v) for v in self._sources)
        q, factor = cayley_factors(self._of_length(kernel, length))
        factor = math.sqrt(2) * ops.reshape(factor, ())
        psi = ops.exp(ops.clip(logarithm, -LARGEST_LOGARITHM, LARGEST_LOGARITHM))
        hidden = ops.matmul(inputs, q[self._units :]) * (factor / psi)
        if self.bias is not None:
            hidden = hidden + self.bias
        hidden = self.activation(hidden) * (self._gain * factor * psi)
        return ops.matmul(hidden, ops.transpose(q[: self._units]))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self._units)

    def get_config(self):
        return {**super().get_config(), "units": self._units}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SandwichConv2D(Sandwich):
    """Sandwich layer on images, circular: one Cayley transform per frequency.

        ẑ(f) = g·√2 A(f)ᴴ Ψ ĥ(f),   h = φ(√2 Ψ⁻¹ B x + b),   A(f)A(f)ᴴ + B(f)B(f)ᴴ = I

    The padding is *circular*: pixels beyond an edge are those of the opposite edge, and the image
    size is fixed when the layer is built. A stride is a space-to-depth rearrangement before the
    layer. Fourier transforms run in float32 or float64, whatever the compute type.

    Gain at most `max_gain` at every value of the variables, for the map with exact Fourier
    transforms; 16-bit compute types add `rounding_inflation`.

    Args:
        filters: number of hidden and output channels.
        kernel_size: an integer or two, odd or even.
        strides: an integer or two; blocks of pixels become channels, filled up with zeros.
        activation: φ, a Keras activation with slopes in [0, 1].
        use_bias, kernel_initializer, bias_initializer: as in `keras.layers.Conv2D`.
        max_gain: g.

    Raises:
        ValueError: if an argument is out of range, φ is not monotone and 1-Lipschitz, or the image
            size is unknown.

    Example:

    >>> import numpy as np, keras
    >>> layer = SandwichConv2D(3, kernel_size=3, strides=2)
    >>> tuple(layer(np.ones((2, 6, 6, 4), "float32")).shape)
    (2, 3, 3, 3)
    >>> bool(0.99 < layer.gain_upper_bound() <= 1.0)
    True

    Reference: Wang and Manchester (2023), section 4.2 and appendix (convolutions by the Cayley
    transform of Trockman and Kolter, 2021); sound form.
    """

    @extending(Sandwich, positional=False, lacking=("units",))
    def __init__(self, filters, kernel_size=3, strides=1, **kwargs):
        kwargs = without(self, kwargs, padding=("circular",), **IMAGES)
        super().__init__(filters, **kwargs)
        self.kernel_size = per_axis("kernel_size", kernel_size, 2)
        self.strides = per_axis("strides", strides, 2)
        if keras.config.image_data_format() != "channels_last":
            raise ValueError(
                "SandwichConv2D needs channels last. Received: image_data_format="
                f"{keras.config.image_data_format()!r}. Permute the axes before the layer."
            )

    @property
    def filters(self):
        return self._units

    def build(self, input_shape):
        image = known_image(input_shape, self)
        high, wide, channels = space_to_depth_shape(image, self.strides)
        self._grid = (high, wide)
        self._build(self.kernel_size, channels, (high * (wide // 2 + 1),), 2)

    def _orthogonal(self, kernel):
        real, imag = cayley(*circular_symbol(kernel, self._grid))
        n = self._units
        return _as_blocks(real[:, :n], imag[:, :n]), _as_blocks(real[:, n:], imag[:, n:])

    def call(self, inputs, training=None):
        inner, outer = (ops.cast(v, self.work_dtype) for v in self.effective(training))
        bases = [b.astype(self.work_dtype) for b in fourier_bases(self._grid)]
        x = ops.cast(space_to_depth(inputs, self.strides), self.work_dtype)
        hidden = block_fourier(x, inner, bases)
        if self.bias is not None:
            hidden = hidden + ops.cast(self.bias, self.work_dtype)
        outputs = block_fourier(self.activation(hidden), outer, bases)
        return ops.cast(outputs, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        sizes = (-(-n // s) for n, s in zip(input_shape[1:3], self.strides, strict=True))
        return (input_shape[0], *sizes, self._units)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self._units,
            "kernel_size": list(self.kernel_size),
            "strides": list(self.strides),
        }


def _as_blocks(real, imag):
    """R + iJ as [[R, J], [-J, R]]."""
    return ops.concatenate(
        [ops.concatenate([real, imag], axis=-1), ops.concatenate([-imag, real], axis=-1)], axis=-2
    )
