"""Folders of images by class: `FOLDER/<class>/*.png`, or `FOLDER/train/<class>/*.png` and so on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DatasetNotFound
from .parts import Parts

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
_PARTS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
# Modes of Pillow that hold eight bits a channel, or less.
_GREY, _COLOUR = ("1", "L"), ("P", "RGB", "RGBA", "LA", "CMYK", "YCbCr")


def read_folder(folder: Path) -> Parts:
    """Images and the names of their folders, in the order of these names.

    Raises:
        DatasetNotFound: Pillow is missing, or a file is damaged.
        ValueError: no classes, no images, or images of several sizes.
    """
    inner = _folders(folder)
    parts = {_PARTS[d.name.lower()]: d for d in inner if d.name.lower() in _PARTS}
    if parts and len(parts) == len(inner):
        classes = {part: _classes(d, folder) for part, d in parts.items()}
    else:
        classes = {"all": _classes(folder, folder)}
    files = {
        part: [(path, name) for name, paths in found.items() for path in paths]
        for part, found in classes.items()
    }
    images = _images([path for pairs in files.values() for path, _ in pairs], folder)
    arrays, start = {}, 0
    for part, pairs in files.items():
        x = images[start : start + len(pairs)]
        arrays[part] = x, np.array([name for _, name in pairs])
        start += len(pairs)
    return Parts(str(folder), arrays, ordered=True)


def _folders(folder):
    inner = (d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    return sorted(inner, key=lambda d: d.name)


def _classes(folder, whole):
    found = {
        d.name: sorted(
            f for f in d.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")
        )
        for d in _folders(folder)
    }
    if len(found) < 2:
        raise ValueError(
            "A folder of images must hold one folder per class, at least two. Received: "
            f"{folder} with {', '.join(found) or 'none'}."
        )
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise ValueError(
            f"Every class needs images ({', '.join(s[1:] for s in SUFFIXES)}). Received: "
            f"{folder} without any for {', '.join(empty)}."
        )
    return found


def _images(paths, folder):
    """One array of bytes (n, height, width, 1 or 3)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DatasetNotFound(
            "Images are read with Pillow, which is not installed. Install the extra: "
            "pip install 'tf-lyapunov[report]'"
        ) from error
    found, grey, size, first = [], True, None, None
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
                mode, here = image.mode, image.size
                if mode not in _GREY + _COLOUR:
                    raise ValueError(
                        "Images must hold eight bits a channel. Received: "
                        f"{path} of mode {mode!r}. Convert it first."
                    )
                if size not in (None, here):
                    raise ValueError(
                        "All images must have one size. Received: "
                        f"{first} of {size[0]}×{size[1]} and {path} of {here[0]}×{here[1]} pixels. "
                        "Resize or crop them first."
                    )
                size, first = here, first or path
                grey = grey and mode in _GREY
                found.append(np.asarray(image.convert("L" if mode in _GREY else "RGB")))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise DatasetNotFound(
                f"An image cannot be read ({reason}). Received: {path}."
            ) from error
    if grey:
        return np.stack(found)[..., None]
    return np.stack([a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in found])
