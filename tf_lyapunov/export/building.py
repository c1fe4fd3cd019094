"""Plain Keras layers with given weights and unique names."""

import keras
import numpy as np

from tf_lyapunov.export import activations
from tf_lyapunov.layers.base import LipschitzLayer
from tf_lyapunov.layers.orthogonal import CayleyConv2D
from tf_lyapunov.layers.sandwich import SandwichConv2D
from tf_lyapunov.program.weights import inference_value


class Names:
    """Unique layer names without slashes: a nested layer keeps its own, where no other has it.

    Args:
        top: names of layers that are not nested, which come first.
    """

    def __init__(self, top=()):
        self.seen, self.top = set(), {_plain(name) for name in top}

    def __call__(self, name):
        own, full = _plain(name.rpartition("/")[2]), _plain(name)
        is_free = own not in self.top and own not in self.seen
        name = candidate = own if is_free else full
        count = 1
        while candidate in self.seen:
            count += 1
            candidate = f"{name}_{count}"
        self.seen.add(candidate)
        return candidate


def _plain(name):
    return name.replace("/", "_").replace("#", "_")


class Plain:
    """Makes the plain layers that stand for one layer of this library."""

    def __init__(self, layer, name, names):
        self.layer, self.name, self.names = layer, name, names
        self.dtype = layer.dtype_policy
        if isinstance(layer, LipschitzLayer) and layer.compute_dtype != layer.work_dtype:
            # Transforms run in the wider type.
            is_fourier = isinstance(layer, CayleyConv2D | SandwichConv2D)
            self.dtype = layer.work_dtype if is_fourier else self.dtype

    def new(self, cls, *args, weights=(), shape=None, **kwargs):
        layer = cls(*args, name=self.names(self.name), dtype=self.dtype, **kwargs)
        if shape is not None:
            layer.build(shape)
            layer.set_weights([np.asarray(w, layer.variable_dtype) for w in weights])
        return layer

    def dense(self, x, kernel, bias=None, activation=None):
        """φ(x K + b) on the last axis."""
        held = {} if activation is None else {"activation": activation}
        weights = [kernel] if bias is None else [kernel, bias]
        use_bias, shape = bias is not None, (*x.shape[:-1], len(kernel))
        return self.new(
            keras.layers.Dense,
            kernel.shape[1],
            use_bias=use_bias,
            weights=weights,
            shape=shape,
            **held,
        )(x)

    def conv(self, x, kernel, bias=None, activation=None, **geometry):
        """φ(K ∗ x + b), channels last."""
        rank = kernel.ndim - 2
        return self.new(
            (keras.layers.Conv1D, keras.layers.Conv2D)[rank - 1],
            kernel.shape[-1],
            kernel.shape[:rank],
            use_bias=bias is not None,
            activation=activation,
            data_format="channels_last",
            weights=[kernel] if bias is None else [kernel, bias],
            shape=x.shape,
            **geometry,
        )(x)

    def conv_transpose(self, x, kernel, bias=None, activation=None, **geometry):
        """φ(K* x + b) of images, channels last."""
        return self.new(
            keras.layers.Conv2DTranspose,
            kernel.shape[-2],
            kernel.shape[:2],
            use_bias=bias is not None,
            activation=activation,
            data_format="channels_last",
            weights=[kernel] if bias is None else [kernel, bias],
            shape=x.shape,
            **geometry,
        )(x)

    def reshape(self, x, shape):
        return self.new(keras.layers.Reshape, tuple(-1 if n is None else n for n in shape))(x)

    def permute(self, x, order):
        return self.new(keras.layers.Permute, order)(x)

    def scale(self, x, factor):
        return x if factor == 1 else self.new(keras.layers.Rescaling, float(factor))(x)

    def pad(self, x, pads):
        """Zeros before and after the spatial axes of images or sequences."""
        if not any(n for pair in pads for n in pair):
            return x
        if len(pads) == 1:
            return self.new(keras.layers.ZeroPadding1D, pads[0])(x)
        return self.new(keras.layers.ZeroPadding2D, pads, data_format="channels_last")(x)

    def bias(self):
        """The bias that inference adds, float64, or None."""
        bias = self.layer.bias
        return None if bias is None else inference_value(bias, self.layer.compute_dtype)

    def activation(self):
        """The layer's own activation; a copy, where it is a layer itself."""
        held = self.layer.activation
        return type(held).from_config(held.get_config()) if isinstance(held, keras.Layer) else held

    def fused(self):
        """`(activation of a plain layer, function for what follows it)`."""
        held = self.layer.activation
        rule = activations.RULES.get(type(held))
        if rule is None:
            return self.activation(), lambda x: x
        return None, lambda x: rule(Plain(held, f"{self.name}_{held.name}", self.names), x)

    def on_last_axis(self, x, axis, function):
        """`function` of `x` with the axis moved to the end, and back."""
        rank = len(x.shape)
        axis %= rank
        if axis == rank - 1:
            return function(x)
        order = [i for i in range(1, rank) if i != axis] + [axis]
        back = [order.index(i) + 1 for i in range(1, rank)]
        return self.permute(function(self.permute(x, order)), back)
