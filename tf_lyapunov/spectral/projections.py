"""Radial projections of kernels into norm balls, guaranteed after rounding of the result."""

import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.spectral.conditions import cond
from tf_lyapunov.spectral.gram import dense_bounds
from tf_lyapunov.spectral.norms import kernel_bounds
from tf_lyapunov.spectral.precision import unit_roundoff, work_dtype

# A kernel that is scaled ends this many roundings below the bound, so that scaling it again
# finds it inside and leaves it as it is, whatever the rounding of the second bound.
RETREAT = 256
# What storing a number below the normal ones may take from it: all of it, but for float16, which
# NumPy rounds to the nearest.
ABSOLUTE = {
    "float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25
}  # fmt: skip


def project_to_norm_ball(kernel, max_gain, linear_map=None, *, steer=True, squarings=None):
    """Scale a kernel so that its operator norm is at most `max_gain`, or leave it as it is.

        W ← W                         if bound(W) ≤ max_gain (bit for bit)
        W ← W·max_gain / bound(W)     otherwise

    with `bound` from `kernel_norm_upper_bound`. Sufficient: the result, as stored, has a norm of
    at most `max_gain` in exact arithmetic. Not the Euclidean projection: that clips singular
    values, at the price of an SVD.

    Args:
        kernel: tensor or variable in Keras' layout, any floating-point type.
        max_gain: positive float.
        linear_map: `LinearMap`, or `None`, see `kernel_norm_upper_bound`.
        steer: use `max_gain` as the guess of the norm: right while training keeps the kernel
            there, and cheaper. Otherwise the bound does not depend on `max_gain` and is tighter.
        squarings: squarings of the bound.

    Returns:
        Tensor of the kernel's shape and type. NaN everywhere if an entry is NaN or infinite.

    Example:

    >>> import numpy as np
    >>> w = project_to_norm_ball(np.diag([3.0, 1.0]).astype("float32"), 1.5)
    >>> 1.49 < float(np.linalg.norm(np.asarray(w), 2)) <= 1.5
    True
    """
    kernel = ops.convert_to_tensor(kernel)
    near = max_gain if steer else None
    sigma, entries = kernel_bounds(kernel, linear_map, near=near, squarings=squarings)
    return shrink(kernel, sigma, entries, max_gain)


def rounded_down(value, dtype):
    """`value` as a float that `dtype` holds, not above it: comparisons happen in `dtype`."""
    kind = {"float64": np.float64}.get(dtype, np.float32)
    rounded = kind(value)
    if float(rounded) > float(value):
        rounded = np.nextafter(rounded, kind(0))
    return float(rounded)


def shrink(kernel, sigma, entries, max_gain):
    """`kernel` if `sigma <= max_gain`, else scaled by `max_gain / sigma`, rounded down.

    Args:
        kernel: tensor.
        sigma: upper bound on its norm.
        entries: √T·‖K‖_F: rounding each entry of the product by u adds at most u times this.
        max_gain: positive float.
    """
    dtype = work_dtype(kernel)
    u, stored = unit_roundoff(dtype), unit_roundoff(kernel.dtype)
    goal = max_gain * (1 - RETREAT * u)
    scale = goal / (sigma + 2 * (u + stored) * entries)
    return cond(
        sigma <= rounded_down(max_gain, dtype),
        lambda: kernel,
        lambda: ops.cast(ops.cast(kernel, dtype) * scale, kernel.dtype),
    )


def scaled_below(kernel, sigma, max_gain):
    """A kernel scaled in float64 to a norm of at most `max_gain`, eagerly.

        W ← fl(s·W),   s·σ + e(s) ≤ max_gain,   e = u√T·‖sW‖_F + t·√(T·entries)

    e bounds the norm of what storing the result rounds: every entry by u relatively, or by t, see
    `ABSOLUTE`, where it is below the normal numbers; T is the number of taps.

    Args:
        kernel: tensor with values, in Keras' layout.
        sigma: float, bound on the norm of its map, above `max_gain`.
        max_gain: positive float.

    Returns:
        Tensor of the kernel's shape and type.

    Example:

    >>> import numpy as np
    >>> w = scaled_below(np.diag([3.0, 1.0]).astype("float32"), 3.0, 1.5)
    >>> 1.4999 < float(np.linalg.norm(np.asarray(w), 2)) <= 1.5
    True
    """
    kernel = ops.convert_to_tensor(kernel)
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    values = ops.convert_to_numpy(kernel).astype(np.float64)
    taps = math.prod(values.shape[:-2])
    # In units of a power of two near the largest entry, whose squares do not overflow.
    power = math.frexp(float(np.max(np.abs(values), initial=0.0)))[1]
    values, sigma = np.ldexp(values, -power), math.ldexp(sigma, -power)
    entries = math.sqrt(taps) * float(np.linalg.norm(values))
    rounding = unit_roundoff(dtype) + (2.0**-24 if dtype == "bfloat16" else 0.0)  # as float32 first
    goal = max_gain * (1 - 2.0**-30) - ABSOLUTE[dtype] * math.sqrt(taps * values.size)
    values *= max(goal, 0.0) / (sigma + 2 * rounding * entries)
    if dtype != "bfloat16":
        return ops.convert_to_tensor(values.astype(dtype))
    return ops.cast(ops.convert_to_tensor(values.astype(np.float32)), dtype)


def project_to_conic_ball(kernel, center, radius, *, steer=True, squarings=None):
    """Move a square kernel towards `center`·I until it is within `radius` of it in norm.

        W ← cI + V·min(1, r / bound(V)),   V = W - cI

    Sufficient: the result, as stored, has ‖W - cI‖ ≤ r in exact arithmetic; it is `kernel`, bit
    for bit, where that was already so.

    Args:
        kernel: `(n, n)` tensor or variable.
        center: float c.
        radius: positive float r.
        steer, squarings: see `project_to_norm_ball`.

    Returns:
        Tensor `(n, n)` of the kernel's type.

    Raises:
        ValueError: if the kernel is not square, or r is not above the rounding of c.

    Example:

    >>> import numpy as np
    >>> w = project_to_conic_ball(np.zeros((2, 2), "float32"), 1.0, 0.25)
    >>> 0.75 <= float(np.min(np.diag(np.asarray(w)))) < 0.751
    True

    Reference: rule (2.2) of this library's design module; sound form.
    """
    kernel = ops.convert_to_tensor(kernel)
    shape = tuple(kernel.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"A conic bound needs a square dense kernel. Received: shape={shape}.")
    dtype = work_dtype(kernel)
    u, stored = unit_roundoff(dtype), unit_roundoff(kernel.dtype)
    # Every rounding on the diagonal (of c, V, cI + V·s and its cast) is at most this in norm.
    diagonal = 4 * (u + stored) * (abs(center) + radius)
    if diagonal >= 0.5 * radius:
        raise ValueError(
            f"`radius` must be well above the rounding of `center` in {kernel.dtype}. "
            f"Received: center={center}, radius={radius}."
        )
    identity = ops.eye(shape[0], dtype=dtype)
    offset = ops.cast(kernel, dtype) - center * identity
    sigma, entries = dense_bounds(offset, near=radius if steer else None, squarings=squarings)
    # Forming V rounds its diagonal by u(|c| + |V|).
    sigma = sigma * (1 + 2 * u) + 2 * u * abs(center)
    goal = radius * (1 - RETREAT * u) - diagonal
    scale = goal / (sigma + 2 * (u + stored) * entries)
    return cond(
        sigma <= rounded_down(radius, dtype),
        lambda: kernel,
        lambda: ops.cast(center * identity + offset * scale, kernel.dtype),
    )
