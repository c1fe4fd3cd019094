"""Noise: Gaussian, Poisson (shot) and salt-and-pepper (impulse)."""

from __future__ import annotations

import numpy as np

GAUSSIAN_DEVIATION = (0.04, 0.06, 0.08, 0.09, 0.10)
PHOTONS = (500, 250, 100, 75, 50)
FLIPPED_SHARE = (0.01, 0.02, 0.03, 0.05, 0.07)


def gaussian_noise(x, severity, rng):
    """x + σn, n standard normal."""
    draws = rng.standard_normal(x.shape, dtype=np.float32)
    return x + np.float32(GAUSSIAN_DEVIATION[severity - 1]) * draws


def shot_noise(x, severity, rng):
    """Poisson(c·x)/c: c photons make full brightness."""
    photons = PHOTONS[severity - 1]
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x, severity, rng):
    """A share of the values becomes 0 or 1, by equal chance."""
    share = FLIPPED_SHARE[severity - 1]
    draws = rng.random(x.shape, dtype=np.float32)
    return np.where(draws < share, (draws < share / 2).astype(np.float32), x)
