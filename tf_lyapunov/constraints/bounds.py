"""Constraints that keep the gain of a layer's linear map below a number, at every step."""

import functools
import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.spectral import projections
from tf_lyapunov.spectral.arguments import (
    GAIN_RANGE,
    count,
    finite,
    from_known,
    positive,
    positive_or_none,
)
from tf_lyapunov.spectral.clipping import FAR, soft_clip
from tf_lyapunov.spectral.compilation import compiled
from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.geometry import Geometry, single_map
from tf_lyapunov.spectral.norms import kernel_norm_upper_bound, measured_map, norm_estimate
from tf_lyapunov.spectral.precision import work_dtype
from tf_lyapunov.theory.norms import norm_upper_bound, power_iteration
from tf_lyapunov.theory.operators import LinearMap

GUARANTEES = ("step", "monitor")
SHRINKS = ("clip", "scale")
# Power steps of the first warm-up, and of later ones, which start from the vector before.
WARM_UP_STEPS, WARM_STEPS = 30, 3


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class SpectralBound(keras.constraints.Constraint):
    """Keep the operator norm of a kernel's linear map at most `max_gain`.

    Convolutions are scaled, matrices that are not proved to be inside are clipped softly (ρ =
    max_gain, T_m a Chebyshev polynomial that is within ±1 for σ ≤ 0.89ρ and grows steeply beyond):

        W ← W·min(1, max_gain / bound(W)),   bound(W) ≥ ‖W‖                              (1)
        every singular value σ ← σ (1 - a - a·T_m(2.5(σ/ρ)² - 1)) ≤ ρ                    (2)

    Both are sufficient for ‖W‖ ≤ max_gain in exact arithmetic on the stored kernel, whatever the
    learning rate, and never enlarge a kernel. (2) leaves the smaller singular values alone, where
    (1) shrinks all of them whenever the largest grew, until the spectrum has decayed; what that
    costs in accuracy, `scripts/benchmark.py --only clipping` measures. (1) is within about 1% of
    necessary (known size) or 5% (known stride and groups, any size). Kernels inside are left as
    they are, bit for bit, up to about 0.97ρ in (2), and up to ρ in `project`.

    `guarantee="step"` (default) applies this after every step. `guarantee="monitor"` is the
    amortised mode: each step divides by a power-iteration *estimate*, which is never above the
    norm, so that between enforcements the norm may exceed `max_gain`, early in training by half and
    never by more than `growth_upper_bounds` of `tf_lyapunov.growth` proves of the optimizer;
    the guaranteed bound is enforced every `every` steps, before every evaluation and checkpoint,
    and at the end of training, by `LyapunovMonitor` alone. Without it nothing is guaranteed.

    A bare constraint on a convolution does not know its layer, and bounds over every size,
    stride, padding, dilation, group count and kind (Conv, DepthwiseConv, the parts of
    SeparableConv, ConvTranspose). What it is told, it uses: a wrong value breaks the guarantee.
    `for_layer` and `tf_lyapunov.constrain` read it from the layer. Not for `EinsumDense`,
    attention, recurrent or embedding kernels, whose maps are others: the constraint cannot see its
    layer, but `project`, `constrain` and `LyapunovMonitor` refuse such kernels where they are not
    multiplied as matrices. Keras applies no constraint to initial values: a layer (a transposed
    convolution most of all) starts above its bound until the first step or `project`.

    Args:
        max_gain: positive float, or `None` to leave the kernel unconstrained.
        input_shape: sizes of the layer's input, `(*spatial,)` or with channels, no batch axis.
        strides, padding, dilation, groups, kind, output_padding: as the layer's arguments. With an
            `input_shape` and no `kind`, a convolution or depthwise convolution is meant.
        data_format: `"channels_first"` if `input_shape` puts channels first.
        guarantee: `"step"` or `"monitor"`.
        every: steps between enforcements by the monitor in the amortised mode.
        power_steps: power steps of the estimate in the amortised mode.
        squarings: effort of the bound, 1 to 6; more is tighter and slower (`None`: 4 in training).

    Raises:
        ValueError: if an argument is out of range, or, when called, if the kernel has no operator
            norm (a bias), does not fit the arguments, or holds NaN (eagerly; compiled code
            returns NaN).

    Example:

    >>> import numpy as np, keras
    >>> layer = keras.layers.Dense(50, kernel_constraint=SpectralBound(0.9))
    >>> w = SpectralBound(0.9)(np.diag([3.0, 1.0]).astype("float32"))
    >>> bool(np.linalg.norm(keras.ops.convert_to_numpy(w), 2) <= 0.9)
    True
    >>> SpectralBound(0.9, input_shape=(28, 28), strides=1, padding="same").max_gain
    0.9

    Reference: sound form of the spectral bounds of Rahnama et al. (2020) and Aquino et al. (2022),
    which divide by a power-iteration estimate.
    """

    def __init__(
        self,
        max_gain,
        input_shape=None,
        strides=1,
        padding="any",
        dilation=1,
        groups=1,
        kind=None,
        output_padding=None,
        data_format=None,
        *,
        guarantee="step",
        every=100,
        power_steps=1,
        squarings=None,
        shrink="clip",
    ):
        self.max_gain = positive_or_none("max_gain", max_gain, GAIN_RANGE)
        self.geometry = Geometry(
            input_shape, strides, padding, dilation, groups, kind, output_padding, data_format
        )
        if guarantee not in GUARANTEES:
            raise ValueError(
                f"`guarantee` must be one of {GUARANTEES}. Received: guarantee={guarantee!r}."
            )
        if shrink not in SHRINKS:
            raise ValueError(f"`shrink` must be one of {SHRINKS}. Received: shrink={shrink!r}.")
        self.guarantee = guarantee
        self.shrink = shrink
        self.every = count("every", every)
        self.power_steps = count("power_steps", power_steps)
        self.squarings = None if squarings is None else count("squarings", squarings, 6)
        self._start = None

    @classmethod
    def for_layer(cls, layer, max_gain, **options):
        """Constraint that knows the geometry of a built layer.

        Raises:
            UnsupportedLayerError: if the layer has no kernel that is known, or two.
        """
        return cls.for_map(single_map(layer), max_gain, **options)

    @classmethod
    def for_map(cls, linear_map, max_gain, **options):
        """Constraint on the kernel of a `LinearMap` (see `spectral.reading.linear_maps`)."""
        return cls(max_gain, **Geometry.of(linear_map).__dict__, **options)

    def linear_map(self, kernel_shape):
        """`LinearMap` of a kernel of this shape, or `None` if nothing is known of it."""
        return self.geometry.linear_map(kernel_shape)

    def __call__(self, kernel):
        kernel = ops.convert_to_tensor(kernel)
        linear_map = self.linear_map(kernel.shape)
        if self.max_gain is None:
            return kernel
        if self.guarantee == "monitor":
            kernel = self._steer(kernel, linear_map)
        else:
            kernel = self._shrunk(kernel, linear_map, steer=True)
        return _refuse_nan(kernel)

    def project(self, kernel):
        """The kernel with (1) or (2) applied, in both modes, by the float64 bound of its map.

        (2) is for matrices within its reach, up to 1.22·`max_gain`; whatever is beyond is scaled.

        Args:
            kernel: tensor, variable or array in Keras' layout.

        Returns:
            Tensor of its shape and type; `kernel` itself, bit for bit, if already inside.

        Raises:
            ValueError: if the kernel holds NaN or infinity (eagerly; compiled code returns NaN).
        """
        kernel = ops.convert_to_tensor(kernel)
        sigma = self._norm(kernel)
        if sigma is None:
            return self._shrunk_at_once(kernel, steer=False)
        if sigma <= self.max_gain:
            return kernel
        clips = self.shrink == "clip" and len(kernel.shape) == 2
        if clips and sigma < math.sqrt(FAR.reach) * self.max_gain:
            return self._shrunk_at_once(kernel, steer=False)
        return projections.scaled_below(kernel, sigma, self.max_gain)

    def enforce(self, kernel):
        """The kernel as `guarantee="step"` leaves it: (1) or (2) by the bound of training.

        A third of the cost of `project`, and up to 3% below the bound.

        Args:
            kernel: tensor, variable or array in Keras' layout.

        Returns:
            Tensor of its shape and type.

        Raises:
            ValueError: if the kernel holds NaN or infinity (eagerly; compiled code returns NaN).
        """
        return self._shrunk_at_once(kernel, steer=True)

    def upper_bound(self, kernel):
        """Guaranteed upper bound on the norm of the kernel's map, as a scalar tensor."""
        kernel = ops.convert_to_tensor(kernel)
        linear_map = self.linear_map(kernel.shape)
        return kernel_norm_upper_bound(kernel, linear_map, squarings=self.squarings)

    def warm_up(self, kernel):
        """Store the kernel's top singular vector, from which later estimates start.

        For the amortised mode; called by `LyapunovMonitor` before training and at each
        enforcement, eagerly. It changes no guarantee, and is neither saved nor needed.

        Args:
            kernel: variable, tensor or array.
        """
        kernel = ops.stop_gradient(ops.convert_to_tensor(kernel))
        start = None if self._start is None else self._start.value
        steps = WARM_UP_STEPS if start is None else WARM_STEPS
        if len(kernel.shape) == 2:  # a few products: NumPy has less to set up
            matrix = ops.convert_to_numpy(ops.cast(kernel, work_dtype(kernel)))
            start = None if start is None else ops.convert_to_numpy(start)
            vector = power_iteration(matrix, steps, start)[1][None]
        else:
            linear_map = measured_map(kernel.shape, self.linear_map(kernel.shape))
            _, vector = norm_estimate(kernel, linear_map, iterations=steps, start=start)
        if self._start is None:
            self._start = keras.Variable(
                ops.convert_to_numpy(vector),
                trainable=False,
                dtype=work_dtype(kernel),
                name="start",
            )
        else:
            self._start.assign(vector)

    def _norm(self, kernel):
        """Bound on the norm in float64; None where values, or what is known, do not give one."""
        linear_map = self.linear_map(kernel.shape)
        if self.max_gain is None or (linear_map is None and len(kernel.shape) != 2):
            return None
        try:
            values = ops.convert_to_numpy(kernel).astype("float64")
        except (NotImplementedError, TypeError, ValueError, RuntimeError):
            return None  # traced: no values yet
        linear_map = linear_map or LinearMap("dense", (values.shape[0],))
        return norm_upper_bound(values, linear_map).value if np.all(np.isfinite(values)) else None

    def _shrunk_at_once(self, kernel, steer):
        kernel = ops.convert_to_tensor(kernel)
        if self.max_gain is None:
            return kernel
        shrunk = _one_graph(self.max_gain, self.geometry, self.squarings, self.shrink, steer)
        return _refuse_nan(shrunk(kernel))

    def _shrunk(self, kernel, linear_map, steer):
        """The kernel inside its bound: (1) or (2), or itself."""

        def scaled():
            return projections.project_to_norm_ball(
                kernel, self.max_gain, linear_map, steer=steer, squarings=self.squarings
            )

        if self.shrink == "scale" or len(kernel.shape) != 2:
            return scaled()
        if steer:
            return soft_clip(kernel, self.max_gain, scaled)
        sigma = kernel_norm_upper_bound(kernel, linear_map, squarings=self.squarings)
        return cond(
            sigma <= projections.rounded_down(self.max_gain, work_dtype(kernel)),
            lambda: kernel,
            lambda: soft_clip(kernel, self.max_gain, scaled),
        )

    def _steer(self, kernel, linear_map):
        start = None if self._start is None else self._start.value
        sigma, _ = norm_estimate(kernel, linear_map, iterations=self.power_steps, start=start)

        def scaled():  # NaN gives NaN
            return ops.cast(ops.cast(kernel, sigma.dtype) * (self.max_gain / sigma), kernel.dtype)

        # Most steps change nothing, and copying a large kernel costs as much as the estimate.
        return cond(sigma <= self.max_gain, lambda: kernel, scaled)

    def get_config(self):
        return {
            "max_gain": self.max_gain,
            **self.geometry.get_config(),
            "guarantee": self.guarantee,
            "every": self.every,
            "power_steps": self.power_steps,
            "squarings": self.squarings,
            "shrink": self.shrink,
        }

    @classmethod
    def from_config(cls, config):
        return from_known(cls, config, cls(1.0).get_config())


