"""Affine Lipschitz layers φ(W x + b): what their parametrisations share."""

import math

import keras
from keras import ops

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.layers.activations import FullSort, GroupSort, Householder, LipschitzPReLU, MaxMin
from tf_lyapunov.layers.axes import image_format
from tf_lyapunov.layers.base import rounded_down
from tf_lyapunov.layers.keras_order import extending
from tf_lyapunov.layers.weighted import WeightedLayer
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.precision import unit_roundoff
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.sectors import Sector

# Layers of gain 1 that keep the shape, for all of their weights.
ACTIVATION_LAYERS = (MaxMin, GroupSort, FullSort, Householder, LipschitzPReLU)
# Entries of float16 weights below the normal range become 0.
FLOAT16_TINY = 2.0**-14


class LipschitzLinear(WeightedLayer):
    """y = φ(W x + b) with ‖W‖ ≤ max_gain and φ of gain 1 or less.

    Args:
        activation: `None`, an elementwise Keras activation of slopes in [-1, 1], or a `MaxMin`,
            `GroupSort`, `FullSort`, `Householder` or `LipschitzPReLU` layer.
        *args, **kwargs: of `WeightedLayer`, such as `use_bias` and `kernel_regularizer`.

    Raises:
        ValueError: if the activation can be steeper than 1.
        UnsupportedLayerError: if its slopes are not known.
    """

    @extending(WeightedLayer)
    def __init__(self, *args, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = keras.activations.get(activation)
        check_activation(self.activation)

    def _build_activation(self, input_shape):
        # Keras builds inner layers by calling them, which it spares where the shape is known.
        if isinstance(self.activation, keras.Layer) and not self.activation.built:
            self.activation.build(self.compute_output_shape(input_shape))

    def _shaped_bias(self):
        """The bias, as it is added to what the map gives."""
        return self.bias

    def _activated(self, y):
        if self.bias is not None:
            y = y + ops.cast(self._shaped_bias(), y.dtype)
        return y if self.activation is None else self.activation(y)

    def _cast_inflation(self, rank, taps, entries, norm=None):
        """Factor that rounding a kernel of ‖K‖_F ≤ √rank·norm to the compute dtype may cost.

            ‖Δ‖ ≤ √T·‖ΔK‖_F ≤ √T·(u√rank·norm + 2⁻¹⁴√entries)   (last term: float16)

        `norm` is `max_gain` by default.
        """
        if unit_roundoff(self.compute_dtype) <= unit_roundoff(self.work_dtype):
            return 1.0
        excess = 1.01 * unit_roundoff(self.compute_dtype) * math.sqrt(taps * rank)
        if self.compute_dtype == "float16":
            excess += FLOAT16_TINY * math.sqrt(taps * entries) / (norm or self.max_gain)
        return 1.0 + excess

    def get_config(self):
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
        }


class LipschitzDense(LipschitzLinear):
    """Base of dense layers y = φ(x K + b); subclasses map the raw kernel to K.

    Effective weight: `kernel` (in, units), ‖K‖ ≤ max_gain as stored in `work_dtype`, and
    ≤ max_gain·rounding_inflation after the cast to float16 or bfloat16, where the inflation is
    1 + u√min(in, units) (and 2⁻¹⁴√(in·units)/max_gain for float16's underflow).

    Args:
        units: width of the output.
        activation, use_bias, …: as in `keras.layers.Dense`, in its order.
        **kwargs: of `LipschitzLayer`.
    """

    @extending(LipschitzLinear)
    def __init__(self, units, activation=None, *args, **kwargs):
        super().__init__(*args, activation=activation, **kwargs)
        self.units = count("units", units)

    def build(self, input_shape):
        width = known_width(input_shape, self)
        self._add_kernel((width, self.units))
        self._add_bias(self.units)
        self._build_activation(input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: width})
        self._track_effective({"kernel": (width, self.units)}, [self.kernel], self._parametrised)

    def _parametrised(self, kernel, training=False):
        raise NotImplementedError

    def _applied(self, x, kernel):
        """x K in training, from the raw kernel, in `work_dtype`."""
        return ops.matmul(x, self._parametrised(kernel, training=True)[0])

    def call(self, x, training=None):
        if self._in_factors(training):
            return self._activated(self._applied(x, ops.convert_to_tensor(self.kernel)))
        (kernel,) = self.effective(training)
        return self._activated(ops.matmul(x, kernel))

    @property
    def rounding_inflation(self):
        shape = self.kernel.shape
        return self._cast_inflation(min(shape), 1, math.prod(shape))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class ScaledDense(LipschitzDense):
    """Base of dense layers with K = s·W, W·diag(s) or diag(s)·W; subclasses give s.

    ‖K‖ ≤ max_gain holds for the exact product of the stored numbers. In training the scale meets
    the output (or the input), of batch·units elements, and not the kernel: of a step's passes over
    the kernel three are left out, its scaling and the two of the gradient.
    """

    def _scale(self, kernel):
        """s: a scalar, `(units,)`, or `(in, 1)`."""
        raise NotImplementedError

    def _parametrised(self, kernel, training=False):
        return (kernel * self._scale(kernel),)

    def _applied(self, x, kernel):
        scale = self._scale(kernel)
        if len(scale.shape) == 2:
            return ops.matmul(x * ops.squeeze(scale, -1), kernel)
        return ops.matmul(x, kernel) * scale


