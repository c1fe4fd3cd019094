"""Keras regularizers that pull the gain of a layer's linear map down."""

import keras
from keras import ops

from tf_lyapunov.spectral.arguments import (
    GAIN_RANGE,
    count,
    finite,
    from_known,
    positive,
    positive_or_none,
)
from tf_lyapunov.spectral.geometry import Geometry, single_map
from tf_lyapunov.spectral.norms import spectral_norm
from tf_lyapunov.spectral.row_sums import row_sum_bound


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SpectralPenalty(keras.regularizers.Regularizer):
    """Penalise the operator norm σ of a kernel's linear map.

        penalty = factor·max(0, σ(W) - max_gain)^power,   or  factor·σ(W)^power          (1)

    without `max_gain`. Differentiable through σ with ∂σ/∂W = uvᵀ, u and v the top singular
    vectors: a subgradient at repeated singular values, 0 at the zero kernel. σ is an estimate
    from below (power iteration on the true map): it pulls, it guarantees nothing. For a
    guarantee add `constraints.SpectralBound`.

    Args:
        max_gain: positive float below which nothing is penalised, or `None`.
        factor: non-negative float.
        power: exponent, at least 1.
        input_shape, strides, padding, dilation, groups, kind, output_padding, data_format: the
            layer's geometry, see `SpectralBound`. Convolutions of unknown size are measured on an
            image four kernels wide.
        iterations: power steps per call.

    Raises:
        ValueError: if an argument is out of range or the kernel has no operator norm (a bias).

    Example:

    >>> import numpy as np
    >>> penalty = SpectralPenalty(max_gain=2.0, factor=0.5)
    >>> round(float(penalty(np.diag([3.0, 1.0]).astype("float32"))), 3)
    0.5

    Reference: Yoshida and Miyato (2017), with the gradient and convolutions made exact.
    """

    def __init__(
        self,
        max_gain=None,
        factor=0.01,
        power=2.0,
        *,
        input_shape=None,
        strides=1,
        padding="same",
        dilation=1,
        groups=1,
        kind=None,
        output_padding=None,
        data_format=None,
        iterations=15,
    ):
        self.max_gain = positive_or_none("max_gain", max_gain, GAIN_RANGE)
        self.factor = finite("factor", factor)
        self.power = finite("power", power)
        if self.factor < 0:
            raise ValueError(f"`factor` must not be negative. Received: factor={factor}.")
        if self.power < 1:
            raise ValueError(
                f"`power` must be at least 1: below, the gradient is unbounded at 0. "
                f"Received: power={power}."
            )
        self.geometry = Geometry(
            input_shape, strides, padding, dilation, groups, kind, output_padding, data_format
        )
        self.iterations = count("iterations", iterations)

    @classmethod
    def for_layer(cls, layer, max_gain=None, **options):
        """Regularizer that knows the geometry of a built layer with one kernel."""
        return cls.for_map(single_map(layer), max_gain, **options)

    @classmethod
    def for_map(cls, linear_map, max_gain=None, **options):
        """Regularizer on the kernel of a `LinearMap`."""
        return cls(max_gain, **Geometry.of(linear_map).__dict__, **options)

    def __call__(self, kernel):
        kernel = ops.convert_to_tensor(kernel)
        linear_map = self.geometry.linear_map(kernel.shape)
        sigma = spectral_norm(kernel, linear_map, iterations=self.iterations)
        excess = sigma if self.max_gain is None else ops.relu(sigma - self.max_gain)
        if self.power == 1:
            return self.factor * excess
        if self.power == 2:
            return self.factor * ops.square(excess)
        # The power's derivative at 0 is 0 for exponents above 1, but compilers may differ.
        positive = ops.where(excess > 0, excess, ops.ones_like(excess))
        powered = ops.where(excess > 0, positive**self.power, ops.zeros_like(excess))
        return self.factor * powered

    def get_config(self):
        return {
            "max_gain": self.max_gain,
            "factor": self.factor,
            "power": self.power,
            **self.geometry.get_config(),
            "iterations": self.iterations,
        }

    @classmethod
    def from_config(cls, config):
        return from_known(cls, config, cls().get_config())


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class RowSumPenalty(keras.regularizers.Regularizer):
    """Penalise the row-sum bound of a kernel beyond a gain.

        penalty = factor · max(0, b(W) - max_gain²)                                        (1)

    with b of `row_sum_bound`: where it vanishes, the gain of the map is at most `max_gain`. A
    penalty pulls and guarantees nothing; for a guarantee, and a tighter one, add
    `constraints.SpectralBound`.

    Args:
        factor: non-negative float.
        max_gain: positive float.
        groups: groups of a grouped convolution.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> float(RowSumPenalty(0.5)(np.diag([2.0, 1.0]).astype("float32")))
    1.5

    Reference: Qian and Wegman (ICLR 2019), section 2.1.
    """

    def __init__(self, factor=1e-2, max_gain=1.0, groups=1):
        self.factor = finite("factor", factor)
        if self.factor < 0:
            raise ValueError(f"`factor` must not be negative. Received: factor={factor}.")
        self.max_gain = positive("max_gain", max_gain, GAIN_RANGE)
        self.groups = count("groups", groups)

    def __call__(self, kernel):
        return self.factor * ops.relu(row_sum_bound(kernel, self.groups) - self.max_gain**2)

    def get_config(self):
        return {"factor": self.factor, "max_gain": self.max_gain, "groups": self.groups}

    @classmethod
    def from_config(cls, config):
        return from_known(cls, config, cls().get_config())