@functools.lru_cache(maxsize=512)
def _one_graph(max_gain, geometry, squarings, shrink, steer):
    """A compiled function that all constraints of these settings share.

    Eagerly, shrinking takes ten times as long, and tracing it takes a second.
    """
    constraint = SpectralBound(max_gain, squarings=squarings, shrink=shrink)
    constraint.geometry = geometry

    def shrunk(kernel):
        return constraint._shrunk(kernel, constraint.linear_map(kernel.shape), steer)

    return compiled(shrunk)


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class ConicBound(keras.constraints.Constraint):
    """Keep a square kernel within `radius`, in operator norm, of `center` times the identity.

        W ← cI + V·min(1, r / bound(V)),   V = W - cI,   bound(V) ≥ ‖V‖

    Sufficient for ‖W - cI‖ ≤ r in exact arithmetic on the stored kernel; a kernel whose bound is
    at most r stays as it is.

    Args:
        center: float c.
        radius: positive float r.
        squarings: effort of the bound, 1 to 6 (`None`: 4 in training).

    Raises:
        ValueError: if an argument is out of range, or, when called, if the kernel is not a square
            matrix or holds NaN (eagerly; compiled code returns NaN).

    Example:

    >>> import numpy as np, keras
    >>> w = keras.ops.convert_to_numpy(ConicBound(1.0, 0.25)(np.zeros((2, 2), "float32")))
    >>> bool(np.linalg.norm(w - np.eye(2), 2) <= 0.25)
    True

    Reference: conic layer rule (2.2) of this library, sound form.
    """

    def __init__(self, center, radius, *, squarings=None):
        self.center = finite("center", center)
        self.radius = positive("radius", radius, GAIN_RANGE)
        self.squarings = None if squarings is None else count("squarings", squarings, 6)

    def __call__(self, kernel):
        return self._project(kernel, steer=True)

    def project(self, kernel):
        """The kernel moved into the ball by the tighter of the bounds."""
        return self._project(kernel, steer=False)

    def _project(self, kernel, steer):
        kernel = ops.convert_to_tensor(kernel)
        return _refuse_nan(
            projections.project_to_conic_ball(
                kernel, self.center, self.radius, steer=steer, squarings=self.squarings
            )
        )

    def get_config(self):
        return {"center": self.center, "radius": self.radius, "squarings": self.squarings}

    @classmethod
    def from_config(cls, config):
        return from_known(cls, config, cls(0.0, 1.0).get_config())


