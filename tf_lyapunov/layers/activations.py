"""Activations of gain one that keep the norm of what they pass: sorting, reflections, ±ReLU."""

import math

import keras
from keras import ops

from tf_lyapunov.layers.axes import (
    Interval,
    at_least_float32,
    divided,
    feature_axis,
    known_size,
    whole_axis,
)
from tf_lyapunov.layers.keras_order import formerly
from tf_lyapunov.spectral.arguments import count, finite

_register = keras.saving.register_keras_serializable(package="tf_lyapunov")


class _AlongAxis(keras.layers.Layer):
    """A layer that acts along one axis of known size."""

    def __init__(self, axis=-1, **kwargs):
        super().__init__(**kwargs)
        self.axis = whole_axis(axis)

    def _axis_and_size(self, shape):
        axis = feature_axis(self.axis, shape, self.name)
        return axis, known_size(shape, axis, self.name)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "axis": self.axis}


@_register
class MaxMin(_AlongAxis):
    """Sorts pairs of channels, channel i with channel i + C/2: the larger first.

        y_i = max(x_i, x_{i+C/2}),   y_{i+C/2} = min(x_i, x_{i+C/2})

    It permutes entries, so its gain is exactly 1 and it keeps every norm.

    Args:
        axis: the channel axis, of even size C.

    Raises:
        ValueError: if C is odd or unknown, or `axis` is the batch axis.

    Example:

    >>> import numpy as np
    >>> np.asarray(MaxMin()(np.array([[1.0, 5.0, 3.0, 2.0]]))).tolist()
    [[3.0, 5.0, 1.0, 2.0]]

    Reference: Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation" (ICML 2019);
    pairing of channels as in Singla and Feizi (2021).
    """

    def build(self, input_shape):
        divided(self._axis_and_size(input_shape)[1], 2, "The number of channels", self.name)
        super().build(input_shape)

    def call(self, x):
        a, b = ops.split(x, 2, axis=self.axis)
        return ops.concatenate([ops.maximum(a, b), ops.minimum(a, b)], axis=self.axis)


