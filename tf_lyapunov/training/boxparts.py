"""What single steps of a model do to boxes, and to coefficients on the way back (see `boxflow`).

Every part has `inputs`, positions of what it reads, and

- `value(values)`: of clean tensors;
- `signal(signals, value)`: the `Box` (or `RoundBall`) behind it, from those of its inputs and, for
  batch normalizations, the clean tensor;
- `back(c, signals)`, where it has lines: for coefficients c (n, rows, *shape) of its output a list
  of those of its inputs, and a constant (n, rows); or None, where this part has none.
"""

from __future__ import annotations

import numpy as np
from keras import ops

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.program.weights import kernel_maps
from tf_lyapunov.spectral import operators
from tf_lyapunov.training.boxes import Box, RoundBall, as_box, root


class Affine:
    """The linear maps and the bias of a dense or convolution layer.

    Args:
        call: `graph.Call` of the layer.
        inputs: positions in the flow.
    """

    def __init__(self, call, inputs):
        self.layer, self.inputs = call.operation, inputs
        maps = kernel_maps(self.layer, call.inputs[0].shape)
        self.maps = [linear_map for _, linear_map in maps]
        if any(m.kind != "dense" and m.input_shape is None for m in self.maps):
            raise UnsupportedLayerError(
                "Bounds of a convolution need the size of its input. Received: layer "
                f"{self.layer.name!r} with open sizes. Give the model an `Input` of known shape."
            )
        self.first = getattr(self.layer, "data_format", "") == "channels_first"
        self.shape = tuple(call.inputs[0].shape[1:])
        self.is_dense = all(m.kind == "dense" for m in self.maps)

    def kernels(self, dtype):
        """Tensors of the maps' kernels, computed from the layer's variables."""
        if hasattr(self.layer, "effective"):
            found = [self.layer.effective(training=True)[0]]
        elif len(self.maps) == 2:
            found = [self.layer.depthwise_kernel, self.layer.pointwise_kernel]
        else:
            found = [self.layer.kernel]
        return [ops.cast(k, dtype) for k in found]

    def value(self, values):
        (x,) = values
        x = self._last(x)
        for kernel, linear_map in zip(self.kernels(x.dtype), self.maps, strict=True):
            x = operators.apply(x, kernel, linear_map)
        return self._back(self._biased(x))

    def signal(self, signals, value=None):
        (signal,) = signals
        if isinstance(signal, RoundBall):
            middle, radius = self._last(signal.center), None
        else:
            middle, radius = self._last(signal.middle), self._last(signal.radius)
        for kernel, linear_map in zip(self.kernels(middle.dtype), self.maps, strict=True):
            if radius is None:
                ones = ops.ones((1, *middle.shape[1:]), dtype=middle.dtype)
                squares = operators.apply(ones, ops.square(kernel), linear_map)
                radius = signal.size * root(squares)
            else:
                radius = operators.apply(radius, ops.abs(kernel), linear_map)
            middle = operators.apply(middle, kernel, linear_map)
        middle = self._biased(middle)
        return Box(self._back(middle - radius), self._back(middle + radius))

    def back(self, c, signals):
        """Coefficients of the input for those of the output, and the constant (n, rows)."""
        rows, constant = c.shape[1], 0.0
        bias = getattr(self.layer, "bias", None)
        if bias is not None:
            shape = (-1, *[1] * (len(c.shape) - 3)) if self.first else (-1,)
            bias = ops.reshape(ops.cast(bias, c.dtype), shape)
            constant = ops.sum(c * bias, axis=tuple(range(2, len(c.shape))))
        c = self._last(ops.reshape(c, (-1, *c.shape[2:])))
        for kernel, linear_map in list(zip(self.kernels(c.dtype), self.maps, strict=True))[::-1]:
            c = operators.adjoint(c, kernel, linear_map)
        return [ops.reshape(self._back(c), (-1, rows, *self.shape))], constant

    def _biased(self, x):
        bias = getattr(self.layer, "bias", None)
        return x if bias is None else x + ops.cast(bias, x.dtype)

    def _last(self, x):
        return ops.moveaxis(x, 1, -1) if self.first else x

    def _back(self, x):
        return ops.moveaxis(x, -1, 1) if self.first else x


