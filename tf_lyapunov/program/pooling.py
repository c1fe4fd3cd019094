"""Gains of pooling and upsampling layers, from their exact window geometry."""

import math

import keras
import numpy as np

from tf_lyapunov.layers.pooling import window_sum_bound
from tf_lyapunov.program.rounding import UNIT_ROUNDOFF, down, product_up, sqrt_up, up

_layers = keras.layers
MAX_POOLING = (_layers.MaxPooling1D, _layers.MaxPooling2D, _layers.MaxPooling3D)
AVERAGE_POOLING = (_layers.AveragePooling1D, _layers.AveragePooling2D, _layers.AveragePooling3D)
GLOBAL_MAX = (_layers.GlobalMaxPooling1D, _layers.GlobalMaxPooling2D, _layers.GlobalMaxPooling3D)
GLOBAL_AVERAGE = (
    _layers.GlobalAveragePooling1D,
    _layers.GlobalAveragePooling2D,
    _layers.GlobalAveragePooling3D,
)
UPSAMPLING = (_layers.UpSampling1D, _layers.UpSampling2D, _layers.UpSampling3D)


def spatial_sizes(layer, input_shape):
    """Spatial sizes of a batch shape in the layer's data format."""
    shape = tuple(input_shape)[1:]
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return shape[1:] if first else shape[:-1]


def _windows(n, q, s, padding):
    """First input index of each window; negative inside 'same' padding."""
    if padding == "valid":
        return np.arange((n - q) // s + 1) * s
    m = -(-n // s)
    return np.arange(m) * s - max((m - 1) * s + q - n, 0) // 2


def _cells(n, q, s, padding):
    return _windows(n, q, s, padding)[:, None] + np.arange(q)[None, :]


def max_pooling_gain(pool_size, strides, padding, sizes):
    """Gain of max pooling, √Π_axes (largest number of windows that share a cell), attained.

    Each output moves at most as its window's largest change, and a cell lies in at most ⌈q/s⌉
    windows per axis (fewer where the input is small).

    Args:
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`.
        sizes: spatial sizes, None where unknown.

    Returns:
        float, rounded up.

    Example:

    >>> max_pooling_gain((3, 3), (2, 2), "valid", (28, 28))
    2.0

    Reference: theory of pooling in the library's notes (sound form; Peck et al. use κ/t).
    """
    shared = 1
    for q, s, n in zip(pool_size, strides, sizes, strict=True):
        if n is None:
            shared *= -(-q // s)
            continue
        cells = _cells(n, q, s, padding)
        inside = cells[(cells >= 0) & (cells < n)]
        shared *= int(np.max(np.bincount(inside, minlength=1), initial=1))
    return sqrt_up(shared)


def average_pooling_gain(pool_size, strides, padding, sizes):
    """Gain of average pooling: product over the axes of the norms of their averaging matrices.

    With 'same' padding an edge window divides by its valid cells; on torch, uneven padding
    repeats the edge cell instead. The larger norm of the two is used. Unknown size: √(⌈q/s⌉/q)
    for 'valid', √⌈q/s⌉ for 'same' (row sums 1, largest column sum).

    Args:
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`.
        sizes: spatial sizes, None where unknown.

    Returns:
        float, rounded up.

    Example:

    >>> round(average_pooling_gain((2, 2), (2, 2), "valid", (8, 8)), 9)
    0.5
    """
    gains = []
    for q, s, n in zip(pool_size, strides, sizes, strict=True):
        if n is None:
            gains.append(sqrt_up(-(-q // s) / (q if padding == "valid" else 1)))
        elif n == 0 or (padding == "valid" and n < q):
            gains.append(0.0)  # no window fits: the layer's output is empty
        else:
            gains.append(max(map(_norm_up, _averaging_matrices(n, q, s, padding))))
    return product_up(*gains)


def window_sum_gain(pool_size, strides, padding, sizes):
    """Gain of the sum over windows, with zeros around: product of the norms along the axes.

    Args:
        pool_size, strides: integers q, s per axis.
        padding: `"valid"` or `"same"`.
        sizes: spatial sizes, None where unknown (the largest norm over all sizes).

    Returns:
        float, rounded up.

    Example:

    >>> round(window_sum_gain((3,), (2,), "valid", (5,)) ** 2, 9)
    4.0
    """
    gains = []
    for q, s, n in zip(pool_size, strides, sizes, strict=True):
        if n is None:
            gains.append(float(up(window_sum_bound((q,), (s,)))))
            continue
        cells = _cells(n, q, s, padding)
        matrix = np.zeros((len(cells), n))
        rows, inside = np.arange(len(cells))[:, None], (cells >= 0) & (cells < n)
        np.add.at(matrix, (np.broadcast_to(rows, cells.shape)[inside], cells[inside]), 1.0)
        gains.append(_norm_up(matrix))
    return product_up(*gains)


def _averaging_matrices(n, q, s, padding):
    cells = _cells(n, q, s, padding)
    inside = (cells >= 0) & (cells < n)
    rows = np.broadcast_to(np.arange(len(cells))[:, None], cells.shape)
    excluding = np.zeros((len(cells), n))
    weights = inside / np.maximum(inside.sum(axis=1, keepdims=True), 1)
    np.add.at(excluding, (rows[inside], cells[inside]), weights[inside])
    repeating = np.zeros((len(cells), n))
    np.add.at(repeating, (rows, np.clip(cells, 0, n - 1)), 1 / q)
    return [excluding] if padding == "valid" else [excluding, repeating]


def _norm_up(matrix):
    # LAPACK's singular values err by a small multiple of the larger side in units of roundoff.
    inflation = 1 + 8 * max(matrix.shape) * UNIT_ROUNDOFF["float64"]
    if matrix.size <= 10**6:
        return float(np.linalg.norm(matrix, 2)) * inflation
    # Schur test: ‖A‖² ≤ (largest row sum)·(largest column sum) for non-negative A.
    return math.sqrt(matrix.sum(axis=1).max() * matrix.sum(axis=0).max()) * inflation


def global_average_gain(sizes):
    """Gain of the mean over N positions, 1/√N rounded up; 1 where a size is unknown."""
    if None in sizes:
        return 1.0
    return float(up(1 / down(math.sqrt(math.prod(sizes)))))


def upsampling_gain(layer):
    """√Π size for nearest-neighbour upsampling, which repeats every cell; None if interpolated."""
    if getattr(layer, "interpolation", "nearest") != "nearest":
        return None
    return sqrt_up(int(np.prod(layer.size)))
