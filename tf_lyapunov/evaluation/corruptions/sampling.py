"""Resampling of batches of images: shifts, bilinear interpolation, zoom as a matrix."""

from __future__ import annotations

import functools

import numpy as np


def bilinear(x, rows, columns):
    """x at real positions (n, h, w), bilinear; positions beyond the edge are mirrored about it.

    Mirroring repeats the edge pixel (`reflect` in SciPy).
    """
    height, width = x.shape[1:3]
    top, left = np.floor(rows), np.floor(columns)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    image = np.arange(len(x))[:, None, None]

    def pixel(i, j):
        return x[image, _reflect(i, height), _reflect(j, width)]

    top, left = top.astype(np.int64), left.astype(np.int64)
    upper = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
    lower = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
    return (upper * (1 - down) + lower * down).astype(np.float32)


def _reflect(index, size):
    index = np.mod(index, 2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def shifted(x, rows, columns):
    """Image i moved by (rows_i, columns_i) pixels; the edge is repeated."""
    height, width = x.shape[1:3]
    down = np.clip(np.arange(height)[None] - rows[:, None], 0, height - 1)
    right = np.clip(np.arange(width)[None] - columns[:, None], 0, width - 1)
    return x[np.arange(len(x))[:, None, None], down[:, :, None], right[:, None, :]]


def motion_blurred(x, radius, sigma, angles):
    """Mean of shifted copies along a direction per image, with half a Gaussian as weights."""
    width = 2 * radius + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2.0 * sigma**2))
    weights /= weights.sum()
    total = np.zeros_like(x)
    for step, weight in enumerate(weights):
        rows = -np.ceil(step * np.sin(angles) - 0.5).astype(np.int64)
        columns = -np.ceil(step * np.cos(angles) - 0.5).astype(np.int64)
        total += np.float32(weight) * shifted(x, rows, columns)
    return total


@functools.lru_cache(maxsize=256)
def zoom_matrix(size, factor):
    """Matrix (size, size) that magnifies the centre of a line by `factor`, linearly."""
    from scipy.ndimage import zoom

    kept = int(np.ceil(size / factor))
    start = (size - kept) // 2
    columns = np.zeros((kept, size))
    columns[np.arange(kept), start + np.arange(kept)] = 1.0
    enlarged = zoom(columns, (factor, 1), order=1)
    trim = max((len(enlarged) - size) // 2, 0)
    return enlarged[trim : trim + size].astype(np.float32)


def zoomed(x, factor):
    """The centre of every image, magnified to full size."""
    rows, columns = (zoom_matrix(size, float(factor)) for size in x.shape[1:3])
    return np.einsum("ij,njkc->nikc", rows, _columns(x, columns), optimize=True)


def _columns(x, matrix):
    return np.einsum("kl,njlc->njkc", matrix, x, optimize=True)


def smoothed(x, sigma, mode="nearest", truncate=4.0):
    """Gaussian filter over height and width."""
    from scipy.ndimage import gaussian_filter

    sigmas = (0, sigma, sigma, 0)[: x.ndim]
    return gaussian_filter(x, sigmas, mode=mode, truncate=truncate)
