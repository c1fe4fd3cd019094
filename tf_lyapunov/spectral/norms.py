"""Operator norms of kernels: guaranteed upper bounds, and estimates that may only steer.

`kernel_norm_upper_bound` is the one door for constraints. It is stateless and branches on
shapes alone, so that it runs under any compiler and backend of Keras.
"""

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.spectral import operators
from tf_lyapunov.spectral.convolution import conv_bounds, conv_norm_upper_bound
from tf_lyapunov.spectral.gram import dense_bounds, dense_norm_upper_bound, gram_norm_upper_bound
from tf_lyapunov.spectral.precision import work_dtype
from tf_lyapunov.theory.operators import LinearMap

__all__ = [
    "conv_norm_upper_bound",
    "dense_norm_upper_bound",
    "gram_norm_upper_bound",
    "kernel_bounds",
    "kernel_norm_upper_bound",
    "norm_estimate",
    "spectral_norm",
    "start_vector",
]

# Image sides, in kernel lengths, on which kernels of unknown input size are estimated.
NOMINAL_SIDE = 4
UNROLLED_STEPS = 4


def kernel_norm_upper_bound(kernel, linear_map=None, *, near=None, squarings=None):
    """Upper bound on the operator norm of the linear map that a kernel stands for.

        ‖W‖ ≤ bound   in exact arithmetic, rounding of the computation included

    See `dense_norm_upper_bound` and `conv_norm_upper_bound`.

    Args:
        kernel: tensor or variable in Keras' layout: `(in, out)` or `(*spatial, a, b)`.
        linear_map: `LinearMap`, or `None` for a matrix, or a convolution kernel of any kind.
        near: guess of the norm that steers the tightness; the bound holds for every guess.
        squarings: squarings of the Chebyshev recursion; more is tighter and slower.

    Returns:
        Scalar tensor, float32 (float64 for float64 kernels); NaN if the kernel is not finite.

    Raises:
        ValueError: if the kernel has fewer than two axes or does not fit `linear_map`.

    Example:

    >>> import numpy as np
    >>> bound = float(kernel_norm_upper_bound(np.eye(3, dtype="float32")))
    >>> 1.0 <= bound < 1.005
    True
    """
    return kernel_bounds(kernel, linear_map, near=near, squarings=squarings)[0]


def kernel_bounds(kernel, linear_map=None, *, near=None, squarings=None):
    """Upper bounds `(‖W‖, √T·‖K‖_F)`, T the number of taps (1 for dense).

    The second times u bounds the norm of what rounding every entry of the kernel by u may add.
    """
    kernel = ops.convert_to_tensor(kernel)
    rank = len(kernel.shape)
    if rank < 2 or (linear_map is not None and (linear_map.kind == "dense") != (rank == 2)):
        raise ValueError(
            "A kernel must be a matrix, or a convolution kernel with two channel axes, and fit "
            f"its map. Received: shape={tuple(kernel.shape)}, linear_map={linear_map}."
        )
    if rank == 2:
        return dense_bounds(kernel, near=near, squarings=squarings)
    sigma, frobenius = conv_bounds(kernel, linear_map, near=near, squarings=squarings)
    return sigma, math.sqrt(math.prod(kernel.shape[:-2])) * frobenius


def norm_estimate(kernel, linear_map=None, *, iterations=10, start=None):
    """Estimate, never above the norm but for rounding, by power iteration on the true map.

        u ← W v / ‖W v‖,   v ← Wᵀu / ‖Wᵀu‖,   σ ≈ ‖Wᵀu‖ ≤ ‖W‖

    It steers; it proves nothing: from a bad start it may be far too low. Kernels of unknown
    input size are measured on an image four kernels wide. Not differentiable: see
    `spectral_norm`.

    Args:
        kernel: tensor in Keras' layout.
        linear_map: `LinearMap` or `None`.
        iterations: power steps, two applications of the map each.
        start: `(1, *input_shape)` vector of an earlier call, or `None` for a fixed one.

    Returns:
        `(sigma, vector)`: a scalar and the unit right vector to start the next call from.

    Example:

    >>> import numpy as np
    >>> sigma, vector = norm_estimate(np.diag([3.0, 1.0]).astype("float32"), iterations=20)
    >>> round(float(sigma), 3), tuple(vector.shape)
    (3.0, (1, 2))
    """
    kernel, linear_map = _measured(ops.stop_gradient(ops.convert_to_tensor(kernel)), linear_map)
    return _power_steps(kernel, linear_map, iterations, start)


