"""Inputs as arrays, PyDatasets, tf.data or any iterable of batches, in blocks of one size."""

import concurrent.futures
from collections.abc import Mapping

import keras
import numpy as np

from tf_lyapunov.program.inputs import to_array

# Bytes of inputs that are worked on at once: every block costs a hundredth of a second by itself.
SMALLEST_BLOCK, LARGEST_BLOCK = 2**23, 2**26


def blocks(x, y, inputs):
    """The same as `batches`, small ones joined and large ones cut: by 8 to 64 MB.

    Memory and time then depend on neither the batch size of a data set nor its length. A tf.data
    pipeline is read one block ahead: it runs while the last one is worked on.
    """
    found = _joined(x, y, inputs)
    return _ahead(found) if _is_pipeline(x) else found


def _ahead(items):
    """The items of a generator, each asked for, in another thread, when the one before is given."""
    with concurrent.futures.ThreadPoolExecutor(1, "reading") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _joined(x, y, inputs):
    waiting, size = [], 0
    for found, labels in batches(x, y, inputs):
        if not _is_batch(found, inputs):  # its check names it as it came
            yield from _cut(waiting)
            yield found, labels
            waiting, size = [], 0
            continue
        if waiting and not _fit(waiting[0], (found, labels)):
            yield from _cut(waiting)
            waiting, size = [], 0
        waiting.append((found, labels))
        size += sum(a.nbytes for a in found)
        if size >= SMALLEST_BLOCK:
            yield from _cut(waiting)
            waiting, size = [], 0
    yield from _cut(waiting)


def _is_batch(found, inputs):
    """Whether arrays have as many axes as the model's inputs, as far as those are known."""
    declared = inputs.shapes or [None] * len(found)
    return all(s is None or a.ndim == len(s) for a, s in zip(found, declared, strict=True))


def _fit(one, other):
    """Whether two batches can be one: others are checked as they came."""
    labels = [None if y is None else (y.shape[1:], y.dtype) for _, y in (one, other)]
    arrays = [[(a.shape[1:], a.dtype) for a in found] for found, _ in (one, other)]
    whole = all(a.ndim for found, _ in (one, other) for a in found)
    return whole and arrays[0] == arrays[1] and labels[0] == labels[1]


def _cut(waiting):
    """Blocks of batches that fit together, if there are any."""
    if not waiting:
        return
    found, labels = waiting[0]
    if len(waiting) > 1:
        found = [np.concatenate([b[i] for b, _ in waiting]) for i in range(len(found))]
        labels = None if labels is None else np.concatenate([y for _, y in waiting])
    size, counts = sum(a.nbytes for a in found), {len(a) if a.ndim else 0 for a in found}
    if size <= LARGEST_BLOCK or len(counts) > 1 or (labels is not None and labels.ndim == 0):
        yield found, labels
        return
    (count,) = counts
    rows = max(count * LARGEST_BLOCK // size, 1)
    for start in range(0, count, rows):
        stop = start + rows
        # What labels are too many stay with the last block, whose check refuses them.
        own = slice(start, stop if stop < count else None)
        yield [a[start:stop] for a in found], None if labels is None else labels[own]


def batches(x, y, inputs):
    """Yields `(inputs, labels or None)` from arrays, a PyDataset, or an iterable of batches.

    Args:
        x: array (n, …), or a list, tuple or dict with one for each input of the model;
            `keras.utils.PyDataset`, tf.data or any finite iterable of batches, each `x` or
            `(x, y)` or `(x, y, sample_weight)`.
        y: labels for an array or for a data set without labels, or None.
        inputs: `Inputs` of the model.

    Yields:
        A list with one array for each input, and labels.

    Raises:
        ValueError: if labels come twice, the data set is infinite or empty, or see `Inputs.flat`.
    """
    if is_arrays(x):
        found = inputs.flat(x)
        given = None if y is None else to_array(y, "y")
        if given is not None and given.ndim == 0:
            raise ValueError(f"`y` must have one label per input. Received: y={y!r}.")
        yield found, given
        return
    empty = True
    labels = None if y is None else to_array(y, "y")
    position = 0
    for batch in _iterate(x):
        empty = False
        parts = batch if isinstance(batch, (list, tuple)) else (batch,)
        found = inputs.flat(parts[0])
        given = to_array(parts[1], "y") if len(parts) > 1 and parts[1] is not None else None
        if given is not None and labels is not None:
            raise ValueError(
                "Labels must come once. Received: a data set with labels, and `y` as well. "
                "Leave `y` out."
            )
        if labels is not None and found[0].ndim:
            given = labels[position : position + len(found[0])]
            position += len(found[0])
        elif given is not None:
            _check_labels(given, found[0])
        yield found, given
    if empty:
        raise ValueError("`x` must hold at least one input. Received: an empty data set.")
    if labels is not None and position != len(labels):
        raise ValueError(
            f"`y` must have one label per input. Received: {len(labels)} labels for {position} "
            "inputs."
        )


def _check_labels(given, rows):
    """Refuses labels of a batch that are not as many as its inputs.

    Several batches together may have equally many of both, and labels of other inputs.
    """
    if given.ndim == 0 or (rows.ndim and len(given) != len(rows)):
        raise ValueError(
            "Every batch must have one label per input. Received: a batch with labels of shape "
            f"{given.shape} for inputs of shape {rows.shape}. Batch the data set, e.g. by "
            "`.batch(128)`, with `(x, y)` of equally many rows."
        )


def is_arrays(x):
    """Whether `x` holds all inputs at once, and is no data set."""
    whole = hasattr(x, "__array__") or keras.ops.is_tensor(x)
    return whole or isinstance(x, (list, tuple, Mapping))


def _iterate(x):
    if isinstance(x, keras.utils.PyDataset):
        count = x.num_batches
        if count is None:
            raise ValueError("`x` must be finite. Received: a PyDataset of unknown length.")
        return (x[i] for i in range(count))
    if _is_pipeline(x) and int(x.cardinality()) == -1:  # INFINITE
        raise ValueError(
            "`x` must be finite. Received: an endless data set. Leave out `.repeat()`, or use "
            "`.take(n)`."
        )
    if isinstance(x, (str, bytes)) or not hasattr(x, "__iter__"):
        raise TypeError(
            "`x` must be an array, a keras.utils.PyDataset or an iterable of batches. "
            f"Received: an object of type {type(x).__name__}."
        )
    return iter(x)


def _is_pipeline(x):
    """Whether it is a data set of tf.data, which any thread may read."""
    return hasattr(x, "cardinality") and hasattr(x, "element_spec")
