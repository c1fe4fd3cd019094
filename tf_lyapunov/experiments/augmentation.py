"""Random shifts and reflections of training images, as functions of the seed, epoch and batch."""

from __future__ import annotations

import numpy as np

from ..data.arrays import Batches, Dataset
from ..data.streams import ImageStream
from ..errors import ConfigError
from .config import ExperimentConfig


class AugmentedBatches(Batches):
    """`datasets.Batches` of images that are shifted and reflected at random.

    An image is padded by reflection, `crop` pixels on each side, and cropped to its size at a
    uniform place; with `flip` it is mirrored left to right with probability 1/2. What is drawn
    depends on (seed, epoch, batch) alone: a run that continues draws what the uninterrupted one
    would have drawn, and reading a batch twice gives the same one.

    Args:
        x: array of shape (n, height, width, channels).
        y: array of shape (n,) or (n, classes).
        batch_size, seed, shuffle: as in `datasets.Batches`.
        crop: largest shift in pixels, below height and width; 0 for none.
        flip: whether to mirror images.

    Raises:
        ValueError: if `x` holds no images, or `crop` is too large for them.

    Example:

    >>> import numpy as np
    >>> x = np.arange(32.0).reshape(2, 4, 4, 1)
    >>> batches = AugmentedBatches(x, np.arange(2), batch_size=2, seed=1, crop=1, flip=True)
    >>> first, again = batches[0][0], batches[0][0]
    >>> first.shape, bool(np.array_equal(first, again)), bool(np.array_equal(first, x))
    ((2, 4, 4, 1), True, False)

    Reference: Meunier et al. (2022), section 5.1: "random cropping and flipping"; their released
    code pads by reflection, 4 pixels.
    """

    def __init__(self, x, y, batch_size=128, seed=0, shuffle=True, *, crop=0, flip=False):
        if np.ndim(x) != 4 or not 0 <= crop < min(x.shape[1:3]):
            raise ValueError(
                "Augmentation needs images (n, height, width, channels) larger than `crop`. "
                f"Received: data of shape {np.shape(x)}, crop={crop!r}."
            )
        self.crop, self.flip = int(crop), bool(flip)
        super().__init__(x, y, batch_size, seed, shuffle)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._epoch = epoch

    def __getitem__(self, index: int):
        images, labels = super().__getitem__(index)
        # A third number, not 0, keeps this stream apart from that of the order.
        rng = np.random.default_rng([self.seed, self._epoch, index + 1])
        count, height, width = images.shape[:3]
        if self.crop:
            top, left = rng.integers(0, 2 * self.crop + 1, (2, count))
            sides = (self.crop, self.crop)
            padded = np.pad(images, ((0, 0), sides, sides, (0, 0)), mode="reflect")
            rows, columns = top[:, None] + np.arange(height), left[:, None] + np.arange(width)
            of = np.arange(count)[:, None, None]
            images = padded[of, rows[:, :, None], columns[:, None, :]]
        if self.flip:
            mirrored = rng.random(count) < 0.5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return images, labels


def training_batches(config: ExperimentConfig, data: Dataset) -> Batches:
    """The configured training batches; their content is a function of (seed, epoch) alone.

    Raises:
        ConfigError: if the data cannot be augmented as configured.
    """
    arrays, changes = (data.x_train, data.y_train), config.training.augmentation
    common = {"batch_size": config.training.batch_size, "seed": config.seed}
    if isinstance(data, ImageStream):
        if changes.crop or changes.flip:
            raise ConfigError(
                "Streamed images are always cropped and reflected at random. Received: "
                f"training.augmentation for {data.name!r}. Leave it out."
            )
        return data.batches(**common)
    if not (changes.crop or changes.flip):
        return Batches(*arrays, **common)
    try:
        return AugmentedBatches(*arrays, **common, crop=changes.crop, flip=changes.flip)
    except ValueError as error:
        raise ConfigError(f"`training.augmentation` does not fit the data set: {error}") from error
