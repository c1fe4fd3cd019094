"""Convex potential layers: residual layers whose step length keeps them 1-Lipschitz.

All layers here, and those of `layers/sdp.py`, are of one form,

    z = g·(x - W t φ(Wᵀx + b)),   t ≥ 0 one number or one per hidden channel,                (1)

with g = max_gain. The gain is g·max(1, ‖W√t‖² - 1) for every φ with slopes in [0, 1]: see
`theory.potential`. What differs is how t follows from W.
"""

import keras
from keras import ops

from tf_lyapunov.layers.base import representable, rounded_down
from tf_lyapunov.layers.keras_order import IMAGES, extending, without
from tf_lyapunov.layers.linear import per_axis, sector_of
from tf_lyapunov.layers.normalized import spectral_norms
from tf_lyapunov.layers.weighted import WeightedLayer
from tf_lyapunov.spectral.arguments import GAIN_RANGE, count, positive
from tf_lyapunov.spectral.norms import (
    kernel_norm_upper_bound,
    measured_map,
    norm_estimate,
    spectral_norm,
)
from tf_lyapunov.spectral.precision import unit_roundoff
from tf_lyapunov.theory.operators import LinearMap
from tf_lyapunov.theory.potential import flow_gain_upper_bound

NORMS = ("bound", "power", None)
# Power steps: that of the norm's gradient, from a fixed start; in training and in inference of the
# published layer.
GRADIENT_STEPS, TRAINING_STEPS, INFERENCE_STEPS = 8, 1, 100
# Scales above this are cut off, which is always safe; they belong to kernels close to zero.
LARGEST_SCALE = {"float16": 2.0**14}
LARGEST_SCALE_ELSEWHERE = 2.0**60


def monotone_activation(activation):
    """Keras activation of this name or function, if its slopes are proven to lie in [0, 1].

    Raises:
        ValueError: if a slope may leave [0, 1].
        UnsupportedLayerError: if no slopes are known.

    Example:

    >>> monotone_activation("tanh").__name__
    'tanh'
    """
    function = keras.activations.get(activation)
    sector = sector_of(function, "an elementwise activation of Keras, such as 'relu' or 'tanh'")
    if sector.alpha < 0 or sector.beta > 1:
        raise ValueError(
            "`activation` must not decrease and must be 1-Lipschitz: slopes within [0, 1]. "
            f"Received: activation={activation!r} with slopes in "
            f"[{sector.alpha:.4g}, {sector.beta:.4g}]. Use 'relu', 'tanh', 'elu' or 'linear'."
        )
    return function


