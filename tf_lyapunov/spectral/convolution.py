"""Guaranteed upper bounds on the operator norms of convolutions, on a grid of frequencies.

A convolution y[i] = Σ_t K[t] x[s·i + d·t - p] splits into phases: with d·t = s·q + r it reads
phase r of the input at lag q, so it is an unstrided convolution of s^axes·C_in channels. Its
symbol at the frequency θ is the matrix with one block of rows per phase

    K̂_r(θ) = Σ_{t: d·t mod s = r} K[t]·exp(iθ·q_t)   (C_in × C_out),                     (1)

and σ(conv) ≤ sup_θ ‖K̂(θ)‖ for every size and padding: rows and columns of the operator on the
infinite grid are all that a finite, zero-padded one has. Two grids replace the supremum.

*Exact period.* If N, a multiple of s, is large enough that no tap read outside the image lands
inside it modulo N (`Axis.period`; "same", s = 1: N ≥ n + max(p, k_eff - 1 - p)), the map is a
compression of a circulant of size N, and θ = 2πm/(N/s) are all its frequencies.

*Any size.* With v the top singular vector at the maximum M = ‖K̂(θ*)‖², f(θ) = ‖K̂(θ)v‖² is a
trigonometric polynomial of degree D (largest minus smallest lag within a phase) with
0 ≤ f ≤ M = f(θ*). M. Riesz: a real trigonometric polynomial g of degree D with |g| ≤ 1 = g(θ*)
has g(θ* + t) ≥ cos(D·t) for |t| ≤ π/D. For g = 2f/M - 1, and t ≤ π/N to the nearest of N
equispaced points,

    M ≤ max_grid ‖K̂‖² / cos²(πD / 2N),                                                   (2)

axis by axis. Tighter than 1/(1 - D/N) (Pfister and Bresler, 2019): quadratic, not linear, in D/N.

*A kernel of unknown kind* (no geometry given) is bounded as if unstrided, undilated, ungrouped
and of any size. That covers every convolution layer with this kernel:
- a stride keeps some of the rows of the unstrided operator; padding and size likewise;
- dilation visits the same values of the symbol, K̂(dθ);
- groups use, at each frequency, C_out/g columns of the matrix Σ_t K[t]exp(iθt) (C_in/g × C_out)
  and are block-diagonal, and a depthwise convolution uses one row per channel: the norm of a
  submatrix is at most that of the matrix;
- a transposed convolution is the adjoint of the convolution with the same kernel.
"""

import dataclasses
import itertools
import math

import keras
import numpy as np
from keras import ops

from tf_lyapunov.spectral.gram import frobenius_norm_upper_bound, paired_bounds, unit_entries
from tf_lyapunov.spectral.precision import full_precision, gamma, unit_roundoff, work_dtype
from tf_lyapunov.theory.operators import LinearMap, convolution_axes

# The factor that (2) may cost, over all axes, where the size is unknown: 1.04 leaves a hundredth
# of the promised 5% to the rest.
SIZE_FREE_FACTOR = 1.04
# A known size uses its exact period unless grid (2), at 1% per axis, has clearly fewer points.
PER_AXIS_FACTOR = 1.01
MANY_MORE_POINTS = 1.5
# Frequencies are handled together up to this many floats of the largest intermediate.
CHUNK_FLOATS = 2**23


@dataclasses.dataclass(frozen=True)
class FrequencyGrid:
    """Where and how the symbol of one kernel shape is sampled; all static.

    Attributes:
        groups: number of diagonal blocks of the symbol.
        rows, columns: shape of a block within one phase (input channels, output channels).
        phases: tuple of `(taps, lags)`: tap indices (T_r,) and lags (T_r, axes) of a phase.
        angles: (F, axes) frequencies θ; half of them where the other half is conjugate.
        factor: what the maximum over the grid is multiplied by.
    """

    groups: int
    rows: int
    columns: int
    phases: tuple
    angles: np.ndarray
    factor: float

    @property
    def is_real(self):
        """Whether the only frequency is 0, so that the symbol is a real matrix."""
        return not self.angles.any()