class LipschitzConv(LipschitzLinear):
    """Base of convolutions with zero padding; subclasses map the raw kernel to K.

    Effective weight: `kernel` (*kernel_size, in/groups, filters), whose map at the input size has a
    norm ≤ max_gain as stored in `work_dtype`, and ≤ max_gain·rounding_inflation after the cast to
    float16 or bfloat16: 1 + u√(T·min(S·in, filters)), T taps, S the product of the strides.

    Args:
        filters: output channels.
        kernel_size, strides, dilation_rate: an integer, or one per spatial axis.
        padding: `"same"` or `"valid"` (zeros), `"causal"` with one spatial axis.
        data_format, groups, activation, use_bias, …: as in `keras.layers.Conv2D`, in its order.
        **kwargs: of `LipschitzLayer`.
    """

    rank = None

    @extending(LipschitzLinear)
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
        *args,
        **kwargs,
    ):
        super().__init__(*args, activation=activation, **kwargs)
        self.filters = count("filters", filters)
        self.kernel_size = per_axis("kernel_size", kernel_size, self.rank)
        self.strides = per_axis("strides", strides, self.rank)
        self.dilation_rate = per_axis("dilation_rate", dilation_rate, self.rank)
        self.groups = count("groups", groups)
        self.data_format = image_format(data_format)
        allowed = ("same", "valid", "causal") if self.rank == 1 else ("same", "valid")
        if padding not in allowed:
            raise ValueError(f"`padding` must be one of {allowed}. Received: padding={padding!r}.")
        if padding == "causal" and self.data_format == "channels_first":
            raise ValueError(
                "Causal padding needs channels last, as in Keras. "
                "Received: data_format='channels_first'."
            )
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "`strides` and `dilation_rate` cannot both exceed 1. "
                f"Received: strides={self.strides}, dilation_rate={self.dilation_rate}."
            )
        if self.filters % self.groups:
            raise ValueError(
                "`filters` must be divisible by `groups`. "
                f"Received: filters={filters}, groups={groups}."
            )
        self.padding = padding

    @property
    def _channels(self):
        return 1 if self.data_format == "channels_first" else -1

    def _last(self, shape):
        """A shape with its channels last."""
        shape = tuple(shape)
        return shape if self._channels == -1 else (shape[0], *shape[2:], shape[1])

    def build(self, input_shape):
        channels = known_width(self._last(input_shape), self)
        if channels % self.groups:
            raise ValueError(
                f"The channels of the input must be divisible by `groups`. Received: {channels} "
                f"channels, groups={self.groups} in layer {self.name!r}."
            )
        shape = (*self.kernel_size, channels // self.groups, self.filters)
        self.linear_map = self._map(input_shape)
        self._add_kernel(shape)
        self._add_bias(self.filters)
        self._build_activation(input_shape)
        axes = {self._channels: channels}
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2, axes=axes)
        self._track_effective({"kernel": shape}, [self.kernel], self._parametrised)

    def _map(self, input_shape):
        """`LinearMap` of the layer on inputs of this shape (with the batch axis)."""
        return LinearMap(
            "conv",
            self._last(input_shape)[1:],
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation_rate,
            groups=self.groups,
        )

    def _parametrised(self, kernel, training=False):
        raise NotImplementedError

    def call(self, x, training=None):
        (kernel,) = self.effective(training)
        padding = self.padding
        if padding == "causal":
            reach = (self.kernel_size[0] - 1) * self.dilation_rate[0]
            x, padding = ops.pad(x, [[0, 0], [reach, 0], [0, 0]]), "valid"
        # TensorFlow's processors have no convolution with channels first.
        first = self.data_format == "channels_first"
        y = ops.conv(
            ops.moveaxis(x, 1, -1) if first else x,
            kernel,
            strides=self.strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
        )
        return self._activated(ops.moveaxis(y, -1, 1) if first else y)

    def _shaped_bias(self):
        if self.data_format == "channels_first":
            return ops.reshape(self.bias, (-1, *[1] * self.rank))
        return self.bias

    @property
    def kernel_rank(self):
        """m with ‖K‖_F² ≤ m·‖conv‖²: the smaller side of the symbol, one row block per phase."""
        a, b = self.kernel.shape[-2:]
        return self.groups * min(math.prod(self.strides) * a, b // self.groups)

    @property
    def rounding_inflation(self):
        shape = self.kernel.shape
        return self._cast_inflation(self.kernel_rank, math.prod(self.kernel_size), math.prod(shape))

    def compute_output_shape(self, input_shape):
        sides = self._last(input_shape)[1:-1]
        axes = zip(sides, self.kernel_size, self.strides, self.dilation_rate, strict=True)
        sizes = [None if n is None else self._size(n, k, s, d) for n, k, s, d in axes]
        if self.data_format == "channels_first":
            return (input_shape[0], self.filters, *sizes)
        return (input_shape[0], *sizes, self.filters)

    def _size(self, n, k, s, d):
        return (n - (k - 1) * d - 1) // s + 1 if self.padding == "valid" else -(-n // s)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": list(self.kernel_size),
            "strides": list(self.strides),
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": list(self.dilation_rate),
            "groups": self.groups,
        }


