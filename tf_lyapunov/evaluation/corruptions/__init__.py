"""Fifteen common corruptions of images at five severities, "CIFAR-10-C style".

The parameters are those of CIFAR-10-C (Hendrycks & Dietterich, 2019). Its code needs ImageMagick
and photographs of frost; here everything is NumPy, SciPy and Pillow, and frost is procedural, so
that the images resemble the released ones and do not equal them.
"""

from __future__ import annotations

import zlib

import numpy as np

from . import blur, digital, noise, weather

#: name -> function (x float32 (n, h, w, c) in [0, 1], severity 1..5, generator) -> same shape.
CORRUPTIONS = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
SEVERITIES = (1, 2, 3, 4, 5)
_BLOCK = 256


def corrupt(x, name, severity, *, bounds=(0.0, 1.0), seed=0):
    """Images after one corruption.

    Image i is corrupted by draws that depend on the seed, the corruption, the severity and i // 256
    alone, so that a longer data set begins like a shorter one of whole blocks.

    Args:
        x: images (n, height, width, channels), finite, within `bounds`; 1 or 3 channels.
        name: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        bounds: darkest and brightest value, in units of x.
        seed: int.

    Returns:
        float32 array of the shape of x, within `bounds`.

    Raises:
        ValueError: for unknown names, severities, arrays that are no images, values out of bounds.

    Example:

    >>> x = np.full((1, 8, 8, 1), 0.5)
    >>> float(corrupt(x, "brightness", 5)[0, 0, 0, 0]).__round__(6)
    0.8

    Reference: Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions
    and Perturbations (ICLR 2019), parameters as published for 32×32 images.
    """
    if name not in CORRUPTIONS:
        raise ValueError(
            f"Unknown corruption. Received: name={name!r}. Known: {', '.join(CORRUPTIONS)}."
        )
    if severity not in SEVERITIES:
        raise ValueError(f"`severity` must be 1, 2, 3, 4 or 5. Received: severity={severity!r}.")
    low, high = map(float, bounds)
    if not low < high:
        raise ValueError(f"`bounds` must be (darkest, brightest). Received: bounds={bounds!r}.")
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or min(x.shape[1:3]) < 8:
        raise ValueError(
            "Corruptions need images (n, height, width, 1 or 3 channels) of at least 8 × 8 pixels. "
            f"Received: shape {x.shape}."
        )
    if x.size and not (np.min(x) >= low and np.max(x) <= high):
        raise ValueError(
            f"Images must be finite and lie within bounds={bounds}. Received: NaN, or values from "
            f"{np.min(x):g} to {np.max(x):g}."
        )
    unit = ((x - low) / (high - low)).astype(np.float32)
    result = np.empty_like(unit)
    for block, start in enumerate(range(0, len(x), _BLOCK)):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), severity, block])
        here = slice(start, start + _BLOCK)
        result[here] = np.clip(CORRUPTIONS[name](unit[here], severity, rng), 0, 1)
    return np.clip(np.float32(low) + result * np.float32(high - low), low, high, dtype=np.float32)