class Ends:
    """A function whose extremes over a box are at its ends, or at a point inside.

    Args:
        function: of one tensor or several.
        inputs: positions in the flow.
        falling: bool per input: whether the function falls in it.
        mixed: whether entries may grow or fall, each in one entry of the input.
        valley: where it turns, or None.
        name: of an elementwise activation, or None.
        slope: of its negative part, where it is a ReLU, or None.
    """

    def __init__(self, function, inputs, falling=None, mixed=False, valley=None, name=None,
                 slope=None):  # fmt: skip
        self.function, self.inputs = function, inputs
        self.falling = falling or (False,) * len(inputs)
        self.mixed, self.valley = mixed, valley
        self.name, self.slope = name, slope

    def value(self, values):
        return self.function(*values)

    def signal(self, signals, value=None):
        boxes = [as_box(s) for s in signals]
        pairs = list(zip(boxes, self.falling, strict=True))
        low = self.function(*[b.high if falls else b.low for b, falls in pairs])
        high = self.function(*[b.low if falls else b.high for b, falls in pairs])
        if self.mixed or self.valley is not None:
            low, high = ops.minimum(low, high), ops.maximum(low, high)
        if self.valley is not None:
            (box,) = boxes
            inside = ops.minimum(
                ops.maximum(ops.full_like(box.low, self.valley), box.low), box.high
            )
            low = ops.minimum(low, self.function(inside))
        return Box(low, high)

    def back(self, c, signals):
        """The lines of CROWN of a (leaky) ReLU; None for other functions."""
        if self.slope is None:
            return None
        box, s = as_box(signals[0]), self.slope
        low, high = box.low, box.high
        crosses = (low < 0) & (high > 0)
        width = ops.where(crosses, high - low, ops.ones_like(low))
        ones = ops.ones_like(low)
        side = ops.where(high > 0, ones, s * ones)
        above = ops.where(crosses, (high - s * low) / width, side)
        # Of the two lines through the kink the one that leaves the smaller area.
        below = ops.where(crosses, ops.where(high > -low, ones, s * ones), side)
        shift = ops.where(crosses, high * (1 - above), ops.zeros_like(low))
        above, below, shift = (ops.expand_dims(v, 1) for v in (above, below, shift))
        grows, falls = ops.relu(c), ops.relu(-c)
        constant = ops.sum(-falls * shift, axis=tuple(range(2, len(c.shape))))
        return [grows * below - falls * above], constant


class Reshaped(Ends):
    """Entries in another shape, in the same order; an l2 ball stays one."""

    def __init__(self, function, inputs, shape):
        super().__init__(function, inputs)
        self.shape = tuple(shape)

    def signal(self, signals, value=None):
        (signal,) = signals
        if isinstance(signal, RoundBall):
            limits = signal.limits
            if limits is None or all(np.ndim(v) == 0 for v in limits):
                return RoundBall(self.function(signal.center), signal.size, limits)
        return super().signal(signals)

    def back(self, c, signals):
        return [ops.reshape(c, (-1, c.shape[1], *self.shape))], 0.0


class Summed(Ends):
    """Σ w_k x_k of tensors of one shape."""

    def __init__(self, function, inputs, weights):
        super().__init__(function, inputs, tuple(w < 0 for w in weights))
        self.weights = weights

    def back(self, c, signals):
        return [w * c for w in self.weights], 0.0


class Normalization:
    """Batch normalization, by stored statistics or those of the clean batch.

    Args:
        call: `graph.Call` of the layer.
        inputs: positions in the flow.
    """

    def __init__(self, call, inputs):
        self.layer, self.inputs = call.operation, inputs
        self.rank = len(call.inputs[0].shape)
        self.axis = self.layer.axis % self.rank

    def lines(self, value, dtype):
        """Scale and shift per entry; `value` is the clean batch, None for stored statistics."""
        axes = [a for a in range(self.rank) if a != self.axis]
        shape = [1] * self.rank
        shape[self.axis] = -1
        layer = self.layer
        if value is not None and layer.trainable:
            mean, variance = ops.moments(ops.cast(value, dtype), axes=axes)
        else:
            mean, variance = layer.moving_mean, layer.moving_variance
        scale = ops.rsqrt(ops.cast(variance, dtype) + layer.epsilon)
        if layer.scale:
            scale = scale * ops.cast(layer.gamma, dtype)
        shift = -ops.cast(mean, dtype) * scale
        if layer.center:
            shift = shift + ops.cast(layer.beta, dtype)
        return ops.reshape(scale, shape), ops.reshape(shift, shape)

    def value(self, values):
        scale, shift = self.lines(values[0], values[0].dtype)
        return values[0] * scale + shift

    def signal(self, signals, value=None):
        box = as_box(signals[0])
        scale, shift = self.lines(value, box.low.dtype)
        middle, radius = box.middle * scale + shift, box.radius * ops.abs(scale)
        return Box(middle - radius, middle + radius)


class Sizes(Ends):
    """A function that grows in the absolute value of every entry, such as a norm."""

    def signal(self, signals, value=None):
        box = as_box(signals[0])
        least = ops.relu(box.low) + ops.relu(-box.high)
        most = ops.maximum(ops.abs(box.low), ops.abs(box.high))
        return Box(self.function(least), self.function(most))