def per_axis(name, value, rank):
    """One positive integer per spatial axis, as a tuple."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * rank
    if len(values) != rank:
        raise ValueError(
            f"`{name}` must be an integer or {rank} of them. Received: {name}={value!r}."
        )
    return tuple(count(name, v) for v in values)


def known_width(input_shape, layer):
    """The channels of an input shape, which must be known."""
    if input_shape[-1] is None:
        raise ValueError(
            "The last axis of the input must be known to build a layer. Received: input shape "
            f"{tuple(input_shape)} for layer {layer.name!r}."
        )
    return int(input_shape[-1])


def known_image(input_shape, layer):
    """`(H, W, channels)` of an input shape, all of which must be known."""
    shape = tuple(input_shape)[1:]
    if len(shape) != 3 or None in shape:
        raise ValueError(
            f"A {type(layer).__name__} depends on the size of its images, which must be known: "
            f"(batch, height, width, channels). Received: input shape {tuple(input_shape)}."
        )
    return tuple(int(n) for n in shape)


def with_gain(kernel, max_gain, rank):
    """A kernel of norm ≤ 1 times `max_gain`, so that rounding leaves the norm ≤ max_gain.

    Every entry of the product is rounded by u: ‖Δ‖_F ≤ u·√rank·max_gain (√T of it for T taps).
    """
    if max_gain == 1.0:
        return kernel
    u = unit_roundoff(kernel.dtype)
    return kernel * rounded_down(max_gain * (1 - 2 * u * math.sqrt(rank)), kernel.dtype)


def space_to_depth(x, strides):
    """Rearranges blocks of pixels into channels, zeros added where a block is not full.

        (n, H, W, c) → (n, ⌈H/s⌉, ⌈W/t⌉, s·t·c)

    Entries are copied once: norms and distances stay the same.
    """
    (s, t), (_, high, wide, channels) = strides, x.shape
    if s == t == 1:
        return x
    x = ops.pad(x, [[0, 0], [0, -high % s], [0, -wide % t], [0, 0]])
    rows, columns = -(-high // s), -(-wide // t)
    x = ops.transpose(ops.reshape(x, (-1, rows, s, columns, t, channels)), (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, rows, columns, s * t * channels))


def space_to_depth_shape(shape, strides):
    """Shape `(H, W, c)` after `space_to_depth`."""
    high, wide, channels = shape
    s, t = strides
    return -(-high // s), -(-wide // t), s * t * channels


def sector_of(activation, allowed):
    """Slopes of an activation that a layer holds; `allowed` says which ones it takes.

    Raises:
        UnsupportedLayerError: if no slopes are known, or they are another layer's to learn.
    """
    try:
        return Sector.of(activation)
    except ValueError as error:
        known = not isinstance(error, UnsupportedLayerError)
        if known and not isinstance(activation, keras.Layer):
            raise
        name = getattr(activation, "__name__", type(activation).__name__)
        raise UnsupportedLayerError(
            f"`activation` must be {allowed}. Received: {name}, whose slopes are not known here. "
            "Put it behind this layer as a layer of its own."
        ) from None


def check_activation(activation):
    """Raises unless the activation of a layer is known to be 1-Lipschitz."""
    if type(activation) in ACTIVATION_LAYERS:
        return
    names = ", ".join(v.__name__ for v in ACTIVATION_LAYERS)
    gain = sector_of(activation, f"an elementwise activation of Keras, or one of {names}").magnitude
    if gain > 1:
        raise ValueError(
            "`activation` must not be steeper than 1, or the layer's gain exceeds `max_gain`. "
            f"Received: {getattr(activation, '__name__', activation)!r} of slope {gain:.4g}. "
            "Use it as a layer of its own: certificates will count its gain."
        )
