"""Small pictures in JSON, and as PNG without an imaging library."""

from __future__ import annotations

import base64
import binascii
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# Bytes of one stored picture: 64 × 64 in grey, 36 × 36 in colour.
MOST_VALUES = 4096
_ZERO = 127  # the level of no change, out of 0 … 254
_BELOW, _ABOVE = np.array([33, 102, 172.0]), np.array([178, 24, 43.0])


def is_picture(shape) -> bool:
    """Whether arrays of that shape, without the batch axis, are shown as pictures.

    Example:

    >>> is_picture((28, 28, 1)), is_picture((3, 32, 32)), is_picture((64,)), is_picture((50, 8))
    (True, True, False, False)
    """
    return len(shape) == 3 and (shape[2] in (1, 3) or shape[0] in (1, 3)) and min(shape) > 0


def encode(clean, perturbed) -> dict[str, Any]:
    """A picture and how it was changed, in at most two times `MOST_VALUES` bytes.

    Larger ones are shrunk by averaging over squares; values become 256 levels between the smallest
    and the largest, and those of the change 255 levels around zero.

    Args:
        clean: array (height, width, 1 or 3), or channels first.
        perturbed: array of that shape, or None.

    Returns:
        A dict with keys "shape" as stored, channels last, "size" (height and width as they were),
        "low", "high" (of both pictures), "clean" (levels, base64); and with a perturbed picture
        "reach" (largest change) and "change" (levels, base64).
    """
    last = clean.shape[2] in (1, 3)
    clean, perturbed = (
        None if a is None else np.asarray(a, np.float64) if last
        else np.moveaxis(np.asarray(a, np.float64), 0, 2)
        for a in (clean, perturbed)
    )  # fmt: skip
    size = clean.shape[:2]
    small = _shrunk(clean)
    change = None if perturbed is None else _shrunk(perturbed - clean)
    both = np.stack([small, small if change is None else small + change])
    low, high = float(both.min()), float(both.max())
    levels = np.rint((small - low) * (255 / (high - low if high > low else 1.0)))
    found = {
        "shape": list(small.shape),
        "size": list(size),
        "low": low,
        "high": high,
        "clean": _text(levels),
    }
    if change is not None:
        reach = float(np.abs(change).max())
        found["reach"] = reach
        found["change"] = _text(np.rint(_ZERO + change * (_ZERO / (reach or 1.0))))
    return found


def urls(record: Mapping[str, Any]) -> dict[str, str] | None:
    """PNG data URLs "clean", and where it was changed "change" and "perturbed", of `encode`.

    Changes of grey pictures are blue where darker, red where brighter, white where nothing
    changed; those of coloured ones are around grey. None for a record that is damaged.
    """
    try:
        shape = tuple(int(side) for side in record["shape"])
        if not is_picture(shape) or shape[2] not in (1, 3) or math.prod(shape) > MOST_VALUES:
            return None
        clean = _levels(record["clean"], shape)
        found = {"clean": png_url(clean)}
        if "change" not in record:
            return found
        change = _levels(record["change"], shape)
        width = (float(record["high"]) - float(record["low"])) or 1.0
        share = (change.astype(np.float64) - _ZERO) / _ZERO
        moved = clean + share * (255 * float(record["reach"]) / width)
        found["change"] = png_url(_diverging(share) if shape[2] == 1 else _rounded(255 * (
            share + 1) / 2))  # fmt: skip
        found["perturbed"] = png_url(_rounded(moved))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found


def png_url(levels) -> str:
    """Data URL of a PNG of uint8 levels (height, width, 1 or 3)."""
    height, width, channels = levels.shape
    rows = np.concatenate(  # a filter byte, 0 for none, before every row
        [np.zeros((height, 1), np.uint8), levels.reshape(height, -1)], axis=1
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")
        )
    )  # fmt: skip
    return "data:image/png;base64," + base64.b64encode(body).decode("ascii")


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _shrunk(image):
    """Averages over squares, as small as it takes to store the picture."""
    height, width, channels = image.shape
    side = 1
    while -(-height // side) * -(-width // side) * channels > MOST_VALUES:
        side += 1
    if side == 1:
        return image
    for axis, length in ((0, height), (1, width)):
        starts = np.arange(0, length, side)
        counts = np.minimum(starts + side, length) - starts
        sums = np.add.reduceat(image, starts, axis=axis)
        image = sums / counts.reshape([-1 if a == axis else 1 for a in range(3)])
    return image


def _text(levels):
    return base64.b64encode(levels.astype(np.uint8).tobytes()).decode("ascii")


def _levels(text, shape):
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError) as error:
        raise ValueError("no base64") from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def _rounded(levels):
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)


def _diverging(share):
    """White at zero, blue below, red above."""
    share = np.clip(share, -1, 1)
    ends = np.where(share < 0, _BELOW, _ABOVE)
    return _rounded(255 + np.abs(share) * (ends - 255))
