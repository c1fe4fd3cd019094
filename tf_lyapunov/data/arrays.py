"""Data sets as arrays, with the papers' preprocessing and fixed splits.

The embedded sets need no network: "digits" (scikit-learn's 8×8 digits) and "blobs" (Gaussian
clusters for tests). The others come from a prepared TensorFlow Datasets directory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import keras
import numpy as np

from ..errors import DatasetNotFound
from . import own, parts, prepared, streams
from .dataset import Dataset
from .epochs import EpochNumber
from .prepared import PREPARED

EMBEDDED = ("digits", "blobs")
# Read from their files as they are needed, by `streams`.
STREAMED = tuple(streams.STREAMED)
NAMES = (*EMBEDDED, *PREPARED, *STREAMED)
# Our names of corruptions that TensorFlow Datasets calls otherwise.
_RELEASED = {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = False,
    validation: int | None = None,
    crop: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    label: str | None = None,
    pixels: str | None = None,
    whole: bool = False,
) -> Dataset:
    """Load a data set as NumPy arrays.

    Pixels become x/255 - 0.5 (digits: x/16, in [0, 1]); CIFAR and SVHN images are cropped to
    their central 28×28 pixels; the first 5000 training images, in the order of the prepared files,
    are the validation split. For data of one's own see `docs/own-data.md`.

    Args:
        name: one of `datasets.NAMES`; a path to an `.npz` or `.csv` file or to a folder with images
            by class; or the name of a builder whose files are in `data_dir`.
        data_dir: TensorFlow Datasets directory; default `TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`.
        download: fetch and prepare the data set if it is not there. Nothing is ever downloaded
            without it.
        validation: number of leading training examples held out; default 5000 (digits: 180).
        crop: side of the central crop; default 28 for CIFAR and SVHN, 0 for none.
        limit: keep at most this many examples of each split.
        seed: seed of the synthetic set "blobs"; the others do not depend on it.
        label: of one's own data: name of the column, array or feature with the labels.
        pixels: of one's own data: "half" for x/255 - 0.5, "unit" for x/255, "raw" for x as it is;
            by default "half" for images of folders and builders, "raw" for files of numbers.
        whole: of one's own data without parts: all of it is the test split, none is held out.

    Returns:
        A `Dataset`; of "imagenet2012" a `streams.ImageStream`, with `crop` as the images' side.

    Raises:
        DatasetNotFound: the name is unknown, or the files are missing, incomplete or damaged.
        ValueError: if an argument is out of range, or data of one's own does not fit (ragged rows,
            images of several sizes, no labels, too few examples).

    Example:

    >>> data = load("digits")
    >>> data.x_train.shape, data.x_test.shape, data.num_classes
    ((1257, 8, 8, 1), (360, 8, 8, 1), 10)
    """
    for argument, number in (("validation", validation), ("limit", limit)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(
                f"`{argument}` must be a positive integer or None. Received: {argument}={number!r}."
            )
    if name not in NAMES:
        return _limited(_own(name, data_dir, validation, label, pixels, whole, crop), limit)
    if label is not None or pixels is not None:
        raise ValueError(
            "Labels and pixels of this data set are known. Received: "
            f"label={label!r}, pixels={pixels!r} for {name!r}. They are for data of your own."
        )
    if name == "digits":
        return _limited(_digits(180 if validation is None else validation), limit)
    if name == "blobs":
        return _limited(_blobs(40 if validation is None else validation, seed), limit)
    directory = prepared.directory_of(data_dir)
    if download:
        prepared.download(name, directory)
    if name in STREAMED:
        return streams.load(name, data_dir, validation=validation, size=crop, limit=limit)
    classes, held_out, default_crop = PREPARED[name]
    held_out = held_out if validation is None else validation
    needed = None if limit is None else held_out + limit
    x_test, y_test, x_train, y_train = prepared.read(name, directory, needed)
    if held_out >= len(x_train):
        raise ValueError(
            f"`validation` must leave training examples. Received: validation={held_out} of "
            f"{len(x_train)}."
        )
    crop = default_crop if crop is None else crop
    cut_train = slice(held_out, None if limit is None else held_out + limit)
    cut_val, cut_test = slice(0, min(held_out, limit or held_out)), slice(0, limit)
    return Dataset(
        name=name,
        x_train=_pixels(x_train[cut_train], crop),
        y_train=y_train[cut_train],
        x_val=_pixels(x_train[cut_val], crop),
        y_val=y_train[cut_val],
        x_test=_pixels(x_test[cut_test], crop),
        y_test=y_test[cut_test],
        num_classes=classes,
        preprocessing="x/255 - 0.5" + (f", central {crop}×{crop} crop" if crop else ""),
        pixel_range=(-0.5, 0.5),
    )


def released_corruptions(
    data: Dataset, data_dir: str | os.PathLike | None = None, *, limit: int | None = None
) -> Callable[[str, int], tuple[np.ndarray, np.ndarray]]:
    """The released CIFAR-10-C images, for `evaluate_suite(..., released=...)`.

    Read from a prepared TensorFlow Datasets directory, `cifar10_corrupted/<name>_<severity>`;
    nothing is downloaded.

    Args:
        data: CIFAR-10; the images come in its units and with its central crop.
        data_dir: as in `load`.
        limit: only the first so many test images.

    Returns:
        A function from (corruption, severity), as named in `evaluation.corruptions`, to images and
        labels. It raises `DatasetNotFound` where they are not prepared.

    Raises:
        ValueError: for another data set.

    Example:

    >>> released_corruptions(load("digits"))
    Traceback (most recent call last):
        ...
    ValueError: The released corruptions are of cifar10. Received: data set 'digits'.
    """
    if data.name != "cifar10":
        raise ValueError(
            f"The released corruptions are of cifar10. Received: data set {data.name!r}."
        )
    directory = prepared.directory_of(data_dir)

    def read(corruption, severity):
        name = f"cifar10_corrupted/{_RELEASED.get(corruption, corruption)}_{severity}"
        images, labels = prepared.read(name, directory, limit, splits=("test",))
        return _pixels(images, data.input_shape[0]), labels

    return read


def _own(name, data_dir, validation, label, pixels, whole, crop):
    """Data of the user's own: from a file, a folder, or a builder in the data directory."""
    if own.is_path(name):
        found = own.read(name, label)
    elif prepared.is_prepared(name, data_dir):
        found = prepared.read_any(name, prepared.directory_of(data_dir), label)
    else:
        raise DatasetNotFound(
            f"Unknown data set. Received: name={name!r}, which is no file or folder here, nor "
            f"prepared in {prepared.directory_of(data_dir)}. Choose one of {', '.join(NAMES)}, a "
            "path to an .npz, a .csv or a folder of images by class, or point `--data-dir` to "
            f"where {name}/<version>/ is."
        )
    return parts.split(found, validation=validation, pixels=pixels, whole=whole, crop=crop)


