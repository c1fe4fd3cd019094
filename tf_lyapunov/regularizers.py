"""Keras regularizers that pull the gain of a layer's linear map down, or the map to an isometry."""

import math

import keras
import numpy as np
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


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class OrthogonalityPenalty(keras.regularizers.Regularizer):
    """Penalise how far a kernel's linear map 𝒦 is from an isometry, or a projection on one.

        penalty = factor·‖G - I‖_F²/N,   G the smaller one of 𝒦𝒦ᵀ and 𝒦ᵀ𝒦                      (1)

    with N the number of output positions of a convolution on an image with periodic borders, large
    beside the kernel; N = 1 for a dense kernel. With B_z = Σ_t K_t K_{t+Sz}ᵀ the blocks of 𝒦𝒦ᵀ, S
    the stride in d dimensions, C the inputs and M the outputs,

        ‖𝒦𝒦ᵀ - I‖_F²/N = Σ_z ‖B_z - δ_z·I‖_F²,                                            (2)

    less M - S^d·C where that is positive: what the larger Gram matrix lacks of the identity
    whatever K is. All singular values lie within √(penalty·N/factor) of 1; a penalty pulls and
    guarantees nothing. `layers.CayleyConv2D` and its kin are orthogonal in every step.

    Args:
        factor: non-negative float.
        strides: int or tuple of ints, those of the layer; without dilation and groups.

    Raises:
        ValueError: if an argument is out of range, or the kernel is of no dense layer or
            convolution.

    Example:

    >>> import numpy as np
    >>> float(OrthogonalityPenalty(1.0)(np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]], "float32")))
    9.0
    >>> shift = np.zeros((3, 2, 2), "float32")
    >>> shift[2] = np.eye(2)  # y_t = x_{t+1}: a convolution that keeps every length
    >>> float(OrthogonalityPenalty(1.0)(shift))
    0.0

    Reference: Achour, Malgouyres and Mamalet, "Existence, stability and scalability of orthogonal
    convolutional neural networks" (JMLR 2022), theorem 5, where it is L_orth; both sides there.
    """

    def __init__(self, factor=1e-2, strides=1):
        self.factor = finite("factor", factor)
        if self.factor < 0:
            raise ValueError(f"`factor` must not be negative. Received: factor={factor}.")
        whole = isinstance(strides, int)
        self.strides = count("strides", strides) if whole else tuple(
            count("strides", s) for s in strides)  # fmt: skip

    def __call__(self, kernel):
        kernel = ops.convert_to_tensor(kernel)
        rank = len(kernel.shape) - 2
        strides = (self.strides,) * rank if isinstance(self.strides, int) else self.strides
        if not 0 <= rank <= 3 or (rank and len(strides) != rank):
            raise ValueError(
                "The kernel must be of a dense layer or a convolution, with a stride for every "
                f"axis. Received: a kernel of shape {tuple(kernel.shape)}, strides={self.strides}."
            )
        inputs, outputs = kernel.shape[-2:]
        images = ops.moveaxis(kernel, -1, 0)
        if rank == 0:
            blocks, middle = ops.matmul(images, kernel), ()
        else:
            # Positions at which a kernel and its copy overlap.
            middle = tuple((n - 1) // s for n, s in zip(kernel.shape[:-2], strides, strict=True))
            room = [(m * s, m * s) for m, s in zip(middle, strides, strict=True)]
            images = ops.pad(images, [(0, 0), *room, (0, 0)])
            blocks = ops.conv(
                images, kernel, strides=strides, padding="valid", data_format="channels_last"
            )
        target = np.zeros(tuple(blocks.shape), "float32")
        target[(slice(None), *middle, slice(None))] = np.eye(outputs)
        lost = ops.sum(ops.square(blocks - ops.cast(target, blocks.dtype)))
        excess = outputs - math.prod(strides[:rank]) * inputs
        # Rounding may leave an isometry less than what it lacks.
        return self.factor * (ops.relu(lost - excess) if excess > 0 else lost)

    def get_config(self):
        return {"factor": self.factor, "strides": self.strides}

    @classmethod
    def from_config(cls, config):
        return from_known(cls, config, cls().get_config())