def frequency_grid(kernel_shape, linear_map=None):
    """Static sampling plan of the convolution `linear_map` with kernels of this shape.

    Args:
        kernel_shape: `(*spatial, a, b)` in Keras' layout.
        linear_map: `LinearMap`, or `None` for a kernel of unknown kind.

    Returns:
        `FrequencyGrid`.

    Raises:
        ValueError: if `groups` does not divide the output channels.

    Example:

    >>> grid = frequency_grid((3, 3, 8, 16), LinearMap("conv", (6, 6, 8)))
    >>> grid.rows, grid.columns, len(grid.angles), grid.factor
    (8, 16, 20, 1.0)
    """
    shape = tuple(int(n) for n in kernel_shape)
    if linear_map is None:
        linear_map = LinearMap("conv")
    a, b = shape[-2:]
    if b % linear_map.groups:
        raise ValueError(
            "`groups` must divide the kernel's output channels. "
            f"Received: groups={linear_map.groups}, kernel shape {shape}."
        )
    groups, rows, columns = linear_map.groups, a, b // linear_map.groups
    if linear_map.kind == "depthwise":
        groups, rows, columns = a, 1, b
    lags, phases, turns, factor = _sample_axes(convolution_axes(shape, linear_map), linear_map)
    by_phase = {}
    taps = itertools.product(*(range(k) for k in shape[:-2]))
    for index, tap in enumerate(taps):
        key = tuple(phase[t] for phase, t in zip(phases, tap, strict=True))
        lag = tuple(q[t] for q, t in zip(lags, tap, strict=True))
        by_phase.setdefault(key, []).append((index, lag))
    parts = tuple(
        (np.array([i for i, _ in part]), np.array([q for _, q in part], dtype=float))
        for part in by_phase.values()
    )
    return FrequencyGrid(groups, rows, columns, parts, _half(turns), factor)


