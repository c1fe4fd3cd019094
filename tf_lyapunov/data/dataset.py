"""A data set in memory: inputs and labels, split in three."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Dataset:
    """Images and labels of one data set, split in three.

    Attributes:
        name: the data set's name.
        x_train, x_val, x_test: float32 arrays of shape (n, height, width, channels).
        y_train, y_val, y_test: int64 labels of shape (n,).
        num_classes: number of classes.
        preprocessing: what was done to the pixels, in words.
        pixel_range: smallest and largest value a pixel can take after preprocessing. Radii are in
            these units.
        class_names: what the classes are called, where the data name them, in the order of their
            numbers; None elsewhere.
    """

    name: str
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_val: np.ndarray = field(repr=False)
    y_val: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    num_classes: int = 10
    preprocessing: str = ""
    pixel_range: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""
        return tuple(self.x_train.shape[1:])

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The arrays `(x, y)` of the split "train", "val" or "test"."""
        if name not in ("train", "val", "test"):
            raise ValueError(f"`split` must be 'train', 'val' or 'test'. Received: split={name!r}.")
        return getattr(self, f"x_{name}"), getattr(self, f"y_{name}")