class PotentialLayer(WeightedLayer):
    """Layer of form (1); subclasses say how the scale t follows from the kernel.

    Args:
        width: number of hidden units or channels (`None`: as many as inputs).
        activation: φ, slopes in [0, 1].
        *args, **kwargs: of `WeightedLayer`, such as `use_bias`, and `max_gain`.
    """

    spatial_axes = 0

    @extending(WeightedLayer)
    def __init__(self, width=None, activation="relu", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.width = None if width is None else count("width", width)
        self.activation = monotone_activation(activation)
        self.kernel_size = ()

    def build(self, input_shape):
        rank, channels = self.spatial_axes, input_shape[-1]
        if (
            channels is None
            or len(input_shape) < rank + 2
            or (rank and len(input_shape) > rank + 2)
        ):
            raise ValueError(
                f"{type(self).__name__} needs an input of {rank or 'any number of'} spatial axes "
                f"with a known number of channels last. Received: input_shape={input_shape}."
            )
        self.linear_map = LinearMap("dense", (channels,))
        if rank:
            self.linear_map = LinearMap("conv", tuple(input_shape[1:]), padding="same")
        width = channels if self.width is None else self.width
        shape = (*self.kernel_size, channels, width)
        self._add_kernel(shape)
        self._add_bias(width)
        sources, scale_shape = self._scale_sources(width)
        self._track_effective(
            {"kernel": shape, "scale": scale_shape}, [self.kernel, *sources], self._weights
        )
        self.built = True

    def _scale_sources(self, width):
        """Further raw variables that the scale depends on, and the shape of the scale."""
        raise NotImplementedError

    def _inverse_scale(self, kernel, *sources, training):
        """1/t for the kernel given, rounding included: never below what the guarantee needs."""
        raise NotImplementedError

    def _weights(self, kernel, *sources, training):
        # The scale is that of the kernel as the compute dtype holds it.
        kernel = representable(kernel, self.compute_dtype)
        inverse = self._inverse_scale(kernel, *sources, training=training)
        largest = LARGEST_SCALE.get(self.compute_dtype, LARGEST_SCALE_ELSEWHERE)
        scale = 1 / ops.maximum(inverse, 1 / largest)
        margin = 4 * unit_roundoff(self.work_dtype) + 2 * unit_roundoff(self.compute_dtype)
        return kernel, ops.cast(scale, kernel.dtype) * (1 - margin)

    def call(self, inputs, training=None):
        kernel, scale = self.effective(training)
        hidden = self._map(inputs, kernel)
        if self.bias is not None:
            hidden = hidden + self.bias
        outputs = inputs - self._adjoint(scale * self.activation(hidden), kernel)
        gain = rounded_down(self.max_gain, self.compute_dtype)
        return outputs if gain == 1 else gain * outputs

    def gain_upper_bound(self):
        """Proven bound, float64, on the layer's gain: from its weights, not from `max_gain`.

        Of a convolution: at the image size that it was built with.
        """
        values = self.effective_values()
        return flow_gain_upper_bound(
            values["kernel"],
            values["scale"],
            self.linear_map,
            gain=rounded_down(self.max_gain, self.compute_dtype),
        )

    def _map(self, x, kernel):
        return ops.matmul(x, kernel)

    def _adjoint(self, y, kernel):
        return ops.matmul(y, ops.transpose(kernel))

    def get_config(self):
        return {
            **super().get_config(),
            "width": self.width,
            "activation": keras.activations.serialize(self.activation),
        }


class PotentialConvolution:
    """Makes a `PotentialLayer` convolutional: stride 1, 'same' zero padding, channels last."""

    @extending(PotentialLayer, positional=False)
    def __init__(self, width=None, kernel_size=3, **kwargs):
        ones = (1, (1,), (1, 1))
        kwargs = without(self, kwargs, padding=("same",), strides=ones, **IMAGES)
        super().__init__(width, **kwargs)
        self.kernel_size = per_axis("kernel_size", kernel_size, self.spatial_axes)
        if keras.config.image_data_format() != "channels_last":
            raise ValueError(
                f"{type(self).__name__} needs channels last. Received: image_data_format="
                f"{keras.config.image_data_format()!r}. Permute the axes before the layer."
            )

    def _map(self, x, kernel):
        return _same_convolution(x, kernel, [((k - 1) // 2, k // 2) for k in self.kernel_size])

    def _adjoint(self, y, kernel):
        axes = tuple(range(self.spatial_axes))
        turned = ops.swapaxes(ops.flip(kernel, axis=axes), -1, -2)
        return _same_convolution(y, turned, [(k // 2, (k - 1) // 2) for k in self.kernel_size])

    def get_config(self):
        return {**super().get_config(), "kernel_size": list(self.kernel_size)}


def _same_convolution(x, kernel, pads):
    padding = "same"
    if any(left != right for left, right in pads):  # even sides: backends differ
        x, padding = ops.pad(x, [(0, 0), *pads, (0, 0)]), "valid"
    return ops.conv(x, kernel, padding=padding, data_format="channels_last")


class ConvexPotential(PotentialLayer):
    """The scale of convex potential layers, t = 2h/s² with s ≥ ‖W‖."""

    @extending(PotentialLayer)
    def __init__(self, width=None, *args, step=1.0, norm="bound", **kwargs):
        super().__init__(width, *args, **kwargs)
        if norm not in NORMS:
            raise ValueError(f"`norm` must be one of {NORMS}. Received: norm={norm!r}.")
        self.step = positive("step", step, GAIN_RANGE)
        self.norm = norm

    @property
    def guaranteed(self):
        """Whether the gain is at most `max_gain` by construction."""
        return self.norm == "bound" and self.step <= 1

    def _scale_sources(self, width):
        if self.norm != "power":
            return [], ()
        measured = measured_map(self.kernel.shape, self.linear_map).input_shape
        self.vector = self.add_weight(
            name="vector",
            shape=(1, *measured),
            initializer=keras.initializers.RandomNormal(seed=0),
            trainable=False,
            autocast=False,
        )
        return [self.vector], ()

    def _inverse_scale(self, kernel, *vector, training):
        if self.norm is None:
            return ops.ones((), kernel.dtype) / self.step
        if self.norm == "power":
            # The vector has made its step in `call`.
            steps = 0 if training else INFERENCE_STEPS
            sigma = spectral_norm(kernel, self.linear_map, iterations=steps, start=vector[0])
        else:
            # Value of the bound, which the estimate steers; gradient u vᵀ of the norm.
            if self.spatial_axes:
                estimate = spectral_norm(kernel, self.linear_map, iterations=GRADIENT_STEPS)
                still, frozen = ops.stop_gradient(estimate), ops.stop_gradient(kernel)
                bound = kernel_norm_upper_bound(frozen, self.linear_map, near=still)
            else:
                bound, _, estimate = spectral_norms(kernel)
            sigma = ops.stop_gradient(bound) + (estimate - ops.stop_gradient(estimate))
        return ops.square(sigma) / (2 * self.step)

    def build(self, input_shape):
        super().build(input_shape)
        sized = self.spatial_axes and self.linear_map.input_shape is not None
        if sized and self.norm is not None:
            # The norm is that of the map on images of this size: no other may be fed.
            self.input_spec = keras.layers.InputSpec(shape=(None, *input_shape[1:]))

    def call(self, inputs, training=None):
        if training and self.norm == "power":
            kernel = ops.stop_gradient(ops.convert_to_tensor(self.kernel))
            _, vector = norm_estimate(
                kernel,
                self.linear_map,
                iterations=TRAINING_STEPS,
                start=ops.stop_gradient(ops.convert_to_tensor(self.vector)),
            )
            self.vector.assign(ops.cast(vector, self.vector.dtype))
        return super().call(inputs, training=training)

    def get_config(self):
        return {**super().get_config(), "step": self.step, "norm": self.norm}


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ConvexPotentialDense(ConvexPotential):
    """Convex potential layer on the last axis: a gradient step that cannot expand.

        z = g·(x - (2h/s²)·W φ(Wᵀx + b)),   s ≥ ‖W‖,   g = max_gain

    Gain at most `max_gain` at every value of the variables and in every compute dtype: the step
    is that of the kernel after its cast, s is an upper bound (`spectral.norms`) with all rounding
    included, and 2h/s² is rounded down, so that `rounding_inflation` is 1. The gradient of s is
    u vᵀ with estimates u, v of the top singular vectors of W.

    As published, and without a guarantee (`gain_upper_bound()` reads the gain from the weights):
    `norm="power"` divides by a power-iteration estimate, which is never above ‖W‖, one step per
    training call and 100 in inference; `norm=None` fixes the scale, z = x - h·W φ(Wᵀx + b)
    (Appendix D.2).

    Args:
        width: number of hidden units (`None`: the input's).
        activation: φ, a Keras activation with slopes in [0, 1].
        step: h; the gain is guaranteed for h ≤ 1 only.
        norm: `"bound"`, `"power"` or `None`.
        use_bias, kernel_initializer, …: as in `keras.layers.Dense`, and in its order.
        max_gain: g.

    Raises:
        ValueError: if an argument is out of range, or φ is not monotone and 1-Lipschitz.

    Example:

    >>> import numpy as np, keras
    >>> layer = ConvexPotentialDense(8)
    >>> tuple(layer(np.ones((2, 4), "float32")).shape)
    (2, 4)
    >>> bool(1.0 <= layer.gain_upper_bound() < 1.0 + 1e-9)
    True

    Reference: Meunier et al. (2022), equation (6); sound form by default.
    """


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ConvexPotentialConv2D(PotentialConvolution, ConvexPotential):
    """Convex potential layer on images, with 'same' zero padding.

        z = g·(x - (2h/s²)·W φ(Wᵀx + b)),   s ≥ ‖W‖,   g = max_gain

    Wᵀ is the convolution at stride 1, W its exact adjoint, odd or even kernels alike. s bounds the
    norm of the zero-padded map at the size the layer is built with, which is the only one it then
    takes, or at every size where it is built with an unknown one (up to 5% looser: a shorter step).
    See `ConvexPotentialDense`.

    Args:
        width: number of hidden channels (`None`: the input's).
        kernel_size: an integer or two.
        activation, step, norm, use_bias, kernel_initializer, bias_initializer, max_gain: see
            `ConvexPotentialDense`.

    Raises:
        ValueError: see `ConvexPotentialDense`; if Keras is set to channels first.

    Example:

    >>> import numpy as np, keras
    >>> layer = ConvexPotentialConv2D(8, kernel_size=3)
    >>> tuple(layer(np.ones((2, 6, 6, 4), "float32")).shape)
    (2, 6, 6, 4)
    >>> bool(1.0 <= layer.gain_upper_bound() < 1.0 + 1e-9)
    True

    Reference: Meunier et al. (2022), equation (6); sound form by default.
    """

    spatial_axes = 2


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ConvexPotentialConv1D(PotentialConvolution, ConvexPotential):
    """Convex potential layer on sequences `(n, length, channels)`: see `ConvexPotentialConv2D`.

    Example:

    >>> import numpy as np, keras
    >>> tuple(ConvexPotentialConv1D(8, kernel_size=3)(np.ones((2, 6, 4), "float32")).shape)
    (2, 6, 4)
    """

    spatial_axes = 1