def _sample_axes(axes, linear_map):
    """Lags and phases of every tap, turns θ/2π of every grid point per axis, and the factor."""
    lags, phases, degrees, periods = [], [], [], []
    for axis in axes:
        offset = np.arange(axis.taps) * axis.dilation
        phase, lag = offset % axis.stride, offset // axis.stride
        # Shifting a phase in time is unitary, so that every phase may start at lag 0.
        for r in set(phase):
            lag[phase == r] -= lag[phase == r].min()
        phases.append(phase)
        lags.append(lag)
        degrees.append(int(lag.max()))
        periods.append(None if axis.size is None else _period(axis, linear_map) // axis.stride)
    free_axes = max(1, sum(d > 0 for d in degrees))
    turns, factor = [], 1.0
    for lag, degree, period in zip(lags, degrees, periods, strict=True):
        if degree == 0:
            turns.append(np.zeros(1))
            continue
        # Lags that share a factor visit each value of the symbol that many times.
        shared = int(np.gcd.reduce(lag))
        allowed = SIZE_FREE_FACTOR ** (1 / free_axes) if period is None else PER_AXIS_FACTOR
        points = _points(degree // shared, allowed)
        if period is not None and period // math.gcd(period, shared) <= MANY_MORE_POINTS * points:
            turns.append(np.arange(period // math.gcd(period, shared)) / period)
            continue
        turns.append(np.arange(points) / (points * shared))
        factor /= math.cos(math.pi * (degree // shared) / (2 * points))
    return lags, phases, turns, factor


def _points(degree, allowed):
    """Fewest grid points N with 1/cos(πD/2N) ≤ allowed (and N > D)."""
    return max(degree + 1, math.ceil(math.pi * degree / (2 * math.acos(1 / allowed))))


def _period(axis, linear_map):
    if linear_map.kind != "conv_transpose" or linear_map.padding in ("valid", "same"):
        return axis.period
    # A transposed convolution of unknown padding: 0 ≤ p < k_eff is cut off on the left.
    reach = max(axis.size + axis.extent - 1, (axis.output - 1) * axis.stride + axis.extent)
    return axis.stride * math.ceil(reach / axis.stride)


def _half(turns):
    """Grid points θ as (F, axes), one of each pair ±θ: a real kernel's symbol is conjugate there.

    Every axis is a subgroup of the circle up to the lags' common factor, so -θ is on the grid.
    """
    counts = [len(t) for t in turns]
    index = np.stack(np.meshgrid(*(np.arange(n) for n in counts), indexing="ij"), -1)
    index = index.reshape(-1, len(counts))
    opposite = (-index) % counts
    weights = np.cumprod([1, *counts[:0:-1]])[::-1]
    keep = index @ weights <= opposite @ weights
    steps = np.array([t[1] if len(t) > 1 else 0.0 for t in turns])
    return 2 * np.pi * index[keep] * steps


def conv_norm_upper_bound(kernel, linear_map=None, *, near=None, squarings=None):
    """Upper bound on the operator norm of a convolution with zero padding.

        σ ≤ max_θ ‖K̂(θ)‖ · Π_axes 1/cos(πD/2N)   (factor 1 on axes at their exact period)

    A guarantee, in exact arithmetic, for the kernel given and every map that `linear_map` allows:
    a map of known size, any size (`input_shape=None`), or any kind, stride, padding, dilation,
    groups and size (`linear_map=None`). Not for reflecting or periodic paddings of the input.

    Args:
        kernel: `(*spatial, a, b)` tensor in Keras' layout, any floating-point type.
        linear_map: `LinearMap` or `None`.
        near: guess of σ that steers the bound's tightness.
        squarings: squarings of the Chebyshev recursion.

    Returns:
        Scalar tensor (float32, or float64 for float64 kernels); NaN if the kernel is not finite.

    Example: the all-ones 5×5 filter has gain 25 on large images, and a reshaped norm of 5.

    >>> import numpy as np
    >>> bound = float(conv_norm_upper_bound(np.ones((5, 5, 1, 1), "float32")))
    >>> 25.0 <= bound < 26.25
    True

    Reference: exact period, phases and (2): sound form; Chebyshev form of Gram iteration.
    """
    return conv_bounds(kernel, linear_map, near=near, squarings=squarings)[0]


def conv_bounds(kernel, linear_map=None, *, near=None, squarings=None):
    """Upper bounds `(σ, ‖K‖_F)` of a convolution; see `conv_norm_upper_bound`."""
    kernel = ops.convert_to_tensor(kernel)
    if len(kernel.shape) < 3:
        raise ValueError(
            "A convolution kernel must have a spatial axis and two channel axes. "
            f"Received: shape={kernel.shape}."
        )
    kernel = ops.cast(kernel, work_dtype(kernel))
    grid = frequency_grid(kernel.shape, linear_map)
    u, taps = unit_roundoff(kernel.dtype), math.prod(kernel.shape[:-2])
    scale, kernel = unit_entries(kernel)
    blocks = _group_blocks(kernel, grid, taps)
    frobenius = frobenius_norm_upper_bound(blocks)
    near = None if near is None else near / (scale * grid.factor)
    with full_precision():
        bounds = [_chunk_bounds(blocks, grid, part, near, squarings) for part in _chunks(grid)]
    top, trace = (ops.max(ops.stack(values)) for values in zip(*bounds, strict=True))
    # Entries of the transforms err by γ_{T+3} of their absolute sums. With e = γ√T‖K‖_F, over
    # ‖ΔP‖‖Q‖ + ‖P‖‖ΔQ‖ + 2‖ΔJ'‖‖J'‖, Cauchy-Schwarz gives 6e‖K̂‖_F; 7 and 8e cover e².
    error = gamma(taps + 3, u) * math.sqrt(taps) * frobenius
    top = top + 7 * error * (ops.sqrt(trace) + 8 * error)
    # Scaling rounded every entry by at most 2u, hence the symbol by 2u√T‖K‖_F.
    sigma = ops.sqrt(top) * (1 + 8 * u) + 4 * u * math.sqrt(taps) * frobenius
    return scale * sigma * (grid.factor * (1 + 8 * u)), scale * frobenius * (1 + 8 * u)


def _group_blocks(kernel, grid, taps):
    """The kernel as `(T, groups·rows·columns)`, blocks of the symbol contiguous."""
    if grid.rows == 1:  # depthwise, or one channel per group: in this order already
        return ops.reshape(kernel, (taps, grid.groups * grid.columns))
    blocks = ops.reshape(kernel, (taps, grid.rows, grid.groups, grid.columns))
    if grid.groups > 1:
        blocks = ops.transpose(blocks, (0, 2, 1, 3))
    return ops.reshape(blocks, (taps, grid.groups * grid.rows * grid.columns))


def _chunks(grid):
    """Equal parts of the frequencies that keep intermediates below `CHUNK_FLOATS`."""
    rows = grid.rows * len(grid.phases)
    floats = grid.groups * max(rows * grid.columns, min(rows, grid.columns) ** 2)
    count = math.ceil(len(grid.angles) * floats / CHUNK_FLOATS)
    return np.array_split(grid.angles, min(max(count, 1), len(grid.angles)))


def _chunk_bounds(blocks, grid, angles, near, squarings):
    """`paired_bounds` over some frequencies."""
    dtype = keras.backend.standardize_dtype(blocks.dtype)
    parts = []
    for taps, lags in grid.phases:
        part = blocks if len(grid.phases) == 1 else ops.take(blocks, taps, axis=0)
        turn = angles @ lags.T  # (F, T_r)
        cosine, sine = np.cos(turn), np.sin(turn)
        weights = [cosine] if grid.is_real else [cosine + sine, cosine - sine, math.sqrt(2) * sine]
        shape = (len(angles), grid.groups, grid.rows, grid.columns)
        parts.append([ops.reshape(ops.matmul(w.astype(dtype), part), shape) for w in weights])
    # One block of rows per phase, for each of the three transforms.
    stacked = [
        p[0] if len(p) == 1 else ops.concatenate(p, axis=-2) for p in zip(*parts, strict=True)
    ]
    plus, minus, twisted = stacked if len(stacked) == 3 else (*stacked, None, None)
    return paired_bounds(plus, minus, twisted, near=near, squarings=squarings)
