"""Which files of a prepared TFDS data set hold which examples. Needs tensorflow-datasets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import DatasetNotFound
from .prepared import import_tfds


class Shards:
    """A range of the examples of one split, in the order of its files.

    Attributes:
        paths: names of the files that hold examples of the range.
        skips, takes: for each, the examples before the range, and in it.
        lengths: for each, all of its examples.
        count: number of examples.
    """

    def __init__(self, features, paths, lengths, start=0, stop=None):
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        stop = int(bounds[-1]) if stop is None else min(int(bounds[-1]), stop)
        first = np.clip(start - bounds[:-1], 0, lengths)
        last = np.clip(stop - bounds[:-1], 0, lengths)
        used = np.flatnonzero(last > first)
        self._all, self.start, self.count = (features, paths, lengths), start, max(stop - start, 0)
        self.features = features
        self.paths = [paths[i] for i in used]
        self.skips, self.takes = first[used], (last - first)[used]
        self.lengths = np.asarray(lengths)[used]

    @classmethod
    def of(cls, path: Path, split: str) -> Shards:
        """All of a split of a prepared data set."""
        tfds = import_tfds()
        try:
            info = tfds.builder_from_directory(str(path)).info
            found = info.splits[split]
            paths, lengths = [str(p) for p in found.filepaths], list(found.shard_lengths)
            features = info.features
            if not isinstance(features["image"], tfds.features.Image):
                raise ValueError("its feature 'image' is no image")
            if info.file_format != tfds.core.FileFormat.TFRECORD:
                raise ValueError(f"its files are {info.file_format.value}, not TFRecord")
            features["label"].num_classes  # noqa: B018 - no classification data set without it
        except Exception as error:  # damaged JSON, missing splits or features
            raise DatasetNotFound(
                f"{path} is no prepared image classification data set with a split {split!r} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})."
            ) from error
        missing = [p for p in paths if not os.path.isfile(p)]
        if missing or not paths:
            names = ", ".join(os.path.basename(p) for p in missing[:5])
            raise DatasetNotFound(
                f"{len(missing)} of {len(paths)} files of the split {split!r} are missing in "
                f"{path}: {names}{', …' if len(missing) > 5 else ''}. Prepare the data set again."
            )
        return cls(features, paths, lengths)

    def part(self, start: int, count: int | None) -> Shards:
        """A range of this range."""
        stop = self.start + self.count
        first = self.start + start
        last = stop if count is None else min(stop, first + count)
        return Shards(*self._all, first, last)

    @property
    def num_classes(self) -> int:
        return self.features["label"].num_classes

    def fingerprint(self) -> list:
        """Names, sizes and ranges of the files: what tells two data sets apart cheaply."""
        files = [(os.path.basename(p), os.path.getsize(p)) for p in self.paths]
        return [files, self.skips.tolist(), self.takes.tolist()]