@_register
class GroupSort(_AlongAxis):
    """Sorts groups of k neighbouring channels in ascending order.

    It permutes entries, so its gain is exactly 1 and it keeps every norm.

    Args:
        group_size: k, a positive integer that divides the number of channels.
        axis: the channel axis.

    Raises:
        ValueError: if k does not divide the number of channels, or `axis` is the batch axis.

    Example:

    >>> import numpy as np
    >>> np.asarray(GroupSort(2)(np.array([[3.0, 1.0, 2.0, 4.0]]))).tolist()
    [[1.0, 3.0, 2.0, 4.0]]

    Reference: Anil, Lucas and Grosse (ICML 2019).
    """

    def __init__(self, group_size=2, axis=-1, **kwargs):
        super().__init__(axis, **kwargs)
        self.group_size = count("group_size", group_size)

    def build(self, input_shape):
        size = self._axis_and_size(input_shape)[1]
        divided(size, self.group_size, "The number of channels", self.name)
        super().build(input_shape)

    def call(self, x):
        axis, size = self._axis_and_size(x.shape)
        return self._sorted_groups(x, axis, size, self.group_size)

    def _sorted_groups(self, x, axis, size, k):
        shape = ops.shape(x)
        groups = ops.reshape(x, (*shape[:axis], size // k, k, *shape[axis + 1 :]))
        if k == 2:
            ends = ops.min(groups, axis + 1), ops.max(groups, axis + 1)
            groups = ops.stack(ends, axis + 1)
        else:
            groups = ops.sort(groups, axis=axis + 1)
        return ops.reshape(groups, shape)

    def get_config(self):
        return {**super().get_config(), "group_size": self.group_size}


@_register
class FullSort(_AlongAxis):
    """Sorts all channels in ascending order; its gain is exactly 1 and it keeps every norm.

    Args:
        axis: the channel axis.

    Raises:
        ValueError: if `axis` is the batch axis.

    Example:

    >>> import numpy as np
    >>> np.asarray(FullSort()(np.array([[3.0, 1.0, 2.0]]))).tolist()
    [[1.0, 2.0, 3.0]]

    Reference: Anil, Lucas and Grosse (ICML 2019).
    """

    def build(self, input_shape):
        feature_axis(self.axis, input_shape, self.name)
        super().build(input_shape)

    def call(self, x):
        return ops.sort(x, axis=self.axis)


@_register
class Householder(_AlongAxis):
    """Reflects pairs of channels that lie on one side of a learned line (HH1).

    With z = (x_i, x_{i+C/2}) and the unit normal v = (sin(θ_i/2), -cos(θ_i/2)),

        y = z - 2v·max(vᵀz, 0),

    the identity on one side and the reflection I - 2vvᵀ on the other: continuous, of gain exactly
    1, norm preserving. θ = π/2, the initial value, swaps the pair into ascending order.

    Args:
        axis: the channel axis, of even size C.
        theta_initializer: initial θ, `None` for π/2; the gain is 1 for every θ.

    Raises:
        ValueError: if C is odd or unknown, or `axis` is the batch axis.

    Example:

    >>> import keras, numpy as np
    >>> np.round(keras.ops.convert_to_numpy(Householder()(np.array([[3.0, 1.0]]))), 5).tolist()
    [[1.0, 3.0]]

    Reference: Singla, Singla and Feizi, "Improved deterministic l2 robustness on CIFAR-10 and
    CIFAR-100" (ICLR 2022), as published, in continuous form.
    """

    def __init__(self, axis=-1, *, theta_initializer=None, **kwargs):
        super().__init__(axis, **kwargs)
        if theta_initializer is None:
            theta_initializer = keras.initializers.Constant(math.pi / 2)
        self.theta_initializer = keras.initializers.get(theta_initializer)

    def build(self, input_shape):
        axis, size = self._axis_and_size(input_shape)
        half = divided(size, 2, "The number of channels", self.name)
        self._broadcast = [half if i == axis else 1 for i in range(len(input_shape))]
        self.angle = self.add_weight(
            name="angle",
            shape=(half,),
            initializer=self.theta_initializer,
            autocast=False,
        )
        super().build(input_shape)

    def call(self, x):
        # A normal rounded to 16 bits is not of length 1.
        angle = at_least_float32(ops.convert_to_tensor(self.angle))
        half_angle = ops.reshape(angle, self._broadcast) / 2
        s, c = ops.sin(half_angle), ops.cos(half_angle)
        a, b = ops.split(ops.cast(x, angle.dtype), 2, axis=self.axis)
        excess = 2 * ops.relu(s * a - c * b)
        pair = ops.concatenate([a - s * excess, b + c * excess], axis=self.axis)
        return ops.cast(pair, self.compute_dtype)

    def get_config(self):
        written = keras.initializers.serialize(self.theta_initializer)
        return {**super().get_config(), "theta_initializer": written}


@_register
class LipschitzPReLU(keras.layers.Layer):
    """Leaky ReLU with learned slopes that never leave [-1, 1].

        y = max(x, 0) + a·min(x, 0),   a = the stored slope clipped to [-1, 1]

    Args:
        initial_slope: float in [-1, 1].
        shared_axes: axes along which slopes are shared, such as `(1, 2)` for images.

    Raises:
        ValueError: if the initial slope is out of range or a size without a shared slope unknown.

    Example:

    >>> import keras, numpy as np
    >>> keras.ops.convert_to_numpy(LipschitzPReLU(0.5)(np.array([[-2.0, 2.0]]))).tolist()
    [[-1.0, 2.0]]

    Reference: He et al. (2015), with the range of slopes that keeps the gain at 1.
    """

    @formerly("initial_slope", "shared_axes", kept=1)
    def __init__(self, initial_slope=0.25, *, shared_axes=None, **kwargs):
        super().__init__(**kwargs)
        self.initial_slope = finite("initial_slope", initial_slope)
        if abs(self.initial_slope) > 1:
            raise ValueError(
                f"`initial_slope` must lie in [-1, 1]. Received: initial_slope={initial_slope}."
            )
        axes = () if shared_axes is None else shared_axes
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        self.shared_axes = tuple(whole_axis(a) for a in axes)
        self.supports_masking = True

    def build(self, input_shape):
        shared = [feature_axis(a, input_shape, self.name) for a in self.shared_axes]
        shape = tuple(
            1 if axis in shared else known_size(input_shape, axis, self.name)
            for axis in range(1, len(input_shape))
        )
        self.slope = self.add_weight(
            name="slope",
            shape=shape,
            initializer=keras.initializers.Constant(self.initial_slope),
            constraint=Interval(-1.0, 1.0),
        )
        super().build(input_shape)

    def call(self, x):
        # Clipped here as well: weights can be assigned, loaded and averaged past any constraint.
        return ops.relu(x) - ops.clip(self.slope, -1.0, 1.0) * ops.relu(-x)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        own = {"initial_slope": self.initial_slope, "shared_axes": list(self.shared_axes)}
        return {**super().get_config(), **own}


@_register
class TwoSidedReLU(_AlongAxis):
    """Both halves of the input, [max(x, 0), max(-x, 0)], side by side: twice the channels.

    ‖y‖ = ‖x‖, and the gain is exactly 1: values of equal sign keep their distance, and for
    values of unlike sign a² + b² ≤ (|a| + |b|)².

    Args:
        axis: the axis that doubles.

    Raises:
        ValueError: if `axis` is the batch axis.

    Example:

    >>> import numpy as np
    >>> np.asarray(TwoSidedReLU()(np.array([[-2.0, 3.0]]))).tolist()
    [[0.0, 3.0, 2.0, 0.0]]

    Reference: Qian and Wegman, "L2-nonexpansive neural networks" (ICLR 2019).
    """

    def build(self, input_shape):
        feature_axis(self.axis, input_shape, self.name)
        super().build(input_shape)

    def call(self, x):
        return ops.concatenate([ops.relu(x), ops.relu(-x)], axis=self.axis)

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        axis = feature_axis(self.axis, shape, self.name)
        shape[axis] = None if shape[axis] is None else 2 * shape[axis]
        return tuple(shape)
