"""Batches divided evenly among replicas and workers, and read ahead of them."""

from __future__ import annotations

import collections
import concurrent.futures
import warnings

import keras
import numpy as np


class Padded(keras.utils.PyDataset):
    """Batches whose size is a multiple of the replicas, with weights that undo the padding.

    A replica's loss is the mean over its share, and their mean is taken. With P - n copies of
    the first example of weight 0, and weights P/n on the n others, that is the mean over the n
    examples, whatever their number. Metrics weigh such a batch by P instead of n.

    Args:
        batches: a `PyDataset` of pairs (x, y).
        replicas: what the batch size is made a multiple of.
        part: `(k, w)`: only the kth of w equal parts of each batch, for a worker of its own.

    Example:

    >>> import numpy as np
    >>> from tf_lyapunov.data.arrays import Batches
    >>> rows = Batches(np.arange(3.0), np.arange(3), batch_size=3, shuffle=False)
    >>> [part.tolist() for part in Padded(rows, 2)[0]]
    [[0.0, 1.0, 2.0, 0.0], [0, 1, 2, 0], [1.3333333730697632, 1.3333333730697632, \
1.3333333730697632, 0.0]]
    """

    def __init__(self, batches, replicas: int, part: tuple[int, int] = (0, 1)):
        super().__init__()
        self.batches, self.replicas, self.part = batches, replicas, part
        # Streams decode a worker's own part alone, where there is nothing to pad.
        self._alone = hasattr(batches, "rows") and batches.batch_size % replicas == 0

    def __len__(self) -> int:
        return len(self.batches)

    def on_epoch_begin(self) -> None:
        self.batches.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.batches.on_epoch_end()

    def __getitem__(self, index: int):
        if self._alone:
            x, y = self.batches.rows(index, self.part)
            return x, y, np.ones(len(x), np.float32)
        x, y = self.batches[index]
        count = len(x)
        size = -(-count // self.replicas) * self.replicas
        rows = np.concatenate([np.arange(count), np.zeros(size - count, int)])
        weights = np.where(np.arange(size) < count, np.float32(size / count), np.float32(0))
        share = size // self.part[1]
        mine = slice(self.part[0] * share, (self.part[0] + 1) * share)
        return x[rows][mine], y[rows][mine], weights[mine]


def without_padding(logs, before, batches):
    """Means over all examples, where the last batch counted as many as it was padded to.

    Args:
        logs: means over everything.
        before: means without the last batch, if there are others.
        batches: `Padded` batches, equal but for the last.
    """
    count, size = len(batches.batches.x), batches.batches.batch_size
    full = (len(batches) - 1) * size if before else 0
    last = count - full
    padded = -(-last // batches.replicas) * batches.replicas
    found = {}
    for name, value in logs.items():
        earlier = full * before.get(name, 0.0)
        found[name] = (earlier + last * (value * (full + padded) - earlier) / padded) / count
    return found


def batch_sizes(batches) -> set[int]:
    """Numbers of examples in the batches of an epoch.

    Example:

    >>> import numpy as np
    >>> from tf_lyapunov.data.arrays import Batches
    >>> sorted(batch_sizes(Batches(np.zeros(10), np.zeros(10), batch_size=4)))
    [2, 4]
    """
    if not hasattr(batches, "x"):
        return {batches.batch_size}  # streams have whole batches
    count = len(batches.x)
    return {min(count, batches.batch_size), count % batches.batch_size} - {0}


def warn_of_padding(model, batches, replicas):
    """Says so where copies that pad a batch enter the statistics of normalizations."""
    names = [
        v.name for v in model._flatten_layers() if isinstance(v, keras.layers.BatchNormalization)
    ]
    uneven = [size for size in batch_sizes(batches) if size % replicas]
    if names and uneven and replicas > 1:
        warnings.warn(
            f"A batch of {uneven[0]} examples is filled up for {replicas} replicas with copies of "
            f"its first one, which enter the statistics of {names[0]!r} (no loss or metric): "
            "weights will differ from those of one replica. Choose sizes that can be divided.",
            stacklevel=2,
        )


class InOrder(keras.utils.PyDataset):
    """Arrays in their order."""

    def __init__(self, x, y, batch_size):
        super().__init__()
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, index):
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.x[rows], self.y[rows]


def read_ahead(batches, count: int = 2):
    """Batches in order, the next `count` of them made while the caller computes."""
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        coming: collections.deque = collections.deque()
        try:
            for index in range(len(batches) + count):
                if index < len(batches):
                    coming.append(reader.submit(batches.__getitem__, index))
                if index >= count:
                    yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