def _limited(data: Dataset, limit: int | None) -> Dataset:
    if limit is None:
        return data
    arrays = {
        f"{axis}_{part}": getattr(data, f"{axis}_{part}")[:limit]
        for axis in "xy"
        for part in ("train", "val", "test")
    }
    return Dataset(
        name=data.name,
        num_classes=data.num_classes,
        preprocessing=data.preprocessing,
        pixel_range=data.pixel_range,
        class_names=data.class_names,
        **arrays,
    )


def _digits(validation: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetNotFound(
            "The data set 'digits' is embedded in scikit-learn, which is not installed. "
            "Install it with: pip install scikit-learn"
        ) from error
    x, y = load_digits(return_X_y=True)
    # The file is ordered by writer: shuffle once, the same way for everybody.
    order = np.random.default_rng(0).permutation(len(x))
    x = (x[order] / 16.0).astype("float32").reshape(-1, 8, 8, 1)
    y = y[order].astype("int64")
    test = 360
    if validation >= len(x) - test:
        raise ValueError(
            f"`validation` must leave training examples. Received: validation={validation} of "
            f"{len(x) - test}."
        )
    return Dataset(
        name="digits",
        x_test=x[:test],
        y_test=y[:test],
        x_val=x[test : test + validation],
        y_val=y[test : test + validation],
        x_train=x[test + validation :],
        y_train=y[test + validation :],
        num_classes=10,
        preprocessing="x/16",
        pixel_range=(0.0, 1.0),
    )


def _blobs(validation: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    classes, per_part = 3, {"train": 120, "val": validation, "test": 60}
    centres = rng.normal(size=(classes, 6))
    arrays = {}
    for part, count in per_part.items():
        y = rng.integers(0, classes, size=count)
        x = centres[y] + 0.25 * rng.normal(size=(count, 6))
        arrays[f"x_{part}"] = x.astype("float32")
        arrays[f"y_{part}"] = y.astype("int64")
    return Dataset(
        name="blobs",
        num_classes=classes,
        preprocessing="none",
        pixel_range=(-math.inf, math.inf),
        **arrays,
    )


def _pixels(images: np.ndarray, crop: int | None) -> np.ndarray:
    if crop:
        height, width = images.shape[1:3]
        if not 0 < crop <= min(height, width):
            raise ValueError(
                f"`crop` must be between 1 and {min(height, width)}. Received: crop={crop}."
            )
        top, left = (height - crop) // 2, (width - crop) // 2
        images = images[:, top : top + crop, left : left + crop]
    pixels = images.astype("float32")
    pixels /= 255.0
    pixels -= 0.5
    return pixels


# ----------------------------------------------------------------------------------- batches


class Batches(keras.utils.PyDataset):
    """Shuffled batches whose order is a function of (seed, epoch) and of nothing else.

    Keras repeats one permutation in every epoch for NumPy inputs under a fixed seed; and a run
    continued at epoch k would see the permutation of epoch 0. Pass it to
    `model.fit(batches, shuffle=False, callbacks=[batches.epoch_callback()])`.

    Args:
        x: array of shape (n, …).
        y: array of shape (n,) or (n, classes).
        batch_size: examples in a batch; the last one may be smaller.
        seed: non-negative integer.
        shuffle: whether to shuffle at all.

    Example:

    >>> import numpy as np
    >>> batches = Batches(np.arange(5.0), np.arange(5), batch_size=2, seed=1)
    >>> len(batches), sorted(np.concatenate([batches[i][1] for i in range(3)]).tolist())
    (3, [0, 1, 2, 3, 4])
    """

    def __init__(self, x, y, batch_size: int = 128, seed: int = 0, shuffle: bool = True):
        super().__init__()
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(
                "`x` and `y` must be as long as each other and not empty. Received: "
                f"len(x)={len(x)}, len(y)={len(y)}."
            )
        for name, number, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(number, int | np.integer) or number < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}. Received: {name}={number!r}."
                )
        self.x, self.y = x, y
        self.batch_size, self.seed, self.shuffle = int(batch_size), int(seed), bool(shuffle)
        self._next_epoch = 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch, now and until the next one begins."""
        order = np.arange(len(self.x))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.x))
        self._order = order
        self._next_epoch = epoch

    def on_epoch_begin(self) -> None:
        # Keras calls this hook without an epoch number; epoch_callback supplies it when training
        # does not start at epoch 0.
        epoch = self._next_epoch
        self.set_epoch(epoch)
        self._next_epoch = epoch + 1

    def epoch_callback(self) -> keras.callbacks.Callback:
        """Callback that tells this data set the epoch number; needed with `initial_epoch`."""
        return EpochNumber(self)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, index: int):
        rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.x[rows], self.y[rows]