def spectral_norm(kernel, linear_map=None, *, iterations=20, start=None):
    """Differentiable estimate ⟨u, W v⟩ of the norm, with u, v held fixed.

        ∂σ/∂W = u vᵀ,

    a subgradient wherever u, v are top singular vectors: also with repeated singular values, and
    0 at the zero kernel. For convolutions the gradient is that of the map in its kernel.

    Args:
        kernel: tensor in Keras' layout.
        linear_map: `LinearMap` or `None`.
        iterations: power steps from `start`.
        start: see `norm_estimate`.

    Returns:
        Scalar tensor, at most ‖W‖ up to rounding.

    Example:

    >>> import numpy as np
    >>> round(float(spectral_norm(np.diag([3.0, 1.0]).astype("float32"))), 3)
    3.0
    """
    kernel, linear_map = _measured(ops.convert_to_tensor(kernel), linear_map)
    _, vector = _power_steps(ops.stop_gradient(kernel), linear_map, iterations, start)
    image = operators.apply(ops.stop_gradient(vector), kernel, linear_map)
    return ops.sum(ops.stop_gradient(_unit(image)[0]) * image)


def start_vector(linear_map):
    """Fixed pseudo-random unit vector `(1, *input_shape)` in the map's input space (NumPy)."""
    vector = np.random.default_rng(0).standard_normal((1, *linear_map.input_shape))
    return vector / np.linalg.norm(vector)


def measured_map(kernel_shape, linear_map=None):
    """`linear_map` with an input size, a nominal one where it is unknown."""
    shape = tuple(int(n) for n in kernel_shape)
    if len(shape) == 2:
        return LinearMap("dense", (shape[0],))
    if linear_map is not None and linear_map.input_shape is not None:
        return linear_map
    linear_map = linear_map or LinearMap("conv")
    a, b = shape[-2:]
    channels = {"conv": a * linear_map.groups, "depthwise": a, "conv_transpose": b}[linear_map.kind]
    sizes = tuple(NOMINAL_SIDE * k for k in shape[:-2])
    return LinearMap(
        linear_map.kind,
        (*sizes, channels),
        strides=linear_map.strides or 1,
        padding="same",
        groups=linear_map.groups,
    )


def _measured(kernel, linear_map):
    kernel = ops.cast(kernel, work_dtype(kernel))
    return kernel, measured_map(kernel.shape, linear_map)


def _unit(x):
    """`(x/‖x‖, ‖x‖)` without over- or underflow of the squares; `(0, 0)` at zero."""
    largest = ops.max(ops.abs(x))
    largest = ops.where(largest > 0, largest, ops.ones_like(largest))
    x = x / largest
    norm = ops.sqrt(ops.sum(ops.square(x)))
    return x / ops.maximum(norm, 0.5), largest * norm


def _power_steps(kernel, linear_map, iterations, start):
    """`(σ, v)` after power steps v ← Wᵀu/‖Wᵀu‖, u = Wv/‖Wv‖, with σ = ‖Wᵀu‖ ≤ ‖W‖."""
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    if start is None:
        start = start_vector(linear_map).astype(dtype)

    def step(_, state):
        image, _ = _unit(operators.apply(state[1], kernel, linear_map))
        back, sigma = _unit(operators.adjoint(image, kernel, linear_map))
        # A vector that the map sends to zero is kept.
        return sigma, ops.where(sigma > 0, back, state[1])

    vector = ops.stop_gradient(ops.cast(start, dtype))
    state = (ops.zeros((), dtype), vector)
    if iterations <= UNROLLED_STEPS:
        for i in range(iterations):
            state = step(i, state)
    else:
        state = ops.fori_loop(0, iterations, step, state)
    return ops.stop_gradient(state[0]), ops.stop_gradient(state[1])
