"""Digital: brightness, contrast, elastic deformation, pixelation and JPEG."""

from __future__ import annotations

import io

import numpy as np

from .sampling import bilinear, smoothed

BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
# Strength, smoothness and affine displacement, in sides of the image.
ELASTIC = ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
           (0.1, 0.03, 0.03))  # fmt: skip
RESOLUTION = (0.95, 0.9, 0.85, 0.75, 0.65)
JPEG_QUALITY = (80, 65, 58, 50, 40)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def grey(x):
    """Luma (n, h, w, 1) of RGB images; grey ones unchanged."""
    return x if x.shape[-1] == 1 else (x @ _LUMA)[..., None]


def brightness(x, severity, rng):
    """Adds to the value V = max(R, G, B) at constant hue and saturation."""
    value = x.max(axis=-1, keepdims=True)
    raised = np.minimum(value + np.float32(BRIGHTNESS[severity - 1]), 1)
    return np.where(value > 0, x * (raised / np.maximum(value, 1e-12)), raised)


def contrast(x, severity, rng):
    """Shrinks the distance to the mean of every channel."""
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + np.float32(CONTRAST[severity - 1]) * (x - mean)


def elastic_transform(x, severity, rng):
    """A random affine map, then a random smooth displacement of every pixel."""
    count, height, width = x.shape[:3]
    side = min(height, width)
    strength, smoothness, shake = (side * v for v in ELASTIC[severity - 1])
    y, z = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    grid = np.stack([y, z], axis=-1).astype(np.float64)
    matrices, shifts = _affine_maps(count, height, width, shake, rng)
    places = np.einsum("nij,hwj->nhwi", matrices, grid) + shifts[:, None, None]
    warped = bilinear(x, places[..., 0], places[..., 1])
    if strength == 0:
        return warped
    fields = rng.uniform(-1, 1, (2, count, height, width))
    moves = [strength * smoothed(f, smoothness, mode="reflect", truncate=3) for f in fields]
    return bilinear(warped, grid[..., 0] + moves[0], grid[..., 1] + moves[1])


def _affine_maps(count, height, width, shake, rng):
    """Maps from output to input pixels that move three points by up to `shake` pixels each."""
    centre, reach = np.array([height // 2, width // 2], float), min(height, width) // 3
    corners = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-shake, shake, (count, 3, 2))
    system = np.concatenate([moved, np.ones((count, 3, 1))], axis=2)
    solution = np.linalg.solve(system, np.broadcast_to(corners, moved.shape))
    return solution[:, :2].transpose(0, 2, 1), solution[:, 2]


def pixelate(x, severity, rng):
    """Box-filtered to a lower resolution and magnified again."""
    image = _pillow()
    height, width = x.shape[1:3]
    share = RESOLUTION[severity - 1]
    small = (max(int(width * share), 1), max(int(height * share), 1))

    def resized(picture):
        small_picture = picture.resize(small, image.Resampling.BOX)
        return small_picture.resize((width, height), image.Resampling.BOX)

    return _by_picture(x, resized)


def jpeg_compression(x, severity, rng):
    """Saved as JPEG and read again."""
    image = _pillow()

    def compressed(picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=JPEG_QUALITY[severity - 1])
        return image.open(file)

    return _by_picture(x, compressed)


def _by_picture(x, change):
    image, levels = _pillow(), np.round(x * 255).astype(np.uint8)
    changed = np.empty_like(levels)
    for i, pixels in enumerate(levels):
        picture = image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        changed[i] = np.asarray(change(picture)).reshape(pixels.shape)
    return changed.astype(np.float32) / 255


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "This corruption needs Pillow. Install the extra: pip install 'tf_lyapunov[report]'."
        ) from error
    return Image