@keras.saving.register_keras_serializable(package="tf_lyapunov")
class NormalizationBound(keras.constraints.Constraint):
    """Keep the inference gain of a batch normalization at most `max_gain`.

        γ_j ← sign(γ_j)·min(|γ_j|, max_gain·√(var_j + ε))

    The gain max_j |γ_j| / √(var_j + ε) depends on the moving variance, which changes without the
    optimizer. Called by the optimizer it therefore leaves γ as it is; `project` enforces it, and so
    does `LyapunovMonitor` before every evaluation, checkpoint and at the end of training.

    Args:
        max_gain: positive float.

    Raises:
        ValueError: if `max_gain` is out of range, or a moving variance is negative or not finite.

    Example:

    >>> import numpy as np
    >>> gamma = NormalizationBound(1.0).project(np.array([5.0, -0.5]), np.ones(2), 0.0)
    >>> bool(0.999 < gamma[0] <= 1.0), float(gamma[1])
    (True, -0.5)

    Reference: the sound batch normalization rule max_j |γ_j|/√(var_j + ε) (not Peck et al.'s
    max_j of its inverse).
    """

    def __init__(self, max_gain):
        self.max_gain = positive("max_gain", max_gain, GAIN_RANGE)

    def __call__(self, gamma):
        return ops.convert_to_tensor(gamma)

    def project(self, gamma, variance, epsilon):
        """γ with the bound applied for the moving variance given; entries inside are untouched."""
        gamma = np.asarray(ops.convert_to_numpy(gamma))
        variance = np.asarray(ops.convert_to_numpy(variance)).astype(np.float64)
        if not np.all(np.isfinite(variance)) or np.any(variance < 0):
            raise ValueError(
                "A moving variance must be finite and at least 0. Received: "
                f"{variance[~(variance >= 0)][:3]}. The model has diverged."
            )
        # The smaller of ε and its float32 value gives the larger gain.
        smallest = min(float(epsilon), float(np.float32(epsilon)))
        limit = self.max_gain * np.sqrt(variance + smallest) * (1 - 8 * np.finfo(float).eps)
        stored = limit.astype(gamma.dtype)
        stored = np.where(stored > limit, np.nextafter(stored, stored.dtype.type(0)), stored)
        return np.where(np.abs(gamma.astype(np.float64)) <= limit, gamma, np.sign(gamma) * stored)

    def get_config(self):
        return {"max_gain": self.max_gain}

    @classmethod
    def from_config(cls, config):
        return from_known(cls, config, cls(1.0).get_config())


def _refuse_nan(kernel):
    """Raise on NaN where values can be read; compiled code passes NaN on."""
    try:
        finite = bool(ops.convert_to_numpy(ops.all(ops.isfinite(kernel))))
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        return kernel  # traced: no values yet
    if not finite:
        raise ValueError(
            "A kernel must be finite. Received: NaN or infinity in a kernel of shape "
            f"{tuple(kernel.shape)}. Training has diverged: lower the learning rate."
        )
    return kernel
