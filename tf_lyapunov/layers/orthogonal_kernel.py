"""What convolutions with an explicit orthogonal kernel share: factors, kernel and departure."""

import math

import keras
from keras import ops

from tf_lyapunov.layers.base import EffectiveLayer
from tf_lyapunov.layers.initial import in_float32
from tf_lyapunov.layers.keras_order import without
from tf_lyapunov.layers.linear import check_activation, per_axis
from tf_lyapunov.layers.manifold import PRESERVES
from tf_lyapunov.optimizers.marks import mark_orthogonal
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.spectral.orthogonal_kernels import factor_axes, orthogonal_kernel
from tf_lyapunov.spectral.retraction import polar_factor
from tf_lyapunov.theory.orthogonal import convolution_residual_upper_bound
from tf_lyapunov.theory.rounding import sqrt_up


class OrthogonalKernel(EffectiveLayer):
    """What convolutions with an explicit orthogonal kernel share: factors, kernel, departure.

    Args:
        filters, kernel_size, strides, padding, groups, activation, use_bias, …: of the layers.
        preserves: None, "norms" or "gradients".
    """

    paddings = ("same", "valid")

    def __init__(
        self,
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
        *,
        bias_constraint,
        preserves,
        groups=1,
        **kwargs,
    ):
        none = (None,)
        constraint = kwargs.pop("kernel_constraint", None)
        if constraint is not None:
            raise ValueError(
                f"`kernel_constraint` of a {type(self).__name__} must be None: its factors are "
                "kept orthogonal by the optimizer or held by a constraint, not both. Received: "
                f"kernel_constraint={constraint!r}. Use a layer of Keras for a constrained kernel."
            )
        kwargs = without(self, kwargs, lora_rank=none, lora_alpha=none, quantization_config=none)
        super().__init__(**kwargs)
        self.filters = count("filters", filters)
        self.kernel_size = per_axis("kernel_size", kernel_size, 2)
        self.strides = per_axis("strides", strides, 2)
        self.groups = count("groups", groups)
        if padding not in self.paddings:
            raise ValueError(
                f"`padding` must be one of {self.paddings}. Received: padding={padding!r}. Put a "
                "`Padding2D` before it, whose gain is counted, and use `padding='valid'`."
            )
        if self.filters % self.groups:
            raise ValueError(
                "`filters` must be divisible by `groups`. "
                f"Received: filters={filters}, groups={groups}."
            )
        if preserves not in PRESERVES:
            raise ValueError(
                f"`preserves` must be one of {PRESERVES}. Received: preserves={preserves!r}."
            )
        self.padding, self.preserves = padding, preserves
        self.activation = keras.activations.get(activation)
        check_activation(self.activation)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.bias = self.projectors = None

    @property
    def base(self):
        """Sides of the patches that the mixing matrix multiplies."""
        return tuple(min(k, s) for k, s in zip(self.kernel_size, self.strides, strict=True))

    @property
    def _apart(self):
        """Whether patches do not overlap, so that no padding touches them."""
        return all(k <= s for k, s in zip(self.kernel_size, self.strides, strict=True))

    def _add_factors(self, inputs, outputs):
        """Factors of the convolution from `inputs` to `outputs` channels of every group."""
        patch = math.prod(self.base)
        # Zero channels beside the input's leave the factors more to turn; they cost nothing later.
        channels = max(inputs, outputs // patch)
        self._inner = inputs
        self.mixing = self._add_factor("mixing", (self.groups, patch * channels, outputs))
        count_ = len(factor_axes(self.kernel_size, self.base))
        sources = [self.mixing]
        if count_:
            shape = (self.groups, count_, channels, max(channels // 2, 1))
            self.projectors = self._add_factor("projectors", shape)
            sources.append(self.projectors)
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.filters,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        shape = (*self.kernel_size, *self._kernel_channels(inputs, outputs))
        self._track_effective({"kernel": shape}, sources, self._composed)

    def _add_factor(self, name, shape):
        def orthogonal(shape, dtype=None):
            return polar_factor(self.kernel_initializer(shape, dtype=dtype))

        variable = self.add_weight(
            name=name,
            shape=shape,
            initializer=in_float32(orthogonal),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        return mark_orthogonal(variable)

    def _kernel_channels(self, inputs, outputs):
        return inputs, self.groups * outputs

    def _composed(self, mixing, projectors=None, training=False):
        parts = orthogonal_kernel(mixing, projectors, self.kernel_size, self.base)
        parts = ops.transpose(parts[..., : self._inner, :], (1, 2, 3, 0, 4))
        return (ops.reshape(parts, (*parts.shape[:3], -1)),)

    def _check_preserves(self, inputs, outputs, norms, gradients):
        """Raises where the kernel, or the padding, cannot keep what `preserves` asks for."""
        keeps = {"norms": norms, "gradients": gradients}.get(self.preserves, True)
        if keeps:
            return
        raise ValueError(
            f"A kernel that preserves {self.preserves} must be "
            f"{'an isometry' if self.preserves == 'norms' else 'the adjoint of an isometry'}, "
            f"which {self.kernel_size} taps at strides {self.strides} with padding "
            f"{self.padding!r} from {inputs} to {outputs} channels cannot be. {self.needs} "
            f"Received: preserves={self.preserves!r} in layer {self.name!r}."
        )

    def _as_convolution(self):
        """The kernel as cast, in the layout of the convolution that it belongs to."""
        return self.effective_values()["kernel"]

    def departure_upper_bound(self):
        """Bound on ‖G - I‖, G the Gram operator of the smaller side of the kernel as cast."""
        return convolution_residual_upper_bound(self._as_convolution(), self.strides, self.groups)

    def gain_upper_bound(self):
        """(1 + ‖G - I‖)^½: a bound on the gain of the layer at every size of its images."""
        return sqrt_up(1 + self.departure_upper_bound())

    def _build_activation(self, input_shape):
        if isinstance(self.activation, keras.Layer) and not self.activation.built:
            self.activation.build(self.compute_output_shape(input_shape))

    def _activated(self, y):
        if self.bias is not None:
            y = y + ops.cast(self._shaped_bias(), y.dtype)
        return y if self.activation is None else self.activation(y)

    def _shaped_bias(self):
        return self.bias

    def quantize(self, *args, **kwargs):
        raise ValueError(
            "A rounded factor would leave the manifold. Received: quantize on layer "
            f"{self.name!r}. Export the model by `export_plain` and quantize that."
        )

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": list(self.kernel_size),
            "strides": list(self.strides),
            "padding": self.padding,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "preserves": self.preserves,
        }
