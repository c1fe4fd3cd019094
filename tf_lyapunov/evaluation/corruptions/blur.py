"""Blur: defocus, frosted glass, motion and zoom."""

from __future__ import annotations

import numpy as np

from .sampling import motion_blurred, smoothed, zoomed

DISK = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))
GLASS = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
MOTION = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))
LARGEST_ZOOM = (1.06, 1.11, 1.16, 1.21, 1.26)
_ZOOM_STEP = 0.01


def disk_kernel(radius, alias):
    """Uniform disk of `radius` pixels, smoothed by a 3 × 3 Gaussian of deviation `alias`."""
    reach = int(radius) + 1
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line[None] ** 2 <= radius**2).astype(np.float64)
    weights = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * alias**2))
    weights /= weights.sum()
    for axis in (0, 1):
        moved = [np.roll(disk, shift, axis) for shift in (1, 0, -1)]
        disk = sum(w * m for w, m in zip(weights, moved, strict=True))
    return disk / disk.sum()


def defocus_blur(x, severity, rng):
    """Convolution with a smoothed disk; images are mirrored at the edge."""
    kernel = disk_kernel(*DISK[severity - 1])
    reach = len(kernel) // 2
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    total = np.zeros_like(x)
    for i, j in zip(*np.nonzero(kernel), strict=True):
        total += np.float32(kernel[i, j]) * padded[:, i : i + height, j : j + width]
    return total


def glass_blur(x, severity, rng):
    """Neighbouring pixels exchanged at random between two light Gaussian filters.

    The released code overwrites one of the two pixels instead (its swap reads a view).
    """
    sigma, reach, rounds = GLASS[severity - 1]
    # Positions first: exchanges are the same for all channels and touch two pixels each.
    pixels = np.ascontiguousarray(smoothed(x, sigma).transpose(1, 2, 0, 3))
    height, width, count = pixels.shape[:3]
    image = np.arange(count)
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, size=(height, width, 2, count))
        for i in range(height - reach, reach, -1):
            for j in range(width - reach, reach, -1):
                there = (i + moves[i, j, 0], j + moves[i, j, 1], image)
                here = pixels[i, j].copy()
                pixels[i, j] = pixels[there]
                pixels[there] = here
    return smoothed(np.ascontiguousarray(pixels.transpose(2, 0, 1, 3)), sigma)


def motion_blur(x, severity, rng):
    """Blur along a random direction within 45° of the horizontal."""
    radius, sigma = MOTION[severity - 1]
    return motion_blurred(x, radius, sigma, np.radians(rng.uniform(-45, 45, len(x))))


def zoom_blur(x, severity, rng):
    """Mean of the image and its magnifications by 1, 1.01, …"""
    factors = np.arange(1.0, LARGEST_ZOOM[severity - 1], _ZOOM_STEP)
    total = np.array(x)
    for factor in factors:
        total += zoomed(x, round(float(factor), 9))
    return total / np.float32(len(factors) + 1)
