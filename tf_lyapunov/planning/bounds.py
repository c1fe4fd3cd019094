"""What a guaranteed bound costs: the products of `spectral.gram` and `spectral.convolution`.

For a matrix with sides m ≥ n, with k squarings of the Gram matrix,

    2mn² + 2kn³     FLOPs,                                                                  (1)

and for a convolution, at each of F frequencies with T taps, where a Hermitian product is two real
ones and there are three transforms,

    F·(6T·|K|/T + 2·(2mn² + 2kn³)).                                                         (2)
"""

from __future__ import annotations

import dataclasses
import math

from tf_lyapunov.spectral.clipping import SQUARINGS as CLIP_SQUARINGS
from tf_lyapunov.spectral.convolution import CHUNK_FLOATS, frequency_grid
from tf_lyapunov.spectral.gram import SQUARINGS

# Passes over a Gram matrix per real and per Hermitian squaring beside the product itself:
# subtraction; transpose, sum, difference, subtraction (each reads and writes).
_PASSES, _PAIRED_PASSES = 4, 10
# Intermediates of one chunk that are alive together: three transforms, Gram matrices, two powers.
_ALIVE = 6


@dataclasses.dataclass(frozen=True)
class BoundCost:
    """Cost of one guaranteed bound, and of one power step, of a kernel.

    Attributes:
        name: layer.
        frequencies: matrices that are bounded; 1 for a dense kernel.
        side: their smaller side n.
        flops: of the bound in training.
        bytes: that its passes over the Gram matrices move, in float32.
        workspace: largest memory of its intermediates in bytes, in float32.
        steering: FLOPs of a power step, which the amortised mode takes at every step.
    """

    name: str
    frequencies: int
    side: int
    flops: int
    bytes: int
    workspace: int
    steering: int


def bound_cost(kernel_shape, linear_map, *, name="", squarings=None) -> BoundCost:
    """Cost of the bound that `SpectralBound` enforces on a kernel of this shape.

    Args:
        kernel_shape: shape in Keras' layout.
        linear_map: its `LinearMap`.
        name: of the layer.
        squarings: as in `SpectralBound`.

    Returns:
        `BoundCost`; products only, counted by (1) and (2).

    Example:

    >>> from tf_lyapunov.theory.operators import LinearMap
    >>> cost = bound_cost((30, 20), LinearMap("dense", (30,)))
    >>> cost.flops == 2 * 30 * 20**2 + 3 * 2 * 20**3, cost.frequencies
    (True, 1)
    """
    shape = tuple(int(n) for n in kernel_shape)
    entries = math.prod(shape)
    if len(shape) == 2:
        n, m = sorted(shape)
        levels = CLIP_SQUARINGS
        flops = 2 * m * n**2 + levels * 2 * n**3
        moved = 4 * (2 * entries + (2 + levels * _PASSES) * n**2)
        return BoundCost(name, 1, n, flops, moved, 4 * 3 * n**2, 4 * entries)
    levels = SQUARINGS if squarings is None else squarings
    grid = frequency_grid(shape, linear_map)
    rows, frequencies = grid.rows * len(grid.phases), len(grid.angles)
    n, m = sorted((rows, grid.columns))
    count = frequencies * grid.groups
    real = grid.is_real
    transforms = (1 if real else 3) * 2 * frequencies * entries
    products = (1 if real else 2) * count * (2 * m * n**2 + levels * 2 * n**3) if n > 1 else 0
    if n == 1:
        products = (1 if real else 2) * count * 2 * m
    passes = 2 + levels * (_PASSES if real else _PAIRED_PASSES)
    moved = 4 * count * ((1 if real else 3) * 3 * m * n + passes * n**2)
    floats = count * max(m * n, n * n)
    chunks = min(max(1, math.ceil(floats / CHUNK_FLOATS)), frequencies)
    steering = 2 * 2 * entries * _positions(shape, linear_map)
    return BoundCost(
        name, count, n, transforms + products, moved, 4 * _ALIVE * floats // chunks, steering
    )


def _positions(shape, linear_map):
    if linear_map.kind == "conv_transpose":
        return math.prod(linear_map.input_shape[:-1])
    return math.prod(linear_map.output_shape(shape)[:-1])
