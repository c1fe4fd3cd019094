"""Weather: snow, frost (procedural) and fog (a plasma fractal)."""

from __future__ import annotations

import functools

import numpy as np

from .digital import grey
from .sampling import motion_blurred, smoothed, zoomed

SNOW = (
    (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
    (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
)
FROST = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
FOG = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))
_TEXTURES, _TEXTURE_SIZE = 5, 256


def snow(x, severity, rng):
    """Thresholded, magnified and motion-blurred noise on a whitened image."""
    mean, deviation, magnification, threshold, radius, sigma, kept = SNOW[severity - 1]
    flakes = rng.normal(mean, deviation, (*x.shape[:3], 1)).astype(np.float32)
    flakes = zoomed(flakes, magnification)
    flakes[flakes < threshold] = 0
    angles = np.radians(rng.uniform(-135, -45, len(x)))
    flakes = motion_blurred(np.clip(flakes, 0, 1), radius, sigma, angles)
    white = np.maximum(x, grey(x) * np.float32(1.5) + np.float32(0.5))
    return kept * x + (1 - kept) * white + flakes + flakes[:, ::-1, ::-1]


def frost(x, severity, rng):
    """A random part of a texture of ice crystals, added to the dimmed image."""
    kept, ice = FROST[severity - 1]
    height, width, channels = x.shape[1:]
    side = max(_TEXTURE_SIZE, 2 * height, 2 * width)
    parts = np.empty_like(x)
    which = rng.integers(_TEXTURES, size=len(x))
    top, left = (rng.integers(side - size, size=len(x)) for size in (height, width))
    for i in range(len(x)):
        crystal = ice_texture(int(which[i]), side)
        part = crystal[top[i] : top[i] + height, left[i] : left[i] + width]
        parts[i] = part if channels == 3 else part.mean(axis=-1, keepdims=True)
    return kept * x + ice * parts


@functools.lru_cache(maxsize=8)
def ice_texture(number, side):
    """Bluish white dendrites, float32 (side, side, 3) in [0, 1], the same on every machine.

    Ridges of fractal noise at several scales: bright where the noise crosses zero.
    """
    rng = np.random.default_rng([7, number])
    total = np.zeros((side, side))
    for scale, weight in ((2, 0.3), (4, 0.5), (8, 0.6), (16, 0.4)):
        cell = smoothed(rng.standard_normal((1, side, side)), scale, mode="wrap")[0]
        total += weight * np.exp(-np.abs(cell) / (0.25 * cell.std()))
    haze = smoothed(rng.standard_normal((1, side, side)), 24, mode="wrap")[0]
    total *= 0.75 + 0.35 * np.tanh(haze / haze.std())
    total = np.clip((total - total.min()) / (np.quantile(total, 0.995) - total.min()), 0, 1)
    tint = np.array([0.86, 0.94, 1.0])
    return (total[..., None] * tint).astype(np.float32)


def fog(x, severity, rng):
    """A fractal cloud added to the image, which is dimmed to keep its largest value."""
    density, decay = FOG[severity - 1]
    height, width = x.shape[1:3]
    side = 1 << int(np.ceil(np.log2(max(height, width))))
    cloud = plasma(len(x), side, decay, rng)[:, :height, :width, None]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    scale = brightest / np.maximum(brightest + density, 1e-6)
    return (x + np.float32(density) * cloud) * scale


def plasma(count, side, decay, rng):
    """Clouds float32 (count, side, side) in [0, 1] by the diamond-square algorithm, periodic.

    Args:
        side: a power of two.
        decay: factor by which the random offsets shrink from scale to scale.
    """
    cloud = np.zeros((count, side, side))
    step, amplitude = side, 100.0

    def offsets(values):
        return values / 4 + amplitude * rng.uniform(-1, 1, values.shape)

    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        sums = corners + np.roll(corners, -1, 1)
        sums = sums + np.roll(sums, -1, 2)
        cloud[:, half::step, half::step] = offsets(sums)
        centres = cloud[:, half::step, half::step]
        above, left = np.roll(centres, 1, 1), np.roll(centres, 1, 2)
        cloud[:, ::step, half::step] = offsets(centres + above + corners + np.roll(corners, -1, 2))
        cloud[:, half::step, ::step] = offsets(centres + left + corners + np.roll(corners, -1, 1))
        step, amplitude = half, amplitude / decay
    cloud -= cloud.min(axis=(1, 2), keepdims=True)
    return (cloud / np.maximum(cloud.max(axis=(1, 2), keepdims=True), 1e-12)).astype(np.float32)
