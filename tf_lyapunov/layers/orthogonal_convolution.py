"""Convolutions whose explicit kernel is orthogonal, from factors that `optimizers.Stiefel` keeps.

At inference they are plain convolutions with one kernel, kept beside the factors that it came
from. As for `OrthogonalDense`, the optimizer keeps the factors orthogonal and the gain is always
measured, from the kernel as it is used.
"""

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.layers.axes import image_format
from tf_lyapunov.layers.keras_order import without
from tf_lyapunov.layers.linear import known_width, per_axis
from tf_lyapunov.layers.orthogonal_kernel import OrthogonalKernel
from tf_lyapunov.theory.operators import LinearMap


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class OrthogonalConv2D(OrthogonalKernel):
    """Convolution with an explicit orthogonal kernel of any size, stride, groups or dilation.

        y = φ(K ∗ x + b),   K = R ∗ A_F ∗ … ∗ A_1,   A_i = (P_i, I - P_i) along one axis,
        P_i = U_iU_iᵀ,   UᵀU = I,   RᵀR = I or RRᵀ = I                                        (1)

    R multiplies patches of s₁×s₂ pixels, F = k₁ - s₁ + k₂ - s₂, so that K has orthonormal columns
    for filters ≤ s₁s₂·in and orthonormal rows otherwise, in every group. At inference it is a
    `keras.layers.Conv2D` with the kernel K, computed once, and (for zero padding) exported as one.
    Train it with `optimizers.Stiefel(inner)`, which keeps U and R orthogonal; with another
    optimizer they leave the manifold.

    Padding: `"same"` and `"valid"` add zeros or none. The map is then a part of the orthogonal one
    on the infinite grid, of gain at most 1: `"valid"` keeps orthonormal outputs (filters ≤
    s₁s₂·in), no more is kept at the border. `"circular"` joins opposite borders, and keeps norms
    exactly from s₁s₂·in filters; zeros are added first at the end of sides that the stride does
    not divide.

    The gain is never assumed to be 1. `gain_upper_bound()` is (1 + ‖G - I‖)^½ with the departure
    of K as cast measured in float64 (`theory.orthogonal.convolution_residual_upper_bound`), for
    every size of the images; certificates take it, or the norm of the map at its size.

    Args:
        filters, kernel_size, strides, padding, data_format, dilation_rate, groups: as in
            `keras.layers.Conv2D`, and in its order (default padding `"same"`; `"circular"` too).
        activation, use_bias, …: as there; an activation must not be steeper than 1, and may be a
            layer such as `MaxMin`. `kernel_initializer` draws the factors, whose polar factors are
            taken; `kernel_regularizer` is one of the factors.
        preserves: None, or what must hold exactly: `"norms"` (an isometry) or `"gradients"` (its
            adjoint: outputs are orthonormal).

    Raises:
        ValueError: when built, if the kernel or the padding cannot do what `preserves` says, such
            as an isometry to fewer numbers; for a constraint, an adapter or quantization, which
            would move the factors off the manifold.

    Example:

    >>> import numpy as np
    >>> layer = OrthogonalConv2D(8, 3, 2, "circular", use_bias=False)
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 6, 2)).astype("float32")
    >>> y = keras.ops.convert_to_numpy(layer(x))
    >>> bool(np.allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-4))
    True
    >>> 1.0 <= layer.gain_upper_bound() < 1.0001
    True

    Reference: Li et al. (2019) and Boissin et al. (2025, arXiv 2501.07930); in place of their
    parametrisations by Björck iterations the optimizer keeps the factors.
    """

    paddings = ("same", "valid", "circular")
    needs = (
        "An isometry needs groups of at least s₁s₂·in filters, sides of at least the stride, and "
        "padding='circular' (or 'same' where sides and strides are equal); its adjoint at most as "
        "many, and padding='valid', or one of these where strides divide the image."
    )

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="same",
        data_format=None,
        dilation_rate=1,
        groups=1,
        activation=None,
        use_bias=True,
        kernel_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        *,
        bias_constraint=None,
        preserves=None,
        **kwargs,
    ):
        super().__init__(
            filters,
            kernel_size,
            strides,
            padding,
            activation,
            use_bias,
            kernel_initializer,
            bias_initializer,
            kernel_regularizer,
            bias_regularizer,
            bias_constraint=bias_constraint,
            preserves=preserves,
            groups=groups,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.dilation_rate = per_axis("dilation_rate", dilation_rate, 2)
        self.data_format = image_format(data_format)
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "`strides` and `dilation_rate` cannot both exceed 1. "
                f"Received: strides={self.strides}, dilation_rate={self.dilation_rate}."
            )

    def _last(self, shape):
        """A shape with its channels last."""
        shape = tuple(shape)
        return shape if self.data_format == "channels_last" else (shape[0], *shape[2:], shape[1])

    def build(self, input_shape):
        *_, high, wide, _ = self._last(input_shape)
        channels = known_width(self._last(input_shape), self)
        if channels % self.groups:
            raise ValueError(
                f"The channels of the input must be divisible by `groups`. Received: {channels} "
                f"channels, groups={self.groups} in layer {self.name!r}."
            )
        if self.padding == "circular" and None in (high, wide):
            raise ValueError(
                "Circular padding needs images of a known size. Received: input shape "
                f"{tuple(input_shape)} in layer {self.name!r}."
            )
        inputs, outputs = channels // self.groups, self.filters // self.groups
        rows, circular = math.prod(self.base) * inputs, self.padding == "circular"
        known = None not in (high, wide)
        whole = known and high % self.strides[0] == wide % self.strides[1] == 0
        norms = outputs >= rows and self.base == self.strides
        norms = norms and (circular or (self.padding == "same" and self._apart))
        whole = whole and (circular or (self.padding == "same" and self._apart))
        gradients = outputs <= rows and (whole or self.padding == "valid")
        self._check_preserves(channels, self.filters, norms, gradients)
        self._add_factors(inputs, outputs)
        self._build_activation(input_shape)
        axis = 1 if self.data_format == "channels_first" else -1
        shape = (None, *input_shape[1:]) if circular else None
        self.input_spec = keras.layers.InputSpec(
            shape=shape, ndim=4, axes=None if shape else {axis: channels}
        )

    def _map(self, input_shape):
        """`LinearMap` of the layer, of circular padding behind it, on inputs of this shape."""
        sizes = None if input_shape is None else self._last(input_shape)[1:]
        return LinearMap(
            "conv",
            sizes,
            strides=self.strides,
            padding="valid" if self.padding == "circular" else self.padding,
            dilation=self.dilation_rate,
            groups=self.groups,
        )

    def wrapped_positions(self, input_shape):
        """Per axis, the pixel that circular padding puts at every place; the size for zero."""
        found = []
        for n, k, s, d in zip(
            self._last(input_shape)[1:3],
            self.kernel_size,
            self.strides,
            self.dilation_rate,
            strict=True,
        ):
            whole = -(-n // s) * s
            # A multiple of the stride, so that patches stay what they are.
            left = d * s * ((-(-k // s) - 1) // 2)
            positions = np.arange(-left, whole - s + (k - 1) * d + 1 - left) % whole
            found.append(np.minimum(positions, n))
        return found

    def call(self, x, training=None):
        (kernel,) = self.effective(training)
        # TensorFlow's processors have no convolution with channels first.
        first, shape = self.data_format == "channels_first", x.shape
        x = ops.moveaxis(x, 1, -1) if first else x
        if self.padding == "circular":
            for axis, index in enumerate(self.wrapped_positions(shape)):
                x = _taken(x, index, axis + 1)
        y = ops.conv(
            x,
            kernel,
            strides=self.strides,
            padding="valid" if self.padding == "circular" else self.padding,
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
        )
        return self._activated(ops.moveaxis(y, -1, 1) if first else y)

    def _shaped_bias(self):
        if self.data_format == "channels_first":
            return ops.reshape(self.bias, (-1, 1, 1))
        return self.bias

    def compute_output_shape(self, input_shape):
        axes = zip(
            self._last(input_shape)[1:3],
            self.kernel_size,
            self.strides,
            self.dilation_rate,
            strict=True,
        )
        sizes = [
            None if n is None else (n - (k - 1) * d - 1) // s + 1
            if self.padding == "valid"
            else -(-n // s)
            for n, k, s, d in axes
        ]  # fmt: skip
        if self.data_format == "channels_first":
            return (input_shape[0], self.filters, *sizes)
        return (input_shape[0], *sizes, self.filters)

    def get_config(self):
        return {
            **super().get_config(),
            "data_format": self.data_format,
            "dilation_rate": list(self.dilation_rate),
            "groups": self.groups,
        }


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class OrthogonalConv2DTranspose(OrthogonalKernel):
    """Transposed convolution with an explicit orthogonal kernel: the adjoint of `OrthogonalConv2D`.

        y = φ(K* x + b),   K as there, from `filters` channels to those of the input

    `padding="valid"` is an isometry where s₁s₂·filters ≥ in and no side is below its stride; with
    `"same"`, which crops to stride times the input's size, the gain is at most 1. At inference, and
    exported, it is a `keras.layers.Conv2DTranspose`. Its gain is measured as there, and its factors
    are marked for `optimizers.Stiefel`.

    Args:
        filters, kernel_size, strides, padding: as in `keras.layers.Conv2DTranspose`, and in its
            order (default padding `"same"`).
        activation, use_bias, …: by keyword, as there; see `OrthogonalConv2D`. Channels are last;
            there is no output padding, dilation or grouping.
        preserves: None, `"norms"` or `"gradients"`.

    Raises:
        ValueError: as for `OrthogonalConv2D`.

    Example:

    >>> import numpy as np
    >>> layer = OrthogonalConv2DTranspose(2, 3, 2, "valid", use_bias=False, preserves="norms")
    >>> x = np.random.default_rng(0).standard_normal((1, 3, 4, 6)).astype("float32")
    >>> y = keras.ops.convert_to_numpy(layer(x))
    >>> y.shape, bool(np.allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-4))
    ((1, 7, 9, 2), True)

    Reference: Boissin et al. (2025, arXiv 2501.07930).
    """

    needs = (
        "An isometry needs at least in/(s₁s₂) filters and padding='valid'; its adjoint at most as "
        "many, sides equal to the strides and padding='same' or 'valid'."
    )
    # What readers of convolutions ask for.
    data_format, dilation_rate, output_padding = "channels_last", (1, 1), None

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="same",
        *,
        activation=None,
        use_bias=True,
        kernel_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        bias_constraint=None,
        preserves=None,
        **kwargs,
    ):
        kwargs = without(
            self,
            kwargs,
            data_format=(None, "channels_last"),
            groups=(1,),
            dilation_rate=(1, (1,), (1, 1)),
            output_padding=(None,),
        )
        super().__init__(
            filters,
            kernel_size,
            strides,
            padding,
            activation,
            use_bias,
            kernel_initializer,
            bias_initializer,
            kernel_regularizer,
            bias_regularizer,
            bias_constraint=bias_constraint,
            preserves=preserves,
            **kwargs,
        )

    def build(self, input_shape):
        channels = known_width(input_shape, self)
        rows = math.prod(self.base) * self.filters
        norms = channels <= rows and (self.padding == "valid" or self._apart)
        whole = self.base == self.strides and self._apart
        self._check_preserves(channels, self.filters, norms, channels >= rows and whole)
        self._add_factors(self.filters, channels)
        self._build_activation(input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: channels})

    def _map(self, input_shape):
        sizes = None if input_shape is None else tuple(input_shape)[1:]
        return LinearMap("conv_transpose", sizes, strides=self.strides, padding=self.padding)

    def call(self, x, training=None):
        (kernel,) = self.effective(training)
        y = ops.conv_transpose(
            x, kernel, strides=self.strides, padding=self.padding, data_format="channels_last"
        )
        return self._activated(y)

    def compute_output_shape(self, input_shape):
        axes = zip(tuple(input_shape)[1:3], self.kernel_size, self.strides, strict=True)
        sizes = [
            None if n is None else n * s + (max(k - s, 0) if self.padding == "valid" else 0)
            for n, k, s in axes
        ]
        return (input_shape[0], *sizes, self.filters)


def _taken(x, index, axis):
    """Entries of an axis in this order; zeros where the index is the axis' size."""
    size = x.shape[axis]
    if np.array_equal(index, np.arange(size)):
        return x
    if index.max() == size:
        pads = [[0, 0] for _ in x.shape]
        pads[axis] = [0, 1]
        x = ops.pad(x, pads)
    return ops.take(x, index, axis=axis)
