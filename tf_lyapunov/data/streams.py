"""Image data sets too large for memory: JPEG files in TFDS shards, decoded as they are needed.

Training reads shards in parallel, decodes only the crop that it uses, and is a function of
(seed, epoch) alone: a run continued at epoch k sees what an uninterrupted one sees. Damaged shards
and images are refused by name, or skipped by name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from ..errors import DatasetNotFound
from .cachelocks import take_over
from .epochs import EpochNumber
from .jpegs import decoder, guarded, is_intact, parsed
from .prepared import prepared_directory
from .shards import Shards

# name -> (training split, split that serves as the test set)
STREAMED = {"imagenet2012": ("train", "validation")}
ON_DAMAGE = ("refuse", "skip")
# Shards that are read at once; more hides the latency of network disks.
_CYCLE = 16


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    validation: int | None = None,
    size: int | None = None,
    limit: int | None = None,
    on_damage: str = "refuse",
    cache: str | None = None,
    deterministic: bool = True,
    shuffle_buffer: int = 8192,
) -> ImageStream:
    """Open a prepared image data set without reading it.

    Args:
        name: "imagenet2012".
        data_dir: TensorFlow Datasets directory; default `TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`.
        validation: number of leading training examples held out; default 1000. The published
            validation images are the test split.
        size: side of the images; default 224.
        limit: keep at most this many examples of each split.
        on_damage: "refuse" ends with the names of damaged shards and images, "skip" warns of each
            and goes on; what follows a damaged record in its shard cannot be read either.
        cache: "memory", or a path prefix for files, to keep the undecoded images after the first
            epoch; the order then varies only by the shuffle buffer.
        deterministic: False lets images arrive in any order, which is faster.
        shuffle_buffer: undecoded images among which the next one is drawn (about 110 kB each).

    Returns:
        An `ImageStream`, which `experiments` take in the place of a `datasets.Dataset`.

    Raises:
        DatasetNotFound: the name is unknown, or files are missing or of another format.
        ValueError: an option is impossible.
    """
    if name not in STREAMED:
        raise DatasetNotFound(
            f"Not a streamed data set. Received: name={name!r}. Choose one of "
            f"{', '.join(STREAMED)}, or use `datasets.load`."
        )
    if on_damage not in ON_DAMAGE:
        raise ValueError(f"`on_damage` must be one of {ON_DAMAGE}. Received: {on_damage!r}.")
    counts = {"validation": validation, "size": size, "limit": limit}
    for label, number in {**counts, "shuffle_buffer": shuffle_buffer}.items():
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"`{label}` must be a positive integer. Received: {number!r}.")
    path = prepared_directory(name, data_dir)
    train, test = (Shards.of(path, split) for split in STREAMED[name])
    held_out = 1000 if validation is None else validation
    if held_out >= train.count:
        raise ValueError(
            f"`validation` must leave training examples. Received: validation={held_out} of "
            f"{train.count}."
        )
    size = 224 if size is None else size
    return ImageStream(
        name,
        train.part(held_out, limit),
        train.part(0, min(held_out, limit or held_out)),
        test.part(0, limit),
        size,
        on_damage=on_damage,
        cache=cache,
        deterministic=deterministic,
        shuffle_buffer=shuffle_buffer,
    )


class ImageStream:
    """A data set of images that stay in their files; it stands in for a `datasets.Dataset`.

    Attributes:
        x_train, y_train, x_test, y_test: `Column`s, read where they are sliced.
        x_val, y_val: arrays of the held-out images, read at first use.
        num_classes, class_names, preprocessing, pixel_range, input_shape: as of a `Dataset`.
        damaged: names of what was skipped so far.
    """

    # Labels are numbers of classes.
    class_names = None

    def __init__(self, name, train, held_out, test, size, **options):
        self.name, self.size, self.num_classes = name, size, train.num_classes
        self.input_shape, self.pixel_range = (size, size, 3), (-0.5, 0.5)
        self.preprocessing = (
            f"x/255 - 0.5, central {size}×{size} (random crop and flip in training)"
        )
        self._train, self._held_out = train, held_out
        self.on_damage, self.cache = options["on_damage"], options["cache"]
        self.deterministic = options["deterministic"]
        self.shuffle_buffer = options["shuffle_buffer"]
        self.damaged: list[str] = []
        self._caches: dict = {}
        self.x_train, self.y_train = Column(self, train, 0), Column(self, train, 1)
        self.x_test, self.y_test = Column(self, test, 0), Column(self, test, 1)

    @functools.cached_property
    def x_val(self) -> np.ndarray:
        return self._validation[0]

    @functools.cached_property
    def y_val(self) -> np.ndarray:
        return self._validation[1]

    @functools.cached_property
    def _validation(self):
        return self._arrays(self._held_out, slice(None))

    def split(self, name: str):
        """`(x, y)` of the split "train", "val" or "test"."""
        if name not in ("train", "val", "test"):
            raise ValueError(f"`split` must be 'train', 'val' or 'test'. Received: split={name!r}.")
        return getattr(self, f"x_{name}"), getattr(self, f"y_{name}")

    def fingerprint(self) -> str:
        """Digest of the files' names and sizes and of the ranges used."""
        parts = [self.size, *(part.fingerprint() for part in (self._train, self._held_out))]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def steps_per_epoch(self, batch_size: int, shards: int = 1) -> int:
        """Whole batches in an epoch, of `batch_size` examples in each of `shards` readers."""
        steps = self._train.count // (batch_size * shards)
        if steps < 1:
            raise ValueError(
                f"`batch_size` must leave a batch. Received: batch_size={batch_size}, "
                f"{shards} reader(s), {self._train.count} examples."
            )
        return steps

    def batches(self, batch_size: int, *, seed: int = 0, shard=(0, 1)) -> StreamBatches:
        """Shuffled, randomly cropped and flipped training batches, for `fit(..., shuffle=False)`.

        Args:
            batch_size: examples in a batch, of this reader.
            seed: of order, crops and flips.
            shard: (index, number) of this reader; readers share no example in an epoch.
        """
        return StreamBatches(self, batch_size, seed, shard)

    def epoch(self, batch_size: int, epoch: int, *, seed: int = 0, shard=(0, 1), part=(0, 1)):
        """One epoch as a `tf.data.Dataset` of (float32 (batch, size, size, 3), int64 (batch,)).

        It has `steps_per_epoch` batches; where damaged images are skipped, its first images fill
        it up. With `part=(k, w)`, the kth of w equal parts of each batch, and nothing else decoded
        (unless damaged images are skipped: what fills a gap is known only then).
        """
        import tensorflow as tf

        steps, mixed = self.steps_per_epoch(batch_size, shard[1]), seed * 1_000_003 + epoch
        if self.cache:
            records = self._kept(shard)
        else:
            records = self._records(self._train, shard, mixed)
        # TensorFlow mixes its global seed in, which a run sets to the same value.
        records = records.shuffle(self.shuffle_buffer, mixed, reshuffle_each_iteration=False)
        images, rows = self._images(records, mixed, batch_size, part), batch_size // part[1]
        batches = images.repeat().batch(
            rows,
            drop_remainder=True,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=self.deterministic,
        )
        options = tf.data.Options()
        options.deterministic = self.deterministic
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.OFF
            if shard[1] > 1
            else tf.data.experimental.AutoShardPolicy.DATA
        )
        return batches.take(steps).prefetch(tf.data.AUTOTUNE).with_options(options)

    def _kept(self, shard):
        """The undecoded training records, kept after they were read once."""
        if shard not in self._caches:
            where = "" if self.cache == "memory" else self._cache_file(shard)
            self._caches[shard] = self._records(self._train, shard).cache(where)
        return self._caches[shard]

    def _cache_file(self, shard) -> str:
        """Name of a file cache, which tells its content: ranges, files, damage and readers."""
        content = (self._train.fingerprint(), self.on_damage, shard[1])
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        where = f"{self.cache}-{digest}-{shard[0]}"
        take_over(where)
        return where

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turns TensorFlow's errors about damaged files into ones that name the files."""
        import tensorflow as tf

        damage = (
            tf.errors.DataLossError,
            tf.errors.FailedPreconditionError,  # fewer records than the data set lists
            tf.errors.InvalidArgumentError,
            tf.errors.NotFoundError,
        )
        try:
            yield
        except damage as error:
            # Of the first damaged shard alone: reading all of ImageNet takes long.
            found = next(filter(None, self._damage_by_file()), None)
            if found is None:
                raise
            raise DatasetNotFound(
                f"Files of '{self.name}' are damaged: {'; '.join(found[:5])}. Replace them, or "
                "pass on_damage='skip' (in an experiment: dataset.on_damage: skip)."
            ) from error

    def find_damage(self) -> Iterator[str]:
        """Names of damaged shards and images, found by reading and decoding everything."""
        return itertools.chain.from_iterable(self._damage_by_file())

    def _damage_by_file(self) -> Iterator[list[str]]:
        """Names of what is damaged in one file after the other."""
        import tensorflow as tf

        features = self._train.features

        # One function for all files: tracing its decoders takes longer than a small file.
        @tf.function(input_signature=[tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.string)])
        def tried(i, record):
            return i, is_intact(features, record)

        lengths: dict[str, int] = {}
        for shards in (self._held_out, self._train, self.x_test.shards):
            for path, length in zip(shards.paths, shards.lengths, strict=True):
                lengths.setdefault(path, length)
        for path, length in lengths.items():
            records, read = tf.data.TFRecordDataset(path), 0
            with contextlib.suppress(tf.errors.DataLossError, tf.errors.OutOfRangeError):
                for _ in records:
                    read += 1
            checked = records.take(read).enumerate()
            checked = checked.map(tried, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
            intact = {int(i) for i, good in checked.as_numpy_iterator() if good}
            found = [_image_name(path, i) for i in range(read) if i not in intact]
            yield found + ([_shard_name(path, read)] if read < length else [])

    # The pipeline.

    def _records(self, shards: Shards, shard=(0, 1), seed: int | None = None):
        """Dataset of records, in the order of the files or from many at once.

        Where damage is skipped, of (path, position, record).
        """
        import tensorflow as tf

        order = np.arange(len(shards.paths))
        by_file = shard[1] == 1 or len(order) >= shard[1]
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        order = order[shard[0] :: shard[1]] if by_file else order
        columns = (np.array(shards.paths)[order], *(a[order] for a in (shards.skips, shards.takes)))
        files = tf.data.Dataset.from_tensor_slices((*columns, shards.lengths[order]))
        if seed is None and not self.cache:
            records = files.flat_map(self._file)
        else:
            records = files.interleave(
                self._file, cycle_length=_CYCLE, num_parallel_calls=tf.data.AUTOTUNE
            )
        return records if by_file else records.shard(shard[1], shard[0])

    def _file(self, path, skip, take, length):
        """Records of one file in a range of positions."""
        import tensorflow as tf

        records = tf.data.TFRecordDataset(path)
        if self.on_damage == "refuse":
            # A file may end early between two records, which is no error of its own.
            records = records.skip(skip).take(take)
            return records.apply(tf.data.experimental.assert_cardinality(take))
        # The empty record at the end tells how many came before it.
        records = records.ignore_errors().concatenate(tf.data.Dataset.from_tensors(""))
        records = records.enumerate().take_while(lambda i, record: i < skip + take)
        records = records.filter(lambda i, record: (i >= skip) | (record == ""))

        def name(i, record):
            short = (record == "") & (i < length)
            _when(short, lambda: tf.numpy_function(self._note_shard, [path, i], []))
            return path, i, record

        return records.map(name).filter(lambda path, i, record: record != "")

    def _images(self, records, seed: int | None, batch_size: int = 1, part=(0, 1)):
        """Dataset of (image, label), or a part of each batch; augmented where a seed is given."""
        import tensorflow as tf

        decode = decoder(self._train.features, self.size, augment=seed is not None)

        def plain(n, record):
            return decode(record, tf.stack([tf.cast(seed or 0, tf.int64), n]))

        def lenient(n, item):
            path, i, record = item
            pair = tf.stack([tf.cast(seed or 0, tf.int64), n])
            good, image, label = guarded(decode, self.size, record, pair)
            _when(~good, lambda: tf.numpy_function(self._note_image, [path, i], []))
            return good, image, label

        def mine(n, *unused):
            return n % batch_size // (batch_size // part[1]) == part[0]

        skip, divided = self.on_damage == "skip", part[1] > 1
        numbered = records.enumerate()
        if divided and not skip:
            numbered = numbered.filter(mine)
        images = numbered.map(
            lenient if skip else plain,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=self.deterministic,
        )
        if skip:
            images = images.filter(lambda good, image, label: good)
            images = images.map(lambda good, image, label: (image, label))
            if divided:
                images = images.repeat().enumerate().filter(mine).map(lambda n, pair: pair)
        return images

    def _arrays(self, shards: Shards, rows: slice):
        """Images and labels of some rows of a range."""
        start, stop, step = rows.indices(shards.count)
        if step != 1:
            raise ValueError(f"Images are read in order. Received: a slice with step {step}.")
        chosen = shards.part(start, max(stop - start, 0))
        x = np.empty((chosen.count, self.size, self.size, 3), np.float32)
        y = np.empty(chosen.count, np.int64)
        if not chosen.count:
            return x, y
        records = self._records(chosen)
        n = 0
        with self.reading():
            for images, labels in self._images(records, None).batch(64).as_numpy_iterator():
                x[n : n + len(labels)], y[n : n + len(labels)] = images, labels
                n += len(labels)
        return x[:n], y[:n]

    def _note_shard(self, path, read):
        self._note(_shard_name(path.decode(), int(read)))

    def _note_image(self, path, position):
        self._note(_image_name(path.decode(), int(position)))

    def _note(self, what: str) -> None:
        if what not in self.damaged:
            self.damaged.append(what)
            warnings.warn(f"Skipped in '{self.name}': {what}.", stacklevel=2)


class StreamBatches(keras.utils.PyDataset):
    """Training batches of an `ImageStream`, read ahead in the background and taken in order.

    What they hold is a function of (seed, epoch) alone, so that a run can continue at any epoch.
    Going back, or on by more than one, reads the epoch again from its start.
    """

    def __init__(self, stream: ImageStream, batch_size: int, seed: int, shard: tuple[int, int]):
        super().__init__()
        self.stream, self.arguments = stream, (batch_size, seed, tuple(shard))
        self.batch_size = batch_size
        self._steps = stream.steps_per_epoch(batch_size, shard[1])
        self._next_epoch = 0
        self.set_epoch(0)

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Take the content of this epoch, now and until the next one begins."""
        self._epoch = self._next_epoch = epoch
        self._iterator, self._position, self._part = None, 0, None

    def on_epoch_begin(self) -> None:
        epoch = self._next_epoch
        self.set_epoch(epoch)
        self._next_epoch = epoch + 1

    def epoch_callback(self) -> keras.callbacks.Callback:
        """Callback that tells the epoch number; needed with `initial_epoch`."""
        return EpochNumber(self)

    def __getitem__(self, index: int):
        return self.rows(index, (0, 1))

    def rows(self, index: int, part: tuple[int, int]):
        """Part k of w equal ones of a batch, for a worker that needs no other.

        Raises:
            ValueError: w does not divide the batch size.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Batch {index} of {len(self)}.")
        size, seed, shard = self.arguments
        if size % part[1]:
            raise ValueError(f"Parts must be equal. Received: {part[1]} parts of {size} examples.")
        with self.stream.reading():
            if self._iterator is None or index < self._position or part != self._part:
                epoch = self.stream.epoch(size, self._epoch, seed=seed, shard=shard, part=part)
                self._iterator, self._position, self._part = epoch.as_numpy_iterator(), 0, part
            batch = None
            for _ in range(index + 1 - self._position):
                batch = next(self._iterator, None)
        if batch is None:
            raise DatasetNotFound(f"No training image of '{self.stream.name}' is intact.")
        self._position = index + 1
        return batch


class Column:
    """Images or labels of a range, as an array that is read where it is sliced."""

    def __init__(self, stream: ImageStream, shards: Shards, which: int):
        self.stream, self.shards, self.which = stream, shards, which
        self.shape = (shards.count, *(stream.input_shape if which == 0 else ()))
        self.dtype = np.dtype("int64" if which else "float32")

    def __len__(self) -> int:
        return self.shards.count

    def __getitem__(self, rows):
        if not isinstance(rows, slice):
            raise TypeError(f"Streamed images take slices only. Received: {type(rows).__name__}.")
        if self.which:  # labels alone need no decoding of images
            return self._labels(rows)
        return self.stream._arrays(self.shards, rows)[0]

    def _labels(self, rows: slice):
        # Skipped images have no label either, so that rows keep matching.
        if self.stream.on_damage == "skip":
            return self.stream._arrays(self.shards, rows)[1]
        start, stop, _ = rows.indices(len(self))
        chosen = self.shards.part(start, max(stop - start, 0))
        with self.stream.reading():
            found = [
                int(parsed(chosen.features, record)["label"])
                for record in (self.stream._records(chosen) if chosen.count else ())
            ]
        return np.array(found, np.int64)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype=dtype)


def _when(condition, act) -> None:
    import tensorflow as tf

    def then():
        with tf.control_dependencies([act()]):
            return tf.constant(True)

    tf.cond(condition, then, lambda: tf.constant(False))


def _shard_name(path: str, read: int) -> str:
    return f"{os.path.basename(path)} cannot be read after record {read}"


def _image_name(path: str, position: int) -> str:
    return f"{os.path.basename(path)}, record {position} is no intact JPEG image"
